"""Laws of what comes before step one: refusals, where a run starts from, and what the README promises of a run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LAUNCHERS,
    REPOSITORY,
    SAVE_EVERY,
    STEPS,
    TORCHRUN,
    as_if_stopped_after,
    clean_environment,
    expect_success,
    held_out,
    launch,
    losses,
    metrics,
    pretrain_script,
    tiny_config,
    tiny_student,
    training_script,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from scripts.config import TrainingConfig
from scripts.engine.distributed import ranks_from_launcher
from scripts.model.decoder import empty_model
from scripts.model.huggingface import load_weights
from scripts.run.run_dir import newest_folder, refuse_other_run

REFUSALS = {
    "another configuration": (lambda config: replace(config, learning_rate=0.5), "learning_rate"),
    "another size": (lambda config: replace(config, hidden_size=64), "hidden_size"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_run_of_another_configuration_is_refused_with_its_fields(finished_run, kind):
    change, field = REFUSALS[kind]
    with pytest.raises(ValueError, match=rf"different configuration: {field}"):
        refuse_other_run(change(finished_run))


def test_what_a_run_takes_of_the_card_may_change_on_the_way(finished_run):
    changes = {"micro_batch_rows": 1, "activation_checkpointing": "block", "loss_chunk_rows": 7}
    refuse_other_run(replace(finished_run, accumulate_on="gpu", accumulation_precision="bf16", precision="bf16", **changes))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[01-04,07]", "node01"), ("gpu-a1,gpu-b2", "gpu-a1"), ("localhost", "localhost"), ("a[3],b7", "a3")],
)
def test_srun_variables_name_the_rank_and_the_first_node(monkeypatch, nodes, first):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    given = {"PROCID": "9", "NTASKS": "16", "LOCALID": "1", "STEP_NODELIST": nodes, "STEP_TASKS_PER_NODE": "8(x2)"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    assert ranks_from_launcher() == (9, 16, 1, 8, 0)
    assert environment["MASTER_ADDR"] == first


ENTRY = """
import scripts.config, json
from scripts.config import TrainingConfig
fields = json.loads({fields!r})
fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude")}}
scripts.config.PRETRAIN = TrainingConfig(**fields)
from scripts import train_pretrain
train_pretrain.main()
"""


def test_a_hand_edited_checkpoint_is_refused_in_one_line_and_left_alone(finished_run, tmp_path):
    copied = as_if_stopped_after(SAVE_EVERY, finished_run, tmp_path / "run")
    edited = tmp_path / "run" / "checkpoints" / f"step-{SAVE_EVERY:08d}" / "config.json"
    edited.write_text(edited.read_text().replace("32", "33"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (result,) = launch(tmp_path, ENTRY.format(fields=json.dumps(asdict(copied))), ["python"])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "config.json was changed" in refusal[0], result.stdout
    assert "Traceback" not in result.stdout
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


ONE_RANK_REFUSED = """
import os
from scripts import prepare_data
whole = prepare_data.prepare

def prepare(config):
    if os.environ["RANK"] == "1":
        raise ValueError("the disk of this machine holds no shards")
    return whole(config)

prepare_data.prepare = prepare
"""


def test_one_rank_alone_that_is_refused_says_why_and_the_deepspeed_launcher_passes_status_2_on(tmp_path):
    code = ONE_RANK_REFUSED + ENTRY.format(fields=json.dumps(asdict(tiny_config(tmp_path))))
    (result,) = launch(tmp_path, code, LAUNCHERS[2])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2, result.stdout
    assert refusal == ["refused: rank 1: the disk of this machine holds no shards"], result.stdout


ONE_RANK_ALONE = """
import os
from scripts.engine import toolchain

def refuse(config):
    if os.environ["RANK"] == "1":
        raise ValueError("this machine has no compiler")

toolchain.refuse_missing_compilers = refuse
"""


def test_one_rank_that_is_refused_before_the_ranks_have_met_says_why(tmp_path):
    code = ONE_RANK_ALONE + ENTRY.format(fields=json.dumps(asdict(tiny_config(tmp_path))))
    (result,) = launch(tmp_path, code, TORCHRUN[2])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert refusal == ["refused: rank 1: this machine has no compiler"], result.stdout


@pytest.mark.parametrize("name", ["prepare_data", "generate"])
def test_a_ctrl_c_ends_a_command_in_one_line(name, tmp_path):
    """Interrupted where its work begins. Neither command loads DeepSpeed, which would say a line of its own."""
    code = f"""
