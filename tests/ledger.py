"""Proves from a run's log alone that no window was skipped or read twice within an epoch: `python tests/ledger.py RUN_DIR`.

Needs metrics.jsonl and config.json, no data. The launches say how many windows there are, the data order says which are due
in each step, and the digest in each train line must be that of the windows due since the line before.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds.loader import digest_hex, digest_rows, step_windows


class Order(NamedTuple):
    """What decides the windows of every step; all launches of a run agree in it."""

    num_windows: int
    rows_per_step: int
    seed: int


class Logged(NamedTuple):
    """What a train line says of the windows that were read up to its step."""

    step: int
    windows_hash: str


class Log(NamedTuple):
    """A run's log, checked for its form, with what each train line says."""

    order: Order
    num_launches: int
    ranks: list[int]
    logged: list[Logged]


def prove(run_dir: Path) -> list[str]:
    """A line for each epoch that the run began, and the verdict.

    Raises:
        ValueError: the first violation: a launch or a step that contradicts the log before it, a line that is missing, a hash
            that is not that of the windows due, a window skipped or read twice.
    """
    config = _config(run_dir)
    log = _read_log(run_dir, config)
    lines = list(_epoch_lines(log))
    ranks = ", ".join(map(str, log.ranks))
    where = f"steps 1 to {log.logged[-1].step}, {log.num_launches} launches, on {ranks} ranks"
    return [*lines, f"proved: {where}: no window skipped, none read twice within an epoch"]


