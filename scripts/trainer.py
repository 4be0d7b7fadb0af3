"""The engine, the schedule, the one training loop. Knows ranks and steps; an objective and the data are given to it."""

import gc
import math
import os
import random
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds.loader import (
    Labels,
    MicroBatch,
    count_windows,
    digest_hex,
    digest_rows,
    documents_between,
    held_out_batches,
    micro_batches,
    rank_windows,
    read_labels,
    read_windows,
    windows_of_run,
)
from scripts import checkpoint, lifecycle, memory, offload, preflight
from scripts.config import TrainingConfig, refuse_unfit
from scripts.evaluate import HeldOut, evaluate, hardest_pieces
from scripts.model import Decoder, continue_ids, empty_model, initialise, parameter_groups
from scripts.report import NUM_NAMED_DOCUMENTS, Row, draw_losses, held_out_words, indented, line_of, table, train_words

GIB = 2**30
BEGINNING_TOKENS, LABEL_ERROR_TOKENS = 48, 8192
HOLD_SECONDS, PROGRESS_SECONDS = 60, 300
Objective = Callable[..., Tensor]
Label = Callable[..., tuple]


class Ranks(NamedTuple):
    """This process among all: `rank` of `world_size`, `local_rank` of `local_size` on this machine, and how many
    processes of the launcher stand above it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    num_launchers: int


class Progress(NamedTuple):
    """What the loop remembers from step to step, and a checkpoint with it: steps skipped in all and in a row, the last finite
    losses, the digests of the rows read since the last train line, and whether this step's evaluation and sample are made.
    """

    skipped_steps: int
    skipped_in_a_row: int
    recent_losses: tuple[float, ...]
    tokens_digest: tuple[int, ...]
    windows_digest: tuple[int, ...]
    looked_around: bool


class Step(NamedTuple):
    """One step, over all ranks: the mean `loss` in nats, `losses` (ranks, micro-batches), digests (4,) of what was read,
    whether the engine refused the update, and whether any rank was asked to stop.
    """

    loss: float
    losses: np.ndarray
    tokens_digest: np.ndarray
    windows_digest: np.ndarray
    skipped: bool
    asked_to_stop: bool


class Teaching(NamedTuple):
    """The teacher's `fingerprint`; its `source`, what the objective gets of it: the model on this device, or its labels on the
    disk; and, in a run that begins, what is logged of it.
    """

    fingerprint: str
    source: Any
    record: dict | None


class Run(NamedTuple):
    """What the loop works on. `first_step` is 0, or the step of the checkpoint that the run continues from; `hold` keeps other
    launches out of run_dir, on rank 0; `teaching` is None in pre-training.
    """

    config: TrainingConfig
    ranks: Ranks
    device: torch.device
    engine: Any
    data: Any
    first_step: int
    progress: Progress
    watch: lifecycle.Watch
    hold: int | None
    teaching: Teaching | None


FRESH = Progress(0, 0, (), (0,) * 4, (0,) * 4, True)


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


def ready(config: TrainingConfig, prepare: Callable, label: Label | None = None) -> Run | None:
    """Everything before step one: checks, process group, data, teacher, model, engine. None when the run is already finished.

    `prepare(config)` makes or opens the data; rank 0 calls it first. `label(teacher, windows, config)` says what a teacher says
    of windows (B, T + 1), its labels and the nats that they leave out, (B, T); only `teacher_top_k` needs it.

    Raises:
        ValueError: the configuration does not fit the machine, the ranks, the data, the teacher or what run_dir holds.
    """
    ranks = ranks_from_launcher()
    watch = lifecycle.Watch(ranks.rank, ranks.local_rank, ranks.num_launchers, config.silent_rank_seconds)
    with _ending_out_of_memory(config, ranks), watch.before_training():
        run = _ready(config, ranks, watch, prepare, label)
    if run is None:
        watch.close(clean=True)
    return run


def train(run: Run | None, objective: Objective) -> None:
    """The one training loop: every step, then what is due after it. Nothing to do for a finished run.

    Raises:
        SystemExit: 75 after a save, when the run was asked to stop; 1 when the last save fails, too many steps are skipped or
            there is no memory left.
    """
    if run is None:
        return
    config, progress, saved = run.config, run.progress, None
    with _ending_out_of_memory(config, run.ranks), run.watch.during_training(), _holding(run), _reporting(run) as report:
        _begin(run, report)
        for step in range(run.first_step, config.num_steps):
            started = time.perf_counter()
            taken = run_step(run, objective, step)
            progress = advance(progress, taken, config)
            for event in _bad_numbers(run, step, taken, progress):
                report(event)
            if _due(step + 1, config.log_every_steps, config):
                report(_measure(run, step + 1, taken.loss, progress, time.perf_counter() - started))
                progress = progress._replace(tokens_digest=FRESH.tokens_digest, windows_digest=FRESH.windows_digest)
            stop = taken.asked_to_stop and step + 1 < config.num_steps
            progress = progress._replace(looked_around=not stop)
            if not stop and _look_around(run, step + 1, report):
                stop = _asked_to_stop(run)
            if stop or _due(step + 1, config.save_every_steps, config):
                _settle(run, step + 1, saved, report)
                saved = _save(run, step + 1, progress, report)
                stop = stop or _asked_to_stop(run)
            if stop or step + 1 == config.num_steps:
                _conclude(run, step + 1, saved, report)
            _refuse_more_skips(run, step + 1, progress)
    _say(run.ranks, f"Finished: {config.num_steps} steps. {_summary(config)}")


@contextmanager
def leaving() -> Iterator[None]:
    """Leaves the process group after what is inside and ends the process with its status, without Python's own teardown:
    in that a thread of gloo's that frees a tensor aborts the process (pytorch/pytorch#179291).
    """
    status = lifecycle.FAILED
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
        lifecycle.end(status)


def run_step(run: Run, objective: Objective, step: int) -> Step:
    """One optimizer update over `tokens_per_step` tokens. Every rank must call this."""
    run.watch.step = step + 1
    digests = np.zeros((2, 4), dtype=np.int64)
    rate = learning_rate_at(step, run.config)
    losses, skipped = _update(run.engine, objective, _digesting(run, step_batches(run, step), digests), rate, run.config)
    return _agree(run, losses, digests, skipped)


def advance(progress: Progress, taken: Step, config: TrainingConfig) -> Progress:
    """The progress after one more step."""
    finite = math.isfinite(taken.loss)
    return Progress(
        skipped_steps=progress.skipped_steps + taken.skipped,
        skipped_in_a_row=progress.skipped_in_a_row + 1 if taken.skipped else 0,
        recent_losses=(*progress.recent_losses, *([taken.loss] if finite else []))[-config.spike_window_steps :],
        tokens_digest=tuple(map(sum, zip(progress.tokens_digest, taken.tokens_digest.tolist(), strict=True))),
        windows_digest=tuple(map(sum, zip(progress.windows_digest, taken.windows_digest.tolist(), strict=True))),
        looked_around=True,
    )


def is_spike(loss: float, before: tuple[float, ...], config: TrainingConfig) -> bool:
    """Whether `loss` lies `spike_sigmas` standard deviations above the mean of the losses `before` it, as OLMo-core judges.

    With fewer than half of `spike_window_steps` of them nothing is a spike.
    """
    if len(before) < max(2, config.spike_window_steps // 2):
        return False
    return bool(loss > np.mean(before) + config.spike_sigmas * np.std(before, ddof=1))


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of the update that turns `step` into `step + 1`: linear warm-up, then cosine, or stable and linear decay.

    Cosine: Loshchilov & Hutter 2017. Warm-up/stable/decay ("wsd"): Hu et al. 2024, MiniCPM.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = config.decay_steps or 1
        share = min(1.0, (config.num_steps - 1 - step) / decay_steps)
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


def step_batches(run: Run, step: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of one step, on the host."""
    return micro_batches(run.data.train, rank=run.ranks.rank, context_length=run.config.context_length, **_order(run, step))


