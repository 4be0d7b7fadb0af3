"""Laws of ds/shards.py: what is written comes back, no byte changes unseen, a file or a block is whole or absent."""

import errno
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import Planted
from hypothesis import assume, given
from hypothesis import strategies as st

from ds import shards
from ds.shards import Labels, LabelStream, Shard, TokenStream, open_shard, verify_shard, write_shard

PRINT = "ab" * 32
IDENTITY = "cd" * 32
ID_LISTS = st.lists(st.lists(st.integers(0, 299), max_size=40), max_size=6)


def stream_of(paths: list[Path]) -> TokenStream:
    return TokenStream(tuple(map(open_shard, paths)), PRINT)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)


@given(
    parts=ID_LISTS, kind=st.sampled_from(["u2", "u4", "i4", "i8", "u8", ">u2"]), vocab_size=st.sampled_from([300, 65536, 65537])
)
def test_shard_gives_back_the_ids(tmp_path_factory, parts, kind, vocab_size):
    path = tmp_path_factory.getbasetemp() / "round.bin"
    ids = np.array([number for part in parts for number in part], dtype=np.int64)
    assert write_shard(path, (np.array(part, dtype=kind) for part in parts), vocab_size, PRINT) == len(ids)
    shard = open_shard(path)
    verify_shard(path)
    assert shard.ids.tolist() == ids.tolist() and shard.fingerprint == PRINT
    assert shard.ids.dtype.itemsize == (2 if vocab_size <= 65536 else 4)
    written = path.read_bytes()
    write_shard(path, ids, vocab_size, PRINT)
    assert path.read_bytes() == written


@pytest.mark.parametrize(("vocab_size", "largest"), [(65536, 65535), (65537, 65536), (2**32, 2**32 - 1)])
def test_greatest_id_fits(tmp_path, vocab_size, largest):
    write_shard(tmp_path / "a.bin", np.array([0, largest]), vocab_size, PRINT)
    assert open_shard(tmp_path / "a.bin").ids.tolist() == [0, largest]


@given(number=st.one_of(st.integers(-(2**40), -1), st.integers(300, 2**40)))
def test_id_outside_the_vocabulary_is_refused_and_leaves_no_file(tmp_path_factory, number):
    folder = tmp_path_factory.mktemp("outside")
    with pytest.raises(ValueError, match=f"id {number} is outside the vocabulary of 300"):
        write_shard(folder / "a.bin", np.array([1, number]), 300, PRINT)
    assert list(folder.iterdir()) == []


def test_failed_write_leaves_the_old_shard_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100), 300, PRINT)
    before = path.read_bytes()

    def breaks():
        yield np.arange(200)
        raise RuntimeError("stopped half way")

    with pytest.raises(RuntimeError):
        write_shard(path, breaks(), 300, PRINT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_shard_that_is_cut_while_it_is_read_is_named(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100), 300, PRINT)
    stream = TokenStream((open_shard(tmp_path / "a.bin"),), PRINT)
    os.truncate(tmp_path / "a.bin", 128 + 50)
    assert stream.read(0, 25).tolist() == list(range(25))
    for start, stop in ((10, 50), (24, 26), (90, 100)):
        with pytest.raises(ValueError, match=rf"a\.bin ends before byte {128 + 2 * stop}; delete"):
            stream.read(start, stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_BYTES", 64)
        write_shard(path, np.arange(100) * 2, 300, PRINT)
    return path.read_bytes()


@given(data=st.data(), mask=st.integers(1, 255))
def test_flipped_byte_anywhere_is_named(tmp_path_factory, whole, data, mask):
    path = tmp_path_factory.getbasetemp() / "flipped.bin"
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
    with pytest.raises(ValueError) as caught:
        verify_shard(path)
    message = str(caught.value)
    assert str(path) in message and "delete" in message and "\n" not in message
    assert re.search(rf"byte {damaged_place(at)}\b", message)


def damaged_place(at: int) -> int:
    """What is named for a change at byte `at`: the block, its digest in the table behind 200 bytes of tokens, or the header."""
    if at < 128:
        return 0
    return 128 + (at - 128) // 64 * 64 if at < 328 else 328 + (at - 328) // 32 * 32


def test_every_byte_is_covered(tmp_path, whole):
    path = tmp_path / "a.bin"
    path.write_bytes(whole)
    verify_shard(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError):
            verify_shard(path)


@given(data=st.data())
def test_other_length_is_refused_at_opening(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "length.bin"
    length = data.draw(st.integers(0, len(whole) + 300).filter(lambda length: length != len(whole)))
    path.write_bytes((whole + bytes(300))[:length])
    with pytest.raises(ValueError, match=rf"{path.name} ends at byte {length}\b.* delete"):
        open_shard(path)


@given(data=st.data(), inserted=st.binary(max_size=40))
def test_bytes_cut_out_or_put_in_anywhere_are_refused_with_file_and_offset(tmp_path_factory, whole, data, inserted):
    path = tmp_path_factory.getbasetemp() / "cut.bin"
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 99, len(whole))) | st.just(start) | st.just(len(whole)))
    changed = whole[:start] + inserted + whole[stop:]
    assume(changed != whole)
    path.write_bytes(changed)
    with pytest.raises(ValueError) as caught:
        verify_shard(path)
    message = str(caught.value)
    assert str(path) in message and re.search(r"byte \d+", message) and "delete" in message and "\n" not in message


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_as_a_shard_is_refused_and_never_runs(tmp_path, whole, protocol):
    marker, path = tmp_path / "marker", tmp_path / "a.bin"
    planted = pickle.dumps(Planted(marker), protocol)
    for content in (planted, planted + whole, b"PK\x03\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.bin (is not a shard, at byte 0|ends at byte).*; delete"):
            verify_shard(path)
    assert not marker.exists()
    pickle.loads(planted)
    assert marker.exists()


