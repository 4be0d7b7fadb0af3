"""The only room that knows DeepSpeed's insides: flat partitions, Adam's state, the loss scaler. Guarded by the version.

ZeRO-2 lays each parameter group out as one flat vector; rank r of W owns elements r * partition .. (r + 1) * partition of it.
The order within the vector does not depend on W, which makes the state elastic: any slice of it can be given to any rank.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

import cpuinfo
import torch
from torch import Tensor

DEEPSPEED_VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

CHUNK_ELEMENTS = 2**24

ReadSlice = Callable[[str, int, Tensor], None]


class Partition(NamedTuple):
    """The elements start..stop of one group's flat vector of `num_elements` that this rank owns, padding left out."""

    start: int
    stop: int
    num_elements: int


def refuse_other_versions() -> None:
    """Raises ValueError unless the installed DeepSpeed is the one whose insides this module was written against."""
    installed = version("deepspeed").split("+")[0]
    if installed != DEEPSPEED_VERSION:
        raise ValueError(
            f"deepspeed=={installed} is installed; tightfit needs deepspeed=={DEEPSPEED_VERSION}: pip install -e ."
        )


def ask_the_processor_once() -> None:
    """Each CPU Adam asks cpuinfo for the processor's maker, which takes subprocesses and more than a second: once is enough."""
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


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
