"""Laws of ds/corpus.py: which files, which documents, which are held out."""

import bz2
import gzip
import json
import lzma
import pickle
import pickletools
import warnings
from collections import OrderedDict
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from conftest import Planted
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ds import corpus
from ds.corpus import corpus_digest, corpus_files, documents, file_documents, is_held_out, one_line

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
STARTS = (corpus.ZIP_START, *corpus.PICKLE_STARTS)
JSON_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.py", "sub/c.py", "sub/deep/d.py", "test/e.py", ".hidden/f.py", "sub/.g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        result = call(*arguments)
        list(result)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_gives_all_files_below_but_hidden_ones(tree):
    assert names(corpus_files((str(tree),), ()), tree) == ["a.py", "b.txt", "sub/c.py", "sub/deep/d.py", "test/e.py"]


def test_glob_gives_what_it_matches(tree):
    assert names(corpus_files((f"{tree}/*.py",), ()), tree) == ["a.py"]
    assert names(corpus_files((f"{tree}/**/*.py",), ()), tree) == ["a.py", "sub/c.py", "sub/deep/d.py", "test/e.py"]


def test_exclude_leaves_out_by_any_part_below_the_root(tree):
    assert names(corpus_files((f"{tree}/**/*.py",), ("test", "d*")), tree) == ["a.py", "sub/c.py"]
    assert names(corpus_files((str(tree),), ("su?", "*.txt")), tree) == ["a.py", "test/e.py"]


def test_exclude_does_not_look_above_the_root(tree):
    assert names(corpus_files((f"{tree}/test",), ("test",)), tree) == ["test/e.py"]
    assert names(corpus_files((f"{tree}/test/*.py",), ("test", tree.name)), tree) == ["test/e.py"]


def test_named_file_is_never_excluded(tree):
    assert corpus_files((f"{tree}/.hidden/f.py",), ("*",)) == [tree / ".hidden/f.py"]


def test_file_named_twice_comes_once_and_order_of_entries_does_not_matter(tree):
    entries = (f"{tree}/sub", f"{tree}/*.py", f"{tree}/a.py", f"{tree}/sub/../a.py")
    assert corpus_files(entries, ()) == corpus_files(entries[::-1][1:], ())
    assert names(corpus_files(entries, ()), tree) == ["a.py", "sub/c.py", "sub/deep/d.py"]


@pytest.mark.parametrize("entry", ["absent", "absent/*.py", "*.rs"])
def test_entry_without_a_file_is_refused(tree, entry):
    assert f"{tree}/{entry}" in refusal(corpus_files, (f"{tree}/a.py", f"{tree}/{entry}"), ())


def test_entry_excluded_whole_is_refused(tree):
    assert "corpus_exclude leaves out all 1" in refusal(corpus_files, (f"{tree}/test",), ("*.py",))


def test_digest_follows_names_and_sizes(tree):
    files = corpus_files((str(tree),), ())
    before = corpus_digest(files)
    assert corpus_digest(files) == before != corpus_digest(files[1:])
    files[0].write_text("longer than it was")
    assert corpus_digest(files) != before


@given(content=st.binary(min_size=1))
def test_plain_file_is_one_document_byte_for_byte(tmp_path_factory, content):
    assume(not content.startswith(STARTS))
    path = tmp_path_factory.getbasetemp() / "plain.txt"
    path.write_bytes(content)
    assert list(documents([path], "text")) == [content]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_give_what_was_compressed(tmp_path, suffix):
    text = b"\xff text\n" * 1000
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](text))
    lines = b"".join(json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(3))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines[:10]) + COMPRESS[suffix](lines[10:]))
    assert list(documents(corpus_files((str(tmp_path),), ()), "text")) == [text, b"line 0", b"line 1", b"line 2"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_truncated_or_broken_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](bytes(range(256)) * 8)
    for content in (whole[:-9], b"this was never compressed"):
        path.write_bytes(content)
        message = refusal(documents, [path], "text")
        assert str(path) in message and "corpus_exclude" in message


