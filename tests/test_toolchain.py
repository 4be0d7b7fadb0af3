"""Laws of scripts/engine/toolchain.py: compilers that are missing or wrong, and locks that killed compilations leave."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cpuinfo
import pytest
import torch
from conftest import clean_environment
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder.builder import CUDAMismatchException, CUDAOpBuilder, assert_no_cuda_mismatch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from scripts.config import TrainingConfig
from scripts.engine import offload, toolchain
from scripts.plan.machine import Card, boot_id

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


# What `nvcc --version` prints: apt's of Ubuntu 22.04 and 24.04, and two of NVIDIA's.
NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-{year} NVIDIA Corporation
Built on {built}
Cuda compilation tools, release {release}, V{version}
Build cuda_{release}.r{release}/compiler.{build}
"""
NVCCS = {
    "11.5": dict(year=2021, built="Thu_Nov_18_09:45:30_PST_2021", version="11.5.119", build="30672275_0"),
    "12.0": dict(year=2023, built="Fri_Jan__6_16:45:21_PST_2023", version="12.0.140", build="32267302_0"),
    "12.8": dict(year=2025, built="Fri_Feb_21_20:23:50_PST_2025", version="12.8.93", build="35583870_0"),
    "13.0": dict(year=2025, built="Wed_Aug_20_01:58:59_PM_PDT_2025", version="13.0.88", build="36424714_0"),
}
# What their `nvcc --list-gpu-arch` lists.
COMPILES_FOR = {
    "11.5": (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87),
    "12.0": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.8": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 120),
    "13.0": (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121),
}
of_each_nvcc = pytest.mark.parametrize("release", NVCCS)
of_each_torch = pytest.mark.parametrize("torch_cuda", ["12.6", "12.8", "13.0", "13.2"])


def printed_by(release: str) -> str:
    return NVCC.format(release=release, **NVCCS[release])


def put_nvcc(toolkit: Path, release: str) -> Path:
    """An nvcc in a CUDA toolkit's folder that prints its version, and the capabilities that it compiles for."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    known = "\n".join(f"compute_{code}" for code in COMPILES_FOR[release])
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo '{known}' && exit\ncat <<'END'\n{printed_by(release)}END\n")
    nvcc.chmod(0o755)
    return toolkit


@of_each_nvcc
@of_each_torch
def test_nvcc_of_another_cuda_than_torchs_is_refused_with_the_package_of_torchs(release, torch_cuda):
    if release.split(".")[0] == torch_cuda.split(".")[0]:
        return toolchain.refuse_nvcc(printed_by(release), torch_cuda)
    with pytest.raises(ValueError) as caught:
        toolchain.refuse_nvcc(printed_by(release), torch_cuda)
    words, package = str(caught.value), f"cuda-toolkit-{torch_cuda.replace('.', '-')}"
    assert f"nvcc is of CUDA {release} and torch of CUDA {torch_cuda}; install {package} " in words and "\n" not in words
    assert f"CUDA_HOME=/usr/local/cuda-{torch_cuda}," in words and f"nvidia/label/cuda-{torch_cuda}.0 cuda-toolkit" in words
    assert "offload_optimizer=True" in words and "nvidia-cuda-toolkit" not in words


@of_each_nvcc
@of_each_torch
def test_no_nvcc_that_deepspeeds_own_rule_takes_is_refused(release, torch_cuda, tmp_path, monkeypatch):
    """DeepSpeed asks where it is built with its extensions, not where it compiles them at a start. It knows no minor of 13."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(put_nvcc(tmp_path, release)))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.delenv("DS_SKIP_CUDA_CHECK", raising=False)
    try:
        assert assert_no_cuda_mismatch()
    except CUDAMismatchException:
        if (release, torch_cuda) == ("13.0", "13.2"):
            return
        with pytest.raises(ValueError, match="nvcc is of CUDA"):
            toolchain.refuse_nvcc(toolchain.nvcc_says(str(tmp_path), "--version"), torch_cuda)
    else:
        toolchain.refuse_nvcc(toolchain.nvcc_says(str(tmp_path), "--version"), torch_cuda)


@pytest.mark.parametrize("printed", [None, "", "command not found"])
def test_nvcc_that_is_not_there_is_refused_with_the_package_of_torchs_cuda(printed):
    with pytest.raises(
        ValueError, match=r"^[^\n]*nvcc is not there; install cuda-toolkit-13-0 [^\n]*offload_optimizer=True[^\n]*$"
    ):
        toolchain.refuse_nvcc(printed, "13.0")


