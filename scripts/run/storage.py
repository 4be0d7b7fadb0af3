"""Bytes on the disk: durable writes, files read and written in blocks with digests. Knows no model and no run.

A file is digested in blocks of HASH_BYTES, so that a change is found and placed without the whole file in memory.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
import time
from collections import ChainMap, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scripts.config import HASH_THREADS, RUN_DIR_POLL_SECONDS, WRITE_BACK_BYTES
from scripts.model.huggingface import SAFETENSORS_DTYPES, bytes_of, read_all

HASH_BYTES = 2**22
DIGEST_BYTES = 32
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileRecord(NamedTuple):
    """What the manifest knows of a file: its length, and the sha256 in hex of each block of HASH_BYTES."""

    num_bytes: int
    digests: list[str]


class Block(NamedTuple):
    """Bytes start..stop of the file `name`, and the sha256 in hex that they had when they were saved."""

    name: str
    start: int
    stop: int
    digest: str


def write_text(path: Path, text: str) -> FileRecord:
    """Writes a text file and returns its digests. The file appears whole or, when it raises OSError, not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        record = write_blocks(draft, iter([memoryview(text.encode())]))
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return record


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Writes a safetensors file in a stream and returns its digests. The library's own writer copies all tensors first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype, stop = SAFETENSORS_DTYPES[tensor.dtype], offset + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return write_blocks(path, _pieces(struct.pack("<Q", len(text)) + text, tensors))


def write_blocks(path: Path, pieces: Iterator[memoryview]) -> FileRecord:
    """Writes the pieces one after another, fsyncs, and returns the digests, which HASH_THREADS threads make meanwhile."""
    digests, waiting, num_bytes, started = [], deque(), 0, 0
    with ThreadPoolExecutor(HASH_THREADS) as pool, path.open("wb", buffering=0) as file:
        for block in _blocks(pieces):
            waiting.append(pool.submit(sha256, block))
            for piece in block:
                write_all(file.fileno(), piece)
                num_bytes += len(piece)
            if num_bytes - started >= WRITE_BACK_BYTES:  # Writing back begins now, which leaves the fsync little to do.
                os.posix_fadvise(file.fileno(), started, num_bytes - started, os.POSIX_FADV_DONTNEED)
                started = num_bytes
            if len(waiting) > 2 * HASH_THREADS:
                digests.append(waiting.popleft().result())
        os.fsync(file.fileno())
        digests += [each.result() for each in waiting]
    return FileRecord(num_bytes, digests)


def link(path: Path, other: Path) -> None:
    """Gives a file a second name, in place of what has that name; a copy of it where there are no hard links."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def write_all(descriptor: int, data: memoryview) -> None:
    """Writes all bytes to an open file, in as many calls as the kernel wants."""
    while data:
        data = data[os.write(descriptor, data) :]


def find_changed(folder: Path, records: dict[str, FileRecord], num_threads: int) -> str | None:
    """What is wrong with the first file by name that is missing or changed, or None; each thread holds one block in memory."""
    blocks = []
    for name, record in sorted(records.items()):
        if not (folder / name).is_file():
            return f"{name} is missing"
        num_bytes = (folder / name).stat().st_size
        if num_bytes != record.num_bytes:
            return f"{name} was changed after it was saved: it has {num_bytes} bytes and had {record.num_bytes}"
        for start, digest in zip(range(0, num_bytes, HASH_BYTES), record.digests, strict=True):
            blocks.append(Block(name, start, min(start + HASH_BYTES, num_bytes), digest))
    with ThreadPoolExecutor(num_threads) as pool:
        shares = (blocks[thread::num_threads] for thread in range(num_threads))
        faults = dict(ChainMap(*pool.map(partial(_faults_of_blocks, folder), shares)))
    return faults[min(faults)] if faults else None


def block_at(path: Path, position: int) -> memoryview:
    """The block of a file that starts at byte `position`: HASH_BYTES, fewer at its end."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(HASH_BYTES, path.stat().st_size - position)))
        read_all(file.fileno(), buffer, position)
    return buffer


def lock(descriptor: int) -> bool:
    """Whether an open folder is locked for this process now: nobody else has it, or its file system has no locks."""
    return _flock(descriptor) in (0, *NO_LOCKS)


def lock_words(descriptor: int, folder: Path) -> str | None:
    """What a person is told where the file system of a folder that `lock` was called for has no locks; else None."""
    number = _flock(descriptor)
    if number not in NO_LOCKS:
        return None
    why = f"The file system of {folder} has no locks ({os.strerror(number)})"
    return f"{why}: nothing keeps a second launch out of it, so start one alone, or name a folder on another disk"


def hold(folder: Path, words: str) -> int:
    """Makes a folder and locks it: the descriptor of the lock, which ends with the process. Prints `words` if it must wait."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        if not lock(descriptor):
            print(words, flush=True)
            while not lock(descriptor):
                time.sleep(RUN_DIR_POLL_SECONDS)
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            if unlocked := lock_words(descriptor, folder):
                print(unlocked, flush=True)
            return descriptor
        os.close(descriptor)  # The process that had it has removed the folder.


def sha256(block: list[memoryview]) -> str:
    """The sha256 in hex of pieces of bytes, one after another."""
    digest = hashlib.sha256()
    for piece in block:
        digest.update(piece)
    return digest.hexdigest()


def forget_pages(path: Path) -> None:
    """Drops the file from the page cache, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flock(descriptor: int) -> int:
    """Tries to lock an open folder for this process: 0, or why not as `errno`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        return fault.errno or errno.EIO
    return 0


def _faults_of_blocks(folder: Path, blocks: list[Block]) -> dict[Block, str]:
    buffer, faults = memoryview(bytearray(HASH_BYTES)), {}
    for name, blocks_of_file in groupby(blocks, lambda block: block.name):
        with (folder / name).open("rb", buffering=0) as file:
            for block in blocks_of_file:
                data = buffer[: block.stop - block.start]
                try:
                    read_all(file.fileno(), data, block.start)
                    if sha256([data]) != block.digest:
                        faults[block] = f"{name} was changed after it was saved, in the block at byte {block.start}"
                except OSError as fault:
                    faults[block] = f"{name} cannot be read at byte {block.start}: {fault.strerror}"
    return faults


def _pieces(header: bytes, tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The file's bytes in pieces of at most HASH_BYTES; a tensor on the GPU is copied to the host piece by piece."""
    yield memoryview(header)
    for tensor in tensors.values():
        for piece in tensor.reshape(-1).split(HASH_BYTES // tensor.element_size()):
            yield bytes_of(piece.cpu())


def _blocks(pieces: Iterator[memoryview]) -> Iterator[list[memoryview]]:
    """Regroups bytes into blocks of HASH_BYTES, the last one shorter, without a copy."""
    block, room = [], HASH_BYTES
    for piece in pieces:
        while len(piece):
            block.append(piece[:room])
            piece, room = piece[room:], room - len(block[-1])
            if not room:
                yield block
                block, room = [], HASH_BYTES
    if block:
        yield block
