"""A process of its own that hands a run's numbers to Weights & Biases or trackio. Imports nothing of the house.

What those libraries print, wait for, hold in memory or fail at stays out of the training.
Standard input has a JSON object a line: first what `begin` takes, then the "step" and the "numbers" of each record. Where it
ends, the run ends there, too. The process outlives a launcher that ends all of a rank's children.
"""

import json
import signal
import sys
from queue import SimpleQueue
from threading import Thread
from typing import Any

PROJECT = "tightfit"


def begin(tracker: str, identity: str, name: str, folder: str, config: dict) -> Any:
    """Opens the run of this identity, or goes on with it.

    Weights & Biases writes into `folder`, and offline where its library finds no network or nobody logged in. Trackio writes
    where its library does.
    """
    if tracker == "trackio":
        import trackio  # pyright: ignore[reportMissingImports]

        quiet: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        return trackio.init(PROJECT, f"{name}-{identity}", config=config, resume="allow", **quiet)
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    opening: dict[str, Any] = {"project": PROJECT, "id": identity, "name": name, "dir": folder, "config": config}
    try:
        return wandb.init(**opening, resume="allow", settings=settings)
    except wandb.Error as fault:
        print(f"offline: {fault}", flush=True)
        wandb.teardown()
        return wandb.init(**opening, mode="offline", settings=settings)


def main() -> None:
    """Takes lines as they come, so that whoever writes them never waits for a library or its network."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lines: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(lines,), daemon=True).start()
    if first := lines.get():
        run = begin(**json.loads(first))
        while line := lines.get():
            record = json.loads(line)
            run.log(record["numbers"], step=record["step"])
        run.finish()


def _read(lines: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line if line.endswith("\n") else "")
    lines.put("")


if __name__ == "__main__":
    main()
