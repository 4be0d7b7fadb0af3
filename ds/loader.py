"""Step -> this rank's micro-batches: a pure function, so there is no loader state to save.

Window i of a stream is tokens[i * T : i * T + T + 1] for T = context_length: rows to read and, one later, to predict. Owns the
order of the windows, what says which were read, and which documents they come from and where in them these begin. Knows nothing
of bytes on disk or models.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ds.shards import Labels, LabelStream, TokenStream

# Part of the data order: another number of rounds would give every run other windows.
NUM_ROUNDS = 8
# How many are in memory at once, and how many counts are remembered; what is found is the same.
SCAN_TOKENS = 2**22
PERMUTED_ROWS = 2**16
REMEMBERED_COUNTS = 2**16


class MicroBatch(NamedTuple):
    """What one rank reads at once: `rows` (B,) int64, the run's row numbers (step * rows_per_step + row of the step), `windows`
    (B,) int64, the windows that were read for them, and `ids` (B, T + 1) int64, their tokens.
    """

    rows: np.ndarray
    windows: np.ndarray
    ids: np.ndarray


class RankWindows(NamedTuple):
    """What one rank reads in a step, by micro-batch: `rows`, the run's row numbers, and their `windows`, both (G, B) int64."""

    rows: np.ndarray
    windows: np.ndarray


class Document(NamedTuple):
    """Tokens [start, stop) of a stream, the end of text included; `number` counts the documents before it."""

    number: int
    start: int
    stop: int


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
) -> Iterator[MicroBatch]:
    """What this rank reads in this step, micro-batch after micro-batch, as `rank_windows` says; only the arguments decide.
    Raises ValueError if the stream is shorter than one window.
    """
    num_tokens, num_windows = stream.num_tokens, count_windows(stream.num_tokens, context_length)
    if not num_windows:
        raise ValueError(f"{num_tokens} tokens hold no window of context_length + 1 = {context_length + 1}; add documents")
    place = {"step": step, "rank": rank, "world_size": world_size, "seed": seed}
    due = rank_windows(num_windows, micro_batch_rows=micro_batch_rows, rows_per_step=rows_per_step, **place)
    for rows, windows in zip(*due, strict=True):
        yield MicroBatch(rows, windows, read_windows(stream, windows, context_length))


def rank_windows(
    num_windows: int, *, step: int, rank: int, world_size: int, micro_batch_rows: int, rows_per_step: int, seed: int
) -> RankWindows:
    """What a rank reads in a step; any rank can compute it for any other. Row b of micro-batch m is row
    (m * world_size + rank) * micro_batch_rows + b of the step, so the ranks are disjoint and together read what one rank would.
    """
    windows = step_windows(step, rows_per_step, num_windows, seed)
    rows = step * rows_per_step + np.arange(rows_per_step, dtype=np.int64)
    shape = (-1, world_size, micro_batch_rows)
    return RankWindows(rows.reshape(shape)[:, rank], windows.reshape(shape)[:, rank])


def held_out_batches(
    stream: TokenStream, *, rank: int, world_size: int, micro_batch_rows: int, context_length: int, num_windows: int
) -> Iterator[np.ndarray]:
    """The `spread_windows` of the whole stream, in order: arrays (micro_batch_rows, context_length + 1) int64, the last of them
    with fewer rows if they do not suffice. Batch k goes to rank k % world_size.
    """
    windows = spread_windows(count_windows(stream.num_tokens, context_length), num_windows)
    for first in range(rank * micro_batch_rows, len(windows), world_size * micro_batch_rows):
        yield read_windows(stream, windows[first : first + micro_batch_rows], context_length)


def spread_windows(num_available: int, num_windows: int) -> np.ndarray:
    """`num_windows` of `num_available` windows, or all if there are fewer, spread evenly and ascending: (N,) int64.
    Window i is the one in the middle of the i-th of N equal parts.
    """
    count = min(num_windows, num_available)
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_available // (2 * max(count, 1))


def read_windows(stream: TokenStream, windows: np.ndarray, context_length: int) -> np.ndarray:
    """The tokens of windows: (B,) int64 -> (B, context_length + 1) int64."""
    return np.stack([stream.read(start, start + context_length + 1) for start in (windows * context_length).tolist()])


def document_borders(ids: np.ndarray, end_of_text_id: int) -> np.ndarray:
    """Where the pieces of documents begin in the inputs of windows, B * T tokens on end: (B, T + 1) int64 -> (N + 1,) int32.

    Ascending; the last is B * T. A row begins a piece, whatever it begins with, and so does a token behind an end of text.
    """
    begins = np.ones((len(ids), ids.shape[1] - 1), dtype=bool)
    begins[:, 1:] = ids[:, :-2] == end_of_text_id
    return np.append(np.flatnonzero(begins), begins.size).astype(np.int32)


