"""Names, folders, globs and URLs -> files, and the parts they are read in.

Owns which files are read, which of them hold tokens, where a large one may be cut, how one is opened and decompressed. Knows
nothing of documents. A local path goes through the operating system, a name with a scheme (`s3://`, `hf://`, `https://`)
through fsspec, as a stream.
"""

import bz2
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import has_magic
from hashlib import sha256
from heapq import heappop, heappush
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

URL, URL_WILDCARD = re.compile(r"[A-Za-z][\w+.:-]*://"), re.compile(r"[*[]")
# By ending: how such a file begins, and what decompresses one stream of it.
COMPRESSIONS = {
    ".gz": (re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(31)),
    ".bz2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    ".xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMADecompressor),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2aM\x18"), lambda: zstandard.ZstdDecompressor().decompressobj()),
}
DECOMPRESS_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
# How much is read at once: of a file as it is, and of a compressed one.
PIECE_BYTES, COMPRESSED_BYTES = 2**20, 2**14
# Who writes files of tokens, and how Megatron's index and llm.c's files begin (data, Llama 3's data, evaluations).
MEGATRON, LLM_C, NANOGPT = "Megatron", "llm.c", "nanoGPT"
MEGATRON_INDEX = b"MMIDIDX\0\0"
LLM_C_MAGICS = (b"\x88\xd8\x34\x01", b"\xa1\xd9\x34\x01", b"\x8a\xd8\x34\x01")
EXCLUDE = "leave it out by corpus_exclude"


class CorpusFile(NamedTuple):
    """A file by its local path or its URL; `source` is the number of the first entry of the corpus that names it; `tokens` says
    who writes such files (MEGATRON, LLM_C, NANOGPT) if it holds ids and not text.
    """

    path: str
    num_bytes: int
    source: int = 0
    tokens: str | None = None


class Part(NamedTuple):
    """The bytes from `start` up to `stop` of a file, or up to its end; `tokens` as of a CorpusFile."""

    path: str
    start: int
    stop: int | None
    tokens: str | None = None


def corpus_files(corpus: tuple[str, ...], exclude: tuple[str, ...]) -> list[CorpusFile]:
    """The files of all entries, sorted, each real file once, those of URLs last. An entry is a file, a folder or a glob, of
    which `**` crosses folders: `data`, `data/**` and `data/**/*` are the same. A name with `[`, `*` or `?` that is there is
    that file or folder. In a URL `?` is no wildcard, and one with a slash at its end is a folder.

    Below a folder, or below the fixed part of a glob, links are followed, hidden names are left out, and so is every path that
    has a part that matches a pattern of `exclude` (as in fnmatch). A file that an entry names itself is never left out. Of
    several names of a file the first without a link counts, or the first. Raises ValueError if an entry is not there or cannot
    be reached, a folder cannot be read, or no file of an entry is left.

    A local `.bin` holds tokens if Megatron's `.idx` is beside it, which itself is left out, or if it begins as llm.c's; any
    other is nanoGPT's, but only if an entry that ends in `.bin` names it.
    """
    local, remote, raw = [], {}, set()
    for source, entry in enumerate(corpus):
        if is_url(entry):
            remote = {file.path: file._replace(source=source) for file in _remote_files(entry, exclude)} | remote
        else:
            local += [(is_linked, path, source) for is_linked, path in _entry_files(entry, exclude)]
    paths, sources = {}, {}
    for _, path, source in sorted(local, key=lambda file: file[0]):
        real = path.resolve()
        paths.setdefault(real, path)
        sources[real] = min(source, sources.get(real, source))
        raw |= {real} if corpus[source].endswith(".bin") and not Path(corpus[source]).is_dir() else set()
    chosen = sorted(paths.items(), key=lambda pair: pair[1])
    return [
        CorpusFile(str(path), path.stat().st_size, sources[real], _tokens(path, real in raw))
        for real, path in chosen
        if not (is_megatron_index(path) and path.with_suffix(".bin").is_file())
    ] + sorted(remote.values())


def corpus_digest(files: Iterable[CorpusFile]) -> str:
    """sha256 (hex) of the names, as given, and of the sizes in bytes. The contents are not read."""
    digest = sha256()
    for file in files:
        digest.update(json.dumps([file.path, file.num_bytes]).encode())
    return digest.hexdigest()


