"""The compilers that DeepSpeed needs, and the locks that killed compilations leave. Knows folders and processes alone."""

import math
import os
import re
import shutil
import socket
import subprocess  # nosec B404
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import iglob
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils import cpp_extension

from scripts.config import LOCK_POLL_SECONDS, LONG_LOCK_SECONDS, TrainingConfig
from scripts.engine.watch import process_stat
from scripts.plan.machine import Card, boot_id


def extension_folders(config: TrainingConfig) -> list[Path]:
    """The folders, made if missing, in which torch builds the C++ extensions that DeepSpeed loads for this run. Extensions that
    are part of DeepSpeed's installation need none. ValueError when a folder cannot be made or written.
    """
    modules = ["adam.cpu_adam" if config.offload_optimizer else "adam.fused_adam"]
    modules += [] if torch.cuda.is_available() else ["comm.deepspeed_shm_comm"]
    names = [module.split(".")[1] for module in modules if not _is_installed(f"deepspeed.ops.{module}_op")]
    try:
        folders = [Path(cpp_extension._get_build_directory(name, False)).resolve() for name in names]
    except OSError as fault:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        raise ValueError(f"DeepSpeed cannot compile: {fault}; {remedy}") from None
    for folder in folders:
        if not os.access(folder, os.W_OK) or not os.access(folder.parent, os.W_OK):
            raise ValueError(f"{folder} cannot be written; set TORCH_EXTENSIONS_DIR to a folder that can")
    return folders


def refuse_missing_compilers(config: TrainingConfig) -> None:
    """Raises ValueError when ninja is missing or, for DeepSpeed's first start, the C++ compiler, Python's headers or, with the
    optimizer on the GPU, nvcc of torch's CUDA; its toolkit must then stay, because torch links to it at each start. The Adam on
    the CPU is C++ alone, whether there is a GPU or not.
    """
    folders = extension_folders(config)
    unbuilt = [folder.name for folder in folders if not (folder / f"{folder.name}.so").exists()]
    if folders and not cpp_extension.is_ninja_available():
        raise ValueError("ninja is not on PATH and DeepSpeed starts with it; activate the environment, or pip install ninja")
    compiler = cpp_extension.get_cxx_compiler()
    if unbuilt and shutil.which(compiler.split()[0]) is None:
        raise ValueError(f"{compiler} is not on PATH and DeepSpeed must compile {unbuilt[0]} once; apt install g++")
    if unbuilt and not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError(f"Python.h is not there and DeepSpeed must compile {unbuilt[0]} once; apt install python3-dev")
    toolkit, on_gpu = cpp_extension.CUDA_HOME, torch.cuda.is_available() and not config.offload_optimizer
    if on_gpu and torch.version.cuda and (unbuilt or folders and toolkit is None):
        refuse_nvcc(nvcc_says(toolkit, "--version"), torch.version.cuda)
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        cards = [Card(each.name, each.major, each.minor) for each in found]
        refuse_old_nvcc(nvcc_says(toolkit, "--list-gpu-arch"), cards, torch.version.cuda)


def nvcc_says(cuda_home: str | None, option: str) -> str | None:
    """What the nvcc in a CUDA toolkit's folder prints with `option`; None where none runs."""
    if cuda_home is None:
        return None
    try:
        command = [str(Path(cuda_home, "bin", "nvcc")), option]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # nosec B603
    except (OSError, subprocess.SubprocessError):
        return None


def refuse_nvcc(printed: str | None, torch_cuda: str) -> None:
    """Raises ValueError where the nvcc that `printed` this as its version, None without one, is not of `torch_cuda`'s major.

    Minors may differ, as in torch's own check (torch/utils/cpp_extension.py, _check_cuda_version). Neither that nor DeepSpeed's
    (ops/op_builder/builder.py, assert_no_cuda_mismatch) is made where an extension is compiled at a start.
    """
    found = re.search(r"release (\d+)\.(\d+)", printed or "")
    if found and found[1] == torch_cuda.split(".")[0]:
        return
    fault = f"nvcc is of CUDA {found[1]}.{found[2]} and torch of CUDA {torch_cuda}" if found else "nvcc is not there"
    raise ValueError(_nvcc_words(fault, torch_cuda))


def refuse_old_nvcc(listed: str | None, cards: list[Card], torch_cuda: str) -> None:
    """Raises ValueError where `listed`, what `nvcc --list-gpu-arch` prints, lacks the capability of one of the `cards`.

    DeepSpeed compiles for exactly these (ops/op_builder/builder.py, compute_capability_args). CUDA 12.0 is of the major of a
    torch of 12.8 and knows no 12.0, which came with 12.8. A `listed` without a capability is passed over.
    """
    known = re.findall(r"compute_(\d+)", listed or "")
    for card in cards:
        if known and f"{card.major}{card.minor}" not in known:
            fault = f"the nvcc found is too old for {card.name} of compute capability {card.major}.{card.minor}"
            raise ValueError(_nvcc_words(fault, torch_cuda))


