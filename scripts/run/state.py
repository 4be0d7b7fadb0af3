"""What the training loop works on and remembers: a run, its progress, one step. Knows no files and no DeepSpeed."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ds.loader import Grid, MicroBatch, Order, document_borders, grid_of, micro_batches, quotas_of
from scripts.config import WEIGHED_STEPS, TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.engine.watch import Watch
from scripts.model.documents import Windows, windows_of
from scripts.report import printable

STEP_PARTS = ("data", "forward", "backward", "gradients down", "norm", "update", "weights up")


class Progress(NamedTuple):
    """What the loop remembers from step to step. A checkpoint holds it too.

    `skipped_steps` in all and `skipped_in_a_row`; `recent_losses`, the last finite ones in nats; `tokens_digest` and
    `windows_digest` (4 words each) of the rows read since the last train line; whether what is due after the step, evaluation
    and sample, `is_evaluated`.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()
    tokens_digest: tuple[int, ...] = (0, 0, 0, 0)
    windows_digest: tuple[int, ...] = (0, 0, 0, 0)
    is_evaluated: bool = True


@dataclass
class Clock:
    """Where the time of a step goes. On a GPU events count, so that nothing waits for it. `within` holds the seconds of parts
    that lie in others; it may be filled until they are asked for.
    """

    within: dict[str, float] = field(default_factory=dict)
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tick("start")

    def tick(self, part: str) -> None:
        """The time since the last call, or since this clock was made, was that of `part`."""
        mark: Any = time.perf_counter()
        if torch.cuda.is_available():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((part, mark))

    def seconds(self) -> dict[str, float]:
        """The seconds of each part; on a GPU only once all work until the last call is done."""
        found: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
        for part, seconds in self.within.items():
            whole = "backward" if part == "gradients down" and not torch.cuda.is_available() else "weights up"
            found[part], found[whole] = seconds, max(0.0, found[whole] - seconds)
        return {part: found[part] for part in sorted(found, key=STEP_PARTS.index)}


class Step(NamedTuple):
    """One optimizer update, over all ranks.

    The mean `loss` in nats; `losses` (ranks, micro-batches) in nats; `tokens_digest` and `windows_digest` (4,) int64 of the
    rows that were read; `crossing_share`: the share of its windows that hold the end of a document and the begin of another;
    `is_skipped`: whether DeepSpeed left the update out because a gradient was not finite; `is_stop_requested`: whether a stop
    was requested of any rank; `seconds_by_part`: where its time went on this rank.
    """

    loss: float
    losses: np.ndarray
    tokens_digest: np.ndarray
    windows_digest: np.ndarray
    crossing_share: float
    is_skipped: bool
    is_stop_requested: bool
    seconds_by_part: dict[str, float]


class Teaching(NamedTuple):
    """What the student learns from: the teacher's `fingerprint`, and as `source` the model on this device or, with
    `teacher_top_k`, its labels on the disk. `record` is the line about the teacher for metrics.jsonl, in a run that begins.
    """

    fingerprint: str
    source: Any
    record: dict | None


class Run(NamedTuple):
    """What the training loop works on.

    `engine` is DeepSpeed's; `data` is scripts.prepare_data.Data. `first_step` counts the steps that are already done.
    `lock` is the descriptor that keeps other launches out of run_dir, on rank 0. `teaching` is None in pre-training.
    `planned_tokens_per_second` is the speed that rank 0 expects of all ranks together; None on the others.
    """

    config: TrainingConfig
    ranks: Ranks
    device: torch.device
    engine: Any
    data: Any
    first_step: int
    progress: Progress
    watch: Watch
    lock: int | None
    teaching: Teaching | None
    planned_tokens_per_second: float | None = None


def advance(progress: Progress, taken: Step, config: TrainingConfig) -> Progress:
    """The progress after one more step; what is due after that step is not evaluated yet."""
    finite = [taken.loss] if math.isfinite(taken.loss) else []
    return Progress(
        skipped_steps=progress.skipped_steps + taken.is_skipped,
        skipped_in_a_row=progress.skipped_in_a_row + 1 if taken.is_skipped else 0,
        recent_losses=(*progress.recent_losses, *finite)[-config.spike_window_steps :],
        tokens_digest=tuple((progress.tokens_digest + taken.tokens_digest).tolist()),
        windows_digest=tuple((progress.windows_digest + taken.windows_digest).tolist()),
        is_evaluated=False,
    )