def test_file_that_is_no_shard_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match=r"absent.bin cannot be read \(No such file"):
        open_shard(tmp_path / "absent.bin")
    path = tmp_path / "a.bin"
    path.write_bytes(b"something else, long enough" * 9)
    with pytest.raises(ValueError, match="is not a shard"):
        open_shard(path)
    path.write_bytes(whole[:8] + b"\x02" + whole[9:])
    with pytest.raises(ValueError, match="version 2"):
        open_shard(path)


@given(parts=ID_LISTS, data=st.data())
def test_stream_is_the_concatenation_of_its_shards(tmp_path_factory, parts, data):
    folder = tmp_path_factory.getbasetemp()
    for number, part in enumerate(parts):
        write_shard(folder / f"stream-{number}.bin", np.array(part, dtype=np.int64), 300, PRINT)
    stream = stream_of([folder / f"stream-{number}.bin" for number in range(len(parts))])
    ids = [number for part in parts for number in part]
    assert stream.num_tokens == len(ids)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    read, views = stream.read(start, stop), list(stream.parts(start, stop))
    assert read.dtype == np.int64 and read.tolist() == ids[start:stop]
    assert all(view.dtype == np.uint16 and not view.flags.owndata for view in views if len(view))
    assert [number for view in views for number in view.tolist()] == ids[start:stop]


def test_more_shards_than_a_process_may_have_open_files_are_read(tmp_path):
    shard = tmp_path / "shard.bin"
    write_shard(shard, np.arange(5), 300, PRINT)
    before, limits = num_open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)
    stream = stream_of([shard] * 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, limits[1]))
    try:
        assert stream.read(0, 1000).tolist() == list(range(5)) * 200
        assert sum(map(len, stream.parts(3, 997))) == 994 and num_open_files() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_stream_refuses_a_shard_of_another_tokenizer(tmp_path):
    for name, fingerprint in (("a.bin", PRINT), ("b.bin", "cd" * 32)):
        write_shard(tmp_path / name, np.arange(9), 300, fingerprint)
    stream_of([tmp_path / "a.bin"])
    with pytest.raises(ValueError, match=r"b.bin was made with tokenizer cdcd.*, not with abab.*delete"):
        stream_of([tmp_path / "a.bin", tmp_path / "b.bin"])


def stream_with(sizes: list[int]) -> TokenStream:
    """Shards of these many tokens; none of them is on the disk."""
    shards = (Shard(Path(f"train-{n}.bin"), size, 2, PRINT, f"{n:064x}") for n, size in enumerate(sizes))
    return TokenStream(tuple(shards), PRINT)


def labels_in(folder: Path, stream: TokenStream, num_positions: int | None = None, **changes) -> LabelStream:
    """Label files made and checked; `changes` are of what they are for."""
    changes |= {"num_positions": num_positions} if num_positions is not None else {}
    labels = labels_for(folder, stream, **changes)
    labels.create()
    labels.check()
    return labels


