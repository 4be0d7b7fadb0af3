"""Laws of stopping: requests, lost launchers, ranks that die or hang; real signals to real launchers with real ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
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
from hypothesis import given
from hypothesis import strategies as st

from scripts import config
from scripts.config import TrainingConfig
from scripts.engine import watch
from scripts.engine.watch import STOPPED, CpuTimes, Watch
from scripts.run.checkpoint import newest_verified

COMMANDS = {"deepspeed": LAUNCHERS[2], "torchrun": TORCHRUN[2]}
SILENT_SECONDS = 5
GONE_SECONDS = 25
WIDE_SECONDS = 200
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
LEAVING = """
import torch
from scripts.engine import distributed

with distributed.leaving():
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
    ("torchrun", "rank 0", "SIGUSR1", "training", "mixture"),
    ("torchrun", "rank 0", "SIGTERM", "saving", "fp32"),
    ("deepspeed", "rank 0", "SIGINT", "labelling", "labels"),
    ("deepspeed", "rank 1", "SIGUSR1", "saving", "labels"),
    ("torchrun", "rank 1", "SIGTERM", "preparation", "distill"),
    ("torchrun", "rank 1", "SIGINT", "training", "fp32"),
    ("deepspeed", "rank 1", "SIGUSR1", "evaluation", "distill"),
]
PHASES = """
import signal

phase, calls = {phase!r}, []

def asked():
    return signal.getsignal(signal.SIGTERM).__self__.reason is not None

def holding(function, number):
    def call(*arguments):
        calls.append(number)
        while len(calls) == number and (phase in {stuck!r} or not asked()) and not Path("go-on").exists():
            Path(f"in-{{phase}}-{{rank}}").touch()
            if asked():
                Path(f"asked-{{rank}}").touch()
            time.sleep(0.02)
        return function(*arguments)
    return call

if "training" in phase:
    objective = holding(objective, 2)
if phase == "preparation":
    prepare = holding(prepare_data.prepare, 1)
if phase == "labelling":
    teacher.label_blocks = holding(teacher.label_blocks, 5)
if phase == "evaluation":
    trainer.evaluation_record = holding(trainer.evaluation_record, 1)
if phase == "saving":
    offload.optimizer_tensors = holding(offload.optimizer_tensors, 1)
"""
STUCK = ("preparation", "labelling", "stuck training")


class Ended(NamedTuple):
    """How a launch ended: its status, output, seconds from the last signal to the last process, and each rank's status."""

    status: int | None
    output: str
    seconds: float
    ranks: dict[int, str]


class Sent(NamedTuple):
    """A signal by name, and who gets it: "launcher", "rank 0", "rank 1", "parent" of rank 0, or the whole "group"."""

    target: str
    name: str


def stop(config: TrainingConfig, launcher: str, phase: str, *signals: Sent) -> Ended:
    """Launches two ranks, and when `phase` has begun sends each of `signals`, once the one before is known to both.

    The ranks wait in the phase until they are asked to stop; in a phase of STUCK for ever, unless something interrupts them.
    """
    folder = Path(config.run_dir).parent
    (running,) = start(folder, phase_script(config, phase), COMMANDS[launcher])
    family = []
    try:
        wait_for(lambda: (folder / f"in-{phase}-0").exists(), running)
        family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        ranks = {f"rank {rank}": find_rank(family, rank) for rank in (0, 1)}
        targets = {"launcher": family[0], "parent": ranks["rank 0"].parent(), **ranks}
        for number, (target, name) in enumerate(signals):
            if number:
                wait_for(lambda: len([*folder.glob("asked-*")]) == 2, running)
                time.sleep(1)
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


def phase_script(config: TrainingConfig, phase: str) -> str:
    return training_script(config, PHASES.format(phase=phase, stuck=STUCK))


def wait_for(happened: Callable[[], bool], running: subprocess.Popen) -> None:
    wait_until(lambda: happened() or running.poll() is not None)
    assert happened(), running.communicate()[0]


