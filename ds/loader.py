"""Step -> this rank's micro-batches: a pure function, so there is no loader state to save.

Window i of a source is its tokens[i * T : i * T + T + 1] for T = context_length: rows to read and, one later, to predict. A
stream is one source, or several that are read in fixed shares. Owns the order of the windows, what says which were read, and
which documents they come from and where in them these begin. Knows nothing of bytes on disk or models.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
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


class Grid(NamedTuple):
    """Where the windows of a stream lie: of each source its first token in the stream and how many windows it has. Windows are
    numbered over all sources, and none crosses from one to the next.
    """

    context_length: int
    first_tokens: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def num_windows(self) -> int:
        """Windows of all sources."""
        return sum(self.counts)


class BatchWarmup(NamedTuple):
    """Steps that grow: step s reads k * `first_rows` rows, where k rises along a line in whole numbers, from 1 at step 0 to
    that of a whole step at step `num_steps`.
    """

    first_rows: int
    num_steps: int


class Order(NamedTuple):
    """What decides which windows a step reads. Of any sum(quotas) rows on end each source gives its quota, spread evenly. Steps
    read `rows_per_step` rows each, in the `warmup` fewer.
    """

    grid: Grid
    quotas: tuple[int, ...]
    rows_per_step: int
    seed: int
    warmup: BatchWarmup | None = None


class MicroBatch(NamedTuple):
    """What one rank reads at once: `rows` (B,) int64, the run's row numbers (rows before the step + row of the step),
    `windows` (B,) int64, the windows that were read for them, and `ids` (B, T + 1) int64, their tokens.
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


def grid_of(tokens_by_source: Sequence[int], context_length: int) -> Grid:
    """The grid of a stream that holds so many tokens of each source, one source after another."""
    first_tokens = np.cumsum([0, *tokens_by_source[:-1]], dtype=np.int64).tolist()
    counts = (count_windows(num_tokens, context_length) for num_tokens in tokens_by_source)
    return Grid(context_length, tuple(first_tokens), tuple(counts))


@lru_cache(maxsize=1)
def quotas_of(weights: tuple[float, ...], num_rows: int) -> tuple[int, ...]:
    """`num_rows` rows in proportion to `weights`: each share rounded down, and what is left to the largest remainders."""
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * num_rows / sum(exact) for weight in exact]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: quotas[source] - shares[source])
    for source in by_remainder[: num_rows - sum(quotas)]:
        quotas[source] += 1
    return tuple(quotas)


