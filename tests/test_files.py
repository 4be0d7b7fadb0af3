"""Laws of ds/files.py: which files an entry stands for, the parts they are read in, and files that lie elsewhere."""

import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds.corpus import Reading, Tally, documents
from ds.files import CorpusFile, Part, corpus_digest, corpus_files, corpus_pieces, file_name, one_line, open_file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.py", "sub/c.py", "sub/deep/d.py", "test/e.py", ".hidden/f.py", "sub/.g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names(files: list[CorpusFile], root: Path) -> list[str]:
    return [Path(file.path).relative_to(root).as_posix() for file in files]


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_gives_all_files_below_but_hidden_ones(tree):
    assert names(corpus_files((str(tree),), ()), tree) == ["a.py", "b.txt", "sub/c.py", "sub/deep/d.py", "test/e.py"]


def test_glob_gives_what_it_matches(tree):
    assert names(corpus_files((f"{tree}/*.py",), ()), tree) == ["a.py"]
    assert names(corpus_files((f"{tree}/**/*.py",), ()), tree) == ["a.py", "sub/c.py", "sub/deep/d.py", "test/e.py"]


def test_exclude_leaves_out_by_any_part_below_the_root(tree):
    assert names(corpus_files((f"{tree}/**/*.py",), ("test", "d*")), tree) == ["a.py", "sub/c.py"]
    assert names(corpus_files((str(tree),), ("su?", "*.txt")), tree) == ["a.py", "test/e.py"]


def test_exclude_does_not_look_above_the_root(tree):
    assert names(corpus_files((f"{tree}/test",), ("test",)), tree) == ["test/e.py"]
    assert names(corpus_files((f"{tree}/test/*.py",), ("test", tree.name)), tree) == ["test/e.py"]


def test_named_file_is_never_excluded(tree):
    assert names(corpus_files((f"{tree}/.hidden/f.py",), ("*",)), tree) == [".hidden/f.py"]


def test_file_named_twice_comes_once_and_order_of_entries_does_not_matter(tree):
    entries = (f"{tree}/sub", f"{tree}/*.py", f"{tree}/a.py", f"{tree}/sub/../a.py")
    again = corpus_files(entries[::-1][1:], ())
    assert [file._replace(source=0) for file in again] == [file._replace(source=0) for file in corpus_files(entries, ())]
    assert [file.source for file in corpus_files(entries, ())] == [1, 0, 0] and [file.source for file in again] == [0, 2, 2]
    assert names(corpus_files(entries, ()), tree) == ["a.py", "sub/c.py", "sub/deep/d.py"]


@pytest.mark.parametrize("entry", ["absent", "absent/*.py", "*.rs"])
def test_entry_without_a_file_is_refused(tree, entry):
    assert f"{tree}/{entry}" in refusal(corpus_files, (f"{tree}/a.py", f"{tree}/{entry}"), ())


def test_entry_excluded_whole_is_refused(tree):
    assert "corpus_exclude leaves out all 1" in refusal(corpus_files, (f"{tree}/test",), ("*.py",))


def test_digest_follows_names_and_sizes(tree):
    files = corpus_files((str(tree),), ())
    before = corpus_digest(files)
    assert corpus_digest(files) == before != corpus_digest(files[1:])
    (tree / "a.py").write_text("longer than it was")
    assert corpus_digest(corpus_files((str(tree),), ())) != before


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\n b\t\n"), "a b"), (EOFError(), "EOFError"), (OSError(2, "none", "x"), "[Errno 2] none: 'x'")],
)
def test_words_of_an_error_are_one_line_and_never_none(error, line):
    assert one_line(error) == line


MOVES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["file", "folder", "link"])), max_size=12)


@given(moves=MOVES)
def test_every_way_to_name_a_folder_gives_the_same_real_files_once(tmp_path_factory, moves):
    root = tmp_path_factory.mktemp("tree")
    (root / "always.txt").write_text("here")
    folders = [root]
    for place, (where, to, kind) in enumerate(moves):
        path = folders[where % len(folders)] / f"{(where + to) % 3}{place}"
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "file":
            path.write_text("text")
        else:
            targets = sorted(root.rglob("*")) + folders
            path.symlink_to(targets[to % len(targets)])
    ways = [corpus_files((f"{root}{rest}",), ()) for rest in ("", "/", "/**", "/**/*", "/**/**", "/./**/*")]
    assert all(way == ways[0] for way in ways)
    real = [Path(folder, name) for folder, _, files in os.walk(root) for name in files]
    assert [Path(file.path) for file in ways[0]] == sorted(file for file in real if not file.is_symlink())


