"""Laws of ds/loader.py: a bijection for each epoch, the same tokens in a step for any number of ranks, and which they were."""

import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b, sha256
from inspect import getsource
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ds import loader
from ds.loader import (
    BatchWarmup,
    Document,
    Grid,
    Order,
    count_crossing,
    count_windows,
    digest_hex,
    digest_rows,
    document_borders,
    documents_between,
    grid_of,
    held_out_batches,
    micro_batches,
    permute,
    quotas_of,
    rank_windows,
    read_labels,
    read_windows,
    rows_before,
    rows_of_step,
    rows_read,
    spread_windows,
    step_windows,
    window_starts,
    windows_of_run,
)
from ds.shards import Labels, LabelStream, TokenStream, open_shard, write_shard

ROOT = Path(loader.__file__).parents[1]
SEEDS = st.integers(0, 2**70)


@dataclass(frozen=True)
class ArrayShard:
    """A shard whose ids are in memory, for examples by the hundred; test_shards.py proves that files give the same."""

    ids: np.ndarray
    path: Path = Path()
    fingerprint: str = ""
    sha256: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def read(self, tokens: slice) -> np.ndarray:
        return self.ids[tokens]


def stream_of_arrays(parts: list[np.ndarray]) -> TokenStream:
    return TokenStream(cast(Any, tuple(map(ArrayShard, parts))), "")


def stream(num_tokens: int, num_shards: int = 3) -> TokenStream:
    return stream_of_arrays(np.array_split(np.arange(num_tokens, dtype=np.uint32), num_shards))


def alone(num_windows: int, rows_per_step: int, seed: int, context_length: int = 1) -> Order:
    """The order of a stream of one source."""
    return Order(Grid(context_length, (0,), (num_windows,)), (rows_per_step,), rows_per_step, seed)


def step_rows(tokens: TokenStream, order: Order, world_size: int, *, step: int, micro_batch_rows: int) -> list[list]:
    """By rank, the micro-batches of the step as nested lists."""
    share = {"step": step, "world_size": world_size, "micro_batch_rows": micro_batch_rows}
    return [[batch.ids.tolist() for batch in micro_batches(tokens, order, rank=rank, **share)] for rank in range(world_size)]


@given(num_items=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
@example(num_items=1, seed=0, epoch=0)
@example(num_items=4, seed=0, epoch=0)
@example(num_items=1025, seed=0, epoch=0)
def test_permutation_is_a_bijection(num_items, seed, epoch):
    places = permute(np.arange(num_items), num_items, seed, epoch)
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(num_items))


@given(num_items=st.integers(1, 2**62), seed=SEEDS, epoch=st.integers(0, 9), data=st.data())
def test_permutation_seeks_anywhere_in_any_size(num_items, seed, epoch, data):
    indices = np.array(data.draw(st.lists(st.integers(0, num_items - 1), unique=True, max_size=20)), dtype=np.int64)
    places = permute(indices, num_items, seed, epoch)
    assert len(set(places.tolist())) == len(indices)
    assert ((places >= 0) & (places < num_items)).all()
    for index, place in zip(indices, places, strict=True):
        assert permute(np.array([index]), num_items, seed, epoch).tolist() == [place]


@given(num_items=st.integers(500, 3000), seed=SEEDS, epoch=st.integers(0, 100))
def test_epochs_and_seeds_differ(num_items, seed, epoch):
    items = np.arange(num_items)
    here = permute(items, num_items, seed, epoch)
    for other in (permute(items, num_items, seed, epoch + 1), permute(items, num_items, seed + 1, epoch), items):
        assert (here == other).sum() < 20


def test_permutation_is_uniform_enough():
    """Where each of 8 items goes over 800 seeds: chi-square with 49 degrees of freedom, 99.9% point 85.4."""
    table = np.zeros((8, 8))
    for seed in range(800):
        table[np.arange(8), permute(np.arange(8), 8, seed, 0)] += 1
    assert ((table - 100) ** 2 / 100).sum() < 85.4


def test_data_order_is_the_one_that_runs_were_started_with():
    assert permute(np.arange(10), 10, 0, 0).tolist() == [3, 7, 4, 6, 5, 2, 1, 0, 9, 8]