@given(texts=st.lists(JSON_TEXT, min_size=1), ascii_only=st.booleans())
@example(texts=["\ud800", "a\udfff"], ascii_only=True)
@example(texts=["\ud800", "a\udfff"], ascii_only=False)
def test_json_lines_give_the_strings_that_were_written(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.getbasetemp() / "lines.ndjson"
    lines = [json.dumps({"other": 1, "body": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes("\n\n  \n".join(lines).encode("utf-8", "surrogatepass"))
    assert list(file_documents(path, "body")) == [text.encode("utf-8", "surrogatepass") for text in texts if text]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"body": "x", "id": 1}', "there is 'body', 'id'"),
        ("{}", "there is none"),
        ('{"text": null}', "of type NoneType, not a string"),
        ('{"text": 3}', "of type int, not a string"),
    ],
)
def test_bad_json_line_is_refused_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    message = refusal(documents, [path], "text")
    assert f"{path}, line 3" in message and reason in message


def test_json_line_that_is_not_utf8_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    assert f"{path}, line 1: not JSON" in refusal(documents, [path], "text")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_gives_its_rows_without_nulls_and_empty_ones(tmp_path, kind):
    texts = ["a", None, "", "b", "ü"] * 1000
    table = pa.table({"n": range(5000), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "t.parquet")
    assert list(documents([tmp_path / "t.parquet"], "text")) == [text.encode() for text in texts if text]


def test_parquet_keeps_bytes_that_are_not_utf8(tmp_path):
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    assert list(documents([tmp_path / "t.parquet"], "text")) == [b"\xff\xfe"]


def test_parquet_without_a_column_of_strings_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    assert "'n', 'body'" in refusal(documents, [path], "text")
    assert "int64, not a string" in refusal(documents, [path], "n")
    path.write_bytes(b"PAR1 not really")
    assert "cannot be read" in refusal(documents, [path], "text")


def test_file_that_vanished_is_refused(tmp_path):
    assert "cannot be read (" in refusal(documents, [tmp_path / "gone.txt"], "text")


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\n b\t\n"), "a b"), (EOFError(), "EOFError"), (OSError(2, "none", "x"), "[Errno 2] none: 'x'")],
)
def test_words_of_an_error_are_one_line_and_never_none(error, line):
    assert one_line(error) == line


def test_empty_documents_are_skipped_and_nothing_at_all_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert list(documents([tmp_path / "a.txt", tmp_path / "b.txt"], "text")) == [b"b"]
    assert "holds no text" in refusal(documents, [tmp_path / "a.txt"], "text")
    assert "holds no text" in refusal(documents, [], "text")


@given(document=st.binary(), fraction=st.floats(0, 1), larger=st.floats(0, 1))
def test_held_out_document_stays_held_out_for_a_larger_fraction(document, fraction, larger):
    fraction, larger = sorted((fraction, larger))
    assert is_held_out(document, larger) or not is_held_out(document, fraction)
    assert not is_held_out(document, 0.0)
    assert is_held_out(document, 1.0)


@pytest.mark.parametrize("fraction", [0.03, 0.5])
def test_held_out_share_is_the_fraction(fraction):
    share = sum(is_held_out(b"%d" % number, fraction) for number in range(20_000)) / 20_000
    assert share == pytest.approx(fraction, abs=0.012)


def planted_by(kind: str, marker: Path, folder: Path) -> bytes:
    if kind.isdecimal():
        return pickle.dumps({"text": Planted(marker)}, int(kind))
    path = folder / "saved"
    torch.save(Planted(marker), path, _use_new_zipfile_serialization=kind == "torch zip")
    content = path.read_bytes()
    path.unlink()
    return content


KINDS = ("2", "3", "4", "5", "torch zip", "torch before zip")
PLAIN_NAMES = ("x.pkl", "x.pt", "x.txt", "x.py", "x")
OTHER_NAMES = ("x.jsonl", "x.ndjson", "x.parquet", *(f"{name}{suffix}" for name in ("x.pkl", "x.jsonl") for suffix in COMPRESS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PLAIN_NAMES, *OTHER_NAMES])
def test_planted_pickle_is_refused_by_name_and_never_runs(tmp_path, name, kind):
    folder, marker = tmp_path / "text", tmp_path / "marker"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    planted = planted_by(kind, marker, tmp_path)
    contents = [planted] + [compress(planted) for suffix, compress in COMPRESS.items() if name.endswith(suffix)]
    for content in contents:
        (folder / name).write_bytes(content)
        message = refusal(documents, corpus_files((str(folder),), ()), "text")
        assert str(folder / name) in message and "corpus_exclude" in message
    assert not marker.exists()
    assert list(documents(corpus_files((str(folder),), (name,)), "text")) == [b"good"]


def test_planted_pickle_would_have_run(tmp_path):
    """Else the law above would be about nothing."""
    pickle.loads(planted_by("4", tmp_path / "marker", tmp_path))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_pickle_is_called_one(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps([1, "two"]))
    assert f"{path} is a pickle, not text" in refusal(documents, [path], "text")
    torch.save([1], path)
    assert f"{path} is a zip archive, not text" in refusal(documents, [path], "text")


OBJECTS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.complex_numbers(), st.text(), st.binary(),
        st.binary(min_size=300, max_size=70_000), st.decimals(), st.just(json.loads), st.just(OrderedDict), st.just(b"." * 300),
        st.binary().map(bytearray), st.frozensets(st.integers()), st.sampled_from([Path("a"), Decimal(1), pa.int8()]),
    ),
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner, inner, inner), st.tuples(inner), st.dictionaries(st.text(), inner),
        st.dictionaries(st.integers(), inner).map(OrderedDict),
    ),
    max_leaves=12,
)  # fmt: skip