def main() -> None:
    """Exit status 0 when it is proved, 1 with the first violation."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/ledger.py RUN_DIR")
    try:
        print("\n".join(prove(Path(sys.argv[1]))))
    except ValueError as violation:
        sys.exit(f"not proved: {violation}")


def _config(run_dir: Path) -> dict:
    config = _parsed(_text(run_dir / "config.json"), run_dir / "config.json")
    for name in ("num_steps", "log_every_steps", "tokens_per_step", "context_length", "seed"):
        _whole_number(config, name, run_dir / "config.json")
    return config


def _read_log(run_dir: Path, config: dict) -> Log:
    path, order, logged, started = run_dir / "metrics.jsonl", None, [], []
    for number, line in enumerate(_text(path).split("\n")[:-1], 1):
        place = f"{path}, line {number}"
        record = _parsed(line, place)
        if record.get("event") == "started":
            here = _started(record, place)
            _check_launch(here, order, config, place)
            order = here
            _check_place(record["step"], logged, started, config, place)
            started.append(record)
        elif record.get("kind") == "train":
            if order is None:
                raise ValueError(f"{place}: a train line before any launch said how many windows there are")
            _check_step(record, logged, started, config, place)
            logged.append(Logged(record["step"], str(record.get("windows_hash"))))
    if order is None or not logged:
        raise ValueError(f"{path} has no {'train line' if order else 'launch'}; there is nothing to prove")
    return Log(order, len(started), sorted({record["ranks"] for record in started}), logged)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def _parsed(text: str, place: object) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: not a JSON object")
    return value


def _whole_number(record: dict, name: str, place: object) -> int:
    value = record.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{place}: {name}={value!r} is not a whole number")
    return value


def _started(record: dict, place: str) -> Order:
    for name in ("step", "ranks"):
        _whole_number(record, name, place)
    order = Order(*(_whole_number(record, name, place) for name in Order._fields))
    if order.num_windows < 1 or order.rows_per_step < 1:
        raise ValueError(f"{place}: a launch with num_windows={order.num_windows}, rows_per_step={order.rows_per_step}")
    return order


def _check_launch(here: Order, before: Order | None, config: dict, place: str) -> None:
    named = {"rows_per_step": config["tokens_per_step"] // config["context_length"], "seed": config["seed"]}
    for name, value in here._asdict().items():
        if before is not None and value != getattr(before, name):
            raise ValueError(f"{place}: a launch with {name}={value}, and the launch before it had {getattr(before, name)}")
        if value != named.get(name, value):
            raise ValueError(f"{place}: a launch with {name}={value}, and config.json says {named[name]}")


def _check_place(step: int, logged: list[Logged], started: list[dict], config: dict, place: str) -> None:
    last = logged[-1].step if logged else 0
    if not started and step != 0:
        raise ValueError(f"{place}: the first launch starts after step {step}; what was read before it is not in the log")
    if step < last:
        raise ValueError(
            f"{place}: a launch starts after step {step}, and step {last} is logged already; it would be read twice"
        )
    if step > last and step >= _due_after(last, config):
        raise ValueError(f"{place}: a launch starts after step {step}, and there is no line of step {_due_after(last, config)}")


def _check_step(record: dict, logged: list[Logged], started: list[dict], config: dict, place: str) -> None:
    step, last = _whole_number(record, "step", place), logged[-1].step if logged else 0
    if step <= last:
        raise ValueError(f"{place}: step {step} is logged after step {last}")
    if step <= started[-1]["step"]:
        raise ValueError(f"{place}: step {step} is logged by a launch that starts after step {started[-1]['step']}")
    if step > config["num_steps"]:
        raise ValueError(f"{place}: step {step} is logged and the run has {config['num_steps']}")
    if step > _due_after(last, config):
        raise ValueError(f"{place}: step {step} is logged and there is no line of step {_due_after(last, config)}")


def _due_after(step: int, config: dict) -> int:
    """The next step that must have a line; one may come before it, for its digest covers what was read until then."""
    every = config["log_every_steps"] or 1
    return min(step - step % every + every, config["num_steps"])


def _epoch_lines(log: Log) -> Iterator[str]:
    """Follows the rows of the run through the epochs with one flag a window; yields a line whenever an epoch is over."""
    num_windows = log.order.num_windows
    seen, num_seen, epoch = np.zeros(num_windows, dtype=bool), 0, 0
    for windows in _proved_windows(log):
        while len(windows):
            due, windows = np.split(windows, [num_windows - num_seen])
            _mark(seen, due, epoch)
            num_seen += len(due)
            if num_seen == num_windows:
                if not seen.all():
                    raise ValueError(f"epoch {epoch}: window {int(np.argmin(seen))} is skipped")
                yield f"epoch {epoch}: {num_windows} windows, each read once"
                seen[:], num_seen, epoch = False, 0, epoch + 1
    if num_seen:
        yield f"epoch {epoch}, not over: {num_seen} of {num_windows} windows, none read twice"


def _proved_windows(log: Log) -> Iterator[np.ndarray]:
    """The windows of each step, in order, once the hashes of their line are those of the log."""
    last, rows_per_step = 0, log.order.rows_per_step
    for step, logged in log.logged:
        digest, due = np.zeros(4, dtype=np.int64), []
        for each in range(last, step):
            due.append(step_windows(each, rows_per_step, log.order.num_windows, log.order.seed))
            rows = each * rows_per_step + np.arange(rows_per_step, dtype=np.int64)
            digest += digest_rows(rows, due[-1][:, None])
        if digest_hex(digest) != logged:
            raise ValueError(
                f"step {step}: windows_hash is {logged}, and of the windows due in steps {last + 1} to {step} it is"
                f" {digest_hex(digest)}: others were read"
            )
        yield from due
        last = step


def _mark(seen: np.ndarray, windows: np.ndarray, epoch: int) -> None:
    outside = windows[(windows < 0) | (windows >= len(seen))]
    if len(outside):
        raise ValueError(f"epoch {epoch}: window {outside[0]} is read and there are {len(seen)}")
    numbers, counts = np.unique(windows, return_counts=True)
    twice = numbers[(counts > 1) | seen[numbers]]
    if len(twice):
        raise ValueError(f"epoch {epoch}: window {twice[0]} is read twice")
    seen[numbers] = True


if __name__ == "__main__":
    main()