def corpus_pieces(files: Iterable[CorpusFile], piece_bytes: int) -> list[tuple[Part, ...]]:
    """The parts of all files in order, in pieces of about equal work: small files stand together up to `piece_bytes`, a file
    that is larger is cut into equal ranges. Names and sizes alone decide.
    """
    pieces, together, num_bytes = [], [], 0
    for file in files:
        if together and num_bytes + file.num_bytes > piece_bytes:
            pieces.append(tuple(together))
            together, num_bytes = [], 0
        if file.num_bytes > piece_bytes:
            own_bytes = -(-file.num_bytes // -(-file.num_bytes // piece_bytes))
            *starts, last = range(0, file.num_bytes, own_bytes)
            pieces += [(Part(file.path, start, start + own_bytes, file.tokens),) for start in starts]
            pieces.append((Part(file.path, last, None, file.tokens),))
        else:
            together.append(Part(file.path, 0, None, file.tokens))
            num_bytes += file.num_bytes
    return [*pieces, tuple(together)] if together else pieces


def whole_parts(files: Iterable[CorpusFile]) -> list[Part]:
    """Each file as one part."""
    return [Part(file.path, 0, None, file.tokens) for file in files]


def is_url(path: str) -> bool:
    """Whether the name has a scheme, so that fsspec reads it."""
    return URL.match(path) is not None


def is_megatron_index(path: Path) -> bool:
    """Whether a local file is the `.idx` of tokens that Megatron has written."""
    return path.suffix == ".idx" and _begin(path) == MEGATRON_INDEX


def file_name(path: str) -> PurePosixPath:
    """The path without what a URL has around it: other layers, and what is asked of the server."""
    if not is_url(path):
        return PurePosixPath(path)
    layer = next(layer for layer in path.split("::") if "://" in layer)
    return PurePosixPath(re.split("[?#]", layer)[0])


def open_file(path: str) -> BinaryIO:
    """A stream for reading that can seek. Raises OSError for a local path, ValueError for a URL."""
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(path), PIECE_BYTES)) if is_url(path) else open(path, "rb")


def compression(head: bytes) -> str | None:
    """The ending that files which begin like this have by right; None if it is not compressed."""
    return next((ending for ending, (begins, _) in COMPRESSIONS.items() if begins.match(head)), None)


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """What a file holds from where it stands, decompressed if it is compressed, the first COMPRESSED_BYTES in the first piece.
    All that can be read comes before an error of DECOMPRESS_ERRORS.
    """
    data = file.read(COMPRESSED_BYTES)
    ending = compression(data)
    if ending is None:
        yield data + file.read(PIECE_BYTES)
        yield from iter(lambda: file.read(PIECE_BYTES), b"")
        return
    make, held = COMPRESSIONS[ending][1], io.BytesIO()
    decompressor = make()
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
    except DECOMPRESS_ERRORS:
        yield held.getvalue()
        raise
    yield held.getvalue()


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """All pieces as one, without a second copy."""
    document = io.BytesIO()
    document.writelines(pieces)
    yield document.getvalue()


