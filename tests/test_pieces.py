"""Laws of ds/pieces.py and of a preparation with several processes: the same bytes however it was made, each document once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ALL_CORES, clean_environment, free_port
from hypothesis import given
from hypothesis import strategies as st
from test_encoder import write_tokens

from ds import pieces
from ds import tokenizer as bpe
from ds.corpus import Reading
from ds.files import Part
from ds.pieces import RECORD, Made, Piece, Recipe, Result, Summary, WrittenShard, contents, duplicates, final_names, name_of
from scripts import prepare_data
from scripts.config import TrainingConfig
from scripts.prepare_data import Data, open_data, prepare

ROOT = Path(pieces.__file__).parents[1]
RECIPE = Recipe("building", "ab" * 32, True, None, 300, 500, Reading("text", None, False), 0.25, None, None)
PIECE = Piece((Part("a.jsonl", 0, 100), Part("b.txt", 0, None)), 120, 0, None, "[]")
PREPARE = """
import sys
sys.argv[1:] = []
from ds import pieces
from scripts import config, prepare_data
from scripts.config import TrainingConfig

pieces.PIECE_BYTES = 3000
prepare_data.PRETRAIN = {config!r}
prepare_data.main()
"""


def write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def drawn_texts(seed: int, number: int) -> list[str]:
    draw = random.Random(seed)
    return [f"text {draw.random()} " * draw.randint(1, 12) for _ in range(number)]


def config_in(folder: Path, **changes) -> TrainingConfig:
    """A corpus of two entries with repeated, empty and long documents, which is about 30 pieces of 3,000 bytes."""
    (folder / "corpus" / "more").mkdir(parents=True, exist_ok=True)
    texts = drawn_texts(1, 300)
    write_rows(folder / "corpus" / "rows.jsonl", [*texts, texts[3], texts[3], "", texts[250], "x" * 5000])
    for number in range(20):
        (folder / "corpus" / "more" / f"{number}.txt").write_text(
            texts[number] if number % 4 == 0 else f"{number} is {number**9}"
        )
    fields = {
        "corpus": (f"{folder}/corpus/rows.jsonl", f"{folder}/corpus/more"), "data_dir": f"{folder}/data",
        "run_dir": f"{folder}/run", "validation_fraction": 0.25, "vocab_size": 270, "tokens_per_shard": 700,
        "context_length": 16, "tokens_per_step": 64, "micro_batch_rows": 2, "longest_document_characters": 4000,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def start(config: TrainingConfig, folder: Path, cores: int | None = None) -> subprocess.Popen:
    """`prepare_data.py` with small pieces, in a process group of its own, on the first `cores` cores, or all."""
    script = folder / "prepare.py"
    script.write_text(PREPARE.format(config=config))
    process = subprocess.Popen(
        [sys.executable, str(script)], env=clean_environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.sched_setaffinity(process.pid, ALL_CORES[:cores])
    return process


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def texts_of(stream, data) -> list[str]:
    ids, end = stream.read(0, stream.num_tokens).tolist(), bpe.end_of_text_id(data.tokenizer)
    ends = [-1, *(place for place, number in enumerate(ids) if number == end)]
    return [bpe.decode(data.tokenizer, ids[a + 1 : b]).decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]


@contextmanager
def small_pieces_and_one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", 3000)
            yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> TrainingConfig:
    """Prepared by one process, in which PIECE_BYTES makes small pieces."""
    config = config_in(tmp_path_factory.mktemp("alone"))
    with small_pieces_and_one_core():
        prepare(config)
    return config


def test_each_document_is_once_in_its_split_in_order(alone):
    data = open_data(alone)
    texts = drawn_texts(1, 300)
    more = [f"{number} is {number**9}" for number in sorted(range(20), key=str) if number % 4]
    trained, held_out = texts_of(data.train, data), texts_of(data.validation, data)
    wanted = [text for text in dict.fromkeys([*texts, *more])]
    assert trained == [text for text in wanted if text in {*trained}]
    assert held_out == [text for text in wanted if text in {*held_out}]
    assert sorted(trained + held_out) == sorted(wanted)
    counts = {name: data.manifest[f"num_{name}"] for name in ("duplicates", "empty", "long", "short", "faulty", "invalid")}
    assert counts == {"duplicates": 3 + 5, "empty": 1, "long": 1, "short": 0, "faulty": 0, "invalid": 0}
    assert data.manifest["train"]["num_documents"] == len(trained)
    assert data.manifest["train"]["num_bytes"] == len("".join(trained).encode())
    assert sum(data.manifest["train"]["lengths"].values()) == len(trained)


def test_shards_say_which_entry_of_the_corpus_they_come_from(alone):
    data = open_data(alone)
    ids = {source: 0 for source in range(2)}
    for shard in data.manifest["train"]["shards"]:
        ids[shard["source"]] += shard["num_tokens"]
    assert [each["name"] for each in data.manifest["sources"]] == list(alone.corpus)
    assert [each["num_tokens"] for each in data.manifest["sources"]] == list(ids.values()) and min(ids.values()) > 0


def test_any_number_of_processes_writes_the_same_bytes(alone, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    config = replace(alone, data_dir=f"{tmp_path}/data")
    process = start(config, tmp_path)
    said, faults = process.communicate(timeout=300)
    assert (process.returncode, faults) == (0, ""), said
    assert content(config.data_dir) == content(alone.data_dir)
    assert "duplicates dropped          8" in said


def runs_of(data: Data) -> list[list[int]]:
    """The ids of every document with its end, held-out documents first."""
    assert data.validation is not None
    ids = [*data.validation.read(0, data.validation.num_tokens).tolist(), *data.train.read(0, data.train.num_tokens).tolist()]
    ends = [0, *(place + 1 for place, number in enumerate(ids) if number == data.end_of_text_id)]
    return [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def sums(data: Data) -> list:
    names = ("num_documents", "num_bytes", "num_tokens", "lengths")
    return [[data.manifest[split][name] for name in names] for split in ("train", "validation")]


@pytest.mark.parametrize("kind", ["nanoGPT", "llm.c", "Llama 3", "Megatron"])
def test_tokens_of_a_text_are_prepared_as_the_text_was(alone, tmp_path, kind):
    wanted = open_data(alone)
    part = write_tokens(tmp_path / "a.bin", kind, runs_of(wanted))
    path = f"{alone.data_dir}/tokenizer.json"
    config = replace(alone, corpus=(part.path,), data_dir=f"{tmp_path}/data", tokenizer_path=path)
    with small_pieces_and_one_core():
        data = prepare(config)
    assert runs_of(data) == runs_of(wanted) and sums(data) == sums(wanted)
    assert len(data.train.shards) > 2 and data.manifest["num_duplicates"] == data.manifest["num_empty"] == 0


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Data:
    """Bytes as tokens, of a text with invalid bytes and other letters; two documents are empty."""
    folder = tmp_path_factory.mktemp("raw")
    documents = [f"{text} \u6f22\u00e9".encode() + b"\xff\n" for text in drawn_texts(4, 99)]
    (folder / "a.txt").write_bytes(b"<|sep|>".join([b"", *documents, b" ", documents[7]]))
    config = config_in(folder, corpus=(f"{folder}/a.txt",), vocab_size=257, document_separator="<|sep|>")
    with small_pieces_and_one_core():
        return prepare(config)


def test_tokens_that_are_bytes_need_no_tokenizer_and_stand_beside_text(raw, tmp_path):
    runs = runs_of(raw)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"a document of text")
    (tmp_path / "text" / "empty.txt").write_bytes(b"")
    part = write_tokens(tmp_path / "a.bin", "nanoGPT", [[256], *runs, [32, 256], runs[7]])
    config = config_in(tmp_path, corpus=(part.path, f"{tmp_path}/text"), vocab_size=257, validation_fraction=0.25)
    with small_pieces_and_one_core():
        data = prepare(config)
    assert sorted(runs_of(data)) == sorted([*runs, [*b"a document of text", 256]])
    assert [data.manifest[f"num_{name}"] for name in ("duplicates", "empty", "invalid")] == [1, 3, 100]
    assert [raw.manifest[f"num_{name}"] for name in ("duplicates", "empty", "invalid")] == [1, 2, 100]
    assert data.manifest["sources"][0]["num_tokens"] == raw.manifest["sources"][0]["num_tokens"]


def test_held_out_tokens_are_not_trained_on_and_lengths_bound_their_text(raw, tmp_path):
    runs = runs_of(raw)
    parts = [write_tokens(tmp_path / f"{name}.bin", "nanoGPT", some) for name, some in (("a", runs), ("b", runs[:20]))]
    lengths = sorted(len(bytes(run[:-1]).decode(errors="surrogateescape")) for run in runs)
    config = config_in(
        tmp_path, corpus=(parts[0].path,), validation_corpus=(parts[1].path,), vocab_size=257,
        shortest_document_characters=lengths[9], longest_document_characters=lengths[-9],
    )  # fmt: skip
    with small_pieces_and_one_core():
        data = prepare(config)
    kept = [run for run in runs if lengths[9] <= len(bytes(run[:-1]).decode(errors="surrogateescape")) <= lengths[-9]]
    held_out = [run for run in runs[:20] if run in kept]
    assert runs_of(data) == [*held_out, *(run for run in kept if run not in held_out)] and held_out


def test_tokens_are_refused_before_anything_is_made(raw, tmp_path):
    (tmp_path / "tokens").mkdir()
    part = write_tokens(tmp_path / "tokens" / "a.bin", "nanoGPT", runs_of(raw))
    for changes, words in (
        ({"vocab_size": 270}, "set tokenizer_path to the tokenizer that made them, or vocab_size=257"),
        ({"corpus": (f"{ROOT}/ds",), "validation_corpus": (part.path,)}, "set tokenizer_path to the tokenizer that made them"),
        ({"corpus": (f"{tmp_path}/tokens",)}, "names the file itself"),
    ):
        config = replace(config_in(tmp_path / "x", corpus=(part.path,)), **changes)
        with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
            prepare(config)
        assert not Path(config.data_dir).exists()


@pytest.mark.slow
def test_ten_kills_at_random_cost_only_what_was_under_way(alone, tmp_path):
    """Of all processes at once, or of the first alone: its workers end with it."""
    config, draw = replace(alone, data_dir=f"{tmp_path}/data"), random.Random(5)
    building, kills, most = Path(config.data_dir) / prepare_data.BUILDING, 0, 0
    while not (Path(config.data_dir) / "manifest.json").exists():
        process = start(config, tmp_path)
        if kills < 10:
            seen = set(building.glob("*.json"))
            wait_for_pieces(process, building, len(seen) + draw.randint(1, 4))
            time.sleep(draw.random() * 0.05)
            workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL) if kills % 2 else os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            psutil.wait_procs(workers, timeout=60)
            assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
            left = len({*building.glob("*.json")}) if building.exists() else most
            assert left >= most or (Path(config.data_dir) / "manifest.json").exists()
            most = left
        _, faults = process.communicate(timeout=300)
        assert kills <= 10 or faults == ""
    process = start(config, tmp_path)
    assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    assert content(config.data_dir) == content(alone.data_dir)


def wait_for_pieces(process: subprocess.Popen, building: Path, number: int) -> None:
    wait_until(lambda: len([*building.glob("*.json")]) >= number or process.poll() is not None)


def wait_until(happens) -> None:
    limit = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < limit
        time.sleep(0.005)


def at_work(process: subprocess.Popen, config: TrainingConfig) -> list[psutil.Process]:
    """The processes of a preparation that has finished its first piece."""
    building = Path(config.data_dir) / prepare_data.BUILDING
    wait_until(lambda: any(building.glob("*.records")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture
def stoppable(alone, tmp_path):
    """A preparation that has just begun with its pieces, and its configuration; it has so many that a signal comes in time."""
    config = config_in(tmp_path / "many", data_dir=f"{tmp_path}/data", vocab_size=257)
    write_rows(tmp_path / "many" / "corpus" / "rows.jsonl", drawn_texts(2, 4000))
    process = start(config, tmp_path)
    yield process, config
    for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
        child.kill()
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_status_130_and_leaves_no_process(stoppable):
    process, config = stoppable
    workers = at_work(process, config)
    os.killpg(process.pid, signal.SIGINT)
    _, faults = process.communicate(timeout=120)
    assert (process.returncode, faults) == (130, "Stopped; the same command begins again\n")
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert any((Path(config.data_dir) / prepare_data.BUILDING).glob("*.json"))


@pytest.mark.slow
def test_a_killed_worker_is_a_refusal_that_keeps_what_is_finished(stoppable):
    process, config = stoppable
    worker = max(at_work(process, config), key=lambda child: child.memory_info().rss * (len(child.children()) == 0))
    worker.kill()
    _, faults = process.communicate(timeout=120)
    assert process.returncode == 2 and faults.startswith("refused: a process that prepares the data was killed;"), faults
    assert faults.count("\n") == 1 and any((Path(config.data_dir) / prepare_data.BUILDING).glob("*.json"))


@pytest.mark.slow
def test_a_second_preparation_waits_for_the_first(stoppable, tmp_path):
    process, config = stoppable
    at_work(process, config)
    second = start(config, tmp_path)
    said, faults = second.communicate(timeout=300)
    assert (second.returncode, faults) == (0, "") and process.wait(timeout=60) == 0
    assert "is in use: waiting for the process that prepares the data there" in said and "shards  " not in said


@pytest.mark.slow
def test_a_faulty_row_in_a_late_piece_is_one_line_and_the_rest_is_kept(alone, tmp_path):
    config = config_in(tmp_path / "faulty", data_dir=f"{tmp_path}/data", vocab_size=257)
    rows = tmp_path / "faulty" / "corpus" / "rows.jsonl"
    write_rows(rows, drawn_texts(1, 3000))
    with rows.open("a") as file:
        file.write('{"te\n')
    process = start(config, tmp_path)
    _, faults = process.communicate(timeout=120)
    assert process.returncode == 2 and faults.count("\n") == 1
    assert faults.startswith(f"refused: {rows}, line 3001: not JSON")
    assert any((Path(config.data_dir) / prepare_data.BUILDING).glob("*.json"))


def stopped(config: TrainingConfig, monkeypatch) -> None:
    """Prepares in this process up to the moment at which all is finished but the publishing."""
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 3000)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        patch.setattr(prepare_data, "draw_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert any((Path(config.data_dir) / prepare_data.BUILDING).glob("*-train-*.bin"))


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_document_that_was_dropped_comes_back_where_the_earlier_one_leaves_the_corpus(tmp_path, monkeypatch):
    config = config_in(tmp_path, vocab_size=257)
    stopped(config, monkeypatch)
    fewer = replace(config, corpus=config.corpus[1:])
    stopped(fewer, monkeypatch)
    found = prepare(fewer)
    assert found.manifest["num_duplicates"] == 0 and found.manifest["train"]["shards"]
    shutil.rmtree(config.data_dir)
    assert prepare(fewer).fingerprint == found.fingerprint


def test_a_file_that_was_mended_after_a_stop_is_read_again(tmp_path, monkeypatch):
    config = config_in(tmp_path, vocab_size=257)
    rows = Path(config.corpus[0])
    stopped(config, monkeypatch)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:100] + lines[101:]))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    found = prepare(config)
    shutil.rmtree(config.data_dir)
    assert prepare(config).fingerprint == found.fingerprint


@pytest.mark.parametrize(("lost", "is_damaged"), [("*-train-*.bin", False), ("*.records", False), ("*[0-9a-f].json", True)])
def test_a_piece_of_which_something_is_lost_is_made_again(tmp_path, monkeypatch, lost, is_damaged):
    config = config_in(tmp_path, vocab_size=257)
    stopped(config, monkeypatch)
    for path in (Path(config.data_dir) / prepare_data.BUILDING).glob(lost):
        path.write_text("{") if is_damaged else path.unlink()
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    found = prepare(config)
    shutil.rmtree(config.data_dir)
    assert prepare(config).fingerprint == found.fingerprint


@pytest.mark.parametrize("at_once", [1, 2, 5, 2**20])
def test_documents_are_as_long_as_their_characters_however_they_are_counted(tmp_path, monkeypatch, at_once):
    documents = [b"abc" * 3, "aé😀".encode() * 3, b"\xff\xf0\x9f\x98" * 2 + b"a", b"abc" * 3 + b"d", "😀".encode() * 8]
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.txt").write_bytes(document)
    bounds = {"shortest_document_characters": 9, "longest_document_characters": 9}
    config = config_in(tmp_path, corpus=(f"{tmp_path}/*.txt",), vocab_size=257, validation_fraction=0.0, eval_every_steps=None)
    monkeypatch.setattr(pieces, "COUNTED_BYTES", at_once)
    manifest = prepare(replace(config, **bounds)).manifest
    counts = manifest["num_short"], manifest["num_long"], manifest["train"]["num_documents"]
    assert counts == (1, 1, 3)


def test_one_emoji_does_not_make_a_document_four_times_as_large(tmp_path):
    text = "😀".encode() + b"a" * 2**24
    (tmp_path / "a.txt").write_bytes(text)
    config = config_in(tmp_path, corpus=(f"{tmp_path}/a.txt",), vocab_size=257, longest_document_characters=9)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="too long"):
            prepare(config)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()


NUMBERS = st.integers(0, 3)


@given(files=st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=9), max_size=5), at_once=st.integers(1, 9))
def test_duplicates_are_all_but_the_first_of_equal_documents_however_many_are_compared_at_once(
    tmp_path_factory, files, at_once
):
    folder, seen, wanted = tmp_path_factory.getbasetemp(), set(), {}
    for number, digests in enumerate(files):
        records = np.zeros(len(digests), RECORD)
        records["high"], records["low"] = np.array(digests, "<u8").reshape(-1, 2).T
        records.tofile(folder / f"{number}.records")
        again = [place for place, digest in enumerate(digests) if digest in seen or digest in digests[:place]]
        wanted |= {number: again} if again else {}
        seen |= {*digests}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "COMPARED_DOCUMENTS", at_once)
        found = duplicates(folder, [f"{number}.records" for number in range(len(files))])
    assert {number: places.tolist() for number, places in found.items()} == wanted


OTHER_RECIPES = [
    RECIPE._replace(fingerprint="cd" * 32), RECIPE._replace(vocab_size=301), RECIPE._replace(tokens_per_shard=501),
    RECIPE._replace(reading=Reading("body", None, False)), RECIPE._replace(validation_fraction=0.5),
    RECIPE._replace(shortest_characters=2), RECIPE._replace(longest_characters=2),
]  # fmt: skip
OTHER_PIECES = [PIECE._replace(parts=PIECE.parts[:1]), PIECE._replace(num_bytes=121), PIECE._replace(split="train")]
OTHER_PIECES.append(PIECE._replace(states="[[1, 2]]"))


def test_name_of_a_piece_tells_all_that_decides_it_and_nothing_else():
    others = {*(name_of(recipe, PIECE) for recipe in OTHER_RECIPES), *(name_of(RECIPE, piece) for piece in OTHER_PIECES)}
    assert len({name_of(RECIPE, PIECE), *others}) == 1 + len(OTHER_RECIPES) + len(OTHER_PIECES)
    elsewhere = RECIPE._replace(folder="/mnt/other", is_fast=False, num_threads=1)
    assert name_of(elsewhere, PIECE._replace(source=3)) == name_of(RECIPE, PIECE)


@given(st.integers(1, 10**12))
def test_length_class_holds_a_document(num_characters):
    (number,) = pieces.length_class(np.array([num_characters])).tolist()
    assert 2 ** (number / 4) <= num_characters * (1 + 1e-9) and num_characters < 2 ** ((number + 1) / 4) * (1 + 1e-9)


SUMMARIES = st.builds(
    lambda lengths, sizes: Summary(
        sum(lengths.values()), 7 * sum(sizes), sum(sizes), lengths, [WrittenShard("", n, "") for n in sizes]
    ),
    st.dictionaries(st.integers(0, 9).map(str), st.integers(1, 5), max_size=3), st.lists(st.integers(1, 9), max_size=3),
)  # fmt: skip


@given(st.lists(st.tuples(SUMMARIES, SUMMARIES, st.integers(0, 2), st.integers(0, 4)), max_size=5))
def test_contents_are_the_sums_and_every_shard_has_one_name_in_order(drawn):
    made = []
    for number, (train, held_out, source, num_duplicates) in enumerate(drawn):
        splits = {"train": named(train, f"{number}t"), "validation": named(held_out, f"{number}v")}
        counts = {"empty": 1, "invalid": number, "documents": 9}
        made.append(Made(PIECE._replace(source=source), Result(splits, counts, {}, "", num_duplicates)))
    found, names = contents(made, ("a", "b", "c")), final_names(made)
    for split in ("train", "validation"):
        own = [each.result.splits[split] for each in made]
        for count in ("num_documents", "num_bytes", "num_tokens"):
            assert found[split][count] == sum(getattr(each, count) for each in own)
        assert sum(found[split]["lengths"].values()) == found[split]["num_documents"]
        listed = [shard for each in own for shard in each.shards]
        assert [names[shard.name] for shard in listed] == [f"{split}-{n:05d}.bin" for n in range(len(listed))]
        assert [shard["num_tokens"] for shard in found[split]["shards"]] == [shard.num_tokens for shard in listed]
    assert found["num_empty"] == len(made) and found["num_duplicates"] == sum(each.result.num_duplicates for each in made)
    assert sum(each["num_tokens"] for each in found["sources"]) == found["train"]["num_tokens"]


def named(summary: Summary, name: str) -> Summary:
    return summary._replace(shards=[shard._replace(name=f"{name}{n}") for n, shard in enumerate(summary.shards)])


@pytest.fixture
def cluster(tmp_path):
    """The address of a dask scheduler, and its two workers."""
    pytest.importorskip("distributed")
    port, log = free_port(), tmp_path / "scheduler.log"
    address = f"tcp://127.0.0.1:{port}"
    commands = [["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path)]] * 2
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        running = [
            subprocess.Popen([sys.executable, "-m", "dask", *words], env=environment, cwd=tmp_path, stdout=file, stderr=file)
            for words in commands
        ]
    yield address, running[1:]
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_dask_workers_write_the_same_bytes_also_when_one_is_killed(alone, cluster, tmp_path):
    address, workers = cluster
    config = replace(alone, data_dir=f"{tmp_path}/data", dask_scheduler=address)
    process = start(config, tmp_path)
    at_work(process, config)
    workers[0].kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert content(config.data_dir) == content(alone.data_dir)


@pytest.mark.slow
def test_a_dask_scheduler_that_does_not_answer_is_refused_in_one_line(alone, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    process = start(replace(alone, data_dir=f"{tmp_path}/data", dask_scheduler=address), tmp_path)
    _, faults = process.communicate(timeout=300)
    assert process.returncode == 2 and faults.count("\n") == 1, faults
    assert faults.startswith(f"refused: dask_scheduler={address!r} ")


def test_an_address_that_is_none_is_refused_by_its_field(tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="^dask_scheduler='nonsense' cannot be reached "):
        prepare(config_in(tmp_path, vocab_size=257, dask_scheduler="nonsense"))
