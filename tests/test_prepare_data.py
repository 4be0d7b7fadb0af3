"""Laws of scripts/prepare_data.py: built once, whole or not at all, and never opened when anything has changed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest
from conftest import Planted
from tokenizers import Tokenizer

from ds import tokenizer as bpe
from ds.corpus import Reading, Tally, documents, is_held_out
from ds.encoder import Encoder, encoder_of
from ds.files import Part, corpus_files
from ds.shards import TokenStream, open_shard, write_shard
from scripts import prepare_data
from scripts.config import TrainingConfig
from scripts.prepare_data import Data, open_data, prepare, sample_documents
from scripts.run.setup import refuse_on_this_machine

ROOT = Path(prepare_data.__file__).parents[1]
TABLE = [
    "documents", "bytes of text", "tokens", "bytes a token", "held out", "duplicates dropped", "empty, skipped",
    "too short or long, skipped", "faulty rows, skipped", "not UTF-8, kept", "shards", "seconds",
]  # fmt: skip


def write_corpus(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        words = b64encode(sha256(b"%d" % number).digest()) * 2
        (folder / f"{number:03d}.txt").write_bytes(b"document %d says %s\n\xff<|endoftext|>" % (number, words))


def config_in(folder: Path, **changes) -> TrainingConfig:
    write_corpus(folder / "text", range(40))
    fields = {
        "corpus": (f"{folder}/text",), "data_dir": f"{folder}/data", "run_dir": f"{folder}/run", "validation_fraction": 0.25,
        "vocab_size": 300, "tokens_per_shard": 500, "context_length": 16, "tokens_per_step": 64, "micro_batch_rows": 2,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return config_in(tmp_path)


@pytest.fixture
def built(config: TrainingConfig) -> TrainingConfig:
    prepare(config)
    return config


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()} if Path(folder).exists() else {}


def refusal(config: TrainingConfig, call=prepare) -> str:
    """The refusal's one line; data_dir is as it was before."""
    before = content(config.data_dir)
    with pytest.raises(ValueError) as caught:
        call(config)
    assert content(config.data_dir) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts_of(stream: TokenStream | None, data: Data) -> list[bytes]:
    assert stream is not None
    ids, end = stream.read(0, stream.num_tokens).tolist(), bpe.end_of_text_id(data.tokenizer)
    assert ids[-1] == end
    ends = [-1, *(place for place, number in enumerate(ids) if number == end)]
    return [bpe.decode(data.tokenizer, ids[a + 1 : b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_shards_hold_every_document_in_order_each_in_one_split(tmp_path, vocab_size):
    config = config_in(tmp_path, vocab_size=vocab_size)
    data = prepare(config)
    parts = [Part(file.path, 0, None) for file in corpus_files(config.corpus, ())]
    everything = list(documents(parts, Reading("text", None, False), Tally()))
    for stream, name, held_out in ((data.train, "train", False), (data.validation, "validation", True)):
        wanted = [document for document in everything if is_held_out(document, 0.25) == held_out]
        assert texts_of(stream, data) == wanted
        counts = (data.manifest[name]["num_documents"], data.manifest[name]["num_bytes"])
        assert counts == (len(wanted), sum(map(len, wanted)))


def test_shards_are_full_but_the_last_and_only_known_names_are_written(built):
    data = open_data(built)
    sizes = [shard["num_tokens"] for shard in data.manifest["train"]["shards"]]
    assert len(sizes) > 2 and set(sizes[:-1]) == {500} and 0 < sizes[-1] <= 500
    assert sum(sizes) == data.train.num_tokens == data.manifest["train"]["num_tokens"]
    names = {shard["name"] for split in ("train", "validation") for shard in data.manifest[split]["shards"]}
    assert set(content(built.data_dir)) == names | {"tokenizer.json", "manifest.json", "data.png"}


def test_building_is_deterministic_and_happens_once(built, capsys):
    first = content(built.data_dir)
    stamps = {path: path.stat().st_mtime_ns for path in Path(built.data_dir).iterdir()}
    capsys.readouterr()
    again = prepare(built)
    assert capsys.readouterr().out == ""
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(built.data_dir).iterdir()}
    assert again.fingerprint == open_data(built).fingerprint
    shutil.rmtree(built.data_dir)
    assert prepare(built).fingerprint == again.fingerprint
    assert content(built.data_dir) == first


def test_a_terminal_shows_a_bar_for_what_there_is_to_do_alone(config, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(config)
    shown = capsys.readouterr().err
    assert "shards: 100%" in shown and "duplicates" not in shown and shown.count("\n") == 1


def test_where_tiktoken_differs_tokenizers_encodes_and_a_line_says_so(built, monkeypatch, capsys):
    first = content(built.data_dir)
    shutil.rmtree(built.data_dir)

    def wrong_encoder(tokenizer: Tokenizer) -> Encoder:
        encoder = encoder_of(tokenizer)
        assert encoder.fast is not None
        return encoder._replace(fast=encoder.fast._replace(ids=encoder.fast.ids[::-1]))

    monkeypatch.setattr(prepare_data, "encoder_of", wrong_encoder)
    capsys.readouterr()
    prepare(built)
    line = "tokenizer: tiktoken gives other ids for 'document 0 says X+zr'; tokenizers encodes instead\n"
    assert capsys.readouterr().out.count(line) == 1
    assert content(built.data_dir) == first


def test_held_out_documents_stay_held_out_when_the_corpus_grows(tmp_path, config):
    small = prepare(config)
    write_corpus(tmp_path / "text", range(80))
    large = prepare(replace(config, data_dir=f"{tmp_path}/larger"))
    held_out, trained = set(texts_of(large.validation, large)), set(texts_of(large.train, large))
    assert set(texts_of(small.validation, small)) < held_out
    assert set(texts_of(small.train, small)) < trained
    assert not held_out & trained


def test_tokenizer_never_sees_held_out_documents(tmp_path):
    config = config_in(tmp_path)
    before = prepare(config).tokenizer
    for path in (Path(file.path) for file in corpus_files(config.corpus, ())):
        if is_held_out(path.read_bytes(), 0.25):
            path.unlink()
    sampled = list(sample_documents(config, corpus_files(config.corpus, ())))
    assert bpe.fingerprint(bpe.train(sampled, 300)) == bpe.fingerprint(before)


@pytest.mark.parametrize("sample_bytes", [1, 100, 1000, 10**6])
def test_tokenizer_sample_is_bounded_and_spread_over_the_files(tmp_path, sample_bytes):
    config = config_in(tmp_path, tokenizer_sample_bytes=sample_bytes, validation_fraction=0.0, eval_every_steps=None)
    files = corpus_files(config.corpus, ())
    sampled = list(sample_documents(config, files))
    corpus_bytes = sum(file.num_bytes for file in files)
    assert min(sample_bytes, corpus_bytes) * 0.8 - 1 <= sum(map(len, sampled)) <= sample_bytes
    if sample_bytes == 1000:
        numbers = [int(text.split()[1]) for text in sampled]
        assert min(numbers) < 10 and max(numbers) > 30


def test_tokenizer_path_gives_the_ids(tmp_path, built):
    other = replace(built, data_dir=f"{tmp_path}/other", tokenizer_path=built.data_dir)
    data = prepare(other)
    assert data.manifest["tokenizer_fingerprint"] == open_data(built).manifest["tokenizer_fingerprint"]
    wrong = replace(other, data_dir=f"{tmp_path}/wrong", vocab_size=4096)
    assert "vocab_size=4096 is not that of tokenizer_path=" in refusal(wrong) and "nearest is 300" in refusal(wrong)


def test_vocabulary_may_have_the_rows_of_the_model_whose_tokenizer_it_is(tmp_path, built):
    """Published models pad their embedding: Qwen3's has 151,936 rows and its tokenizer 151,669 ids."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(Path(built.data_dir) / "tokenizer.json", model)
    padded = replace(built, data_dir=f"{tmp_path}/padded", tokenizer_path=str(model), vocab_size=320)
    for description in (None, "{", "[]", json.dumps({"vocab_size": 319}), json.dumps({"vocab_size": 200})):
        if description is not None:
            (model / "config.json").write_text(description)
        assert "vocab_size=320 is not that of tokenizer_path=" in refusal(padded)
    (model / "config.json").write_text(json.dumps({"vocab_size": 320}))
    data = prepare(padded)
    assert data.decode([310, 97]) == prepare(built).decode([97])
    assert data.train.read(0, 500).tolist() == prepare(built).train.read(0, 500).tolist()


def test_without_held_out_fraction_there_is_no_validation(tmp_path):
    data = prepare(config_in(tmp_path, validation_fraction=0.0, eval_every_steps=None))
    assert data.validation is None and data.manifest["validation"]["shards"] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"corpus": ("/absent/file",)}, "corpus: '/absent/file' is not there"),
        ({"vocab_size": 50_000}, "vocab_size=50000: the corpus yields only"),
        ({"context_length": 4096, "tokens_per_step": 8192}, "corpus too small for one training window"),
        (
            {"context_length": 512, "tokens_per_step": 1024, "vocab_size": 310, "validation_fraction": 0.1},
            "one held-out window",
        ),
        (
            {"validation_fraction": 1e-9},
            "raise validation_fraction, add documents, or set validation_fraction=0 and eval_every",
        ),
    ],
)
def test_refused_build_leaves_what_was_there_untouched(tmp_path, changes, reason):
    config = config_in(tmp_path, **changes)
    assert reason in refusal(config)
    (tmp_path / "data").mkdir(exist_ok=True)
    for name in ("train-00000.bin", "tokenizer.json", "notes.txt"):
        (tmp_path / "data" / name).write_text("mine")
    assert reason in refusal(config)


def test_data_dir_that_cannot_be_written_is_refused(tmp_path, config):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"data_dir='.*/file' cannot be written \(.*\); name another folder"):
        prepare(replace(config, data_dir=f"{tmp_path}/file"))


def test_data_dir_inside_the_corpus_is_refused(tmp_path, config):
    assert "lies in the corpus" in refusal(replace(config, data_dir=f"{tmp_path}/text/data"))
    assert "lies in the corpus" in refusal(replace(config, run_dir=f"{tmp_path}/text/run"))


@pytest.mark.parametrize("entry", ["text", "text/**", "*/*"])
def test_data_dir_that_the_corpus_reaches_by_a_link_or_a_wildcard_is_refused_before_anything_is_made(tmp_path, config, entry):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("mine")
    (tmp_path / "text" / "more").symlink_to(tmp_path)
    words = refusal(replace(config, corpus=(f"{tmp_path}/{entry}",), data_dir=f"{tmp_path}/data"))
    assert words.startswith("data_dir=") and "lies in the corpus" in words
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["notes.txt"]


def test_interrupted_build_is_built_again(built):
    """What a killed build may leave: shards without a manifest, and the folder where they waited, of this build or another."""
    whole, folder = content(built.data_dir), Path(built.data_dir)
    for head in ("", "{", (folder / "manifest.json").read_text()):
        (folder / "manifest.json").unlink()
        (folder / "train-00001.bin").write_bytes(b"half")
        (folder / prepare_data.BUILDING).mkdir()
        (folder / prepare_data.BUILDING / "head.json").write_text(head)
        (folder / prepare_data.BUILDING / "tokenizer.json").write_text('{"model"')
        (folder / prepare_data.BUILDING / "0123.records.tmp").write_bytes(b"half")
        prepare(built)
        assert content(built.data_dir) == whole
    (folder / prepare_data.BUILDING).mkdir()
    prepare(built)
    assert content(built.data_dir) == whole


def test_tokenizer_of_an_interrupted_build_is_kept_only_for_the_same_build(built, monkeypatch):
    whole, folder = content(built.data_dir), Path(built.data_dir)
    train, trained = bpe.train, []
    monkeypatch.setattr(bpe, "train", lambda *given: trained.append(given) or train(*given))
    monkeypatch.setattr(prepare_data, "draw_data", stop)
    (folder / "manifest.json").unlink()
    for changes, num_trained in (({}, 1), ({}, 1), ({"tokenizer_sample_bytes": 900}, 2), ({}, 3)):
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(built, **changes))
        assert len(trained) == num_trained
    monkeypatch.undo()
    prepare(built)
    assert content(built.data_dir) == whole


def stop(*given) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_fraction": 0.2}, {"tokens_per_shard": 501}, {"vocab_size": 301}, {"text_field": "body"},
        {"corpus_exclude": ("x", "y")}, {"tokenizer_sample_bytes": 9}, {"tokenizer_path": "x"},
        {"document_separator": "|"}, {"validation_corpus": ("x",)}, {"skip_faulty_rows": True},
    ],
)  # fmt: skip
def test_changed_field_is_refused_by_name(built, changes):
    message = refusal(replace(built, **changes))
    ((name, value),) = changes.items()
    shown = list(value) if isinstance(value, tuple) else value
    assert f"{name}={shown!r} was" in message and "delete data_dir" in message


def test_manifest_of_before_the_later_fields_opens_with_their_defaults(built):
    path = Path(built.data_dir) / "manifest.json"
    later = (*prepare_data.LATER_FIELDS, "validation_corpus_digest", "sources")
    manifest = json.loads(path.read_text())
    for split in ("train", "validation"):
        del manifest[split]["lengths"]
        for shard in manifest[split]["shards"]:
            del shard["source"]
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in later and "num_" not in name}))
    assert open_data(built).train.num_tokens == manifest["train"]["num_tokens"]
    assert "document_separator='|' was None" in refusal(replace(built, document_separator="|"))


def write_rows(path: Path, numbers: range) -> None:
    path.write_text("".join(json.dumps({"text": f"row {number} has {number**3} words"}) + "\n" for number in numbers))


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_validation_corpus_is_held_out_whole_and_nothing_of_it_is_trained_on(tmp_path, fraction, capsys):
    write_rows(tmp_path / "rows.jsonl", range(60))
    write_rows(tmp_path / "held.jsonl", range(50, 70))
    names = {"corpus": (f"{tmp_path}/rows.jsonl",), "validation_corpus": (f"{tmp_path}/held.jsonl",)}
    config = config_in(tmp_path, **names, validation_fraction=fraction, vocab_size=262)
    data = prepare(config)
    held_out, trained = texts_of(data.validation, data), texts_of(data.train, data)
    assert held_out == [b"row %d has %d words" % (number, number**3) for number in range(50, 70)]
    assert trained == [b"row %d has %d words" % (number, number**3) for number in range(50)]
    assert data.manifest["num_duplicates"] == 10 and "duplicates dropped          10\n" in capsys.readouterr().out
    sampled = list(sample_documents(config, corpus_files(config.corpus, ())))
    assert sampled and not set(sampled) & set(held_out)
    write_rows(tmp_path / "held.jsonl", range(50, 71))
    assert "corpus has changed" in refusal(config)


def test_corpus_and_validation_corpus_may_lie_elsewhere(tmp_path):
    rows = {"rows": range(60), "held": range(50, 70)}
    for name, numbers in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", numbers)
        fsspec.filesystem("memory").pipe(f"/elsewhere/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    names = {"corpus": ("memory://elsewhere/r*.jsonl",), "validation_corpus": ("memory://elsewhere/held.jsonl",)}
    config = config_in(tmp_path, **names, vocab_size=262)
    refuse_on_this_machine(config, 1)
    data = prepare(config)
    local = {"corpus": (f"{tmp_path}/rows.jsonl",), "validation_corpus": (f"{tmp_path}/held.jsonl",)}
    other = prepare(replace(config, **local, data_dir=f"{tmp_path}/local"))
    assert texts_of(data.train, data) == texts_of(other.train, other)
    assert texts_of(data.validation, data) == texts_of(other.validation, other)
    fsspec.filesystem("memory").rm("/elsewhere", recursive=True)
    assert prepare(config).fingerprint == data.fingerprint, "the network is asked once"


def test_one_file_of_many_documents_is_cut_and_held_out_by_document(tmp_path, capsys):
    stories = [f"story {number} ends after {number * number} days\n" for number in range(60)]
    (tmp_path / "stories.txt").write_text("<|endoftext|>\n".join(stories))
    config = config_in(tmp_path, corpus=(f"{tmp_path}/stories.txt",), vocab_size=257)
    assert "document_separator cuts a file" in refusal(config)
    said = capsys.readouterr().out
    assert "note: only 1 documents" in said and "document_separator='<|endoftext|>'" in said
    data = prepare(replace(config, document_separator="<|endoftext|>"))
    found = texts_of(data.train, data) + texts_of(data.validation, data)
    assert sorted(found) == sorted(story.strip().encode() for story in stories)
    assert "note:" not in capsys.readouterr().out


def test_what_is_skipped_and_what_is_no_utf8_is_told_and_kept_in_the_manifest(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", range(30))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": null}\n{"text": ""}\n{"te\n')
    config = config_in(tmp_path, corpus=(f"{tmp_path}/rows.jsonl", f"{tmp_path}/text"), vocab_size=257)
    assert f"{tmp_path}/rows.jsonl, line 33: not JSON" in refusal(config)
    data = prepare(replace(config, skip_faulty_rows=True))
    said = capsys.readouterr().out
    lines = ("documents                   70", "not UTF-8, kept             40", "empty, skipped              2")
    assert all(f"  {line}\n" in said for line in (*lines, "faulty rows, skipped        1"))
    assert f"note: 1 faulty rows skipped, the first: {tmp_path}/rows.jsonl, line 33" in said
    assert [data.manifest[f"num_{kind}"] for kind in ("empty", "invalid", "faulty")] == [2, 40, 1]


def test_all_changed_fields_are_listed(built):
    message = refusal(replace(built, text_field="body", tokens_per_shard=7))
    assert "text_field='body' was 'text'" in message and "tokens_per_shard=7 was 500" in message


def test_fields_that_do_not_concern_the_data_may_change(built):
    open_data(replace(built, seed=9, hidden_size=96, num_steps=500))


def test_context_longer_than_a_split_is_refused_at_opening(built):
    longer = replace(built, context_length=1024, tokens_per_step=2048)
    assert "corpus too small for one held-out window" in refusal(longer)


def test_changed_corpus_is_refused_and_an_absent_one_is_fine(tmp_path, built):
    (tmp_path / "text" / "new.txt").write_text("new")
    assert "corpus has changed" in refusal(built)
    shutil.rmtree(tmp_path / "text")
    assert prepare(built).train.num_tokens > 0


def test_every_damaged_or_missing_file_is_refused(built):
    for path in sorted(Path(built.data_dir).glob("*.bin")):
        whole = path.read_bytes()
        for damaged in (whole[:140] + bytes([whole[140] ^ 1]) + whole[141:], whole[:-1], whole + b"\0", b""):
            path.write_bytes(damaged)
            assert path.name in refusal(built)
        path.unlink()
        assert f"{path.name} cannot be read" in refusal(built)
        path.write_bytes(whole)
    assert open_data(built)


def test_shard_of_another_build_is_refused(built):
    path = Path(built.data_dir) / "train-00000.bin"
    shard = open_shard(path)
    write_shard(path, shard.ids[::-1].copy(), 300, shard.fingerprint)
    assert "train-00000.bin is not the shard that manifest.json names" in refusal(built)


def test_other_tokenizer_is_refused(built):
    path = Path(built.data_dir) / "tokenizer.json"
    state = json.loads(path.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(state))
    assert "differs from the tokenizer of the shards" in refusal(built)
    path.write_text("{")
    assert "cannot be read as a tokenizer" in refusal(built) and "delete data_dir" in refusal(built)
    path.unlink()
    assert "tokenizer.json is not there; delete data_dir" in refusal(built)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_planted_pickle_is_refused_by_name_and_never_runs(tmp_path, config, protocol):
    marker = tmp_path / "marker"
    planted = pickle.dumps(Planted(marker), protocol)
    in_corpus, as_tokenizer = tmp_path / "text" / "model.pt", tmp_path / "planted.json"
    as_tokenizer.write_bytes(planted)
    assert f"{as_tokenizer} cannot be read as a tokenizer" in refusal(replace(config, tokenizer_path=str(as_tokenizer)))
    in_corpus.write_bytes(planted)
    for vocab_size in (257, 300):
        message = refusal(replace(config, vocab_size=vocab_size))
        assert f"{in_corpus} is a pickle" in message and "corpus_exclude" in message
    built = replace(config, corpus_exclude=("*.pt",))
    prepare(built)
    for name in ("train-00000.bin", "validation-00000.bin", "tokenizer.json", "manifest.json"):
        path = Path(built.data_dir) / name
        whole = path.read_bytes()
        path.write_bytes(planted)
        assert f"{name} " in refusal(built)
        path.write_bytes(whole)
    assert open_data(built) and not marker.exists()
    pickle.loads(planted)
    assert marker.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 99}'])
def test_damaged_manifest_is_refused(built, text):
    (Path(built.data_dir) / "manifest.json").write_text(text)
    assert "delete data_dir" in refusal(built)


def test_manifest_without_its_splits_is_refused(built):
    path = Path(built.data_dir) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "train"}))
    assert "manifest.json is damaged" in refusal(built)


def test_opening_what_was_never_built_is_refused(config):
    assert "run scripts/prepare_data.py" in refusal(config, open_data)
    assert not Path(config.data_dir).exists()


def test_command_says_where_the_data_is_or_refuses_with_status_2(config, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py"])
    monkeypatch.setattr(prepare_data, "PRETRAIN", config)
    prepare_data.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("  ")] == ["corpus", "tokenizer", "note", "data"]
    assert [line[:30].strip() for line in lines if line.startswith("  ")] == TABLE
    assert config.data_dir in lines[-1]
    monkeypatch.setattr(prepare_data, "PRETRAIN", replace(config, text_field="body"))
    with pytest.raises(SystemExit) as caught:
        prepare_data.main()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("refused: data_dir=")


def run(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "scripts" / "prepare_data.py")]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def repository_with(folder: Path, line: str) -> Path:
    """A copy of the sources in `folder` with one more line at the end of config.py."""
    for name in ("ds", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "scripts" / "config.py").open("a") as file:
        file.write(f"{line}\n")
    return folder


def test_argument_is_refused_with_a_pointer_to_the_config(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--vocab_size=9"])
    with pytest.raises(SystemExit) as caught:
        prepare_data.main()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("refused: --vocab_size=9: there are no command-line arguments")
    assert "scripts/config.py" in said.err


def test_bad_preset_is_refused_in_one_line(tmp_path):
    done = run(repository_with(tmp_path, "PRETRAIN = replace(PRETRAIN, num_steps=0)"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("refused: num_steps=0 is below 1") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_command_prepares_the_preset_once(tmp_path, config):
    folder = repository_with(tmp_path / "repository", f"PRETRAIN = {config!r}")
    done = run(folder)
    assert (done.returncode, done.stderr) == (0, "")
    written = content(config.data_dir)
    assert {"manifest.json", "tokenizer.json", "train-00000.bin", "validation-00000.bin"} <= written.keys()
    *steps, last = done.stdout.splitlines()
    assert [line.split(":")[0] for line in steps if not line.startswith("  ")] == ["corpus", "tokenizer", "note"]
    assert last == f"data: {open_data(config).train.num_tokens:,} training tokens in {config.data_dir}"
    again = run(folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{last}\n", "") and content(config.data_dir) == written
