"""Ranks: which one this process is, the process group, and what all ranks do together. Knows no run and no step.

Beside them, processes that work off jobs, on this machine or through dask. Functions that say so must be called by every rank:
the others would wait for the one that does not.
"""

import errno
import os
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import cache
from io import StringIO
from multiprocessing import active_children, get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from ds.files import one_line
from ds.pieces import start_worker
from scripts.config import CONNECT_SECONDS, DASK_SECONDS, LOCK_POLL_SECONDS, PROGRESS_SECONDS, TrainingConfig
from scripts.engine import offload, watch
from scripts.plan.machine import (
    KERNEL_FILE,
    allocator_settings,
    cores_number,
    is_wsl,
    keep_freed_memory,
    num_threads,
    release_memory,
)

MESSAGE_BYTES = 2048
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
LOOPBACK = "127.0.0.1"
IS_VALUE_ERROR = -1
Result = TypeVar("Result")


class Ranks(NamedTuple):
    """This process: `rank` of `world_size`, `local_rank` of `local_size` on this machine, below `num_launchers` processes."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    num_launchers: int


class Workers(NamedTuple):
    """Who works: `number` processes of this machine, or those of the dask scheduler at an address."""

    number: int
    dask_scheduler: str | None


class Done(NamedTuple):
    """The number of a job and its result."""

    number: int
    result: Any


def ranks_from_launcher() -> Ranks:
    """Reads what `deepspeed`, `torchrun` or `srun` say of this process; without a launcher it is the only one."""
    env = os.environ
    num_launchers = 2 if "CROSS_RANK" in env else 1 if "TORCHELASTIC_RUN_ID" in env else 0
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        env |= _slurm_as_torch(env)
    if "RANK" not in env:
        port = str(_lone_store().port)
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), int(local_size), num_launchers)


def card_index(ranks: Ranks, num_cards: int) -> int:
    """Which of the `num_cards` GPUs that this process sees is its own.

    The ranks of `deepspeed` and `torchrun` on one machine see the same cards, and each takes that of its local rank. Any other
    launcher (srun, a script that sets RANK: CROSS_RANK and TORCHELASTIC_RUN_ID are not there) may show each process a
    card of its own, so a process that sees exactly one takes it. `refuse_shared_cards` looks whether another has the same one.

    Raises:
        ValueError: there are more ranks than cards.
    """
    if num_cards == 1 and ranks.num_launchers == 0:
        return 0
    if ranks.local_rank < num_cards:
        return ranks.local_rank
    num_ranks = max(ranks.local_size, ranks.local_rank + 1)
    flag = ("srun --ntasks-per-node", "torchrun --nproc-per-node", "deepspeed --num_gpus")[ranks.num_launchers]
    cards = "1 GPU" if num_cards == 1 else f"{num_cards} GPUs"
    law = f"{num_ranks} ranks on one machine see {cards} and each needs its own"
    raise ValueError(f"{law}; nearest is {num_cards} ({flag} {num_cards})")


def device_of(ranks: Ranks) -> torch.device:
    """The GPU of this rank, or the CPU on a machine without one. Raises ValueError as `card_index`."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", card_index(ranks, torch.cuda.device_count()))


def set_up_cuda() -> None:
    """Sets the variables that CUDA's libraries and torch's allocators read at the first use of the GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    own = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    value = allocator_settings(own, torch.__version__, is_wsl(Path(KERNEL_FILE).read_text()))
    os.environ |= dict.fromkeys(ALLOCATOR_VARIABLES, value) if value else {}


def join(config: TrainingConfig, ranks: Ranks) -> None:
    """Makes the process deterministic and joins the process group. Every rank must call this."""
    import deepspeed  # here alone: what only reads a checkpoint starts without it, two seconds sooner

    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\.")  # what a user cannot mend
    offload.start_quickly()
    keep_freed_memory()
    torch.set_deterministic_debug_mode("error")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    device = device_of(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    offload.keep_to_device(deepspeed.accelerator.get_accelerator(), device)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=config.rank_timeout_minutes)
    with _refusing_taken_port(), redirect_stdout(StringIO()):  # DeepSpeed prints what it has built
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    torch.set_num_threads(num_threads(len(os.sched_getaffinity(0)), gather_numbers(cores_number()), ranks.rank))
    offload.forget_shared_memory(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], ranks.rank)


def hides_cards() -> bool:
    """Whether cards of this machine are hidden from this process on purpose."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def refuse_shared_cards(cards: list[str]) -> None:
    """Raises ValueError where two ranks have the same card, each rank's by machine and UUID: NCCL cannot share one."""
    for rank, card in enumerate(cards):
        first = cards.index(card)
        if first < rank:
            remedy = "give each a card of its own (srun --gpus-per-task 1), or start one rank for each card"
            raise ValueError(f"ranks {first} and {rank} have the same GPU; {remedy}")


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
    """As `together` for what raises ValueError, before there is a process group: the ranks meet at the launcher's store. Then
    all raise where two of them have the same card.
    """
    try:
        result, words = work(), ""
    except ValueError as refusal:
        result, words = None, str(refusal)
    refusals = [words] if ranks.world_size == 1 else _words_of_ranks(words, config, ranks)
    refused = [rank for rank, found in enumerate(refusals) if found]
    if not refused and ranks.world_size > 1 and device_of(ranks).type == "cuda":
        card = f"{socket.gethostname()} {torch.cuda.get_device_properties(device_of(ranks)).uuid}"
        refuse_shared_cards(_words_of_ranks(card, config, ranks))
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