def labels_for(folder: Path, stream: TokenStream, **changes) -> LabelStream:
    """Labels that may not be on the disk."""
    fields = {"top_k": 2, "vocab_size": 300, "block_tokens": 10, "num_positions": stream.num_tokens, "identity": IDENTITY}
    return LabelStream(folder, stream, **(fields | changes))


def some_labels(num_tokens: int, top_k: int, largest_id: int, seed: int = 0) -> Labels:
    random = np.random.default_rng(seed)
    ids = random.integers(0, largest_id, (num_tokens, top_k), endpoint=True)
    logs = -random.exponential(3, (num_tokens, top_k)).astype(np.float16)
    return Labels(ids, logs, random.random(num_tokens, np.float32))


def part_of(labels: Labels, start: int, stop: int) -> Labels:
    return Labels(*(field[start:stop] for field in labels))


def same(one: Labels, other: Labels) -> bool:
    return all(np.array_equal(*fields) and len(fields[0]) == len(fields[1]) for fields in zip(one, other, strict=True))


@given(
    sizes=st.lists(st.integers(0, 40), max_size=5),
    block_tokens=st.integers(1, 50),
    top_k=st.integers(1, 4),
    id_bytes=st.sampled_from([2, 4]),
    data=st.data(),
)
def test_labels_come_back_at_any_split_into_shards_and_blocks(tmp_path_factory, sizes, block_tokens, top_k, id_bytes, data):
    vocab_size, num_positions = 2 ** (8 * id_bytes), data.draw(st.integers(0, sum(sizes)))
    place = {"top_k": top_k, "vocab_size": vocab_size, "block_tokens": block_tokens, "num_positions": num_positions}
    labels = labels_in(tmp_path_factory.mktemp("labels"), stream_with(sizes), **place)
    assert labels.record["ids"].base.itemsize == id_bytes
    assert labels.num_blocks == -(-num_positions // block_tokens)
    blocks, said = np.arange(labels.num_blocks), some_labels(num_positions, top_k, vocab_size - 1)
    assert labels.faulty(blocks).tolist() == blocks.tolist()
    written = data.draw(st.permutations(blocks.tolist()))[: data.draw(st.integers(0, labels.num_blocks))]
    for block in written:
        start = block * block_tokens
        labels.write(start, part_of(said, start, min(start + block_tokens, num_positions)))
        assert same(labels.read(start, start), part_of(said, 0, 0))
        assert same(labels.read(start, min(start + block_tokens, num_positions)), part_of(said, start, start + block_tokens))
    assert labels.faulty(blocks).tolist() == sorted(set(blocks.tolist()) - set(written))
    labels.write(0, said)
    labels.sync()
    start = data.draw(st.integers(0, num_positions))
    stop = data.draw(st.integers(start, num_positions))
    again = labels_in(labels.folder, labels.stream, **place)
    assert same(again.read(start, stop), part_of(said, start, stop)) and len(again.faulty(blocks)) == 0
    assert [field.dtype for field in again.read(start, stop)] == [np.int64, np.float16, np.float32]


SIZES, NUM_POSITIONS, BLOCK_TOKENS, RECORD_BYTES, HEADER_BYTES = [17, 0, 4, 30], 48, 10, 2 * (2 + 2) + 4, 184


def owners() -> list[list[int | None]]:
    """The block that each byte behind the headers belongs to, by file; byte by byte, from what the format says."""
    borders = np.cumsum([0, *SIZES]).tolist()
    files = []
    for begin, end in zip(borders, borders[1:], strict=False):
        records = [place // BLOCK_TOKENS if place < NUM_POSITIONS else None for place in range(begin, end)]
        digests = [place // BLOCK_TOKENS for place in range(begin, end) if place % BLOCK_TOKENS == 0]
        files.append([block for block in records for _ in range(RECORD_BYTES)])
        files[-1] += [block if block * BLOCK_TOKENS < NUM_POSITIONS else None for block in digests for _ in range(32)]
    return files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> LabelStream:
    labels = labels_in(tmp_path_factory.mktemp("written"), stream_with(SIZES), NUM_POSITIONS)
    labels.write(0, some_labels(NUM_POSITIONS, 2, 299))
    return labels


def test_label_file_is_header_records_and_digests(written):
    sizes = [HEADER_BYTES + len(blocks) for blocks in owners()]
    assert [file.path.stat().st_size for file in written.files] == sizes
    assert [file.path.name for file in written.files] == [f"train-{number}.labels" for number in range(4)]
    said, content = some_labels(NUM_POSITIONS, 2, 299), written.files[0].path.read_bytes()
    packed = [struct.pack("<2H2ef", *said.ids[n], *said.logs[n], said.tail[n]) for n in range(NUM_POSITIONS)]
    assert content[HEADER_BYTES:-64] == b"".join(packed[:17])
    assert content[-64:] == b"".join(sha256(b"".join(packed[start : start + 10])).digest() for start in (0, 10))


@given(data=st.data(), mask=st.integers(1, 255))
def test_flipped_byte_makes_its_block_faulty_and_no_other(written, data, mask):
    number = data.draw(st.sampled_from([0, 2, 3]))
    blocks = owners()[number]
    at = data.draw(st.integers(0, len(blocks) - 1))
    path = written.files[number].path
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + at] ^= mask
    try:
        overwrite(path, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "HASHED_BYTES", data.draw(st.sampled_from([1, 7, 2**22])))
            found = written.faulty(np.arange(5)).tolist()
    finally:
        content[HEADER_BYTES + at] ^= mask
        overwrite(path, content)
    assert found == [blocks[at]] if blocks[at] is not None else found == []


def overwrite(path: Path, content: bytes | bytearray) -> None:
    with path.open("rb+") as file:
        file.write(content)


@given(data=st.data(), piece_bytes=st.integers(1, 300))
def test_only_whole_blocks_count_whatever_part_of_their_bytes_arrived(tmp_path_factory, written, data, piece_bytes):
    """A kill or a power cut leaves some of the pieces that were written, and zeros, in any order."""
    labels = labels_in(tmp_path_factory.mktemp("partly"), written.stream, NUM_POSITIONS)
    lost = set()
    for file, whole, blocks in zip(labels.files, written.files, owners(), strict=True):
        before, after = file.path.read_bytes(), whole.path.read_bytes()
        content = bytearray(after)
        for start in range(HEADER_BYTES, len(after), piece_bytes):
            if data.draw(st.integers(0, 9)) == 0:
                content[start : start + piece_bytes] = before[start : start + piece_bytes]
        lost |= {block for block, one, other in zip(blocks, content[184:], after[184:], strict=True) if one != other}
        overwrite(file.path, content)
    assert labels.faulty(np.arange(5)).tolist() == sorted(lost)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from ds.shards import Labels, LabelStream, Shard, TokenStream

folder, first_block, stride, num_rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
shards = (Shard(Path(f"train-{n}.bin"), 10000, 2, "ab" * 32, f"{n:064x}") for n in range(3))
stream = TokenStream(tuple(shards), "ab" * 32)
labels = LabelStream(folder, stream, 32, 60000, 4096, 29999, "cd" * 32)
labels.create()
labels.check()
print("ready", flush=True)
for number in range(num_rounds):
    for start in range(first_block * 4096, 29999, stride * 4096):
        shape = (min(4096, 29999 - start), 32)
        ids, logs = np.full(shape, number % 60000), np.full(shape, -1, np.float16)
        labels.write(start, Labels(ids, logs, np.full(shape[0], number, np.float32)))
"""


def start_writer(folder: Path, first_block: int, stride: int, num_rounds: int) -> subprocess.Popen:
    words = [str(folder), str(first_block), str(stride), str(num_rounds)]
    environment = os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WRITER, *words], env=environment, stdout=subprocess.PIPE, text=True)


def writers_labels(folder: Path) -> LabelStream:
    place = {"top_k": 32, "vocab_size": 60000, "block_tokens": 4096, "num_positions": 29999}
    return labels_in(folder, stream_with([10000] * 3), **place)


def test_killed_writer_leaves_each_block_faulty_or_right(tmp_path):
    """The writer puts the number of its round into every label, so a block of two rounds would show."""
    for seconds in (0, 0.01, 0.05, 0.1):
        writer = start_writer(tmp_path, 0, 1, 10**9)
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(seconds)
        finally:
            writer.kill()
            writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        labels = writers_labels(tmp_path)
        faulty = labels.faulty(np.arange(labels.num_blocks)).tolist()
        for block in set(range(labels.num_blocks)) - set(faulty):
            said = labels.read(block * 4096, min(block * 4096 + 4096, labels.num_positions))
            assert (said.ids == said.ids[0, 0]).all() and (said.tail == said.tail[0]).all() and (said.logs == -1).all()
            assert said.ids[0, 0] == said.tail[0] % 60000


def test_processes_write_different_blocks_of_the_same_files_at_once(tmp_path):
    writers = [start_writer(tmp_path, first, 2, 5) for first in range(2)]
    try:
        outputs = [writer.communicate(timeout=60)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert outputs == ["ready\n"] * 2 and [writer.returncode for writer in writers] == [0, 0]
    labels = writers_labels(tmp_path)
    assert len(labels.faulty(np.arange(labels.num_blocks))) == 0
    assert (labels.read(0, labels.num_positions).tail == 4).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train-{number}.labels" for number in range(3)]


@given(
    sizes=st.lists(st.integers(128, 5000), min_size=1, max_size=4),
    block_tokens=st.integers(64, 6000),
    top_k=st.integers(1, 300),
    vocab_size=st.sampled_from([300, 65536, 65537]),
)
def test_labels_take_at_most_six_bytes_an_id_and_eight_more(tmp_path_factory, sizes, block_tokens, top_k, vocab_size):
    fields = {"top_k": top_k, "vocab_size": vocab_size, "block_tokens": block_tokens}
    labels = labels_in(tmp_path_factory.mktemp("sizes"), stream_with(sizes), **fields)
    for file, num_tokens in zip(labels.files, sizes, strict=True):
        assert file.path.stat().st_size <= (6 * top_k + 8) * num_tokens


def test_labels_that_are_not_written_take_no_room(tmp_path):
    labels = labels_in(tmp_path, stream_with([10**7, 10**7]), top_k=32, block_tokens=1024)
    assert all(file.path.stat().st_size > 10**9 for file in labels.files)
    room = sum(file.path.stat().st_blocks * 512 for file in labels.files)
    labels.write(5 * 1024, some_labels(1024, 32, 299))
    assert labels.faulty(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert room <= 2**16
    assert sum(file.path.stat().st_blocks * 512 for file in labels.files) <= room + 1024 * 132 + 2**16


def test_labels_are_hashed_in_bounded_memory(tmp_path):
    labels = labels_in(tmp_path, stream_with([2**22]), top_k=1, block_tokens=2**22)
    labels.write(0, Labels(np.zeros((2**22, 1), np.uint16), np.zeros((2**22, 1), np.float16), np.zeros(2**22, np.float32)))
    tracemalloc.start()
    assert len(labels.faulty(np.arange(1))) == 0
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * shards.HASHED_BYTES < 2**25


@pytest.mark.parametrize(("field", "value"), [("logs", np.nan), ("logs", np.inf), ("tail", np.nan), ("tail", np.inf)])
def test_label_that_is_not_a_number_is_refused_and_not_written(tmp_path, field, value):
    labels, said = labels_in(tmp_path, stream_with([30])), some_labels(20, 2, 299)
    getattr(said, field)[7] = value
    with pytest.raises(ValueError, match=r"^the label of position 17 is not a number; let the model .* another precision$"):
        labels.write(10, said)
    assert labels.faulty(np.arange(3)).tolist() == [0, 1, 2] and not labels.read(0, 30).logs.any()
    said.tail[7], said.logs[7] = 0, -np.inf
    labels.write(10, said)
    assert labels.faulty(np.arange(3)).tolist() == [0]


def test_labels_that_are_there_are_kept(tmp_path):
    stream, said = stream_with([30, 30]), some_labels(60, 2, 299)
    labels_in(tmp_path, stream).write(0, said)
    (tmp_path / "train-1.labels").unlink()
    again = labels_in(tmp_path, stream)
    assert again.faulty(np.arange(6)).tolist() == [3, 4, 5] and same(again.read(0, 30), part_of(said, 0, 30))


def test_labels_are_made_and_read_where_there_are_no_hard_links_and_mappings_do_not_pile_up(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    labels, said = labels_in(tmp_path, stream_with([30])), some_labels(30, 2, 299)
    labels.write(0, said)
    assert same(labels.read(0, 30), said) and [path.suffix for path in tmp_path.iterdir()] == [".labels"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_process_that_comes_second_at_making_a_label_file_leaves_the_first_ones(tmp_path, monkeypatch):
    """It has seen that there is none, and when it is done there is one, with labels in it."""
    stream, fsync = stream_with([30]), os.fsync

    def another_is_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        labels_in(tmp_path, stream).write(0, some_labels(30, 2, 299))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", another_is_first)
    labels = labels_in(tmp_path, stream)
    assert list(tmp_path.iterdir()) == [labels.files[0].path] and len(labels.faulty(np.arange(3))) == 0


def refusal_of_labels(folder: Path, stream: TokenStream, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        labels_for(folder, stream, **({"num_positions": 30} | changes)).check()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(f"; delete the folder {folder} and the labels are made again")
    assert message.startswith(str(folder / "train-0.labels"))
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top_k": 3}, "was made for top_k 2, not 3"),
        ({"vocab_size": 65537}, "was made for id_bytes 2, not 4"),
        ({"block_tokens": 11}, "was made for block_tokens 10, not 11"),
        ({"num_positions": 29}, "was made for num_positions 30, not 29"),
        ({"identity": "ef" * 32}, "was made for identity cdcdcdcdcdcd, not efefefefefef"),
    ],
)
def test_labels_of_something_else_are_refused_by_name(tmp_path, changes, reason):
    stream = stream_with([30])
    labels_in(tmp_path, stream)
    assert reason in refusal_of_labels(tmp_path, stream, **changes)


def test_labels_of_other_shards_are_refused_by_name(tmp_path):
    stream = stream_with([30, 20])
    labels_in(tmp_path, stream, 30)
    (first, last), other = stream.shards, "12" * 32
    relabelled = TokenStream((first._replace(fingerprint=other), last._replace(fingerprint=other)), other)
    assert "was made for tokenizer abababababab, not 121212121212" in refusal_of_labels(tmp_path, relabelled)
    rewritten = TokenStream((first._replace(sha256=other), last), PRINT)
    assert "was made for shard 000000000000, not 121212121212" in refusal_of_labels(tmp_path, rewritten)
    longer = TokenStream((first._replace(num_tokens=31), last), PRINT)
    assert "was made for num_tokens 30, not 31" in refusal_of_labels(tmp_path, longer)
    behind = TokenStream((last._replace(path=Path("train-9.bin")), first), PRINT)
    labels_in(tmp_path / "other", TokenStream((behind.shards[0],), PRINT), 20)
    (tmp_path / "other" / "train-9.labels").rename(tmp_path / "train-9.labels")
    with pytest.raises(ValueError, match=r"train-9.labels was made for num_positions 20, not 30"):
        labels_for(tmp_path, behind, num_positions=30).check()
    labels_in(tmp_path / "moved", stream, 30)
    with pytest.raises(ValueError, match=r"train-0.labels was made for first_position 0, not 20"):
        labels_in(tmp_path / "moved", behind, 30)


def test_label_files_that_are_absent_cut_or_damaged_are_refused(tmp_path):
    stream = stream_with([30])
    assert "cannot be read (No such file or directory)" in refusal_of_labels(tmp_path, stream)
    path = labels_in(tmp_path, stream).files[0].path
    whole = path.read_bytes()
    for content, reason in [
        (whole[:-1], f"ends at byte {len(whole) - 1}, not at {len(whole)}"),
        (whole + b"x", f"ends at byte {len(whole) + 1}, not at {len(whole)}"),
        (whole[:184], "ends at byte 184, not at"),
        (whole[:183], "ends at byte 183, within the 184 of its header"),
        (b"", "ends at byte 0, within"),
        (bytes(len(whole)), "is not a label file, at byte 0 it has"),
        (whole[:8] + b"\x02" + whole[9:], "is of version 2, not of version 1"),
    ]:
        path.write_bytes(content)
        assert reason in refusal_of_labels(tmp_path, stream)


def test_every_byte_of_a_label_header_is_covered(tmp_path):
    stream = stream_with([30])
    path = labels_in(tmp_path, stream).files[0].path
    whole = path.read_bytes()
    for at in range(HEADER_BYTES):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refusal_of_labels(tmp_path, stream)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_as_a_label_file_is_refused_and_never_runs(tmp_path, protocol):
    marker, stream = tmp_path / "marker", stream_with([30])
    path = labels_in(tmp_path, stream).files[0].path
    planted, whole = pickle.dumps(Planted(marker), protocol), path.read_bytes()
    for content in (planted, planted + whole):
        path.write_bytes(content)
        assert "is not a label file" in (message := refusal_of_labels(tmp_path, stream)) or "ends at byte" in message
    assert not marker.exists()