def wait_until(happened: Callable[[], bool]) -> None:
    limit = time.monotonic() + WIDE_SECONDS
    while not happened():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def find_rank(family: list[psutil.Process], rank: int) -> psutil.Process:
    living = [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    scripts = [process for process in living if "script.py" in " ".join(process.cmdline()[:4])]
    return next(process for process in scripts if process.environ().get("RANK") == str(rank))


def exits(folder: Path) -> dict[int, str]:
    return {int(path.name.removeprefix("exit-")): path.read_text() for path in folder.glob("exit-*")}


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


@pytest.mark.slow
def test_a_request_stops_all_ranks_with_a_save(uninterrupted, tmp_path):
    config = tiny_config(tmp_path, precision="fp32", data_dir=uninterrupted.data_dir, corpus=uninterrupted.corpus)
    ended = stop(config, "deepspeed", "training", Sent("launcher", "SIGTERM"))
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
    config = replace(finished_runs[2, case[-1]], run_dir=str(folder / "run"))
    return replace(config, data_dir=str(folder / "data")) if "labelling" in case else config


def stop_as(case: tuple, config: TrainingConfig) -> Ended:
    launcher, target, name, phase, _ = case
    ended = stop(config, launcher, phase, Sent(target, name))
    expect_stopped(ended, config, phase)
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[" ".join(case) for case in CASES])
def test_every_request_anywhere_stops_all_ranks_and_the_run_goes_on_as_if_never_stopped(case, stopped_runs, finished_runs):
    ended, config = stopped_runs[case]
    assert ended.ranks == {0: "75", 1: "75"} and ended.seconds < GONE_SECONDS
    assert values(config) == values(finished_runs[2, case[-1]])


def expect_failed(config: TrainingConfig, launcher: str, signal_sent: Sent, words: str) -> None:
    ended = stop(config, launcher, "training", signal_sent)
    assert words in ended.output and "the same command continues from the newest checkpoint" in ended.output, ended.output
    assert ended.status != 0 and ended.seconds < SILENT_SECONDS + GONE_SECONDS, ended


RANKS = [(launcher, target) for launcher in COMMANDS for target in ("rank 0", "rank 1")]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), RANKS)
def test_a_hung_rank_is_named_and_all_stop_within_the_limit(launcher, target, tmp_path):
    config = tiny_config(tmp_path, precision="fp32", silent_rank_seconds=SILENT_SECONDS)
    words = f"{target} has been silent for {SILENT_SECONDS} s, at step"
    expect_failed(config, launcher, Sent(target, "SIGSTOP"), words)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), [("deepspeed", "rank 0"), ("deepspeed", "rank 1"), ("torchrun", "rank 0")])
def test_a_killed_rank_is_named_and_all_stop(launcher, target, tmp_path):
    config = tiny_config(tmp_path, precision="fp32")
    expect_failed(config, launcher, Sent(target, "SIGKILL"), f"{target} is gone, at step")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_second_interrupt_stops_at_once(launcher, tmp_path):
    config, interrupt = tiny_config(tmp_path, precision="fp32"), Sent("rank 1", "SIGINT")
    ended = stop(config, launcher, "stuck training", interrupt, interrupt)
    assert "Stopped at once, at step 1, without a save" in ended.output, ended.output
    assert ended.status != 0 and ended.seconds < GONE_SECONDS
    assert newest_verified(config) == (None, [])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "target"), [("deepspeed", "launcher"), ("deepspeed", "parent"), ("torchrun", "launcher")])
def test_workers_whose_launcher_is_killed_stop_with_a_save(launcher, target, tmp_path):
    config = tiny_config(tmp_path, precision="fp32")
    ended = stop(config, launcher, "training", Sent(target, "SIGKILL"))
    expect_stopped(ended, config, "training")


