"""Laws of ds/corpus.py: which documents a file or a part of it gives, and which are held out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import tracemalloc
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from conftest import Planted
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ds import corpus, files
from ds.corpus import Reading, Tally, documents, is_held_out, part_documents
from ds.files import Part, corpus_files

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
JSON_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)


PLAIN = Reading("text", None, False)
SKIPPING = PLAIN._replace(skip_faulty_rows=True)


def whole(path: Path) -> Part:
    return Part(str(path), 0, None)


def read(paths: list[Path], reading: Reading = PLAIN) -> list[bytes]:
    return list(documents(map(whole, paths), reading, Tally()))


def paths_of(*corpus: Path | str, exclude: tuple[str, ...] = ()) -> list[Path]:
    return [Path(file.path) for file in corpus_files(tuple(map(str, corpus)), exclude)]


def read_as(path: Path, content: bytes | str, **changes) -> list[bytes]:
    """The documents of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(part_documents(whole(path), PLAIN._replace(**changes), Tally()))


@contextmanager
def pieces_of(num_bytes: int, compressed: int = files.COMPRESSED_BYTES) -> Iterator[None]:
    """Files are read in so small pieces, so that every boundary is met."""
    before = files.PIECE_BYTES, files.COMPRESSED_BYTES
    files.PIECE_BYTES, files.COMPRESSED_BYTES = num_bytes, compressed
    try:
        yield
    finally:
        files.PIECE_BYTES, files.COMPRESSED_BYTES = before


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        result = call(*arguments)
        list(result)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_text(content: bytes) -> bool:
    """Whether the bytes are neither of another encoding nor binary nor rows, and not white space alone."""
    starts = [re.compile(start, re.DOTALL) for start in corpus.BINARY_STARTS.values()]
    marked = content.startswith((corpus.UTF8_MARK, *corpus.MARKS.values())) or any(start.match(content) for start in starts)
    marked = marked or content.startswith(b"PAR1")
    return not marked and b"\0" not in content and bool(content.strip()) and content.lstrip()[:1] not in (b"{", b"[")


@given(content=st.binary(min_size=1))
@example(content=b"\x80\x01N.")
@example(content=b"\x80 is the euro sign.\n")
def test_plain_file_is_one_document_byte_for_byte(tmp_path_factory, content):
    assume(is_text(content))
    path = tmp_path_factory.getbasetemp() / "plain.txt"
    path.write_bytes(content)
    assert read([path]) == [content]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_give_what_was_compressed(tmp_path, suffix):
    text = b"\xff text\n" * 1000
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](text))
    lines = b"".join(json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(3))
    padded = COMPRESS[suffix](lines[:10]) + bytes(16) + COMPRESS[suffix](lines[10:]) + bytes(4)
    (tmp_path / f"b.jsonl{suffix}").write_bytes(padded)
    assert read(paths_of(tmp_path)) == [text, b"line 0", b"line 1", b"line 2"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_truncated_or_broken_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    whole = COMPRESS[suffix](bytes(range(256)) * 8)
    for content in (whole[:-9], b"this was never compressed"):
        path.write_bytes(content)
        message = refusal(read, [path])
        assert str(path) in message and "corpus_exclude" in message


@given(texts=st.lists(JSON_TEXT, min_size=1), ascii_only=st.booleans())
@example(texts=["\ud800", "a\udfff"], ascii_only=True)
@example(texts=["\ud800", "a\udfff"], ascii_only=False)
def test_json_lines_give_the_strings_that_were_written(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.getbasetemp() / "lines.ndjson"
    lines = [json.dumps({"other": 1, "body": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes("\n\n  \n".join(lines).encode("utf-8", "surrogatepass"))
    written = [text.encode("utf-8", "surrogatepass").removeprefix(corpus.UTF8_MARK) for text in texts]
    assert read_as(path, path.read_bytes(), text_field="body") == [text for text in written if text and not text.isspace()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"body": "x", "id": 1}', "there is 'body', 'id'"),
        ("{}", "there is none"),
        ('{"text": 3}', "of type int, not a string"),
    ],
)
def test_bad_json_line_is_refused_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    message = refusal(read, [path])
    assert f"{path}, line 3" in message and reason in message


TEXT_KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()), pa.dictionary(pa.int8(), pa.binary()),
]  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_KINDS, ids=str)
def test_parquet_gives_its_rows_without_nulls_and_empty_ones(tmp_path, kind):
    texts, tally = ["a", None, "", "b", "ü"] * 200, Tally()
    values = pa.array(texts).cast(kind.value_type if isinstance(kind, pa.DictionaryType) else kind)
    column = values.dictionary_encode() if isinstance(kind, pa.DictionaryType) else values
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": range(1000), "text": column, "message": [{"content": "in"}] * 1000}), path)
    assert list(documents([whole(path)], PLAIN, tally)) == [text.encode() for text in texts if text]
    assert tally.counts == {"documents": 600, "empty": 400}
    assert read([path], PLAIN._replace(text_field="message.content")) == [b"in"] * 1000