def held_out_loss(run: Run) -> HeldOut:
    """The loss over the first `eval_tokens` held-out tokens, all ranks together."""
    return _held_out_loss(run.config, run.ranks, run.data, run.engine.module)


def _held_out_loss(config: TrainingConfig, ranks: Ranks, data, model: Decoder) -> HeldOut:
    lengths = torch.tensor(data.token_num_bytes(), device=_device(ranks))
    return evaluate(model, _held_out_windows(config, ranks, data), lengths, config.loss_chunk_rows)


def _held_out_windows(config: TrainingConfig, ranks: Ranks, data) -> Iterator[Tensor]:
    """This rank's batches of the first `eval_tokens` held-out tokens, (B, T + 1) on its device."""
    available = count_windows(data.validation.num_tokens, config.context_length)
    batches = held_out_batches(
        data.validation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_rows=config.micro_batch_rows,
        context_length=config.context_length,
        num_windows=min(available, config.eval_tokens // config.context_length),
    )
    return (torch.from_numpy(windows).to(_device(ranks)) for windows in batches)


def _order(run: Run, step: int) -> dict[str, int]:
    config = run.config
    return {
        "step": step,
        "world_size": run.ranks.world_size,
        "micro_batch_rows": config.micro_batch_rows,
        "rows_per_step": config.rows_per_step,
        "seed": config.seed,
    }


def _on_device(batch: MicroBatch, run: Run) -> Tensor:
    return torch.from_numpy(batch.ids).to(run.device, non_blocking=True)


def _digesting(run: Run, batches: Iterator[MicroBatch], digests: np.ndarray) -> Iterator[tuple]:
    """What the objective gets of each batch: its windows on the device, and with a teacher that, or its labels of them. Adds to
    `digests` (2, 4) what was read: tokens and window numbers.
    """
    for batch in batches:
        digests += (digest_rows(batch.rows, batch.ids), digest_rows(batch.rows, batch.windows[:, None]))
        yield _on_device(batch, run), *_taught(batch, run)


def _taught(batch: MicroBatch, run: Run) -> tuple:
    if run.teaching is None:
        return ()
    if run.config.teacher_top_k is None:
        return (run.teaching.source,)
    ids, *rest = read_labels(run.teaching.source, batch.windows, run.config.context_length)
    return (tuple(torch.from_numpy(part).to(run.device, non_blocking=True) for part in (ids.astype(np.int32), *rest)),)


def _update(
    engine, objective: Objective, batches: Iterable[tuple], learning_rate: float, config: TrainingConfig
) -> tuple[Tensor, bool]:
    """Accumulates over this rank's micro-batches and steps: their losses (G,), and whether the engine refused the update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    losses, skipped = [], engine.skipped_steps
    for batch in batches:
        loss = objective(engine, *batch, config)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses), engine.skipped_steps > skipped


def _agree(run: Run, losses: Tensor, digests: np.ndarray, skipped: bool) -> Step:
    """One reduction over all ranks for everything that they must know of a step; words below 2**32 sum exactly in float64."""
    ranks, num_micro_batches = run.ranks, len(losses)
    head = torch.tensor([float(run.watch.reason is not None), *(digests.flatten() % 2**32)], dtype=torch.float64)
    table = torch.zeros(ranks.world_size, num_micro_batches, dtype=torch.float64, device=run.device)
    table[ranks.rank] = losses.double()
    everything = torch.cat((head.to(run.device), table.flatten()))
    torch.distributed.all_reduce(everything)
    values = everything.cpu().numpy()
    tokens, windows = values[1:9].astype(np.int64).reshape(2, 4)
    losses_of_all = values[9:].reshape(ranks.world_size, num_micro_batches)
    return Step(float(losses_of_all.mean()), losses_of_all, tokens, windows, skipped, bool(values[0]))


def _slurm_as_torch(env) -> dict[str, str]:
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


def _ready(config: TrainingConfig, ranks: Ranks, watch: lifecycle.Watch, prepare: Callable, label: Label | None) -> Run | None:
    _set_up_cuda()
    offload.refuse_other_versions()
    refuse_unfit(config, ranks.world_size)
    preflight.refuse_missing_compilers(config)
    checkpoint.refuse_other_run(config)
    teach = partial(_teach, config, ranks, checkpoint.find_teacher(config), label)
    _refuse_unfit_memory(config, ranks, memory.room_in_all)
    _say(ranks, "Starting DeepSpeed. Its first start on a machine compiles the CPU Adam, which takes a minute or two.")
    with _compiling(config, ranks):
        _join(config, ranks)
    _connect(ranks, watch)
    hold = _refuse_together(lambda: checkpoint.hold_run(config, HOLD_SECONDS) if ranks.rank == 0 else None, ranks)
    try:
        run = _continue_or_begin(config, ranks, watch, hold, prepare, teach)
    except BaseException:
        _release(hold)
        raise
    if run is None:
        _release(hold)
    return run


def _continue_or_begin(
    config: TrainingConfig, ranks: Ranks, watch: lifecycle.Watch, hold: int | None, prepare: Callable, teach: Callable
) -> Run | None:
    found = _refuse_together(lambda: _newest_checkpoint(config, ranks), ranks)
    first_step = 0 if found is None else found.state["step"]
    if _largest(first_step, ranks) != -_largest(-first_step, ranks):
        raise ValueError(f"run_dir={config.run_dir!r} does not hold the same on every machine; put it on a shared path")
    if first_step == config.num_steps:
        _say(ranks, f"This run is finished: {config.num_steps} steps. {_summary(config)}")
        return None
    _refuse_together(lambda: _refuse_unfit_memory(config, ranks, memory.room_free), ranks)
    _say_plan(config, ranks)
    data = _in_turn(lambda: prepare(config), ranks)
    return _build(config, ranks, watch, hold, data, found, teach(data, found))


def _refuse_unfit_memory(config: TrainingConfig, ranks: Ranks, look: Callable) -> None:
    device = _device(ranks)
    memory.refuse_unfit_memory(config, ranks.world_size, ranks.local_size, look(config, device), device.type)


def _say_plan(config: TrainingConfig, ranks: Ranks) -> None:
    if ranks.rank == 0:
        lifecycle.say(memory.short_words(config, ranks.world_size, ranks.local_size, _device(ranks)), sys.stdout)


@contextmanager
def _ending_out_of_memory(config: TrainingConfig, ranks: Ranks) -> Iterator[None]:
    """Ends a run for which there is no memory left with the plan, what was measured and what needs less."""
    try:
        yield
        return
    except (MemoryError, RuntimeError, OSError) as fault:
        if not memory.is_out_of_memory(fault):
            raise
        first_line = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    words = memory.out_of_memory_words(config, ranks.world_size, ranks.local_size, _device(ranks).type, *_peak_bytes())
    lifecycle.say(f"failed: {first_line}; {words}; {lifecycle.SAME_COMMAND}", sys.stderr)
    raise SystemExit(lifecycle.FAILED)


def _peak_bytes() -> tuple[int, int]:
    """The most that this process has held so far: on the GPU as torch's allocator counts, and of the host."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _holding(run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        _release(run.hold)


def _release(hold: int | None) -> None:
    if hold is not None:
        os.close(hold)


def _newest_checkpoint(config: TrainingConfig, ranks: Ranks) -> checkpoint.Checkpoint | None:
    found, faults = checkpoint.newest_verified(config)
    for fault in faults:
        _say(ranks, f"{fault}; going back to an older one")
    lost = checkpoint.lost_steps(config) if found is None else 0
    if lost:
        _say(ranks, f"{config.run_dir} holds {lost} steps and no checkpoint yet: beginning again at step 0")
    return found


def _set_up_cuda() -> None:
    """What CUDA's libraries and torch's allocators read when CUDA starts, which the first look at the card makes it do."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    exact = ",pinned_max_round_threshold_mb:1" if torch.__version__ >= "2.13" else ""
    os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:True{exact}"


def _join(config: TrainingConfig, ranks: Ranks) -> None:
    """Makes the process deterministic and joins the process group."""
    deepspeed_logger.setLevel("WARNING")
    offload.start_quickly()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_size))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(minutes=config.rank_timeout_minutes))
    torch.distributed.barrier()
    offload.forget_shared_memory(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], ranks.rank)


def _connect(ranks: Ranks, watch: lifecycle.Watch) -> None:
    """The watches of all ranks find each other, through the process group."""
    if ranks.world_size == 1:
        return
    address = torch.tensor(watch.listen() if ranks.rank == 0 else (0, 0), dtype=torch.int64, device=_device(ranks))
    torch.distributed.broadcast(address, 0)
    if ranks.rank != 0:
        watch.connect(os.environ["MASTER_ADDR"], *address.tolist())


def _in_turn(work: Callable, ranks: Ranks) -> Any:
    """`work` on rank 0 first, then on the others."""
    done = [_refuse_together(lambda turn=turn: work() if turn else None, ranks) for turn in _turns(ranks)]
    return next(result for result in done if result is not None)


def _turns(ranks: Ranks) -> tuple[bool, bool]:
    return ranks.rank == 0, ranks.rank != 0


def _refuse_together(work: Callable, ranks: Ranks) -> Any:
    """`work` on this rank; when it is refused on any, all leave with that one instead of waiting for it."""
    result, refusal = None, None
    try:
        result = work()
    except ValueError as fault:
        refusal = fault
    if _largest(float(refusal is not None), ranks):
        raise refusal or ValueError("another rank is refused; its line says why")
    return result


def _largest(number: float, ranks: Ranks) -> float:
    value = torch.tensor(number, dtype=torch.float64, device=_device(ranks))
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value.item()


def _device(ranks: Ranks) -> torch.device:
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _teach(
    config: TrainingConfig,
    ranks: Ranks,
    teacher: checkpoint.Teacher | None,
    label: Label | None,
    data,
    found: checkpoint.Checkpoint | None,
) -> Teaching | None:
    """The teacher on the device; or, with `teacher_top_k`, its labels of all windows that the run reads, on the disk, for which
    it is loaded alone and let go.
    """
    if teacher is None:
        return None
    fingerprint = _refuse_together(lambda: _check_teacher(config, teacher, data, found), ranks)
    _say(ranks, f"Teacher: {teacher.folder}, {teacher.config.num_parameters / 1e6:,.2f} million parameters")
    load = partial(checkpoint.load_teacher, teacher, config, _device(ranks))
    if label is None or config.teacher_top_k is None:
        model = _refuse_together(load, ranks)
        return Teaching(fingerprint, model, _teacher_record(config, ranks, data, teacher, model) if found is None else None)
    identity = checkpoint.labels_identity(config, fingerprint)
    labels = _in_turn(lambda: data.labels(config.teacher_top_k, config.context_length, config.vocab_size, identity), ranks)
    blocks, groups = _unlabelled(config, ranks, data, labels)
    if found is not None and not len(groups):
        return Teaching(fingerprint, labels, None)
    model = _refuse_together(load, ranks)
    record = None
    if found is None:
        record = _teacher_record(config, ranks, data, teacher, model) | _label_error(config, ranks, data, model, label)
    seconds = _write_labels(config, ranks, data, labels, partial(label, model, config=config), blocks, groups)
    del model
    _release_memory()
    return Teaching(fingerprint, labels, record and record | {"label_seconds": seconds})


def _check_teacher(config: TrainingConfig, teacher: checkpoint.Teacher, data, found: checkpoint.Checkpoint | None) -> str:
    """The teacher's fingerprint, when it fits the data and is the one that the run began with."""
    named = f"teacher_dir={config.teacher_dir!r}"
    data.refuse_other_tokenizer(teacher.folder, named)
    if teacher.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"{named}: it gives probabilities to {teacher.config.vocab_size} ids and vocab_size={config.vocab_size};"
            f" nearest is {teacher.config.vocab_size}, with tokenizer_path={str(teacher.folder)!r}"
        )
    fingerprint = checkpoint.fingerprint_of(teacher)
    if found is not None and found.state.get("teacher_fingerprint") != fingerprint:
        raise ValueError(f"{named}: {teacher.folder} is not the teacher that {found.folder} learned from; put that one back")
    return fingerprint


