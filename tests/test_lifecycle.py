"""Laws of stopping: requests, lost launchers, ranks that die or hang; real signals to real launchers with real ranks."""

import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import (
    LAUNCHERS,
    TORCHRUN,
    expect_success,
    launch,
    metrics,
    pretrain_script,
    start,
    tiny_config,
    training_script,
)

from scripts import lifecycle
from scripts.checkpoint import newest_verified
from scripts.config import TrainingConfig

COMMANDS = {"deepspeed": LAUNCHERS[2], "torchrun": TORCHRUN[2]}
SILENT_SECONDS = 3
GONE_SECONDS = 5
LEAVING = """
import torch
from scripts import trainer

with trainer.leaving():
    torch.distributed.init_process_group("gloo")
    tensors = [torch.ones(200_000) for _ in range(200)]
    torch.distributed.barrier()
    sums = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
    raise SystemExit(75)
"""
CASES = [
    ("deepspeed", "launcher", "SIGTERM", "training", "fp32"),
    ("torchrun", "launcher", "SIGINT", "saving", "distill"),
    ("deepspeed", "launcher", "SIGUSR1", "preparation", "fp32"),
    ("torchrun", "launcher", "SIGTERM", "evaluation", "labels"),
    ("deepspeed", "rank 0", "SIGINT", "evaluation", "fp32"),
    ("torchrun", "rank 0", "SIGUSR1", "training", "labels"),
    ("torchrun", "rank 0", "SIGTERM", "saving", "fp32"),
    ("deepspeed", "rank 0", "SIGINT", "labelling", "labels"),
    ("deepspeed", "rank 1", "SIGUSR1", "saving", "labels"),
    ("torchrun", "rank 1", "SIGTERM", "preparation", "distill"),
    ("torchrun", "rank 1", "SIGINT", "training", "fp32"),
    ("deepspeed", "rank 1", "SIGUSR1", "evaluation", "distill"),
]
PHASES = """
phase = {phase!r}

def marked(function, wait):
    def call(*arguments):
        Path(f"in-{{phase}}-{{rank}}").touch()
        time.sleep(wait)
        return function(*arguments)
    return call

if "training" in phase:
    objective = marked(objective, 1.0 if "slow" in phase else 0.05)
if phase == "preparation":
    prepare = marked(prepare_data.prepare, 60)
if phase == "labelling":
    trainer._label_blocks = marked(trainer._label_blocks, 0.05)
if phase == "evaluation":
    trainer.held_out_loss = marked(trainer.held_out_loss, 1.0)
if phase == "saving":
    offload.optimizer_tensors = marked(offload.optimizer_tensors, 1.0)
"""


class Ended(NamedTuple):
    """How a launch ended: its status, output, seconds from the last signal to the last process, and each rank's status."""

    status: int | None
    output: str
    seconds: float
    ranks: dict[int, str]


def stop(
    folder: Path, config: TrainingConfig, launcher: str, phase: str, signals: list[tuple[str, str]], pause: float
) -> Ended:
    """Launches two ranks, and when `phase` has begun sends each of `signals`, (target, name), `pause` seconds apart."""
    (running,) = start(folder, training_script(config, PHASES.format(phase=phase)), COMMANDS[launcher])
    family = []
    try:
        wait_for(lambda: (folder / f"in-{phase}-0").exists(), running)
        time.sleep(0.3)
        family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        ranks = {f"rank {rank}": find_rank(family, rank) for rank in (0, 1)}
        targets = {"launcher": family[0], "parent": ranks["rank 0"].parent(), **ranks}
        for number, (target, name) in enumerate(signals):
            time.sleep(pause if number else 0)
            if target == "group":
                os.killpg(running.pid, getattr(signal, name))
            else:
                targets[target].send_signal(getattr(signal, name))
        began = time.monotonic()
        gone, left = psutil.wait_procs(family, timeout=60)
        seconds = time.monotonic() - began
        assert not left, left
        (status,) = (getattr(process, "returncode", None) for process in gone if process.pid == running.pid)
        return Ended(status, running.communicate()[0], seconds, exits(folder))
    finally:
        for process in family:
            if process.is_running():
                process.kill()


def wait_for(happened, running: subprocess.Popen) -> None:
    limit = time.monotonic() + 200
    while not happened():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.05)