def with_fresh_digests(progress: Progress) -> Progress:
    """The same progress right after a train line: no row has been read since."""
    return progress._replace(tokens_digest=Progress().tokens_digest, windows_digest=Progress().windows_digest)


def progress_record(progress: Progress) -> dict:
    """The progress as training/state.json holds it."""
    fields = progress._asdict()
    return fields | {"looked_around": fields.pop("is_evaluated")}


def progress_of(record: dict) -> Progress:
    """The inverse of `progress_record`."""
    fields = {name: value for name, value in record.items() if name != "looked_around"}
    return Progress(**fields, is_evaluated=record["looked_around"])


def is_due(steps_done: int, every_steps: int | None, config: TrainingConfig) -> bool:
    """Whether something that is done every so many steps is due: also after the last step, never where it is None."""
    return every_steps is not None and (steps_done % every_steps == 0 or steps_done == config.num_steps)


def decay_start(config: TrainingConfig) -> int | None:
    """After how many steps the decay of "wsd" begins; None for other schedules."""
    return None if config.decay_steps is None else config.num_steps - config.decay_steps


def is_save_due(steps_done: int, config: TrainingConfig) -> bool:
    """Whether a checkpoint is due: as `save_every_steps` says, and before a decay, so that the run may go on without it."""
    every = config.save_every_steps
    return is_due(steps_done, every, config) or (every is not None and steps_done == decay_start(config))


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of the update after `step` steps are done: linear warm-up, then cosine, linear, or stable and linear decay.

    Cosine: Loshchilov & Hutter 2017. Warm-up/stable/decay ("wsd"): Hu et al. 2024, MiniCPM.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        share = min(1.0, (config.num_steps - 1 - step) / (config.decay_steps or 1))
    else:
        progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
        share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


def data_grid(config: TrainingConfig, data) -> Grid:
    """Where the training windows lie: on the whole stream, in a mixture on each source alone."""
    sources = [source.num_tokens for source in data.sources] if config.is_mixture else [data.train.num_tokens]
    return grid_of(sources, config.context_length)


def data_order(config: TrainingConfig, data) -> Order:
    """Which training windows each step reads. In a mixture the rows of WEIGHED_STEPS whole steps read each source in its
    share, wherever they begin.
    """
    rows, quotas = config.rows_per_step, (config.rows_per_step,)
    if config.is_mixture and config.corpus_weights is not None:
        quotas = quotas_of(config.corpus_weights, WEIGHED_STEPS * rows)
    return Order(data_grid(config, data), quotas, rows, config.seed, config.batch_warmup)


def started_record(run: Run) -> dict:
    """The event of a launch: from which step on, on how many ranks, how fast by the plan, and what it reads."""
    record = {"kind": "event", "step": run.first_step, "event": "started", "ranks": run.ranks.world_size}
    record |= {"planned_tokens_per_second": run.planned_tokens_per_second}
    return record | order_record(run.config, run.data)


def order_record(config: TrainingConfig, data) -> dict:
    """What decides the windows of every step, as the event of a launch holds it."""
    grid, quotas, rows_per_step, seed, warmup = data_order(config, data)
    record: dict = {"rows_per_step": rows_per_step, "num_windows": grid.num_windows, "seed": seed}
    if warmup is not None:
        record |= {"first_rows_per_step": warmup.first_rows, "batch_warmup_steps": warmup.num_steps}
    if not config.is_mixture:
        return record
    sources = zip(data.sources, grid.counts, quotas, strict=True)
    named = [{"name": printable(each.name), "num_windows": count, "quota": quota} for each, count, quota in sources]
    return record | {"sources": named}


def step_share(run: Run, step: int) -> dict[str, int]:
    """What decides, beside the order and the rank, which windows are read: keyword arguments of ds.loader's functions."""
    return {"step": step, "world_size": run.ranks.world_size, "micro_batch_rows": run.config.micro_batch_rows}


def step_batches(run: Run, step: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of one step, on the host."""
    order = data_order(run.config, run.data)
    return micro_batches(run.data.train, order, rank=run.ranks.rank, **step_share(run, step))


def windows_on_device(ids: np.ndarray, config: TrainingConfig, data, device: torch.device) -> Windows:
    """Windows (B, T + 1) int64 as models read them: on `device`, and with their documents where `mask_across_documents`."""
    borders = document_borders(ids, data.end_of_text_id) if config.mask_across_documents else None
    return windows_of(ids, borders, device)
