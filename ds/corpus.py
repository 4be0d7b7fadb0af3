"""Files -> documents as bytes. Owns how files are cut into documents, and which documents are held out.

Knows nothing of folders and tokens. A document keeps its bytes, valid UTF-8 or not, but for a byte-order mark, which is taken
off. At one time there are in memory: one document (of JSON its row, a few times; of Parquet a batch of rows) and a few pieces.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ds import files
from ds.files import COMPRESSIONS, EXCLUDE, Part, is_url, one_line, open_file, split_pieces

READ_ERRORS = (*files.DECOMPRESS_ERRORS, pa.ArrowException)
# How much of a table is read at once, and how much of a file shows what it is.
PARQUET_BATCH_ROWS, HEAD_BYTES = 64, 2**18
# How files begin that hold no text.
BINARY_STARTS = {
    "a pickle": rb"\x80[\2-\5]", "a zip archive": rb"PK(\x03\x04|\x05\x06)", "a PDF": rb"%PDF-", "a PNG image": rb"\x89PNG",
    "a JPEG image": rb"\xff\xd8\xff", "a GIF image": rb"GIF8[79]a", "an ELF object": rb"\x7fELF", "an archive": rb".{257}ustar",
    "an archive of objects": rb"!<arch>\n", "sound": rb"ID3[\2-\4]|fLaC|OggS|RIFF.{4}WAVE", "an Arrow file": rb"ARROW1\0",
    "an index of Megatron's tokens (name it .idx, beside the .bin, on a disk)": re.escape(files.MEGATRON_INDEX),
    "a file of llm.c's tokens (name it .bin, on a disk)": b"|".join(map(re.escape, files.LLM_C_MAGICS)),
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
DELIMITERS = ",\t;|"
NAME, INVALID_BYTES = re.compile(r"[\w.-]*"), re.compile("([\udc80-\udcff]+)")
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
    which are not UTF-8; "separator", plain texts with one of `SEPARATORS`; "json", .json files that are no rows.
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


def documents(parts: Iterable[Part], reading: Reading, tally: Tally) -> Iterator[bytes]:
    """Every document of text, part by part. ValueError as `part_documents`, or if there is none and no part of tokens."""
    before, has_tokens = tally.counts.get("documents", 0), False
    for part in parts:
        has_tokens |= part.tokens is not None
        yield from part_documents(part, reading, tally) if part.tokens is None else ()
    if not has_tokens and tally.counts.get("documents", 0) == before:
        raise ValueError(no_text(tally))


def no_text(tally: Tally) -> str:
    """What is wrong with a corpus of no document, and what to do."""
    why = f"the first of its faulty rows is {tally.first['faulty']}" if "faulty" in tally.first else "every file is empty"
    return f"corpus holds no text: {why}; add files with text to corpus"


def part_documents(part: Part, reading: Reading, tally: Tally) -> Iterator[bytes]:
    """The documents that start in one part of a file and are not null, empty or white space alone; `tally` counts those and
    what else was met. The parts of a file give together, in order, what the whole file gives.

    - Rows: Parquet; .csv and .tsv, whose first row names the columns; .jsonl, .ndjson and .json as lines, as values one after
      the other or as one array. `text_field` names the text, or is a path to it ("message.content").
    - All else is plain: one document, or those between `document_separator`, without the line ends around them. So is a .json
      file that is no row as source code has them for its settings: one object over several lines, or with comments, without
      `text_field`; it is counted ("json"). Refused, whatever their name, are plain files that begin with two JSON objects,
      with one that has `text_field`, with an array of objects, or with a line of names of columns, `text_field` among them.
    - Gzip, bzip2, xz, Zstandard and Parquet are known by their content. Bytes that are not UTF-8 are kept.
    - A row group of Parquet starts at its first byte. JSON of one row a line, and plain text with a separator that does not
      overlap itself, can be cut where they are not compressed. Of any other file all documents start at 0.

    Raises ValueError, with file and line, row group or byte, if the file cannot be read, is not what its name says, is binary
    or in another encoding, or a row is not text. With `skip_faulty_rows`, rows, row groups and the lost end of a compressed
    file are counted and skipped instead.
    """
    try:
        with open_file(part.path) as file:
            for document in _reader(file, part, reading, tally):
                document = document.removeprefix(UTF8_MARK)
                if is_document(document, part.path, tally):
                    yield document
                del document
    except READ_ERRORS as error:
        if not part.start or not reading.skip_faulty_rows or not _is_content(error):
            words = f"{part.path} cannot be read ({one_line(error)}); repair it, or {EXCLUDE}"
            _refuse_unreadable(error, words, reading, tally)


def is_document(document: bytes, path: str, tally: Tally) -> bool:
    """Whether it is more than white space; it is counted in either case, and also if it is not UTF-8."""
    if not document or document.isspace():
        tally.count("empty", path)
        return False
    if not _is_utf8(document):
        tally.count("invalid", path)
    tally.count("documents", path)
    return True


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether the document is for validation. Only its own bytes decide, so it stays in its split when the corpus grows."""
    return int.from_bytes(sha256(document).digest()[:8], "big") / 2**64 < fraction