def test_parquet_keeps_bytes_that_are_not_utf8(tmp_path):
    column = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    assert read([tmp_path / "t.parquet"]) == [b"\xff\xfe"]


def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"number {number}" for number in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"number 15", b"number 16"))
    assert f"{path}, row group 1" in refusal(read, [path])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "title"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "more than one column 'text'" in refusal(read, [tmp_path / "a.parquet"])
    assert read([tmp_path / "a.parquet"], PLAIN._replace(text_field="title")) == [b"c"]


def test_parquet_without_a_column_of_strings_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    assert "'n', 'body'" in refusal(read, [path])
    assert "int64, not a string" in refusal(read, [path], PLAIN._replace(text_field="n"))
    path.write_bytes(b"PAR1 not really")
    assert "cannot be read" in refusal(read, [path])


def test_file_that_vanished_is_refused(tmp_path):
    assert "cannot be read (" in refusal(read, [tmp_path / "gone.txt"])


def test_empty_documents_are_skipped_and_nothing_at_all_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert read([tmp_path / "a.txt", tmp_path / "b.txt"]) == [b"b"]
    assert "holds no text" in refusal(read, [tmp_path / "a.txt"])
    assert "holds no text" in refusal(read, [])


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
PLAIN_NAMES = ("x.pkl", "x.pt", "x.txt", "x.py", "x", "x.jsonl", "x.csv", "x.json")
OTHER_NAMES = ("x.ndjson", "x.parquet", *(f"{name}{suffix}" for name in ("x.pkl", "x.jsonl") for suffix in COMPRESS))


PLANTED = [(name, kind) for name in PLAIN_NAMES for kind in KINDS] + [(name, KINDS[0]) for name in OTHER_NAMES]


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_planted_pickle_is_refused_by_name_and_never_runs(tmp_path, name, kind):
    folder, marker = tmp_path / "text", tmp_path / "marker"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    planted = planted_by(kind, marker, tmp_path)
    contents = [planted] + [compress(planted) for suffix, compress in COMPRESS.items() if name.endswith(suffix)]
    for content in contents:
        (folder / name).write_bytes(content)
        message = refusal(read, paths_of(folder))
        assert str(folder / name) in message and "corpus_exclude" in message
    assert not marker.exists()
    assert read(paths_of(folder, exclude=(name,))) == [b"good"]


def test_planted_pickle_would_have_run(tmp_path):
    """Else the law above would be about nothing."""
    pickle.loads(planted_by("4", tmp_path / "marker", tmp_path))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_pickle_is_called_one(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps([1, "two"]))
    assert f"{path} is a pickle, not text" in refusal(read, [path])
    torch.save([1], path)
    assert f"{path} is a zip archive, not text" in refusal(read, [path])


