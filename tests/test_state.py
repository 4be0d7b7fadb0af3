"""Laws of where the time of a step goes."""

import time

import pytest
import torch
from conftest import metrics

from scripts.run.state import STEP_PARTS, Clock


def test_the_parts_of_a_clock_are_all_of_its_time():
    before = time.perf_counter()
    clock, parts = Clock(), ("data", "forward", "data", "backward", "weights up")
    for part in parts:
        time.sleep(0.01)
        clock.tick(part)
    found, whole = clock.seconds(), time.perf_counter() - before
    assert list(found) == ["data", "forward", "backward", "weights up"] and all(seconds >= 0.01 for seconds in found.values())
    assert found["data"] >= 0.02 and sum(found.values()) <= whole
    clock.within |= {"update": 0.004, "gradients down": 0.003, "norm": 0.005}
    parted = clock.seconds()
    assert tuple(parted) == STEP_PARTS and sum(parted.values()) == pytest.approx(sum(found.values()))
    if not torch.cuda.is_available():
        assert parted["backward"] == pytest.approx(found["backward"] - 0.003)
        assert parted["weights up"] == pytest.approx(found["weights up"] - 0.009)


def test_a_train_line_says_where_its_time_went(finished_run):
    lines = [line for line in metrics(finished_run) if line["kind"] == "train"]
    for line in lines:
        parts = line["seconds_by_part"]
        assert tuple(parts) == STEP_PARTS and all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= line["seconds"]
    timed = [line for line in metrics(finished_run) if line["kind"] == "eval" or line.get("event") in ("sample", "saved")]
    assert all(line["seconds"] > 0 for line in timed if line["step"] > 0)
