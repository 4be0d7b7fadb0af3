"""The one training loop. It alone calls `deepspeed.initialize`, `backward` and `step`; it is given an objective and data.

Read from the top: all steps, one step, one micro-batch, what all ranks learn of a step. Then what is done once in a while.
Everything before step one is scripts/run/setup.py's.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from ds.loader import MicroBatch, count_crossing, digest_rows, read_labels
from ds.shards import Labels
from scripts.config import TrainingConfig
from scripts.engine import offload, truth_check, watch
from scripts.engine.distributed import Ranks, largest, say, wait_for_all
from scripts.model.decoder import Decoder, parameter_groups
from scripts.model.losses import next_token
from scripts.run import checkpoint, setup
from scripts.run.evaluate import bad_step_records, evaluation_record, sample_record
from scripts.run.metrics import Report, gradient_norm, memory_record, repeat_records, reporting, summary, train_record
from scripts.run.state import (
    Clock,
    Progress,
    Run,
    Step,
    advance,
    is_due,
    is_save_due,
    learning_rate_at,
    progress_record,
    started_record,
    step_batches,
    windows_on_device,
    with_fresh_digests,
)

Objective = Callable[..., Tensor]


def set_up(config: TrainingConfig, prepare: Callable, label: Callable | None = None) -> Run | None:
    """Everything before step one; None when the run is already finished. Every rank must call this.

    `prepare(config)` makes or opens the data; rank 0 calls it first. `label(model, windows, config)` gives a teacher's labels
    of windows (B, T + 1) int64; only `teacher_top_k` needs it.

    Raises:
        ValueError: the configuration does not fit the machine, the ranks, the data, the teacher or what run_dir holds.
    """
    return setup.set_up(config, setup.Given(prepare, label, initialize_engine, train_tiny))


def train(run: Run | None, objective: Objective) -> None:
    """The one training loop: every step, then what is due after it. Nothing to do for a finished run. The engine is destroyed
    at the end.

    Raises:
        SystemExit: 75 after a save, when a stop was requested; 1 when the last save fails, too many steps are skipped or
            there is no memory left.
    """
    if run is None:
        return
    config, progress, saved = run.config, run.progress, None
    with setup.ending_out_of_memory(config, run.ranks), run.watch.during_training(), _locked(run), reporting(run) as report:
        log_start(run, report)
        for step in range(run.first_step, config.num_steps):
            started, steps_done, is_last = time.perf_counter(), step + 1, step + 1 == config.num_steps
            taken = run_step(run, objective, step)
            for record in (*repeat_records(run, step), *bad_step_records(run, step, taken, progress)):
                report(record)
            progress = advance(progress, taken, config)
            if is_due(steps_done, config.log_every_steps, config):
                rate, seconds = learning_rate_at(step, config), time.perf_counter() - started
                report(train_record(run, steps_done, taken, progress, learning_rate=rate, seconds=seconds))
                progress = with_fresh_digests(progress)
            is_stopping = taken.is_stop_requested and not is_last
            if not is_stopping:
                if evaluate_and_sample(run, steps_done, report):
                    is_stopping = is_stop_requested(run)
                progress = progress._replace(is_evaluated=True)
            if is_stopping or is_save_due(steps_done, config):
                verify_last_save(run, steps_done, saved, report)
                saved = save(run, steps_done, progress, report)
                is_stopping = is_stopping or is_stop_requested(run)
            if is_stopping or is_last:
                finish(run, steps_done, progress, saved, report)
            refuse_more_skips(run, steps_done, progress)
    say(run.ranks, f"Finished: {config.num_steps} steps. {summary(config)}")


def run_step(run: Run, objective: Objective, step: int) -> Step:
    """One optimizer update over all of a step's tokens. Every rank must call this."""
    run.watch.step = step + 1
    set_learning_rate(run.engine, learning_rate_at(step, run.config))
    offload.set_step_rows(run.engine, run.config.rows_of_step(step))
    num_skipped_before, losses, digests, crossing = run.engine.skipped_steps, [], np.zeros((2, 4), dtype=np.int64), 0
    clock = Clock(offload.seconds_within(run.engine))
    for batch in step_batches(run, step):
        digests += (digest_rows(batch.rows, batch.ids), digest_rows(batch.rows, batch.windows[:, None]))
        crossing += count_crossing(batch.ids, run.data.end_of_text_id)
        inputs = _objective_inputs(run, batch)
        clock.tick("data")
        losses.append(run_micro_batch(run.engine, objective, inputs, run.config, clock.tick))
    is_skipped = run.engine.skipped_steps > num_skipped_before
    return reduce_over_ranks(run, torch.stack(losses), digests, crossing, is_skipped)._replace(seconds_by_part=clock.seconds())


