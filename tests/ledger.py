"""Proves from a run's log alone that no window was skipped or read twice within an epoch: `python tests/ledger.py RUN_DIR`.

Needs metrics.jsonl and config.json, no data. The launches say how many windows there are, the data order says which are due
in each step, and the digest in each train line must be that of the windows due since the line before.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds import loader
from ds.loader import digest_hex, digest_rows, step_windows

# Over so many steps the share of each source is exact, as scripts/config.py says; that imports torch.
WEIGHED_STEPS = 1000


class Source(NamedTuple):
    """A source of a mixture, or "" for all windows, and how many rows of each sum of the quotas are its own."""

    name: str
    num_windows: int
    quota: int


class Order(NamedTuple):
    """What decides the windows of every step; all launches of a run agree in it."""

    num_windows: int
    rows_per_step: int
    seed: int
    sources: tuple[Source, ...]
    first_rows_per_step: int | None
    batch_warmup_steps: int | None

    @property
    def of_steps(self) -> loader.Order:
        """The same for ds/loader.py. Where in a stream windows lie does not matter here."""
        _, counts, quotas = zip(*self.sources, strict=True)
        first, steps = self.first_rows_per_step, self.batch_warmup_steps
        warmup = None if first is None or steps is None else loader.BatchWarmup(first, steps)
        return loader.Order(loader.Grid(1, (0,) * len(counts), counts), quotas, self.rows_per_step, self.seed, warmup)

    def rows_of(self, step: int) -> int:
        """How many rows a step reads: as many times those of step 0 as lie below a line up to the whole step."""
        first, steps = self.first_rows_per_step, self.batch_warmup_steps
        if first is None or steps is None or step >= steps:
            return self.rows_per_step
        return first + (self.rows_per_step - first) * step // (steps * first) * first


@dataclass
class Epochs:
    """How far the epochs of a source are: which of its windows, from `first_window` on, the present one has read."""

    name: str
    first_window: int
    seen: np.ndarray
    num_seen: int = 0
    epoch: int = 0

    def take(self, windows: np.ndarray) -> Iterator[str]:
        """Follows windows (N,) in the order in which they are read; a line for each epoch that is over."""
        num_windows = len(self.seen)
        while len(windows):
            due, windows = np.split(windows, [num_windows - self.num_seen])
            _mark(self.seen, due - self.first_window, str(self))
            self.num_seen += len(due)
            if self.num_seen == num_windows:
                if not self.seen.all():
                    raise ValueError(f"{self}: window {int(np.argmin(self.seen))} is skipped")
                yield f"{self}: {num_windows} windows, each read once"
                self.seen[:], self.num_seen, self.epoch = False, 0, self.epoch + 1

    def __str__(self) -> str:
        return f"{self.name}, epoch {self.epoch}" if self.name else f"epoch {self.epoch}"


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
    num_windows, rows, seed = (_whole_number(record, name, place) for name in ("num_windows", "rows_per_step", "seed"))
    if num_windows < 1 or rows < 1:
        raise ValueError(f"{place}: a launch with num_windows={num_windows}, rows_per_step={rows}")
    sources = _sources(record, num_windows, rows, place)
    if "first_rows_per_step" not in record and "batch_warmup_steps" not in record:
        return Order(num_windows, rows, seed, sources, None, None)
    first, steps = (_whole_number(record, name, place) for name in ("first_rows_per_step", "batch_warmup_steps"))
    if min(first, steps) < 1 or rows % first:
        raise ValueError(f"{place}: a launch whose steps grow from {first} to {rows} rows over {steps} steps")
    return Order(num_windows, rows, seed, sources, first, steps)


def _sources(record: dict, num_windows: int, rows_per_step: int, place: str) -> tuple[Source, ...]:
    if "sources" not in record:
        return (Source("", num_windows, rows_per_step),)
    if not isinstance(record["sources"], list) or not all(isinstance(each, dict) for each in record["sources"]):
        raise ValueError(f"{place}: sources={record['sources']!r} is no list of sources")
    numbers = ([_whole_number(each, name, place) for name in ("num_windows", "quota")] for each in record["sources"])
    sources = tuple(Source(str(each.get("name")), *found) for each, found in zip(record["sources"], numbers, strict=True))
    counts, quotas = [each.num_windows for each in sources], [each.quota for each in sources]
    if sum(counts) != num_windows or sum(quotas) != WEIGHED_STEPS * rows_per_step or min(counts + quotas) < 1:
        words = f"{num_windows} windows and {WEIGHED_STEPS} steps of {rows_per_step} rows"
        raise ValueError(f"{place}: sources with {counts} windows and {quotas} rows do not share {words}")
    return sources


def _check_launch(here: Order, before: Order | None, config: dict, place: str) -> None:
    named = {"rows_per_step": config["tokens_per_step"] // config["context_length"], "seed": config["seed"]}
    first, steps = (config.get(name) for name in ("first_tokens_per_step", "batch_warmup_steps"))
    named |= {"first_rows_per_step": first and first // config["context_length"], "batch_warmup_steps": steps}
    for name, value in here._asdict().items():
        if before is not None and value != getattr(before, name):
            raise ValueError(f"{place}: a launch with {name}={value}, and the launch before it had {getattr(before, name)}")
        if value != named.get(name, value):
            raise ValueError(f"{place}: a launch with {name}={value}, and config.json says {named[name]}")
    weights = config.get("corpus_weights") or [1]
    weights = [1] if len(weights) == 1 else weights
    shares = [each.quota / sum(each.quota for each in here.sources) for each in here.sources]
    due = [weight / sum(weights) for weight in weights]
    if len(due) != len(shares) or any(
        abs(share - wanted) > 1 / WEIGHED_STEPS for share, wanted in zip(shares, due, strict=True)
    ):
        raise ValueError(f"{place}: a launch that reads sources in the shares {shares}, and config.json says {due}")


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
    """Follows the rows of the run through the epochs of each source with one flag a window; a line whenever one is over."""
    firsts = np.cumsum([0, *(source.num_windows for source in log.order.sources)])
    sources = [
        Epochs(source.name, first, np.zeros(source.num_windows, dtype=bool))
        for source, first in zip(log.order.sources, firsts.tolist(), strict=False)
    ]
    for windows in _proved_windows(log):
        numbers = np.searchsorted(firsts[1:-1], windows, side="right")
        for number, source in enumerate(sources):
            yield from source.take(windows[numbers == number])
    for source in sources:
        if source.num_seen:
            yield f"{source}, not over: {source.num_seen} of {len(source.seen)} windows, none read twice"


def _proved_windows(log: Log) -> Iterator[np.ndarray]:
    """The windows of each step, in order, once the hashes of their line are those of the log."""
    last, num_read, order = 0, 0, log.order.of_steps
    for step, logged in log.logged:
        digest, due = np.zeros(4, dtype=np.int64), []
        for each in range(last, step):
            due.append(step_windows(each, order))
            rows = np.arange(num_read, num_read + log.order.rows_of(each), dtype=np.int64)
            digest += digest_rows(rows, due[-1][:, None])
            num_read += len(rows)
        if digest_hex(digest) != logged:
            raise ValueError(
                f"step {step}: windows_hash is {logged}, and of the windows due in steps {last + 1} to {step} it is"
                f" {digest_hex(digest)}: others were read"
            )
        yield from due
        last = step


def _mark(seen: np.ndarray, windows: np.ndarray, epoch: str) -> None:
    outside = windows[(windows < 0) | (windows >= len(seen))]
    if len(outside):
        raise ValueError(f"{epoch}: window {outside[0]} is read and there are {len(seen)}")
    numbers, counts = np.unique(windows, return_counts=True)
    twice = numbers[(counts > 1) | seen[numbers]]
    if len(twice):
        raise ValueError(f"{epoch}: window {twice[0]} is read twice")
    seen[numbers] = True


if __name__ == "__main__":
    main()
