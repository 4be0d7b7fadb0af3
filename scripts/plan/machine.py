"""What the machine has, what this process has taken of it, how fast it is, and the hours to expect. Knows no plan."""

import ctypes
import gc
import os
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.torch_version import TorchVersion

from scripts import config as settings
from scripts.config import TrainingConfig
from scripts.model.activation_offload import host_buffer
from scripts.model.huggingface import teacher_config
from scripts.model.operations import product_dtype

KERNEL_FILE = "/proc/sys/kernel/osrelease"
C_LIBRARY = ctypes.CDLL(None)
PINNED_SIZES = ("pinned_max_cached_size_mb", "pinned_max_round_threshold_mb")
LARGEST_LIMIT = 2**60
BACKWARD_SHARE = 2 / 3
PCI_DEVICES, DRIVER_FILE = "/sys/bus/pci/devices", "/proc/driver/nvidia/version"
NVIDIA, DISPLAY = "0x10de", "0x03"
NOTABLE_SWAP_BYTES = 2**30
TORCH_OF_OLD_CARDS, TORCH_OF_NEW_CARDS = "https://download.pytorch.org/whl/cu126", "https://pytorch.org/get-started/locally"


class Card(NamedTuple):
    """A GPU: its name, and its compute capability `major`.`minor`."""

    name: str
    major: int
    minor: int


class Room(NamedTuple):
    """Bytes for a launch: `gpu` (None without one), `host` and run_dir's `disk`; `which`: "free" or "there in all"."""

    gpu: int | None
    host: int
    disk: int
    which: str


class Rates(NamedTuple):
    """What the machine does in a second: FLOP of matrix products, bytes through host memory, bytes between host and GPU."""

    flops: float
    host_bytes: float
    link_bytes: float


class Peaks(NamedTuple):
    """The most that this process has held at once so far: on the GPU as torch's allocator counts it, and of the host."""

    gpu_bytes: int
    host_bytes: int


class GroupLimit(NamedTuple):
    """A control group's limit of memory, and what its processes use of it; pages of files that it can drop do not count."""

    limit_bytes: int
    used_bytes: int


def has_kernels(card: Card, arch_list: list[str]) -> bool:
    """Whether a torch built for `arch_list`, as torch.cuda.get_arch_list() tells it, runs on `card`.

    A binary sm_XY runs on compute capability X.Y and later minors of X, PTX compute_XY on X.Y and all that is newer (CUDA C++
    Programming Guide). With an "a" at the end, either runs on X.Y alone, with an "f" on later minors of X too. A list without a
    name of NVIDIA's says nothing: True.
    """
    names = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in arch_list]
    codes = [(found[1] + found[4], int(found[2]), int(found[3])) for found in names if found]
    own = (card.major, card.minor)
    return not codes or any(
        (major, minor) == own if kind.endswith("a") else (major, minor) <= own and (kind == "compute" or major == card.major)
        for kind, major, minor in codes
    )


def refuse_card(card: Card, arch_list: list[str]) -> None:
    """Raises ValueError where a torch built for `arch_list` has no kernels for `card`."""
    if has_kernels(card, arch_list):
        return
    oldest, nearest = min(int(re.sub(r"\D", "", name)) for name in arch_list), f"a torch of a newer CUDA, {TORCH_OF_NEW_CARDS}"
    if 10 * card.major + card.minor < oldest:
        nearest = f"a card of {oldest / 10} or newer, or the torch of CUDA 12.6, {TORCH_OF_OLD_CARDS}"
    built_for = f"torch {torch.__version__} is built for {' '.join(arch_list)}"
    raise ValueError(f"{card.name} has compute capability {card.major}.{card.minor} and {built_for}; nearest is {nearest}")