def _is_utf8(document: bytes) -> bool:
    if document.isascii():
        return True
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(document)
    try:
        for start in range(0, len(view), files.PIECE_BYTES):
            decoder.decode(view[start : start + files.PIECE_BYTES])
        return decoder.decode(b"", final=True) == ""
    except UnicodeDecodeError:
        return False


def _is_content(error: BaseException) -> bool:
    """Whether what the file holds is at fault, which may be skipped, and not the disk or the name."""
    return getattr(error, "errno", None) is None


def _refuse_unreadable(error: Exception, words: str, reading: Reading, tally: Tally) -> None:
    may_skip = reading.skip_faulty_rows and _is_content(error)
    tally.fault(ValueError(words), reading._replace(skip_faulty_rows=may_skip))


def _reader(file: BinaryIO, part: Part, reading: Reading, tally: Tally) -> Iterator[bytes]:
    begin, name = file.read(files.COMPRESSED_BYTES), files.file_name(part.path)
    file.seek(-min(4, file.seek(0, io.SEEK_END)), io.SEEK_END)
    is_parquet = begin[:4] == file.read(4) == b"PAR1"
    if is_parquet or (name.suffix.lower() == ".parquet" and begin):
        return _parquet(file, part, reading, tally)
    is_compressed, is_named_so = files.compression(begin) is not None, name.suffix.lower() in COMPRESSIONS
    if part.start and (is_compressed or is_named_so):
        return iter(())
    if is_named_so and begin and not is_compressed:
        raise OSError(f"not {name.suffix[1:]} inside")
    file.seek(0)
    pieces = _readable(file, part.path, reading, tally)
    head = next(pieces, b"").removeprefix(UTF8_MARK)
    _refuse_binary(part.path, head)
    ending = (name.with_suffix("") if is_named_so else name).suffix.lower()
    rows = _rows(head, ending, part.path, reading.text_field)
    if rows is None and ending == ".json" and head.strip() and not part.start:
        tally.count("json", part.path)
    separator = b"\n" if rows == ".jsonl" else (reading.document_separator or "").encode() if rows is None else b""
    pieces, begin = chain([head], pieces), 0
    if separator and not is_compressed and not files.overlaps_itself(separator):
        begin = files.first_start(file, part, separator)
        texts = files.texts_from(file, range(begin, part.stop or sys.maxsize), separator)
    elif part.start:
        return iter(())
    else:
        texts = split_pieces(pieces, separator) if separator else files.joined(pieces)
    if rows == ".csv":
        return _table(part.path, pieces, reading, tally)
    if rows is not None:
        if rows != ".jsonl":
            return _json_rows(part.path, _json_values(pieces), "row {}".format, reading, tally)
        before = cache(lambda: files.num_line_ends(file, begin))
        return _json_rows(part.path, texts, lambda number: f"line {before() + number}", reading, tally)
    return _plain(part.path, (text.strip(b"\r\n") for text in texts) if separator else texts, tally)


def _readable(file: BinaryIO, path: str, reading: Reading, tally: Tally) -> Iterator[bytes]:
    try:
        yield from files.read_pieces(file)
    except READ_ERRORS as error:
        words = f"{path} cannot be read beyond byte {file.tell()} ({one_line(error)}); {SKIP}, or {EXCLUDE}"
        _refuse_unreadable(error, words, reading, tally)


