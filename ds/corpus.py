"""Files and folders -> documents as bytes. Owns which files are read, how they are cut, which documents are held out.

Knows nothing of tokens. A document keeps its bytes, valid UTF-8 or not, but for a byte-order mark, which is taken off. At one
time there are in memory: one document (of JSON its row, a few times; of Parquet a batch of rows) and a few pieces of a file.
"""

import bz2
import csv
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import has_magic
from hashlib import sha256
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

# By ending: how such a file begins, and what decompresses one stream of it.
COMPRESSIONS = {
    ".gz": (re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(31)),
    ".bz2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    ".xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMADecompressor),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2aM\x18"), lambda: zstandard.ZstdDecompressor().decompressobj()),
}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pa.ArrowException)
# How much is read at once, and how much of a file shows what it is.
PARQUET_BATCH_ROWS, PIECE_BYTES, COMPRESSED_BYTES, HEAD_BYTES = 64, 2**20, 2**14, 2**18
# How files begin that hold no text.
BINARY_STARTS = {
    "a pickle": rb"\x80[\2-\5]", "a zip archive": rb"PK(\x03\x04|\x05\x06)", "a PDF": rb"%PDF-", "a PNG image": rb"\x89PNG",
    "a JPEG image": rb"\xff\xd8\xff", "a GIF image": rb"GIF8[79]a", "an ELF object": rb"\x7fELF", "an archive": rb".{257}ustar",
    "an archive of objects": rb"!<arch>\n", "sound": rb"ID3[\2-\4]|fLaC|OggS|RIFF.{4}WAVE", "an Arrow file": rb"ARROW1\0",
    "compressed twice, or unknown": b"|".join([rb"\x04\x22M\x18|PAR1.*PAR1$", *(c[0].pattern for c in COMPRESSIONS.values())]),
}  # fmt: skip
UTF8_MARK = b"\xef\xbb\xbf"
# By iconv's names; the mark of UTF-32LE begins with that of UTF-16LE.
MARKS = {"UTF-32LE": b"\xff\xfe\0\0", "UTF-32BE": b"\0\0\xfe\xff", "UTF-16LE": b"\xff\xfe", "UTF-16BE": b"\xfe\xff"}
# What other tools write between documents, and the document_separator that cuts there.
SEPARATORS = {mark.encode(): mark for mark in ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")}
SEPARATORS |= {b"\n</s>\n": "</s>", b"\n</s>\r\n": "</s>"}
# Nearer than this to the end of what is read, an error may be a word that is cut off.
LONGEST_JSON_WORD = 16
BLANK, ARRAY_START, ARRAY_NEXT = (re.compile(gap) for gap in (r"\s*()", r"\s*\[\s*(\]?)\s*", r"\s*(?:,|(\]))\s*"))
NAME, INVALID_BYTES = re.compile(r"[\w.-]+"), re.compile("([\udc80-\udcff]+)")
EXCLUDE = "leave it out by corpus_exclude"
SKIP = "mend it, or set skip_faulty_rows=True"
ONE_STRING = "write each row's list into one string, such as by a chat template, and set text_field to that"
TEXT_TYPE = re.compile(r"(large_)?(string|binary)(_view)?|fixed_size_binary.*|null")


class Reading(NamedTuple):
    """How files become documents: the fields of the configuration of these names."""

    text_field: str
    document_separator: str | None
    skip_faulty_rows: bool


@dataclass
class Tally:
    """What was met: how often each kind, and where first. Kinds: "documents"; "empty", "faulty", which are skipped; "invalid",
    which are not UTF-8; "separator", plain files with one of `SEPARATORS`; "json", .json files that are no rows.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str, where: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, where)

    def fault(self, error: ValueError, reading: Reading) -> None:
        if not reading.skip_faulty_rows:
            raise error
        self.count("faulty", str(error))


def corpus_files(corpus: tuple[str, ...], exclude: tuple[str, ...]) -> list[Path]:
    """The files of all entries, sorted, each real file once. An entry is a file, a folder or a glob, of which `**` crosses
    folders: `data`, `data/**` and `data/**/*` are the same. A name with `[`, `*` or `?` that is there is that file or folder.

    Below a folder, or below the fixed part of a glob, links are followed, hidden names are left out, and so is every path that
    has a part that matches a pattern of `exclude` (as in fnmatch). A file that an entry names itself is never left out. Of
    several names of a file the first without a link counts, or the first. Raises ValueError if an entry is not there, a folder
    cannot be read, or no file of an entry is left.
    """
    found = sorted((file for entry in corpus for file in _entry_files(entry, exclude)), key=lambda file: file[0])
    return sorted({path.resolve(): path for _, path in reversed(found)}.values())


def corpus_digest(files: Iterable[Path]) -> str:
    """sha256 (hex) of the names, as given, and of the sizes in bytes. The contents are not read."""
    digest = sha256()
    for path in files:
        digest.update(json.dumps([path.as_posix(), path.stat().st_size]).encode())
    return digest.hexdigest()


def documents(files: Iterable[Path], reading: Reading, tally: Tally) -> Iterator[bytes]:
    """Every document, file by file. Raises ValueError as `file_documents` does, or if there is none."""
    before = tally.counts.get("documents", 0)
    for path in files:
        yield from file_documents(path, reading, tally)
    if tally.counts.get("documents", 0) == before:
        why = f"the first of its faulty rows is {tally.first['faulty']}" if "faulty" in tally.first else "every file is empty"
        raise ValueError(f"corpus holds no text: {why}; add files with text to corpus")


def file_documents(path: Path, reading: Reading, tally: Tally) -> Iterator[bytes]:
    """The documents of one file that are not null, empty or white space alone; `tally` counts those and what else was met.

    - Rows: Parquet; .csv and .tsv, whose first row names the columns; .jsonl, .ndjson and .json as lines, as values one after
      the other or as one array. `text_field` names the text, or is a path to it ("message.content").
    - All else is plain: one document, or those between `document_separator`, without the line ends around them. So is a .json
      file that is no row as source code has them for its settings: one object over several lines, or with comments, without
      `text_field`; it is counted ("json"). Refused, whatever their name, are plain files that begin with two JSON objects,
      with one that has `text_field`, with an array of objects, or with a line of names of columns, `text_field` among them.
    - Gzip, bzip2, xz, Zstandard and Parquet are known by their content. Bytes that are not UTF-8 are kept.

    Raises ValueError, with file and line, row group or byte, if the file cannot be read, is not what its name says, is binary
    or in another encoding, or a row is not text. With `skip_faulty_rows`, rows, row groups and the lost end of a compressed
    file are counted and skipped instead.
    """
    try:
        for document in _reader(path, reading, tally):
            document = document.removeprefix(UTF8_MARK)
            if not document or document.isspace():
                tally.count("empty", str(path))
                continue
            try:
                document.decode()
            except UnicodeDecodeError:
                tally.count("invalid", str(path))
            tally.count("documents", str(path))
            yield document
            del document
    except READ_ERRORS as error:
        is_there = reading.skip_faulty_rows and getattr(error, "errno", None) is None
        words = f"{path} cannot be read ({one_line(error)}); repair it, or {EXCLUDE}"
        tally.fault(ValueError(words), reading._replace(skip_faulty_rows=is_there))


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether the document is for validation. Only its own bytes decide, so it stays in its split when the corpus grows."""
    return int.from_bytes(sha256(document).digest()[:8], "big") / 2**64 < fraction


def fixed_part(pattern: Path) -> Path:
    """The folders before a glob's first wildcard; a folder whose own name looks like one is no wildcard."""
    fixed = Path()
    for part in pattern.parts:
        if has_magic(part) and not (fixed / part).exists():
            break
        fixed /= part
    return fixed


def one_line(error: BaseException) -> str:
    """The words of an error in one line, for a refusal; its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _entry_files(entry: str, exclude: tuple[str, ...]) -> list:
    path = Path(entry)
    if path.is_file():
        return [(path.is_symlink(), path)]
    if not path.is_dir() and not has_magic(entry):
        raise ValueError(f"corpus: {entry!r} is not there; name a file, folder or glob that exists")
    root = fixed_part(path)
    parts = path.parts[len(root.parts) :] or ("**",)
    pattern = (*parts, "*") if parts[-1] == "**" else parts
    kept = _matching(root, pattern, exclude)
    if not kept:
        num_files = len(_matching(root, pattern, ()))
        excluded = f"corpus_exclude leaves out all {num_files}" if num_files else "nothing is there"
        raise ValueError(f"corpus: {entry!r} matches no file ({excluded}); name a file, folder or glob that holds text")
    return kept


def _matching(root: Path, pattern: tuple[str, ...], exclude: tuple[str, ...]) -> list:
    """Whether a link led there, and the path, of each file; a folder is entered once, by its own path before any link to it."""
    found, seen, waiting = [], set(), [(False, root, pattern)]
    while waiting:
        is_linked, folder, (part, *rest) = heappop(waiting)
        place = (folder.resolve(), len(rest))
        if place in seen:
            continue
        seen.add(place)
        if part == "**":
            heappush(waiting, (is_linked, folder, tuple(rest)))
        try:
            names = os.listdir(folder) if has_magic(part) and folder.is_dir() else [part]
        except OSError as error:
            raise ValueError(f"corpus: {folder} cannot be read ({error.strerror}); {EXCLUDE}") from error
        for name in (name for name in names if not any(fnmatchcase(name, pattern) for pattern in exclude)):
            path, below = folder / name, (part, *rest) if part == "**" else tuple(rest)
            is_match = name == part or (fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")))
            if is_match and below and path.is_dir():
                heappush(waiting, (is_linked or path.is_symlink(), path, below))
            elif is_match and not below and path.is_file():
                found.append((is_linked or path.is_symlink(), path))
    return sorted(found)


def _reader(path: Path, reading: Reading, tally: Tally) -> Iterator[bytes]:
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(-min(4, path.stat().st_size), io.SEEK_END)
        is_parquet = start == file.read(4) == b"PAR1"
    if is_parquet or (path.suffix.lower() == ".parquet" and start):
        return _parquet(path, reading, tally)
    ending = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()
    pieces = _pieces(path, reading, tally)
    head = next(pieces, b"").removeprefix(UTF8_MARK)
    _refuse_binary(str(path), head)
    pieces = chain([head], pieces)
    if ending in (".csv", ".tsv"):
        return _table(path, pieces, reading, tally)
    is_json = ending in (".jsonl", ".ndjson", ".json")
    rows = _row_format(head, reading.text_field, is_json)
    if rows is not None and not is_json:
        raise ValueError(f"{path} looks like rows ({rows}), not like text; end its name in {rows}, or {EXCLUDE}")
    if rows == ".json":
        return _json_rows(path, _json_values(pieces), reading, tally)
    if ending in (".jsonl", ".ndjson") or rows is not None:
        return _json_rows(path, _split(pieces, b"\n"), reading, tally)
    if is_json and head.strip():
        tally.count("json", str(path))
    return _plain(path, pieces, reading, tally)


def _pieces(path: Path, reading: Reading, tally: Tally) -> Iterator[bytes]:
    """What a file holds, decompressed: the head in the first piece, and all that can be read before what ends it too early."""
    with path.open("rb") as file:
        data, suffix = file.read(COMPRESSED_BYTES), path.suffix.lower()
        make = next((make for begins, make in COMPRESSIONS.values() if begins.match(data)), None)
        if make is None:
            if data and suffix in COMPRESSIONS:
                raise OSError(f"not {suffix[1:]} inside")
            yield data + file.read(PIECE_BYTES)
            yield from iter(lambda: file.read(PIECE_BYTES), b"")
            return
        decompressor, held = make(), io.BytesIO()
        try:
            while data:
                decompressor = make() if decompressor.eof else decompressor
                held.write(decompressor.decompress(data))
                data = (decompressor.unused_data.lstrip(b"\0") if decompressor.eof else b"") or file.read(COMPRESSED_BYTES)
                if held.tell() >= PIECE_BYTES:
                    yield held.getvalue()
                    held = io.BytesIO()
            if not decompressor.eof:
                raise EOFError("it ends too early")
        except READ_ERRORS as error:
            place = f"{path} cannot be read beyond byte {file.tell()}"
            tally.fault(ValueError(f"{place} ({one_line(error)}); {SKIP}, or {EXCLUDE}"), reading)
        yield held.getvalue()


def _refuse_binary(place: str, head: bytes) -> None:
    kind = next((kind for kind, begins in BINARY_STARTS.items() if re.match(begins, head, re.DOTALL)), None)
    encoding = next((name for name, mark in MARKS.items() if head.startswith(mark)), None)
    if kind is None and encoding is None and b"\0" in head[:HEAD_BYTES]:
        kind, most = "binary, with NUL bytes", 0
        for name, width in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
            text = head[: min(len(head), HEAD_BYTES) // width * width].decode(name, "replace")
            num_plain = 0 if "\0" in text or "\ufffd" in text[:-1] else sum(map(str.isascii, text))
            encoding, most = (name, num_plain) if num_plain > most else (encoding, most)
    if encoding is not None:
        convert = f"iconv -f {encoding} -t UTF-8 FILE > NEW"
        raise ValueError(f"{place} is {encoding} text, not UTF-8; convert it by `{convert}`, or {EXCLUDE}")
    if kind is not None:
        raise ValueError(f"{place} is {kind}, not text, and nothing in it is run; {EXCLUDE} or move it away")


def _row_format(head: bytes, text_field: str, is_json: bool) -> str | None:
    """The ending of the files of rows that begin like this; None if it is none. `is_json`: the name says that it is JSON."""
    text, word = head.decode("latin-1"), rf'"{re.escape(text_field.split(".")[-1])}"\s*:\s*"'
    begin, array = len(text) - len(text.lstrip()), ARRAY_START.match(text)
    if array is not None:
        return ".json" if is_json or _begins_object(text, array.end()) else None
    if not text.startswith("{", begin):
        first = head.partition(b"\n")[0].decode("utf-8", "replace").strip()
        rows = {ending: first.split(mark) for ending, mark in ((".csv", ","), (".tsv", "\t")) if not is_json}
        looks = (ending for ending, row in rows.items() if row[1:] and text_field in row and all(map(NAME.fullmatch, row)))
        return next(looks, None)
    if not _begins_object(text, begin):
        return ".jsonl" if is_json and re.search(word, text) else None
    end = _value_end(text, begin)
    is_line = "\n" not in text[begin:end] and not text[end:].partition("\n")[0].strip()
    if end > len(text):
        is_rows = re.search(word, text) is not None if is_json != is_line else is_json
    else:
        value = json.loads(head[begin:end].decode("utf-8", "replace"))
        has_field = text_field in value or text_field.partition(".")[0] in value
        is_rows = has_field or (is_json and is_line) or _begins_object(text, len(text) - len(text[end:].lstrip()))
    return (".jsonl" if is_line else ".json") if is_rows else None


def _begins_object(text: str, at: int) -> bool:
    end = _value_end(text, at) if text.startswith("{", at) else 0
    return 0 < end <= len(text) or end > len(text) >= HEAD_BYTES


def _value_end(text: str, at: int) -> int:
    """Where the JSON value at `at` ends; beyond the text where it is cut off; 0 where it is no JSON."""
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_JSON_WORD
        return len(text) + 1 if is_cut else 0
    except RecursionError:
        return 0


def _split(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """What bytes.split gives for all pieces together."""
    document, held = io.BytesIO(), b""
    for piece in pieces:
        first, *others = (held + piece).split(separator)
        if others:
            document.write(first)
            yield document.getvalue()
            document = io.BytesIO()
            *whole, first = others
            yield from whole
        kept = max(0, len(first) - len(separator) + 1)
        document.write(first[:kept])
        held = first[kept:]
    document.write(held)
    yield document.getvalue()


def _plain(path: Path, pieces: Iterator[bytes], reading: Reading, tally: Tally) -> Iterator[bytes]:
    if reading.document_separator is not None:
        yield from (document.strip(b"\r\n") for document in _split(pieces, reading.document_separator.encode()))
        return
    document = io.BytesIO()
    document.writelines(pieces)
    separator = next((name for written, name in SEPARATORS.items() if written in document.getvalue()), None)
    if separator is not None:
        tally.count("separator", f"{path} holds {separator!r}; document_separator={separator!r} cuts there")
    yield document.getvalue()


def _json_rows(path: Path, rows: Iterator[bytes], reading: Reading, tally: Tally) -> Iterator[bytes]:
    for number, row in enumerate(rows, 1):
        try:
            document = _json_text(row, reading.text_field, f"{path}, line {number}") if row.strip() else None
        except ValueError as error:
            tally.fault(error, reading)
            continue
        if document is not None:
            yield document


def _json_values(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The elements of an array, or values one after the other. Raises OSError, with the byte, at what is no JSON."""
    held, at, num_gone = next(pieces, b"").decode("latin-1"), 0, 0
    gap, later = (ARRAY_START, ARRAY_NEXT) if ARRAY_START.match(held) else (BLANK, BLANK)
    while True:
        found, end = gap.match(held, at), len(held) + 1
        behind, is_last = (found.end(), bool(found[1])) if found else (at, False)
        if found and not is_last and behind < len(held):
            end = _value_end(held, behind)
        if not end or (is_last and behind < len(held)) or (not found and held[at : at + LONGEST_JSON_WORD].strip()):
            raise OSError(f"not JSON at byte {num_gone + behind}")
        if end <= len(held):
            yield held[behind:end].encode("latin-1")
            at, gap = end, later
            continue
        # As much again as there is, so that a long value is not parsed at each piece.
        more = b"".join(islice(pieces, max(1, (len(held) - at) // PIECE_BYTES)))
        if not more and (not found or behind < len(held) or (later is ARRAY_NEXT and not is_last)):
            raise OSError(f"its JSON is cut off after byte {num_gone + at}")
        if not more:
            return
        held, at, num_gone = held[at:] + more.decode("latin-1"), 0, num_gone + at


def _json_text(row: bytes, text_field: str, place: str) -> bytes:
    try:
        text, splits = row.decode("utf-8", "surrogatepass"), re.compile("(?!)")
    except UnicodeDecodeError:
        text, splits = row.decode("utf-8", "surrogateescape"), INVALID_BYTES
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({one_line(error)}); {SKIP}, or {EXCLUDE}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON {type(value).__name__}, not an object; write one JSON object a row, or {EXCLUDE}")
    found = _field(value, text_field, place)
    if found is not None and not isinstance(found, str):
        remedy = ONE_STRING if isinstance(found, list) else f"set text_field to a field of strings, or {SKIP}"
        raise ValueError(f"{place}: field {text_field!r} is of type {type(found).__name__}, not a string; {remedy}")
    # Bytes that are no UTF-8 stay as they are; half a surrogate pair that is written as an escape has its own three bytes.
    errors = ("surrogatepass", "surrogateescape")
    return b"".join(part.encode("utf-8", errors[number % 2]) for number, part in enumerate(splits.split(found or "")))


def _field(value: dict, text_field: str, place: str) -> Any:
    """What stands at the path. None where the path ends in a null; a list where it leads through one."""
    if text_field in value:
        return value[text_field]
    name, _, rest = text_field.partition(".")
    inner = value.get(name, "") if rest else ""
    if inner is None or isinstance(inner, list):
        return inner
    if isinstance(inner, dict):
        return _field(inner, rest, place)
    raise ValueError(f"{place}: no field {text_field!r}, there is {_names(value)}; set text_field to one of these")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _table(path: Path, pieces: Iterator[bytes], reading: Reading, tally: Tally) -> Iterator[bytes]:
    csv.field_size_limit(sys.maxsize)
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in _split(pieces, b"\n"))
    head = next((line for line in lines if line.strip()), "")
    rows = csv.reader(chain([head], lines), delimiter=max(",\t;|", key=head.count), strict=True)
    names = next(rows, [])
    if names and reading.text_field not in names:
        raise ValueError(f"{path}: no column {reading.text_field!r}, there is {_names(names)}; set text_field to one of these")
    while True:
        try:
            cells = next(rows, None)
            if cells and len(cells) != len(names):
                raise csv.Error(f"{len(cells)} columns, the first line names {len(names)}")
        except csv.Error as error:
            tally.fault(ValueError(f"{path}, line {rows.line_num}: not CSV ({one_line(error)}); {SKIP}"), reading)
            continue
        if cells is None:
            return
        if cells:
            yield cells[names.index(reading.text_field)].encode("utf-8", "surrogateescape")


def _parquet(path: Path, reading: Reading, tally: Tally) -> Iterator[bytes]:
    with pq.ParquetFile(path, buffer_size=PIECE_BYTES) as file:
        names = _column_names(file.schema_arrow, reading.text_field, path)
        for group in range(file.num_row_groups):
            place = f"{path}, row group {group}"
            batches = file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=[reading.text_field])
            try:
                for batch in batches:
                    column: Any = batch.column(names[0])
                    if names[1:]:
                        column = pc.call_function("struct_field", [column], pc.StructFieldOptions(names[1:]))
                    column = column.storage if isinstance(column, pa.ExtensionArray) else column
                    column = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
                    # As binary: pyarrow does not look whether its strings are UTF-8, and a Python string would refuse them.
                    for value in column.cast(pa.large_binary()):
                        if "binary" in str(column.type):
                            _refuse_binary(place, value.as_py() or b"")
                        yield value.as_py() or b""
            except (OSError, pa.ArrowException) as error:
                tally.fault(ValueError(f"{place} cannot be read ({one_line(error)}); {SKIP}, or {EXCLUDE}"), reading)


def _column_names(schema: pa.Schema, text_field: str, path: Path) -> list[str]:
    """The names on the path to the text. Raises ValueError if they lead to no text."""
    kind: Any = pa.struct(list(schema))
    names = [text_field] if text_field in schema.names else text_field.split(".")
    for name in names:
        inner = {part.name: part.type for part in kind} if isinstance(kind, pa.StructType) else {}
        if name not in inner and "list" not in str(kind)[:10]:
            raise ValueError(f"{path}: no column {text_field!r}, there is {_names(inner)}; set text_field to one of these")
        kind = inner.get(name, kind)
    plain = kind.value_type if isinstance(kind, pa.DictionaryType) else getattr(kind, "storage_type", kind)
    if not TEXT_TYPE.fullmatch(str(plain)):
        remedy = ONE_STRING if "list" in str(kind)[:10] else "set text_field to a column of strings"
        raise ValueError(f"{path}: column {text_field!r} is of type {str(kind)[:80]}, not a string; {remedy}")
    return names