def test_a_linked_folder_is_read_by_the_name_of_its_link(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.txt").write_text("far")
    (tree / "sub" / "there").symlink_to(elsewhere)
    (tree / "again.txt").symlink_to(tree / "b.txt")
    for way in (f"{tree}/sub", f"{tree}/sub/**", f"{tree}/sub/*/*.txt"):
        assert "there/far.txt" in names(corpus_files((way,), ()), tree / "sub")
    assert "again.txt" not in names(corpus_files((f"{tree}/again.txt", str(tree)), ()), tree)


def test_many_links_to_the_same_folder_end(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).symlink_to(".")
    (tmp_path / "z.txt").write_text("z")
    for way in ("", "/**", "/**/*.txt", "/*/z.txt"):
        assert len(corpus_files((f"{tmp_path}{way}",), ())) == 1


@pytest.mark.parametrize("name", ["a[1].txt", "what?.txt", "*.txt", "[a]"])
def test_a_name_that_looks_like_a_glob_and_is_there_is_that_file_or_folder(tmp_path, name):
    (tmp_path / name).write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert corpus_files((f"{tmp_path}/{name}",), ()) == [CorpusFile(f"{tmp_path}/{name}", 3)]
    folder = tmp_path / f"folder {name}"
    folder.mkdir()
    (folder / "b.md").write_text("b")
    for way in (folder, folder / "*.md", folder / "**"):
        assert corpus_files((str(way),), ()) == [CorpusFile(f"{folder}/b.md", 1)]


def test_hidden_names_are_read_where_the_glob_spells_them(tree):
    assert names(corpus_files((f"{tree}/.hid*/*.py", f"{tree}/*/.g.py"), ()), tree) == [".hidden/f.py", "sub/.g.py"]


def test_digest_of_local_files_is_what_data_folders_hold(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    held = sha256(b'["a.txt", 5]["b.txt", 5]["sub/c.txt", 9]["sub.txt", 7]').hexdigest()
    assert corpus_digest(corpus_files((".//",), ())) == corpus_digest(corpus_files(("sub", "./*.txt"), ())) == held


@given(sizes=st.lists(st.integers(0, 50), max_size=20), piece_bytes=st.integers(1, 40))
def test_pieces_hold_every_byte_of_every_file_once_in_order(sizes, piece_bytes):
    named = [CorpusFile(str(number), size) for number, size in enumerate(sizes)]
    pieces, num_bytes, at = corpus_pieces(named, piece_bytes), {file.path: file.num_bytes for file in named}, {}
    for piece in pieces:
        assert (
            piece and sum((num_bytes[path] if stop is None else stop) - start for path, start, stop, _ in piece) <= piece_bytes
        )
        for path, start, stop, _ in piece:
            assert at.get(path, 0) == start and (stop is None or start < stop < num_bytes[path])
            at[path] = num_bytes[path] if stop is None else stop
    assert list(at) == [file.path for file in named] and at == num_bytes
    for path in num_bytes:
        cut = [(stop or num_bytes[path]) - start for piece in pieces for name, start, stop, _ in piece if name == path]
        assert max(cut) - min(cut) < len(cut), "ranges of a file are equal but for rounding"
    together = [sum(num_bytes[path] for path, start, stop, _ in piece if (start, stop) == (0, None)) for piece in pieces]
    assert all(one + other > piece_bytes for one, other in zip(together, together[1:], strict=False) if one and other)


def kinds(*corpus: str) -> dict[str, str | None]:
    return {Path(file.path).name: file.tokens for file in corpus_files(corpus, ())}


def test_files_of_tokens_are_known_by_content_and_nanogpts_where_an_entry_ends_in_bin(tmp_path):
    for name in ("gpt2.bin", "llama3.bin", "evaluation.bin", "raw.bin", "pair.bin", "alone.idx", "pair.idx", "other.idx"):
        (tmp_path / name).write_bytes(b"\1\0")
    for name, magic in (("gpt2", 20240520), ("llama3", 20240801), ("evaluation", 20240522)):
        (tmp_path / f"{name}.bin").write_bytes(magic.to_bytes(4, "little") + b"rest")
    for name in ("alone.idx", "pair.idx", "raw.txt"):
        (tmp_path / name).write_bytes(b"MMIDIDX\0\0")
    known = {"gpt2.bin": "llm.c", "llama3.bin": "llm.c", "evaluation.bin": "llm.c", "pair.bin": "Megatron"}
    others = dict.fromkeys(("raw.bin", "alone.idx", "other.idx", "raw.txt"))
    for way in ("", "/*", "/**"):
        assert kinds(f"{tmp_path}{way}") == known | others
    for named in ("raw.bin", "*.bin", "**/r*.bin"):
        assert kinds(f"{tmp_path}/{named}", str(tmp_path)) == known | others | {"raw.bin": "nanoGPT"}
    tmp_path.rename(tmp_path.with_suffix(".bin"))
    assert kinds(str(tmp_path.with_suffix(".bin"))) == known | others


def test_parts_of_a_file_of_tokens_say_so_and_give_no_text(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\1\0" * 50)
    pieces = corpus_pieces(corpus_files((str(path),), ()), 30)
    assert [part for piece in pieces for part in piece] == [
        Part(str(path), start, stop, "nanoGPT") for start, stop in ((0, 25), (25, 50), (50, 75), (75, None))
    ]
    assert texts(str(path)) == []


PLAIN = Reading("text", "<|sep|>", False)
TREE = {
    "a.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "sub/b.txt.gz": gzip.compress(b"three<|sep|>four"),
    "sub/deep/c.txt": b"five", "empty.txt": b"", ".hidden/d.txt": b"six", "test/e.txt": b"seven", "sub/.f.txt": b"eight",
    "sub/[g].txt": b"nine",
}  # fmt: skip


def texts(*corpus: str, exclude: tuple[str, ...] = (), piece_bytes: int = 10**9) -> list[str]:
    pieces = corpus_pieces(corpus_files(corpus, exclude), piece_bytes)
    return [text.decode() for text in documents(chain(*pieces), PLAIN, Tally())]


def parquet_of(texts: list[str], rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=rows)
    return sink.getvalue()


class Ranges(SimpleHTTPRequestHandler):
    """A server of files that sends ranges, as object stores and hubs do."""

    asked: list[str] = []

    def log_message(self, format: str, *args: object) -> None: ...

    def send_head(self) -> io.BytesIO | None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()  # pyright: ignore
        content, wanted = path.read_bytes(), self.headers.get("Range")
        start, stop = 0, len(content)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(stop, int(last) + 1)
            self.asked.append(wanted)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        return io.BytesIO(content[start:stop])


class NoRanges(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


def serve(handler: type, folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture(scope="module", params=["memory", Ranges, NoRanges])
def remote(request, tmp_path_factory) -> Iterator[str]:
    """The URL of a folder that holds TREE."""
    folder, system = tmp_path_factory.mktemp("site"), fsspec.filesystem("memory")
    for name, content in TREE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        system.pipe(f"/corpus/{name}", content)
    if request.param == "memory":
        yield "memory://corpus"
        return
    with serve(request.param, folder) as server:
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("rest", ["", "/", "/**"])
def test_a_remote_folder_gives_what_a_local_one_gives(remote, rest):
    assert texts(remote + rest) == ["one", "two", "nine", "three", "four", "five", "seven"]


def test_exclude_leaves_out_by_any_part_below_a_remote_folder(remote):
    assert texts(remote, exclude=("test", "*.gz", "127*", "corpus")) == ["one", "two", "nine", "five"]


def test_links_of_an_index_page_to_itself_are_no_files(tmp_path):
    (tmp_path / "index.html").write_text('<a href="?C=N;O=D">Name</a> <a href="../">up</a> <a href="a.txt">a.txt</a>')
    (tmp_path / "a.txt").write_text("a")
    with serve(NoRanges, tmp_path) as server:
        assert texts(f"http://127.0.0.1:{server.server_port}/") == ["a"]
        server.shutdown()


def test_remote_globs_and_files_are_read_in_order_and_once(remote):
    assert texts(f"{remote}/sub/**/*.txt", f"{remote}/a.jsonl", f"{remote}/*.jsonl") == ["one", "two", "nine", "five"]
    assert texts(f"{remote}/.hidden/*.txt", f"{remote}/sub/.f.txt") == ["six", "eight"]
    assert texts(f"{remote}/test/e.txt", exclude=("e.txt",)) == ["seven"]
    assert [file.num_bytes for file in corpus_files((f"{remote}/*.*",), ())] == [32, 0]


def test_a_remote_name_with_brackets_is_that_file():
    fsspec.filesystem("memory").pipe("/brackets/[g].txt", b"nine")
    assert texts("memory://brackets/[g].txt") == texts("memory://brackets/*") == ["nine"]


@pytest.mark.parametrize(("rest", "reason"), [("/none.txt", "/none.txt"), ("/*.rs", "nothing is there"), ("/none/", "nothing")])
def test_a_remote_name_that_is_not_there_is_refused_in_one_line(remote, rest, reason):
    message = refusal(corpus_files, (remote + rest,), ())
    assert remote + rest in message and reason in message
    assert remote in refusal(documents_of, Part(f"{remote}/none.txt", 0, None))
    assert "leaves out all 1" in refusal(corpus_files, (f"{remote}/*.jsonl",), ("a*",))


def documents_of(part: Part) -> list[bytes]:
    return list(documents([part], PLAIN._replace(skip_faulty_rows=True), Tally()))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/a.txt", "Cannot connect to host 127.0.0.1:9"),
        ("absent://a/b.txt", "Protocol not known: absent"),
        ("s3://a/b.txt", "pip install s3fs"),
        ("sftp://a/b.txt", 'pip install "fsspec[sftp]"'),
        ("zip://b.txt::gs://a/b.zip", "pip install gcsfs"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_what_to_do(url, words, monkeypatch):
    for name in ("s3fs", "gcsfs", "paramiko"):
        monkeypatch.setitem(sys.modules, name, None)
    assert url in (message := refusal(corpus_files, (url,), ())) and words in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_large_remote_file_is_read_in_ranges_and_each_part_reads_its_own(tmp_path, name):
    rows = [f"{number} {sha256(b'%d' % number).hexdigest() * 200}" for number in range(600)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    content = {".jsonl": lines, ".parquet": parquet_of(rows, 100), ".gz": gzip.compress(lines, 1)}[Path(name).suffix]
    (tmp_path / name).write_bytes(content)
    with serve(Ranges, tmp_path) as server, serve(NoRanges, tmp_path) as other:
        url = f"http://127.0.0.1:{server.server_port}/{name}?download=true"
        assert texts(url, piece_bytes=len(content) // 3) == rows
        Ranges.asked.clear()
        last = list(documents([Part(url, len(content) * 9 // 10, None)], PLAIN, Tally())) if name == "a.jsonl" else []
        assert [text.decode() for text in last] == (rows[-len(last) :] if last else [])
        assert sum(stop - start for start, stop in map(span, Ranges.asked)) < len(content)
        if name == "a.jsonl":
            message = refusal(texts, f"http://127.0.0.1:{other.server_port}/{name}")
            assert "range requests" in message and "name a copy on a disk" in message
        server.shutdown()
        other.shutdown()


def span(ranges: str) -> tuple[int, ...]:
    return tuple(map(int, ranges.removeprefix("bytes=").split("-")))


def test_a_host_that_goes_away_is_never_skipped_as_a_faulty_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "%s"}\n' % (b"a" * 2**20) * 12)
    with serve(Ranges, tmp_path) as server:
        part = Part(f"http://127.0.0.1:{server.server_port}/a.jsonl", 0, None)
        found = documents([part], PLAIN._replace(skip_faulty_rows=True), Tally())
        next(found)
        server.shutdown()
    assert part.path in refusal(list, found)


@given(places=st.lists(st.tuples(st.integers(0, 2), st.integers(-20, 20), st.integers(0, 20)), max_size=8))
@settings(max_examples=10)
def test_a_remote_stream_reads_and_seeks_as_a_local_one(places):
    fsspec.filesystem("memory").pipe("/stream", bytes(range(30)))
    local = io.BytesIO(bytes(range(30)))
    with closing(open_file("memory://stream")) as stream, closing(open_file("memory://stream")) as other:
        for whence, offset, num_bytes in places:
            start = (0, local.tell(), 30)[whence]
            assert stream.seek(max(offset, -start), whence) == local.seek(max(offset, -start), whence)
            other.read(3)
            assert stream.read(num_bytes) == local.read(num_bytes) and stream.tell() == local.tell()


@pytest.mark.parametrize(
    ("path", "suffixes"),
    [
        ("a.b/c.jsonl.gz", [".jsonl", ".gz"]), ("a?b.txt", [".txt"]), ("https://a.b/c.jsonl?x=1.gz#y", [".jsonl"]),
        ("zip://a.csv::s3://b/c.zip", [".csv"]), ("simplecache::s3://b/c.tsv", [".tsv"]),
    ],
)  # fmt: skip
def test_the_name_of_a_url_is_that_of_its_file(path, suffixes):
    assert file_name(path).suffixes[-2:] == suffixes