def _refuse_binary(place: str, head: bytes) -> None:
    kind = next((kind for kind, begins in BINARY_STARTS.items() if re.match(begins, head, re.DOTALL)), None)
    encoding = next((name for name, mark in MARKS.items() if head.startswith(mark)), None)
    if kind is None and encoding is None and b"\0" in head[:HEAD_BYTES]:
        kind, most = "binary, with NUL bytes", 0
        is_wide = head.count(b"\0") > len(head) / 8 or not _is_utf8(head[:HEAD_BYTES].rsplit(b"\0", 1)[0])
        for name, width in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)) if is_wide else ():
            text = head[: min(len(head), HEAD_BYTES) // width * width].decode(name, "replace")
            num_plain = 0 if "\0" in text or "\ufffd" in text[:-1] else sum(map(str.isascii, text))
            encoding, most = (name, num_plain) if num_plain > most else (encoding, most)
    if encoding is not None:
        convert = f"iconv -f {encoding} -t UTF-8 FILE > NEW"
        raise ValueError(f"{place} is {encoding} text, not UTF-8; convert it by `{convert}`, or {EXCLUDE}")
    if kind is not None:
        raise ValueError(f"{place} is {kind}, not text, and nothing in it is run; {EXCLUDE} or move it away")


def _rows(head: bytes, ending: str, path: str, text_field: str) -> str | None:
    """How the rows of a file with this head and name are written: .csv (also for tabs), .jsonl or .json; None: it is plain."""
    if ending in (".csv", ".tsv"):
        return ".csv"
    is_json = ending in (".jsonl", ".ndjson", ".json")
    rows = _row_format(head, text_field, is_json)
    if rows is not None and not is_json:
        raise ValueError(f"{path} looks like rows ({rows}), not like text; end its name in {rows}, or {EXCLUDE}")
    return ".jsonl" if ending in (".jsonl", ".ndjson") and rows is None else rows


def _row_format(head: bytes, text_field: str, is_json: bool) -> str | None:
    """The ending of the files of rows that begin like this; None if it is none. `is_json`: the name says that it is JSON."""
    text, word = head.decode("latin-1"), rf'"{re.escape(text_field.split(".")[-1])}"\s*:\s*"'
    begin, array = len(text) - len(text.lstrip()), ARRAY_START.match(text)
    if array is not None:
        return ".json" if is_json or _begins_object(text, array.end()) else None
    if not text.startswith("{", begin):
        first = head.partition(b"\n")[0].decode("utf-8", "replace").strip()
        second = text[begin:].partition("\n")[2].partition("\n")[0]
        marks = [mark for mark in DELIMITERS if not is_json and mark in second]
        rows = {mark: [cell.strip() for cell in _cells(first, mark)] for mark in marks}
        looks = (mark for mark, row in rows.items() if row[1:] and text_field in row and all(map(NAME.fullmatch, row)))
        return {None: None, "\t": ".tsv"}.get(next(looks, None), ".csv")
    if not _begins_object(text, begin):
        return ".jsonl" if is_json and re.search(word, text) else None
    end = _value_end(text, begin)
    is_line = "\n" not in text[begin:end] and not text[end:].partition("\n")[0].strip()
    if end > len(text):
        is_rows = re.search(word, text) is not None if is_json != is_line else is_json
    else:
        value = json.loads(head[begin:end].decode("utf-8", "replace"), parse_int=float)
        has_field = text_field in value or text_field.partition(".")[0] in value
        is_rows = has_field or (is_json and is_line) or _begins_object(text, len(text) - len(text[end:].lstrip()))
    return (".jsonl" if is_line else ".json") if is_rows else None


def _begins_object(text: str, at: int) -> bool:
    end = _value_end(text, at) if text.startswith("{", at) else 0
    return 0 < end <= len(text) or end > len(text) >= HEAD_BYTES


def _value_end(text: str, at: int) -> int:
    """Where the JSON value at `at` ends; beyond the text where it is cut off; 0 where it is no JSON. Any int is one."""
    try:
        return json.JSONDecoder(parse_int=float).raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_JSON_WORD
        return len(text) + 1 if is_cut else 0
    except RecursionError:
        return 0


def _plain(path: str, texts: Iterable[bytes], tally: Tally) -> Iterator[bytes]:
    """The same texts. Raises ValueError at a NUL, such as a download has where it broke off."""
    for text in texts:
        if b"\0" in text:
            raise ValueError(f"{path} holds NUL bytes, which is no text; get it again, or {EXCLUDE}")
        separator = next((name for written, name in SEPARATORS.items() if written in text), None)
        if separator is not None:
            tally.count("separator", f"{path} holds {separator!r}; document_separator={separator!r} cuts there")
        yield text
        del text


def _json_rows(
    path: str, rows: Iterator[bytes], place: Callable[[int], str], reading: Reading, tally: Tally
) -> Iterator[bytes]:
    for number, row in enumerate(rows, 1):
        row = row.removeprefix(UTF8_MARK)
        try:
            document = _json_text(row, reading.text_field) if row and not row.isspace() else None
        except ValueError as error:
            tally.fault(ValueError(f"{path}, {place(number)}: {error}"), reading)
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
        more = b"".join(islice(pieces, max(1, (len(held) - at) // files.PIECE_BYTES)))
        if not more and (not found or behind < len(held) or (later is ARRAY_NEXT and not is_last)):
            raise OSError(f"its JSON is cut off after byte {num_gone + at}")
        if not more:
            return
        held, at, num_gone = held[at:] + more.decode("latin-1"), 0, num_gone + at


def _json_text(row: bytes, text_field: str) -> bytes:
    try:
        text, is_utf8 = row.decode("utf-8", "surrogatepass"), True
    except UnicodeDecodeError:
        text, is_utf8 = row.decode("utf-8", "surrogateescape"), False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({one_line(error)}); {SKIP}, or {EXCLUDE}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object; write one JSON object a row, or {EXCLUDE}")
    found = _field(value, text_field)
    if found is not None and not isinstance(found, str):
        remedy = ONE_STRING if isinstance(found, list) else f"set text_field to a field of strings, or {SKIP}"
        raise ValueError(f"field {text_field!r} is of type {type(found).__name__}, not a string; {remedy}")
    # Bytes that are no UTF-8 stay as they are; half a surrogate pair that is written as an escape has its own three bytes.
    errors, parts = ("surrogatepass", "surrogateescape"), [found or ""] if is_utf8 else INVALID_BYTES.split(found or "")
    return b"".join(part.encode("utf-8", errors[number % 2]) for number, part in enumerate(parts))


def _field(value: dict, text_field: str) -> Any:
    """What stands at the path. None where the path ends in a null; a list where it leads through one."""
    if text_field in value:
        return value[text_field]
    name, _, rest = text_field.partition(".")
    inner = value.get(name, "") if rest else ""
    if inner is None or isinstance(inner, list):
        return inner
    if isinstance(inner, dict):
        return _field(inner, rest)
    raise ValueError(f"no field {text_field!r}, there is {_names(value)}; set text_field to one of these")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _table(path: str, pieces: Iterable[bytes], reading: Reading, tally: Tally) -> Iterator[bytes]:
    csv.field_size_limit(sys.maxsize)
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in split_pieces(pieces, b"\n"))
    head = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in DELIMITERS if reading.text_field in _cells(head, mark)), max(DELIMITERS, key=head.count))
    rows = _table_rows(path, csv.reader(chain([head], lines), delimiter=delimiter, strict=True), reading, tally)
    names = next(rows, [reading.text_field])
    if names.count(reading.text_field) != 1:
        found = f"{'more than one' if reading.text_field in names else 'no'} column {reading.text_field!r}"
        raise ValueError(f"{path}: {found}, there is {_names(names)}; set text_field to one of these")
    yield from (cells[names.index(reading.text_field)].encode("utf-8", "surrogateescape") for cells in rows)


def _table_rows(path: str, rows: Any, reading: Reading, tally: Tally) -> Iterator[list[str]]:
    """The rows of a csv.reader, all as long as the first; without a first one there are none."""
    num_columns = None
    while True:
        try:
            cells = next(rows, None)
            if cells and num_columns not in (None, len(cells)):
                raise csv.Error(f"{len(cells)} columns, the first line names {num_columns}")
        except csv.Error as error:
            tally.fault(ValueError(f"{path}, line {rows.line_num}: not CSV ({one_line(error)}); {SKIP}"), reading)
            cells = None if num_columns is None else []
        if cells is None:
            return
        if cells:
            num_columns = len(cells)
            yield cells


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.replace("\r", " ").strip()], delimiter=delimiter), [])