@pytest.mark.slow
def test_one_ctrl_c_at_a_terminal_is_one_request(tmp_path):
    """The terminal interrupts the launchers and the ranks, and launch.py adds a SIGTERM: still one orderly stop."""
    config = tiny_config(tmp_path, precision="fp32")
    ended = stop(config, "deepspeed", "training", Sent("group", "SIGINT"))
    expect_stopped(ended, config, "training")


@pytest.mark.slow
def test_a_lost_terminal_does_not_end_the_run(tmp_path):
    config = tiny_config(tmp_path, precision="fp32")
    (running,) = start(tmp_path, phase_script(config, "training"), ["python"])
    wait_for(lambda: (tmp_path / "in-training-0").exists(), running)
    assert running.stdout is not None
    running.stdout.close()
    (tmp_path / "go-on").touch()
    assert running.wait(WIDE_SECONDS) == 0
    found, _ = newest_verified(config)
    assert found is not None and found.state["step"] == config.num_steps


def test_the_exit_status_stands_while_gloos_threads_still_hold_tensors(tmp_path):
    env = {"RANK": "{index}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "{port}"}
    results = launch(tmp_path, LEAVING, ["python"], 2, env)
    assert [result.returncode for result in results] == [75, 75], results[0].stdout


@pytest.fixture(autouse=True)
def hang_ups_count() -> Iterator[None]:
    """Also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextmanager
def watching() -> Iterator[Watch]:
    """The watch of a lone rank that trains."""
    watch = Watch(0, 0, 0, WIDE_SECONDS)
    with watch.before_training():
        assert watch.reason is None
    with watch.during_training():
        yield watch


def handlers() -> list:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def test_a_watch_leaves_the_process_as_it_found_it():
    before = handlers()
    with watching():
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_request_before_training_ends_in_status_75_from_wherever_it_struck(number, capsys):
    watch = Watch(0, 0, 0, WIDE_SECONDS)
    with pytest.raises(SystemExit) as left, watch.before_training():
        os.kill(os.getpid(), number)
        time.sleep(WIDE_SECONDS)
    assert left.value.code == STOPPED == 75
    assert f"Stopped by {number.name} before training went on" in capsys.readouterr().out


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_request_while_training_waits_for_the_loop(number):
    with watching() as watch:
        signal.raise_signal(number)
        wait_until(lambda: watch.reason is not None)
        assert watch.reason == number.name


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGHUP], ids=lambda number: number.name)
def test_other_programs_signals_and_a_hang_up_under_nohup_are_no_requests(number):
    before = signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else lambda *_: None)
    with watching() as watch:
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGUSR1)
        wait_until(lambda: watch.reason is not None)
        assert watch.reason == "SIGUSR1"
    signal.signal(number, before)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_one_rank_reaches_the_other(asked):
    with ThreadPoolExecutor(1) as no_main_thread:
        other = no_main_thread.submit(Watch, 1 - asked, 1 - asked, 0, WIDE_SECONDS).result()
    ranks = {asked: Watch(asked, asked, 0, WIDE_SECONDS), 1 - asked: other}
    try:
        for watch in ranks.values():
            with watch.before_training():
                assert watch.reason is None
        address = ranks[0].listen()
        ranks[1].connect("127.0.0.1", address.port, address.token)
        signal.raise_signal(signal.SIGUSR1)
        wait_until(lambda: other.reason is not None)
        assert other.reason == "SIGUSR1"
    finally:
        for rank in (1, 0):
            ranks[rank].close(clean=True)


def test_strangers_on_the_line_are_not_heard():
    with watching() as watch:
        address = watch.listen()
        stranger = json.dumps({"token": address.token + 1, "reason": "SIGTERM"}).encode() + b"\n"
        for words in (b"not json\n", b"[]\n", stranger, b"\xff" * 99):
            with socket.create_connection(("127.0.0.1", address.port)) as line:
                line.sendall(words)
                line.settimeout(WIDE_SECONDS)
                if words.endswith(b"\n"):
                    assert line.recv(1) == b""
        assert watch.reason is None


def test_a_refusal_before_training_stays_a_refusal():
    watch = Watch(0, 0, 0, WIDE_SECONDS)
    with pytest.raises(ValueError, match="law"), watch.before_training():
        raise ValueError("a law is broken")


def test_a_stop_leaves_no_compiler_behind():
    watch = Watch(0, 0, 0, WIDE_SECONDS)
    with pytest.raises(SystemExit), watch.before_training():
        child = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(WIDE_SECONDS)
    assert child.wait(WIDE_SECONDS) != 0


@given(num_threads=st.integers(2, 300), num_cores=st.integers(1, 300))
def test_idle_teams_are_the_fewest_with_which_threads_outnumber_cores(num_threads, num_cores):
    num_teams = watch.idle_teams(num_threads, max(num_cores, num_threads))
    threads = [num_threads + count * (num_threads - 1) for count in (num_teams - 1, num_teams)]
    assert threads[0] <= max(num_cores, num_threads) < threads[1]


def test_work_of_others_is_seen_and_our_own_is_not_taken_for_it():
    before = CpuTimes(everyone=100.0, own=7.0, clock=50.0)
    assert watch.cores_of_others(before, CpuTimes(106.0, 10.0, 52.0)) == 1.5
    started, limit = watch.cpu_times(), time.monotonic() + 300
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burning:
        try:
            while watch.cpu_times().everyone - started.everyone - (watch.cpu_times().own - started.own) < 0.5:
                assert time.monotonic() < limit
                time.sleep(0.05)
        finally:
            burning.kill()
    own = watch.cpu_times().own
    while time.process_time() < own + 0.05:
        pass
    assert watch.cpu_times().own >= own + 0.05


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing is shared out")
def test_idle_threads_are_held_while_others_take_cores_and_gone_afterwards(monkeypatch):
    """libgomp counts threads; how long a step then takes is what tests/benchmarks/speed.py measures."""
    num_cores, num_before, work = len(os.sched_getaffinity(0)), torch.get_num_threads(), {"others": 0.0}
    times = iter(range(10**9))

    def cpu_times() -> CpuTimes:
        clock = float(next(times))
        work["everyone"] = work.get("everyone", 0.0) + work["others"]
        return CpuTimes(work["everyone"], 0.0, clock)

    monkeypatch.setattr(watch, "cpu_times", cpu_times)
    monkeypatch.setattr(config, "COMPANY_SECONDS", 0.01)
    torch.set_num_threads(max(2, num_cores))
    try:
        with watch.sharing_cores():
            for others, is_held in ((0.0, False), (1.0, True), (0.1, False), (1.0, True)):
                work["others"], limit = others, time.monotonic() + 300
                while bool(held_teams()) is not is_held:
                    assert time.monotonic() < limit
                    time.sleep(0.01)
        assert not held_teams()
        torch.set_num_threads(1)
        with watch.sharing_cores():
            assert "sharing cores" not in {thread.name for thread in threading.enumerate()}
    finally:
        torch.set_num_threads(num_before)


def held_teams() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


class Telling(Watch):
    """Counts how often it tells the other ranks its state."""

    num_told = 0

    def _send_state(self, verdict: str | None = None) -> None:
        self.num_told += 1
        super()._send_state(verdict)


def test_ranks_tell_their_state_once_a_beat_and_do_not_answer_each_other_without_end():
    with ThreadPoolExecutor(1) as no_main_thread:
        other = no_main_thread.submit(Telling, 1, 1, 0, WIDE_SECONDS).result()
    ranks, started = [Telling(0, 0, 0, WIDE_SECONDS), other], time.monotonic()
    try:
        address = ranks[0].listen()
        ranks[1].connect("127.0.0.1", address.port, address.token)
        wait_until(lambda: min(watch.num_told for watch in ranks) >= 6)
        most = (time.monotonic() - started) / config.WATCH_BEAT_SECONDS + 2
        assert max(watch.num_told for watch in ranks) <= most
    finally:
        for rank in (1, 0):
            ranks[rank].close(clean=True)
