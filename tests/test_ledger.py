"""Laws of tests/ledger.py: an honest log is proved, however often and on whatever ranks; every dishonest one is found."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import REPOSITORY, clean_environment
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ledger import prove

from ds import loader
from ds.loader import BatchWarmup, MicroBatch, Order, digest_hex, digest_rows, grid_of, micro_batches, quotas_of
from ds.shards import TokenStream, open_shard, write_shard

CONTEXT, ROWS, STEPS, NUM_TOKENS = 4, 8, 12, 95
ALONE = grid_of([NUM_TOKENS], CONTEXT)
NUM_WINDOWS = ALONE.num_windows
WEIGHTS, MIXED = (0.5, 0.125, 0.375), grid_of([40, 6, NUM_TOKENS - 46], CONTEXT)
STOPPED = ((0, 5, 2), (4, 7, 1), (7, 8, 4), (5, STEPS, 2))
GROWING = BatchWarmup(ROWS, 7)
PRINT = "ab" * 32


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    """Three shards of random tokens."""
    folder, ids = tmp_path_factory.mktemp("shards"), np.random.default_rng(0).integers(0, 300, NUM_TOKENS)
    paths = [folder / f"{number}.bin" for number in range(3)]
    for path, part in zip(paths, np.array_split(ids, 3), strict=True):
        write_shard(path, part, 300, PRINT)
    return TokenStream(tuple(map(open_shard, paths)), PRINT)


class Run(NamedTuple):
    """A run's folder and the lines of its log."""

    folder: Path
    records: list[dict]

    @property
    def starts(self) -> list[dict]:
        return [record for record in self.records if record["event"] == "started"]

    @property
    def train_places(self) -> list[int]:
        return [place for place, record in enumerate(self.records) if record["kind"] == "train"]


def order_of(seed: int, weights: tuple[float, ...] | None, warmup: BatchWarmup | None) -> Order:
    rows = ROWS if warmup is None else 3 * ROWS
    if weights is None:
        return Order(ALONE, (rows,), rows, seed, warmup)
    return Order(MIXED, quotas_of(weights, 1000 * rows), rows, seed, warmup)


def run_in(
    folder: Path, stream: TokenStream, launches, *, log_every_steps=1, seed=0, read=micro_batches, forget=False, weights=None,
    warmup=None,
) -> Run:  # fmt: skip
    """Reads and logs as a trainer does; each launch is (continues after, stops after, ranks), and `forget` drops its sums."""
    order = order_of(seed, weights, warmup)
    run, sums_at = Run(folder, []), {0: np.zeros((2, 4), dtype=np.int64)}
    for first, stop, ranks in launches:
        run.records[:] = [record for record in run.records if record["step"] <= first]
        run.records.append(started(first, ranks, order))
        sums = sums_at[first] * (not forget)
        for step in range(first, stop):
            for batch in batches_of(stream, order, step, ranks, read):
                sums += [digest_rows(batch.rows, batch.windows[:, None]), digest_rows(batch.rows, batch.ids)]
            if (step + 1) % log_every_steps == 0 or step + 1 == STEPS:
                hashes = dict(zip(("windows_hash", "tokens_hash"), map(digest_hex, sums), strict=True))
                run.records.append({"kind": "train", "event": None, "step": step + 1, "loss": 1.0} | hashes)
                sums[:] = 0
            sums_at[step + 1] = sums.copy()
    folder.mkdir(parents=True, exist_ok=True)
    config = {"num_steps": STEPS, "log_every_steps": log_every_steps, "context_length": CONTEXT, "seed": seed}
    config |= {"tokens_per_step": order.rows_per_step * CONTEXT, "corpus_weights": weights}
    if warmup is not None:
        config |= {"first_tokens_per_step": warmup.first_rows * CONTEXT, "batch_warmup_steps": warmup.num_steps}
    (folder / "config.json").write_text(json.dumps(config))
    return written(run)


def started(step: int, ranks: int, order: Order) -> dict:
    record: dict = {"kind": "event", "event": "started", "step": step, "ranks": ranks}
    record |= {"rows_per_step": order.rows_per_step, "num_windows": order.grid.num_windows, "seed": order.seed}
    if order.warmup is not None:
        record |= {"first_rows_per_step": order.warmup.first_rows, "batch_warmup_steps": order.warmup.num_steps}
    named = zip("abc", order.grid.counts, order.quotas, strict=False)
    sources = [{"name": name, "num_windows": count, "quota": quota} for name, count, quota in named]
    return record | ({"sources": sources} if len(sources) > 1 else {})