def run_micro_batch(engine, objective: Objective, inputs: list[Any], config: TrainingConfig, tick: Callable) -> Tensor:
    """Forward, backward, and the update when this is a step's last micro-batch: its mean loss in nats, (). `tick` ends each."""
    loss = objective(engine, *inputs, config)
    tick("forward")
    engine.backward(loss)
    tick("backward")
    engine.step()
    tick("weights up")
    return loss.detach()


def reduce_over_ranks(run: Run, losses: Tensor, digests: np.ndarray, num_crossing: int, is_skipped: bool) -> Step:
    """What all ranks learn of a step, in one reduction: stop requests, how many of its windows cross documents, digests (2, 4)
    and losses (micro-batches,).

    The words of a digest are below 2**32, so float64 adds them exactly.
    """
    ranks, num_micro_batches = run.ranks, len(losses)
    by_rank = torch.zeros(ranks.world_size, num_micro_batches, dtype=torch.float64, device=run.device)
    by_rank[ranks.rank] = losses.double()
    counts = torch.tensor([run.watch.reason is not None, num_crossing], dtype=torch.float64, device=run.device)
    words = torch.tensor((digests.flatten() % 2**32).astype(np.float64), device=run.device)
    together = torch.cat(parts := (counts, words, by_rank.flatten()))
    torch.distributed.all_reduce(together)
    (stop, crossing), words, of_all = (part.numpy() for part in together.cpu().split([len(part) for part in parts]))
    tokens_digest, windows_digest = words.astype(np.int64).reshape(2, 4)
    return Step(
        loss=float(of_all.mean()), losses=of_all.reshape(ranks.world_size, -1), tokens_digest=tokens_digest,
        windows_digest=windows_digest, is_skipped=is_skipped, is_stop_requested=bool(stop),
        crossing_share=float(crossing) / (of_all.size * run.config.micro_batch_rows), seconds_by_part={},
    )  # fmt: skip