def test_nvcc_is_asked_where_torch_would_take_it_from(tmp_path):
    assert toolchain.nvcc_says(str(put_nvcc(tmp_path, "12.8")), "--version") == printed_by("12.8")
    assert toolchain.nvcc_says(str(tmp_path / "bin"), "--version") is None and toolchain.nvcc_says(None, "--version") is None
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert toolchain.nvcc_says(str(tmp_path), "--version") is None


@of_each_nvcc
@pytest.mark.parametrize("card", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)])
def test_nvcc_that_does_not_compile_for_a_card_is_refused_with_the_package_of_torchs_cuda(release, card, tmp_path):
    listed, named = toolchain.nvcc_says(str(put_nvcc(tmp_path, release)), "--list-gpu-arch"), Card("this one", *card)
    if card[0] * 10 + card[1] in COMPILES_FOR[release]:
        return toolchain.refuse_old_nvcc(listed, [named], "12.8")
    for cards in ([named], [Card("a common one", 8, 0), named]):
        with pytest.raises(
            ValueError, match=f"for this one of compute capability {card[0]}.{card[1]}; install cuda-toolkit-12-8"
        ):
            toolchain.refuse_old_nvcc(listed, cards, "12.8")


@pytest.mark.parametrize("listed", [None, "", "nvcc fatal   : Unknown option"])
def test_an_nvcc_that_lists_nothing_is_not_refused(listed):
    toolchain.refuse_old_nvcc(listed, [Card("", 12, 0)], "12.8")


ON_GPU = TrainingConfig(offload_optimizer=False, accumulate_on="gpu")


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch) -> Path:
    """As on a machine with a GPU and torch of CUDA 13.0, whose toolkit would be in this folder, and nothing built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cards = [Card("RTX 3060", 8, 6), Card("RTX 5060", 12, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    return tmp_path / "cuda"


def test_an_optimizer_on_the_gpu_needs_nvcc_of_torchs_cuda(on_a_gpu, monkeypatch):
    with pytest.raises(ValueError, match="nvcc is not there"):
        toolchain.refuse_missing_compilers(ON_GPU)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(put_nvcc(on_a_gpu, "12.0")))
    with pytest.raises(ValueError, match="nvcc is of CUDA 12.0 and torch of CUDA 13.0"):
        toolchain.refuse_missing_compilers(ON_GPU)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    words = "the nvcc found is too old for RTX 5060 of compute capability 12.0; install cuda-toolkit-12-8"
    with pytest.raises(ValueError, match=words):
        toolchain.refuse_missing_compilers(ON_GPU)
    shutil.rmtree(on_a_gpu)
    put_nvcc(on_a_gpu, "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    toolchain.refuse_missing_compilers(ON_GPU)


def test_once_its_adam_is_built_the_toolkit_is_needed_and_nvcc_is_not(on_a_gpu, monkeypatch):
    (folder,) = toolchain.extension_folders(ON_GPU)
    (folder / "fused_adam.so").touch()
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension._prepare_ldflags([], True, False, False, False)
    with pytest.raises(ValueError, match="nvcc is not there"):
        toolchain.refuse_missing_compilers(ON_GPU)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(on_a_gpu))
    cpp_extension._prepare_ldflags([], True, False, False, False)
    toolchain.refuse_missing_compilers(ON_GPU)


def test_the_adam_on_the_cpu_needs_no_cuda_toolkit_beside_a_gpu(on_a_gpu):
    toolchain.refuse_missing_compilers(TrainingConfig())
    on_cpu, on_gpu = (CUDA_Accelerator().create_op_builder(f"{name}AdamBuilder") for name in ("CPU", "Fused"))
    assert on_cpu is not None and not isinstance(on_cpu, CUDAOpBuilder) and isinstance(on_gpu, CUDAOpBuilder)
    assert {Path(name).suffix for name in on_cpu.sources()} == {".cpp"}


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
        text = f"{boot_id()} {toolchain.process_namespace()} {toolchain.started_ticks(process.pid)}"
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


def test_deepspeed_is_told_of_the_processor_that_cpuinfo_finds(monkeypatch):
    """The maker, and what decides how extensions are compiled. Where /proc names the maker, `cpuinfo` itself is not asked: it
    takes a second of a core.
    """

    def told() -> tuple:
        found = cpuinfo.get_cpu_info()
        return found.get("vendor_id_raw"), found["arch"], {"avx2", "avx512f", "avx512", "sve"} & {*found.get("flags", ())}

    expected = told()
    is_named = "vendor_id" in Path("/proc/cpuinfo").read_text()
    monkeypatch.setattr(cpuinfo, "get_cpu_info", pytest.fail if is_named else cpuinfo.get_cpu_info)
    offload.start_quickly()
    assert told() == expected
