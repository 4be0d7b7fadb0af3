"""The byte formats of tokens and of labels: headers, checksums, memory-mapped reading. No other room knows these bytes.

A token file is a header of 128 bytes, the tokens (little-endian, 2 or 4 bytes each), and the sha256 of each block of 4 MiB of
tokens. The header holds the sha256 of itself and of that table, so every byte is covered and a bad block can be named. The file
appears whole or not at all.

A label file holds what a model predicts after each token of one token file: a header of 184 bytes, a record for each token (k
ids of 2 or 4 bytes, k float16, one float32; little-endian), and the sha256 of each block of records. It is made without any
label, and several processes fill it block by block. A block counts if its digest is that of its bytes, so a kill leaves nothing
that could be taken for a label. What is not written takes no room on the disk. Knows nothing of text, nor of what ids mean.
"""

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Generic, NamedTuple, TypeVar
from uuid import uuid4

import numpy as np

# The two formats: other values would make other files.
MAGIC, VERSION = b"TIGHTFIT", 1
HEADER = struct.Struct("<8sIIQ32s32s40x")  # magic, version, bytes per token, tokens, tokenizer fingerprint, sha256, zeros
DIGEST_AT, DIGEST_BYTES = slice(56, 88), 32
BLOCK_BYTES = 2**22
LABEL_MAGIC, LABEL_VERSION = b"TIGHTLAB", 1
LABEL_HEADER = struct.Struct("<8sIII4xQQQQ32s32s32s")  # magic, version, then what LabelHeader holds; its sha256 follows
LABEL_HEADER_BYTES = LABEL_HEADER.size + DIGEST_BYTES
# How labels are hashed: threads that keep a disk busy, each with a small piece in memory. No result depends on it.
HASHED_BYTES, HASHING_THREADS = 2**22, 8
REMEDY = "delete the data_dir that holds it and prepare the data again"
Array = TypeVar("Array")


class Shard(NamedTuple):
    """One token file: `num_tokens` of `token_bytes` each; both digests are hex. It is not open, so there may be any number."""

    path: Path
    num_tokens: int
    token_bytes: int
    fingerprint: str
    sha256: str

    @property
    def ids(self) -> np.ndarray:
        """(num_tokens,) uint16 or uint32, memory-mapped as long as the array lives."""
        kind = f"<u{self.token_bytes}"
        if not self.num_tokens:
            return np.empty(0, kind)
        return np.memmap(self.path, kind, "r", HEADER.size, (self.num_tokens,)).view(np.ndarray)

    def read(self, tokens: slice) -> np.ndarray:
        """The ids of some tokens: (N,) uint16 or uint32, read from the file. Raises ValueError if it ends before them."""
        start, num_tokens = HEADER.size + tokens.start * self.token_bytes, tokens.stop - tokens.start
        ids = np.fromfile(self.path, f"<u{self.token_bytes}", num_tokens, offset=start)
        if len(ids) < num_tokens:
            raise ValueError(f"{self.path} ends before byte {start + num_tokens * self.token_bytes}; {REMEDY}")
        return ids


class ShardPart(NamedTuple):
    """Some of the tokens of a stream: the number of their shard, and where in it they are."""

    shard: int
    tokens: slice


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Several shards, read as one sequence. Raises ValueError if one was made with another tokenizer than `fingerprint`."""

    shards: tuple[Shard, ...]
    fingerprint: str

    def __post_init__(self) -> None:
        for shard in self.shards:
            if shard.fingerprint != self.fingerprint:
                theirs = shard.fingerprint[:12]
                raise ValueError(f"{shard.path} was made with tokenizer {theirs}, not with {self.fingerprint[:12]}; {REMEDY}")

    @cached_property
    def borders(self) -> np.ndarray:
        """(number of shards + 1,) int64: where each shard starts, and the end."""
        return np.cumsum([0, *(shard.num_tokens for shard in self.shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self.borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to before `stop`: (stop - start,) int64, across shard borders."""
        ids, at = np.empty(stop - start, np.int64), 0
        for part in self.places(start, stop):
            found = self.shards[part.shard].read(part.tokens)
            ids[at : at + len(found)] = found
            at += len(found)
        return ids

    def parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The same ids as each shard holds them: memory-mapped views (N,) uint16 or uint32, nothing is copied. For long
        stretches: to map a file takes longer than to read a window.
        """
        return (self.shards[part.shard].ids[part.tokens] for part in self.places(start, stop))

    def places(self, start: int, stop: int) -> Iterator[ShardPart]:
        """Where the tokens from `start` to before `stop` are, shard after shard."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        first, last = np.searchsorted(self.borders, start, "right") - 1, np.searchsorted(self.borders, stop)
        for number, (begin, end) in enumerate(pairwise(self.borders[first : last + 1].tolist()), int(first)):
            yield ShardPart(number, slice(max(start - begin, 0), min(stop, end) - begin))


