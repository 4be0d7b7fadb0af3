"""Laws of ds/shards.py: what is written comes back, no byte changes unseen, a file is whole or absent."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds import shards
from ds.shards import TokenStream, open_shard, verify_shard, write_shard

PRINT = "ab" * 32
ID_LISTS = st.lists(st.lists(st.integers(0, 299), max_size=40), max_size=6)


def stream_of(paths: list[Path]) -> TokenStream:
    return TokenStream(tuple(map(open_shard, paths)), PRINT)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)


@given(
    parts=ID_LISTS, kind=st.sampled_from(["u2", "u4", "i4", "i8", "u8", ">u2"]), vocab_size=st.sampled_from([300, 65536, 65537])
)
@settings(deadline=None, max_examples=60)
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
@settings(deadline=None, max_examples=20)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_BYTES", 64)
        write_shard(path, np.arange(100) * 2, 300, PRINT)
    return path.read_bytes()


@given(data=st.data(), mask=st.integers(1, 255))
@settings(deadline=None, max_examples=150)
def test_flipped_byte_anywhere_is_named(tmp_path_factory, whole, data, mask):
    path = tmp_path_factory.getbasetemp() / "flipped.bin"
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
    with pytest.raises(ValueError) as caught:
        verify_shard(path)
    message = str(caught.value)
    assert str(path) in message and "delete" in message and "\n" not in message
    assert f"byte {damaged_place(at)}" in message


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
@settings(deadline=None)
def test_other_length_is_refused_at_opening(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "length.bin"
    length = data.draw(st.integers(0, len(whole) + 300).filter(lambda length: length != len(whole)))
    path.write_bytes((whole + bytes(300))[:length])
    with pytest.raises(ValueError, match=rf"{path.name} ends at byte {length}\b.* delete"):
        open_shard(path)


@given(data=st.data(), inserted=st.binary(max_size=40))
@settings(deadline=None, max_examples=150)
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


class Planted:
    """Makes its file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


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
@settings(deadline=None, max_examples=40)
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


def test_stream_refuses_a_shard_of_another_tokenizer(tmp_path):
    for name, fingerprint in (("a.bin", PRINT), ("b.bin", "cd" * 32)):
        write_shard(tmp_path / name, np.arange(9), 300, fingerprint)
    stream_of([tmp_path / "a.bin"])
    with pytest.raises(ValueError, match=r"b.bin was made with tokenizer cdcd.*, not with abab.*delete"):
        stream_of([tmp_path / "a.bin", tmp_path / "b.bin"])
