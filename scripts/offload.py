"""The only room that knows DeepSpeed's insides: flat partitions, Adam's state, the path of gradients. Guarded by the version.

ZeRO-2 lays each parameter group out as one flat vector; rank r of W owns elements r * partition .. (r + 1) * partition of it.
The order within the vector does not depend on W, which makes the state elastic: any slice of it can be given to any rank.
"""

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cpuinfo
import torch
from torch import Tensor

DEEPSPEED_VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

CHUNK_ELEMENTS = 2**24
PIECE_ELEMENTS = 2**22
CACHE_ELEMENTS = 2**18
ROW_ELEMENTS = 2**10

ReadSlice = Callable[[str, int, Tensor], None]


class Partition(NamedTuple):
    """The elements start..stop of one group's flat vector of `num_elements` that this rank owns, padding left out."""

    start: int
    stop: int
    num_elements: int


class Piece(NamedTuple):
    """Elements start..stop of the ring, and the adding of what lies there to its place on the host."""

    start: int
    stop: int
    arrival: Future


class Ring:
    """Page-locked memory through which gradients go down to the host, and the one thread that adds them up there, in order.

    On a GPU the copies run on a stream of their own, behind what has been computed. Of the gradients on their way the GPU keeps
    `held_elements`, or one that is larger; computing waits for those before them. A sender waits for room in the ring.
    """

    def __init__(self, memory: Tensor, held_elements: int, device: torch.device) -> None:
        self._memory, self._held_elements = memory, held_elements
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "gradients", partial(torch.cuda.set_device, device) if self._stream else None)
        self._pieces: deque[Piece] = deque()
        self._held: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._next = 0

    def send(self, source: Tensor, target: Tensor, is_first: bool) -> None:
        """Writes `source` (n,) into `target` (n,) float32 on the host, or adds it when it is not the first of a step.

        Raises:
            Exception: what went wrong in the thread with a piece before.
        """
        self.release(self._held_elements - len(source))
        copied = None
        for part in _slices(len(source), min(PIECE_ELEMENTS, len(self._memory) // 2)):
            start = self._make_room(part.stop - part.start)
            slot = self._memory[start : self._next]
            copied = self._copy(source[part], slot)
            arrival = self._thread.submit(_arrive, copied, slot, target[part], is_first)
            self._pieces.append(Piece(start, self._next, arrival))
        self._held.append((source, copied))

    def release(self, num_elements: int) -> None:
        """Lets go of the oldest gradients on the GPU until `num_elements` are kept; computing waits until they are copied."""
        while self._held and sum(len(source) for source, _ in self._held) > num_elements:
            _, copied = self._held.popleft()
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)

    def drain(self) -> None:
        """Waits until all that was sent has arrived.

        Raises:
            Exception: what went wrong in the thread.
        """
        while self._pieces:
            self._pieces.popleft().arrival.result()
        self._held.clear()

    def close(self) -> None:
        """Ends the thread, after all that was sent."""
        self._thread.shutdown()

    def _make_room(self, num_elements: int) -> int:
        start = self._next if self._next + num_elements <= len(self._memory) else 0
        self._next = start + num_elements
        while any(piece.start < self._next and start < piece.stop for piece in self._pieces):
            self._pieces.popleft().arrival.result()
        return start

    def _copy(self, source: Tensor, slot: Tensor) -> torch.cuda.Event | None:
        if self._stream is None:
            slot.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            slot.copy_(source, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._stream)
        return copied


def refuse_other_versions() -> None:
    """Raises ValueError unless the installed DeepSpeed is the one whose insides this module was written against."""
    installed = version("deepspeed").split("+")[0]
    if installed != DEEPSPEED_VERSION:
        raise ValueError(
            f"deepspeed=={installed} is installed; tightfit needs deepspeed=={DEEPSPEED_VERSION}: pip install -e ."
        )


def forget_shared_memory(address: str, port: str, rank: int) -> None:
    """Takes away the name of the buffer that DeepSpeed shares among ranks of one machine without a GPU, once every rank has
    opened it: with its name it would outlive the processes, 66 MiB a rank.
    """
    Path("/dev", "shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def start_quickly() -> None:
    """Spares two detours of DeepSpeed's. Each CPU Adam asks cpuinfo for the processor's maker, by subprocesses that take a
    second: it is asked once, meanwhile. Every engine imports Muon to be compiled, which loads torch's compiler, a second and
    90 MiB: it stays as it is written.
    """
    from deepspeed.runtime import compiler

    cpuinfo.get_cpu_info = ThreadPoolExecutor(1).submit(cpuinfo.get_cpu_info).result
    compile_with = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        compiler.compile = compile_with


def lighten(engine, config) -> None:
    """Replaces what DeepSpeed keeps and moves for an optimizer on the host by less. N parameters, W ranks, G micro-batches a
    step, w bytes a weight, L elements of the largest partition.

    Kept on the GPU: weights w N; with `accumulate_on="gpu"` and G > 1 also N / W sums in `accumulation_precision`. In a
    backward: on several ranks DeepSpeed's bucket of `bucket_elements`; gradients on their way down, at most one block or one
    parameter. On the host: 16 N / W of masters, gradients and moments, and 2 w L of staging, page-locked for a GPU, which
    gradients on their way down and weights on their way up share. Bytes moved in a step: down G w N / W, or N / W times the
    size of a sum on the GPU; up w N / W.
    """
    if not config.offload_optimizer:
        return
    optimizer, device = engine.optimizer, engine.device
    for name in ("temp_grad_buffer_for_gpu_offload", "temp_grad_buffer_for_cpu_offload"):
        setattr(optimizer, name, torch.empty(0))
    sums = _sums_on_device(optimizer, config, device)
    staging = _share_staging(optimizer, config.dtype, device)
    dtype = sums[0].dtype if sums else config.dtype
    ring = Ring(staging.view(dtype), config.bucket_elements, device)
    send = ring.send if device.type == "cuda" else _add_up
    if torch.distributed.get_world_size(optimizer.dp_process_group) == 1:
        optimizer.process_gradients = partial(_take_whole, optimizer, sums, send)
        optimizer.reduce_ipg_grads = partial(ring.release, 0)
    else:
        optimizer.copy_grads_in_partition = partial(_take, optimizer, sums, send)
        optimizer.reduce_ipg_grads = partial(_reduce, optimizer, ring)
    optimizer._wait_for_offload_copies = ring.drain
    optimizer.scaled_global_norm = partial(_norm, optimizer, device)
    optimizer.unscale_and_clip_grads = partial(_clip, optimizer)
    optimizer._optimizer_step = partial(_update, optimizer, deque(), device)
    optimizer.destroy = partial(_destroy, optimizer, ring)


def _sums_on_device(optimizer, config, device: torch.device) -> list[Tensor]:
    """A flat sum of gradients a group where they wait on the GPU between micro-batches, else none."""
    if config.accumulate_on == "cpu" or optimizer.gradient_accumulation_steps == 1:
        return []
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.accumulation_precision]
    return [torch.zeros(int(size), dtype=dtype, device=device) for size in optimizer.partition_size]


def _share_staging(optimizer, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bytes for two of the largest partition, which the groups' weights take in turns instead of keeping one each."""
    largest = max(map(int, optimizer.partition_size)) * dtype.itemsize
    staging = torch.empty(2 * largest, dtype=torch.uint8, pin_memory=device.type == "cuda")
    halves = [half.view(dtype) for half in staging.split(largest)]
    optimizer.param_buffer_of_bit16_for_cpu_offload_groups = [
        halves[group % 2][: int(size)] for group, size in enumerate(optimizer.partition_size)
    ]
    return staging


def _take_whole(optimizer, sums: list[Tensor], send: Callable, weight, group: int) -> None:
    """One rank: a gradient leaves as soon as it is made, without a bucket."""
    if not optimizer.ready_for_gradients:
        optimizer.micro_step_id += 1
        optimizer.ready_for_gradients = True
    _take(optimizer, sums, send, weight, group)


def _take(optimizer, sums: list[Tensor], send: Callable, weight, _: int) -> None:
    """Adds this rank's slice of a gradient to the sum on the GPU, which goes down with the last, or sends it down itself.

    DeepSpeed's own flag of the last micro-batch is set only when the backward reaches the model's output: after the head.
    """
    group, offset, start, size = optimizer.grad_position[optimizer.get_param_id(weight)]
    gradient = weight.grad.detach().reshape(-1)[offset : offset + size]
    optimizer.clear_grad_attribute(weight)
    place, is_first = slice(start, start + size), optimizer.micro_step_id == 0
    is_last = optimizer.micro_step_id == optimizer.gradient_accumulation_steps - 1
    if sums:
        _add_up(gradient, sums[group][place], is_first)
        gradient, is_first = sums[group][place], True
    if is_last or not sums:
        send(gradient, optimizer.single_partition_of_fp32_groups[group].grad[place], is_first)


def _reduce(optimizer, ring: Ring, comm_dtype: torch.dtype | None = None) -> None:
    """Several ranks: DeepSpeed's own reduction; its bucket is written again only when this rank's slices are copied out."""
    type(optimizer).reduce_ipg_grads(optimizer, comm_dtype)
    ring.release(0)


def _norm(optimizer, device: torch.device) -> Tensor:
    """The norm of all ranks' gradients () float32, -1 when it is not finite: what DeepSpeed's own returns."""
    gradients = [master.grad for master in optimizer.single_partition_of_fp32_groups]
    square = torch.tensor(sum(map(_square, gradients)), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
    norm = math.sqrt(square.item()) if square.isfinite() else -1.0
    return torch.tensor(norm, dtype=torch.float32)


def _square(vector: Tensor) -> float:
    """The sum of squares of `vector` (n,) float32: float32 within a row of ROW_ELEMENTS, float64 over rows; no copy of it."""
    total = 0.0
    for part in _slices(len(vector), CHUNK_ELEMENTS):
        whole = (part.stop - part.start) // ROW_ELEMENTS * ROW_ELEMENTS
        rows = torch.linalg.vector_norm(vector[part][:whole].view(-1, ROW_ELEMENTS), dim=1)
        rest = torch.linalg.vector_norm(vector[part][whole:])
        total += float(rows.double().square().sum()) + float(rest) ** 2
    return total


def _clip(optimizer, gradients: list[Tensor], norm: Tensor) -> None:
    """DeepSpeed's own, left out where it would multiply every gradient by one."""
    if optimizer.loss_scale != 1.0 or (norm + 1e-6) / optimizer.clip_grad > 1.0:
        type(optimizer).unscale_and_clip_grads(optimizer, gradients, norm)


def _update(optimizer, sent: deque, device: torch.device, group: int) -> None:
    """DeepSpeed's own; then waits until the staging that it fills next, with this group's weights, has gone up for the group
    before the last.
    """
    if device.type == "cuda":
        sent.append(torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))
    type(optimizer)._optimizer_step(optimizer, group)
    if len(sent) > 1:
        sent.popleft().synchronize()


def _destroy(optimizer, ring: Ring) -> None:
    try:
        type(optimizer).destroy(optimizer)
    finally:
        ring.close()


def _arrive(copied: torch.cuda.Event | None, slot: Tensor, target: Tensor, is_first: bool) -> None:
    if copied is not None:
        copied.synchronize()
    _add_up(slot, target, is_first)


def _add_up(source: Tensor, target: Tensor, is_first: bool) -> None:
    """target = source or target += source; on the host some elements at a time, because torch casts a copy of the source."""
    for part in _slices(len(source), CACHE_ELEMENTS if source.device.type == "cpu" else len(source)):
        if is_first:
            target[part].copy_(source[part])
        else:
            target[part].add_(source[part])


def _slices(num_elements: int, most: int) -> list[slice]:
    return [slice(start, min(num_elements, start + most)) for start in range(0, num_elements, most)]


def partitions(engine) -> list[Partition]:
    """This rank's slice of each parameter group's flat vector."""
    optimizer, found = engine.optimizer, []
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        offsets, meta = optimizer.round_robin_bit16_offsets[group], optimizer.round_robin_bit16_meta[group]
        num_elements = offsets[-1] + meta[-1].numel()
        start = min(rank * master.numel(), num_elements)
        found.append(Partition(start, min(start + master.numel(), num_elements), num_elements))
    return found


def optimizer_tensors(engine) -> dict[str, Tensor]:
    """This rank's masters and moments in float32, views without copies: `group.<i>.master`, `.exp_avg`, `.exp_avg_sq`."""
    tensors = {}
    for group, (master, part) in enumerate(_owned(engine)):
        size = part.stop - part.start
        state = _adam_state(engine, master)
        tensors[f"group.{group}.master"] = master.detach()[:size]
        tensors.update({f"group.{group}.{name}": state[name][:size] for name in MOMENTS})
    return tensors


def load_optimizer(engine, read_slice: ReadSlice, adam_steps: int, loss_scaler: dict) -> None:
    """Puts masters, moments and step counts back, and replays Adam's running products of beta.

    `read_slice(name, start, target)` fills `target` (n,) with elements start..start+n of the whole flat vector `name`, whoever
    wrote them; it is asked for at most CHUNK_ELEMENTS at a time.
    """
    for group, (master, part) in enumerate(_owned(engine)):
        state, size = _adam_state(engine, master), part.stop - part.start
        state["step"] = adam_steps
        engine.optimizer.optimizer.param_groups[group]["step"] = adam_steps
        for name, tensor in (("master", master.detach()), *((name, state[name]) for name in MOMENTS)):
            for offset in range(0, size, CHUNK_ELEMENTS):
                chunk = tensor[offset : min(size, offset + CHUNK_ELEMENTS)]
                read_slice(f"group.{group}.{name}", part.start + offset, chunk)
    for name, value in loss_scaler.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    _replay_beta_powers(engine, adam_steps)


def adam_steps(engine) -> int:
    """Updates that Adam has made; steps that overflowed are not among them."""
    master = engine.optimizer.single_partition_of_fp32_groups[0]
    return int(engine.optimizer.optimizer.state.get(master, {}).get("step", 0))


def loss_scaler_state(engine) -> dict[str, float | int]:
    """The dynamic loss scale's numbers under fp16; empty otherwise."""
    scaler = engine.optimizer.loss_scaler
    names = SCALER_FIELDS if engine.optimizer.dynamic_loss_scale else ()
    return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}


def _owned(engine) -> list[tuple[Tensor, Partition]]:
    return list(zip(engine.optimizer.single_partition_of_fp32_groups, partitions(engine), strict=True))


def _adam_state(engine, master: Tensor) -> dict:
    state = engine.optimizer.optimizer.state[master]
    if not state:
        state["step"] = 0
        state.update({name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS})
    return state


def _replay_beta_powers(engine, steps: int) -> None:
    """CPU Adam keeps beta^t as a running product and a fresh process would call pow(): replayed, a resume is bitwise equal."""
    adam = engine.optimizer.optimizer
    if not hasattr(adam, "ds_opt_adam"):
        return
    weight, grad, mean, square = (torch.zeros(1) for _ in range(4))
    beta1, beta2 = adam.param_groups[0]["betas"]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, weight, grad, mean, square)


@torch.no_grad()
def full_masters(engine, model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's whole float32 master by name, on the host; all ranks call it. Gathers a group at a time."""
    optimizer, names, found = engine.optimizer, {id(weight): name for name, weight in model.named_parameters()}, {}
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        own, dp_group = master.detach().to(engine.device), optimizer.real_dp_process_group[group]
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(dp_group))]
        torch.distributed.all_gather(parts, own, dp_group)
        flat = torch.cat(parts)
        layout = (optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, optimizer.round_robin_bit16_meta)
        for weight, offset, meta in zip(*(each[group] for each in layout), strict=True):
            found[names[id(weight)]] = flat[offset : offset + meta.numel()].view(meta.shape).cpu()
    return found
