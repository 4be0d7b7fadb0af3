"""Laws of ds/files.py: which files an entry stands for, the parts they are read in, and files that lie elsewhere."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds.files import CorpusFile, corpus_digest, corpus_files, one_line


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
    assert corpus_files(entries, ()) == corpus_files(entries[::-1][1:], ())
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