def _nvcc_words(fault: str, torch_cuda: str) -> str:
    major, minor = torch_cuda.split(".")[:2]
    toolkit = f"cuda-toolkit-{major}-{minor} by apt or dnf (https://developer.nvidia.com/cuda-downloads)"
    conda = f"conda install -c nvidia/label/cuda-{major}.{minor}.0 cuda-toolkit"
    return (
        f"offload_optimizer=False makes DeepSpeed compile its Adam for the GPU, and {fault}; install {toolkit} and set"
        f" CUDA_HOME=/usr/local/cuda-{major}.{minor}, or {conda}, or set offload_optimizer=True, which needs no nvcc"
    )


@contextmanager
def compiling(config: TrainingConfig, local_rank: int) -> Iterator[list[str]]:
    """Put around whatever may compile DeepSpeed's extensions. Yields lines for the user, on local rank 0 only.

    torch keeps a file "lock" in an extension's folder while it compiles. A killed launch leaves it, and the next launch waits
    for ever. So each process leaves a note in the parent folder while it may compile, and local rank 0 removes locks whose
    notes all name dead processes of this machine. The other local ranks wait here until older locks are gone: in torch they
    would go on, and load an extension that nobody has built. Raises ValueError as `extension_folders`.
    """
    folders = extension_folders(config)
    if not folders:
        yield []
        return
    lines = clear_dead_locks(folders) if local_rank == 0 else []
    started = time.time()
    while local_rank > 0 and any(_modified(folder / "lock") < started for folder in folders):
        time.sleep(LOCK_POLL_SECONDS)
    note = leave_note(folders[0].parent)
    try:
        yield lines
    finally:
        note.unlink(missing_ok=True)


def clear_dead_locks(folders: list[Path]) -> list[str]:
    """Removes the locks of killed launches in `folders` and beside them. Returns a line for each, and one for each lock in
    `folders` that has been held for longer than LONG_LOCK_SECONDS.
    """
    root, lines, dead_locks = folders[0].parent, [], []
    notes = sorted(root.glob("tightfit-*"))
    dead = list(filter(names_the_dead, notes))
    for lock in sorted(root.glob("*/lock")):
        owners = [note for note in notes if _modified(note) <= _modified(lock) < math.inf]
        if owners and set(owners) <= set(dead) and str(lock) not in map(_target_of, iglob("/proc/[0-9]*/fd/*")):
            dead_locks.append(lock)
        elif lock.parent in folders and time.time() - _modified(lock) > LONG_LOCK_SECONDS:
            lines.append(f"Waiting for {lock}, which another launch holds; if none is compiling, delete that file")
    while any(_compiles_in({str(lock.parent) for lock in dead_locks}, process) for process in iglob("/proc/[0-9]*")):
        time.sleep(LOCK_POLL_SECONDS)
    if _claim(dead):
        for lock in dead_locks:
            lock.unlink(missing_ok=True)
            lines.append(f"Removed {lock}: the launch that was compiling there was killed")
    return lines


def leave_note(root: Path) -> Path:
    """Writes the note that this process may compile in a folder of `root`: its machine and number, and when it started."""
    note = root / f"tightfit-{socket.gethostname()}-{os.getpid()}"
    draft = root / f".{note.name}"
    draft.write_text(f"{boot_id()} {process_namespace()} {started_ticks(os.getpid())}")
    return draft.replace(note)


def names_the_dead(note: Path) -> bool:
    """Whether the process that left `note` has ended for certain. Of another machine's or container's nothing is known here."""
    host, _, process = note.name.removeprefix("tightfit-").rpartition("-")
    try:
        boot, namespace, started = note.read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    if host != socket.gethostname():
        return False
    return boot != boot_id() or (namespace == process_namespace() and started_ticks(int(process)) != started)


def process_namespace() -> str:
    """The kernel's name for the container within which this process's number means it."""
    return os.readlink("/proc/self/ns/pid")


def started_ticks(process: int) -> str | None:
    """When a living process started, in the kernel's ticks since boot; None for one that has ended."""
    stat = process_stat(process)
    return None if stat is None or stat.state in "ZX" else stat.started_ticks


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _modified(path: Path) -> float:
    """Seconds since 1970; infinite when the file is not there (any more)."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _target_of(handle: str) -> str | None:
    """The file that a process has open, as torch has a lock for as long as it holds it; None when that cannot be seen."""
    try:
        return os.readlink(handle)
    except OSError:
        return None


def _compiles_in(folders: set[str], process: str) -> bool:
    """Whether it is a compiler that has outlived its killed launch: two at once would write the same files."""
    try:
        return os.readlink(f"{process}/cwd") in folders and Path(process, "comm").read_text() == "ninja\n"
    except OSError:
        return False


def _claim(dead: list[Path]) -> bool:
    """Removes the notes of the dead. Several launches may find the same: only the one that removes the last note may go on."""
    claimed = False
    for note in dead:
        try:
            note.unlink()
            claimed = True
        except FileNotFoundError:
            claimed = False
    return claimed
