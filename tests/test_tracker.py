"""Laws of scripts/run/tracker.py, with the real libraries where they are there: a tracker gets every number that TensorBoard
gets, without a network and without a word on the terminal, and its end is never that of the training.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from conftest import UNCHECKED, clean_environment, expect_success, launch, metrics, pretrain_script, tiny_config

from scripts.config import TRACKERS, TrainingConfig
from scripts.run import run_dir, tracker
from scripts.run.metrics import scalars
from scripts.run.setup import refuse_missing_tracker

READ_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("tightfit", sys.argv[1])))
"""


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


each_tracker = [
    pytest.param(
        name, marks=pytest.mark.skipif(not is_installed(name), reason=f'{name} is not there: pip install ".[trackers]"')
    )
    for name in TRACKERS
]


def settings_of(folder: Path) -> dict[str, str]:
    """An account of nobody, and a network without Weights & Biases."""
    own = ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR")
    nobody = {name: str(folder / name) for name in own} | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    return nobody | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def tracked(name: str, folder: Path, identity: str, run: str = "run") -> set[tuple[str, float]]:
    """Names and values that the tracker has of a run, from the files that its library writes."""
    if name == "wandb":
        raw = b"".join(path.read_bytes() for path in sorted((folder / run).glob(f"wandb/*-{identity}/*.wandb")))
        keys = re.finditer(rb"((?:train|eval)/\w+)\x82\x01(.)", raw, re.DOTALL)
        return {(key[1].decode(), float(raw[key.end() : key.end() + key[2][0]])) for key in keys}
    command = [sys.executable, "-c", READ_TRACKIO, f"{run}-{identity}"]
    environment = clean_environment() | settings_of(folder)
    lines = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    return {(key, value) for line in lines for key, value in line.items() if "/" in key}


def opened(name: str, folder: Path) -> subprocess.Popen:
    """The process of a tracker, with its first line."""
    (folder / "run").mkdir(exist_ok=True)
    opening = {"tracker": name, "identity": "abcd1234", "name": "run", "folder": str(folder / "run"), "config": {"seed": 0}}
    environment, nothing = clean_environment() | settings_of(folder), subprocess.DEVNULL
    command = [sys.executable, "-P", str(tracker.__file__)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, bufsize=0, stdin=pipe, stdout=nothing, stderr=nothing)
    hand_on(process, opening)
    return process


def hand_on(process: subprocess.Popen, line: dict) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps(line)}\n".encode())


@pytest.mark.parametrize("name", each_tracker)
def test_a_later_launch_goes_on_with_the_same_run_and_signals_end_none(name, tmp_path):
    for step in (1, 2):
        process = opened(name, tmp_path)
        hand_on(process, {"step": step, "numbers": {"train/loss": 8.5 - step}})
        time.sleep(0.5)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if step == 2 else ():
            process.send_signal(number)
        hand_on(process, {"step": step, "numbers": {"eval/val_loss": 9.5 - step}})
        process.communicate(timeout=300)
        assert process.returncode == 0
    found = {("train/loss", 7.5), ("eval/val_loss", 8.5), ("train/loss", 6.5), ("eval/val_loss", 7.5)}
    assert tracked(name, tmp_path, "abcd1234") == found


def test_writing_never_waits_for_a_library(tmp_path):
    """The process takes lines while its library starts, or is gone where there is none: neither holds the writer."""
    process = opened("wandb", tmp_path)
    try:
        for step in range(20_000):
            hand_on(process, {"step": step, "numbers": {"train/loss": 1.0}})
    except BrokenPipeError:
        assert process.wait(60) and not is_installed("wandb")
    finally:
        process.kill()
        process.communicate()


def test_a_missing_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    refuse_missing_tracker(TrainingConfig())
    for name in TRACKERS:
        with pytest.raises(ValueError, match=rf"tracker='{name}' is not installed; pip install -e \"\.\[trackers\]\""):
            refuse_missing_tracker(TrainingConfig(tracker=name))


def test_a_runs_identity_is_made_once_and_goes_with_its_folder(tmp_path):
    first, second = (TrainingConfig(run_dir=str(tmp_path / name)) for name in "ab")
    (tmp_path / "a").mkdir()
    identity = run_dir.tracker_identity(first)
    assert re.fullmatch("[0-9a-f]{8}", identity) and run_dir.tracker_identity(first) == identity
    os.rename(tmp_path / "a", tmp_path / "b")
    assert run_dir.tracker_identity(second) == identity
    (tmp_path / "a").mkdir()
    assert run_dir.tracker_identity(first) != identity


@pytest.mark.slow
@pytest.mark.parametrize("name", each_tracker)
def test_a_run_hands_over_its_numbers_and_outlives_its_tracker(name, tmp_path):
    """The second run's tracker fails at its start."""
    good = tiny_config(tmp_path, tracker=name)
    bad = replace(good, run_dir=str(tmp_path / "bad"))
    broken = f'{UNCHECKED}\nfrom scripts.run import tracker\nchild = tracker.__file__\nopen("none.py", "w").write("1 / 0")\n'
    swap = f'tracker.__file__ = "none.py" if config.run_dir == {bad.run_dir!r} else child'
    code = pretrain_script([good, bad], before=broken).replace("(pretrain if", f"{swap}\n    (pretrain if")
    output = expect_success(launch(tmp_path, code, ["python"], env=settings_of(tmp_path)))
    identity, log = run_dir.tracker_identity(good), metrics(good)
    numbers = {
        (f"{line['kind']}/{key}", value) for line in log if line["kind"] != "event" for key, value in scalars(line).items()
    }
    assert tracked(name, tmp_path, identity) == numbers
    lost = [line for line in output.splitlines() if "gets no more numbers" in line]
    log_path = run_dir.tracker_log_path(bad)
    assert lost == [f"{name} gets no more numbers: ZeroDivisionError: division by zero; more in {log_path}"]
    assert output.count("Finished: 8 steps") == 2 and len(metrics(bad)) == len(log)
    assert [line for line in output.lower().splitlines() if name in line and line not in map(str.lower, lost)] == []
