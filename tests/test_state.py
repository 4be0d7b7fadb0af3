"""Laws of where the time of a step goes."""

import time

from conftest import metrics

from scripts.run.state import Clock


def test_the_parts_of_a_clock_are_all_of_its_time():
    before = time.perf_counter()
    clock, parts = Clock(), ("data", "forward", "data", "update")
    for part in parts:
        time.sleep(0.01)
        clock.tick(part)
    found, whole = clock.seconds(), time.perf_counter() - before
    assert list(found) == ["data", "forward", "update"] and all(seconds >= 0.01 for seconds in found.values())
    assert found["data"] >= 0.02 and sum(found.values()) <= whole


def test_a_train_line_says_where_its_time_went(finished_run):
    lines = [line for line in metrics(finished_run) if line["kind"] == "train"]
    for line in lines:
        parts = line["seconds_by_part"]
        assert list(parts) == ["data", "forward", "backward, gradients down", "update, weights up"]
        assert 0 < sum(parts.values()) <= line["seconds"]
    timed = [line for line in metrics(finished_run) if line["kind"] == "eval" or line.get("event") in ("sample", "saved")]
    assert all(line["seconds"] > 0 for line in timed if line["step"] > 0)