import os, signal
from scripts import {name}
{name}.{"prepare" if name == "prepare_data" else "newest_verified"} = lambda _: os.kill(os.getpid(), signal.SIGINT)
{name}.main()
"""
    (result,) = launch(tmp_path, code, ["python"])
    assert result.returncode == 130 and result.stdout == "Stopped; the same command begins again\n", result.stdout


def test_a_flag_is_refused_with_a_pointer_to_the_configuration(tmp_path):
    entry = str(REPOSITORY / "scripts" / "train_pretrain.py")
    result = subprocess.run(
        [sys.executable, entry, "--lr=1"], env=clean_environment(), cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 2
    assert "--lr=1" in result.stderr and "scripts/config.py" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def promised(tmp_path_factory) -> tuple[dict[str, TrainingConfig], str]:
    """One launch of what the README promises and no other run shows: configurations by name, and all that was printed."""
    folder = tmp_path_factory.mktemp("promised")
    tied = tiny_config(folder, run_dir=str(folder / "tied"), precision="fp32", tie_embeddings=True)
    last = Path(tied.run_dir) / "checkpoints" / f"step-{STEPS:08d}"
    student = tiny_student(tied, "labels", folder / "student", tie_embeddings=False)
    configs = {
        "tied": tied,
        "qwen3": replace(tied, run_dir=str(folder / "qwen3"), qk_norm=True, tie_embeddings=False),
        "started": replace(tied, run_dir=str(folder / "started"), init_from=str(last)),
        "student": student,
        "second student": replace(student, run_dir=str(folder / "second"), learning_rate=2e-2),
    }
    return configs, expect_success(launch(folder, pretrain_script(list(configs.values())), ["python"]))


@pytest.mark.parametrize(("name", "kind"), [("tied", "llama"), ("qwen3", "qwen3")])
def test_a_checkpoint_that_a_run_wrote_opens_in_transformers_with_equal_logits(promised, name, kind):
    folder = newest_folder(promised[0][name])
    assert folder is not None
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, ids = empty_model(promised[0][name], torch.device("cpu")), torch.arange(60).view(2, 30)
    load_weights(ours, folder)
    assert theirs.config.model_type == kind and theirs.config.tie_word_embeddings == (name == "tied")
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.functional.linear(ours(ids), ours.head), theirs(ids).logits, rtol=0, atol=1e-5)


def test_init_from_starts_from_those_weights(promised):
    source, started = (held_out(promised[0][name]) for name in ("tied", "started"))
    assert started[0][1:] == pytest.approx(source[-1][1:], rel=1e-6)
    assert started[-1][1] < started[0][1]


@pytest.mark.slow
def test_an_optimizer_on_the_device_trains_as_one_on_the_host_does(finished_runs, tmp_path):
    """DeepSpeed compiles another Adam for it."""
    host = finished_runs[1, "fp32"]
    device = replace(host, run_dir=str(tmp_path / "device"), offload_optimizer=False, accumulate_on="gpu")
    expect_success(launch(tmp_path, pretrain_script([device], before=""), ["python"]))
    ours, theirs = losses(device), losses(host)
    np.testing.assert_allclose([row[1] for row in ours], [row[1] for row in theirs], rtol=1e-4)


def test_a_second_student_uses_the_labels_of_the_first(promised):
    assert promised[1].count("The teacher alone labels") == 1
    assert len(list(Path(promised[0]["student"].data_dir).glob("labels-*"))) == 1
    first, second = (losses(promised[0][name]) for name in ("student", "second student"))
    assert first[0][1] == second[0][1] and first[-1][1] != second[-1][1]


def test_tensorboard_shows_what_the_log_holds(promised):
    config = promised[0]["tied"]
    board = EventAccumulator(str(Path(config.run_dir) / "tensorboard")).Reload()
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("train", "learning_rate"), ("eval", "val_loss")):
        lines = [(line["step"], line[name]) for line in metrics(config) if line["kind"] == kind]
        shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        assert [step for step, _ in shown] == [step for step, _ in lines]
        np.testing.assert_allclose([value for _, value in shown], [value for _, value in lines], rtol=1e-6)


LOSING = """
kept = offload.take_gradient

def first_and_last_only(optimizer, sums, send, weight, group):
    if optimizer.micro_step_id in (0, optimizer.gradient_accumulation_steps - 1):
        kept(optimizer, sums, send, weight, group)
    else:
        optimizer.clear_grad_attribute(weight)

offload.take_gradient = first_and_last_only
"""


def test_an_engine_that_loses_micro_batches_is_refused_before_the_first_step(tmp_path):
    """The fault of DeepSpeed's issue 6550, mended by its pull request 7967: all but the first and the last were dropped."""
    config = tiny_config(tmp_path, precision="fp32")
    (result,) = launch(tmp_path, training_script(config, LOSING, unchecked=""), ["python"])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "update" in refusal[0], result.stdout
    assert "Traceback" not in result.stdout and not Path(config.run_dir).exists()