@given(value=st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists), protocol=st.integers(2, 5))
def test_every_pickle_is_known(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "pickled"
    path.write_bytes(pickle.dumps(value, protocol))
    assert "is a pickle" in refusal(read, [path])


def test_parquet_whose_columns_name_a_python_class_runs_nothing(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "t.parquet"
    keys = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Planted(marker), 4)}
    field = pa.field("text", pa.string(), metadata=keys)
    pq.write_table(pa.table({"text": ["good"]}, schema=pa.schema([field])), path)
    with warnings.catch_warnings(action="ignore"):
        try:
            assert read([path]) == [b"good"]
        except ValueError as error:
            assert str(path) in str(error)
    assert not marker.exists()


def in_pieces(content: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(content) + 1) for cut in cuts})
    return [content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True)]


SEPARATORS = st.text("ab\n", min_size=1, max_size=4)


@given(content=st.text("ab\n", max_size=200), separator=SEPARATORS, size=st.integers(1, 7))
@example(content="a" * 10 + "abab" * 5, separator="abab", size=1)
def test_separator_cuts_as_split_does_wherever_the_file_is_read(tmp_path_factory, content, separator, size):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    with pieces_of(size, size + 9):
        found = read_as(path, content, document_separator=separator)
        assert found == read_as(path, gzip.compress(content.encode()), document_separator=separator)
    assert found == [part.strip("\r\n").encode() for part in content.split(separator) if part.strip()]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "<|end_of_text|>", "</s>"])
def test_a_known_separator_that_does_not_cut_is_told(tmp_path, separator):
    path, tally = tmp_path / "stories.txt", Tally()
    path.write_text(f"one\n{separator}\ntwo\n{separator}\n")
    assert len(list(part_documents(whole(path), PLAIN, tally))) == 1
    assert f"document_separator={separator!r}" in tally.first["separator"]
    assert read([path], PLAIN._replace(document_separator=separator)) == [b"one", b"two"]
    assert len(list(part_documents(whole(path), PLAIN._replace(document_separator="---"), tally := Tally()))) == 1
    assert f"document_separator={separator!r}" in tally.first["separator"]


NAMES = ("a.jsonl", "a.ndjson", "a.json", "array.json", "pretty.json", "a.csv", "a.tsv", "A.JSONL", "sep.txt")
FORMATS = ["a.parquet", *NAMES, *(f"{name}.gz" for name in NAMES), "a.csv.GZ", "a.jsonl renamed", "array.json renamed"]
FORMATS += [name + suffix for name in ("a.jsonl", "sep.txt") for suffix in (".bz2", ".xz", ".zst")]
WRITTEN = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff\r"), max_size=12).filter(
    lambda t: not t or bool(t.strip())
)


def written(name: str, texts: list[str]) -> bytes:
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if name.startswith("array"):
        return json.dumps(rows, indent=len(texts) % 3 or None).encode()
    if name.startswith("pretty"):
        return "\n".join(json.dumps(row, indent=1) for row in rows).encode()
    if name[1:5] in (".csv", ".tsv"):
        file = io.StringIO()
        table = csv.writer(file, delimiter="," if "csv" in name else "\t")
        table.writerows([("id", "text"), *enumerate(texts)])
        return file.getvalue().encode()
    if name.startswith("a.parquet"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink, row_group_size=2)
        return sink.getvalue()
    if name == "a.txt":
        return "\n".join(texts).encode()
    if name.startswith("sep"):
        return "<|sep|>".join(texts).encode()
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


@pytest.mark.parametrize("name", FORMATS)
@given(texts=st.lists(WRITTEN, max_size=5))
@example(texts=['two\nlines, "quoted"', "", "ü\t x"])
@settings(max_examples=5)
def test_texts_come_back_from_every_format_and_compression(tmp_path_factory, name, texts):
    content = written(name, texts)
    suffix = name[name.rindex(".") :].lower()
    if name.endswith(" renamed"):
        name, content = name.removesuffix(" renamed"), gzip.compress(content)
    path = tmp_path_factory.getbasetemp() / name
    found = read_as(path, COMPRESS[suffix](content) if suffix in COMPRESS else content, document_separator="<|sep|>")
    expected = [text.strip("\r\n") if name.startswith("sep") else text for text in texts]
    assert found == [text.encode() for text in expected if text]