def set_learning_rate(engine, learning_rate: float) -> None:
    """The rate of the next update, for all parameters."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def initialize_engine(config: TrainingConfig, ranks: Ranks, model: Decoder) -> Any:
    """DeepSpeed's engine for `model`, with its path of gradients and weights replaced by scripts/engine/offload.py's."""
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.weight_decay),  # pyright: ignore[reportArgumentType]
            config=TrainingConfig.deepspeed_config(config, ranks.world_size),
        )
    except ValueError as fault:
        raise RuntimeError("deepspeed.initialize failed") from fault  # a ValueError would be taken for a user's mistake
    offload.replace_offload_path(engine, config)
    return engine


def train_tiny(
    ranks: Ranks, tiny: TrainingConfig, model: Decoder, steps: truth_check.Steps, learning_rate: float
) -> truth_check.Trained:
    """The truth check's updates, by the same engine and micro-batches as the run's; a norm is NaN where none was taken."""
    engine, norms = initialize_engine(tiny, ranks, model), []
    with ExitStack() as at_end:
        at_end.callback(engine.destroy)
        set_learning_rate(engine, learning_rate)
        for batches in steps:
            is_skipped, tries = True, 0
            while is_skipped and tries < truth_check.MOST_TRIES:
                tries, num_skipped_before = tries + 1, engine.skipped_steps
                for windows in batches:
                    run_micro_batch(engine, next_token, [windows], tiny, lambda _: None)
                is_skipped = engine.skipped_steps > num_skipped_before
            norms.append(math.nan if is_skipped else gradient_norm(engine))
        return truth_check.Trained(offload.full_masters(engine, model), norms)


def log_start(run: Run, report: Report) -> None:
    """Logs what this launch reads and from where on, and makes the evaluation that a stop left out."""
    config, steps_done = run.config, run.first_step
    report(started_record(run))
    if run.teaching is not None and run.teaching.record is not None:
        report(run.teaching.record)
    if steps_done == 0 and config.eval_every_steps is not None:
        report(evaluation_record(run, 0))
    if not run.progress.is_evaluated:
        evaluate_and_sample(run, steps_done, report)


def evaluate_and_sample(run: Run, steps_done: int, report: Report) -> bool:
    """Evaluates and samples where that is due; whether any was. Every rank must call this."""
    config = run.config
    evaluates, samples = (is_due(steps_done, every, config) for every in (config.eval_every_steps, config.sample_every_steps))
    for is_wanted, made in ((evaluates, evaluation_record), (samples, sample_record)):
        if is_wanted:
            started = time.perf_counter()
            report(made(run, steps_done) | {"seconds": time.perf_counter() - started})
    return evaluates or samples


def is_stop_requested(run: Run) -> bool:
    """Whether a stop was requested of any rank. Every rank must call this."""
    return bool(largest(float(run.watch.reason is not None)))


def save(run: Run, steps_done: int, progress: Progress, report: Report) -> checkpoint.Saved:
    """Saves. A failure is reported, and training goes on to the next save. Every rank must call this."""
    config = run.config
    state = {"step": steps_done, "tokens": config.tokens_before(steps_done), "data_fingerprint": run.data.fingerprint}
    state |= {"tokenizer_fingerprint": run.data.train.fingerprint, "progress": progress_record(progress)}
    state |= {} if run.teaching is None else {"teacher_fingerprint": run.teaching.fingerprint}
    started = time.perf_counter()
    saved = checkpoint.save(run.engine, config, run.data.tokenizer_json, run.data.end_of_text_id, state)
    outcome = {"event": "saved", "checkpoint": str(saved.folder), "seconds": time.perf_counter() - started}
    failure = {"event": "save_failed", "fault": saved.fault}
    report({"kind": "event", "step": steps_done} | (outcome if saved.fault is None else failure))
    return saved


def verify_last_save(run: Run, steps_done: int, saved: checkpoint.Saved | None, report: Report) -> bool:
    """Waits until the last save, if any, is read back from the disk; whether it is good. Every rank must call this."""
    if saved is None:
        return True
    good, words = checkpoint.verify_saved(run.config, saved)
    if words is not None:
        report({"kind": "event", "step": steps_done, "event": "save_failed", "fault": words})
    return good


def finish(run: Run, steps_done: int, progress: Progress, saved: checkpoint.Saved | None, report: Report) -> None:
    """After the last step, or the last before a stop, whose save no later one makes up for: where it fails, it is tried again
    once there is room. Every rank must call this.

    Raises:
        SystemExit: 1 when that save is not good; 75 when the run was stopped before its last step.
    """
    good, is_stopping = verify_last_save(run, steps_done, saved, report), is_stop_requested(run)
    while not good and saved is not None and setup.wait_for_room(run, saved, is_stopping):
        saved = save(run, steps_done, progress, report)
        good = verify_last_save(run, steps_done, saved, report)
    report(memory_record(run, steps_done))
    wait_for_all()
    if not good:
        say(run.ranks, "failed: the last steps are not saved; make room, and the same command makes them again")
        raise SystemExit(watch.FAILED)
    if steps_done < run.config.num_steps:
        where = saved and saved.folder
        say(run.ranks, f"Stopped on request after step {steps_done}, saved in {where}; the same command continues")
        raise SystemExit(watch.STOPPED)


def refuse_more_skips(run: Run, steps_done: int, progress: Progress) -> None:
    """Ends a run with status 1 after `max_skipped_steps` skipped steps in a row. Every rank must call this."""
    if progress.skipped_in_a_row < run.config.max_skipped_steps:
        return
    if run.ranks.rank == 0:
        good = checkpoint.newest_verified(run.config).checkpoint
        last = f"the last good checkpoint is {good.folder}" if good else "there is no checkpoint yet"
        remedy = "lower learning_rate, or remove the documents that metrics.jsonl names"
        if run.config.precision == "fp16":
            remedy += ', or set precision="bf16" where the card has it, else "fp32"'
        watch.say(
            f"failed: {progress.skipped_in_a_row} steps in a row up to step {steps_done} had gradients that are not finite"
            f" (max_skipped_steps); {last}; {remedy}",
            sys.stderr,
        )
    wait_for_all()
    raise SystemExit(watch.FAILED)


def _objective_inputs(run: Run, batch: MicroBatch) -> list[Any]:
    """What an objective gets: windows on the device; in distillation the teacher too, or its labels of these windows."""
    windows, teaching = windows_on_device(batch.ids, run.config, run.data, run.device), run.teaching
    if teaching is None:
        return [windows]
    if run.config.teacher_top_k is None:
        return [windows, teaching.source]
    labels = read_labels(teaching.source, batch.windows, run.config.context_length)
    parts = (labels.ids.astype(np.int32), labels.logs, labels.tail)
    return [windows, Labels(*(torch.from_numpy(part).to(run.device, non_blocking=True) for part in parts))]


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Lets go of run_dir and of the engine at the end, however it ends: the next run of this process has all its memory."""
    try:
        yield
    finally:
        setup.release_lock(run.lock)
        run.engine.destroy()
