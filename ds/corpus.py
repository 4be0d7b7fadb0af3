"""Files and folders -> documents as bytes. Owns which files are read, how they are cut, which documents are held out.

Knows nothing of tokens: a document is bytes, valid UTF-8 or not, and is never changed here.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from glob import has_magic, iglob
from hashlib import sha256
from itertools import product, takewhile
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

# pyarrow, because zstandard's own reader takes a truncated file for a complete one.
OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
# How many rows are in memory at once; the documents are the same.
PARQUET_BATCH_ROWS = 1024
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
ZIP_START = b"PK\x03\x04"
# The opcodes of pickle's protocols 0 to 5, by what follows each: so many bytes; a length of so many bytes, and as many bytes as
# it says; so many lines.
FIXED_BYTES = {
    **dict.fromkeys(b"012()NQR]abdelostu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98", 0),
    **dict.fromkeys(b"Khq\x80\x82", 1), **dict.fromkeys(b"M\x83", 2), **dict.fromkeys(b"Jjr\x84", 4),
    **dict.fromkeys(b"G\x95", 8),
}  # fmt: skip
LENGTH_BYTES = {**dict.fromkeys(b"UC\x8a\x8c", 1), **dict.fromkeys(b"TBX\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8)}
NUM_LINES = {**dict.fromkeys(b"FILPSVgp", 1), **dict.fromkeys(b"ci", 2)}
STOP = ord(".")
JSON_REMEDY = "write one JSON object a line"


def corpus_files(corpus: tuple[str, ...], exclude: tuple[str, ...]) -> list[Path]:
    """The files of all entries, sorted, each once. An entry is a file, a folder (read recursively) or a glob (`**` too).

    Below a folder, or below the fixed part of a glob, hidden names are left out, and so is every path with a part that matches
    a pattern of `exclude` (as in fnmatch). A file that an entry names itself is never left out. Raises ValueError if
    an entry is not there or no file of it is left.
    """
    files = [path for entry in corpus for path in sorted(_entry_files(entry, exclude))]
    return sorted({path.resolve(): path for path in reversed(files)}.values())


def corpus_digest(files: Iterable[Path]) -> str:
    """sha256 (hex) of the names, as given, and of the sizes in bytes. The contents are not read."""
    digest = sha256()
    for path in files:
        digest.update(json.dumps([path.as_posix(), path.stat().st_size]).encode())
    return digest.hexdigest()


def documents(files: Iterable[Path], text_field: str) -> Iterator[bytes]:
    """Every document that is not empty, file by file. Raises ValueError as `file_documents` does, or if there is none."""
    document = b""
    for path in files:
        for document in file_documents(path, text_field):
            yield document
    if not document:
        raise ValueError("corpus holds no text: every file is empty; add files with text to corpus")


def file_documents(path: Path, text_field: str) -> Iterator[bytes]:
    """The documents of one file that are not empty: a line of .jsonl or .ndjson, a row of .parquet, else the whole file.

    The text is the string in `text_field`. Files that end in .gz, .bz2, .xz or .zst are decompressed first. Bytes that are
    not UTF-8 are kept. Raises ValueError, with file and line, if the file cannot be read, is not what its name says, is a
    pickle or a zip archive, or if a line or column is not text.
    """
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    try:
        yield from filter(None, readers.get(name.suffix.lower(), _whole_file)(path, text_field))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}); repair it, or leave it out by corpus_exclude") from error


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether the document is for validation. Only its own bytes decide, so it stays in its split when the corpus grows."""
    return int.from_bytes(sha256(document).digest()[:8], "big") / 2**64 < fraction


def fixed_part(pattern: Path) -> Path:
    """The folders before a glob's first wildcard."""
    return Path(*takewhile(lambda part: not has_magic(part), pattern.parts))


def one_line(error: BaseException) -> str:
    """The words of an error in one line, for a refusal; its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _entry_files(entry: str, exclude: tuple[str, ...]) -> list[Path]:
    path = Path(entry)
    if path.is_file():
        return [path]
    if not path.is_dir() and not has_magic(entry):
        raise ValueError(f"corpus: {entry!r} is not there; name a file, folder or glob that exists")
    root = path if path.is_dir() else fixed_part(path)
    files = _files_below(path) if path.is_dir() else [Path(name) for name in iglob(entry, recursive=True)]
    files = [file for file in files if file.is_file()]
    kept = [file for file in files if not any(fnmatchcase(*pair) for pair in product(file.relative_to(root).parts, exclude))]
    if not kept:
        excluded = f"corpus_exclude leaves out all {len(files)}" if files else "nothing is there"
        raise ValueError(f"corpus: {entry!r} matches no file ({excluded}); name a file, folder or glob that holds text")
    return kept


def _files_below(root: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return files


def _whole_file(path: Path, text_field: str) -> Iterator[bytes]:
    with _open(path) as file:
        content = file.read()
    kind = "a pickle" if _begins_with_pickle(content) else "a zip archive" if content.startswith(ZIP_START) else None
    if kind is not None:
        raise ValueError(
            f"{path} is {kind}, not text, and nothing in it is run; leave it out by corpus_exclude or move it away"
        )
    yield content


def _begins_with_pickle(content: bytes) -> bool:
    """Whether the bytes begin with a whole pickle of protocol 2 to 5: one opcode after the other, up to STOP."""
    at = 2 if content.startswith(PICKLE_STARTS) else len(content)
    while at < len(content) and content[at] != STOP:
        opcode, at = content[at], at + 1
        length = content[at : at + LENGTH_BYTES.get(opcode, 0)]
        at += len(length) + int.from_bytes(length, "little")
        for _ in range(NUM_LINES.get(opcode, 0)):
            at = (content.find(b"\n", at) + 1) or len(content)
        if opcode not in LENGTH_BYTES and opcode not in NUM_LINES:
            at += FIXED_BYTES.get(opcode, len(content))
    return at < len(content)


def _json_lines(path: Path, text_field: str) -> Iterator[bytes]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_text(line, text_field, f"{path}, line {number}")


def _json_text(line: bytes, text_field: str, place: str) -> bytes:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); {JSON_REMEDY}, or leave the file out by corpus_exclude") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON {type(value).__name__}, not an object; {JSON_REMEDY}")
    if text_field not in value:
        raise ValueError(f"{place}: no field {text_field!r}, there is {_names(value)}; set text_field to one of these")
    if not isinstance(value[text_field], str):
        kind = type(value[text_field]).__name__
        raise ValueError(f"{place}: field {text_field!r} is of type {kind}, not a string; set text_field to a field of strings")
    return value[text_field].encode("utf-8", "surrogatepass")


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _parquet(path: Path, text_field: str) -> Iterator[bytes]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise ValueError(f"{path}: no column {text_field!r}, there is {_names(names)}; set text_field to one of these")
        column = file.schema_arrow.field(text_field).type
        if (column.value_type if isinstance(column, pa.DictionaryType) else column) not in (pa.string(), pa.large_string()):
            raise ValueError(
                f"{path}: column {text_field!r} is of type {column}, not a string; set text_field to a column of strings"
            )
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_field]):
            # As binary: pyarrow does not look whether its strings are UTF-8, and a Python string would refuse them.
            yield from (text for text in batch.column(0).cast(pa.large_binary()).to_pylist() if text is not None)


def _open(path: Path) -> IO[bytes]:
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")
