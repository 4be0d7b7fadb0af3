"""Laws of the engine and the loop, on real DeepSpeed with one and two ranks and every launcher."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LAUNCHERS,
    PRECISIONS,
    REPOSITORY,
    RUNS,
    SAVE_EVERY,
    STEPS,
    TORCHRUN,
    as_if_stopped_after,
    clean_environment,
    expect_success,
    launch,
    metrics,
    pretrain_script,
    tiny_config,
    tiny_student,
    training_script,
)
from hypothesis import given
from hypothesis import strategies as st
from ledger import prove
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds.loader import micro_batches
from scripts.checkpoint import file_sha256, find_fault, newest_folder, refuse_other_run
from scripts.config import TrainingConfig
from scripts.model import empty_model, initialise, parameter_groups
from scripts.prepare_data import prepare
from scripts.trainer import is_spike, learning_rate_at, ranks_from_launcher

EXACT_STEPS = 6
STEP_SCRIPT = """
import hashlib, json
from dataclasses import replace
from safetensors.torch import save_file
from scripts import lifecycle, trainer
from scripts.config import TrainingConfig
from scripts.prepare_data import prepare
from scripts.train_distill import _objective, label
from scripts.train_pretrain import next_token

if __name__ == "__main__":
    for fields in json.loads({described!r}):
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude")}}
        config = TrainingConfig(**fields)
        run, objective = trainer.ready(config, prepare, label), _objective(config) if config.teacher_dir else next_token
        losses = [trainer.run_step(run, objective, step).loss for step in range({steps})]
        run.watch.close(clean=True)
        if run.ranks.rank == 0:
            weights = {{name: weight.detach().clone() for name, weight in run.engine.module.named_parameters()}}
            save_file(weights, config.run_dir + ".safetensors", {{"losses": json.dumps(losses)}})
    lifecycle.end(0)
