"""Ranks: which one this process is, the process group, and what all ranks do together. Knows no run and no step.

Functions that say so must be called by every rank: the others would wait for the one that does not.
"""

import errno
import gc
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from scripts.config import CONNECT_SECONDS, LOCK_POLL_SECONDS, TrainingConfig
from scripts.engine import offload, watch

MESSAGE_BYTES = 2048
IS_VALUE_ERROR = -1
Result = TypeVar("Result")


class Ranks(NamedTuple):
    """This process: `rank` of `world_size`, `local_rank` of `local_size` on this machine, below `num_launchers` processes."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    num_launchers: int


def ranks_from_launcher() -> Ranks:
    """Reads what `deepspeed`, `torchrun` or `srun` say of this process; without a launcher it is the only one."""
    env = os.environ
    num_launchers = 2 if "CROSS_RANK" in env else 1 if "TORCHELASTIC_RUN_ID" in env else 0
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        env |= _slurm_as_torch(env)
    if "RANK" not in env:
        port = str(random.SystemRandom().randint(20000, 60000))
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), int(local_size), num_launchers)


def device_of(ranks: Ranks) -> torch.device:
    """The GPU of this rank, or the CPU on a machine without one."""
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def set_up_cuda() -> None:
    """Sets the variables that CUDA's libraries and torch's allocators read at the first use of the GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    exact = ",pinned_max_round_threshold_mb:1" if torch.__version__ >= "2.13" else ""
    os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:True{exact}"


def join(config: TrainingConfig, ranks: Ranks) -> None:
    """Makes the process deterministic and joins the process group. Every rank must call this."""
    import deepspeed  # here alone: what only reads a checkpoint starts without it, two seconds sooner

    deepspeed.utils.logger.setLevel("WARNING")
    offload.start_quickly()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_size))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(minutes=config.rank_timeout_minutes))
    wait_for_all()
    offload.forget_shared_memory(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], ranks.rank)


def connect(ranks: Ranks, watching: watch.Watch) -> None:
    """Connects the watches of all ranks to that of rank 0. Every rank must call this."""
    if ranks.world_size == 1:
        return
    address = torch.tensor(watching.listen() if ranks.rank == 0 else (0, 0), dtype=torch.int64, device=_current_device())
    torch.distributed.broadcast(address, 0)
    if ranks.rank != 0:
        watching.connect(os.environ["MASTER_ADDR"], *address.tolist())


@contextmanager
def leaving() -> Iterator[None]:
    """Leaves the process group after what is inside and ends the process with its status, without Python's own teardown, in
    which a thread of gloo's that frees a tensor aborts the process (pytorch/pytorch#179291).
    """
    status = watch.FAILED
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else status
    except BaseException:
        traceback.print_exc()
    finally:
        watch.end(status)


def together_before_joining(work: Callable[[], Result], config: TrainingConfig, ranks: Ranks) -> Result:
    """As `together` for what raises ValueError, before there is a process group: the ranks meet at the launcher's store."""
    try:
        result, words = work(), ""
    except ValueError as refusal:
        result, words = None, str(refusal)
    refusals = [words] if ranks.world_size == 1 else _words_of_ranks(words, config, ranks)
    refused = [rank for rank, found in enumerate(refusals) if found]
    if not refused:
        return result  # pyright: ignore[reportReturnType]
    raise ValueError(f"rank {refused[0]}: {refusals[refused[0]]}" if refused[0] else refusals[0])


def together(work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank. Every rank must call this. When `work` fails on any rank, all raise: ValueError with
    the words of the first rank that raised one, else OSError with the first one's `errno` and the ranks' words in `strerror`.
    """
    try:
        result, fault = work(), None
    except (ValueError, OSError) as raised:
        result, fault = None, raised
    if largest(float(fault is not None)):
        raise _fault_of_ranks(fault) from fault
    return result  # pyright: ignore[reportReturnType]


def in_turn(work: Callable[[], Result]) -> Result:
    """As `together`, but rank 0 works first and then the others. Every rank must call this."""
    is_first = torch.distributed.get_rank() == 0
    before = together(lambda: work() if is_first else None)
    after = together(lambda: None if is_first else work())
    return before if is_first else after  # pyright: ignore[reportReturnType]


def largest(number: float) -> float:
    """The largest of all ranks' numbers. Every rank must call this."""
    value = torch.tensor(number, dtype=torch.float64, device=_current_device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value.item()


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor of the same shape and dtype, by rank, on the host. Every rank must call this."""
    mine = tensor.to(_current_device())
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, mine)
    return [each.cpu() for each in gathered]


def gather_numbers(number: int) -> list[int]:
    """Every rank's number, by rank. Every rank must call this."""
    return [int(each) for each in gather(torch.tensor([number]))]


def wait_for_all() -> None:
    """Returns when every rank has called this. NCCL's own barrier would have to guess which GPU is meant."""
    largest(0.0)


def release_memory() -> None:
    """Gives memory of tensors that are gone back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def say(ranks: Ranks, line: str) -> None:
    """Prints a line on rank 0, above a progress bar if there is one."""
    if ranks.rank == 0:
        with tqdm.external_write_mode(sys.stdout):
            watch.say(line, sys.stdout)


def _words_of_ranks(words: str, config: TrainingConfig, ranks: Ranks) -> list[str]:
    """Every rank's words. Where there are any, rank 0, which may hold the store, waits until all have read them."""
    store = _store(config.rank_timeout_minutes)
    meeting = store.add(f"meetings of {ranks.rank}", 1)
    store.set(f"words {meeting} {ranks.rank}", words)
    found = [store.get(f"words {meeting} {rank}").decode() for rank in range(ranks.world_size)]
    store.add(f"readers {meeting}", 1)
    limit = time.monotonic() + CONNECT_SECONDS
    while any(found) and ranks.rank == 0 and store.add(f"readers {meeting}", 0) < ranks.world_size and time.monotonic() < limit:
        time.sleep(LOCK_POLL_SECONDS)
    return found


@cache
def _store(timeout_minutes: int) -> Any:
    """The launcher's store, kept as long as the process: torch's process group meets at the same port."""
    return next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))[0]


def _fault_of_ranks(own: ValueError | OSError | None) -> ValueError | OSError:
    number = 0 if own is None else (own.errno or errno.EIO) if isinstance(own, OSError) else IS_VALUE_ERROR
    words = "" if own is None else (isinstance(own, OSError) and own.strerror) or str(own)
    padded = bytearray(words.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"))
    numbers = gather_numbers(number)
    gathered = gather(torch.frombuffer(padded, dtype=torch.uint8))
    texts = [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in gathered]
    if IS_VALUE_ERROR in numbers:
        rank = numbers.index(IS_VALUE_ERROR)
        return ValueError(f"rank {rank}: {texts[rank]}" if rank else texts[rank])
    failed = [rank for rank, number in enumerate(numbers) if number]
    listed = ", ".join(f"rank {rank}: {texts[rank]}" for rank in failed[:3])
    return OSError(numbers[failed[0]], listed + (f" and {len(failed) - 3} more ranks" if failed[3:] else ""))


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _slurm_as_torch(env) -> dict[str, str]:
    """torch's variables from those of `srun`, whose list of nodes may be in the form node[01-04,07]."""
    nodes = env["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0] if "[" not in nodes.split(",")[0] else nodes)
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": env.get("MASTER_ADDR", first),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)),
    }
