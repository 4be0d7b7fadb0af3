"""The byte formats of tokens and of their labels: headers, checksums, memory-mapped read. Only this room knows bytes.

A token file is a header of 128 bytes, the tokens (little-endian, 2 or 4 bytes each), and the sha256 of each block of 4 MiB
of tokens. The header holds the sha256 of itself and of that table, so every byte is covered and a bad block can be named.
It appears whole or not at all.

A label file holds what a model says of the token after each token of one token file: a header of 184 bytes, as many records
as there are tokens (k ids of 2 or 4 bytes, k float16, one float32; little-endian), and the sha256 of each block of records.
It is there from the start, without any block, and is filled block by block, by several processes; a block counts if its
digest is that of its bytes, so a kill leaves nothing that could be taken for a label. What is not written takes no room.

Knows nothing of text, of models, nor of what the ids mean.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

import numpy as np

MAGIC = b"TIGHTFIT"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32s32s40x")  # magic, version, bytes per token, tokens, tokenizer fingerprint, sha256, zeros
DIGEST_AT = slice(56, 88)
DIGEST_BYTES = 32
BLOCK_BYTES = 2**22
REMEDY = "delete the data_dir that holds it and prepare the data again"
LABEL_MAGIC = b"TIGHTLAB"
LABEL_VERSION = 1
LABEL_HEADER = struct.Struct("<8sIII4xQQQQ32s32s32s")  # magic, version, then what LabelHeader holds; its sha256 follows
LABEL_HEADER_BYTES = LABEL_HEADER.size + DIGEST_BYTES
HASHED_BYTES = 2**22
HASHING_THREADS = 8
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Shard(NamedTuple):
    """One open file: `ids` (num_tokens,) uint16 or uint32, memory-mapped; both digests are hex."""

    path: Path
    ids: np.ndarray
    fingerprint: str
    sha256: str


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Several shards of one tokenizer, read as one sequence.

    Raises:
        ValueError: a shard was made with another tokenizer than `fingerprint`.
    """

    shards: tuple[Shard, ...]
    fingerprint: str

    def __post_init__(self) -> None:
        for shard in self.shards:
            if shard.fingerprint != self.fingerprint:
                raise ValueError(
                    f"{shard.path} was made with tokenizer {shard.fingerprint[:12]}, not with {self.fingerprint[:12]}; {REMEDY}"
                )

    @cached_property
    def borders(self) -> np.ndarray:
        """(number of shards + 1,) int64: where each shard starts, and the end."""
        return np.cumsum([0, *(len(shard.ids) for shard in self.shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self.borders[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to before `stop`: (stop - start,) int64, across shard borders."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.parts(start, stop)], dtype=np.int64)

    def parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The same ids as each shard holds them: memory-mapped views (N,) uint16 or uint32, nothing is copied."""
        return (self.shards[number].ids[inside] for number, inside in self.places(start, stop))

    def places(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Where the tokens from `start` to before `stop` lie: the number of each shard and the slice of its tokens."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        first = int(np.searchsorted(self.borders, start, side="right")) - 1
        for number in range(first, len(self.shards)):
            begin, end = self.borders[number : number + 2].tolist()
            if begin >= stop:
                break
            yield number, slice(max(start - begin, 0), min(stop, end) - begin)


class Labels(NamedTuple):
    """What a model says of the token after each of N: `ids` (N, k) integers, the likeliest, best first; `logs` (N, k) float16,
    their log-probabilities in nats; `tail` (N,) float32, the probability of all other ids together.
    """

    ids: np.ndarray
    logs: np.ndarray
    tail: np.ndarray


class LabelHeader(NamedTuple):
    """What a label file is made for: a shard of `num_tokens`, the first of them at `first_position` of the stream, and its
    sha256, as those of the tokenizer and of the labels' identity; the `num_positions` of all files, in blocks.
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

    @property
    def first_block(self) -> int:
        """The first block that does not start before the shard."""
        return -(-self.first_position // self.block_tokens)

    @property
    def table_offset(self) -> int:
        """The byte at which the digests start."""
        return LABEL_HEADER_BYTES + self.num_tokens * _record(self.top_k, self.id_bytes).itemsize

    @property
    def file_bytes(self) -> int:
        """The size of the file, with a digest for each block that starts in the shard."""
        num_blocks = -(-(self.first_position + self.num_tokens) // self.block_tokens) - self.first_block
        return self.table_offset + num_blocks * DIGEST_BYTES


class LabelFile(NamedTuple):
    """One file, and what its header says."""

    path: Path
    header: LabelHeader


@dataclass(frozen=True, eq=False)
class LabelStream:
    """The labels of the first `num_positions` tokens of `stream`, in a file for each of its shards.

    Block b is the positions from b * block_tokens to before (b + 1) * block_tokens or, in the last, num_positions. Several
    processes may write different blocks at once. Each reading maps what it reads and no more, so labels do not pile up in the
    process's memory.
    """

    files: tuple[LabelFile, ...]
    stream: TokenStream
    record: np.dtype
    block_tokens: int
    num_positions: int

    @property
    def top_k(self) -> int:
        """How many ids are kept of one position."""
        return self.record["ids"].shape[0]

    @property
    def num_blocks(self) -> int:
        """How many blocks hold all positions."""
        return -(-self.num_positions // self.block_tokens)

    def read(self, start: int, stop: int) -> Labels:
        """The labels of the positions from `start` to before `stop`, ids as int64; zeros where nothing was written."""
        assert 0 <= start <= stop <= self.num_positions, (start, stop, self.num_positions)
        parts = [
            np.memmap(path, self.record, "r", offset, (num_bytes // self.record.itemsize,)).view(np.ndarray)
            for path, offset, num_bytes in self._spans(start, stop)
        ]
        ids, logs, tail = ([part[name] for part in (np.empty(0, self.record), *parts)] for name in Labels._fields)
        return Labels(np.concatenate(ids, dtype=np.int64), np.concatenate(logs), np.concatenate(tail))

    def write(self, start: int, labels: Labels) -> None:
        """Writes whole blocks, the first of them at position `start`; a kill leaves each right or `faulty`.

        Raises:
            ValueError: a label is not a number.
            OSError: there is no room.
        """
        stop, at = start + len(labels.tail), 0
        assert start % self.block_tokens == 0 and stop <= self.num_positions, (start, stop)
        assert stop % self.block_tokens == 0 or stop == self.num_positions, (stop, self.block_tokens)
        data, block_bytes = memoryview(_packed(start, labels, self.record)), self.block_tokens * self.record.itemsize
        for path, offset, num_bytes in self._spans(start, stop):
            _write_at(path, offset, data[at : at + num_bytes])
            at += num_bytes
        for block, at in enumerate(range(0, len(data), block_bytes), start // self.block_tokens):
            _write_at(*self._digest_place(block), sha256(data[at : at + block_bytes]).digest())

    def faulty(self, blocks: np.ndarray) -> np.ndarray:
        """Those of `blocks` (N,) int64 that are not written or whose bytes are not those that were written: (M,) int64.

        Reads them on HASHING_THREADS threads, each HASHED_BYTES at a time.
        """
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            are_right = list(pool.map(self._are_right, np.array_split(blocks, HASHING_THREADS)))
        return blocks[~np.concatenate(are_right)]

    def sync(self) -> None:
        """Makes durable what this machine wrote."""
        for file in self.files:
            with file.path.open("rb") as opened:
                os.fsync(opened.fileno())

    def _are_right(self, blocks: np.ndarray) -> np.ndarray:
        return np.array([self._is_right(block) for block in blocks.tolist()], dtype=bool)

    def _is_right(self, block: int) -> bool:
        written = b"".join(_read_at(*self._digest_place(block), DIGEST_BYTES))
        return any(written) and written == self._digest(block)

    def _digest(self, block: int) -> bytes:
        digest, start = sha256(), block * self.block_tokens
        for span in self._spans(start, min(start + self.block_tokens, self.num_positions)):
            for piece in _read_at(*span):
                digest.update(piece)
        return digest.digest()

    def _digest_place(self, block: int) -> tuple[Path, int]:
        """The file that holds the digest of a block, and at which byte: that of the block's first position."""
        start = block * self.block_tokens
        number, _ = next(self.stream.places(start, start + 1))
        path, header = self.files[number]
        return path, header.table_offset + (block - header.first_block) * DIGEST_BYTES

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """Where the records of the positions [start, stop) lie: file, byte offset, number of bytes."""
        size = self.record.itemsize
        for number, inside in self.stream.places(start, stop):
            yield self.files[number].path, LABEL_HEADER_BYTES + inside.start * size, (inside.stop - inside.start) * size


def write_shard(path: Path, ids: np.ndarray | Iterable[np.ndarray], vocab_size: int, fingerprint: str) -> int:
    """Writes (T,) ids, or arrays of ids one after another, and returns how many; either the whole file appears or none.

    A token takes 2 bytes if `vocab_size` <= 65536, else 4. `fingerprint` is the tokenizer's, 64 hex digits.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            num_tokens = _write(file, [ids] if isinstance(ids, np.ndarray) else ids, vocab_size, bytes.fromhex(fingerprint))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return num_tokens


def open_shard(path: Path) -> Shard:
    """Maps a file after a look at its header and size; hashes nothing.

    Raises:
        ValueError: not there, not a shard, of another version, truncated or too long.
    """
    header = _read_header(path)
    _, _, token_bytes, num_tokens, fingerprint, digest = HEADER.unpack(header)
    expected = HEADER.size + num_tokens * token_bytes + _num_blocks(num_tokens * token_bytes) * DIGEST_BYTES
    if path.stat().st_size != expected:
        raise ValueError(f"{path} ends at byte {path.stat().st_size} and, by its header at byte 0, at {expected}; {REMEDY}")
    kind = f"<u{token_bytes}"
    ids = np.memmap(path, kind, "r", HEADER.size, (num_tokens,)).view(np.ndarray) if num_tokens else np.empty(0, kind)
    return Shard(path, ids, fingerprint.hex(), digest.hex())


def verify_shard(path: Path) -> None:
    """Hashes the whole file.

    Raises:
        ValueError: as `open_shard`; or a byte has changed: names the offset of the first bad block, of the first digest that
            is not that of its block, or of the header.
    """
    payload_bytes = open_shard(path).ids.nbytes
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        file.seek(HEADER.size + payload_bytes)
        table = file.read()
        file.seek(HEADER.size)
        start = _first_bad_block(file, payload_bytes, table)
    is_signed = header[DIGEST_AT] == _header_digest(header, table)
    if start is not None and is_signed:
        raise ValueError(f"{path}: the block at byte {HEADER.size + start} is damaged; {REMEDY}")
    if start is not None:
        at = HEADER.size + payload_bytes + start // BLOCK_BYTES * DIGEST_BYTES
        raise ValueError(f"{path}: the digest table is damaged at byte {at}; {REMEDY}")
    if not is_signed:
        raise ValueError(f"{path}: the header at byte 0 is damaged; {REMEDY}")


def create_labels(
    folder: Path, stream: TokenStream, top_k: int, vocab_size: int, block_tokens: int, num_positions: int, identity: str
) -> None:
    """Makes `folder` and the label files that are not there, without any label; each appears whole or not at all.

    Several processes may do so at once; on a file system without hard links, one at a time. An id takes 2 bytes if `vocab_size`
    <= 65536, else 4; `identity` is 64 hex digits: whose labels they are.

    Raises:
        OSError: there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path, header in _label_headers(folder, stream, top_k, vocab_size, block_tokens, num_positions, identity):
        if not path.exists():
            _create_labels(path, header)
    sync_folder(folder)


def open_labels(
    folder: Path, stream: TokenStream, top_k: int, vocab_size: int, block_tokens: int, num_positions: int, identity: str
) -> LabelStream:
    """The files that `create_labels` made with the same arguments; looks at headers and sizes, hashes no label.

    Raises:
        ValueError: a file is absent, no label file, of another version, damaged in its header, truncated, or was made for
            something else: names the first that differs.
    """
    headers = _label_headers(folder, stream, top_k, vocab_size, block_tokens, num_positions, identity)
    files = tuple(_open_labels(path, header) for path, header in headers)
    return LabelStream(files, stream, _record(top_k, _id_bytes(vocab_size)), block_tokens, num_positions)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write(file, arrays: Iterable[np.ndarray], vocab_size: int, fingerprint: bytes) -> int:
    token_bytes = _id_bytes(vocab_size)
    file.write(bytes(HEADER.size))
    table = bytearray()
    for block in _blocks(arrays, vocab_size, f"<u{token_bytes}"):
        file.write(block)
        table += sha256(block).digest()
    num_tokens = (file.tell() - HEADER.size) // token_bytes
    file.write(table)
    header = HEADER.pack(MAGIC, VERSION, token_bytes, num_tokens, fingerprint, bytes(DIGEST_BYTES))
    file.seek(0)
    file.write(header[: DIGEST_AT.start] + _header_digest(header, table) + header[DIGEST_AT.stop :])
    return num_tokens


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


def _first_bad_block(file: IO[bytes], payload_bytes: int, table: bytes) -> int | None:
    """Where in the tokens the first block starts whose digest is not the table's."""
    for start in range(0, payload_bytes, BLOCK_BYTES):
        at = start // BLOCK_BYTES * DIGEST_BYTES
        if sha256(file.read(min(BLOCK_BYTES, payload_bytes - start))).digest() != table[at : at + DIGEST_BYTES]:
            return start
    return None


def _header_digest(header: bytes, table: bytes | bytearray) -> bytes:
    return sha256(header[: DIGEST_AT.start] + bytes(DIGEST_BYTES) + header[DIGEST_AT.stop :] + table).digest()


def _read_header(path: Path) -> bytes:
    header = _read_start(path, HEADER.size, REMEDY)
    magic, version, token_bytes, *_ = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path} is not a shard, at byte 0 it has {magic!r}; {REMEDY}")
    if version != VERSION or token_bytes not in (2, 4):
        kind = f"version {version} with {token_bytes} bytes a token"
        raise ValueError(f"{path} is of {kind} by its header at byte 0, not of version {VERSION}; {REMEDY}")
    return header


def _num_blocks(payload_bytes: int) -> int:
    return -(-payload_bytes // BLOCK_BYTES)


def _id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 2**16 else 4


def _read_start(path: Path, num_bytes: int, remedy: str) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(num_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if len(header) < num_bytes:
        raise ValueError(f"{path} ends at byte {len(header)}, within the {num_bytes} of its header; {remedy}")
    return header


def _record(top_k: int, id_bytes: int) -> np.dtype:
    """What is kept of one position, without gaps."""
    return np.dtype([("ids", f"<u{id_bytes}", (top_k,)), ("logs", "<f2", (top_k,)), ("tail", "<f4")])


def _packed(start: int, labels: Labels, record: np.dtype) -> bytes:
    """The labels of the positions from `start` on as records."""
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


def _label_headers(
    folder: Path, stream: TokenStream, top_k: int, vocab_size: int, block_tokens: int, num_positions: int, identity: str
) -> Iterator[tuple[Path, LabelHeader]]:
    """Each label file and what it is made for."""
    assert 0 <= num_positions <= stream.num_tokens, (num_positions, stream.num_tokens)
    shared = (top_k, _id_bytes(vocab_size), block_tokens, num_positions)
    for shard, first in zip(stream.shards, stream.borders.tolist(), strict=False):
        digests = map(bytes.fromhex, (shard.sha256, shard.fingerprint, identity))
        yield folder / f"{shard.path.stem}.labels", LabelHeader(*shared, first, len(shard.ids), *digests)


def _create_labels(path: Path, header: LabelHeader) -> None:
    packed = LABEL_HEADER.pack(LABEL_MAGIC, LABEL_VERSION, *header)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(packed + sha256(packed).digest())
            file.truncate(header.file_bytes)
            file.flush()
            os.fsync(file.fileno())
        _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return  # Another process was first, and may have written into it.
    except OSError as fault:
        if fault.errno not in NO_HARD_LINKS:
            raise
        os.replace(temporary, path)


def _open_labels(path: Path, wanted: LabelHeader) -> LabelFile:
    remedy = f"delete the folder {path.parent} and the teacher is asked again"
    found = _read_label_header(path, remedy)
    for name, one, other in zip(LabelHeader._fields, found, wanted, strict=True):
        if one != other:
            raise ValueError(f"{path} was made for {name} {_shown(one)}, not {_shown(other)}; {remedy}")
    if path.stat().st_size != wanted.file_bytes:
        raise ValueError(f"{path} ends at byte {path.stat().st_size}, not at {wanted.file_bytes}; {remedy}")
    return LabelFile(path, wanted)


def _read_label_header(path: Path, remedy: str) -> LabelHeader:
    start = _read_start(path, LABEL_HEADER_BYTES, remedy)
    packed, digest = start[: LABEL_HEADER.size], start[LABEL_HEADER.size :]
    magic, version, *fields = LABEL_HEADER.unpack(packed)
    if magic != LABEL_MAGIC:
        raise ValueError(f"{path} holds no labels, at byte 0 it has {magic!r}; {remedy}")
    if version != LABEL_VERSION:
        raise ValueError(f"{path} is of version {version}, not of version {LABEL_VERSION}; {remedy}")
    if digest != sha256(packed).digest():
        raise ValueError(f"{path}: the header at byte 0 is damaged; {remedy}")
    return LabelHeader(*fields)


def _shown(value: int | bytes) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else str(value)


def _read_at(path: Path, offset: int, num_bytes: int) -> Iterator[bytes]:
    """The bytes from `offset` on, HASHED_BYTES at a time; fewer where the file ends."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while num_bytes and (piece := file.read(min(num_bytes, HASHED_BYTES))):
            num_bytes -= len(piece)
            yield piece


def _write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    number = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(number, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(number)
