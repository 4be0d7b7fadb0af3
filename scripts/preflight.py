"""Before step one: the toolchain that DeepSpeed compiles with, and the truth of its updates. Knows no data and no checkpoint.

The truth check trains a tiny clone of the run through the same DeepSpeed dict, ranks and accumulation, and again in float64 by
plain torch, in operations of its own: neither scripts/model.py's nor scripts/losses.py's autograd functions judge themselves.
"""

import copy
import gc
import math
import os
import shutil
import socket
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import iglob
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import cpp_extension

from scripts.config import TrainingConfig
from scripts.losses import next_token_loss
from scripts.model import Block, Decoder, empty_model, parameter_groups
from scripts.offload import DEEPSPEED_VERSION

LONG_WAIT_SECONDS, POLL_SECONDS = 60, 0.1
LEARNING_RATE = 1e-2
MOST_TRIES = 40
MOST_STEPS = 3
FEWEST_MICRO_BATCHES, MOST_MICRO_BATCHES = 3, 8
PLAIN_ROWS = 1024
ROUNDING = 1e-3

Steps = list[list[Tensor]]
TrainTiny = Callable[[TrainingConfig, Decoder, Steps, float], tuple[dict[str, Tensor], list[float]]]


class Bounds(NamedTuple):
    """How far rounding may carry the update of all weights, that of one group and a gradient norm, relative to the right."""

    update: float
    group_update: float
    norm: float


class Finding(NamedTuple):
    """One comparison: what was compared, how far it is off, how far it may be."""

    what: str
    measured: float
    bound: float


BOUNDS = {"fp32": Bounds(1e-3, 1e-3, 1e-4), "bf16": Bounds(0.07, 0.1, 0.04), "fp16": Bounds(0.07, 0.1, 0.04)}