def _teacher_record(config: TrainingConfig, ranks: Ranks, data, teacher: checkpoint.Teacher, model: Decoder) -> dict:
    """What metrics.jsonl holds of the teacher. Every rank must call this."""
    record = {"kind": "event", "step": 0, "event": "teacher", "folder": str(teacher.folder)}
    record |= {"num_parameters": teacher.config.num_parameters}
    if data.validation is None:
        return record
    found = _held_out_loss(config, ranks, data, model)
    return record | {"val_loss": _finite(found.nats_per_token), "val_bits_per_byte": _finite(found.bits_per_byte)}


def _label_error(config: TrainingConfig, ranks: Ranks, data, model: Decoder, label: Label) -> dict:
    """Means over some held-out tokens: the probability that labels leave to their tails, and the nats by which a divergence
    from labels falls short of one from all probabilities, for a student that knows nothing. Every rank must call this.
    """
    if data.validation is None:
        return {}
    sums = torch.zeros(3, dtype=torch.float64, device=_device(ranks))
    some = replace(config, eval_tokens=max(config.context_length, min(config.eval_tokens, LABEL_ERROR_TOKENS)))
    for windows in _held_out_windows(some, ranks, data):
        labels, left_out = label(model, windows, config)
        sums += torch.stack((labels.tail.double().sum(), left_out.double().sum(), sums.new_tensor(left_out.numel())))
    torch.distributed.all_reduce(sums)
    tail, left_out, num_tokens = sums.tolist()
    return {"tail_mass": tail / num_tokens, "left_out_nats": left_out / num_tokens}


