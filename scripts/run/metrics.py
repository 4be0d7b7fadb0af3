"""The logs of a run: metrics.jsonl, TensorBoard, a tracker, pictures, lines on the terminal. Makes records of a train step."""

import json
import math
import os
import subprocess  # nosec B404
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds.loader import Order, digest_hex, rows_read
from scripts import memory, report
from scripts.config import GIB, TRACKER_END_SECONDS, TrainingConfig
from scripts.engine import watch
from scripts.engine.distributed import say
from scripts.model.huggingface import parse_json
from scripts.plan.machine import peak_bytes
from scripts.report import printable
from scripts.run import run_dir, tracker
from scripts.run.page import page
from scripts.run.run_dir import read_metrics
from scripts.run.state import Progress, Run, Step, data_order
from scripts.run.storage import write_all, write_text

Report = Callable[[dict], None]


class Alone(NamedTuple):
    """The run of the same student without a teacher: its folder and its records."""

    run_dir: str
    records: list[dict]


def append_metrics(config: TrainingConfig, records: list[dict]) -> bool:
    """Adds a line for each record to metrics.jsonl; False when the disk took none of them, for the caller to try again."""
    path = run_dir.metrics_path(config)
    num_bytes = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            write_all(file.fileno(), memoryview(_lines(records).encode()))
    except OSError:
        if path.exists():
            os.truncate(path, num_bytes)
        return False
    return True


def rewind_metrics(config: TrainingConfig, steps_done: int, is_evaluated: bool) -> None:
    """Drops the lines of steps after `steps_done`, and a half-written last line: a resumed run logs each step once.

    Unless `is_evaluated`, the evaluation and the sample of `steps_done` go too. A run that begins at step 0 keeps nothing.
    """

    def is_kept(record: dict) -> bool:
        is_repeated = not is_evaluated and (record["kind"] == "eval" or record.get("event") == "sample")
        return record["step"] < steps_done or (record["step"] == steps_done > 0 and not is_repeated)

    write_text(run_dir.metrics_path(config), _lines(filter(is_kept, read_metrics(config))))


def sync_metrics(config: TrainingConfig) -> None:
    """Makes metrics.jsonl durable: it must outlive a power cut if the checkpoint of its last step does."""
    path = run_dir.metrics_path(config)
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def unsaved_steps(config: TrainingConfig) -> int:
    """How many steps metrics.jsonl holds beyond the newest checkpoint: they are trained again."""
    newest = max(run_dir.checkpoint_folders(config), default=0)
    return max(0, max((record["step"] for record in read_metrics(config)), default=0) - newest)


def evaluations(config: TrainingConfig) -> list[dict]:
    """The evaluations in metrics.jsonl that have a loss. A damaged line is none of them: a save must not end for it."""
    path, found = run_dir.metrics_path(config), []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = parse_json(line.encode(), "") if '"eval"' in line else {}
        except ValueError:
            continue
        if record.get("kind") == "eval" and isinstance(record.get("step"), int) and isinstance(record.get("val_loss"), float):
            found.append(record)
    return found


def best_step(config: TrainingConfig) -> int | None:
    """The step of the checkpoint whose evaluation in metrics.jsonl has the least held-out loss; None without any."""
    saved = run_dir.checkpoint_folders(config)
    losses = {record["step"]: record["val_loss"] for record in evaluations(config) if record["step"] in saved}
    return min(losses, key=losses.__getitem__, default=None)


def train_record(run: Run, steps_done: int, taken: Step, progress: Progress, *, learning_rate: float, seconds: float) -> dict:
    """The line of metrics.jsonl after a step that took `seconds`; `progress` has the digests since the last such line."""
    config, peaks = run.config, peak_bytes()
    record = {
        "kind": "train",
        "step": steps_done,
        "tokens": config.tokens_before(steps_done),
        "loss": finite(taken.loss),
        "grad_norm": finite(gradient_norm(run.engine)),
        "learning_rate": learning_rate,
        "tokens_per_second": config.rows_of_step(steps_done - 1) * config.context_length / seconds,
        "seconds": seconds,
        "gpu_peak_gib": peaks.gpu_bytes / GIB,
        "host_peak_gib": peaks.host_bytes / GIB,
        "tokens_hash": digest_hex(np.array(progress.tokens_digest)),
        "windows_hash": digest_hex(np.array(progress.windows_digest)),
        "crossing_share": taken.crossing_share,
        "seconds_by_part": taken.seconds_by_part,
    }
    if not config.is_mixture:
        return record
    order = data_order(config, run.data)
    epochs = [rows / count for rows, count in zip(rows_read(steps_done, order), order.grid.counts, strict=True)]
    return record | {"source_epochs": epochs}