def rows_of_step(step: int, rows_per_step: int, warmup: BatchWarmup | None) -> int:
    """How many rows a step reads, over all ranks: `rows_per_step`, in the `warmup` fewer."""
    if warmup is None or step >= warmup.num_steps:
        return rows_per_step
    return warmup.first_rows * (1 + step * (rows_per_step // warmup.first_rows - 1) // warmup.num_steps)


def rows_before(step: int, rows_per_step: int, warmup: BatchWarmup | None) -> int:
    """How many rows the steps before `step` read together; as fast for the last step of a run as for the first."""
    if warmup is None:
        return step * rows_per_step
    num_small = min(step, warmup.num_steps)
    risen = _sum_of_quotients(num_small, rows_per_step // warmup.first_rows - 1, warmup.num_steps)
    return warmup.first_rows * (num_small + risen) + (step - num_small) * rows_per_step


def micro_batches(
    stream: TokenStream, order: Order, *, step: int, rank: int, world_size: int, micro_batch_rows: int
) -> Iterator[MicroBatch]:
    """What this rank reads in this step, micro-batch after micro-batch, as `rank_windows` says; only the arguments decide.
    Raises ValueError if a source of the stream is shorter than one window.
    """
    if not min(order.grid.counts):
        words = f"{stream.num_tokens} tokens, or a source of them, hold no window"
        raise ValueError(f"{words} of context_length + 1 = {order.grid.context_length + 1}; add documents")
    due = rank_windows(order, step=step, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows)
    for rows, windows in zip(*due, strict=True):
        yield MicroBatch(rows, windows, read_windows(stream, windows, order.grid))


def rank_windows(order: Order, *, step: int, rank: int, world_size: int, micro_batch_rows: int) -> RankWindows:
    """What a rank reads in a step; any rank can compute it for any other. Row b of micro-batch m is row
    (m * world_size + rank) * micro_batch_rows + b of the step, so the ranks are disjoint and together read what one rank would.
    """
    rows = np.arange(*_ends_of_step(step, order), dtype=np.int64)
    shape = (-1, world_size, micro_batch_rows)
    return RankWindows(rows.reshape(shape)[:, rank], step_windows(step, order).reshape(shape)[:, rank])


def held_out_batches(
    stream: TokenStream, grid: Grid, *, source: int, rank: int, world_size: int, micro_batch_rows: int, num_windows: int
) -> Iterator[np.ndarray]:
    """The `spread_windows` of a source, in order: arrays (micro_batch_rows, context_length + 1) int64, the last of them with
    fewer rows if they do not suffice. Batch k goes to rank k % world_size.
    """
    windows = sum(grid.counts[:source]) + spread_windows(grid.counts[source], num_windows)
    for first in range(rank * micro_batch_rows, len(windows), world_size * micro_batch_rows):
        yield read_windows(stream, windows[first : first + micro_batch_rows], grid)


def spread_windows(num_available: int, num_windows: int) -> np.ndarray:
    """`num_windows` of `num_available` windows, or all if there are fewer, spread evenly and ascending: (N,) int64.
    Window i is the one in the middle of the i-th of N equal parts.
    """
    count = min(num_windows, num_available)
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_available // (2 * max(count, 1))


def window_starts(windows: np.ndarray, grid: Grid) -> np.ndarray:
    """Where in the stream each window begins: (N,) int64 -> (N,) int64."""
    first_windows = np.cumsum([0, *grid.counts[:-1]], dtype=np.int64)
    sources = np.searchsorted(first_windows, windows, side="right") - 1
    first_tokens = np.array(grid.first_tokens, dtype=np.int64)
    return first_tokens[sources] + (windows - first_windows[sources]) * grid.context_length


def read_windows(stream: TokenStream, windows: np.ndarray, grid: Grid) -> np.ndarray:
    """The tokens of windows: (B,) int64 -> (B, context_length + 1) int64."""
    starts = window_starts(windows, grid).tolist()
    return np.stack([stream.read(start, start + grid.context_length + 1) for start in starts])


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
    """The labels of the first T = context_length tokens of windows: (B,) int64 -> (B, T, k) ids and logs, (B, T) tail. Those of
    token t of window i are at position i * T + t, wherever the window lies.
    """
    rows = [labels.read(start, start + context_length) for start in (windows * context_length).tolist()]
    return Labels(*(np.stack(field) for field in zip(*rows, strict=True)))


def step_windows(step: int, order: Order) -> np.ndarray:
    """The windows of one step over all ranks, in the order of its rows: (N,) int64. A source is read whole before it is read
    again, and each epoch of it is another permutation of its windows.
    """
    start, stop = _ends_of_step(step, order)
    period_rows = sum(order.quotas)
    ends = [start, *range(start - start % period_rows + period_rows, stop, period_rows), stop]
    return np.concatenate([_windows_between(*part, order) for part in pairwise(ends)])


def rows_read(num_steps: int, order: Order) -> list[int]:
    """How many rows each source gives to the steps before `num_steps`. Over its number of windows, that is its epochs."""
    period, row = divmod(rows_before(num_steps, order.rows_per_step, order.warmup), sum(order.quotas))
    part = _pattern(row, row, order.quotas)
    near = np.bincount(part.sources[: row - sum(part.num_before)], minlength=len(order.quotas)).tolist()
    return [period * quota + sum(counts) for quota, *counts in zip(order.quotas, part.num_before, near, strict=True)]


def windows_of_run(num_steps: int, order: Order) -> np.ndarray:
    """The windows that the steps before `num_steps` read, each once, ascending: (N,) int64. Needs one byte for each window."""
    are_read, num_before = np.zeros(order.grid.num_windows, dtype=bool), 0
    for source, (num_rows, count) in enumerate(zip(rows_read(num_steps, order), order.grid.counts, strict=True)):
        if num_rows >= count:
            are_read[num_before : num_before + count] = True
        else:
            for first in range(0, num_rows, PERMUTED_ROWS):
                places = np.arange(first, min(first + PERMUTED_ROWS, num_rows))
                are_read[_source_windows(places, source, order)] = True
        num_before += count
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


def permute(index: np.ndarray, num_items: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """A permutation of range(num_items), another one for each epoch and source: (N,) indices -> (N,) int64, in O(N) memory.

    A balanced Feistel network over the least 4**h >= num_items, applied again to each result that is not below num_items
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Its round function is the mix of splitmix64 (Steele,
    Lea and Flood, 2014), with keys from blake2b of seed, epoch and source.
    """
    named = f"{seed} {epoch} {source}" if source else f"{seed} {epoch}"
    keys = np.frombuffer(blake2b(named.encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")
    half_bits = max((num_items - 1).bit_length() + 1, 2) // 2
    values = _feistel(np.asarray(index).astype(np.uint64), half_bits, keys)
    while (outside := values >= num_items).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _sum_of_quotients(count: int, numerator: int, denominator: int) -> int:
    """The sum of i * numerator // denominator over i in range(count), by Euclid's algorithm (AtCoder Library, `floor_sum`)."""
    total, rest = 0, 0
    while True:
        total += count * (count - 1) // 2 * (numerator // denominator) + count * (rest // denominator)
        numerator, rest = numerator % denominator, rest % denominator
        most = numerator * count + rest
        if most < denominator:
            return total
        count, rest = divmod(most, denominator)
        numerator, denominator = denominator, numerator


class _Ends(NamedTuple):
    """The run's rows [start, stop)."""

    start: int
    stop: int


def _ends_of_step(step: int, order: Order) -> _Ends:
    return _Ends(*(rows_before(each, order.rows_per_step, order.warmup) for each in (step, step + 1)))


class _Pattern(NamedTuple):
    """Some rows of a period: their `sources` (N,), and how many rows of the same source come before each of them in the period,
    its `numbers` (N,), both int64; `num_before` rows of each source come before the first of them.
    """

    sources: np.ndarray
    numbers: np.ndarray
    num_before: list[int]


def _pattern(start: int, stop: int, quotas: tuple[int, ...]) -> _Pattern:
    """The rows [start, stop) of a period and a few around them. Row j of a source with quota q has its place at (j + 1/2) / q
    of the period; of several at one place the earlier source comes first. In the first x of a period of P rows there are x * P
    rows but for half a row a source, so the rows near a place need no others.
    """
    num_rows, margin = sum(quotas), 2 * len(quotas)
    assert 0 <= start <= stop <= num_rows, (start, stop, num_rows)
    low, high = max(start - margin, 0), min(stop + margin, num_rows)
    firsts, stops = ([-((num_rows - 2 * quota * row) // (2 * num_rows)) for quota in quotas] for row in (low, high))
    sources = np.repeat(np.arange(len(quotas)), np.subtract(stops, firsts))
    numbers = np.concatenate([np.arange(*ends, dtype=np.int64) for ends in zip(firsts, stops, strict=True)])
    in_order = np.argsort((numbers + 0.5) / np.array(quotas)[sources], kind="stable")
    return _Pattern(sources[in_order], numbers[in_order], firsts)


def _windows_between(start: int, stop: int, order: Order) -> np.ndarray:
    """The windows of the run's rows [start, stop), all of one period: (stop - start,) int64."""
    period, row = divmod(start, sum(order.quotas))
    part = _pattern(row, row + stop - start, order.quotas)
    own = slice(row - sum(part.num_before), row - sum(part.num_before) + stop - start)
    sources, numbers, windows = part.sources[own], part.numbers[own], np.empty(stop - start, np.int64)
    for source in np.unique(sources).tolist():
        is_own = sources == source
        windows[is_own] = _source_windows(period * order.quotas[source] + numbers[is_own], source, order)
    return windows


def _source_windows(rows: np.ndarray, source: int, order: Order) -> np.ndarray:
    """The windows of a source's own rows, counted from the run's beginning: (N,) int64 -> (N,) int64."""
    epochs, places = np.divmod(rows, order.grid.counts[source])
    windows = places.copy()
    for epoch in np.unique(epochs).tolist() if order.grid.counts[source] > 1 else ():
        is_own = epochs == epoch
        windows[is_own] = permute(places[is_own], order.grid.counts[source], order.seed, epoch, source)
    return windows + sum(order.grid.counts[:source])


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