def _unlabelled(config: TrainingConfig, ranks: Ranks, data, labels) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of labels that the run reads, (groups, blocks), and the numbers of the groups that are not whole on the disk. A
    group is what the teacher is asked at once, the same for any number of ranks; the last one repeats its last block.
    """
    num_windows, at_once = labels.num_positions // config.context_length, _blocks_at_once(config, labels)
    windows = windows_of_run(config.num_steps, config.rows_per_step, num_windows, config.seed)
    blocks = np.unique(windows * config.context_length // labels.block_tokens)
    blocks = np.pad(blocks, (0, -len(blocks) % at_once), "edge").reshape(-1, at_once)
    own, is_faulty = blocks[ranks.rank :: ranks.world_size], torch.zeros(len(blocks), dtype=torch.int32)
    is_faulty[ranks.rank :: ranks.world_size] = torch.from_numpy(np.isin(own, labels.faulty(np.unique(own))).any(1)).int()
    of_all = is_faulty.to(_device(ranks))
    torch.distributed.all_reduce(of_all)
    return blocks, np.flatnonzero(of_all.cpu().numpy())


def _blocks_at_once(config: TrainingConfig, labels) -> int:
    return max(1, config.micro_batch_rows * config.context_length // labels.block_tokens)


def _write_labels(
    config: TrainingConfig, ranks: Ranks, data, labels, ask: Callable, blocks: np.ndarray, groups: np.ndarray
) -> float:
    """The teacher alone over the training windows, each rank over its share of the `groups`; the seconds that it took."""
    started, num_tokens = time.perf_counter(), len(groups) * blocks.shape[1] * labels.block_tokens
    if len(groups):
        _say(ranks, f"The teacher alone labels {num_tokens:,} tokens; the same command goes on where it stopped")

    def write() -> None:
        try:
            for group in _telling(groups[ranks.rank :: ranks.world_size], ranks):
                _label_blocks(config, ranks, data, labels, ask, np.unique(blocks[group]))
            labels.sync()
        except OSError as fault:
            raise ValueError(f"data_dir={config.data_dir!r}: a label cannot be written: {fault.strerror}; make room") from None

    _refuse_together(write, ranks)
    return time.perf_counter() - started


def _telling(groups: np.ndarray, ranks: Ranks) -> Iterator[int]:
    """The groups, with a bar on a terminal and else a line every PROGRESS_SECONDS."""
    said_at, is_terminal = time.perf_counter(), ranks.rank == 0 and sys.stderr.isatty()
    for number, group in enumerate(tqdm(groups, unit="batch", desc="labels", dynamic_ncols=True, disable=not is_terminal)):
        yield int(group)
        if not is_terminal and time.perf_counter() - said_at > PROGRESS_SECONDS:
            said_at = time.perf_counter()
            _say(ranks, f"labels: {(number + 1) / len(groups):.0%}")


def _label_blocks(config: TrainingConfig, ranks: Ranks, data, labels, ask: Callable, blocks: np.ndarray) -> None:
    length, rows, per_block = config.context_length, config.micro_batch_rows, labels.block_tokens // config.context_length
    windows = (blocks[:, None] * per_block + np.arange(per_block)).flatten()
    windows, said = windows[windows < labels.num_positions // length], []
    for piece in np.split(windows, range(rows, len(windows), rows)):
        ids = torch.from_numpy(read_windows(data.train, piece, length)).to(_device(ranks))
        said.append([part.flatten(0, 1).cpu().numpy() for part in ask(windows=ids)[0]])
    parts = [np.concatenate(pieces) for pieces in zip(*said, strict=True)]
    for number, block in enumerate(blocks.tolist()):
        own = slice(number * labels.block_tokens, (number + 1) * labels.block_tokens)
        labels.write(block * labels.block_tokens, Labels(*(part[own] for part in parts)))


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _build(
    config: TrainingConfig,
    ranks: Ranks,
    watch: lifecycle.Watch,
    hold: int | None,
    data,
    found: checkpoint.Checkpoint | None,
    teaching: Teaching | None,
) -> Run:
    device, first_step, progress = _device(ranks), 0, FRESH
    if found is not None:
        first_step, progress = found.state["step"], Progress(**found.state["progress"])
    model = _refuse_together(lambda: _model_to_train(config, device, data, found), ranks)
    with _compiling(config, ranks):
        preflight.refuse_untrue_updates(config, ranks.rank, ranks.world_size, device, partial(_train_tiny, ranks))
        engine = _initialize(config, ranks, model)
    if found is not None:
        _refuse_together(lambda: checkpoint.load_state(engine, found), ranks)
        _say(ranks, f"Continuing after step {first_step} from {found.folder}")
    held = _refuse_together(lambda: _claim(config, first_step, progress, hold) if ranks.rank == 0 else None, ranks)
    return Run(config, ranks, device, engine, data, first_step, progress, watch, held, teaching)


def _claim(config: TrainingConfig, step: int, progress: Progress, hold: int | None) -> int | None:
    try:
        checkpoint.claim_run(config, step)
        held = checkpoint.hold_run(config, 0) if hold is None else hold
        checkpoint.rewind_metrics(config, step if step else -1, progress.looked_around)
    except OSError as fault:
        raise ValueError(f"run_dir={config.run_dir!r} cannot be written: {fault.strerror}; make room in it") from None
    return held


@contextmanager
def _compiling(config: TrainingConfig, ranks: Ranks) -> Iterator[None]:
    """Around whatever may compile DeepSpeed's extensions."""
    with preflight.compiling(config, ranks.local_rank) as lines:
        for line in lines:
            lifecycle.say(line, sys.stdout)
        yield