@given(num_tokens=st.integers(0, 200), context_length=st.integers(1, 20))
def test_windows_are_those_that_fit(num_tokens, context_length):
    fitting = [start for start in range(0, num_tokens, context_length) if start + context_length + 1 <= num_tokens]
    assert count_windows(num_tokens, context_length) == len(fitting)


@given(num_windows=st.integers(1, 60), rows_per_step=st.integers(1, 50), seed=SEEDS)
def test_each_epoch_reads_every_window_once(num_windows, rows_per_step, seed):
    num_steps = -(-3 * num_windows // rows_per_step)
    order = np.concatenate([step_windows(step, alone(num_windows, rows_per_step, seed)) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(order[epoch * num_windows : (epoch + 1) * num_windows].tolist()) == list(range(num_windows))


TIMED = "import time\nfrom collections.abc import Callable\n"
TRILLIONS = """
import resource, sys
from pathlib import Path
import numpy as np
from ds.loader import Order, grid_of, rank_windows, step_windows
from ds.shards import Shard, TokenStream

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream = TokenStream(tuple(Shard(Path(f"train-{n:05d}.bin"), 10**8 - n % 7, 2, "", "") for n in range(10**5)), "")
order = Order(grid_of([stream.num_tokens], 4096), (4096,), 4096, 0)
share = {"step": 10**6, "micro_batch_rows": 4, "world_size": 1024}
read = np.stack([rank_windows(order, rank=rank, **share).windows for rank in range(1024)])
assert np.array_equal(np.sort(read, axis=None), np.sort(step_windows(10**6, order)))
assert len(np.unique(read)) == 4096 and 0 <= read.min() and read.max() < order.grid.num_windows
starts = (read[0].reshape(-1) * 4096).tolist()
for start in starts:
    (first, *more) = stream.places(start, start + 4097)
    assert stream.borders[first.shard] + first.tokens.start == start
    assert sum(place.tokens.stop - place.tokens.start for place in (first, *more)) == 4097
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
small = TokenStream(stream.shards[:10], "")
small.borders
print(least_seconds(lambda: [*stream.places(starts[0], starts[0] + 4097)]))
print(least_seconds(lambda: [*small.places(10**8, 10**8 + 4097)]))
"""


def test_a_thousand_ranks_read_ten_trillion_tokens_in_100_000_shards():
    """In a process of its own: the ranks are disjoint and read what one would, in less than 100 MB. To seek costs as much as in
    10 shards, some microseconds.
    """
    command = [sys.executable, "-c", TIMED + getsource(least_seconds) + TRILLIONS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    num_bytes, large, small = map(float, done.stdout.split())
    assert num_bytes < 100e6
    assert large < 20 * small


@given(
    micro_batch_rows=st.integers(1, 3),
    factor=st.integers(1, 3),
    step=st.integers(0, 50),
    seed=SEEDS,
    num_tokens=st.integers(9, 400),
)
def test_ranks_are_disjoint_and_read_what_one_rank_would(micro_batch_rows, factor, step, seed, num_tokens):
    tokens = stream(num_tokens)
    order, place = alone((num_tokens - 1) // 8, 4 * micro_batch_rows * factor, seed, 8), {"step": step}
    (one,) = step_rows(tokens, order, 1, micro_batch_rows=micro_batch_rows, **place)
    for world_size in (2, 4):
        ranks = step_rows(tokens, order, world_size, micro_batch_rows=micro_batch_rows, **place)
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == one
    starts = [row[0] // 8 for batch in one for row in batch]
    assert starts == step_windows(step, order).tolist()


@given(seed=SEEDS, step=st.integers(0, 9), num_shards=st.integers(1, 7))
def test_micro_batches_are_whole_windows_of_the_stream_in_any_shards(seed, step, num_shards):
    place = {"rank": 0, "world_size": 1, "micro_batch_rows": 2, "step": step}
    batches = list(micro_batches(stream(101, num_shards), alone(20, 6, seed, 5), **place))
    assert len(batches) == 3
    for batch in batches:
        assert batch.ids.shape == (2, 6) and batch.ids.dtype == np.int64
        assert (batch.ids[:, 0] % 5 == 0).all() and (np.diff(batch.ids) == 1).all()


def test_stream_without_a_window_is_refused():
    for tokens_by_source in ([8], [25, 8]):
        order = Order(grid_of(tokens_by_source, 8), (1,) * len(tokens_by_source), len(tokens_by_source), 0)
        words = (
            rf"{sum(tokens_by_source)} tokens, or a source of them, hold no window of context_length \+ 1 = 9; add documents"
        )
        with pytest.raises(ValueError, match=words):
            next(micro_batches(stream(sum(tokens_by_source)), order, step=0, rank=0, world_size=1, micro_batch_rows=1))


@given(
    num_tokens=st.integers(0, 300),
    rows=st.integers(1, 5),
    num_windows=st.integers(0, 60),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_held_out_windows_are_the_spread_ones_in_order_each_to_one_rank(num_tokens, rows, num_windows, world_size):
    place = {"micro_batch_rows": rows, "num_windows": num_windows, "world_size": world_size, "source": 0}
    grid = grid_of([num_tokens], 6)
    ranks = [list(held_out_batches(stream(num_tokens), grid, rank=rank, **place)) for rank in range(world_size)]
    num_batches = sum(map(len, ranks))
    dealt = [ranks[number % world_size][number // world_size] for number in range(num_batches)]
    assert all(batch.shape == (rows, 7) for batch in dealt[:-1])
    starts = [row[0] // 6 for batch in dealt for row in batch.tolist()]
    assert starts == spread_windows(count_windows(num_tokens, 6), num_windows).tolist()


@given(num_available=st.integers(0, 500), num_windows=st.integers(0, 600))
@example(num_available=3, num_windows=2)
@example(num_available=2, num_windows=1)
def test_held_out_windows_are_spread_evenly(num_available, num_windows):
    windows = spread_windows(num_available, num_windows).tolist()
    assert len(windows) == min(num_windows, num_available)
    gaps = np.diff([-1, *windows, num_available])
    if num_windows >= num_available:
        assert windows == list(range(num_available))
    elif num_windows:
        part = num_available / num_windows
        assert gaps[1:-1].tolist() == [] or math.floor(part) <= min(gaps[1:-1]) <= max(gaps[1:-1]) <= math.ceil(part)
        assert 0 <= windows[0] <= part / 2 and num_available - part / 2 - 1 < windows[-1] < num_available
        assert windows != list(range(num_windows))


def test_held_out_windows_are_the_ones_that_losses_were_measured_on():
    assert spread_windows(10, 4).tolist() == [1, 3, 6, 8] and spread_windows(10**9, 2).tolist() == [250_000_000, 750_000_000]


@given(
    num_steps=st.integers(0, 40), rows_per_step=st.integers(1, 12), num_windows=st.integers(1, 300), piece=st.integers(1, 6),
    seed=SEEDS,
)  # fmt: skip
def test_windows_of_a_run_are_those_of_its_steps(num_steps, rows_per_step, num_windows, piece, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "PERMUTED_ROWS", piece)
        windows = windows_of_run(num_steps, alone(num_windows, rows_per_step, seed))
    steps = [step_windows(step, alone(num_windows, rows_per_step, seed)).tolist() for step in range(num_steps)]
    assert windows.dtype == np.int64
    assert windows.tolist() == sorted({window for step in steps for window in step})


def test_windows_of_a_run_take_a_byte_each():
    tracemalloc.start()
    windows = windows_of_run(2**10, alone(2**20, 2**9, 0))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) == 2**19
    assert peak_bytes - windows.nbytes < 2**20 + 2**23


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4), context_length=st.integers(1, 9), top_k=st.integers(1, 3),
    data=st.data(),
)  # fmt: skip
def test_labels_of_a_window_are_those_after_each_of_its_inputs(tmp_path_factory, sizes, context_length, top_k, data):
    parts = np.split(np.arange(sum(sizes), dtype=np.uint16), np.cumsum(sizes)[:-1])
    shards = (ArrayShard(part, Path(f"train-{number}.bin"), "ab" * 32, "cd" * 32) for number, part in enumerate(parts))
    tokens, num_windows = TokenStream(cast(Any, tuple(shards)), "ab" * 32), count_windows(sum(sizes), context_length)
    assume(num_windows)
    num_positions = num_windows * context_length
    folder, positions = tmp_path_factory.mktemp("labels"), np.arange(num_positions)
    labels = LabelStream(folder, tokens, top_k, 300, 2 * context_length, num_positions, "ef" * 32)
    labels.create()
    said = np.repeat(positions, top_k).reshape(-1, top_k)
    labels.write(0, Labels(said, said.astype(np.float16), positions.astype(np.float32)))
    windows = np.array(data.draw(st.lists(st.integers(0, num_windows - 1), min_size=1, max_size=5)))
    ids, logs, tail = read_labels(labels, windows, context_length)
    inputs = read_windows(tokens, windows, grid_of([sum(sizes)], context_length))[:, :-1]
    assert ids.shape == logs.shape == (len(windows), context_length, top_k) and tail.shape == inputs.shape
    assert (ids.dtype, logs.dtype, tail.dtype) == (np.int64, np.float16, np.float32)
    assert (ids == inputs[:, :, None]).all() and (logs == inputs[:, :, None]).all() and (tail == inputs).all()


def least_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


GOLDEN = [
    ((0, 8, 23, 0), [2, 18, 4, 13, 7, 1, 19, 16], "70e940dbb43107c5"),
    ((5, 8, 23, 0), [0, 4, 2, 1, 17, 11, 19, 20], "00dd53315e452ad0"),
    ((12345, 512, 10**7, 7), [8228809, 1109988, 3344726, 580522, 4251592], "583bbd4054148328"),
    ((10**6, 4096, 2441406250, 0), [2143430325, 427154893, 283769751], "ebe0cd17defd273c"),
]


@pytest.mark.parametrize(("place", "first", "digest"), GOLDEN)
def test_order_of_one_source_is_the_one_that_runs_had_before_there_were_mixtures(place, first, digest):
    step, rows_per_step, num_windows, seed = place
    for quotas in ((rows_per_step,), (1000 * rows_per_step,)):
        windows = step_windows(step, alone(num_windows, rows_per_step, seed)._replace(quotas=quotas))
        assert windows[: len(first)].tolist() == first
        assert sha256(windows.astype("<i8").tobytes()).hexdigest()[:16] == digest
    found = windows_of_run(40, alone(3000, 12, 9))
    assert (len(found), sha256(found.astype("<i8").tobytes()).hexdigest()[:16]) == (480, "2639e25dc27ec795")


@st.composite
def mixtures(draw, most_rows: int = 24, most_windows: int = 10**9) -> Order:
    """Two to nine sources of very different sizes and weights, as 1000 steps share them out."""
    num_sources, rows_per_step = draw(st.integers(2, 9)), draw(st.integers(1, most_rows))
    weights = draw(st.lists(st.floats(0.02, 1) | st.just(1.0), min_size=num_sources, max_size=num_sources))
    tokens = draw(st.lists(st.integers(4, 3 * most_windows), min_size=num_sources, max_size=num_sources))
    quotas = quotas_of(tuple(weights), 1000 * rows_per_step)
    return Order(grid_of(tokens, 3), quotas, rows_per_step, draw(SEEDS))


def test_order_of_a_mixture_is_the_one_that_runs_were_started_with():
    order = Order(grid_of([40, 7, 300], 3), quotas_of((5, 3, 2), 4000), 4, 7)
    assert order.quotas == (2000, 1200, 800) and order.grid.counts == (13, 2, 99)
    read = [step_windows(step, order).tolist() for step in (0, 1, 999, 1234)]
    assert read == [[3, 14, 60, 9], [11, 13, 7, 85], [1, 87, 13, 7], [0, 97, 14, 7]]


@given(first=st.integers(1, 9), whole=st.integers(2, 40), num_steps=st.integers(1, 50))
def test_steps_grow_by_whole_first_steps_along_a_line_up_to_the_whole_step(first, whole, num_steps):
    warmup = BatchWarmup(first, num_steps)
    rows = [rows_of_step(step, first * whole, warmup) for step in range(num_steps + 3)]
    assert rows[0] == first and set(rows[num_steps:]) == {first * whole}
    for step, own in enumerate(rows[:num_steps]):
        line = first * (1 + Fraction((whole - 1) * step, num_steps))
        assert own % first == 0 and line - first < own <= line
    assert [rows_before(step, first * whole, warmup) for step in range(len(rows) + 1)] == np.cumsum([0, *rows]).tolist()


@given(first=st.integers(1, 9), whole=st.integers(2, 10**6), num_steps=st.integers(1, 10**9), step=st.integers(0, 2 * 10**9))
def test_rows_before_any_step_are_those_before_the_next_but_for_its_own(first, whole, num_steps, step):
    rows_per_step, warmup = first * whole, BatchWarmup(first, num_steps)
    own = rows_of_step(step, rows_per_step, warmup)
    assert rows_before(step + 1, rows_per_step, warmup) - rows_before(step, rows_per_step, warmup) == own
    assert rows_of_step(step, rows_per_step, None) == rows_per_step
    assert rows_before(step, rows_per_step, None) == step * rows_per_step


@st.composite
def growing(draw) -> Order:
    """One to four sources, and steps whose rows begin and end anywhere in the period of the quotas."""
    quotas = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens = [draw(st.integers(4, 90)) for _ in quotas]
    first, whole = 4 * draw(st.integers(1, 2)), draw(st.integers(2, 5))
    return Order(grid_of(tokens, 3), tuple(quotas), first * whole, draw(SEEDS), BatchWarmup(first, draw(st.integers(1, 12))))


@given(order=growing(), start=st.integers(0, 40), num_steps=st.integers(1, 16))
def test_growing_steps_read_what_steps_of_one_row_do(order, start, num_steps):
    """So each source gives its quota to any sum(quotas) rows on end, wherever they begin."""
    one_by_one = order._replace(rows_per_step=1, warmup=None)
    windows = np.concatenate([step_windows(step, order) for step in range(num_steps)])
    assert windows.tolist() == [int(step_windows(row, one_by_one)[0]) for row in range(len(windows))]
    assert rows_read(num_steps, order) == rows_read(len(windows), one_by_one)
    assert windows_of_run(num_steps, order).tolist() == sorted(set(windows.tolist()))
    some = windows[start : start + sum(order.quotas)]
    if len(some) == sum(order.quotas):
        assert np.bincount(sources_of(some, order.grid), minlength=len(order.quotas)).tolist() == list(order.quotas)


@given(order=growing(), step=st.integers(0, 20))
def test_growing_steps_are_the_same_for_1_2_and_4_ranks(order, step):
    read = []
    for world_size in (1, 2, 4):
        share = {"step": step, "world_size": world_size, "micro_batch_rows": 1}
        by_rank = [rank_windows(order, rank=rank, **share) for rank in range(world_size)]
        read.append([np.stack(field, 1).flatten().tolist() for field in zip(*by_rank, strict=True)])
    rows, windows = read[0]
    assert rows[0] == rows_before(step, order.rows_per_step, order.warmup) and windows == step_windows(step, order).tolist()
    assert rows == list(range(rows[0], rows[0] + len(rows))) and read[0] == read[1] == read[2]


def sources_of(windows: np.ndarray, grid: Grid) -> np.ndarray:
    return np.searchsorted(np.cumsum(grid.counts), windows, side="right")


@given(
    weights=st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9), min_size=1, max_size=9), num_rows=st.sampled_from([1000, 10**7])
)
def test_quotas_are_the_shares_to_within_a_row_and_none_is_lost(weights, num_rows):
    quotas = quotas_of(tuple(weights), num_rows)
    assert sum(quotas) == num_rows
    for weight, quota in zip(weights, quotas, strict=True):
        assert abs(quota - num_rows * Fraction(weight) / sum(map(Fraction, weights))) < 1


def test_equal_remainders_go_to_the_first_sources():
    assert quotas_of((1, 1, 1), 1000) == (334, 333, 333) and quotas_of((0.5, 0.25, 0.25), 1000) == (500, 250, 250)


@given(order=mixtures(), step=st.integers(0, 10**7))
@example(order=Order(grid_of([4, 10**9], 3), quotas_of((0.999, 0.001), 1000), 1, 0), step=999)
def test_share_of_each_source_is_exact_over_any_thousand_steps(order, step):
    """And close to it over any number of rows from the beginning: at most a row a source too many or too few."""
    before, after = (np.array(rows_read(at, order)) for at in (step, step + 1000))
    assert (after - before).tolist() == list(order.quotas)
    shares = np.array(order.quotas) / sum(order.quotas)
    assert before.sum() == step * order.rows_per_step
    assert np.abs(before - shares * (step * order.rows_per_step)).max() <= len(order.quotas) / 2 + 1


@given(order=mixtures(most_rows=8), step=st.integers(0, 10**5))
def test_rows_that_are_read_are_those_of_the_steps(order, step):
    counted = np.array(rows_read(step, order))
    for each in range(step, step + 8):
        counted += np.bincount(sources_of(step_windows(each, order), order.grid), minlength=len(order.quotas))
        assert counted.tolist() == rows_read(each + 1, order)


@given(
    quotas=st.lists(st.integers(1, 20), min_size=2, max_size=9),
    rows_per_step=st.sampled_from([1, 2, 3]),
    period=st.integers(0, 3),
)
def test_sources_take_turns_as_their_evenly_spread_rows_do(quotas, rows_per_step, period):
    quotas = [quota * rows_per_step for quota in quotas]
    turns = sorted((Fraction(2 * row + 1, 2 * quota), source) for source, quota in enumerate(quotas) for row in range(quota))
    order, num_steps = Order(grid_of([10**4] * len(quotas), 3), tuple(quotas), rows_per_step, 0), sum(quotas) // rows_per_step
    read = [step_windows(step, order) for step in range(period * num_steps, (period + 1) * num_steps)]
    assert sources_of(np.concatenate(read), order.grid).tolist() == [source for _, source in turns]


@given(order=mixtures(most_rows=6, most_windows=12), num_steps=st.integers(1, 60))
def test_source_that_is_read_again_is_read_whole_before(order, num_steps):
    windows = np.concatenate([step_windows(step, order) for step in range(num_steps)])
    sources, first = sources_of(windows, order.grid), 0
    for source, count in enumerate(order.grid.counts):
        read = windows[sources == source] - first
        for epoch in range(0, len(read), count):
            whole = read[epoch : epoch + count].tolist()
            assert len(set(whole)) == len(whole) and set(whole) <= set(range(count))
        first += count
    assert windows_of_run(num_steps, order).tolist() == sorted(set(windows.tolist()))


def test_sources_of_one_size_are_not_read_in_one_order():
    order = Order(grid_of([3001, 3001], 3), (4000, 4000), 8, 0)
    windows = np.concatenate([step_windows(step, order) for step in range(250)])
    first, second = (windows[sources_of(windows, order.grid) == source] - 1000 * source for source in (0, 1))
    assert (first == second).sum() < 20 and sorted(first) == sorted(second)


@given(order=mixtures(most_rows=2, most_windows=30), step=st.integers(0, 2000), rows=st.integers(1, 2))
def test_a_mixture_is_the_same_for_1_2_and_8_ranks(order, step, rows):
    order = order._replace(rows_per_step=16 * rows, quotas=tuple(quota * 16 for quota in order.quotas))
    assume(sum(order.quotas) % order.rows_per_step == 0)
    tokens = stream(sum(3 * count + 1 for count in order.grid.counts))
    order = order._replace(grid=grid_of([3 * count + 1 for count in order.grid.counts], 3))
    (one,) = step_rows(tokens, order, 1, step=step, micro_batch_rows=rows)
    for world_size in (2, 8):
        ranks = step_rows(tokens, order, world_size, step=step, micro_batch_rows=rows)
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == one


@given(tokens_by_source=st.lists(st.integers(0, 40), min_size=1, max_size=6), context_length=st.integers(1, 9))
def test_windows_of_sources_are_those_of_each_source_alone(tokens_by_source, context_length):
    grid, tokens, expected = grid_of(tokens_by_source, context_length), stream(sum(tokens_by_source)), []
    for first, num_tokens in zip(np.cumsum([0, *tokens_by_source]).tolist(), tokens_by_source, strict=False):
        inside = range(first, first + num_tokens - context_length, context_length)
        expected += [list(range(start, start + context_length + 1)) for start in inside]
    assert grid.num_windows == len(expected)
    assert window_starts(np.arange(grid.num_windows), grid).tolist() == [window[0] for window in expected]
    assert not expected or read_windows(tokens, np.arange(grid.num_windows), grid).tolist() == expected
    for source, count in enumerate(grid.counts):
        place = {"source": source, "rank": 0, "world_size": 1, "micro_batch_rows": 3, "num_windows": 50}
        read = [row for batch in held_out_batches(tokens, grid, **place) for row in batch.tolist()]
        assert read == expected[sum(grid.counts[:source]) :][:count]


def test_a_mixture_of_ten_trillion_tokens_is_sought_at_once_and_takes_no_memory():
    tokens = (9 * 10**12, 10**12, 10**9, 10**6, 4097)
    order = Order(grid_of(tokens, 4096), quotas_of((5, 3, 1, 0.9, 1e-5), 1000 * 4096), 4096, 0)
    small = order._replace(grid=grid_of([10**8] * 5, 4096))
    step_windows(0, order)
    tracemalloc.start()
    windows = step_windows(10**12 + 1, order)
    rows = rows_read(10**12, order)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**21 and sum(rows) == 4096 * 10**12 and windows.max() < order.grid.num_windows
    far, near = (
        least_seconds(lambda step=step, order=each: step_windows(step, order)) for step, each in ((10**12, order), (3, small))
    )
    assert far < 10 * near


def test_order_of_a_large_data_set_costs_what_that_of_a_small_one_does():
    small, large = (least_seconds(lambda number=number: step_windows(3, alone(number, 512, 0))) for number in (10**4, 10**9))
    assert large < 10 * small


@given(
    micro_batch_rows=st.integers(1, 3),
    factor=st.integers(1, 3),
    step=st.integers(0, 50),
    seed=SEEDS,
    world_size=st.sampled_from([1, 2, 4]),
)
def test_every_rank_can_say_what_each_rank_reads(micro_batch_rows, factor, step, seed, world_size):
    tokens, rows_per_step = stream(203), 4 * micro_batch_rows * factor
    place, order = (
        {"step": step, "world_size": world_size, "micro_batch_rows": micro_batch_rows},
        alone(25, rows_per_step, seed, 8),
    )
    all_rows = []
    for rank in range(world_size):
        due = rank_windows(order, rank=rank, **place)
        assert due.rows.dtype == due.windows.dtype == np.int64
        batches = list(micro_batches(tokens, order, rank=rank, **place))
        assert [batch.rows.tolist() for batch in batches] == due.rows.tolist()
        assert [batch.windows.tolist() for batch in batches] == due.windows.tolist()
        assert [batch.ids[:, 0].tolist() for batch in batches] == (due.windows * 8).tolist()
        all_rows += due.rows.flatten().tolist()
    assert sorted(all_rows) == list(range(step * rows_per_step, (step + 1) * rows_per_step))


TABLES = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=width, max_size=width), min_size=1, max_size=12)
)


def digest_of(rows: list[int], table: list[list[int]]) -> str:
    return digest_hex(digest_rows(np.array(rows, dtype=np.int64), np.array(table, dtype=np.int64)))


@given(table=TABLES, first=st.integers(0, 2**40), shares=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_digests_of_any_split_add_up_to_that_of_the_whole(table, first, shares):
    rows, items = first + np.arange(len(table)), np.array(table, dtype=np.int64)
    whole = digest_rows(rows, items)
    owners = np.array(shares[: len(table)])
    parts = [digest_rows(rows[owners == owner], items[owners == owner]) for owner in (2, 0, 3, 1)]
    assert whole.dtype == np.int64 and whole.shape == (4,)
    assert np.array_equal(sum(parts), whole)
    assert digest_hex(whole) == digest_of(rows[::-1].tolist(), table[::-1])


@given(table=TABLES, first=st.integers(0, 2**40), data=st.data())
def test_digest_sees_every_change(table, first, data):
    rows = list(range(first, first + len(table)))
    whole = digest_of(rows, table)
    one, other = (data.draw(st.integers(0, len(table) - 1)) for _ in range(2))
    changed = [list(row) for row in table]
    changed[one][data.draw(st.integers(0, len(table[0]) - 1))] ^= 1 << data.draw(st.integers(0, 40))
    assert digest_of(rows, changed) != whole
    assert digest_of([*rows[:one], rows[one] + len(rows), *rows[one + 1 :]], table) != whole
    assert len(rows) == 1 or digest_of(rows[:one] + rows[one + 1 :], table[:one] + table[one + 1 :]) != whole
    assert digest_of([*rows, rows[one]], [*table, table[one]]) != whole
    assume(table[one] != table[other])
    swapped = list(table)
    swapped[one], swapped[other] = table[other], table[one]
    assert digest_of(rows, swapped) != whole


def test_digest_is_the_one_that_logs_were_written_with():
    assert digest_of([7, 2**33], [[1, 2, 3], [4, 5, 6]]) == "399da57b594d203d6e3d18ac608ff1f5"


def test_digest_of_a_large_micro_batch_costs_little_more_than_the_hash():
    rows, items = np.arange(64), np.random.default_rng(0).integers(0, 50_000, (64, 1024))
    assert least_seconds(lambda: digest_rows(rows, items)) < 5 * least_seconds(lambda: blake2b(items.tobytes()).digest())


def naive_documents(ids: list[int], start: int, stop: int, end_of_text_id: int) -> list[Document]:
    stops = [place + 1 for place, number in enumerate(ids) if number == end_of_text_id]
    if ids and stops[-1:] != [len(ids)]:
        stops.append(len(ids))
    documents = [Document(*place) for place in zip(range(len(stops)), [0, *stops], stops, strict=False)]
    return [document for document in documents if max(document.start, start) < min(document.stop, stop)]


OVERLAPS = {
    "ids": st.lists(st.integers(0, 4), max_size=60),
    "scan_tokens": st.integers(1, 70),
    "num_shards": st.integers(1, 5),
    "data": st.data(),
}


@given(**OVERLAPS)
def test_documents_are_those_that_overlap(ids, scan_tokens, num_shards, data):
    check_documents(ids, scan_tokens, num_shards, data)


@pytest.mark.slow
@given(**OVERLAPS)
@settings(max_examples=300)
def test_documents_are_those_that_overlap_in_many_examples(ids, scan_tokens, num_shards, data):
    check_documents(ids, scan_tokens, num_shards, data)


def check_documents(ids, scan_tokens, num_shards, data) -> None:
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    parts = np.array_split(np.array(ids, dtype=np.uint16), num_shards)
    tokens = stream_of_arrays(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "SCAN_TOKENS", scan_tokens)
        found = documents_between(tokens, start, stop, 0)
    assert found == naive_documents(ids, start, stop, 0)
    assert all(type(number) is int for document in found for number in document)


def test_documents_are_found_in_bounded_memory(tmp_path):
    """The scan of 64 MiB of tokens takes what one of its parts takes."""
    path = tmp_path / "a.bin"
    ids = np.ones(2**25, dtype=np.uint16)
    ids[[5, 2**24, -1]] = 0
    write_shard(path, ids, 300, "ab" * 32)
    tokens = TokenStream((open_shard(path),), "ab" * 32)
    tracemalloc.start()
    found = documents_between(tokens, 2**24 + 9, 2**24 + 10, 0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [Document(2, 2**24 + 1, 2**25)]
    assert peak_bytes < 2**24


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_a_piece_of_a_document_begins_with_each_row_and_behind_each_end_of_text_in_it(data, rows, positions):
    """And a window crosses documents if there are two of them among its inputs."""
    ids = np.array(data.draw(st.lists(st.integers(0, 2), min_size=rows * (positions + 1), max_size=rows * (positions + 1))))
    windows, borders, crossing = ids.reshape(rows, positions + 1), [], 0
    for row, window in enumerate(windows[:, :-1].tolist()):
        own = [at for at in range(positions) if at == 0 or window[at - 1] == 2]
        borders += [row * positions + at for at in own]
        crossing += len(own) > 1
    found = document_borders(windows, 2)
    assert found.dtype == np.int32 and found.tolist() == [*borders, rows * positions]
    assert count_crossing(windows, 2) == crossing