def extension_folders(config: TrainingConfig) -> list[Path]:
    """Where torch builds the C++ extensions that DeepSpeed loads for this run, those left out that came with its installation.

    Raises:
        ValueError: the folders can be neither found nor made.
    """
    modules = ["adam.cpu_adam" if config.offload_optimizer else "adam.fused_adam"]
    modules += [] if torch.cuda.is_available() else ["comm.deepspeed_shm_comm"]
    names = [module.split(".")[1] for module in modules if not _is_installed(f"deepspeed.ops.{module}_op")]
    try:
        folders = [Path(cpp_extension._get_build_directory(name, False)).resolve() for name in names]
    except OSError as fault:
        raise ValueError(
            f"DeepSpeed cannot compile: {fault}; set TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from None
    for folder in folders:
        if not os.access(folder, os.W_OK) or not os.access(folder.parent, os.W_OK):
            raise ValueError(f"{folder} cannot be written; set TORCH_EXTENSIONS_DIR to a folder that can")
    return folders


def refuse_missing_compilers(config: TrainingConfig) -> None:
    """Checks what DeepSpeed's first start on a machine compiles with; once compiled, ninja alone is needed.

    Raises:
        ValueError: ninja, the C++ compiler, Python's headers or nvcc is not there.
    """
    folders = extension_folders(config)
    unbuilt = [folder.name for folder in folders if not (folder / f"{folder.name}.so").exists()]
    if folders and not cpp_extension.is_ninja_available():
        raise ValueError("ninja is not on PATH and DeepSpeed starts with it; activate the environment, or pip install ninja")
    if not unbuilt:
        return
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        raise ValueError(f"{compiler} is not on PATH and DeepSpeed must compile {unbuilt[0]} once; apt install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise ValueError(f"Python.h is not there and DeepSpeed must compile {unbuilt[0]} once; apt install python3-dev")
    if torch.cuda.is_available() and "fused_adam" in unbuilt and not Path(cpp_extension.CUDA_HOME or "", "bin/nvcc").exists():
        raise ValueError(
            "nvcc is not there and DeepSpeed must compile fused_adam once; apt install nvidia-cuda-toolkit,"
            " or set offload_optimizer=True"
        )


@contextmanager
def compiling(config: TrainingConfig, local_rank: int) -> Iterator[list[str]]:
    """Put around whatever may compile DeepSpeed's extensions; yields lines to say before that, on local rank 0 only.

    torch's lock in an extension's folder outlives a launch that is killed while it compiles, and the next one waits for it for
    ever. So each process leaves a note beside the folders while it may compile, and a lock whose notes all name dead processes
    of this machine is removed. Other local ranks wait until older locks are gone: whoever waits in torch itself loads what the
    lock's owner should have built.
    """
    folders = extension_folders(config)
    if not folders:
        yield []
        return
    lines = clear_dead_locks(folders) if local_rank == 0 else []
    started = time.time()
    while local_rank > 0 and any(_modified(folder / "lock") < started for folder in folders):
        time.sleep(POLL_SECONDS)
    note = _leave_note(folders[0].parent)
    try:
        yield lines
    finally:
        note.unlink(missing_ok=True)


def clear_dead_locks(folders: list[Path]) -> list[str]:
    """Removes the locks beside `folders` that killed launches left; says which, and which of `folders`' own are waited for."""
    root, lines, dead_locks = folders[0].parent, [], []
    notes = sorted(root.glob("tightfit-*"))
    dead = [note for note in notes if _names_the_dead(note)]
    for lock in sorted(root.glob("*/lock")):
        owners = [note for note in notes if _modified(note) <= _modified(lock) < math.inf]
        if owners and set(owners) <= set(dead) and not _is_open(lock):
            dead_locks.append(lock)
        elif lock.parent in folders and time.time() - _modified(lock) > LONG_WAIT_SECONDS:
            lines.append(f"Waiting for {lock}, which another launch holds; if none is compiling, delete that file")
    for lock in dead_locks:
        _await_orphans(lock.parent)
    if not _claim(dead):
        return lines
    for lock in dead_locks:
        lock.unlink(missing_ok=True)
        lines.append(f"Removed {lock}: the launch that was compiling there was killed")
    return lines


def tiny_clone(config: TrainingConfig, world_size: int) -> TrainingConfig:
    """The run's configuration in small shapes with a tied head and 3 to 8 micro-batches a step; DeepSpeed's dict is the run's,
    apart from batch and bucket sizes."""
    steps = min(max(FEWEST_MICRO_BATCHES, config.accumulation_steps(world_size)), MOST_MICRO_BATCHES)
    rows, length = 2, 8
    return replace(
        config, vocab_size=257, tokenizer_path=None, context_length=length, hidden_size=32, num_layers=2, num_heads=4,
        num_kv_heads=2, head_size=None, mlp_size=48, tie_embeddings=True, micro_batch_rows=rows,
        tokens_per_step=rows * length * steps * world_size, loss_chunk_rows=rows * length, eval_tokens=length, teacher_dir=None,
        teacher_top_k=None, rope_scaling=None,
    )  # fmt: skip


def tiny_objective(engine, windows: Tensor, config: TrainingConfig) -> Tensor:
    """The loss that `train_tiny` calls `backward` on: windows (B, T + 1) int64 -> mean nats per token, () float32."""
    return next_token_loss(engine(windows[:, :-1]), engine.module.head, windows[:, 1:], config.loss_chunk_rows)


def refuse_untrue_updates(
    config: TrainingConfig, rank: int, world_size: int, device: torch.device, train_tiny: TrainTiny
) -> None:
    """Compares a few updates of the tiny clone through DeepSpeed with plain torch; every rank calls it and learns the same.

    `train_tiny(tiny, model, steps, learning_rate)` trains `model` through DeepSpeed, one update for each list of this rank's
    micro-batches (B, T + 1) int64, and returns the float32 masters by name and each update's gradient norm before clipping.

    Raises:
        ValueError: an update, a gradient norm or a weight is not what the same batch gives in plain torch.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tiny = tiny_clone(config, world_size)
        model = _draw(empty_model(tiny, device))
        plain, before = _plain_copy(model), _plain_copy(model)
        windows = tiny_windows(tiny, world_size)
        masters, norms = train_tiny(tiny, model, _of_rank(windows, rank, tiny, device), LEARNING_RATE)
        plain_norms = train_plain(plain, windows, tiny)
    findings = [
        *_update_findings(plain, before, masters, tiny),
        *_norm_findings(plain_norms, norms, tiny),
        _weight_finding(model, masters),
    ]
    del model, masters
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _refuse_worst(findings, device)


def tiny_windows(tiny: TrainingConfig, world_size: int) -> Tensor:
    """The token windows of all updates, ranks and micro-batches: (steps, W, G, B, T + 1) int64, the same at every call.

    Each micro-batch of a rank draws from tokens of its own. Updates take turns in repeating few tokens, so that gradient norms
    differ and a clip that is left out shows. There is one update where Adam's second is unbounded, beta1^2 > beta2.
    """
    num_micro_batches = tiny.accumulation_steps(world_size)
    num_steps = MOST_STEPS if tiny.beta1**2 <= tiny.beta2 else 1
    shape = (num_steps, world_size, num_micro_batches, tiny.micro_batch_rows, tiny.context_length + 1)
    pool = tiny.vocab_size // num_micro_batches
    drawn = torch.randint(pool, shape, generator=torch.Generator().manual_seed(0))
    varied = torch.tensor([2, pool, 2][:num_steps]).view(-1, 1, 1, 1, 1)
    ranks, micro_batches = torch.arange(world_size).view(1, -1, 1, 1, 1), torch.arange(num_micro_batches).view(1, 1, -1, 1, 1)
    return (drawn % varied + 5 * ranks) % pool + micro_batches * pool


def train_plain(plain: Decoder, windows: Tensor, tiny: TrainingConfig) -> list[float]:
    """The same updates by torch alone, on the whole batch, in place; returns the gradient norms before clipping.

    The forward sees the weights as the training dtype rounds them, which is what DeepSpeed's forward reads.
    """
    groups = parameter_groups(plain, tiny.weight_decay)
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (tiny.beta1, tiny.beta2), tiny.adam_eps)  # pyright: ignore
    norms = []
    for step in windows:
        optimizer.zero_grad()
        batch = step.flatten(0, 2)
        for part in batch.split(PLAIN_ROWS):
            (plain_loss(plain, part, tiny) * len(part) / len(batch)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), tiny.max_grad_norm)))
        optimizer.step()
    return norms


def plain_loss(plain: Decoder, windows: Tensor, tiny: TrainingConfig) -> Tensor:
    """Mean nats per token of windows (B, T + 1) int64 in the dtype of `plain`, by ordinary operations alone."""
    table = _rounded(plain.head, tiny)
    x = table[windows[:, :-1]]
    for block in plain.model.layers:
        x = _plain_block(x, block, tiny)  # pyright: ignore[reportArgumentType]
    logits = _plain_norm(x, plain.model.norm.weight, tiny) @ table.T
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


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


def _leave_note(root: Path) -> Path:
    note = root / f"tightfit-{socket.gethostname()}-{os.getpid()}"
    draft = root / f".{note.name}"
    draft.write_text(f"{_boot()} {_process_space()} {_started(os.getpid())}")
    return draft.replace(note)


def _names_the_dead(note: Path) -> bool:
    """Whether its process is known to have ended; of another machine's or container's processes nothing is known here."""
    host, _, pid = note.name.removeprefix("tightfit-").rpartition("-")
    try:
        boot, space, started = note.read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    if host != socket.gethostname():
        return False
    return boot != _boot() or (space == _process_space() and _started(int(pid)) != started)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_space() -> str:
    return os.readlink("/proc/self/ns/pid")


def _started(pid: int) -> str | None:
    """When a living process started, in the kernel's ticks since boot; None for one that has ended."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else numbers[18]


def _is_open(lock: Path) -> bool:
    """torch keeps its lock open as long as it holds it."""
    return any(_link(handle) == str(lock) for handle in iglob("/proc/[0-9]*/fd/*"))


def _claim(dead: list[Path]) -> bool:
    """Removes the notes; of several launches that find the same, only the one that removes the last of them may go on."""
    claimed = False
    for note in dead:
        try:
            note.unlink()
            claimed = True
        except FileNotFoundError:
            claimed = False
    return claimed


def _await_orphans(folder: Path) -> None:
    """Compilers outlive a launch that is killed; two at once would write the same files."""
    while any(_link(f"{process}/cwd") == str(folder) and _command(process) == "ninja" for process in iglob("/proc/[0-9]*")):
        time.sleep(POLL_SECONDS)


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _command(process: str) -> str | None:
    try:
        return Path(process, "comm").read_text().strip()
    except OSError:
        return None


def _plain_block(x: Tensor, block: Block, tiny: TrainingConfig) -> Tensor:
    attention, mlp = block.self_attn, block.mlp
    normed = _plain_norm(x, block.input_layernorm.weight, tiny)
    q, k, v = (
        (normed @ _rounded(layer.weight, tiny).T).unflatten(-1, (-1, tiny.head_width)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if tiny.qk_norm:
        q = _plain_norm(q, attention.q_norm.weight, tiny)  # pyright: ignore[reportArgumentType]
        k = _plain_norm(k, attention.k_norm.weight, tiny)  # pyright: ignore[reportArgumentType]
    mixed = _plain_attention(_plain_turn(q, tiny), _plain_turn(k, tiny), v)
    x = x + mixed.transpose(1, 2).flatten(2) @ _rounded(attention.o_proj.weight, tiny).T
    normed = _plain_norm(x, block.post_attention_layernorm.weight, tiny)
    gate, up = (normed @ _rounded(layer.weight, tiny).T for layer in (mlp.gate_proj, mlp.up_proj))
    return x + (gate * torch.sigmoid(gate) * up) @ _rounded(mlp.down_proj.weight, tiny).T


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def _plain_turn(x: Tensor, tiny: TrainingConfig) -> Tensor:
    half = torch.arange(0, tiny.head_width, 2, dtype=x.dtype) / tiny.head_width
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), tiny.rope_theta**-half)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _plain_norm(x: Tensor, gain: Tensor, tiny: TrainingConfig) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + tiny.norm_eps) * _rounded(gain, tiny)


def _rounded(weight: Tensor, tiny: TrainingConfig) -> Tensor:
    return weight + (weight.to(tiny.dtype).to(weight.dtype) - weight).detach()


@torch.no_grad()
def _draw(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(1.0 + 0.2 * drawn if weight.dim() == 1 else 0.1 * drawn)
    return model


def _plain_copy(model: Decoder) -> Decoder:
    return copy.deepcopy(model).to(torch.device("cpu"), torch.float64)


def _of_rank(windows: Tensor, rank: int, tiny: TrainingConfig, device: torch.device) -> Steps:
    return [list(step.to(device)) for step in windows[:, rank]]


def _update_findings(plain: Decoder, start: Decoder, masters: dict[str, Tensor], tiny: TrainingConfig) -> list[Finding]:
    """How far each parameter group's whole update is from the plain one, relative to it (L1), and that of all together."""
    names = {parameter: name for name, parameter in plain.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in parameter_groups(plain, tiny.weight_decay)]
    after, before, findings = dict(plain.named_parameters()), dict(start.named_parameters()), []
    for group in [list(names.values()), *groups]:
        off, wanted, size = (
            sum(float(each[name].detach().abs().sum()) for name in group)
            for each in (
                {name: masters[name].cpu().double() - after[name] for name in group},
                {name: after[name] - before[name] for name in group},
                before,
            )
        )
        whole, bounds = len(group) == len(names), BOUNDS[tiny.precision]
        where, bound = ("all weights", bounds.update) if whole else (f"{group[0]} and its group", bounds.group_update)
        findings.append(Finding(f"the difference of the update of {where}", off / (wanted + ROUNDING * size), bound))
    return findings


def _norm_findings(wanted: list[float], found: list[float], tiny: TrainingConfig) -> list[Finding]:
    return [
        Finding(f"the difference of gradient norm {step}", abs(norm / right - 1.0), BOUNDS[tiny.precision].norm)
        for step, (right, norm) in enumerate(zip(wanted, found, strict=True), start=1)
    ]


def _weight_finding(model: Decoder, masters: dict[str, Tensor]) -> Finding:
    """The weights that this rank's forward reads are the masters, rounded: then they are the same on every rank."""
    unlike = sum(int((weight.cpu() != masters[name].cpu().to(weight.dtype)).sum()) for name, weight in model.named_parameters())
    return Finding("the number of weights unlike their masters", float(unlike), 0.5)


def _refuse_worst(findings: list[Finding], device: torch.device) -> None:
    """Raises on every rank when any rank's finding is out of bounds, about the one that is furthest out on any rank."""
    shares = torch.tensor([found.measured / found.bound for found in findings], dtype=torch.float64)
    on_any_rank = shares.nan_to_num(nan=math.inf).to(device)
    torch.distributed.all_reduce(on_any_rank, torch.distributed.ReduceOp.MAX)
    share, worst = on_any_rank.max(0)
    if share > 1.0:
        what, _, bound = findings[int(worst)]
        raise ValueError(
            f"DeepSpeed's updates are not those of plain torch: {what} is {float(share) * bound:.3g}, above {bound:g};"
            f" pip install --force-reinstall deepspeed=={DEEPSPEED_VERSION}, or use another torch, driver or GPU"
        )