def _train_tiny(
    ranks: Ranks, tiny: TrainingConfig, model: Decoder, steps: preflight.Steps, learning_rate: float
) -> tuple[dict[str, Tensor], list[float]]:
    """The truth check's updates through the same engine and loop: masters and gradient norms, NaN for one never taken."""
    engine, norms = _initialize(tiny, ranks, model), []
    for batches in steps:
        skipped, tries = True, 0
        while skipped and tries < preflight.MOST_TRIES:
            tries += 1
            _, skipped = _update(engine, preflight.tiny_objective, ((ids,) for ids in batches), learning_rate, tiny)
        norms.append(math.nan if skipped else _gradient_norm(engine))
    masters = offload.full_masters(engine, model)
    engine.destroy()
    return masters, norms


def _initialize(config: TrainingConfig, ranks: Ranks, model: Decoder):
    """DeepSpeed's engine; a ValueError from inside it is no refusal of the user's values."""
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.weight_decay),  # pyright: ignore[reportArgumentType]
            config=TrainingConfig.deepspeed_config(config, ranks.world_size),
        )
    except ValueError as fault:
        raise RuntimeError("deepspeed.initialize failed") from fault
    offload.lighten(engine, config)
    return engine


def _model_to_train(config: TrainingConfig, device: torch.device, data, found: checkpoint.Checkpoint | None) -> Decoder:
    if found is not None and found.state["data_fingerprint"] != data.fingerprint:
        raise ValueError(f"data_dir={config.data_dir!r} is not the data that {found.folder} was trained on; put that data back")
    if found is None and config.init_from is not None and (Path(config.init_from) / "tokenizer.json").exists():
        data.refuse_other_tokenizer(config.init_from, f"init_from={config.init_from!r}")
    model, source = empty_model(config, device), config.init_from if found is None else found.folder
    if source is None:
        return initialise(model)
    checkpoint.load_weights(model, Path(source))
    return model