def refuse_precision(precision: str, card: Card | None) -> None:
    """Raises ValueError where `card`, None for the CPU, lacks `precision`: bf16 needs compute capability 8.0, and for fp16
    DeepSpeed asks for 7.0 (accelerator/cuda_accelerator.py, is_fp16_supported).
    """
    if card is None:
        works, named = ["bf16", "fp32"], "a machine without a CUDA device"
    else:
        works = ["bf16"] * (card.major >= 8) + ["fp16"] * (card.major >= 7) + ["fp32"]
        named = f"{card.name} of compute capability {card.major}.{card.minor}"
    if precision not in works:
        raise ValueError(f'precision="{precision}" does not run on {named}; nearest is "{works[0]}"')


def usable_card(device: torch.device) -> Card | None:
    """The GPU that `device` is, None for the CPU. Raises ValueError where torch has no kernels for it; torch itself would only
    warn, in many lines.
    """
    if device.type == "cpu":
        return None
    with warnings.catch_warnings(action="ignore"):
        found = torch.cuda.get_device_properties(device)
    card = Card(found.name, found.major, found.minor)
    refuse_card(card, torch.cuda.get_arch_list())
    return card


def has_nvidia_card(pci_devices: str) -> bool:
    """Whether a folder like /sys/bus/pci/devices lists an NVIDIA card, whether its driver is there or not."""

    def holds(device: Path, name: str, beginning: str) -> bool:
        return (device / name).is_file() and (device / name).read_text().startswith(beginning)

    devices = sorted(Path(pci_devices).glob("*"))
    return any(holds(device, "vendor", NVIDIA) and holds(device, "class", DISPLAY) for device in devices)


def unused_card_words(torch_cuda: str | None, driver_file: str) -> str:
    """Why torch sees no card in a machine that has one, and the remedy. `torch_cuda` is the CUDA that torch is built for, None
    for none; `driver_file` is where a loaded driver says its version.
    """
    path, has = Path(driver_file), "This machine has an NVIDIA card, and training goes on the CPU:"
    if torch_cuda is None:
        return f"{has} this torch is built without CUDA; pip install --force-reinstall torch --index-url {TORCH_OF_OLD_CARDS}"
    if not path.is_file():
        return f"{has} its driver is not loaded; sudo ubuntu-drivers install, or your system's package of it, and restart"
    found = re.search(r"\b\d{3,}\.[\d.]+", path.read_text())
    driver = f"its driver {found[0]}" if found else "its driver"
    older = f"pip install --force-reinstall torch --index-url {TORCH_OF_OLD_CARDS}"
    return f"{has} {driver} does not run CUDA {torch_cuda}, for which torch is built; install a newer driver, or {older}"


def swap_words(memory: dict[str, int]) -> str | None:
    """What a person is told where much of what programs hold lies on the disk, as /proc/meminfo counts it in bytes."""
    used = memory.get("SwapTotal", 0) - memory.get("SwapFree", 0)
    if used < NOTABLE_SWAP_BYTES:
        return None
    gib = f"{used / settings.GIB:.1f} GiB of swap are in use"
    return f"{gib}: steps become many times slower if the training is moved there; close programs, then: sudo swapoff -a"


def refuse_on_this_device(config: TrainingConfig, device: torch.device) -> None:
    """Raises ValueError where torch has no kernels for the device that this rank computes on, or it lacks the precision."""
    refuse_precision(config.precision, usable_card(device))


def room_free(config: TrainingConfig, device: torch.device) -> Room:
    """What is free now: on the GPU, in host memory within every control group's limit, on the disk.

    What this process holds of the host already, and the context that a look at the GPU makes, count as free: plans have them.
    """
    gpu = torch.cuda.mem_get_info(device)[0] + settings.CUDA_CONTEXT_BYTES if device.type == "cuda" else None
    left = [group.limit_bytes - group.used_bytes for group in _group_limits()]
    free = max(0, min([proc_bytes("/proc/meminfo")["MemAvailable"], *left]))
    return Room(gpu, free + proc_bytes("/proc/self/status").get("RssAnon", 0), _disk_usage(config).free, "free")