"""


def exact_configs(folder: Path, ranks: int, teacher: TrainingConfig) -> list:
    """Accumulation over 1, 4 and 8 micro-batches of 2 rows of 32 tokens on each rank; tied and untied heads, in turn on two. On
    one rank also from a teacher, beside the student and as labels of all ids but one.
    """
    alone = [
        tiny_config(
            folder, run_dir=str(folder / f"{accumulation}-tied{tied}"), precision="fp32", tie_embeddings=tied,
            tokens_per_step=64 * ranks * accumulation, max_grad_norm=0.5, learning_rate=1e-3, min_learning_rate=1e-4,
        )
        for number, accumulation in enumerate((1, 4, 8)) for tied in (True, False) if ranks == 1 or tied == bool(number % 2)
    ]  # fmt: skip
    taught = {"teacher_dir": teacher.run_dir, "distill_temperature": 2.0, "distill_weight": 0.75}
    students = [
        replace(alone[-1], run_dir=str(folder / f"top-{top_k}"), teacher_top_k=top_k, **taught) for top_k in (None, 256)
    ]
    return alone + (students if ranks == 1 else [])


def plain_adamw(config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps by torch alone: one batch a step, clip, AdamW."""
    data, model = prepare(config), initialise(empty_model(config, torch.device("cpu")))
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)  # pyright: ignore
    losses = []
    for step in range(EXACT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        batch = next(micro_batches(
            data.train, step=step, rank=0, world_size=1, micro_batch_rows=config.rows_per_step,
            rows_per_step=config.rows_per_step, context_length=config.context_length, seed=config.seed,
        ))  # fmt: skip
        windows = torch.from_numpy(batch.ids)
        logits = torch.nn.functional.linear(model(windows[:, :-1]), model.head)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        if config.teacher_dir is not None:
            loss = (1 - config.distill_weight) * loss + config.distill_weight * plain_divergence(config, windows, logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def plain_divergence(config, windows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Hinton et al. 2015, with the teacher as transformers opens it."""
    folder = newest_folder(replace(config, run_dir=config.teacher_dir))
    assert folder is not None
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows[:, :-1]).logits
    ours, theirs = ((each / config.distill_temperature).log_softmax(-1).flatten(0, 1) for each in (logits, theirs))
    divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return divergence * config.distill_temperature**2


def launch_exact(folder: Path, ranks: int, teacher: TrainingConfig) -> list:
    """One rank under srun's variables; two ranks as two machines, each a torchrun agent on the loopback address."""
    configs = exact_configs(folder, ranks, teacher)
    code = STEP_SCRIPT.format(described=json.dumps([asdict(config) for config in configs]), steps=EXACT_STEPS)
    if ranks == 1:
        slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
        expect_success(launch(folder, code, ["python"], env=slurm | {"MASTER_PORT": "{port}"}))
        return configs
    agent = [
        "taskset",
        "-c",
        "{index}",
        "torchrun",
        "--nnodes",
        "2",
        "--node-rank",
        "{index}",
        "--nproc-per-node",
        "1",
        "--master-addr",
        "127.0.0.1",
    ]
    expect_success(launch(folder, code, [*agent, "--master-port", "{port}"], num_processes=2))
    return configs


def test_zero_offload_with_accumulation_equals_plain_adamw(finished_runs, num_ranks, tmp_path):
    for config in launch_exact(tmp_path, num_ranks, finished_runs[1, "fp32"]):
        weights, losses = plain_adamw(config)
        ours, is_exact = load_file(config.run_dir + ".safetensors"), config.teacher_top_k is None
        assert ours.keys() == weights.keys()
        for name, weight in weights.items():
            limit = 2e-6 if is_exact else 5e-4
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=limit, msg=lambda text, where=name: f"{where}: {text}")
        with safe_open(config.run_dir + ".safetensors", "pt") as file:
            np.testing.assert_allclose(json.loads(file.metadata()["losses"]), losses, rtol=1e-5 if is_exact else 1e-3)


@pytest.fixture(scope="module")
def resumed_runs(finished_runs, num_ranks, tmp_path_factory) -> dict:
    """Runs that stopped after the first save, continued by a fresh launch; "elastic" was begun by another number of ranks."""
    folder = tmp_path_factory.mktemp(f"resumed{num_ranks}")
    copies = {name: as_if_stopped_after(SAVE_EVERY, finished_runs[num_ranks, name], folder / name) for name in RUNS}
    copies["elastic"] = as_if_stopped_after(SAVE_EVERY, finished_runs[3 - num_ranks, "fp32"], folder / "elastic")
    again = "        train(TrainingConfig(**fields))"
    output = expect_success(launch(folder, pretrain_script(list(copies.values()), again), TORCHRUN[num_ranks]))
    return {"output": output, **copies}


def losses(config) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(config) if line["kind"] == "train"]


def held_out(config) -> list[tuple]:
    return [(line["step"], line["val_loss"], line["val_bits_per_byte"]) for line in metrics(config) if line["kind"] == "eval"]


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bitwise_the_uninterrupted_run(finished_runs, resumed_runs, num_ranks, name):
    whole, resumed = finished_runs[num_ranks, name], resumed_runs[name]
    assert losses(resumed) == losses(whole)
    assert held_out(resumed) == held_out(whole)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    files = ["model.safetensors", *(f"training/optimizer-{r:05d}-of-{num_ranks:05d}.safetensors" for r in range(num_ranks))]
    for file in files:
        assert file_sha256(resumed.run_dir / last / file) == file_sha256(whole.run_dir / last / file), file


def test_another_number_of_ranks_continues_the_run(finished_runs, resumed_runs, num_ranks):
    whole, resumed = finished_runs[3 - num_ranks, "fp32"], resumed_runs["elastic"]
    np.testing.assert_allclose([loss for _, loss, _ in losses(resumed)], [loss for _, loss, _ in losses(whole)], rtol=1e-4)
    assert f"training/optimizer-00000-of-{num_ranks:05d}.safetensors" in {
        path.relative_to(resumed.run_dir).as_posix().split("/", 2)[2] for path in Path(resumed.run_dir).rglob("*.safetensors")
    }


def test_a_finished_run_says_so_when_started_again(resumed_runs):
    assert resumed_runs["output"].count("This run is finished: 8 steps.") == len(RUNS) + 1


def test_each_step_is_logged_once(finished_runs, resumed_runs, num_ranks):
    for config in (finished_runs[num_ranks, "bf16"], resumed_runs["bf16"], resumed_runs["labels"]):
        assert [step for step, _, _ in losses(config)] == list(range(1, STEPS + 1))
        assert [step for step, _, _ in held_out(config)] == [0, SAVE_EVERY, STEPS]


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2), ("distill", 1e-4), ("labels", 1e-2)])
def test_one_and_two_ranks_agree_in_loss(finished_runs, name, tolerance):
    one, two = (losses(finished_runs[ranks, name]) for ranks in (1, 2))
    np.testing.assert_allclose([loss for _, loss, _ in one], [loss for _, loss, _ in two], rtol=tolerance)