def _parquet(file: BinaryIO, part: Part, reading: Reading, tally: Tally) -> Iterator[bytes]:
    source = file if is_url(part.path) else part.path
    with pq.ParquetFile(source, buffer_size=files.PIECE_BYTES, page_checksum_verification=True) as table:
        names = _column_names(table.schema_arrow, reading.text_field, part.path)
        for group in range(table.num_row_groups):
            first = table.metadata.row_group(group).column(0)
            if (first.dictionary_page_offset or first.data_page_offset) not in range(part.start, part.stop or sys.maxsize):
                continue
            place = f"{part.path}, row group {group}"
            batches = table.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=[reading.text_field])
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
                words = f"{place} cannot be read ({one_line(error)}); {SKIP}, or {EXCLUDE}"
                _refuse_unreadable(error, words, reading, tally)


def _column_names(schema: pa.Schema, text_field: str, path: str) -> list[str]:
    """The names on the path to the text. Raises ValueError if they lead to no text."""
    kind: Any = pa.struct(list(schema))
    names = [text_field] if text_field in schema.names else text_field.split(".")
    for name in names:
        inner = {part.name: part.type for part in kind} if isinstance(kind, pa.StructType) else {}
        if isinstance(kind, pa.StructType) and len(kind.get_all_field_indices(name)) > 1:
            raise ValueError(f"{path}: more than one column {name!r}; rename them, or {EXCLUDE}")
        if name not in inner and "list" not in str(kind)[:10]:
            raise ValueError(f"{path}: no column {text_field!r}, there is {_names(inner)}; set text_field to one of these")
        kind = inner.get(name, kind)
    plain = kind.value_type if isinstance(kind, pa.DictionaryType) else getattr(kind, "storage_type", kind)
    if not TEXT_TYPE.fullmatch(str(plain)):
        remedy = ONE_STRING if "list" in str(kind)[:10] else "set text_field to a column of strings"
        raise ValueError(f"{path}: column {text_field!r} is of type {str(kind)[:80]}, not a string; {remedy}")
    return names