def room_in_all(config: TrainingConfig, device: torch.device) -> Room:
    """What the machine has, or its control groups allow, whatever else runs."""
    gpu = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    host = min([proc_bytes("/proc/meminfo")["MemTotal"], *(group.limit_bytes for group in _group_limits())])
    return Room(gpu, host, _disk_usage(config).total, "there in all")


def peak_bytes() -> Peaks:
    """What this process has held at most: on the GPU since its run began, of the host since its program began. getrusage counts
    what started the program too, and is for systems without VmHWM.
    """
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Peaks(gpu, proc_bytes("/proc/self/status").get("VmHWM", ever))


def pinned_bytes(num_bytes: int, device_type: str) -> int:
    """What `num_bytes` of page-locked memory take. torch before 2.13 rounds them up to a power of two; from 2.13 on it is told
    not to, by `allocator_settings`. Without a GPU nothing is page-locked.
    """
    is_exact = device_type == "cpu" or can_pin_exactly(torch.__version__)
    return num_bytes if is_exact else 1 << (num_bytes - 1).bit_length()


def can_pin_exactly(torch_version: str) -> bool:
    """Whether this torch knows the settings with which page-locked memory is not rounded up."""
    return TorchVersion(torch_version) >= "2.13"


def boot_id() -> str:
    """The kernel's name for the time since this machine was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def cores_number() -> int:
    """A number that two processes have in common if they may run on the same cores of the same machine: 32 bits of a hash."""
    words = f"{boot_id()} {sorted(os.sched_getaffinity(0))}"
    return int.from_bytes(blake2b(words.encode(), digest_size=4).digest(), "big")


def num_threads(num_cores: int, numbers: list[int], rank: int) -> int:
    """Threads of a rank on its `num_cores`, which it shares with the ranks that have its `cores_number`; by rank, `numbers`.

    A launcher may give each rank cores of its own: `srun --cpus-per-task`, `deepspeed --bind_cores_to_rank`.
    """
    return max(1, num_cores // numbers.count(numbers[rank]))


def keep_freed_memory() -> None:
    """From now on the C library keeps what this process frees for its next tensors: what comes from the system anew costs a
    fault for every 4 KiB.
    """
    if hasattr(C_LIBRARY, "mallopt"):
        for option, num_bytes in settings.MALLOC_OPTIONS.items():
            C_LIBRARY.mallopt(option, num_bytes)


def release_memory() -> None:
    """Gives memory of tensors that are gone back to the GPU, and to the system where the C library still holds it."""
    gc.collect()
    torch.cuda.empty_cache()
    if hasattr(C_LIBRARY, "malloc_trim"):
        C_LIBRARY.malloc_trim(0)


def is_wsl(kernel: str) -> bool:
    """Whether a kernel's release, as in /proc/sys/kernel/osrelease, is that of Windows' Subsystem for Linux."""
    return "microsoft" in kernel.lower()


def allocator_settings(own: str, torch_version: str, on_wsl: bool) -> str:
    """The value of PYTORCH_ALLOC_CONF, from the user's `own` value, "" where there is none.

    What the user set stays, but for how page-locked blocks are rounded and kept. Else segments of GPU memory grow, which leaves
    no gaps; not on WSL, where the first allocation then fails with drivers before R615 (pytorch#192330). From 2.13 on torch is
    told to keep no freed page-locked block above 1 MiB: then it does not round their sizes up either, and hands no freed block
    to a larger request (pytorch#192722).
    """
    parts = [part for part in own.split(",") if part.strip() and not part.strip().startswith(PINNED_SIZES)]
    if not parts and not on_wsl:
        parts = ["expandable_segments:True"]
    return ",".join(parts + ["pinned_max_cached_size_mb:1"] * can_pin_exactly(torch_version))


def flops_per_token(config: TrainingConfig) -> int:
    """FLOP of a training token: 6 for each parameter of a matrix (Kaplan et al. 2020), and causal attention, which is half of
    full attention (Dao 2023). The blocks' forward counts again where activations are recomputed; a teacher's beside it once.
    With `mask_across_documents` that is the most that attention takes, which documents of a whole window do.
    """
    head, repeats = 6 * config.vocab_size * config.hidden_size, 3 if config.activation_checkpointing == "none" else 4
    return repeats * _forward_flops(config) + head + (_teacher_flops(config) if config.teacher_top_k is None else 0)


def tokens_per_second(config: TrainingConfig, world_size: int, local_size: int, device_type: str, rates: Rates) -> float:
    """What to expect of training steps on all ranks: products, gradients that go down beside the backward, then the update.

    Products reach PRODUCT_EFFICIENCY_SHARE of their measured rate, Muon's too. Gradients go down in the training dtype and are
    added in float32. Steps count as one of their mean size. Evaluation, sampling and saving are not counted.
    """
    own, size = config.num_parameters / world_size, config.dtype.itemsize
    on_gpu, host = device_type == "cuda", rates.host_bytes / local_size
    step_tokens, micro_batch_tokens = config.num_tokens / config.num_steps, config.micro_batch_rows * config.context_length
    micro_batches, flops = step_tokens / (micro_batch_tokens * world_size), settings.PRODUCT_EFFICIENCY_SHARE * rates.flops
    products = micro_batch_tokens * flops_per_token(config) / flops
    trips = micro_batches if config.accumulate_on == "cpu" else 1
    down = max(own * size / rates.link_bytes if on_gpu else 0.0, own * (size + 8) / host)
    reduction = 2 * config.num_parameters * size / rates.link_bytes if world_size > 1 else 0.0
    hidden = products * BACKWARD_SHARE if on_gpu and trips > 1 else 0.0
    up = config.num_parameters * size / rates.link_bytes if on_gpu else 0.0
    update = update_bytes(config) / world_size / host + newton_schulz_flops(config) / world_size / flops
    up += 2 * muon_parameters(config) / world_size * size / rates.link_bytes if on_gpu else 0.0
    seconds = micro_batches * (products + reduction) + trips * max(0.0, down - hidden) + update + up
    return step_tokens / seconds


def update_bytes(config: TrainingConfig) -> int:
    """Bytes that all ranks' updates move through host memory in a step. AdamW reads masters, gradients and two moments, writes
    masters and moments, and reads masters again to write weights. Muon has one moment, writes what goes up and reads what
    comes down.
    """
    size, moment = config.dtype.itemsize, settings.PRECISIONS[config.optimizer_state_precision].itemsize
    muon, both = muon_parameters(config), 4 + 4 + 4 + 4 + size
    return config.num_parameters * (both + 4 * moment) + muon * (2 * size - 2 * moment)


def muon_parameters(config: TrainingConfig) -> int:
    """Parameters that Muon updates: the matrices of all blocks, or none."""
    return config.num_layers * config.block_matrix_parameters if config.optimizer == "muon" else 0


def moments_bytes(config: TrainingConfig) -> int:
    """Bytes that optimizers remember beside float32 masters, all ranks together: Muon one momentum, AdamW two moments."""
    size = settings.PRECISIONS[config.optimizer_state_precision].itemsize
    return size * (2 * config.num_parameters - muon_parameters(config))


def newton_schulz_flops(config: TrainingConfig) -> int:
    """FLOP of Muon's products in a step, all ranks together; 0 without Muon."""
    if config.optimizer != "muon":
        return 0
    width, queries, keys = config.hidden_size, config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    shapes = ((width, queries), (width, keys), (width, keys), (queries, width), *[(width, config.mlp_size)] * 3)
    sides = (sorted(shape) for shape in shapes)
    of_block = sum(2 * short * short * (2 * long + short) for short, long in sides)
    return config.num_layers * settings.NEWTON_SCHULZ_ITERATIONS * of_block


def teacher_seconds(config: TrainingConfig, world_size: int, rates: Rates) -> float:
    """How long the teacher alone takes at most to label what the run reads, where it reads nothing twice; 0 without
    `teacher_top_k`.
    """
    if config.teacher_top_k is None:
        return 0.0
    own_tokens = config.num_tokens / world_size
    return own_tokens * _teacher_flops(config) / (settings.PRODUCT_EFFICIENCY_SHARE * rates.flops)


def hours(config: TrainingConfig, tokens_per_second: float, teacher_seconds: float) -> float:
    """Hours for all steps at a speed, and for the teacher before them."""
    return (config.num_tokens / tokens_per_second + teacher_seconds) / 3600


def measure_rates(config: TrainingConfig, device: torch.device) -> Rates:
    """Measures this machine in a fraction of a second: a product of the MLP's shape, copies in host memory and to the GPU."""
    rows = min(config.micro_batch_rows * config.context_length, settings.RATE_MOST_ROWS[device.type])
    dtype, shape = product_dtype(config.dtype, device), (config.hidden_size, config.mlp_size)
    left, right = torch.ones(rows, shape[0], dtype=dtype, device=device), torch.ones(*shape, dtype=dtype, device=device)
    flops = 2 * rows * shape[0] * shape[1] / _fastest_seconds(lambda: left @ right, device)
    copied = settings.RATE_COPIED_BYTES
    here, there = np.ones((2, copied), dtype=np.uint8)
    host_bytes = 2 * copied / _fastest_seconds(lambda: np.copyto(there, here), torch.device("cpu"))
    if device.type == "cpu":
        return Rates(flops, host_bytes, host_bytes)
    pinned = host_buffer(copied, device)
    away = torch.empty_like(pinned, device=device)
    return Rates(flops, host_bytes, copied / _fastest_seconds(lambda: away.copy_(pinned, non_blocking=True), device))


def _forward_flops(config: TrainingConfig) -> int:
    """FLOP of one token in the forward of all blocks."""
    attention = config.context_length * config.num_heads * config.head_width
    return 2 * config.num_layers * (config.block_parameters + attention)


def _teacher_flops(config: TrainingConfig) -> int:
    """FLOP of one token in the teacher's forward, with its head; 0 without a teacher."""
    teacher = teacher_config(config)
    return 0 if teacher is None else _forward_flops(teacher) + 2 * teacher.vocab_size * teacher.hidden_size


def _disk_usage(config: TrainingConfig):
    folder = Path(config.run_dir).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))


