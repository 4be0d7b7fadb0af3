"""Laws of ds/loader.py: a bijection for each epoch, the same tokens in a step for any number of ranks, and which they were."""

import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from inspect import getsource
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ds import loader
from ds.loader import (
    Document,
    count_crossing,
    count_windows,
    digest_hex,
    digest_rows,
    document_borders,
    documents_between,
    held_out_batches,
    micro_batches,
    permute,
    rank_windows,
    read_labels,
    read_windows,
    spread_windows,
    step_windows,
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


def stream_of_arrays(parts: list[np.ndarray]) -> TokenStream:
    return TokenStream(cast(Any, tuple(map(ArrayShard, parts))), "")


def stream(num_tokens: int, num_shards: int = 3) -> TokenStream:
    return stream_of_arrays(np.array_split(np.arange(num_tokens, dtype=np.uint32), num_shards))


def step_rows(tokens: TokenStream, world_size: int, *, rows_per_step: int, micro_batch_rows: int, **place) -> list[list]:
    """By rank, the micro-batches of the step as nested lists."""
    shared = {"rows_per_step": rows_per_step, "micro_batch_rows": micro_batch_rows, "world_size": world_size, **place}
    return [[batch.ids.tolist() for batch in micro_batches(tokens, rank=rank, **shared)] for rank in range(world_size)]


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
    order = np.concatenate([step_windows(step, rows_per_step, num_windows, seed) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(order[epoch * num_windows : (epoch + 1) * num_windows].tolist()) == list(range(num_windows))


TIMED = "import time\nfrom collections.abc import Callable\n"
TRILLIONS = """
import resource, sys
from pathlib import Path
import numpy as np
from ds.loader import count_windows, rank_windows, step_windows
from ds.shards import Shard, TokenStream

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream = TokenStream(tuple(Shard(Path(f"train-{n:05d}.bin"), 10**8 - n % 7, 2, "", "") for n in range(10**5)), "")
num_windows = count_windows(stream.num_tokens, 4096)
order = {"step": 10**6, "micro_batch_rows": 4, "rows_per_step": 4096, "seed": 0}
read = np.stack([rank_windows(num_windows, rank=rank, world_size=1024, **order).windows for rank in range(1024)])
assert np.array_equal(np.sort(read, axis=None), np.sort(step_windows(10**6, 4096, num_windows, 0)))
assert len(np.unique(read)) == 4096 and 0 <= read.min() and read.max() < num_windows
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
    place = {"micro_batch_rows": micro_batch_rows, "rows_per_step": 4 * micro_batch_rows * factor, "step": step}
    place |= {"context_length": 8, "seed": seed}
    (alone,) = step_rows(tokens, 1, **place)
    for world_size in (2, 4):
        ranks = step_rows(tokens, world_size, **place)
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == alone
    starts = [row[0] // 8 for batch in alone for row in batch]
    assert starts == step_windows(step, place["rows_per_step"], count_windows(num_tokens, 8), seed).tolist()


@given(seed=SEEDS, step=st.integers(0, 9), num_shards=st.integers(1, 7))
def test_micro_batches_are_whole_windows_of_the_stream_in_any_shards(seed, step, num_shards):
    place = {
        "rank": 0,
        "world_size": 1,
        "micro_batch_rows": 2,
        "rows_per_step": 6,
        "context_length": 5,
        "seed": seed,
        "step": step,
    }
    batches = list(micro_batches(stream(101, num_shards), **place))
    assert len(batches) == 3
    for batch in batches:
        assert batch.ids.shape == (2, 6) and batch.ids.dtype == np.int64
        assert (batch.ids[:, 0] % 5 == 0).all() and (np.diff(batch.ids) == 1).all()


def test_stream_without_a_window_is_refused():
    place = {"rank": 0, "world_size": 1, "micro_batch_rows": 1, "rows_per_step": 1, "context_length": 8, "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=r"8 tokens hold no window of context_length \+ 1 = 9; add documents"):
        next(micro_batches(stream(8), **place))


@given(
    num_tokens=st.integers(0, 300),
    rows=st.integers(1, 5),
    num_windows=st.integers(0, 60),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_held_out_windows_are_the_spread_ones_in_order_each_to_one_rank(num_tokens, rows, num_windows, world_size):
    place = {"micro_batch_rows": rows, "context_length": 6, "num_windows": num_windows, "world_size": world_size}
    ranks = [list(held_out_batches(stream(num_tokens), rank=rank, **place)) for rank in range(world_size)]
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
        windows = windows_of_run(num_steps, rows_per_step, num_windows, seed)
    steps = [step_windows(step, rows_per_step, num_windows, seed).tolist() for step in range(num_steps)]
    assert windows.dtype == np.int64
    assert windows.tolist() == sorted({window for step in steps for window in step})


def test_windows_of_a_run_take_a_byte_each():
    tracemalloc.start()
    windows = windows_of_run(2**10, 2**9, 2**20, 0)
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
    inputs = read_windows(tokens, windows, context_length)[:, :-1]
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


def test_order_of_a_large_data_set_costs_what_that_of_a_small_one_does():
    small, large = (least_seconds(lambda number=number: step_windows(3, 512, number, 0)) for number in (10**4, 10**9))
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
    place = {"step": step, "world_size": world_size, "micro_batch_rows": micro_batch_rows, "rows_per_step": rows_per_step}
    all_rows = []
    for rank in range(world_size):
        due = rank_windows(count_windows(203, 8), rank=rank, seed=seed, **place)
        assert due.rows.dtype == due.windows.dtype == np.int64
        batches = list(micro_batches(tokens, rank=rank, seed=seed, context_length=8, **place))
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