def cut(path: Path, cuts: list[int]) -> list[Part]:
    places = sorted({place for place in cuts if 0 < place < path.stat().st_size})
    return [Part(str(path), start, stop) for start, stop in zip([0, *places], [*places, None], strict=True)]


def refuse_other_parts(path: Path, cuts: list[int], reading: Reading) -> None:
    """The law of parts: together, in order, they give and count what the file does."""
    by_part, by_file = Tally(), Tally()
    found = [list(part_documents(part, reading, by_part)) for part in cut(path, cuts)]
    assert list(chain(*found)) == list(part_documents(whole(path), reading, by_file))
    assert (by_part.counts, by_part.first) == (by_file.counts, by_file.first)


CUTS = st.lists(st.integers(1, 200), max_size=8)


@pytest.mark.parametrize("name", ["a.parquet", *NAMES, "a.txt", "a.jsonl.gz", "a.jsonl renamed", "sep.txt.zst", "a.json.gz"])
@given(texts=st.lists(WRITTEN, max_size=6), cuts=CUTS, size=st.integers(1, 40))
@example(texts=["one", "two\nlines", "", "\n", "ü\t x", "six"], cuts=list(range(1, 250)), size=7)
@settings(max_examples=5)
def test_the_parts_of_a_file_give_its_documents_wherever_it_is_cut(tmp_path_factory, name, texts, cuts, size):
    path, content = tmp_path_factory.getbasetemp() / name.removesuffix(" renamed"), written(name, texts)
    packed = name.endswith(("renamed", ".gz"))
    path.write_bytes(gzip.compress(content) if packed else COMPRESS[".zst"](content) if name.endswith("zst") else content)
    with pieces_of(size):
        refuse_other_parts(path, cuts, PLAIN._replace(document_separator=None if name == "a.txt" else "<|sep|>"))


LINES = st.lists(
    st.sampled_from(
        [
            b'{"text": "a"}', b"", b" \r", b"{", b'{"x": 1}', b'{"text": "\xff"}', b'{"text": ""}', b'{"text": null}\r',
            b'\xef\xbb\xbf{"text": "b"}', b"\xef\xbb\xbf", b'{"text": "long long long"}',
        ]
    )
)  # fmt: skip


@given(lines=LINES, cuts=CUTS, size=st.integers(1, 20))
@example(lines=[b'{"text": "a"}', b"{", b"", b"{", b'{"text": "b"}', b""], cuts=list(range(1, 40)), size=3)
def test_parts_skip_and_count_each_faulty_line_once(tmp_path_factory, lines, cuts, size):
    path = tmp_path_factory.getbasetemp() / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pieces_of(size):
        refuse_other_parts(path, cuts, SKIPPING)


@given(content=st.text("ab\n", max_size=60), separator=SEPARATORS, size=st.integers(1, 7), cuts=CUTS)
@example(content="aab\naab\n\nb\n", separator="b\n", size=1, cuts=list(range(1, 12)))
@example(content="aaaaaaaaaa", separator="aa", size=3, cuts=list(range(1, 12)))
def test_the_parts_of_a_plain_file_are_cut_at_its_separators_alone(tmp_path_factory, content, separator, size, cuts):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_text(content)
    with pieces_of(size):
        refuse_other_parts(path, cuts, PLAIN._replace(document_separator=separator))


