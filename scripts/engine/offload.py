"""The only room that knows DeepSpeed's insides: flat partitions, Adam's state, the path of gradients. Guarded by the version.

ZeRO-2 lays each parameter group out as one flat vector; rank r of W owns elements r * partition .. (r + 1) * partition of it.
The order within the vector does not depend on W, so any slice of a saved state can be given to any rank.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo.cpuinfo
import torch
from torch import Tensor
from torch.optim import Optimizer

from scripts import config as settings
from scripts.config import PRECISIONS, TrainingConfig
from scripts.engine import updates
from scripts.engine.updates import Landed, Matrix, StagingRing
from scripts.model.activation_offload import host_buffer
from scripts.model.operations import product_dtype

DEEPSPEED_VERSION = "0.19.8"
MOMENTS, MOMENTUM = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ReadSlice = Callable[[str, int, Tensor], None]


class Partition(NamedTuple):
    """The elements start..stop of one group's flat vector of `num_elements` that this rank owns, padding left out."""

    start: int
    stop: int
    num_elements: int


class Begun(NamedTuple):
    """This rank's slice (n,) of a group's orthogonal matrices, and on a GPU when it has arrived on the host."""

    directions: Tensor
    arrived: Any


def refuse_other_versions() -> None:
    """Raises ValueError unless the installed DeepSpeed is the one whose insides this module was written against."""
    installed = version("deepspeed").split("+")[0]
    if installed != DEEPSPEED_VERSION:
        raise ValueError(f"deepspeed=={installed} is installed; tightfit needs {DEEPSPEED_VERSION}: pip install -e .")