def _due(step: int, every: int | None, config: TrainingConfig) -> bool:
    return every is not None and (step % every == 0 or step == config.num_steps)


def _begin(run: Run, report: Callable[[dict], None]) -> None:
    """Tells the log what this launch reads from where on, and makes up for what a stop left out."""
    config, step = run.config, run.first_step
    num_windows = count_windows(run.data.train.num_tokens, config.context_length)
    order = {"rows_per_step": config.rows_per_step, "num_windows": num_windows, "seed": config.seed}
    report({"kind": "event", "step": step, "event": "started", "ranks": run.ranks.world_size, **order})
    if run.teaching is not None and run.teaching.record is not None:
        report(run.teaching.record)
    if step == 0 and config.eval_every_steps is not None:
        report(_evaluate(run, 0))
    if not run.progress.looked_around:
        _look_around(run, step, report)


def _look_around(run: Run, step: int, report: Callable[[dict], None]) -> bool:
    """Evaluates and samples where that is due; whether anything was."""
    config = run.config
    evaluates, samples = _due(step, config.eval_every_steps, config), _due(step, config.sample_every_steps, config)
    if evaluates:
        report(_evaluate(run, step))
    if samples:
        report(_sample(run, step))
    return evaluates or samples


def _asked_to_stop(run: Run) -> bool:
    return bool(_largest(float(run.watch.reason is not None), run.ranks))


def _refuse_more_skips(run: Run, step: int, progress: Progress) -> None:
    if progress.skipped_in_a_row < run.config.max_skipped_steps:
        return
    if run.ranks.rank == 0:
        good, _ = checkpoint.newest_verified(run.config)
        last = f"the last good checkpoint is {good.folder}" if good else "there is no checkpoint yet"
        lifecycle.say(
            f"failed: {progress.skipped_in_a_row} steps in a row up to step {step} had gradients that are not finite"
            f" (max_skipped_steps); {last}; metrics.jsonl names their documents; remove them or lower learning_rate",
            sys.stderr,
        )
    torch.distributed.barrier()
    raise SystemExit(lifecycle.FAILED)


def _bad_numbers(run: Run, step: int, taken: Step, progress: Progress) -> Iterator[dict]:
    """Events for a skipped step and for a spike, with the documents that are to blame."""
    event = {"kind": "event", "step": step + 1, "loss": _finite(taken.loss)}
    if taken.skipped:
        documents = _documents_of(run, step, ~np.isfinite(taken.losses))
        yield event | {"event": "skipped", "skipped_steps": progress.skipped_steps, "documents": documents}
    elif is_spike(taken.loss, progress.recent_losses[:-1], run.config):
        yield event | {"event": "spike", "documents": _hardest_documents(run, step, taken.loss)}