@pytest.mark.parametrize("name", ["a.jsonl", "sep.txt", "a.parquet"])
def test_files_that_can_be_cut_give_every_part_its_share(tmp_path, name):
    texts = [str(number) * 40 for number in range(100)]
    (tmp_path / name).write_bytes(written(name, texts))
    size = (tmp_path / name).stat().st_size
    parts = cut(tmp_path / name, [size // 4, size // 2])
    shares = [len(list(part_documents(part, PLAIN._replace(document_separator="<|sep|>"), Tally()))) for part in parts]
    assert max(shares) < 80 and sum(shares) == 100


@given(num_before=st.integers(0, 30), start=st.integers(1, 100), size=st.integers(1, 9))
def test_a_faulty_line_in_a_later_part_is_named_by_its_number_in_the_file(tmp_path_factory, num_before, start, size):
    path = tmp_path_factory.getbasetemp() / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * num_before + b"\n{\n")
    fault = len(path.read_bytes()) - 2
    part, earlier = Part(str(path), min(start, fault), None), Part(str(path), 0, fault)
    with pieces_of(size):
        assert f"{path}, line {num_before + 2}: not JSON" in refusal(part_documents, part, PLAIN, Tally())
        assert list(part_documents(earlier, PLAIN, Tally())) == [b"a"] * num_before


def test_a_later_part_of_what_is_no_text_is_refused_or_skipped_as_the_first_is(tmp_path):
    for name, content in (("a.txt", bytes(99)), ("b.parquet", b"not Parquet" * 9), ("c.jsonl.gz", b"not gzip" * 9)):
        (tmp_path / name).write_bytes(content)
    assert "binary" in refusal(part_documents, Part(f"{tmp_path}/a.txt", 9, None), PLAIN, Tally())
    for name in ("b.parquet", "c.jsonl.gz"):
        refuse_other_parts(tmp_path / name, [9, 20], SKIPPING)


@pytest.mark.parametrize("separator", [None, "<|sep|>"])
def test_a_document_is_read_in_the_memory_of_its_own_size(tmp_path, separator):
    path, size = tmp_path / "a.txt", 2**24
    path.write_bytes("ü".encode() * (size // 2))
    tracemalloc.start()
    assert len(next(iter(part_documents(whole(path), PLAIN._replace(document_separator=separator), Tally())))) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.15 * size + 6 * 2**20


@given(
    texts=st.lists(JSON_TEXT | st.none(), max_size=8),
    size=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_json_array_gives_what_json_lines_give_wherever_it_is_read(tmp_path_factory, texts, size, ascii_only, indent):
    rows = [{"n": [1, {"text": 2}], "text": text, "x": "]}"} for text in texts]
    folder = tmp_path_factory.getbasetemp()
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode("utf-8", "surrogatepass")
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    from_lines = read_as(folder / "a.jsonl", lines)
    with pieces_of(size):
        assert read_as(folder / "a.json", array) == from_lines
    with pieces_of(size, size + 9):
        stored = gzip.compress(array)
        assert read_as(folder / "a.json", stored) == from_lines


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.log", "a.txt.gz", "a.py"])
@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n', '{"a": 1}\n{"a": 2}\n', '[{"a": 1}]', '\n [\n {"a": 1},\n {"a": 2}]', "id,text\n1,hello\n",
        "text\tid\nhello\t1\n", '"id","text"\r\n1,"hello"\r\n', ",text\n0,hello\n", "id, text\n1, hello\n", "id;text\n1;a\n",
        '{"id": ' + "1" * 5000 + ', "text": "a"}\n', '{"text": "' + "long " * 300_000 + '"}\n',
        '{\n"text": "a"\n}\n{\n"text": "b"\n}',
    ],
)  # fmt: skip
def test_rows_under_another_name_are_never_text(tmp_path, name, content):
    stored = gzip.compress(content.encode()) if name.endswith(".gz") else content
    message = refusal(read_as, tmp_path / name, stored)
    assert "looks like rows" in message and "end its name in ." in message and "corpus_exclude" in message


SOURCES = {
    "package.json": '{\n "name": "x",\n "contributors": [{"name": "y"}]\n}\n',
    "tsconfig.json": '{\n // a comment\n "a": [1,],\n}\n',
    "lock.json": '{\n "packages": {\n' + ' "a": {"version": "1"},\n' * 60_000 + ' "b": 1\n}\n}\n',
    "a.md": "[{link}](x) text, id\n",
    "a.py": '{"a": 1}\nimport os,text\n',
    "a.js": '[{"a": b}].map(c)\n',
    "a.tmpl": '{{ "text": "x" }}\n{{ y }}\n',
    "a.nix": "{ a, b }: a\n",
    ".babelrc": '{"presets": []}\n',
    "a.c": "text, id\n",
    "b.py": "import re, text\nimport os, sys\n",
    "a.html": "<p>text</p>\n",
    "a.ipynb": '{\n "cells": [{"text": "x"}]\n}\n',
    "a.map": '{"version":3,"mappings":"' + "A" * 2_000_000 + '"}',
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_of_source_code_is_text(tmp_path, name):
    path, tally = tmp_path / name, Tally()
    path.write_text(SOURCES[name])
    assert list(part_documents(whole(path), PLAIN, tally)) == [SOURCES[name].encode()]
    assert tally.counts.get("json", 0) == name.endswith(".json")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '["a", "b"]', "a JSON str, not an object"),
        ("a.json", '{"title": "a"}', "no field 'text', there is 'title'"),
        ("a.json", '[{"text": "a"}, {"text": "b"}', "cut off after byte 29"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "not JSON at byte 14"),
        ("a.json", '[{"text": "a"}] x', "not JSON at byte 16"),
        ("a.json", '[{"text": "a"},]', "byte 14"),
        ("a.json", '{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.csv", "a,b\n1,2\n", "no column 'text', there is 'a', 'b'"),
        ("a.csv", "id,text\n1,x\n2\n", "line 3: not CSV (1 columns, the first line names 2)"),
        ("a.csv", 'id,text\n1,"x\n', "line 3: not CSV"),
        ("a.csv", "id,text\r1,x\r", "line 1: not CSV"),
        ("a.csv", '"text"x,id\na,1\n', "line 1: not CSV"),
        ("a.csv", "text,id,text\na,1,b\n", "more than one column 'text', there is 'text', 'id', 'text'"),
        ("a.json", '[{"text": "a"}, {"text": "b", "id": ' + "1" * 5000 + "}]", "row 2: not JSON"),
        ("a.jsonl", '{"text": ["a"]}', "write each row's list into one string"),
    ],
)
def test_rows_that_are_none_are_refused_with_their_place(tmp_path, name, content, reason):
    message = refusal(read_as, tmp_path / name, content)
    assert str(tmp_path / name) in message and reason in message
    if reason == "not JSON at byte 16":
        with pieces_of(3):
            late = content.replace("}", "}" + " " * files.COMPRESSED_BYTES, 1)
            assert f"byte {int(reason.split()[-1]) + files.COMPRESSED_BYTES}" in refusal(read_as, tmp_path / name, late)


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("a.csv", 'id,"a;b;c;d",text', '1,2,"x, y"'), ("a.tsv", '"a,b,c"\ttext', "1\tx, y"), ("a.csv", "id;text", "1;x, y"),
        ("a.csv", '"a\nb",text', '1,"x, y"'),
    ],
)  # fmt: skip
def test_the_delimiter_of_a_table_is_the_one_that_gives_the_column(tmp_path, name, head, row):
    assert read_as(tmp_path / name, f"{head}\n{row}\n") == [b"x, y"]


