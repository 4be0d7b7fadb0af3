"""The byte format of token files: header, checksums, atomic write, memory-mapped read. Only this room knows bytes.

A file is a header of 128 bytes, the tokens (little-endian, 2 or 4 bytes each), and the sha256 of each block of 4 MiB of
tokens. The header holds the sha256 of itself and of that table, so every byte is covered and a bad block can be named.
Knows nothing of text, nor of what the ids mean.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

MAGIC = b"TIGHTFIT"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32s32s40x")  # magic, version, bytes per token, tokens, tokenizer fingerprint, sha256, zeros
DIGEST_AT = slice(56, 88)
DIGEST_BYTES = 32
BLOCK_BYTES = 2**22
REMEDY = "delete the data_dir that holds it and prepare the data again"


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
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        first = int(np.searchsorted(self.borders, start, side="right")) - 1
        for shard, begin in zip(self.shards[first:], self.borders[first:].tolist(), strict=False):
            if begin >= stop:
                break
            yield shard.ids[max(start - begin, 0) : stop - begin]


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


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write(file, arrays: Iterable[np.ndarray], vocab_size: int, fingerprint: bytes) -> int:
    token_bytes = 2 if vocab_size <= 2**16 else 4
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
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    if len(header) < HEADER.size:
        raise ValueError(f"{path} ends at byte {len(header)}, within the {HEADER.size} of its header; {REMEDY}")
    magic, version, token_bytes, *_ = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path} is not a shard, at byte 0 it has {magic!r}; {REMEDY}")
    if version != VERSION or token_bytes not in (2, 4):
        kind = f"version {version} with {token_bytes} bytes a token"
        raise ValueError(f"{path} is of {kind} by its header at byte 0, not of version {VERSION}; {REMEDY}")
    return header


def _num_blocks(payload_bytes: int) -> int:
    return -(-payload_bytes // BLOCK_BYTES)