PICKLES = {"value": OBJECTS, "protocol": st.integers(2, 5), "behind": st.binary()}


@given(**PICKLES)
def test_every_pickle_is_known_whatever_it_holds_and_whatever_follows(tmp_path_factory, value, protocol, behind):
    check_pickle(tmp_path_factory.getbasetemp() / "pickled", pickle.dumps(value, protocol) + behind)


@pytest.mark.slow
@given(**PICKLES)
@settings(max_examples=200)
def test_every_pickle_is_known_in_many_examples(tmp_path_factory, value, protocol, behind):
    check_pickle(tmp_path_factory.getbasetemp() / "pickled", pickle.dumps(value, protocol) + behind)


def check_pickle(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "is a pickle" in refusal(documents, [path], "text")


def test_opcodes_are_those_of_the_library():
    by_kind = {-1: [], -2: [], -3: [], -4: [], -5: []} | {size: [] for size in (0, 1, 2, 4, 8)}
    for opcode in pickletools.opcodes:
        by_kind[opcode.arg.n if opcode.arg else 0].append(opcode)
    fixed = {ord(opcode.code): size for size in (0, 1, 2, 4, 8) for opcode in by_kind[size] if opcode.code != "."}
    lengths = {ord(opcode.code): size for kind, size in ((-2, 1), (-3, 4), (-4, 4), (-5, 8)) for opcode in by_kind[kind]}
    lines = {ord(opcode.code): 2 if "pair" in opcode.arg.name else 1 for opcode in by_kind[-1] if opcode.arg}
    assert (fixed, lengths, lines) == (corpus.FIXED_BYTES, corpus.LENGTH_BYTES, corpus.NUM_LINES)


@given(start=st.sampled_from([b"\x80", b"PK\x03", *corpus.PICKLE_STARTS]), behind=st.binary())
@example(start="\u0580".encode("utf-16-le"), behind=" begins a text that ends here.".encode("utf-16-le"))
@example(start="\u0480".encode("utf-16-le"), behind=" is an old letter.\n".encode("utf-16-le"))
@example(start=b"\x80\x04", behind=b"\x95 is a line.\n")
@example(start=b"\x80\x02", behind=b"I am a text: with a line end\nand a full stop.")
@example(start=b"\x80\x02", behind=b"X")
def test_text_with_strange_bytes_at_its_beginning_is_text(tmp_path_factory, start, behind):
    content = start + behind
    assume(not content.startswith(corpus.ZIP_START) and not is_pickle(content))
    path = tmp_path_factory.getbasetemp() / "strange.txt"
    path.write_bytes(content)
    assert list(documents([path], "text")) == [content]


@pytest.mark.parametrize("content", [b"\x80\x01N.", b"\x80\x06N.", b"\x80.", b"\x80 is the euro sign.\n"])
def test_only_protocols_two_to_five_make_a_pickle(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert list(documents([tmp_path / "a.txt"], "text")) == [content]


def is_pickle(content: bytes) -> bool:
    """By the library's own reading of the opcodes, which stops at the first that it cannot read."""
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except Exception:
        return False


def test_parquet_whose_columns_name_a_python_class_runs_nothing(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "t.parquet"
    keys = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Planted(marker), 4)}
    field = pa.field("text", pa.string(), metadata=keys)
    pq.write_table(pa.table({"text": ["good"]}, schema=pa.schema([field])), path)
    with warnings.catch_warnings(action="ignore"):
        try:
            assert list(documents([path], "text")) == [b"good"]
        except ValueError as error:
            assert str(path) in str(error)
    assert not marker.exists()