def find_rank(family: list[psutil.Process], rank: int) -> psutil.Process:
    scripts = [process for process in family if "script.py" in " ".join(process.cmdline()[:4])]
    return next(process for process in scripts if process.environ().get("RANK") == str(rank))


def exits(folder: Path) -> dict[int, str]:
    return {int(path.name.removeprefix("exit-")): path.read_text() for path in folder.glob("exit-*")}


def stopping_config(folder: Path, **changes) -> TrainingConfig:
    return tiny_config(folder, precision="fp32", silent_rank_seconds=SILENT_SECONDS, **changes)


def expect_stopped(ended: Ended, config: TrainingConfig, phase: str) -> None:
    assert ended.ranks == {0: "75", 1: "75"}, ended.output
    if phase in ("preparation", "labelling"):
        assert "before training went on" in ended.output
        return
    found, faults = newest_verified(config)
    assert found is not None and not faults
    assert f"saved in {found.folder}" in ended.output


@pytest.fixture(scope="session")
def uninterrupted(finished_runs) -> TrainingConfig:
    """The run that every stopped run must become."""
    return finished_runs[2, "fp32"]


def values(config: TrainingConfig) -> list[tuple]:
    names = ("kind", "step", "loss", "grad_norm", "learning_rate", "tokens_hash", "windows_hash", "val_loss")
    return [tuple(line.get(name) for name in names) for line in metrics(config) if line["kind"] != "event"]


def test_a_request_stops_all_ranks_with_a_save(uninterrupted, tmp_path):
    config = stopping_config(tmp_path, data_dir=uninterrupted.data_dir, corpus=uninterrupted.corpus)
    ended = stop(tmp_path, config, "deepspeed", "training", [("launcher", "SIGTERM")], 0)
    expect_stopped(ended, config, "training")


@pytest.fixture(scope="module")
def stopped_runs(finished_runs, tmp_path_factory) -> dict[tuple, tuple[Ended, TrainingConfig]]:
    """A run stopped in the way of each case, two at a time; then all of them are continued."""
    configs = {case: stopped_config(case, finished_runs, tmp_path_factory.mktemp("stopped")) for case in CASES}
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(CASES, pool.map(stop_as, CASES, configs.values()), strict=True))
    expect_success(launch(tmp_path_factory.mktemp("continued"), pretrain_script(list(configs.values())), COMMANDS["torchrun"]))
    return {case: (ended, configs[case]) for case, ended in runs.items()}


def stopped_config(case: tuple, finished_runs: dict, folder: Path) -> TrainingConfig:
    config = replace(finished_runs[2, case[-1]], run_dir=str(folder / "run"), silent_rank_seconds=2 * SILENT_SECONDS)
    return replace(config, data_dir=str(folder / "data")) if "labelling" in case else config


def stop_as(case: tuple, config: TrainingConfig) -> Ended:
    launcher, target, name, phase, _ = case
    ended = stop(Path(config.run_dir).parent, config, launcher, phase, [(target, name)], 0)
    expect_stopped(ended, config, phase)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[" ".join(case) for case in CASES])
def test_every_request_anywhere_stops_all_ranks_and_the_run_goes_on_as_if_never_stopped(case, stopped_runs, finished_runs):
    ended, config = stopped_runs[case]
    assert ended.ranks == {0: "75", 1: "75"} and ended.seconds < 2 * GONE_SECONDS
    assert values(config) == values(finished_runs[2, case[-1]])


def expect_failed(folder: Path, launcher: str, target: str, name: str, seconds: float, words: str) -> None:
    config = stopping_config(folder)
    ended = stop(folder, config, launcher, "training", [(target, name)], 0)
    assert words in ended.output and "the same command continues from the newest checkpoint" in ended.output, ended.output
    assert ended.status != 0 and ended.seconds < seconds, ended


@pytest.mark.parametrize(("launcher", "target"), [("torchrun", "rank 1")])
def test_a_hung_rank_is_named_and_all_stop_within_the_limit(launcher, target, tmp_path):
    words = f"{target} has been silent for {SILENT_SECONDS} s, at step"
    expect_failed(tmp_path, launcher, target, "SIGSTOP", SILENT_SECONDS + GONE_SECONDS, words)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), [("deepspeed", "rank 0"), ("deepspeed", "rank 1"), ("torchrun", "rank 0")])
