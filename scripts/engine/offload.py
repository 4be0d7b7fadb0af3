"""The only room that knows DeepSpeed's insides: flat partitions, Adam's state, the path of gradients. Guarded by the version.

ZeRO-2 lays each parameter group out as one flat vector; rank r of W owns elements r * partition .. (r + 1) * partition of it.
The order within the vector does not depend on W, so any slice of a saved state can be given to any rank.
"""

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import torch
from torch import Tensor

from scripts import config as settings
from scripts.config import PRECISIONS, TrainingConfig
from scripts.model.activation_offload import host_buffer

DEEPSPEED_VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ROW_ELEMENTS = 2**10
ReadSlice = Callable[[str, int, Tensor], None]


class Partition(NamedTuple):
    """The elements start..stop of one group's flat vector of `num_elements` that this rank owns, padding left out."""

    start: int
    stop: int
    num_elements: int


class Piece(NamedTuple):
    """Elements start..stop of the ring's memory, and when what lies there has been added to its target on the host."""

    start: int
    stop: int
    arrival: Future


class Sent(NamedTuple):
    """A gradient that is still needed on the GPU until it has been copied from there."""

    source: Tensor
    copied: torch.cuda.Event


class StagingRing:
    """Host memory, pinned for a GPU, through which gradients go to the host, and the one thread that adds them up, in order.

    On a GPU the copies run on a stream of their own, after the kernels that compute the gradients. At most `held_elements` of
    gradients wait on the GPU for their copies, or one larger gradient; later kernels wait for the copies of those before. With
    None nothing waits: what is sent stays where it is until it is drained.
    """

    def __init__(self, memory: Tensor, held_elements: int | None, device: torch.device) -> None:
        self._memory, self._held_elements = memory, held_elements
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "gradients", partial(torch.cuda.set_device, device) if self._stream else None)
        self._pieces: deque[Piece] = deque()
        self._held: deque[Sent] = deque()
        self._next = 0

    def send(self, source: Tensor, target: Tensor, is_first: bool) -> None:
        """Writes `source` (n,) into `target` (n,) float32 on the host if it is the first of a step, else adds it. Waits while
        the ring is full. Raises what went wrong in the thread with an earlier piece.
        """
        if self._held_elements is not None:
            self.release(self._held_elements - len(source))
        copied, most = None, min(settings.GRADIENT_PIECE_ELEMENTS, len(self._memory) // 2)
        for part, place in zip(source.split(most), target.split(most), strict=True):
            start = self._next if self._next + len(part) <= len(self._memory) else 0
            self._next = start + len(part)
            while any(piece.start < self._next and start < piece.stop for piece in self._pieces):
                self._pieces.popleft().arrival.result()
            slot = self._memory[start : self._next]
            copied = self._copy(part, slot)
            self._pieces.append(Piece(start, self._next, self._thread.submit(_add, slot, place, is_first, copied)))
        if copied is not None and self._held_elements is not None:
            self._held.append(Sent(source, copied))

    def release(self, num_elements: int) -> None:
        """Frees the oldest gradients on the GPU until at most `num_elements` are left; later kernels wait for their copies."""
        while self._held and sum(len(sent.source) for sent in self._held) > num_elements:
            sent = self._held.popleft()
            torch.cuda.current_stream().wait_event(sent.copied)

    def drain(self) -> None:
        """Waits until all that was sent has been added to its target. Raises what went wrong in the thread."""
        while self._pieces:
            self._pieces.popleft().arrival.result()
        self._held.clear()

    def close(self) -> None:
        """Ends the thread, after all that was sent."""
        self._thread.shutdown()

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
        remedy = f"tightfit needs deepspeed=={DEEPSPEED_VERSION}: pip install -e ."
        raise ValueError(f"deepspeed=={installed} is installed; {remedy}")


def forget_shared_memory(address: str, port: str, rank: int) -> None:
    """Unlinks DeepSpeed's buffer, 66 MiB a CPU rank, once all ranks have opened it: with its name it would outlive them."""
    Path("/dev", "shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def start_quickly() -> None:
    """Spares two detours of DeepSpeed's. Each CPU Adam asks `cpuinfo` for the processor's maker, which takes a second: it is
    asked once, in a thread. Each engine imports Muon, which loads torch's compiler, a second and 90 MiB: Muon is not compiled.
    """
    from deepspeed.runtime import compiler

    cpuinfo.get_cpu_info = ThreadPoolExecutor(1).submit(cpuinfo.get_cpu_info).result
    compile_with = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    finally:
        compiler.compile = compile_with


def keep_to_device(accelerator: Any, device: torch.device) -> None:
    """Mends what DeepSpeed's accelerator says of `device`. It forgets the peak of memory at each group of parameters, which
    would hide what came before; it takes LOCAL_RANK for the index of a rank's card (comm/torch.py, init_process_group;
    runtime/engine.py, _set_distributed_vars); and it reads free memory by the numbers in CUDA_VISIBLE_DEVICES, which may hold
    UUIDs.
    """
    accelerator.reset_peak_memory_stats = lambda device_index=None: None
    if device.type == "cuda":
        accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device)[0]
        accelerator.device = lambda device_index=None: device
        accelerator.device_name = lambda device_index=None: device.type if device_index is None else str(device)
        accelerator.set_device = lambda device_index: torch.cuda.set_device(device)


def replace_offload_path(engine, config: TrainingConfig) -> None:
    """Mends DeepSpeed's loss scale. With `offload_optimizer` it also replaces methods and buffers of its optimizer by ones that
    keep and move less; the updates are the same.

    With N parameters, W ranks, G micro-batches a step, w bytes a weight, L elements of the largest partition: the GPU keeps the
    weights, w N, and with `accumulate_on="gpu"` and G > 1 also N / W sums in `accumulation_precision`. In a backward it also
    holds DeepSpeed's bucket of `bucket_elements` on several ranks, and gradients on their way to the host, at most one block or
    one parameter. The host keeps 16 N / W of masters, gradients and moments, and 2 w L of staging, pinned for a GPU, through
    which gradients come and weights return. Bytes moved in a step: G w N / W to the host, or N / W sums; w N / W back.
    """
    optimizer, device = engine.optimizer, engine.device
    _mend_loss_scale(optimizer)
    if not config.offload_optimizer:
        return
    optimizer.temp_grad_buffer_for_gpu_offload = optimizer.temp_grad_buffer_for_cpu_offload = torch.empty(0)
    world_size = torch.distributed.get_world_size(optimizer.dp_process_group)
    sizes = map(int, optimizer.partition_size if config.keeps_gradient_sums(world_size) else ())
    sums = [torch.zeros(size, dtype=PRECISIONS[config.accumulation_precision], device=device) for size in sizes]
    staging = _share_staging(optimizer, config.dtype, device)
    memory, held_elements = staging.view(sums[0].dtype if sums else config.dtype), None if sums else config.bucket_elements
    ring = StagingRing(memory, held_elements, device)
    send = ring.send if device.type == "cuda" else _add
    if world_size == 1:
        optimizer.process_gradients = partial(_process_gradients, optimizer, sums, send)
        optimizer.reduce_ipg_grads = partial(ring.release, 0)
    else:
        optimizer.copy_grads_in_partition = partial(take_gradient, optimizer, sums, send)
        optimizer.reduce_ipg_grads = partial(_reduce_ipg_grads, optimizer, ring)
    optimizer._wait_for_offload_copies = ring.drain
    optimizer.scaled_global_norm = partial(_scaled_global_norm, optimizer, device)
    optimizer._optimizer_step = partial(_optimizer_step, optimizer, deque(), device)
    optimizer.destroy = partial(_destroy, optimizer, ring)


def set_step_rows(engine, num_rows: int) -> None:
    """Tells DeepSpeed how many rows the coming step has, over all ranks: each loss is divided by its number of micro-batches,
    and the update comes with the last of them. That one is found by counting on from the run's beginning, which steps of
    several sizes upset, so the count begins anew; and the optimizer has a number of its own.
    """
    engine.set_train_batch_size(num_rows)
    engine.micro_steps, engine.optimizer.gradient_accumulation_steps = 0, engine.gradient_accumulation_steps()


def staging_of(engine) -> list[Tensor]:
    """The host memory (n,) of each group through which gradients and weights pass; none without `offload_optimizer`."""
    return list(getattr(engine.optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", ()))


def take_gradient(optimizer, sums: list[Tensor], send: Callable, weight, _: int) -> None:
    """Replaces `copy_grads_in_partition`: takes this rank's slice of a weight's gradient and frees the gradient.

    Without `sums` it sends the slice to the host. With them, one flat sum (n,) a group on the GPU, it adds the slice there, and
    in the last micro-batch sends the sum. DeepSpeed's own flag of the last micro-batch comes too late, after the head.
    """
    group, offset, start, size = optimizer.grad_position[optimizer.get_param_id(weight)]
    gradient = weight.grad.detach().reshape(-1)[offset : offset + size]
    optimizer.clear_grad_attribute(weight)
    place, is_first = slice(start, start + size), optimizer.micro_step_id == 0
    if sums:
        _add(gradient, sums[group][place], is_first)
        gradient, is_first = sums[group][place], True
    if not sums or optimizer.micro_step_id == optimizer.gradient_accumulation_steps - 1:
        send(gradient, optimizer.single_partition_of_fp32_groups[group].grad[place], is_first)


def sum_of_squares(vector: Tensor) -> float:
    """The sum of squares of `vector` (n,) float32, without a copy: float32 within a row of ROW_ELEMENTS, float64 over rows."""
    total = 0.0
    for part in vector.split(settings.OPTIMIZER_CHUNK_ELEMENTS):
        whole = len(part) // ROW_ELEMENTS * ROW_ELEMENTS
        rows = torch.linalg.vector_norm(part[:whole].view(-1, ROW_ELEMENTS), dim=1)
        rest = torch.linalg.vector_norm(part[whole:])
        total += float(rows.double().square().sum()) + float(rest) ** 2
    return total


def partitions(engine) -> list[Partition]:
    """This rank's slice of each parameter group's flat vector."""
    optimizer, found = engine.optimizer, []
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
        num_elements = optimizer.round_robin_bit16_offsets[group][-1] + optimizer.round_robin_bit16_meta[group][-1].numel()
        start = min(rank * master.numel(), num_elements)
        found.append(Partition(start, min(start + master.numel(), num_elements), num_elements))
    return found


def optimizer_tensors(engine) -> dict[str, Tensor]:
    """This rank's masters and moments in float32, views without copies: `group.<i>.master`, `.exp_avg`, `.exp_avg_sq`."""
    tensors = {}
    masters = engine.optimizer.single_partition_of_fp32_groups
    for group, (master, part) in enumerate(zip(masters, partitions(engine), strict=True)):
        state, size = engine.optimizer.optimizer.state[master], part.stop - part.start
        if not state:
            state.update({"step": 0} | {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS})
        tensors[f"group.{group}.master"] = master.detach()[:size]
        tensors.update({f"group.{group}.{name}": state[name][:size] for name in MOMENTS})
    return tensors


def load_optimizer(engine, read_slice: ReadSlice, adam_steps: int, loss_scaler: dict) -> None:
    """Restores masters, moments, step counts, the loss scaler and Adam's running products of beta. `read_slice(name, start,
    target)` fills `target` (n,), n at most OPTIMIZER_CHUNK_ELEMENTS, from `start` on of the whole flat vector `name`.
    """
    parts, adam, chunk = partitions(engine), engine.optimizer.optimizer, settings.OPTIMIZER_CHUNK_ELEMENTS
    for name, tensor in optimizer_tensors(engine).items():
        start = parts[int(name.split(".")[1])].start
        for offset in range(0, len(tensor), chunk):
            read_slice(name, start + offset, tensor[offset : offset + chunk])
    for group, master in enumerate(engine.optimizer.single_partition_of_fp32_groups):
        adam.state[master]["step"] = adam.param_groups[group]["step"] = adam_steps
    for name, value in loss_scaler.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    if hasattr(adam, "ds_opt_adam"):  # it keeps beta^t as a running product: replayed, a resume is bitwise equal
        weight, grad, mean, square = (torch.zeros(1) for _ in range(4))
        beta1, beta2 = adam.param_groups[0]["betas"]
        for step in range(1, adam_steps + 1):
            adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, weight, grad, mean, square)


def adam_steps(engine) -> int:
    """Updates that Adam has made; steps that overflowed are not among them."""
    master = engine.optimizer.single_partition_of_fp32_groups[0]
    return int(engine.optimizer.optimizer.state.get(master, {}).get("step", 0))


def loss_scaler_state(engine) -> dict[str, float | int]:
    """The dynamic loss scale's numbers under fp16; empty otherwise."""
    scaler = engine.optimizer.loss_scaler
    names = SCALER_FIELDS if engine.optimizer.dynamic_loss_scale else ()
    return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}


@torch.no_grad()
def full_masters(engine, model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's whole float32 master by name, on the host. Every rank must call this; it gathers a group at a time."""
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


def _share_staging(optimizer, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Replaces DeepSpeed's buffers for updated weights, one a group, by two that the groups take in turn: both, (n,) uint8."""
    largest_bytes = max(map(int, optimizer.partition_size)) * dtype.itemsize
    staging = host_buffer(2 * largest_bytes, device)
    halves = [half.view(dtype) for half in staging.split(largest_bytes)]
    buffers = [halves[group % 2][: int(size)] for group, size in enumerate(optimizer.partition_size)]
    optimizer.param_buffer_of_bit16_for_cpu_offload_groups = buffers
    return staging


def _process_gradients(optimizer, sums: list[Tensor], send: Callable, weight, group: int) -> None:
    """Replaces DeepSpeed's on one rank: a gradient is taken as soon as it is made, without a bucket."""
    if not optimizer.ready_for_gradients:
        optimizer.micro_step_id += 1
        optimizer.ready_for_gradients = True
    take_gradient(optimizer, sums, send, weight, group)


def _reduce_ipg_grads(optimizer, ring: StagingRing, comm_dtype: torch.dtype | None = None) -> None:
    """DeepSpeed's, on several ranks. Then the GPU waits: it writes the bucket again only when this rank's slices are copied."""
    type(optimizer).reduce_ipg_grads(optimizer, comm_dtype)
    ring.release(0)


def _scaled_global_norm(optimizer, device: torch.device) -> Tensor:
    """Replaces DeepSpeed's, on the host: the norm of all ranks' gradients () float32, -1 when it is not finite."""
    gradients = [master.grad for master in optimizer.single_partition_of_fp32_groups]
    square = torch.tensor(sum(map(sum_of_squares, gradients)), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
    norm = math.sqrt(square.item()) if square.isfinite() else -1.0
    return torch.tensor(norm, dtype=torch.float32)


def _mend_loss_scale(optimizer) -> None:
    """DeepSpeed changes the loss scale of fp16 before it divides the gradients by it, so that an update is halved whenever the
    scale doubles (stage_1_and_2.py, `step`); and at its least scale it raises. Gradients are divided by the scale that their
    backward used, and steps that are skipped are counted by the trainer.
    """
    optimizer.scale_of_backward = optimizer.loss_scale
    optimizer._update_scale = partial(_update_scale, optimizer)
    optimizer.unscale_and_clip_grads = partial(_unscale_and_clip_grads, optimizer)


def _update_scale(optimizer, has_overflow: bool) -> None:
    optimizer.scale_of_backward, optimizer.loss_scaler.raise_error_at_min_scale = optimizer.loss_scale, False
    type(optimizer)._update_scale(optimizer, has_overflow)


def _unscale_and_clip_grads(optimizer, gradients: list[Tensor], scaled_norm: Tensor) -> None:
    """DeepSpeed's, by the scale of the backward, and left out where it would multiply every gradient by one and a look at the
    norm need not wait for the GPU.
    """
    scale = optimizer.scale_of_backward
    divisor = scale * torch.clamp((scaled_norm / scale + 1e-6) / optimizer.clip_grad, min=1.0)
    if divisor.device.type == "cuda" or divisor != 1.0:
        for gradient in gradients:
            gradient.mul_(1.0 / divisor)


def _optimizer_step(optimizer, copies: deque, device: torch.device, group: int) -> None:
    """DeepSpeed's update of one group, on the host. Then DeepSpeed writes the new weights into this group's staging: so this
    waits until the weights that lay there, those of the group before the last, have been copied to the GPU.
    """
    if device.type == "cuda":
        copies.append(torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))
    type(optimizer)._optimizer_step(optimizer, group)
    if len(copies) > 1:
        copies.popleft().synchronize()


def _destroy(optimizer, ring: StagingRing) -> None:
    try:
        type(optimizer).destroy(optimizer)
    finally:
        ring.close()


def _add(source: Tensor, target: Tensor, is_first: bool, copied: torch.cuda.Event | None = None) -> None:
    """target = source or target += source, after `copied`; on the host in parts, because torch casts a copy of the source."""
    if copied is not None:
        copied.synchronize()
    most = settings.GRADIENT_CACHE_ELEMENTS if source.device.type == "cpu" else len(source)
    for part, place in zip(source.split(most), target.split(most), strict=True):
        if is_first:
            place.copy_(part)
        else:
            place.add_(part)