def test_the_loss_falls_and_held_out_loss_is_better_at_the_end(finished_run):
    assert losses(finished_run)[-1][1] < losses(finished_run)[0][1] - 1
    assert held_out(finished_run)[-1][1] < held_out(finished_run)[0][1] - 1


def test_a_run_directory_holds_what_the_design_names(finished_run):
    names = {path.name for path in Path(finished_run.run_dir).iterdir()}
    assert names == {"config.json", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints"}


def test_the_train_line_has_the_fields_of_the_contract(finished_run):
    line = next(line for line in metrics(finished_run) if line["kind"] == "train")
    assert list(line) == [
        "kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "gpu_peak_gib",
        "host_peak_gib", "tokens_hash", "windows_hash",
    ]  # fmt: skip
    assert line["tokens"] == finished_run.tokens_per_step


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


@pytest.mark.slow
def test_a_run_continued_with_less_of_the_card_reads_the_same_tokens_and_differs_by_rounding(tmp_path):
    whole, moved = (tiny_config(tmp_path, run_dir=str(tmp_path / name), precision="fp32") for name in ("whole", "moved"))
    stop = "progress_of = trainer.advance\ntrainer.advance = lambda *known: (os.kill(os.getpid(), 10), progress_of(*known))[1]"
    expect_success(launch(tmp_path, training_script(whole, ""), ["python"]))
    launch(tmp_path, training_script(moved, stop), ["python"])
    less = replace(moved, micro_batch_rows=1, activation_checkpointing="block_offload", loss_chunk_rows=7, accumulate_on="gpu")
    expect_success(launch(tmp_path, training_script(less, ""), ["python"]))
    ours, theirs = ([line for line in metrics(config) if line["kind"] == "train"] for config in (moved, whole))
    assert [line["tokens_hash"] for line in ours] == [line["tokens_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


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


def test_the_deepspeed_launcher_passes_exit_status_2_on(tmp_path):
    config = tiny_config(tmp_path, text_field="body")
    shutil.rmtree(tmp_path / "corpus")
    (result,) = launch(tmp_path, ENTRY.format(fields=json.dumps(asdict(config))), LAUNCHERS[2])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "corpus" in refusal[0], result.stdout


def test_a_flag_is_refused_with_a_pointer_to_the_configuration(tmp_path):
    entry = str(REPOSITORY / "scripts" / "train_pretrain.py")
    result = subprocess.run(
        [sys.executable, entry, "--lr=1"], env=clean_environment(), cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 2
    assert "--lr=1" in result.stderr and "scripts/config.py" in result.stderr.splitlines()[-1]


def logged(config) -> list[tuple]:
    names = ("kind", "step", "loss", "grad_norm", "learning_rate", "tokens_hash", "windows_hash", "val_loss")
    return [tuple(line.get(name) for name in names) for line in metrics(config) if line["kind"] != "event"]


def events(config, name: str) -> list[dict]:
    return [line for line in metrics(config) if line.get("event") == name]


def final_hashes(config) -> dict[str, str]:
    folder = newest_folder(config)
    assert folder is not None and find_fault(folder) is None
    names = ("model.safetensors", "training/optimizer-00000-of-00001.safetensors")
    return {name: file_sha256(folder / name) for name in names}


KILLED_STEPS, NUM_KILLS, NUM_KILLS_IN_SAVES = 200, 20, 6
KILLED = """
import random, signal, threading
chance = random.Random({seed})

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, countdown):
    def call(*arguments, **keywords):
        nonlocal countdown
        countdown -= 1
        return die() if countdown < 0 else function(*arguments, **keywords)
    return call

given = objective

def objective(*everything):
    time.sleep(0.01)
    return given(*everything)

if {in_save}:
    module, name, calls = chance.choice([
        (checkpoint, "_write_blocks", 20), (checkpoint, "_publish", 2), (checkpoint, "_prune", 2), (checkpoint.os, "fsync", 30),
        (checkpoint, "_remove", 3), (checkpoint, "_read_back", 2),
    ])
    setattr(module, name, dying(getattr(module, name), chance.randrange(calls)))
elif chance.random() < 0.7:
    started = threading.Timer(chance.uniform(0.0, 1.0), die)
    begin = trainer._begin
    trainer._begin = lambda *arguments: (started.start(), begin(*arguments))
else:
    threading.Timer(chance.uniform(0.0, 4.0), die).start()
"""


@pytest.mark.slow
def test_killed_twenty_times_anywhere_the_run_is_bitwise_the_uninterrupted_one(tmp_path):
    config = tiny_config(
        tmp_path,
        run_dir=str(tmp_path / "whole"),
        num_steps=KILLED_STEPS,
        save_every_steps=3,
        eval_every_steps=5,
        keep_checkpoints=2,
    )
    expect_success(launch(tmp_path, training_script(config, ""), ["python"]))
    killed, statuses = replace(config, run_dir=str(tmp_path / "killed")), []
    for number in range(NUM_KILLS):
        code = training_script(killed, KILLED.format(seed=number, in_save=number % 3 == 2 and number // 3 < NUM_KILLS_IN_SAVES))
        (result,) = launch(tmp_path, code, ["python"])
        statuses.append(result.returncode)
        assert result.returncode == -signal.SIGKILL, result.stdout
    expect_success(launch(tmp_path, training_script(killed, ""), ["python"]))
    assert logged(killed) == logged(config)
    assert [line["step"] for line in metrics(killed) if line["kind"] == "train"] == list(range(1, KILLED_STEPS + 1))
    assert final_hashes(killed) == final_hashes(config)
    assert prove(Path(killed.run_dir))
    assert len(list((Path(killed.run_dir) / "checkpoints").iterdir())) == 2


ELASTIC_STEPS = 60
ELASTIC = """
import json, os, signal
from scripts import lifecycle, trainer
from scripts.config import TrainingConfig
from scripts.prepare_data import prepare
from scripts.train_distill import from_labels, label
from scripts.train_pretrain import next_token

stop_after = {stop_after}

def stopping(*everything):
    if run.watch.step == stop_after and run.ranks.rank == run.ranks.world_size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return (next_token if everything[-1].teacher_dir is None else from_labels)(*everything)

if __name__ == "__main__":
    for fields in json.loads({described!r}):
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude")}}
        run = trainer.ready(TrainingConfig(**fields), prepare, label)
        try:
            trainer.train(run, stopping)
        except SystemExit as left:
            assert left.code == 75
    lifecycle.end(0)
"""


def elastic_configs(folder: Path, name: str, teacher: TrainingConfig) -> list:
    changes = dict(num_steps=ELASTIC_STEPS, save_every_steps=100, eval_every_steps=30)
    alone = [tiny_config(folder, run_dir=str(folder / f"{name}-{kind}"), precision=kind, **changes) for kind in PRECISIONS]
    student = tiny_student(replace(alone[0], run_dir=teacher.run_dir), "labels", folder / f"{name}-labels")
    return [*alone, student]


def launch_elastic(folder: Path, configs: list, ranks: int, stop_after: int | None) -> None:
    code = ELASTIC.format(described=json.dumps([asdict(config) for config in configs]), stop_after=stop_after)
    expect_success(launch(folder, code, TORCHRUN[ranks]))


@pytest.fixture(scope="module")
def elastic_runs(finished_runs, tmp_path_factory) -> tuple[list, list]:
    """Sixty steps on one rank, and the same on one, two and again one rank; in each precision, and from labels."""
    folder = tmp_path_factory.mktemp("elastic")
    whole, moved = (elastic_configs(folder, name, finished_runs[1, "fp32"]) for name in ("whole", "moved"))
    launch_elastic(folder, whole, 1, None)
    for ranks, stop_after in ((1, 20), (2, 40), (1, None)):
        launch_elastic(folder, moved, ranks, stop_after)
    return whole, moved


@pytest.mark.slow
@pytest.mark.parametrize(("number", "tolerance"), [(0, 1e-4), (1, 1e-2), (2, 1e-2)], ids=(*PRECISIONS, "labels"))
def test_one_two_and_one_rank_make_the_run_of_one(elastic_runs, number, tolerance):
    whole, moved = (runs[number] for runs in elastic_runs)
    assert [event["ranks"] for event in events(moved, "started")] == [1, 2, 1]
    assert [event["step"] for event in events(moved, "started")] == [0, 20, 40]
    for name in ("tokens_hash", "windows_hash", "step", "tokens", "learning_rate"):
        ours, theirs = ([line[name] for line in metrics(run) if line["kind"] == "train"] for run in (moved, whole))
        assert ours == theirs, name
    np.testing.assert_allclose([row[1] for row in losses(moved)], [row[1] for row in losses(whole)], rtol=tolerance)
    np.testing.assert_allclose([row[1] for row in held_out(moved)], [row[1] for row in held_out(whole)], rtol=tolerance)
    assert prove(Path(moved.run_dir))


def test_the_log_of_every_run_proves_that_no_window_was_skipped_or_read_twice(finished_runs, resumed_runs, num_ranks):
    for config in (finished_runs[num_ranks, "bf16"], *(resumed_runs[name] for name in ("bf16", "labels", "elastic"))):
        assert prove(Path(config.run_dir))


def test_another_number_of_ranks_reads_the_same_tokens_in_each_step(finished_runs):
    hashes = [
        [line["tokens_hash"] for line in metrics(finished_runs[ranks, "fp32"]) if line["kind"] == "train"] for ranks in (1, 2)
    ]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == STEPS


POISON, POISONED_STEPS = 1, 40
POISONED = """
def objective(engine, windows, config):
    loss = next_token(engine, windows, config)
    return loss * float("nan") if (windows == {poison}).any() else loss
"""


def poisoned_config(folder: Path, **changes):
    config = tiny_config(folder, num_steps=POISONED_STEPS, precision="fp32", save_every_steps=10, **changes)
    (folder / "corpus" / "poison.txt").write_bytes(b"poison: " + bytes([POISON]) * 40)
    return config


def poisoned_steps(config) -> list[int]:
    stream = prepare(config).train
    order = dict(rank=0, world_size=1, micro_batch_rows=config.rows_per_step, rows_per_step=config.rows_per_step)
    batches = [
        next(micro_batches(stream, step=step, context_length=config.context_length, seed=config.seed, **order))
        for step in range(config.num_steps)
    ]
    return [step + 1 for step, batch in enumerate(batches) if (batch.ids == POISON).any()]


@pytest.fixture(scope="module")
def poisoned_run(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("poisoned")
    config = poisoned_config(folder)
    output = expect_success(launch(folder, training_script(config, POISONED.format(poison=POISON)), TORCHRUN[2]))
    return config, output


def test_a_micro_batch_that_is_not_finite_is_skipped_counted_and_its_document_named(poisoned_run):
    config, output = poisoned_run
    skipped = events(config, "skipped")
    assert [event["step"] for event in skipped] == poisoned_steps(config) != []
    assert [event["skipped_steps"] for event in skipped] == list(range(1, len(skipped) + 1))
    for event in skipped:
        assert any(document["beginning"].startswith("poison: ") for document in event["documents"])
        assert f"step {event['step']}/{POISONED_STEPS}: skipped" in output


def test_a_skipped_step_keeps_the_schedule_the_count_of_tokens_and_the_weights(poisoned_run):
    config, _ = poisoned_run
    train = [line for line in metrics(config) if line["kind"] == "train"]
    assert [line["tokens"] for line in train] == [config.tokens_per_step * step for step in range(1, POISONED_STEPS + 1)]
    assert [line["learning_rate"] for line in train] == [learning_rate_at(step, config) for step in range(POISONED_STEPS)]
    bad, folder = set(poisoned_steps(config)), newest_folder(config)
    assert folder is not None
    assert all((line["loss"] is None) == (line["step"] in bad) for line in train)
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / "model.safetensors").values())
    state = json.loads((folder / "training" / "state.json").read_text())
    assert state["optimizer"]["adam_steps"] == POISONED_STEPS - len(bad)
    assert state["progress"]["skipped_steps"] == len(bad)
    assert prove(Path(config.run_dir))


OVERFLOWING = """
calls = []

def objective(engine, windows, config):
    calls.append(1)
    loss = next_token(engine, windows, config)
    return loss * float("inf") if len(calls) > 5 * 8 else loss
"""


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint_named(tmp_path):
    config = tiny_config(tmp_path, num_steps=40, max_skipped_steps=3)
    (result,) = launch(tmp_path, training_script(config, OVERFLOWING), ["python"])
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    assert "failed: 3 steps in a row up to step 8" in result.stdout
    assert f"the last good checkpoint is {newest_folder(config)}" in result.stdout
    assert [event["step"] for event in events(config, "skipped")] == [6, 7, 8]


GARBAGE_STEPS = 160


def test_a_loss_spike_names_the_garbage_that_was_planted(tmp_path):
    config = tiny_config(
        tmp_path, num_steps=GARBAGE_STEPS, tokens_per_step=64, micro_batch_rows=1, spike_window_steps=16, save_every_steps=None,
        eval_every_steps=None, learning_rate=3e-3, validation_fraction=0.0,
    )  # fmt: skip
    garbage = np.random.default_rng(0).integers(128, 256, 160, dtype=np.uint8).tobytes()
    (tmp_path / "corpus" / "garbage.txt").write_bytes(b"garbage " + garbage)
    output = expect_success(launch(tmp_path, training_script(config, ""), TORCHRUN[2]))
    spikes = events(config, "spike")
    assert spikes, output
    for event in spikes:
        assert event["documents"][0]["beginning"].startswith("garbage "), event
        assert f"step {event['step']}/{GARBAGE_STEPS}: the loss jumped to" in output


@given(st.lists(st.floats(0.1, 20.0), min_size=0, max_size=40), st.floats(0.1, 100.0))
def test_a_spike_is_sigmas_above_the_mean_of_half_a_window_or_more(before, loss):
    config = TrainingConfig(spike_window_steps=16, spike_sigmas=6.0)
    expected = len(before) >= 8 and loss > np.mean(before) + 6 * np.std(before, ddof=1)
    assert is_spike(loss, tuple(before), config) == bool(expected)


LOSING = """
kept = offload._take

def first_and_last_only(optimizer, sums, send, weight, group):
    if optimizer.micro_step_id in (0, optimizer.gradient_accumulation_steps - 1):
        kept(optimizer, sums, send, weight, group)
    else:
        optimizer.clear_grad_attribute(weight)

offload._take = first_and_last_only
"""


def test_an_engine_that_loses_micro_batches_is_refused_before_the_first_step(tmp_path):
    """The fault of DeepSpeed's issue 6550, mended by its pull request 7967: all but the first and the last were dropped."""
    config = tiny_config(tmp_path, precision="fp32")
    (result,) = launch(tmp_path, training_script(config, LOSING), ["python"])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "update" in refusal[0], result.stdout
    assert "Traceback" not in result.stdout and not Path(config.run_dir).exists()