def repeat_records(run: Run, step: int) -> Iterator[dict]:
    """The event of a step in which sources of a mixture begin another epoch: the epochs they are in before and after it."""
    if not run.config.is_mixture:
        return
    order = data_order(run.config, run.data)
    before, after = (_epochs_begun(steps_done, order) for steps_done in (step, step + 1))
    changed = [
        {"name": printable(source.name), "epoch_before": old, "epoch": new}
        for source, old, new in zip(run.data.sources, before, after, strict=True)
        if new > old
    ]
    if changed:
        yield {"kind": "event", "step": step + 1, "event": "repeats", "sources": changed}


def _epochs_begun(steps_done: int, order: Order) -> list[int]:
    """The epoch of the last row that was read of each source; 0 before the first."""
    return [max(rows - 1, 0) // count for rows, count in zip(rows_read(steps_done, order), order.grid.counts, strict=True)]


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a record that TensorBoard plots, by name; those of a source stand under the name of the whole."""
    found = {name: value for name, value in record.items() if isinstance(value, float)}
    for name, by_source in record.items():
        if name.endswith("_by_source"):
            of_each = {f"{name.removesuffix('_by_source')}/{source}": value for source, value in by_source.items()}
            found |= {source: value for source, value in of_each.items() if value is not None}
    return found


def memory_record(run: Run, steps_done: int) -> dict:
    """The event at a run's end: planned memory beside measured memory."""
    planned = memory.plan(run.config, run.ranks.world_size, run.device.type)
    return {"kind": "event", "step": steps_done, "event": "memory"} | memory.comparison(planned, peak_bytes())


def gradient_norm(engine) -> float:
    """The norm of the last step's gradients before clipping."""
    return float(engine.get_global_grad_norm() or 0.0)


def finite(number: float) -> float | None:
    """The number as JSON can hold it: None when it is not finite."""
    return number if math.isfinite(number) else None


def summary(config: TrainingConfig) -> str:
    """What a person wants to know at the end, from the run's own files."""
    pictures, saved = [run_dir.picture_path(config), run_dir.page_path(config)], run_dir.newest_folder(config)
    return summary_words(config, read_metrics(config), pictures=pictures, saved=saved, alone=_alone(config))


def summary_words(
    config: TrainingConfig, records: list[dict], *, pictures: list[Path], saved: Path | None, alone: Alone | None
) -> str:
    """What a person wants to know at the end of a run, from all its `records`, where it is drawn, and its newest checkpoint.

    A student with a teacher is compared with it, and with the same student without a teacher, if `alone` is given.
    """
    lines, held_out = [""], [record for record in records if record["kind"] == "eval"]
    if held_out:
        before, after = (report.held_out_words(record) for record in (held_out[0], held_out[-1]))
        lines += [f"  held out before: {before}", f"  held out after:  {after}"]
    samples = [report.indented(record["text"]) for record in records if record.get("event") == "sample"]
    lines += ["  sample:", samples[-1]] if samples else []
    lines += [f"  {memory.comparison_words(record)}" for record in records if record.get("event") == "memory"][-1:]
    lines += [f"  pictures: {', '.join(map(str, pictures))}"]
    lines += [f"  checkpoint (opens in transformers): {saved}"] if saved else []
    if config.teacher_dir is None:
        return "\n".join([*lines, '  next: echo "def" | python scripts/generate.py'])
    return "\n".join([*lines, *_comparison(config, records, alone)])


def table(rows: list[report.Row]) -> list[str]:
    """Lines: a head and one for each row."""
    lines = [f"  {'held out':<16}{'parameters':>12}{'nats per token':>16}{'bits per byte':>15}{'step':>8}  where"]
    for name, num_parameters, record, where in rows:
        found = (record.get("val_loss"), record.get("val_bits_per_byte"))
        nats, bits = ("-" if value is None else f"{value:.3f}" for value in found)
        step = record["step"] if record.get("kind") == "eval" else ""
        lines += [f"  {name:<16}{num_parameters / 1e6:>10,.2f} M{nats:>16}{bits:>15}{step:>8}  {where}"]
    return lines


def students_table(config: TrainingConfig, records: list[dict], alone: Alone | None) -> list[report.Row]:
    """The rows of a student's table: its teacher, itself, and the same student without a teacher where there is one."""
    teacher = next((record for record in records if record.get("event") == "teacher"), {})
    rows = [report.Row("teacher", teacher.get("num_parameters", 0), teacher, teacher.get("folder", ""))]
    rows += [report.Row("student", config.num_parameters, report.last_held_out(records), config.run_dir)]
    if alone is None:
        return rows
    return [*rows, report.Row("without teacher", config.num_parameters, report.last_held_out(alone.records), alone.run_dir)]


def _comparison(config: TrainingConfig, records: list[dict], alone: Alone | None) -> list[str]:
    lines = table(students_table(config, records, alone))
    advice = "  to compare: train the same student without a teacher, as the README says"
    return lines if alone is not None else [*lines, advice]


@contextmanager
def reporting(run: Run) -> Iterator[Report]:
    """Gives a function that takes records: on rank 0 to metrics.jsonl, TensorBoard, the tracker and the terminal, on other
    ranks nowhere. Draws them.
    """
    if run.ranks.rank != 0:
        yield lambda record: None
        return
    config, unwritten = run.config, []
    bar = tqdm(
        total=config.num_tokens, initial=config.tokens_before(run.first_step), unit="token", unit_scale=True,
        dynamic_ncols=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar, _tensorboard(run) as plot, _tracked(run) as track:

        def take(record: dict) -> None:
            unwritten.append(record)
            if append_metrics(config, unwritten):
                unwritten.clear()
            plot(record)
            track(record)
            try:
                _show(record, config, bar)
            except (OSError, UnicodeEncodeError):
                watch.lose_terminal()
            if record.get("event") == "saved" and record["step"] < config.num_steps:
                _draw(config)

        yield take
    _draw(config)


def _lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _show(record: dict, config: TrainingConfig, bar: tqdm) -> None:
    if record["kind"] == "train" and not bar.disable:
        words = f"step {record['step']}/{config.num_steps}, {report.train_words(record)}"
        bar.set_postfix_str(words, refresh=False)
        bar.update(record["tokens"] - bar.n)
    elif report.is_told(record):
        bar.write(report.line_of(record, config.num_steps, config.teacher_top_k), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def _tensorboard(run: Run) -> Iterator[Report]:
    """Gives a function that plots records as TensorBoard's scalars. A full disk ends the plots and not the training."""
    boards: list[SummaryWriter] = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as fault:
            boards.clear()
            say(run.ranks, f"tensorboard/ is not written any more: {fault}")

    def plot(record: dict) -> None:
        if record["kind"] not in ("train", "eval"):
            return
        for name, value in scalars(record).items():
            for board in boards:
                attempt(partial(board.add_scalar, f"{record['kind']}/{name}", value, record["step"]))

    folder = str(run_dir.tensorboard_dir(run.config))
    attempt(lambda: boards.append(SummaryWriter(folder, purge_step=run.first_step + 1)))
    yield plot
    for board in list(boards):
        attempt(board.close)


@contextmanager
def _tracked(run: Run) -> Iterator[Report]:
    """Gives a function that hands the numbers of records to the process of `tracker`. Its end is not that of the training."""
    config = run.config
    processes: list[subprocess.Popen] = []

    def lose(fault: object) -> None:
        processes.clear()
        log = run_dir.tracker_log_path(config)
        said = log.read_text(errors="replace").split("\n") if log.exists() else []
        words = next((line for line in reversed(said) if line.strip()), fault)
        say(run.ranks, f"{config.tracker} gets no more numbers: {printable(str(words))}; more in {log}")

    def track(record: dict) -> None:
        if record["kind"] not in ("train", "eval"):
            return
        numbers = {f"{record['kind']}/{name}": value for name, value in scalars(record).items()}
        for process in list(processes):
            try:
                _hand_on(process, {"step": record["step"], "numbers": numbers})
            except OSError as fault:
                lose(fault)

    try:
        processes += [_start_tracker(config)] if config.tracker is not None else []
    except OSError as fault:
        lose(fault)
    try:
        yield track
    finally:
        for process in list(processes):
            try:
                process.communicate(timeout=TRACKER_END_SECONDS)
            except subprocess.TimeoutExpired:
                say(run.ranks, f"{config.tracker} is still sending numbers; its process {process.pid} ends by itself")
            if process.returncode:
                lose(f"status {process.returncode}")


def _start_tracker(config: TrainingConfig) -> subprocess.Popen:
    folder = Path(config.run_dir).absolute()
    opening = {"tracker": config.tracker, "identity": run_dir.tracker_identity(config), "name": folder.name}
    opening |= {"folder": str(folder), "config": run_dir.config_record(config)}
    command = [sys.executable, "-P", str(tracker.__file__)]
    with run_dir.tracker_log_path(config).open("wb") as log:
        process = subprocess.Popen(  # nosec B603
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    _hand_on(process, opening)
    return process


def _hand_on(process: subprocess.Popen, line: dict) -> None:
    if process.stdin is not None:
        write_all(process.stdin.fileno(), memoryview(_lines([line]).encode()))


def _draw(config: TrainingConfig) -> None:
    try:
        report.draw_losses(run_dir.metrics_path(config), run_dir.picture_path(config))
        records = read_metrics(config)
        models = [] if config.teacher_dir is None else students_table(config, records, _alone(config))
        write_text(run_dir.page_path(config), page(config, records, models))
    except Exception as fault:  # a full disk, or a log that somebody has changed: no picture is worth a training
        watch.say(f"{config.run_dir} has no new pictures: {fault!r}", sys.stdout)


def _alone(config: TrainingConfig) -> Alone | None:
    same = run_dir.same_without_teacher(config) if config.teacher_dir is not None else None
    return None if same is None else Alone(same.run_dir, read_metrics(same))
