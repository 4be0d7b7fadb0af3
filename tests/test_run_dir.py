"""Which checkpoints stay, a run that goes on to more steps, a last save without room, and folders without locks."""

import errno
import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import (
    LAUNCHERS,
    TORCHRUN,
    expect_success,
    held_out,
    launch,
    losses,
    metrics,
    on_a_small_disk,
    pretrain_script,
    start,
    tiny_config,
    tiny_student,
    training_script,
)
from hypothesis import given
from hypothesis import strategies as st
from ledger import prove

from scripts.config import TrainingConfig
from scripts.run import checkpoint, run_dir, storage
from scripts.run.state import decay_start, is_save_due, learning_rate_at

LONG, SHORT, DECAY, SAVE_EVERY = 12, 8, 3, 4


def saved(config: TrainingConfig, evaluated: dict[int, float | None], steps: list[int]) -> None:
    """A run directory with empty checkpoints at `steps`, and a log of evaluations."""
    for step in steps:
        (Path(config.run_dir) / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    lines = [json.dumps({"kind": "eval", "step": step, "val_loss": loss}) + "\n" for step, loss in evaluated.items()]
    run_dir.metrics_path(config).write_text("".join(lines))


@given(
    evaluated=st.dictionaries(st.integers(1, 12), st.none() | st.floats(0, 9, allow_nan=False)),
    steps=st.sets(st.integers(1, 12), min_size=1),
    keep=st.integers(1, 4),
    decay_steps=st.none() | st.integers(1, 8),
)
def test_the_newest_stay_and_the_best_and_the_one_before_the_decay(tmp_path_factory, evaluated, steps, keep, decay_steps):
    folder = tmp_path_factory.mktemp("kept")
    schedule = {"schedule": "wsd", "decay_steps": decay_steps} if decay_steps else {}
    config = tiny_config(folder, num_steps=LONG, warmup_steps=0, keep_checkpoints=keep, **schedule)
    saved(config, evaluated, sorted(steps))
    checkpoint.prune(config, max(steps))
    told = {step: loss for step, loss in evaluated.items() if step in steps and loss is not None}
    best = {step for step in told if told[step] == min(told.values())}
    here, newest = set(run_dir.checkpoint_folders(config)), set(sorted(steps)[-keep:])
    assert newest <= here and (not best or here & best)
    assert len(here - newest - ({decay_start(config)} & steps)) <= 1
    assert {decay_start(config)} & steps <= here
    moved = folder.rename(folder.with_name(folder.name + "-moved")) / "run"
    assert (moved / "best").is_symlink() == bool(best)
    assert not best or int((moved / "best").resolve(strict=True).name[-8:]) in best


def test_a_checkpoint_is_saved_before_the_decay_where_any_is_saved(tmp_path):
    config = tiny_config(tmp_path, num_steps=LONG, schedule="wsd", decay_steps=DECAY, save_every_steps=SAVE_EVERY)
    assert [step for step in range(1, LONG + 1) if is_save_due(step, config)] == [4, 8, 9, 12]
    before, after = LONG - DECAY - 1, LONG - DECAY
    assert learning_rate_at(before, config) == learning_rate_at(2, config) > learning_rate_at(after, config)
    assert not any(is_save_due(step, replace(config, save_every_steps=None)) for step in range(1, LONG + 1))


def test_a_run_goes_on_to_more_steps_and_to_nothing_else(tmp_path):
    short = tiny_config(tmp_path, num_steps=SHORT, schedule="wsd", decay_steps=DECAY)
    run_dir.claim_run(short, 0)
    longer = replace(short, num_steps=LONG, decay_steps=DECAY + 1)
    assert run_dir.shorter_run(longer) == short and run_dir.shorter_run(short) is None
    run_dir.refuse_other_run(replace(short, run_dir=short.run_dir, sample_top_p=0.5, model_license="mit"))
    run_dir.refuse_other_run(longer)
    for other in (replace(short, num_steps=SHORT - 1), replace(longer, seed=1), replace(short, decay_steps=DECAY - 1)):
        with pytest.raises(ValueError, match="holds a run of a different configuration"):
            run_dir.refuse_other_run(other)


def test_checkpoints_of_a_decay_that_is_given_up_stay_beside(tmp_path):
    short = tiny_config(tmp_path, num_steps=SHORT, schedule="wsd", decay_steps=DECAY)
    run_dir.claim_run(short, 0)
    saved(short, {}, [4, 5, 8])
    longer = replace(short, num_steps=LONG)
    run_dir.claim_run(longer, 5)
    checkpoint.prune(replace(longer, keep_checkpoints=1), 5)
    names = sorted(path.name for path in (Path(short.run_dir) / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000008.decayed"]
    assert run_dir.shorter_run(longer) is None


def test_a_run_whose_checkpoint_before_the_decay_is_gone_does_not_go_on(tmp_path):
    config = tiny_config(tmp_path, num_steps=SHORT, schedule="wsd", decay_steps=DECAY)
    saved(config, {}, [6, 8])
    with pytest.raises(ValueError, match="no checkpoint from before its decay, which began after step 5"):
        checkpoint.newest_verified(config, decay_start(config))


def test_a_folder_without_locks_is_said_and_one_with_locks_is_not(tmp_path):
    for flags, number in ((os.O_PATH, errno.EBADF), (os.O_RDONLY, 0)):
        descriptor = os.open(tmp_path, flags)
        assert storage.lock(descriptor)
        words = storage.lock_words(descriptor, tmp_path)
        assert (os.strerror(number) in words and str(tmp_path) in words and "\n" not in words) if words else number == 0
        os.close(descriptor)
    assert storage.NO_LOCKS[:2] == (errno.EBADF, errno.ENOLCK)


@pytest.mark.slow
@pytest.mark.parametrize("command", [LAUNCHERS[1], LAUNCHERS[2], TORCHRUN[1]], ids=["deepspeed 1", "deepspeed 2", "torchrun"])
def test_a_port_that_is_taken_is_refused_in_one_line_with_another(tmp_path, command):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        filled = [word.format(port=taken.getsockname()[1]) for word in command]
        (result,) = launch(tmp_path, training_script(tiny_config(tmp_path), ""), filled)
    port = filled[-1]
    assert result.returncode != 0 and port in result.stdout
    if command[0] == "deepspeed":
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
        assert f"port {port}" in line and "--master_port" in line and "Traceback" not in result.stdout
        assert (tmp_path / "exit-0").read_text() == "2"


def final_files(config: TrainingConfig) -> dict[str, bytes]:
    """The weights and the optimizer state of the last checkpoint."""
    folder = Path(config.run_dir) / "checkpoints" / f"step-{config.num_steps:08d}"
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> tuple[str, list[TrainingConfig], list[TrainingConfig]]:
    """What was said, runs of LONG steps, and the same that were begun with SHORT: "wsd", one from labels, and "cosine"."""
    folder = tmp_path_factory.mktemp("extended")
    growing = {"first_tokens_per_step": 128, "batch_warmup_steps": 6}
    alone = tiny_config(folder, run_dir=str(folder / "long"), num_steps=LONG, schedule="wsd", decay_steps=DECAY, **growing)
    student = tiny_student(alone, "labels", folder / "long-student")
    cosine = replace(alone, run_dir=str(folder / "long-cosine"), schedule="cosine", decay_steps=None)
    whole = [alone, student, cosine]
    moved = [replace(config, run_dir=config.run_dir.replace("long", "moved")) for config in whole]
    short = [replace(config, num_steps=SHORT) for config in moved]
    return expect_success(launch(folder, pretrain_script([*whole, *short, *moved]), ["python"])), whole, moved


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["alone", "labels"])
def test_a_run_that_goes_on_from_before_its_decay_is_bitwise_the_longer_one(extended, number):
    said, whole, moved = (extended[0], *(runs[number] for runs in extended[1:]))
    assert losses(moved) == losses(whole) and held_out(moved) == held_out(whole)
    assert final_files(moved) == final_files(whole)
    assert (Path(moved.run_dir) / "checkpoints" / f"step-{SHORT:08d}.decayed" / "model.safetensors").exists()
    assert "This run goes on from 8 to 12 steps, after step 5, before its decay, bit for bit" in said
    assert prove(Path(moved.run_dir))


@pytest.mark.slow
def test_a_cosine_run_goes_on_from_its_last_checkpoint_and_says_what_differs(extended):
    said, whole, moved = (extended[0], *(runs[2] for runs in extended[1:]))
    assert [row[0] for row in losses(moved)] == list(range(1, LONG + 1))
    short = replace(moved, num_steps=SHORT)
    ended, goes_on = learning_rate_at(SHORT - 1, short), learning_rate_at(SHORT, moved)
    assert f"after step 8. It is not the run that 12 steps would have made: the learning rate fell to {ended:.2e}" in said
    assert f"goes on at {goes_on:.2e}" in said and final_files(moved) != final_files(whole)
    assert [line["learning_rate"] for line in metrics(moved) if line["kind"] == "train"][SHORT:] == [
        learning_rate_at(step, moved) for step in range(SHORT, LONG)
    ]
    assert prove(Path(moved.run_dir))


FULL_AT_THE_END = """
filler = Path(config.run_dir).parent / "filler"

def objective(engine, windows, config, given=objective):
    if run.watch.step == config.num_steps and not filler.exists():
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(filler.parent).f_bavail * 4096 - 2**17)
    return given(engine, windows, config)

if {frees}:
    say = setup.watch.say
    def saying(words, stream):
        say(words, stream)
        if "Waiting to save" in words:
            filler.unlink()
    distributed.watch.say = saying
"""


@pytest.mark.slow
@pytest.mark.parametrize("frees", [True, False], ids=["room is made", "a stop is asked for"])
def test_a_last_save_without_room_waits_for_it(tmp_path, frees):
    command = on_a_small_disk(tmp_path / "disk", 6, ["python"])
    config = tiny_config(tmp_path, run_dir=str(tmp_path / "disk" / "run"), save_every_steps=SAVE_EVERY)
    code = training_script(config, "from scripts.run import setup\n" + FULL_AT_THE_END.format(frees=frees))
    (process,) = start(tmp_path, code, command)
    assert process.stdout is not None
    with process.stdout:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Waiting to save" in line and not frees:
                process.send_signal(signal.SIGUSR1)
    whole = "".join(said)
    assert process.wait() == (0 if frees else 1), whole
    assert whole.count("Waiting to save: ") == 1 and "make room, and the save is tried again" in whole
    assert ("Finished: 8 steps" in whole) == frees == ("the last steps are not saved" not in whole)