def proc_bytes(path: str) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, by name, in bytes."""
    lines = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def _group_limits() -> Iterator[GroupLimit]:
    """Those of this process's memory control groups, of version 1 and 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, names, place = line.split(":", 2)
        if "memory" in names.split(","):
            yield from limits_above("/sys/fs/cgroup/memory", place, "memory.limit_in_bytes", "memory.usage_in_bytes")
        elif number == "0":
            yield from limits_above("/sys/fs/cgroup", place, "memory.max", "memory.current")


def limits_above(root: str, place: str, limit_file: str, used_file: str) -> Iterator[GroupLimit]:
    """Limits of the control group at `place` below the folder `root`, and of all above it: a container's own is the root."""
    inner = Path(place.lstrip("/"))
    for folder in {Path(root, inner), *(Path(root, above) for above in inner.parents)}:
        paths = [folder / name for name in (limit_file, used_file, "memory.stat")]
        limit, used, table = (path.read_text().strip() if path.is_file() else "" for path in paths)
        if limit.isdecimal() and used.isdecimal() and int(limit) < LARGEST_LIMIT:
            counts = dict(line.split() for line in table.splitlines())
            pages = int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))
            yield GroupLimit(int(limit), int(used) - pages)


def _fastest_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of several calls, which take RATE_SECONDS together; one call before them is not counted."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    began, taken = time.perf_counter(), [once()]
    while time.perf_counter() - began < settings.RATE_SECONDS:
        taken.append(once())
    return min(taken)