def in_turn(work: Callable[[], Result], config: TrainingConfig, ranks: Ranks) -> Result:
    """As `together`, but rank 0 works first and then the others, which wait for it however long it takes. Every rank must call
    this.
    """
    before = together(lambda: _first(work, config, ranks))
    after = together(lambda: None if ranks.rank == 0 else work())
    return before if ranks.rank == 0 else after  # pyright: ignore[reportReturnType]


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


def forget_earlier_run() -> None:
    """Frees what an earlier run of this process has left on the GPU and, from torch 2.13 on, in page-locked memory. The peak of
    the GPU's memory begins anew.
    """
    release_memory()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()


def completed(jobs: dict[int, Callable[[], Any]], num_bytes: dict[int, int], workers: Workers, what: str) -> dict[int, Any]:
    """The result of each job. The progress of `what` is shown in bytes: a bar on a terminal, else a line now and then. Raises
    what a job raises, and ValueError where a worker was killed or the scheduler does not answer.
    """
    results, total, done_bytes = {}, sum(num_bytes.values()), 0
    started, is_terminal = time.monotonic(), sys.stderr.isatty()
    said = started
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=not (is_terminal and jobs)) as bar:
        for number, result in _as_done(jobs, workers):
            results[number] = result
            bar.update(num_bytes[number])
            done_bytes, now = done_bytes + num_bytes[number], time.monotonic()
            if not is_terminal and now - said > PROGRESS_SECONDS:
                said, rate = now, done_bytes / (now - started)
                words = f"{done_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
                print(f"{what}: {words}, {(total - done_bytes) / rate:,.0f} s left", flush=True)
    return results


def say(ranks: Ranks, line: str) -> None:
    """Prints a line on rank 0, above a progress bar if there is one."""
    if ranks.rank == 0:
        with tqdm.external_write_mode(sys.stdout):
            watch.say(line, sys.stdout)


def _as_done(jobs: dict[int, Callable[[], Any]], workers: Workers) -> Iterator[Done]:
    if not jobs or workers == Workers(1, None):
        yield from (Done(number, job()) for number, job in jobs.items())
        return
    dask = workers.dask_scheduler
    with _executor(workers) if dask is None else _dask_executor(dask) as executor:
        with _without_main():
            numbers = {executor.submit(job): number for number, job in jobs.items()}
        try:
            for future in as_completed(numbers):
                yield Done(numbers[future], future.result())
        except BrokenExecutor as error:
            remedy = "the memory may be full; what is finished stays, and the same command goes on"
            raise ValueError(f"a process that prepares the data was killed; {remedy}") from error


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


def _first(work: Callable[[], Result], config: TrainingConfig, ranks: Ranks) -> Result | None:
    """Works on rank 0. The others wait at the launcher's store, which has no clock, as the process group has one."""
    if ranks.world_size == 1:
        return work()
    store = _store(config.rank_timeout_minutes)
    turn = f"turn {store.add(f'turns of {ranks.rank}', 1)}"
    if ranks.rank == 0:
        try:
            return work()
        finally:
            store.set(turn, "is over")
    while not store.check([turn]):
        time.sleep(LOCK_POLL_SECONDS)
    return None


@cache
def _lone_store() -> Any:
    """The store of a process without a launcher, at a port that the system chose: one picked at random may be in use."""
    return torch.distributed.TCPStore(LOOPBACK, 0, is_master=True, multi_tenant=True)  # pyright: ignore[reportPrivateImportUsage]


@cache
def _store(timeout_minutes: int) -> Any:
    """The launcher's store, kept as long as the process: torch's process group meets at the same port."""
    with _refusing_taken_port():
        return next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))[0]


@contextmanager
def _refusing_taken_port() -> Iterator[None]:
    """Raises ValueError where another program listens at the port at which the ranks were to meet."""
    try:
        yield
    except torch.distributed.DistNetworkError as fault:
        if "EADDRINUSE" not in str(fault):
            raise
    else:
        return
    port = os.environ["MASTER_PORT"]
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    words = f"port {port}, at which the ranks meet, is in use by another program, perhaps another run"
    raise ValueError(f"{words}; put --master_port {free} after `deepspeed`, or --master-port {free} after `torchrun`")


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


@contextmanager
def _executor(workers: Workers) -> Iterator[Executor]:
    """What is under way is abandoned if the block raises."""
    others = {*active_children()}
    with ProcessPoolExecutor(workers.number, get_context("forkserver"), start_worker) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in {*active_children()} - others:
                child.terminate()
            raise


@contextmanager
def _dask_executor(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client, KilledWorker

        client = Client(address, timeout=DASK_SECONDS, set_as_default=False)
    except ImportError:
        raise ValueError(f'dask_scheduler={address!r} needs dask; pip install "dask[distributed]"') from None
    except (OSError, ValueError) as error:
        remedy = 'write it as in "tcp://host:8786", and see that it runs'
        raise ValueError(f"dask_scheduler={address!r} cannot be reached ({one_line(error)}); {remedy}") from error
    try:
        with client:
            yield client.get_executor(pure=False)
    except (KilledWorker, CancelledError, OSError) as error:
        remedy = "see that it and its workers run; what is finished stays, and the same command goes on"
        raise ValueError(f"dask_scheduler={address!r} failed ({one_line(error)}); {remedy}") from error


@contextmanager
def _without_main() -> Iterator[None]:
    """Worker processes that start meanwhile do not import the program that they work for: its torch takes each of them seconds
    and half a GiB, and a program without `if __name__ == "__main__"` would begin again in each.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