def forget_shared_memory(address: str, port: str, rank: int) -> None:
    """Unlinks DeepSpeed's buffer, 66 MiB a CPU rank, once all ranks have opened it: with its name it would outlive them."""
    Path("/dev", "shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def start_quickly() -> None:
    """Spares three detours. Each CPU Adam asks `cpuinfo` for the processor's maker, which takes a second: /proc says it. Each
    engine imports Muon and makes it ready for torch's compiler: it is not. torch loads its compiler to tell it to leave an
    optimizer's methods alone (torch/_compile.py), two seconds and 70 MiB: it is not told.
    """
    from deepspeed.runtime import compiler

    for marked in (Optimizer.add_param_group, Optimizer.zero_grad):
        setattr(marked.__wrapped__, "__dynamo_disable", marked.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
    found = cpuinfo.cpuinfo._get_cpu_info_from_proc_cpuinfo() | {"arch": cpuinfo.cpuinfo._parse_arch(os.uname().machine)[0]}
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info if {"vendor_id_raw", "flags"} - found.keys() else lambda: found)
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
    keep and move less. AdamW's updates are the same; Muon's, and 16-bit moments, are scripts/engine/updates.py's.

    With N parameters, W ranks, G micro-batches a step, w bytes a weight, L elements of the largest partition: the GPU keeps the
    weights, w N, and with `accumulate_on="gpu"` also N / W sums in `accumulation_precision`. In a backward it also holds
    DeepSpeed's bucket of `bucket_elements` on several ranks, and gradients on their way to the host, at most one block or one
    parameter. The host keeps for each of N / W parameters 4 bytes of master, 4 of gradient unless sums are on the GPU, 8 of
    moments (in 16 bits 4; Muon's momentum is half of that), and 2 w L of staging, pinned for a GPU, through which gradients
    come and weights return. Bytes moved in a step: G w N / W to the host, or N / W sums; w N / W back, and for Muon's matrices
    in between w N / W there and back.
    """
    optimizer, device = engine.optimizer, engine.device
    _mend_loss_scale(optimizer)
    world_size = torch.distributed.get_world_size(optimizer.dp_process_group)
    sizes = map(int, optimizer.partition_size if config.offload_optimizer and config.accumulate_on == "gpu" else ())
    sums = [torch.zeros(size, dtype=PRECISIONS[config.accumulation_precision], device=device) for size in sizes]
    staging = _share_staging(optimizer, config.dtype, device) if config.offload_optimizer else None
    optimizer.group_updates, optimizer.seconds = GroupUpdates(optimizer, config, device, sums), {}
    timed = partial(updates.timed, optimizer.seconds)
    optimizer._optimizer_step = partial(timed, "update", optimizer.group_updates.update)
    if staging is None:
        return
    optimizer.temp_grad_buffer_for_gpu_offload = optimizer.temp_grad_buffer_for_cpu_offload = torch.empty(0)
    optimizer.unscale_and_clip_grads = partial(_keep_divisor, optimizer)
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups if sums else ()):
        optimizer.offload_gradient_dict[group], master.grad = [], None
    ring = StagingRing(staging.view(config.dtype), config.bucket_elements, device)
    down, is_gpu = partial(timed, "gradients down"), device.type == "cuda"
    take = partial(take_gradient, optimizer, sums, ring.send if is_gpu else updates.add_to)
    if world_size == 1:
        optimizer.process_gradients = partial(_process_gradients, optimizer, take if is_gpu else partial(down, take))
        optimizer.reduce_ipg_grads = partial(ring.release, 0)
    else:
        optimizer.copy_grads_in_partition = take if is_gpu else partial(down, take)
        optimizer.reduce_ipg_grads = partial(_reduce_ipg_grads, optimizer, ring)
    optimizer._wait_for_offload_copies = partial(down, ring.drain)
    optimizer.scaled_global_norm = partial(timed, "norm", _scaled_global_norm, optimizer, sums, device)
    optimizer.destroy = partial(_destroy, optimizer, ring)


def set_step_rows(engine, num_rows: int) -> None:
    """Tells DeepSpeed how many rows the coming step has, over all ranks: each loss is divided by its number of micro-batches,
    and the update comes with the last of them. DeepSpeed counts those on from step to step, so the count begins anew.
    """
    engine.set_train_batch_size(num_rows)
    engine.micro_steps, engine.optimizer.gradient_accumulation_steps = 0, engine.gradient_accumulation_steps()


def seconds_within(engine) -> dict[str, float]:
    """Seconds of the coming step's parts, filled while it runs. On a GPU "gradients down" is what the backward leaves of it."""
    engine.optimizer.seconds.clear()
    return engine.optimizer.seconds


def staging_of(engine) -> list[Tensor]:
    """The host memory (n,) of each group through which gradients and weights pass; none without `offload_optimizer`."""
    return list(getattr(engine.optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", ()))


def take_gradient(optimizer, sums: list[Tensor], send: Callable, weight, _: int) -> None:
    """Replaces `copy_grads_in_partition`: takes this rank's slice of a weight's gradient and frees the gradient. It is added to
    `sums`, one (n,) a group on the GPU; without them it is sent to the host.
    """
    group, offset, start, size = optimizer.grad_position[optimizer.get_param_id(weight)]
    gradient = weight.grad.detach().reshape(-1)[offset : offset + size]
    optimizer.clear_grad_attribute(weight)
    place, is_first = slice(start, start + size), optimizer.micro_step_id == 0
    if sums:
        updates.add_to(gradient, sums[group][place], is_first)
    else:
        send(gradient, optimizer.single_partition_of_fp32_groups[group].grad[place], is_first)


class GroupUpdates:
    """Updates masters, on the host or without offload on the GPU, one group after another and in order: `update` replaces
    DeepSpeed's `_optimizer_step`. Then DeepSpeed writes the new weights into the group's staging and copies them up.

    Muon's group goes through the same staging: its momentum looks ahead there, comes up, is made orthogonal and comes down.
    The next group is begun before the masters of this one change, so that the GPU works beside the host.
    """

    def __init__(self, optimizer, config: TrainingConfig, device: torch.device, sums: list[Tensor]) -> None:
        self.divisor = 1.0
        self._optimizer, self._config, self._device, self._sums = optimizer, config, device, sums
        self._stream, self._slots = None, []
        if sums and device.type == "cuda":
            largest, self._stream = max(map(len, sums)), torch.cuda.Stream(device)
            num_bytes = min(largest, settings.GRADIENT_PIECE_ELEMENTS) * sums[0].itemsize
            self._slots = [host_buffer(num_bytes, device).view(sums[0].dtype) for _ in range(2)]
        self._landed: Iterator[Landed] = iter(())
        self._copies: deque[Any] = deque()
        self._begun: dict[int, Begun] = {}

    def update(self, group: int) -> None:
        """The update of one group, from the gradients that were taken. Every rank must call this."""
        if group == 0:
            self._landed = updates.bring_down(self._sums, self._slots, self._stream)
        if self._device.type == "cuda":
            self._copies.append(torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))
        if not is_muon(self._optimizer, self._config, group):
            self._adam(group)
        else:
            begun = self._begun.pop(group, None) or self._begin(group)
            if self._config.offload_optimizer and is_muon(self._optimizer, self._config, group + 1):
                self._begun[group + 1] = self._begin(group + 1)
            self._finish(group, begun)
        while len(self._copies) > 1:
            self._copies.popleft().synchronize()
        if group + 1 == len(self._optimizer.partition_size):
            self._landed = iter(())

    def _gradients(self, group: int) -> Iterator[Landed]:
        """This rank's slice of a group's gradient, unscaled and clipped, in pieces that are good until the next. On the host a
        piece stays in a processor's cache until it is used.
        """
        own, factor = self._optimizer.single_partition_of_fp32_groups[group], 1.0 / self.divisor
        pieces = iter((Landed(group, 0, own.grad),))
        if self._sums:
            pieces = islice(self._landed, -(-len(self._sums[group]) // settings.GRADIENT_PIECE_ELEMENTS))
        for piece in chain.from_iterable(map(updates.cut, pieces)):
            if factor != 1.0:
                piece.gradient.mul_(factor)
            yield piece

    def _adam(self, group: int) -> None:
        optimizer, config, is_short = self._optimizer, self._config, self._config.optimizer_state_precision == "bf16"
        if not is_short and not config.offload_optimizer:
            type(optimizer)._optimizer_step(optimizer, group)
            return
        adam, master = optimizer.optimizer, optimizer.single_partition_of_fp32_groups[group].detach()
        options, state = adam.param_groups[group], state_of(optimizer, config, group)
        state["step"] += 1
        step, first = state["step"], partition_of(optimizer, group).start
        (beta1, beta2), decay = options["betas"], options["weight_decay"]
        numbers = updates.Adam(step, options["lr"], beta1, beta2, options["eps"], decay)
        for _, start, gradient in self._gradients(group):
            place = slice(start, start + len(gradient))
            moments = [state[name][place] for name in MOMENTS]
            if is_short:
                draws = updates.Draws(config.seed, step, group)
                updates.adam_in_16_bits(master[place], gradient, moments, numbers, draws=draws, first=first + start)
            else:
                vectors = (master[place], gradient, *moments)
                adam.ds_opt_adam.adam_update(adam.opt_id, *numbers, options["bias_correction"], *vectors)

    def _begin(self, group: int) -> Begun:
        """Moves the momentum, and starts to make its matrices orthogonal, for this rank's slice."""
        for copied in self._copies:
            copied.synchronize()
        optimizer, config, state = self._optimizer, self._config, state_of(self._optimizer, self._config, group)
        beta, state["step"] = updates.momentum_at(state["step"], config), state["step"] + 1
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        if config.offload_optimizer:
            staged = optimizer.param_buffer_of_bit16_for_cpu_offload_groups[group].view(dtype)
        else:
            staged = torch.empty(int(optimizer.partition_size[group]), dtype=dtype, device=self._device)
        for _, start, gradient in self._gradients(group):
            place = slice(start, start + len(gradient))
            updates.take_momentum(gradient, state[MOMENTUM[0]][place], staged[place], beta)
        matrices, products = matrices_of(optimizer, group), product_dtype(config.dtype, self._device)
        own, dp_group = staged, optimizer.real_dp_process_group[group]
        if staged.device != self._device:
            own = torch.empty(len(staged), dtype=dtype, device=self._device)
            own.copy_(staged, non_blocking=True)
        directions = updates.orthogonal_slice(own, matrices, products, dp_group)
        if own is staged:
            return Begun(directions, None)
        staged.copy_(directions, non_blocking=True)
        return Begun(staged, torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True)))

    def _finish(self, group: int, begun: Begun) -> None:
        """Moves the masters of this rank's slice against the directions."""
        if begun.arrived is not None:
            begun.arrived.synchronize()
        config, options = self._config, self._optimizer.optimizer.param_groups[group]
        rate = options["lr"] * (config.muon_learning_rate or config.learning_rate) / config.learning_rate
        master, own = self._optimizer.single_partition_of_fp32_groups[group].detach(), partition_of(self._optimizer, group)
        for start, stop, shape in matrices_of(self._optimizer, group):
            place = slice(max(start, own.start) - own.start, max(0, min(stop, own.stop) - own.start))
            updates.descend(
                master[place], begun.directions[place], rate=rate, scale=updates.scale_of(shape), decay=options["weight_decay"]
            )


def is_muon(optimizer, config: TrainingConfig, group: int) -> bool:
    """Whether a group of DeepSpeed's optimizer holds matrices that Muon updates."""
    groups = optimizer.optimizer.param_groups
    return config.optimizer == "muon" and group < len(groups) and groups[group]["is_block"]


def matrices_of(optimizer, group: int) -> list[Matrix]:
    """The matrices of a group in the order of its flat vector."""
    layout = zip(optimizer.round_robin_bit16_offsets[group], optimizer.round_robin_bit16_meta[group], strict=True)
    return [Matrix(offset, offset + meta.numel(), meta.shape) for offset, meta in layout]


def partitions(engine) -> list[Partition]:
    """This rank's slice of each parameter group's flat vector."""
    return [partition_of(engine.optimizer, group) for group in range(len(engine.optimizer.single_partition_of_fp32_groups))]


def partition_of(optimizer, group: int) -> Partition:
    """This rank's slice of one group's flat vector."""
    size, rank = int(optimizer.partition_size[group]), torch.distributed.get_rank(optimizer.real_dp_process_group[group])
    num_elements = matrices_of(optimizer, group)[-1].stop
    start = min(rank * size, num_elements)
    return Partition(start, min(start + size, num_elements), num_elements)


def state_of(optimizer, config: TrainingConfig, group: int) -> dict[str, Any]:
    """What the optimizer remembers of this rank's slice of a group, made when there is none yet: `step`, and (n,) moments."""
    master = optimizer.single_partition_of_fp32_groups[group]
    state, dtype = optimizer.optimizer.state[master], PRECISIONS[config.optimizer_state_precision]
    names = MOMENTUM if is_muon(optimizer, config, group) else MOMENTS
    if not state:
        state.update({"step": 0} | {name: torch.zeros_like(master, dtype=dtype, requires_grad=False) for name in names})
    return state


def optimizer_tensors(engine) -> dict[str, Tensor]:
    """This rank's masters in float32 and moments in `optimizer_state_precision`, views without copies: `group.<i>.master`,
    `.exp_avg` and `.exp_avg_sq`, or `.momentum_buffer`.
    """
    tensors, optimizer = {}, engine.optimizer
    for group, part in enumerate(partitions(engine)):
        state, size = state_of(optimizer, engine.module.config, group), part.stop - part.start
        tensors[f"group.{group}.master"] = optimizer.single_partition_of_fp32_groups[group].detach()[:size]
        tensors |= {f"group.{group}.{name}": value[:size] for name, value in state.items() if name in MOMENTS + MOMENTUM}
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


def _process_gradients(optimizer, take: Callable, weight, group: int) -> None:
    """Replaces DeepSpeed's on one rank: a gradient is taken as soon as it is made, without a bucket."""
    if not optimizer.ready_for_gradients:
        optimizer.micro_step_id += 1
        optimizer.ready_for_gradients = True
    take(weight, group)


def _reduce_ipg_grads(optimizer, ring: StagingRing, comm_dtype: torch.dtype | None = None) -> None:
    """DeepSpeed's, on several ranks. Then the GPU waits: it writes the bucket again only when this rank's slices are copied."""
    type(optimizer).reduce_ipg_grads(optimizer, comm_dtype)
    ring.release(0)


def _scaled_global_norm(optimizer, sums: list[Tensor], device: torch.device) -> Tensor:
    """Replaces DeepSpeed's: the norm of all ranks' gradients, where they are, () float32; -1 when it is not finite."""
    gradients = sums or [master.grad for master in optimizer.single_partition_of_fp32_groups]
    square = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        square += updates.sum_of_squares(gradient)
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
    divisor = _divisor_of(optimizer, scaled_norm)
    if divisor.device.type == "cuda" or divisor != 1.0:
        for gradient in gradients:
            gradient.mul_(1.0 / divisor)


def _keep_divisor(optimizer, _: list[Tensor | None], scaled_norm: Tensor) -> None:
    """Replaces `unscale_and_clip_grads` under offload: each gradient is divided when its group is updated."""
    optimizer.group_updates.divisor = _divisor_of(optimizer, scaled_norm)


def _divisor_of(optimizer, scaled_norm: Tensor) -> Tensor:
    """What gradients are divided by, (): the scale of their backward, and what clips their norm."""
    scale = optimizer.scale_of_backward
    return scale * torch.clamp((scaled_norm / scale + 1e-6) / optimizer.clip_grad, min=1.0)


def _destroy(optimizer, ring: StagingRing) -> None:
    try:
        type(optimizer).destroy(optimizer)
    finally:
        ring.close()