def _documents_of(run: Run, step: int, suspects: np.ndarray) -> list[dict]:
    """The documents of `suspects` (ranks, micro-batches), or of the whole step if no micro-batch is suspected."""
    if run.ranks.rank != 0:
        return []
    suspects = suspects if suspects.any() else np.ones_like(suspects)
    config, stream, found = run.config, run.data.train, {}
    for rank, micro_batch in np.argwhere(suspects).tolist():
        num_windows = count_windows(stream.num_tokens, config.context_length)
        _, windows = rank_windows(num_windows, rank=rank, **_order(run, step))
        for start in (windows[micro_batch] * config.context_length).tolist():
            for document in documents_between(stream, start, start + config.context_length + 1, run.data.end_of_text_id):
                found[document.number] = document
    return [{"document": number, "beginning": _beginning(run, found[number])} for number in sorted(found)]


def _hardest_documents(run: Run, step: int, mean_nats: float) -> list[dict]:
    """The documents that weigh most on a step's loss, in nats above its mean, hardest first. Every rank must call this."""
    config, data = run.config, run.data
    batches = ((_on_device(batch, run), batch.windows * config.context_length) for batch in step_batches(run, step))
    own = hardest_pieces(
        run.engine.module, batches, data.end_of_text_id, mean_nats, config.loss_chunk_rows, NUM_NAMED_DOCUMENTS
    ).to(run.device)
    gathered = [torch.empty_like(own) for _ in range(run.ranks.world_size)]
    torch.distributed.all_gather(gathered, own)
    if run.ranks.rank != 0:
        return []
    pieces, found = torch.cat(gathered).cpu(), {}
    pieces = pieces[pieces[:, 0].isfinite()]
    for _, nats_per_token, token in pieces[pieces[:, 0].argsort(descending=True)].tolist():
        (document,) = documents_between(data.train, int(token), int(token) + 1, data.end_of_text_id)
        words = {"nats_per_token": nats_per_token, "beginning": _beginning(run, document)}
        found.setdefault(document.number, {"document": document.number, **words})
    return list(found.values())[:NUM_NAMED_DOCUMENTS]


def _beginning(run: Run, document) -> str:
    return run.data.decode(run.data.train.read(document.start, min(document.stop, document.start + BEGINNING_TOKENS)).tolist())


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _gradient_norm(engine) -> float:
    return float(engine.get_global_grad_norm() or 0.0)


def _measure(run: Run, step: int, nats: float, progress: Progress, seconds: float) -> dict:
    config, (gpu_bytes, host_bytes) = run.config, _peak_bytes()
    return {
        "kind": "train",
        "step": step,
        "tokens": step * config.tokens_per_step,
        "loss": _finite(nats),
        "grad_norm": _finite(_gradient_norm(run.engine)),
        "learning_rate": learning_rate_at(step - 1, config),
        "tokens_per_second": config.tokens_per_step / seconds,
        "seconds": seconds,
        "gpu_peak_gib": gpu_bytes / GIB,
        "host_peak_gib": host_bytes / GIB,
        "tokens_hash": digest_hex(np.array(progress.tokens_digest)),
        "windows_hash": digest_hex(np.array(progress.windows_digest)),
    }


def _evaluate(run: Run, step: int) -> dict:
    found, tokens = held_out_loss(run), step * run.config.tokens_per_step
    return {
        "kind": "eval",
        "step": step,
        "tokens": tokens,
        "val_loss": _finite(found.nats_per_token),
        "val_bits_per_byte": _finite(found.bits_per_byte),
    }


def _sample(run: Run, step: int) -> dict:
    """A continuation of `sample_prompt`; only rank 0 samples, no other rank waits for it."""
    config, text = run.config, None
    if run.ranks.rank == 0:
        prompt = torch.tensor(run.data.encode(config.sample_prompt))
        ids = continue_ids(
            run.engine.module, prompt, config.sample_tokens, config.sample_temperature, config.sample_top_k, config.seed + step
        )
        text = config.sample_prompt + run.data.decode(list(ids))
    return {"kind": "event", "step": step, "event": "sample", "text": text}


def _save(run: Run, step: int, progress: Progress, report: Callable[[dict], None]) -> checkpoint.Saved:
    """Saves; a failure is told, and training goes on to the next save."""
    config = run.config
    state = {"step": step, "tokens": step * config.tokens_per_step, "data_fingerprint": run.data.fingerprint}
    state |= {"tokenizer_fingerprint": run.data.train.fingerprint, "progress": progress._asdict()}
    state |= {} if run.teaching is None else {"teacher_fingerprint": run.teaching.fingerprint}
    saved = checkpoint.save(run.engine, config, run.data.tokenizer_json, run.data.end_of_text_id, state)
    outcome = {"event": "saved", "checkpoint": str(saved.folder)}
    report(
        {"kind": "event", "step": step} | (outcome if saved.fault is None else {"event": "save_failed", "fault": saved.fault})
    )
    return saved


def _settle(run: Run, step: int, saved: checkpoint.Saved | None, report: Callable[[dict], None]) -> bool:
    """Whether the last save, if any, is good: before the next one, and at the end."""
    if saved is None:
        return True
    good, words = checkpoint.settle(run.config, saved)
    if words is not None:
        report({"kind": "event", "step": step, "event": "save_failed", "fault": words})
    return good