def split_pieces(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
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


def overlaps_itself(separator: bytes) -> bool:
    """Whether it can stand in two places at once, so that where a file is cut depends on what stands before."""
    return any(separator.endswith(separator[:length]) for length in range(1, len(separator)))


def first_start(file: BinaryIO, part: Part, separator: bytes) -> int:
    """Where the first text of a part begins: at the start of the file, or behind a separator. sys.maxsize if there is none."""
    at = file.seek(max(0, part.start - len(separator)))
    last, held = part.stop or sys.maxsize, b""
    while part.start and (data := file.read(min(PIECE_BYTES, last - at))):
        at += len(data)
        held += data
        found = held.find(separator)
        if found >= 0:
            return at - len(held) + found + len(separator)
        held = held[max(0, len(held) - len(separator) + 1) :]
    return sys.maxsize if part.start else 0


def texts_from(file: BinaryIO, starts: range, separator: bytes) -> Iterator[bytes]:
    """The texts between separators that start there, the first of them at the first place."""
    if not starts:
        return
    at = file.seek(starts.start)
    for text in split_pieces(iter(lambda: file.read(PIECE_BYTES), b""), separator):
        yield text
        at += len(text) + len(separator)
        if at not in starts:
            return


def num_line_ends(file: BinaryIO, stop: int) -> int:
    """Of the first `stop` bytes; the file stays where it stands."""
    at, num_lines = file.tell(), 0
    file.seek(0)
    while data := file.read(min(PIECE_BYTES, stop - file.tell())):
        num_lines += data.count(b"\n")
    file.seek(at)
    return num_lines


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


class _RemoteFile(io.RawIOBase):
    """A file elsewhere. What fails on the way is a ValueError, so that no reader takes it for faulty content."""

    def __init__(self, url: str) -> None:
        with _reaching(url):
            system, name = url_to_fs(url)
            self.url, self.at, self.num_bytes = url, 0, system.info(name)["size"]
            self.stream = system.open(name, "rb") if self.num_bytes else io.BytesIO()
            self.num_bytes = self.stream.seek(0, io.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.num_bytes)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        with _reaching(self.url):
            self.stream.seek(self.at)
            data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "stream"):
            self.stream.close()
        super().close()


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Every file system fails in its own way; all of them become one line."""
    try:
        yield
    except ImportError as error:
        scheme = url.split("::")[-1].partition("://")[0]
        package = known_implementations.get(scheme, {"class": "fsspec"})["class"].partition(".")[0]
        package = f'"fsspec[{scheme}]"' if package == "fsspec" else package
        raise ValueError(f"{url} needs a package ({one_line(error)}); pip install {package}") from error
    except Exception as error:
        cause = error.__cause__ or error
        words = f"{type(cause).__name__}: {one_line(cause)}"
        raise ValueError(f"{url} cannot be read ({words}); mend the address or the access, or name a copy on a disk") from error


def _remote_files(entry: str, exclude: tuple[str, ...]) -> list[CorpusFile]:
    with _reaching(entry):
        system, path = url_to_fs(entry)
        is_glob = URL_WILDCARD.search(path) is not None and not system.exists(path)
        info = {} if is_glob or entry.endswith("/") else system.info(path)
        is_index_page = info.get("mimetype") == "text/html" and file_name(entry).suffix not in (".html", ".htm")
        if info.get("type") == "file" and not is_index_page:
            return [CorpusFile(entry, _num_bytes(system, path, info))]
        found = system.glob(path, detail=True) if is_glob else system.find(path, detail=True)
    root, names = _fixed_names(path.rstrip("/"), is_glob), path.split("/")
    pattern = (*names[len(root) :], "*") if names[-1] == "**" else tuple(names[len(root) :]) if is_glob else ("**", "*")
    below = {tuple(name.split("/")[len(root) :]): name for name in found if found[name]["type"] == "file"}
    # An index page of Apache links to itself, in other orders.
    matching = [names for names in below if _is_match(names, pattern) and not names[-1].startswith("?")]
    kept = [names for names in matching if not any(fnmatchcase(name, part) for name in names for part in exclude)]
    _refuse_nothing(entry, len(kept), len(matching))
    url = _fixed_names(entry.removesuffix("/"), is_glob)
    with _reaching(entry):
        sizes = [_num_bytes(system, below[names], found[below[names]]) for names in kept]
    return [CorpusFile("/".join((*url, *names)), size) for names, size in zip(kept, sizes, strict=True)]


def _num_bytes(system: AbstractFileSystem, name: str, info: dict) -> int:
    size = info["size"] if info.get("size") is not None else system.info(name)["size"]
    if size is None:
        raise OSError(f"the size of {name} is not told")
    return size


def _fixed_names(path: str, is_glob: bool) -> list[str]:
    """Those before the first wildcard, or all of them."""
    names = path.split("/")
    return list(takewhile(lambda name: not URL_WILDCARD.search(name), names)) if is_glob else names


def _is_match(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the names on the way to a file are what the parts of a glob stand for."""
    if not names or not pattern:
        return not names and not pattern
    if pattern[0] == "**" and _is_match(names, pattern[1:]):
        return True
    return _is_name(names[0], pattern[0]) and _is_match(names[1:], pattern if pattern[0] == "**" else pattern[1:])


def _is_name(name: str, part: str) -> bool:
    return name == part or (fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")))


def _refuse_nothing(entry: str, num_kept: int, num_files: int) -> None:
    if not num_kept:
        excluded = f"corpus_exclude leaves out all {num_files}" if num_files else "nothing is there"
        raise ValueError(f"corpus: {entry!r} matches no file ({excluded}); name a file, folder or glob that holds text")


def _tokens(path: Path, is_named: bool) -> str | None:
    if path.suffix != ".bin":
        return None
    if is_megatron_index(path.with_suffix(".idx")):
        return MEGATRON
    return LLM_C if _begin(path).startswith(LLM_C_MAGICS) else NANOGPT if is_named else None


def _begin(path: Path) -> bytes:
    """What tells files of tokens from others; of a file that cannot be read nothing: who reads it says why."""
    try:
        with path.open("rb") as file:
            return file.read(len(MEGATRON_INDEX))
    except OSError:
        return b""


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
    _refuse_nothing(entry, len(kept), 0 if kept else len(_matching(root, pattern, ())))
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
            if _is_name(name, part) and below and path.is_dir():
                heappush(waiting, (is_linked or path.is_symlink(), path, below))
            elif _is_name(name, part) and not below and path.is_file():
                found.append((is_linked or path.is_symlink(), path))
    return sorted(found)