def batches_of(stream: TokenStream, order: Order, step: int, ranks: int, read: Callable) -> Iterator[MicroBatch]:
    for rank in range(ranks):
        yield from read(stream, order, step=step, rank=rank, world_size=ranks, micro_batch_rows=2)


def written(run: Run) -> Run:
    """The run, its records on the disk."""
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.records))
    return run


@pytest.fixture
def run(tmp_path: Path, stream: TokenStream) -> Run:
    return run_in(tmp_path / "run", stream, STOPPED)


@st.composite
def launches(draw) -> list[tuple[int, int, int]]:
    """Any launches that end a run: each continues from a step that an earlier one reached."""
    made, reached = [], 0
    while reached < STEPS:
        stop = draw(st.integers(reached + 1, STEPS) | st.just(STEPS))
        first = draw(st.integers(max(0, reached - 3), reached))
        made.append((first, stop, draw(st.sampled_from([1, 2, 4]))))
        reached = stop
    return made


def violation(run_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:
        prove(run_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(made=launches(), log_every_steps=st.sampled_from([1, 3, 5, 100]), seed=st.integers(0, 2**32 - 1))
@example(made=[(0, STEPS, 1)], log_every_steps=1, seed=0)
@example(made=STOPPED, log_every_steps=3, seed=0)
def test_honest_log_is_proved_however_often_stopped_and_on_whatever_ranks(
    tmp_path_factory, stream, made, log_every_steps, seed
):
    run = run_in(tmp_path_factory.getbasetemp() / "honest", stream, made, log_every_steps=log_every_steps, seed=seed)
    lines = prove(run.folder)
    full, rest = divmod(STEPS * ROWS, NUM_WINDOWS)
    assert lines[:full] == [f"epoch {epoch}: {NUM_WINDOWS} windows, each read once" for epoch in range(full)]
    assert lines[full:-1] == [f"epoch {full}, not over: {rest} of {NUM_WINDOWS} windows, none read twice"]
    assert lines[-1].startswith(f"proved: steps 1 to {STEPS}, {len(run.starts)} launches")


@given(made=launches(), log_every_steps=st.sampled_from([1, 3, 5, 100]), seed=st.integers(0, 2**32 - 1))
@example(made=STOPPED, log_every_steps=3, seed=0)
def test_honest_log_of_a_mixture_is_proved_source_by_source(tmp_path_factory, stream, made, log_every_steps, seed):
    folder = tmp_path_factory.getbasetemp() / "mixed"
    lines = prove(run_in(folder, stream, made, log_every_steps=log_every_steps, seed=seed, weights=WEIGHTS).folder)
    for name, weight, count in zip("abc", WEIGHTS, MIXED.counts, strict=True):
        full, rest = divmod(int(STEPS * ROWS * weight), count)
        expected = [f"{name}, epoch {epoch}: {count} windows, each read once" for epoch in range(full)]
        expected += [f"{name}, epoch {full}, not over: {rest} of {count} windows, none read twice"] * (rest > 0)
        assert [line for line in lines if line.startswith(name)] == expected
    assert lines[-1].startswith(f"proved: steps 1 to {STEPS}")


@settings(max_examples=6)
@given(made=launches(), log_every_steps=st.sampled_from([1, 3, 100]), weights=st.sampled_from([None, WEIGHTS]))
@example(made=STOPPED, log_every_steps=1, weights=None)
def test_honest_log_of_growing_steps_is_proved(tmp_path_factory, stream, made, log_every_steps, weights):
    folder, how = tmp_path_factory.getbasetemp() / "growing", {"weights": weights, "warmup": GROWING}
    lines = prove(run_in(folder, stream, made, log_every_steps=log_every_steps, **how).folder)
    if weights is None:
        num_rows = ROWS * (1 + 1 + 1 + 1 + 2 + 2 + 2 + 3 * 5)
        assert f": {num_rows % NUM_WINDOWS} of {NUM_WINDOWS} windows" in lines[-2] and len(lines) == num_rows // NUM_WINDOWS + 2
    assert lines[-1].startswith(f"proved: steps 1 to {STEPS}")


def test_steps_that_grow_otherwise_than_the_log_says_are_found(tmp_path, stream):
    def whole(tokens, order, **place):
        return micro_batches(tokens, order._replace(warmup=BatchWarmup(ROWS, 6)), **place)

    assert "others were read" in violation(run_in(tmp_path, stream, STOPPED, warmup=GROWING, read=whole).folder)
    for name, other in (("first_rows_per_step", 4), ("batch_warmup_steps", 6)):
        run = run_in(tmp_path, stream, STOPPED, warmup=GROWING)
        for start in run.starts:
            start[name] = other
        assert f"a launch with {name}={other}, and config.json says" in violation(written(run).folder)
        run.starts[0][name] = 0
        assert "a launch whose steps grow from" in violation(written(run).folder)
        for start in run.starts:
            del start[name]
        assert f"{name}=None is not a whole number" in violation(written(run).folder)
    for start in run.starts:
        start.pop("first_rows_per_step")
    assert "a launch with first_rows_per_step=None, and config.json says 8" in violation(written(run).folder)


def test_mixture_that_reads_other_sources_or_shares_than_it_says_is_found(tmp_path, stream):
    def swapped(tokens, order, **place):
        return micro_batches(tokens, order._replace(quotas=order.quotas[::-1]), **place)

    run = run_in(tmp_path, stream, STOPPED, weights=WEIGHTS)
    assert prove(run.folder)
    assert "others were read" in violation(run_in(tmp_path, stream, STOPPED, weights=WEIGHTS, read=swapped).folder)
    for name, wrong in (("num_windows", "do not share"), ("quota", "do not share")):
        run = run_in(tmp_path, stream, STOPPED, weights=WEIGHTS)
        run.starts[1]["sources"][0][name] += 1
        assert wrong in violation(written(run).folder)
    for start in run.starts:
        start["sources"] = [each | {"quota": quota} for each, quota in zip(start["sources"], (1000, 3000, 4000), strict=True)]
    assert "config.json says [0.5, 0.125, 0.375]" in violation(written(run).folder)
    for start in run.starts:
        del start["sources"]
    assert "config.json says [0.5, 0.125, 0.375]" in violation(written(run).folder)
    run.starts[0]["sources"] = 3
    assert "is no list of sources" in violation(written(run).folder)


def test_log_of_a_killed_run_is_proved_as_far_as_it_goes(run):
    place = run.train_places[6]
    del run.records[place:]
    written(run)
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert "steps 1 to 6," in prove(run.folder)[-1]


def test_order_in_which_ranks_and_micro_batches_come_does_not_matter(tmp_path, stream):
    def backwards(*arguments, rank, world_size, **place):
        return reversed(list(micro_batches(*arguments, rank=world_size - 1 - rank, world_size=world_size, **place)))

    assert prove(run_in(tmp_path, stream, STOPPED, log_every_steps=3, read=backwards).folder)


@pytest.mark.parametrize("place", range(STEPS - 1))
def test_missing_step_is_found(run, place):
    del run.records[run.train_places[place]]
    assert f"there is no line of step {place + 1}" in violation(written(run).folder)


@pytest.mark.parametrize("place", range(STEPS))
def test_doubled_step_is_found(run, place):
    at = run.train_places[place]
    run.records.insert(at, run.records[at])
    assert f"step {place + 1} is logged after step {place + 1}" in violation(written(run).folder)


def test_other_seed_rows_or_windows_in_one_launch_are_found(run):
    for name in ("seed", "num_windows", "rows_per_step"):
        start = run.starts[1]
        start[name] += 1
        assert f"a launch with {name}={start[name]}, and the launch before it had" in violation(written(run).folder)
        start[name] -= 1
    assert prove(written(run).folder)


@pytest.mark.parametrize("name", ["seed", "num_windows", "rows_per_step"])
def test_other_seed_rows_or_windows_in_every_launch_are_found(run, name):
    for start in run.starts:
        start[name] += 1
    message = violation(written(run).folder)
    assert "others were read" in message if name == "num_windows" else "config.json says" in message


def test_run_that_read_with_another_seed_than_it_logs_is_found(run, tmp_path, stream):
    other = run_in(tmp_path / "other", stream, STOPPED, seed=1)
    run.records[:] = [record | {"seed": 0} if "seed" in record else record for record in other.records]
    assert "step 1: windows_hash is" in violation(written(run).folder)


def skipping(windows: np.ndarray) -> np.ndarray:
    return (windows + [1, 0]) % NUM_WINDOWS


def doubling(windows: np.ndarray) -> np.ndarray:
    return windows[[0, 0]]


@pytest.mark.parametrize("log_every_steps", [1, 3])
@pytest.mark.parametrize("fault", [skipping, doubling])
@pytest.mark.parametrize("faulty_step", [0, 4, STEPS - 1])
def test_loader_that_reads_another_window_is_found(tmp_path, stream, fault, faulty_step, log_every_steps):
    def read(*arguments, step, **place):
        for number, batch in enumerate(micro_batches(*arguments, step=step, **place)):
            is_faulty = (step, place["rank"], number) == (faulty_step, 0, 0)
            yield batch._replace(windows=fault(batch.windows)) if is_faulty else batch

    run = run_in(tmp_path, stream, STOPPED, log_every_steps=log_every_steps, read=read)
    assert "others were read" in violation(run.folder)


@pytest.mark.parametrize("log_every_steps", [1, 3])
def test_micro_batch_that_a_rank_loses_or_reads_twice_is_found(tmp_path, stream, log_every_steps):
    for times in (0, 2):

        def read(*arguments, step, times=times, **place):
            for batch in micro_batches(*arguments, step=step, **place):
                yield from [batch] * (times if (step, place["rank"]) == (5, place["world_size"] - 1) else 1)

        run = run_in(tmp_path, stream, STOPPED, log_every_steps=log_every_steps, read=read)
        assert "others were read" in violation(run.folder)


def test_resumed_run_that_forgets_what_it_read_before_its_last_line_is_found(tmp_path, stream):
    run = run_in(tmp_path, stream, [(0, 5, 1), (5, STEPS, 1)], log_every_steps=3, forget=True)
    assert "step 6: windows_hash is" in violation(run.folder)


@pytest.mark.parametrize(
    ("permute", "found"),
    [
        (lambda index, num_items, *_: np.minimum(index, num_items - 2), f"window {NUM_WINDOWS - 2} is read twice"),
        (lambda index, num_items, *_: np.where(index == 3, 2, index), "window 2 is read twice"),
        (lambda index, num_items, *_: np.where(index == 20, 0, index), "window 0 is read twice"),
        (lambda index, num_items, *_: index - 1, "window -1 is read"),
    ],
)
@pytest.mark.parametrize("made", [((0, STEPS, 2),), ((0, 3, 1),)])
def test_data_order_that_is_no_permutation_is_found(tmp_path, monkeypatch, stream, permute, found, made):
    """Here log and ledger agree about every step, and only the count of windows tells."""
    monkeypatch.setattr(loader, "permute", permute)

    def read(tokens, order, **place):
        rows, windows = loader.rank_windows(order, **place)
        for number, window in zip(rows, windows, strict=True):
            yield MicroBatch(number, window, np.zeros((2, CONTEXT + 1), dtype=np.int64))

    assert f"epoch 0: {found}" in violation(run_in(tmp_path, stream, made, read=read).folder)


def test_changed_hash_is_found(run):
    record = run.records[run.train_places[7]]
    record["windows_hash"] = record["tokens_hash"]
    assert "step 8: windows_hash is" in violation(written(run).folder)
    del record["windows_hash"]
    assert "step 8: windows_hash is None" in violation(written(run).folder)


def test_launch_at_another_step_than_the_log_reached_is_found(run):
    first, *_, last = run.starts
    last["step"] += 2
    assert "there is no line of step 6" in violation(written(run).folder)
    last["step"] -= 3
    assert "it would be read twice" in violation(written(run).folder)
    first["step"] = 1
    assert "the first launch starts after step 1" in violation(written(run).folder)
    run.records.remove(first)
    assert "before any launch" in violation(written(run).folder)


def test_step_beyond_the_end_is_found(run):
    run.records.append(run.records[-1] | {"step": STEPS + 1})
    assert f"step {STEPS + 1} is logged and the run has {STEPS}" in violation(written(run).folder)


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", "[" * 100_000, '{"kind": "train", "step": true}', '{"event": "started", "step": 4, "ranks": "x"}'],
)  # fmt: skip
def test_line_that_is_no_record_is_named(run, line):
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    assert f"{path}, line 4: " in violation(run.folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_file_that_is_missing_empty_or_no_text_is_named(run, name):
    for content in (b"", b"\x80\x04\xff"):
        (run.folder / name).write_bytes(content)
        assert str(run.folder / name) in violation(run.folder)
    (run.folder / name).unlink()
    assert f"{name} cannot be read" in violation(run.folder)


def command(run_dir: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, str(REPOSITORY / "tests" / "ledger.py"), str(run_dir)]
    return subprocess.run(words, env=clean_environment(), capture_output=True, text=True, timeout=60)


def test_command_prints_the_proof_or_the_first_violation(run):
    done = command(run.folder)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, prove(run.folder), "")
    del run.records[run.train_places[2]]
    written(run)
    done = command(run.folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"not proved: {violation(run.folder)}\n"