def test_the_lost_head_of_a_table_is_counted_where_faults_are_skipped(tmp_path):
    assert read_as(tmp_path / "a.csv", "id,text\r1,x\r", skip_faulty_rows=True) == []


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_nothing_is_no_fault_in_any_format(tmp_path, name, suffix):
    store = COMPRESS.get(suffix, bytes)
    contents = {"a.json": [b"[]", b" [ ] ", b"\n \n"], "a.parquet": []}.get(name, [b"\n \n"])
    for stored in (b"", store(b""), *map(store, contents)):
        assert read_as(tmp_path / f"{name}{suffix}", stored) == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz"])
def test_other_encodings_are_refused_by_name_with_the_command_that_converts(tmp_path, encoding, mark, name):
    content = (mark + '{"text": "一 hello\u4e00 wörld"}\n').encode(encoding)
    message = refusal(read_as, tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    spelled = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"is {spelled} text" in message and f"iconv -f {spelled} -t UTF-8" in message


MARKED = {
    "a.txt": "hi", "a.jsonl": '{"text": "\ufeffhi"}\n', "a.json": '[{"text": "hi"}]', "a.csv": "text\nhi\n",
    "a.tsv": "text\tid\nhi\t1\n",
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_byte_order_mark_is_taken_off_in_every_format(tmp_path, name):
    assert read_as(tmp_path / name, "\ufeff" + MARKED[name]) == [b"hi"]
    assert read_as(tmp_path / "sep.txt", "\ufeffa|\ufeffb", document_separator="|") == [b"a", b"b"]


def test_invalid_bytes_are_kept_and_counted_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\\ud800"}\n{"text": "fine"}\n')
    (tmp_path / "c.csv").write_bytes(b"text\n\xff\n")
    pq.write_table(pa.table({"text": pa.array([b"\xff\xfa", b"fine"])}), tmp_path / "d.parquet")
    tally = Tally()
    found = list(documents(map(whole, paths_of(tmp_path)), PLAIN, tally))
    assert found == [b"a\xff", b"\xff\xed\xa0\x80", b"fine", b"\xff", b"\xff\xfa", b"fine"]
    assert tally.counts == {"documents": 6, "invalid": 4}


BINARIES = {
    "a.png": b"\x89PNG\r\n\x1a\n", "a.jpg": b"\xff\xd8\xff\xe0", "a.gif": b"GIF89a", "a.pdf": b"%PDF-1.7\n",
    "a.o": b"\x7fELF\2", "a.a": b"!<arch>\n", "a.zip": b"PK\3\4", "a.sqlite": b"SQLite format 3\0", "a.mp3": b"ID3\4",
    "a.npy": b"\x93NUMPY\1\0", "a.doc": b"\xd0\xcf\x11\xe0\0", "a.tar": b"a" * 257 + b"ustar", "a.lz4": b"\x04\x22M\x18",
    "a.safetensors": b"\x10\0\0\0\0\0\0\0{}", "a.bin": bytes(range(256)), "a.pyc": b"\xa7\r\r\n\0\0\0\0",
    "a.idx": b"MMIDIDX\0\0", "a.tokens": b"\x88\xd8\x34\x01\1\0\0\0",
}  # fmt: skip


@pytest.mark.parametrize("name", BINARIES)
def test_binary_files_are_refused_by_name_whatever_they_are_called(tmp_path, name):
    for path in (tmp_path / name, tmp_path / "named.txt", tmp_path / "named.jsonl"):
        assert str(path) in (message := refusal(read_as, path, BINARIES[name])) and "corpus_exclude" in message
    assert "compressed" in refusal(read_as, tmp_path / "a.txt.gz", gzip.compress(gzip.compress(b"x")))


@pytest.mark.parametrize("text", ["Hello world\n", "Привет\n"])
def test_a_stray_nul_is_no_other_encoding_and_no_text_wherever_it_stands(tmp_path, text):
    late = text * (2 * files.PIECE_BYTES // len(text)) + "a\0" + text
    for reading, content in ((PLAIN, text * 20 + "a\0" + text), (PLAIN, late), (PLAIN._replace(document_separator="\n"), late)):
        (tmp_path / "a.txt").write_text(content)
        message = refusal(read, [tmp_path / "a.txt"], reading)
        assert "NUL bytes" in message and "UTF-" not in message


def test_text_field_is_a_path_and_the_very_name_comes_first(tmp_path):
    row = {"message": {"content": "in", "empty": None, "parts": ["a"]}, "message.role": "dotted", "none": None}
    path, content = tmp_path / "a.jsonl", json.dumps(row)
    assert read_as(path, content, text_field="message.content") == [b"in"]
    assert read_as(path, content, text_field="message.role") == [b"dotted"]
    assert read_as(path, content, text_field="none.at.all") == read_as(path, content, text_field="message.empty") == []
    with pytest.raises(ValueError, match="no field 'x', there is 'content', 'empty', 'parts'"):
        read_as(path, content, text_field="message.x")
    table = {
        "message": [{"content": "in"}, None, {"content": None}],
        "message.content": ["dotted"] * 3,
        "a": [{"b": {"c": "deep"}}] * 3,
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read([tmp_path / "a.parquet"], PLAIN._replace(text_field="message.content")) == [b"dotted"] * 3
    assert read([tmp_path / "a.parquet"], PLAIN._replace(text_field="a.b.c")) == [b"deep"] * 3
    assert "there is 'b'" in refusal(read, [tmp_path / "a.parquet"], PLAIN._replace(text_field="a.c"))


@pytest.mark.parametrize("text_field", ["messages", "messages.content"])
def test_a_list_of_messages_is_refused_with_what_fits(tmp_path, text_field):
    messages = [{"role": "user", "content": "hi"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    for name in ("a.parquet", "a.jsonl"):
        assert "by a chat template" in refusal(read, [tmp_path / name], PLAIN._replace(text_field=text_field))


def test_faulty_rows_are_skipped_and_counted_only_where_that_is_set(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n[]\n{"x": 1}\n{"text": 3}\n{"text": "b"}\n')
    (tmp_path / "b.csv").write_text('id,text\n1\n2,c\n3,"d"e\n4,f\n')
    (tmp_path / "c.json").write_text('[{"text": "g"}, 1, {"text": "h"}, {"te')
    tally = Tally()
    assert list(documents(map(whole, paths_of(tmp_path)), SKIPPING, tally)) == [b"a", b"b", b"c", b"f", b"g", b"h"]
    assert tally.counts == {"documents": 6, "faulty": 8} and f"{tmp_path}/a.jsonl, line 2" in tally.first["faulty"]
    assert "a.jsonl, line 2" in refusal(read, paths_of(tmp_path))


def test_a_corrupt_row_group_is_skipped_by_its_number_and_the_others_stay(tmp_path):
    path, tally = tmp_path / "a.parquet", Tally()
    texts = ["".join(sha256(b"%d %d" % (number, part)).hexdigest() for part in range(20)) for number in range(30)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 3000 : end - 2000] = bytes(1000)
    path.write_bytes(content)
    assert f"{path}, row group 1" in refusal(read, [path])
    assert list(documents([whole(path)], SKIPPING, tally)) == [text.encode() for text in texts[:10] + texts[20:]]
    assert tally.counts["faulty"] == 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_stands_before_the_lost_end_of_a_compressed_file_is_kept_where_faults_are_skipped(tmp_path, suffix):
    lines = [json.dumps({"text": sha256(b"%d" % number).hexdigest() * 20}) for number in range(900)]
    path, tally = tmp_path / f"a.jsonl{suffix}", Tally()
    stored = COMPRESS[suffix]("\n".join(lines[:600]).encode() + b"\n") + COMPRESS[suffix]("\n".join(lines[600:]).encode())
    path.write_bytes(stored[: len(stored) * 8 // 9])
    kept = list(part_documents(whole(path), SKIPPING, tally))
    assert 600 <= len(kept) < 900 and kept == [json.loads(line)["text"].encode() for line in lines[: len(kept)]]
    assert 1 <= tally.counts["faulty"] <= 2 and "beyond byte" in tally.first["faulty"]
    assert "beyond byte" in refusal(read, [path])
    assert "cannot be read" in refusal(part_documents, whole(tmp_path / "gone.txt"), SKIPPING, Tally())


def test_where_all_rows_are_faulty_the_first_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n' * 3)
    message = refusal(read, [tmp_path / "a.jsonl"], SKIPPING)
    assert "holds no text" in message and "no field 'text', there is 'body'" in message


def test_reading_may_end_early_and_state_travels_to_other_processes(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 200_000))
    with closing(cast(Generator, part_documents(whole(tmp_path / "a.jsonl.gz"), PLAIN, Tally()))) as found:
        assert next(found) == b"a"
    tally = Tally({"empty": 1}, {"empty": "x"})
    assert pickle.loads(pickle.dumps((PLAIN, tally))) == (PLAIN, tally)
