"""Step -> this rank's micro-batches: a pure function, so there is no loader state to save.

Window i of a stream is tokens[i * T : i * T + T + 1] for T = context_length: rows to read and, one later, to predict. Owns the
order of the windows. Knows nothing of text, of bytes on disk, nor of the model.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from ds.shards import TokenStream

NUM_ROUNDS = 8


def count_windows(num_tokens: int, context_length: int) -> int:
    """How many windows of context_length + 1 tokens, overlapping by one, `num_tokens` hold."""
    return max(num_tokens - 1, 0) // context_length


def micro_batches(
    stream: TokenStream,
    *,
    step: int,
    rank: int,
    world_size: int,
    micro_batch_rows: int,
    rows_per_step: int,
    context_length: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """What this rank reads in this step: arrays (micro_batch_rows, context_length + 1) int64.

    Row b of micro-batch m is row (m * world_size + rank) * micro_batch_rows + b of the step, so the ranks are disjoint and
    together read what one rank would. Only the arguments decide.

    Raises:
        ValueError: the stream is shorter than one window.
    """
    num_windows = count_windows(stream.num_tokens, context_length)
    if not num_windows:
        raise ValueError(
            f"{stream.num_tokens} tokens hold no window of context_length + 1 = {context_length + 1}; add documents"
        )
    windows = step_windows(step, rows_per_step, num_windows, seed)
    for rows in windows.reshape(-1, world_size, micro_batch_rows)[:, rank]:
        yield _read_windows(stream, rows, context_length)


def held_out_batches(
    stream: TokenStream, *, rank: int, world_size: int, micro_batch_rows: int, context_length: int, num_windows: int
) -> Iterator[np.ndarray]:
    """The first `num_windows` windows, or all if there are fewer, in order: arrays (rows, context_length + 1) int64.

    Batch k goes to rank k % world_size; all have micro_batch_rows rows but the last, which may have fewer.
    """
    num_windows = min(num_windows, count_windows(stream.num_tokens, context_length))
    for first in range(rank * micro_batch_rows, num_windows, world_size * micro_batch_rows):
        yield _read_windows(stream, np.arange(first, min(first + micro_batch_rows, num_windows)), context_length)


def step_windows(step: int, rows_per_step: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of one step over all ranks, (rows_per_step,) int64: each epoch is another permutation of all windows."""
    epochs, places = np.divmod(step * rows_per_step + np.arange(rows_per_step, dtype=np.int64), num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        windows[epochs == epoch] = permute(places[epochs == epoch], num_windows, seed, epoch)
    return windows


def permute(index: np.ndarray, num_items: int, seed: int, epoch: int) -> np.ndarray:
    """Where a bijection of [0, num_items) sends each index: (N,) -> (N,) int64; O(1) memory, another one for each epoch.

    A balanced Feistel network over the least 4**h >= num_items, walked along its cycle until the value is inside again
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002); the round function is the mix of splitmix64 (Steele,
    Lea and Flood, 2014), keyed by blake2b of seed and epoch.
    """
    keys = np.frombuffer(blake2b(f"{seed} {epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")
    half_bits = max((num_items - 1).bit_length() + 1, 2) // 2
    values = _feistel(np.asarray(index).astype(np.uint64), half_bits, keys)
    while (outside := values >= num_items).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64(2**half_bits - 1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ values >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> 27) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> 31


def _read_windows(stream: TokenStream, windows: np.ndarray, context_length: int) -> np.ndarray:
    starts = (windows * context_length).tolist()
    return np.stack([stream.read(start, start + context_length + 1) for start in starts])