def test_whichever_rank_hangs_is_named(launcher, target, tmp_path):
    test_a_hung_rank_is_named_and_all_stop_within_the_limit(launcher, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), [("deepspeed", "rank 0"), ("deepspeed", "rank 1"), ("torchrun", "rank 0")])
def test_a_killed_rank_is_named_and_all_stop(launcher, target, tmp_path):
    expect_failed(tmp_path, launcher, target, "SIGKILL", GONE_SECONDS, f"{target} is gone, at step")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_second_interrupt_stops_at_once(launcher, tmp_path):
    config = stopping_config(tmp_path, tokens_per_step=4096)
    slow = [("rank 1", "SIGINT"), ("rank 1", "SIGINT")]
    ended = stop(tmp_path, config, launcher, "slow training", slow, 1.5)
    assert "Stopped at once, at step 1, without a save" in ended.output, ended.output
    assert ended.status != 0 and ended.seconds < GONE_SECONDS
    assert newest_verified(config) == (None, [])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), [("deepspeed", "launcher"), ("deepspeed", "parent"), ("torchrun", "launcher")])
def test_workers_whose_launcher_is_killed_stop_with_a_save(launcher, target, tmp_path):
    config = stopping_config(tmp_path)
    ended = stop(tmp_path, config, launcher, "training", [(target, "SIGKILL")], 0)
    expect_stopped(ended, config, "training")


@pytest.mark.slow
def test_one_ctrl_c_at_a_terminal_is_one_request(tmp_path):
    """The terminal interrupts the launchers and the ranks, and launch.py adds a SIGTERM: still one orderly stop."""
    config = stopping_config(tmp_path)
    ended = stop(tmp_path, config, "deepspeed", "training", [("group", "SIGINT")], 0)
    expect_stopped(ended, config, "training")


def test_a_watch_leaves_the_process_as_it_found_it():
    before = [signal.getsignal(number) for number in lifecycle.STOP_SIGNALS]
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    watch.close(clean=True)
    assert [signal.getsignal(number) for number in lifecycle.STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_strangers_on_the_line_are_not_heard():
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    port, _ = watch.listen()
    try:
        for words in (b"not json\n", b"[]\n", json.dumps({"token": "1", "reason": "SIGTERM"}).encode() + b"\n", b"\xff" * 99):
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(words)
                line.settimeout(5)
                if words.endswith(b"\n"):
                    assert line.recv(1) == b""
        assert watch.reason is None
    finally:
        watch.close(clean=True)


def test_a_request_before_training_ends_in_status_75_from_wherever_it_struck(capsys):
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    with pytest.raises(SystemExit) as left, watch.before_training():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert left.value.code == lifecycle.STOPPED
    assert "Stopped by SIGTERM before training went on" in capsys.readouterr().out


def test_a_refusal_before_training_stays_a_refusal():
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    with pytest.raises(ValueError, match="law"), watch.before_training():
        raise ValueError("a law is broken")


def test_a_stop_leaves_no_compiler_behind():
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    with pytest.raises(SystemExit), watch.before_training():
        child = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)
    assert child.wait(GONE_SECONDS) != 0


@pytest.mark.slow
def test_a_lost_terminal_does_not_end_the_run(tmp_path):
    config = stopping_config(tmp_path)
    (running,) = start(tmp_path, training_script(config, PHASES.format(phase="training")), ["python"])
    wait_for(lambda: (tmp_path / "in-training-0").exists(), running)
    assert running.stdout is not None
    running.stdout.close()
    assert running.wait(100) == 0
    found, _ = newest_verified(config)
    assert found is not None and found.state["step"] == config.num_steps


def test_the_exit_status_stands_while_gloos_threads_still_hold_tensors(tmp_path):
    env = {"RANK": "{index}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "{port}"}
    results = launch(tmp_path, LEAVING, ["python"], 2, env)
    assert [result.returncode for result in results] == [75, 75], results[0].stdout


def test_other_programs_signals_are_no_stop_requests():
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    watch = lifecycle.Watch(0, 0, 0, SILENT_SECONDS)
    try:
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(3 * lifecycle.BEAT_SECONDS)
        assert watch.reason is None
    finally:
        watch.close(clean=True)
        signal.signal(signal.SIGALRM, before)
