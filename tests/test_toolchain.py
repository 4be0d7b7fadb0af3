"""Laws of scripts/engine/toolchain.py: compilers that are missing, and locks that killed compilations leave."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import clean_environment
from torch.utils.file_baton import FileBaton

from scripts.config import TrainingConfig
from scripts.engine import toolchain

WIDE_SECONDS = 60
HOLDER = """
import os, signal, sys, time
from scripts.engine import toolchain
from scripts.config import TrainingConfig

with toolchain.compiling(TrainingConfig(), 0):
    os.open(toolchain.extension_folders(TrainingConfig())[0] / "lock", os.O_CREAT | os.O_EXCL)
    print("compiling", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    """The folders of DeepSpeed's extensions in a root of their own, nothing built in them."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return toolchain.extension_folders(TrainingConfig())


@pytest.mark.parametrize(("missing", "remedy"), [("ninja", "pip install ninja"), ("c++", "apt install g++")])
def test_missing_compiler_is_refused_with_its_remedy(folders, tmp_path, monkeypatch, missing, remedy):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in {"ninja", "c++"} - {missing}:
        (tools / name).symlink_to(shutil.which(name) or "")
    toolchain.refuse_missing_compilers(TrainingConfig())
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ValueError, match=f"^[^\n]*{missing.replace('+', '.')} is not on PATH[^\n]*{remedy.replace('+', '.')}$"):
        toolchain.refuse_missing_compilers(TrainingConfig())


def test_compiler_is_not_asked_for_once_everything_is_built(folders, tmp_path, monkeypatch):
    (tmp_path / "ninja").symlink_to(shutil.which("ninja") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for folder in folders[1:]:
        (folder / f"{folder.name}.so").touch()
    with pytest.raises(ValueError, match=f"must compile {folders[0].name} once"):
        toolchain.refuse_missing_compilers(TrainingConfig())
    (folders[0] / f"{folders[0].name}.so").touch()
    toolchain.refuse_missing_compilers(TrainingConfig())


def test_root_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="^[^\n]*set TORCH_EXTENSIONS_DIR to a folder that can be written$"):
        toolchain.extension_folders(TrainingConfig())


@pytest.fixture
def holder(folders):
    """A real process that holds a lock and has left its note."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=clean_environment() | {"TORCH_EXTENSIONS_DIR": str(folders[0].parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and "compiling\n" in iter(process.stdout.readline, "")
        yield process
        process.kill()


def grow_old(seconds: int, *paths: Path) -> None:
    for path in paths:
        os.utime(path, (path.stat().st_atime - seconds, path.stat().st_mtime - seconds))


def test_lock_of_a_killed_launch_is_removed_and_that_of_a_living_one_is_left(holder, folders):
    lock, root = folders[0] / "lock", folders[0].parent
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists()
    grow_old(100, lock, *root.glob("tightfit-*"))
    (line,) = toolchain.clear_dead_locks(folders)
    assert line.startswith(f"Waiting for {lock}") and lock.exists()
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert toolchain.clear_dead_locks(folders) == [f"Removed {lock}: the launch that was compiling there was killed"]
    assert FileBaton(str(lock)).try_acquire()
    assert list(root.glob("*tightfit*")) == []


def leave_dead_note(root: Path, host: str | None = None) -> Path:
    """The note of a real process that is killed."""
    with subprocess.Popen(["sleep", "100"]) as process:
        text = f"{toolchain.boot_id()} {toolchain.process_namespace()} {toolchain.started_ticks(process.pid)}"
        process.kill()
    note = root / f"tightfit-{host or os.uname().nodename}-{process.pid}"
    note.write_text(text)
    return note


def test_lock_is_left_where_nothing_says_that_its_owner_is_dead(folders):
    lock, root = folders[0] / "lock", folders[0].parent
    lock.touch()
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists(), "without a note"
    leave_dead_note(root)
    grow_old(10, lock)
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists(), "older than the note"
    lock.unlink()
    leave_dead_note(root, "other-machine")
    lock.touch()
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists(), "another machine's"
    for path in root.glob("tightfit-*"):
        path.unlink()
    note = leave_dead_note(root)
    note.write_text(note.read_text().replace("pid:[", "pid:[1"))
    grow_old(100, note)
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists(), "another container's"


def test_lock_that_a_process_holds_open_is_left(folders):
    lock, root = folders[0] / "lock", folders[0].parent
    leave_dead_note(root)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert toolchain.clear_dead_locks(folders) == [] and lock.exists()
    baton.release()


def test_reused_process_number_and_restarted_machine_do_not_pass_for_the_owner(folders):
    lock, root = folders[0] / "lock", folders[0].parent
    for word in (0, 2):
        note = toolchain.leave_note(root)
        words = note.read_text().split()
        words[word] = "1"
        note.write_text(" ".join(words))
        lock.touch()
        assert len(toolchain.clear_dead_locks(folders)) == 1 and not lock.exists()


def test_of_several_launches_one_removes_a_lock(folders):
    lock, root = folders[0] / "lock", folders[0].parent
    for _ in range(10):
        for _ in range(3):
            leave_dead_note(root)
        lock.touch()
        with ThreadPoolExecutor(8) as pool:
            lines = list(pool.map(lambda _: toolchain.clear_dead_locks(folders), range(8)))
        assert sum(map(len, lines)) == 1 and not lock.exists()


def test_compiler_that_outlives_its_launch_is_waited_for(folders, tmp_path):
    lock, root = folders[0] / "lock", folders[0].parent
    shutil.copy(shutil.which("sleep") or "", tmp_path / "ninja")
    leave_dead_note(root)
    lock.touch()
    with subprocess.Popen([tmp_path / "ninja", "0.5"], cwd=folders[0]) as orphan:
        assert len(toolchain.clear_dead_locks(folders)) == 1 and not lock.exists()
        assert orphan.poll() is not None or toolchain.started_ticks(orphan.pid) is None


def test_note_stands_while_a_launch_may_compile(folders):
    root = folders[0].parent
    with pytest.raises(RuntimeError), toolchain.compiling(TrainingConfig(), 0) as lines:
        (note,) = root.glob("tightfit-*")
        assert lines == [] and not toolchain.names_the_dead(note)
        raise RuntimeError
    assert list(root.glob("*tightfit*")) == []


def test_other_local_ranks_wait_until_an_older_lock_is_gone(folders):
    (folders[0] / "lock").touch()
    entered = threading.Event()

    def enter() -> None:
        with toolchain.compiling(TrainingConfig(), 1) as lines:
            assert lines == []
            entered.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert not entered.wait(0.3)
    (folders[0] / "lock").unlink()
    assert entered.wait(WIDE_SECONDS)
    thread.join()