def _conclude(run: Run, step: int, saved: checkpoint.Saved | None, report: Callable[[dict], None]) -> None:
    """After the last step, or the last before a stop: that save has no next one to make up for it."""
    good = _settle(run, step, saved, report)
    report({"kind": "event", "step": step, "event": "memory"} | _predicted_and_measured(run))
    torch.distributed.barrier()
    if not good:
        _say(run.ranks, "failed: the last steps are not saved; make room, and the same command makes them again")
        raise SystemExit(lifecycle.FAILED)
    if step < run.config.num_steps:
        _say(run.ranks, f"Stopped on request after step {step}, saved in {saved and saved.folder}; the same command continues")
        raise SystemExit(lifecycle.STOPPED)


def _predicted_and_measured(run: Run) -> dict:
    planned = memory.plan(run.config, run.ranks.world_size, run.device.type)
    return memory.comparison(planned, *_peak_bytes())


@contextmanager
def _reporting(run: Run) -> Iterator[Callable[[dict], None]]:
    """Where records go: metrics.jsonl, TensorBoard and the terminal on rank 0, nowhere on the others."""
    if run.ranks.rank != 0:
        yield lambda record: None
        return
    config, unwritten = run.config, []
    silent = not sys.stderr.isatty()
    bar = tqdm(total=config.num_steps, initial=run.first_step, unit="step", dynamic_ncols=True, disable=silent)
    with bar, _board(run) as plot:

        def report(record: dict) -> None:
            unwritten.append(record)
            if checkpoint.append_metrics(config, unwritten):
                unwritten.clear()
            plot(record)
            try:
                _show(record, config, bar)
            except (OSError, UnicodeEncodeError):
                lifecycle.lose_terminal()
            if record.get("event") == "saved" and record["step"] < config.num_steps:
                _draw(config)

        yield report
    _draw(config)


def _show(record: dict, config: TrainingConfig, bar: tqdm) -> None:
    if record["kind"] == "train" and not bar.disable:
        bar.set_postfix_str(train_words(record), refresh=False)
        bar.update(record["step"] - bar.n)
    elif record.get("event") not in ("started", "memory"):
        bar.write(line_of(record, config.num_steps, config.teacher_top_k), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def _board(run: Run) -> Iterator[Callable[[dict], None]]:
    """TensorBoard's scalars; a full disk ends them and not the training."""
    boards: list[SummaryWriter] = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as fault:
            boards.clear()
            _say(run.ranks, f"tensorboard/ is not written any more: {fault}")

    def plot(record: dict) -> None:
        for board in boards:
            attempt(partial(_plot_scalars, board, record))

    attempt(lambda: boards.append(SummaryWriter(str(checkpoint.tensorboard_dir(run.config)), purge_step=run.first_step + 1)))
    yield plot
    for board in list(boards):
        attempt(board.close)


def _plot_scalars(board: SummaryWriter, record: dict) -> None:
    if record["kind"] in ("train", "eval"):
        for name, value in record.items():
            if name not in ("kind", "step") and isinstance(value, float):
                board.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def _draw(config: TrainingConfig) -> None:
    try:
        draw_losses(checkpoint.metrics_path(config), checkpoint.picture_path(config))
    except OSError as fault:
        lifecycle.say(f"{checkpoint.picture_path(config)} is not drawn: {fault}", sys.stdout)


def _summary(config: TrainingConfig) -> str:
    """What a person wants to know at the end, from the run's own files."""
    records = checkpoint.read_metrics(config)
    held_out = [record for record in records if record["kind"] == "eval"]
    samples = [record["text"] for record in records if record.get("event") == "sample"]
    saved = checkpoint.newest_folder(config)
    lines = [""]
    if held_out:
        lines += [f"  held out before: {held_out_words(held_out[0])}", f"  held out after:  {held_out_words(held_out[-1])}"]
    if samples:
        lines += ["  sample:", indented(samples[-1])]
    lines += [f"  {memory.comparison_words(record)}" for record in records if record.get("event") == "memory"][-1:]
    lines += [f"  picture: {checkpoint.picture_path(config)}"]
    lines += [f"  checkpoint (opens in transformers): {saved}"] if saved else []
    if config.teacher_dir is None:
        return "\n".join([*lines, '  next: echo "def" | python scripts/generate.py'])
    return "\n".join([*lines, *_comparison_with_teacher(config, records)])


def _comparison_with_teacher(config: TrainingConfig, records: list[dict]) -> list[str]:
    """A table: the teacher, the student, and the same student without a teacher if that run is there."""
    teacher = next((record for record in records if record.get("event") == "teacher"), {})
    rows = [Row("teacher", teacher.get("num_parameters", 0), teacher, teacher.get("folder", ""))]
    rows += [Row("student", config.num_parameters, _last_held_out(records), config.run_dir)]
    alone = checkpoint.same_without_teacher(config)
    if alone is None:
        return [*table(rows), "  to compare: train the same student without a teacher, as the README says"]
    found = _last_held_out(checkpoint.read_metrics(alone))
    return table([*rows, Row("without teacher", config.num_parameters, found, alone.run_dir)])


def _last_held_out(records: list[dict]) -> dict:
    return next((record for record in reversed(records) if record["kind"] == "eval"), {})


def _say(ranks: Ranks, line: str) -> None:
    if ranks.rank == 0:
        with tqdm.external_write_mode(sys.stdout):
            lifecycle.say(line, sys.stdout)