class Labels(NamedTuple, Generic[Array]):
    """A model's prediction of the next token at each position, as numpy arrays or as torch tensors: `ids` (..., k) integers,
    most likely first; `logs` (..., k) float16, their log-probabilities in nats; `tail` (...) float32, all others' probability.
    """

    ids: Array
    logs: Array
    tail: Array


class LabelHeader(NamedTuple):
    """What a label file is made for: a shard of `num_tokens`, the first of them at `first_position` of the stream, and how its
    labels are stored. `num_positions` counts those of all files; `shard`, `tokenizer` and `identity` are sha256 digests.
    """

    top_k: int
    id_bytes: int
    block_tokens: int
    num_positions: int
    first_position: int
    num_tokens: int
    shard: bytes
    tokenizer: bytes
    identity: bytes


class LabelFile(NamedTuple):
    """One label file: its header, the first block whose digest it holds, the byte where its digests start, and its size."""

    path: Path
    header: LabelHeader
    first_block: int
    table_offset: int
    num_bytes: int


class _Span(NamedTuple):
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, eq=False)
class LabelStream:
    """The labels of the first `num_positions` tokens of `stream`, in a file in `folder` for each of its shards.

    Of each position `top_k` ids are kept; an id takes 2 bytes if `vocab_size` <= 65536, else 4. `identity`, 64 hex digits, says
    whose labels they are. Block b is the positions from b * block_tokens to before (b + 1) * block_tokens, or to num_positions.
    Several processes may write different blocks at once. A reading maps only what it reads, so memory does not fill up.
    """

    folder: Path
    stream: TokenStream
    top_k: int
    vocab_size: int
    block_tokens: int
    num_positions: int
    identity: str

    @property
    def num_blocks(self) -> int:
        """How many blocks hold all positions."""
        return -(-self.num_positions // self.block_tokens)

    @cached_property
    def record(self) -> np.dtype:
        """What is kept of one position, without gaps."""
        ids = f"<u{_id_bytes(self.vocab_size)}"
        return np.dtype([("ids", ids, (self.top_k,)), ("logs", "<f2", (self.top_k,)), ("tail", "<f4")])

    @cached_property
    def files(self) -> tuple[LabelFile, ...]:
        """The files that are to be there, in the order of the shards."""
        assert 0 <= self.num_positions <= self.stream.num_tokens, (self.num_positions, self.stream.num_tokens)
        id_bytes, files = _id_bytes(self.vocab_size), []
        for shard, (first, stop) in zip(self.stream.shards, pairwise(self.stream.borders.tolist()), strict=True):
            made_for = map(bytes.fromhex, (shard.sha256, shard.fingerprint, self.identity))
            header = LabelHeader(self.top_k, id_bytes, self.block_tokens, self.num_positions, first, stop - first, *made_for)
            first_block, stop_block = -(-first // self.block_tokens), -(-stop // self.block_tokens)
            table_offset = LABEL_HEADER_BYTES + (stop - first) * self.record.itemsize
            num_bytes = table_offset + (stop_block - first_block) * DIGEST_BYTES
            files.append(LabelFile(self.folder / f"{shard.path.stem}.labels", header, first_block, table_offset, num_bytes))
        return tuple(files)

    def create(self) -> None:
        """Makes the folder and the files that are not there, without any label; each appears whole or not at all. Several
        processes may do so at once; on a file system without hard links, one at a time. Raises OSError if there is no room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if not file.path.exists():
                packed = LABEL_HEADER.pack(LABEL_MAGIC, LABEL_VERSION, *file.header)
                with published(file.path, _link) as opened:
                    opened.write(packed + sha256(packed).digest())
                    opened.truncate(file.num_bytes)
        sync_folder(self.folder)

    def check(self) -> None:
        """Looks at the header and the size of each file; hashes no label. Raises ValueError if one is absent, not a label file,
        of another version or length, damaged in its header, or made for something else: names the first value that differs.
        """
        remedy = f"delete the folder {self.folder} and the labels are made again"
        for path, header, *_, num_bytes in self.files:
            start = _read_start(path, LABEL_HEADER_BYTES, LABEL_MAGIC, "label file", remedy)
            _, version, *found = LABEL_HEADER.unpack_from(start)
            if version != LABEL_VERSION:
                raise ValueError(f"{path} is of version {version}, not of version {LABEL_VERSION}; {remedy}")
            if start[LABEL_HEADER.size :] != sha256(start[: LABEL_HEADER.size]).digest():
                raise ValueError(f"{path}: the header at byte 0 is damaged; {remedy}")
            for name, *values in zip(LabelHeader._fields, found, header, strict=True):
                there, wanted = (value.hex()[:12] if isinstance(value, bytes) else value for value in values)
                if values[0] != values[1]:
                    raise ValueError(f"{path} was made for {name} {there}, not {wanted}; {remedy}")
            if path.stat().st_size != num_bytes:
                raise ValueError(f"{path} ends at byte {path.stat().st_size}, not at {num_bytes}; {remedy}")

    def read(self, start: int, stop: int) -> Labels[np.ndarray]:
        """The labels of the positions from `start` to before `stop`, ids as int64; zeros where nothing was written."""
        assert 0 <= start <= stop <= self.num_positions, (start, stop, self.num_positions)
        spans, size = self._spans(start, stop), self.record.itemsize
        parts = [np.memmap(s.path, self.record, "r", s.offset, (s.num_bytes // size,)).view(np.ndarray) for s in spans]
        ids, logs, tail = ([part[name] for part in (np.empty(0, self.record), *parts)] for name in Labels._fields)
        return Labels(np.concatenate(ids, dtype=np.int64), np.concatenate(logs), np.concatenate(tail))

    def write(self, start: int, labels: Labels[np.ndarray]) -> None:
        """Writes whole blocks, the first of them at position `start`; a kill leaves each block right or `faulty`.
        Raises ValueError if a label is not a number, and OSError if there is no room.
        """
        stop, at = start + len(labels.tail), 0
        assert start % self.block_tokens == 0 and stop <= self.num_positions, (start, stop)
        assert stop % self.block_tokens == 0 or stop == self.num_positions, (stop, self.block_tokens)
        data, block_bytes = memoryview(_packed(start, labels, self.record)), self.block_tokens * self.record.itemsize
        for span in self._spans(start, stop):
            _write_span(span, data[at : at + span.num_bytes])
            at += span.num_bytes
        for block, at in enumerate(range(0, len(data), block_bytes), start // self.block_tokens):
            _write_span(self._digest_span(block), sha256(data[at : at + block_bytes]).digest())

    def faulty(self, blocks: np.ndarray) -> np.ndarray:
        """Those of `blocks` (N,) int64 that are not written or whose bytes are not those that were written: (M,) int64."""
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            shares = [share.tolist() for share in np.array_split(blocks, HASHING_THREADS)]
            are_right = list(chain(*pool.map(lambda share: list(map(self._is_right, share)), shares)))
        return blocks[~np.array(are_right, dtype=bool)]

    def sync(self) -> None:
        """Makes durable what this machine wrote."""
        for file in self.files:
            with file.path.open("rb") as opened:
                os.fsync(opened.fileno())

    def _is_right(self, block: int) -> bool:
        written = b"".join(_read_span(self._digest_span(block)))
        if not any(written):
            return False
        digest, start = sha256(), block * self.block_tokens
        spans = self._spans(start, min(start + self.block_tokens, self.num_positions))
        for piece in chain.from_iterable(map(_read_span, spans)):
            digest.update(piece)
        return written == digest.digest()

    def _digest_span(self, block: int) -> _Span:
        """Where the digest of a block is: in the file that holds the block's first position."""
        file = self.files[int(np.searchsorted(self.stream.borders, block * self.block_tokens, side="right")) - 1]
        return _Span(file.path, file.table_offset + (block - file.first_block) * DIGEST_BYTES, DIGEST_BYTES)

    def _spans(self, start: int, stop: int) -> Iterator[_Span]:
        size = self.record.itemsize
        for shard, own in self.stream.places(start, stop):
            yield _Span(self.files[shard].path, LABEL_HEADER_BYTES + own.start * size, (own.stop - own.start) * size)


def write_shard(path: Path, ids: np.ndarray | Iterable[np.ndarray], vocab_size: int, fingerprint: str) -> int:
    """Writes (T,) ids, or arrays of ids one after another, and returns how many; either the whole file appears or none.
    A token takes 2 bytes if `vocab_size` <= 65536, else 4. `fingerprint` is the tokenizer's, 64 hex digits. Raises ValueError
    if an id is outside the vocabulary.
    """
    token_bytes, table = _id_bytes(vocab_size), bytearray()
    with published(path, os.replace) as file:
        file.write(bytes(HEADER.size))
        for block in _blocks([ids] if isinstance(ids, np.ndarray) else ids, vocab_size, f"<u{token_bytes}"):
            file.write(block)
            table += sha256(block).digest()
        num_tokens = (file.tell() - HEADER.size) // token_bytes
        file.write(table)
        fields = (MAGIC, VERSION, token_bytes, num_tokens, bytes.fromhex(fingerprint))
        file.seek(0)
        file.write(HEADER.pack(*fields, sha256(HEADER.pack(*fields, bytes(DIGEST_BYTES)) + table).digest()))
    sync_folder(path.parent)
    return num_tokens


def open_shard(path: Path) -> Shard:
    """Reads the header of a file; hashes nothing. Raises ValueError if it is not there, or its header or size is wrong."""
    header = _read_start(path, HEADER.size, MAGIC, "shard", REMEDY)
    _, version, token_bytes, num_tokens, fingerprint, digest = HEADER.unpack(header)
    if version != VERSION or token_bytes not in (2, 4):
        raise ValueError(f"{path}: version {version} with {token_bytes} bytes a token at byte 0, not {VERSION}; {REMEDY}")
    expected = HEADER.size + num_tokens * token_bytes + -(-num_tokens * token_bytes // BLOCK_BYTES) * DIGEST_BYTES
    if path.stat().st_size != expected:
        raise ValueError(f"{path} ends at byte {path.stat().st_size} and, by its header at byte 0, at {expected}; {REMEDY}")
    return Shard(path, num_tokens, token_bytes, fingerprint.hex(), digest.hex())


def verify_shard(path: Path) -> None:
    """Hashes the whole file. Raises ValueError as `open_shard` does, or if a byte has changed: names the offset of the first
    bad block, of the first digest that is not that of its block, or of the header.
    """
    shard = open_shard(path)
    num_bytes = shard.num_tokens * shard.token_bytes
    starts = range(0, num_bytes, BLOCK_BYTES)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        digests = [sha256(file.read(min(BLOCK_BYTES, num_bytes - start))).digest() for start in starts]
        table = file.read()
    unsigned = header[: DIGEST_AT.start] + bytes(DIGEST_BYTES) + header[DIGEST_AT.stop :]
    is_signed = header[DIGEST_AT] == sha256(unsigned + table).digest()
    bad = next((n for n, digest in enumerate(digests) if digest != table[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]), None)
    if bad is not None:
        at = HEADER.size + (starts[bad] if is_signed else num_bytes + bad * DIGEST_BYTES)
        raise ValueError(f"{path}: the {'block' if is_signed else 'digest'} at byte {at} is damaged; {REMEDY}")
    if not is_signed:
        raise ValueError(f"{path}: the header at byte 0 is damaged; {REMEDY}")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. An OSError says that it is not there or that its disk fails."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def published(path: Path, publish: Callable[[Path, Path], None]) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`. When it is whole it is made durable, and `publish` gives it its name."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError as fault:
        if fault.errno in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):  # There are no hard links here.
            os.replace(temporary, path)
        elif fault.errno != errno.EEXIST:  # Then another process was first, and may have written into its file.
            raise


def _blocks(arrays: Iterable[np.ndarray], vocab_size: int, kind: str) -> Iterator[bytes]:
    waiting = bytearray()
    for array in arrays:
        outside = (array < 0) | (array >= vocab_size)
        if outside.any():
            raise ValueError(f"id {array[outside][0]} is outside the vocabulary of {vocab_size}; raise vocab_size")
        waiting += array.astype(kind).tobytes()
        while len(waiting) >= BLOCK_BYTES:
            yield bytes(waiting[:BLOCK_BYTES])
            del waiting[:BLOCK_BYTES]
    if waiting:
        yield bytes(waiting)


def _id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 2**16 else 4


def _read_start(path: Path, num_bytes: int, magic: bytes, kind: str, remedy: str) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(num_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if len(header) < num_bytes:
        raise ValueError(f"{path} ends at byte {len(header)}, within the {num_bytes} of its header; {remedy}")
    if not header.startswith(magic):
        raise ValueError(f"{path} is not a {kind}, at byte 0 it has {header[: len(magic)]!r}; {remedy}")
    return header


def _packed(start: int, labels: Labels[np.ndarray], record: np.dtype) -> bytes:
    records = np.empty(len(labels.tail), record)
    for name, values in labels._asdict().items():
        assert values.shape == records[name].shape, (name, values.shape, records[name].shape)
        records[name] = values
    assert (records["ids"] == labels.ids).all(), f"an id that does not fit in {record['ids'].base}"
    wrong = ~((records["logs"] < np.inf).all(axis=1) & np.isfinite(records["tail"]))
    if wrong.any():
        where = start + int(np.flatnonzero(wrong)[0])
        raise ValueError(f"the label of position {where} is not a number; let the model that gives it use another precision")
    return records.tobytes()


def _read_span(span: _Span) -> Iterator[bytes]:
    """The bytes of a span, HASHED_BYTES at a time; fewer where the file ends."""
    remaining_bytes = span.num_bytes
    with span.path.open("rb", buffering=0) as file:
        file.seek(span.offset)
        while remaining_bytes and (piece := file.read(min(remaining_bytes, HASHED_BYTES))):
            remaining_bytes -= len(piece)
            yield piece


def _write_span(span: _Span, data: bytes | memoryview) -> None:
    with span.path.open("rb+") as file:
        file.seek(span.offset)
        file.write(data)