def count_crossing(ids: np.ndarray, end_of_text_id: int) -> int:
    """How many windows hold the end of a document and the begin of another among their inputs: (B, T + 1) int64."""
    return int((ids[:, :-2] == end_of_text_id).any(1).sum())


def read_labels(labels: LabelStream, windows: np.ndarray, context_length: int) -> Labels[np.ndarray]:
    """The labels of the first T = context_length tokens of windows: (B,) int64 -> (B, T, k) ids and logs, (B, T) tail."""
    rows = [labels.read(start, start + context_length) for start in (windows * context_length).tolist()]
    return Labels(*(np.stack(field) for field in zip(*rows, strict=True)))


def step_windows(step: int, rows_per_step: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows of one step over all ranks, (rows_per_step,) int64: each epoch is another permutation of all windows."""
    epochs, places = np.divmod(step * rows_per_step + np.arange(rows_per_step, dtype=np.int64), num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        windows[epochs == epoch] = permute(places[epochs == epoch], num_windows, seed, epoch)
    return windows


def windows_of_run(num_steps: int, rows_per_step: int, num_windows: int, seed: int) -> np.ndarray:
    """The windows that the steps before `num_steps` read, each once, ascending: (N,) int64. Needs one byte for each window."""
    num_rows = num_steps * rows_per_step
    if num_rows >= num_windows:
        return np.arange(num_windows, dtype=np.int64)
    are_read = np.zeros(num_windows, dtype=bool)
    for first in range(0, num_rows, PERMUTED_ROWS):
        are_read[permute(np.arange(first, min(first + PERMUTED_ROWS, num_rows)), num_windows, seed, 0)] = True
    return np.flatnonzero(are_read)


def digest_rows(rows: np.ndarray, items: np.ndarray) -> np.ndarray:
    """A sum that says which row held which items: (N,) int64 row numbers, (N, L) int64 items -> (4,) int64.

    It adds up, over the rows, the four words (little-endian uint32) of blake2b-128 of the row's number and items. So the
    digests of any split of the rows, in any order, add up to that of all rows. Exact below 2**31 rows.
    """
    lines = np.concatenate([rows[:, None], items], axis=1, dtype="<i8")
    words = b"".join(blake2b(line, digest_size=16).digest() for line in lines)
    return np.frombuffer(words, dtype="<u4").reshape(-1, 4).sum(axis=0, dtype=np.int64)


def digest_hex(digest: np.ndarray) -> str:
    """A sum of `digest_rows`, (4,) int64 -> 32 hex digits, each word modulo 2**32."""
    return "".join(f"{word % 2**32:08x}" for word in digest.tolist())


def documents_between(stream: TokenStream, start: int, stop: int, end_of_text_id: int) -> list[Document]:
    """Every document that overlaps the tokens [start, stop), in order. Each is whole: it may start before and stop behind them.
    The last of a stream need not have an end of text. The first call counts the documents from the beginning of the stream,
    SCAN_TOKENS at a time; later calls remember the counts.
    """
    number, begin = 0, 0
    for first in range(0, start, SCAN_TOKENS):
        before = _count_stops(stream, first, min(first + SCAN_TOKENS, start), end_of_text_id)
        number, begin = number + before.num_stops, before.last_stop or begin
    stops = [place for found in _document_stops(stream, start, stop, end_of_text_id) for place in found.tolist()]
    if start < stop and stop not in stops[-1:]:
        behind = (int(found[0]) for found in _document_stops(stream, stop, stream.num_tokens, end_of_text_id))
        stops.append(next(behind, stream.num_tokens))
    return [Document(number + place, *ends) for place, ends in enumerate(pairwise([begin, *stops]))]


def permute(index: np.ndarray, num_items: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(num_items), another one for each epoch: (N,) indices -> (N,) int64, in O(N) memory.

    A balanced Feistel network over the least 4**h >= num_items, applied again to each result that is not below num_items
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Its round function is the mix of splitmix64 (Steele,
    Lea and Flood, 2014), with keys from blake2b of seed and epoch.
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


class _Stops(NamedTuple):
    """How many documents stop in some tokens, and where the last of them does; 0 if none."""

    num_stops: int
    last_stop: int


@lru_cache(maxsize=REMEMBERED_COUNTS)
def _count_stops(stream: TokenStream, start: int, stop: int, end_of_text_id: int) -> _Stops:
    found = list(_document_stops(stream, start, stop, end_of_text_id))
    return _Stops(sum(map(len, found)), int(found[-1][-1]) if found else 0)


def _document_stops(stream: TokenStream, start: int, stop: int, end_of_text_id: int) -> Iterator[np.ndarray]:
    """Right behind each end of text in the tokens [start, stop): (N,) int64 with N > 0, as they are found."""
    for first in range(start, stop, SCAN_TOKENS):
        at = first
        for ids in stream.parts(first, min(first + SCAN_TOKENS, stop)):
            found = np.flatnonzero(ids == end_of_text_id)
            if len(found):
                yield found + (at + 1)
            at += len(ids)
