"""Laws of the engine and the loop, on real DeepSpeed with one and two ranks and every launcher."""

import hashlib
import json
import signal
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    GROWING,
    PRECISIONS,
    RUNS,
    SAVE_EVERY,
    STEPS,
    TORCHRUN,
    all_cores,
    as_if_stopped_after,
    ended_watch,
    expect_success,
    held_out,
    launch,
    losses,
    metrics,
    pretrain_script,
    tiny_config,
    tiny_mixture,
    tiny_student,
    training_script,
)
from ledger import prove
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds.loader import micro_batches
from scripts.config import PLACES, TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.prepare_data import prepare
from scripts.run.checkpoint import find_fault
from scripts.run.metrics import reporting
from scripts.run.run_dir import newest_folder
from scripts.run.state import Progress, Run, data_order
from scripts.trainer import learning_rate_at

EXACT_STEPS = 6
STEP_SCRIPT = """
import hashlib, json
from dataclasses import replace
from safetensors.torch import save_file
from scripts import trainer
from scripts.config import TrainingConfig
from scripts.engine import truth_check, watch
from scripts.model.losses import next_token
from scripts.prepare_data import prepare
from scripts.train_distill import label, objective_of

truth_check.refuse_untrue_updates = lambda *_: None

def poisoned(engine, windows, config):
    loss = next_token(engine, windows, config)
    return loss * float("nan") if (windows.ids == {poison}).any() else loss

if __name__ == "__main__":
    for fields in json.loads({described!r}):
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
        config = TrainingConfig(**fields)
        run, objective = trainer.set_up(config, prepare, label), objective_of(config) if config.teacher_dir else next_token
        losses = [trainer.run_step(run, objective, step).loss for step in range({steps})]
        run.watch.close(clean=True)
        if run.ranks.rank == 0:
            weights = {{name: weight.detach().clone() for name, weight in run.engine.module.named_parameters()}}
            save_file(weights, config.run_dir + ".safetensors", {{"losses": json.dumps(losses)}})
    for fields in json.loads({trained!r}):
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
        trainer.train(trainer.set_up(TrainingConfig(**fields), prepare), poisoned)
    watch.end(0)
"""
POISON, POISONED_STEPS, GARBAGE_STEPS = 1, 40, 160


def exact_configs(folder: Path, ranks: int, teacher: TrainingConfig) -> list:
    """Accumulation over 1, 4 and 8 micro-batches of 2 rows of 32 tokens on each rank, with tied and untied heads in turn, and
    over 1, 1, 2, 3, 4 and 4 with sums of gradients in each place. On one rank also from a teacher, beside the student and as
    labels of all ids but one.
    """
    alone = [
        tiny_config(
            folder, run_dir=str(folder / f"{accumulation}-tied{tied}"), precision="fp32", tie_embeddings=tied,
            tokens_per_step=64 * ranks * accumulation, max_grad_norm=0.5, learning_rate=1e-3, min_learning_rate=1e-4,
        )
        for number, accumulation in enumerate((1, 4, 8)) for tied in (True, False) if tied == bool(number % 2)
    ]  # fmt: skip
    taught = {"teacher_dir": teacher.run_dir, "distill_temperature": 2.0, "distill_weight": 0.75}
    students = [
        replace(alone[-1], run_dir=str(folder / f"top-{top_k}"), teacher_top_k=top_k, **taught) for top_k in (None, 256)
    ]
    steps: dict = {"first_tokens_per_step": 64 * ranks, "batch_warmup_steps": 4}
    growing = [replace(alone[1], run_dir=str(folder / f"growing-{place}"), accumulate_on=place, **steps) for place in PLACES]
    return alone + growing + (students if ranks == 1 else [])


def plain_adamw(config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps by torch alone: one batch a step, clip, AdamW."""
    data, model = prepare(config), initialise(empty_model(config, torch.device("cpu")))
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)  # pyright: ignore
    losses = []
    for step in range(EXACT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        share = {"rank": 0, "world_size": 1, "micro_batch_rows": config.rows_of_step(step)}
        batch = next(micro_batches(data.train, data_order(config, data), step=step, **share))
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


def poisoned_config(folder: Path) -> TrainingConfig:
    config = tiny_config(folder, num_steps=POISONED_STEPS, precision="fp32", save_every_steps=10)
    (folder / "corpus" / "poison.txt").write_bytes(b"poison: " + bytes([POISON]) * 40)
    return config


def garbage_config(folder: Path) -> TrainingConfig:
    config = tiny_config(
        folder, num_steps=GARBAGE_STEPS, tokens_per_step=64, micro_batch_rows=1, spike_window_steps=16, save_every_steps=None,
        eval_every_steps=None, learning_rate=3e-3, validation_fraction=0.0,
    )  # fmt: skip
    garbage = np.random.default_rng(0).integers(128, 256, 160, dtype=np.uint8).tobytes()
    (folder / "corpus" / "garbage.txt").write_bytes(b"garbage " + garbage)
    return config


class ExactRuns(NamedTuple):
    """Configurations of which `step_script` made EXACT_STEPS, by ranks; what two ranks trained too, and what they printed."""

    exact: dict[int, list[TrainingConfig]]
    poisoned: TrainingConfig
    garbage: TrainingConfig
    output: str


def step_script(exact: list[TrainingConfig], trained: list[TrainingConfig]) -> str:
    described, trained_too = (json.dumps([asdict(config) for config in each]) for each in (exact, trained))
    return STEP_SCRIPT.format(described=described, trained=trained_too, steps=EXACT_STEPS, poison=POISON)


@pytest.fixture(scope="module")
def exact_runs(finished_runs, tmp_path_factory) -> ExactRuns:
    """One rank under srun's variables; two ranks as two machines, each a torchrun agent on the loopback address."""
    one, two, poison, garbage = (tmp_path_factory.mktemp(name) for name in ("exact1", "exact2", "poisoned", "garbage"))
    exact = {ranks: exact_configs(folder, ranks, finished_runs[1, "fp32"]) for ranks, folder in ((1, one), (2, two))}
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    expect_success(launch(one, step_script(exact[1], []), ["python"], env=slurm | {"MASTER_PORT": "{port}"}))
    agent = "taskset -c {index} torchrun --nnodes 2 --node-rank {index} --nproc-per-node 1 --master-addr 127.0.0.1"
    command = [*agent.split(), "--master-port", "{port}"]
    trained = [poisoned_config(poison), garbage_config(garbage)]
    output = expect_success(launch(two, step_script(exact[2], trained), command, num_processes=2))
    return ExactRuns(exact, trained[0], trained[1], output)


def test_updates_of_growing_steps_take_all_numbers_of_micro_batches(exact_runs, num_ranks):
    """Else the law below would not be about them."""
    growing = [config for config in exact_runs.exact[num_ranks] if config.batch_warmup is not None]
    for config in growing:
        rows = [config.rows_of_step(step) for step in range(EXACT_STEPS)]
        assert [each / (num_ranks * config.micro_batch_rows) for each in rows] == [1, 1, 2, 3, 4, 4]
    assert [config.accumulate_on for config in growing] == list(PLACES)


def test_zero_offload_with_accumulation_equals_plain_adamw(exact_runs, num_ranks):
    for config in exact_runs.exact[num_ranks]:
        weights, losses = plain_adamw(config)
        ours, is_exact = load_file(config.run_dir + ".safetensors"), config.teacher_top_k is None
        assert ours.keys() == weights.keys()
        for name, weight in weights.items():
            limit = 2e-6 if is_exact else 5e-4
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=limit, msg=lambda text, where=name: f"{where}: {text}")
        with safe_open(config.run_dir + ".safetensors", "pt") as file:
            np.testing.assert_allclose(json.loads(file.metadata()["losses"]), losses, rtol=1e-5 if is_exact else 1e-3)


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["1 rank", "2 ranks"])
def resuming_ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def resumed_runs(finished_runs, resuming_ranks, tmp_path_factory) -> dict:
    """Runs that stopped after the first save, continued by a fresh launch; "elastic" was begun by another number of ranks."""
    folder = tmp_path_factory.mktemp(f"resumed{resuming_ranks}")
    copies = {name: as_if_stopped_after(SAVE_EVERY, finished_runs[resuming_ranks, name], folder / name) for name in RUNS}
    copies["elastic"] = as_if_stopped_after(SAVE_EVERY, finished_runs[3 - resuming_ranks, "fp32"], folder / "elastic")
    twice = pretrain_script(list(copies.values()), "train_all()")
    output = expect_success(launch(folder, twice, TORCHRUN[resuming_ranks]))
    return {"output": output, **copies}


def sha256_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bitwise_the_uninterrupted_run(finished_runs, resumed_runs, resuming_ranks, name):
    whole, resumed = finished_runs[resuming_ranks, name], resumed_runs[name]
    assert losses(resumed) == losses(whole)
    assert held_out(resumed) == held_out(whole)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    parts = [f"training/optimizer-{rank:05d}-of-{resuming_ranks:05d}.safetensors" for rank in range(resuming_ranks)]
    files = ["model.safetensors", *parts]
    for file in files:
        assert sha256_of(resumed.run_dir / last / file) == sha256_of(whole.run_dir / last / file), file


@pytest.mark.slow
def test_compiled_kernels_make_the_run_of_written_ones_and_resume_bitwise(finished_runs, tmp_path):
    """The second launch compiles all of them anew, and meets shapes in another order: the first evaluates and samples first."""
    written, sampling = finished_runs[1, "bf16"], {"sample_every_steps": SAVE_EVERY, "sample_tokens": 4}
    whole = replace(written, run_dir=str(tmp_path / "whole"), compile_kernels="always", **sampling)
    stopped = replace(whole, run_dir=str(tmp_path / "stopped"))
    for config in (whole, stopped):
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{config.run_dir}-kernels"}
        expect_success(launch(tmp_path, pretrain_script([config], "", ""), ["python"], env=cache))
        assert [*Path(f"{config.run_dir}-kernels").rglob("*.so")], "nothing was compiled"
        if config is whole:
            as_if_stopped_after(SAVE_EVERY, whole, Path(stopped.run_dir))
    assert losses(stopped) == losses(whole) and held_out(stopped) == held_out(whole)
    model = Path("checkpoints") / f"step-{STEPS:08d}" / "model.safetensors"
    assert sha256_of(stopped.run_dir / model) == sha256_of(whole.run_dir / model)
    np.testing.assert_allclose(*([loss for _, loss, _ in losses(config)] for config in (whole, written)), rtol=1e-3)


def test_another_number_of_ranks_continues_the_run(finished_runs, resumed_runs, resuming_ranks):
    whole, resumed = finished_runs[3 - resuming_ranks, "fp32"], resumed_runs["elastic"]
    np.testing.assert_allclose([loss for _, loss, _ in losses(resumed)], [loss for _, loss, _ in losses(whole)], rtol=1e-4)
    assert f"training/optimizer-00000-of-{resuming_ranks:05d}.safetensors" in {
        path.relative_to(resumed.run_dir).as_posix().split("/", 2)[2] for path in Path(resumed.run_dir).rglob("*.safetensors")
    }


def test_a_finished_run_says_so_when_started_again(resumed_runs):
    assert resumed_runs["output"].count("This run is finished: 8 steps.") == len(RUNS) + 1


def test_each_step_is_logged_once(finished_runs, resumed_runs, resuming_ranks):
    for config in (finished_runs[resuming_ranks, "bf16"], resumed_runs["bf16"], resumed_runs["labels"]):
        assert [step for step, _, _ in losses(config)] == list(range(1, STEPS + 1))
        assert [step for step, _, _ in held_out(config)] == [0, SAVE_EVERY, STEPS]


@pytest.mark.parametrize(
    ("name", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2), ("distill", 1e-4), ("labels", 1e-2), ("mixture", 1e-2)]
)
def test_one_and_two_ranks_agree_in_loss(finished_runs, name, tolerance):
    one, two = (losses(finished_runs[ranks, name]) for ranks in (1, 2))
    np.testing.assert_allclose([loss for _, loss, _ in one], [loss for _, loss, _ in two], rtol=tolerance)


def test_every_launch_records_the_speed_that_it_expects(finished_runs, resumed_runs):
    launches = [event for config in (*finished_runs.values(), resumed_runs["mixture"]) for event in events(config, "started")]
    assert len(launches) > len(finished_runs) and all(event["planned_tokens_per_second"] > 0 for event in launches)


def test_the_log_of_a_mixture_says_how_often_each_source_is_read_and_its_held_out_loss(finished_runs, resumed_runs):
    runs = [finished_runs[ranks, "mixture"] for ranks in (1, 2)]
    for config in (*runs, resumed_runs["mixture"]):
        sources, lines = events(config, "started")[0]["sources"], metrics(config)
        assert [each["name"] for each in sources] == list(config.corpus)
        assert [each["quota"] for each in sources] == [8000, 4800, 3200]
        counts, rows = np.array([each["num_windows"] for each in sources]), config.num_tokens / config.context_length
        (train,) = (line for line in lines if line["kind"] == "train" and line["step"] == STEPS)
        assert np.abs(train["source_epochs"] * counts - rows * np.array(config.corpus_weights)).max() <= 1
        begun = [each for event in events(config, "repeats") for each in event["sources"]]
        assert [each["epoch"] for each in begun] == list(range(1, int(train["source_epochs"][0]) + 1))
        assert {each["name"] for each in begun} == {config.corpus[0]}
        for line in lines:
            if line["kind"] == "eval":
                by_source, weights = line["val_loss_by_source"], config.corpus_weights
                assert [*by_source] == list(config.corpus[1:]) == [*line["val_bits_per_byte_by_source"]]
                assert line["val_loss"] == pytest.approx(np.average([*by_source.values()], weights=weights[1:]))
    for kind, name in (("train", "source_epochs"), ("eval", "val_loss_by_source")):
        one, two = ([line[name] for line in metrics(config) if line["kind"] == kind] for config in runs)
        if kind == "train":
            assert one == two
        else:
            ours, theirs = ([[*line.values()] for line in lines] for lines in (one, two))
            np.testing.assert_allclose(ours, theirs, rtol=1e-2)


def test_the_loss_falls_and_held_out_loss_is_better_at_the_end(finished_run):
    assert losses(finished_run)[-1][1] < losses(finished_run)[0][1] - 1
    assert held_out(finished_run)[-1][1] < held_out(finished_run)[0][1] - 1


def test_a_run_directory_holds_what_the_design_names(finished_run):
    names = {path.name for path in Path(finished_run.run_dir).iterdir()}
    assert names == {"config.json", "metrics.jsonl", "loss.png", "report.html", "tensorboard", "checkpoints", "best"}


def test_the_train_line_has_the_fields_of_the_contract(finished_run):
    line = next(line for line in metrics(finished_run) if line["kind"] == "train")
    assert list(line) == [
        "kind", "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "gpu_peak_gib",
        "host_peak_gib", "tokens_hash", "windows_hash", "crossing_share", "seconds_by_part",
    ]  # fmt: skip
    assert line["tokens"] == finished_run.tokens_per_step


def test_the_train_line_says_which_share_of_the_steps_windows_crosses_documents(finished_runs):
    """Whether they are masked or not; over all ranks."""
    for ranks, name in product((1, 2), PRECISIONS):
        config = finished_runs[ranks, name]
        data, length = prepare(config), config.context_length
        for line in (line for line in metrics(config) if line["kind"] == "train"):
            step, rows = line["step"] - 1, config.rows_of_step(line["step"] - 1)
            share = {"step": step, "rank": 0, "world_size": 1, "micro_batch_rows": rows}
            (batch,) = micro_batches(data.train, data_order(config, data), **share)
            crossing = [256 in row[: length - 1] for row in batch.ids.tolist()]
            assert line["crossing_share"] == sum(crossing) / rows
        assert any(line.get("crossing_share") for line in metrics(config))


@pytest.mark.parametrize("name", ["fp32", "mixture"])
def test_logs_and_checkpoints_count_the_tokens_of_steps_that_grow(finished_runs, resumed_runs, name):
    due = np.cumsum([0, 128, 128, 256, 256, 384, 384, 512, 512]).tolist()
    for config in (finished_runs[1, name], finished_runs[2, name], resumed_runs[name]):
        lines = [line for line in metrics(config) if line["kind"] in ("train", "eval")]
        assert [line["tokens"] for line in lines] == [due[line["step"]] for line in lines]
        for line in (line for line in lines if line["kind"] == "train"):
            step = line["step"]
            assert line["tokens_per_second"] * line["seconds"] == pytest.approx(due[step] - due[step - 1])
            assert line["learning_rate"] == learning_rate_at(step - 1, config)
        for folder in (Path(config.run_dir) / "checkpoints").iterdir():
            state = json.loads((folder / "training" / "state.json").read_text())
            assert state["tokens"] == due[state["step"]]


def test_the_bar_on_a_terminal_counts_tokens_so_that_the_time_left_is_that_of_growing_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    config = tiny_config(tmp_path, run_dir=str(tmp_path), **GROWING)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, local_size=1, num_launchers=1)
    run = Run(config, ranks, torch.device("cpu"), None, None, 2, Progress(), ended_watch(), None, None)
    line = {"kind": "train", "step": STEPS, "tokens": config.num_tokens, "loss": 2.0, "tokens_per_second": 9.0}
    with reporting(run) as report:
        report(line | {"grad_norm": 1.0, "learning_rate": 0.1})
    assert config.num_tokens < STEPS * config.tokens_per_step
    shown = capsys.readouterr().err
    assert f"step {STEPS}/{STEPS}, loss" in shown and f"{config.tokens_before(2) / config.num_tokens:.0%}|" in shown
    assert "100%|" in shown


@pytest.mark.slow
def test_a_run_continued_with_less_of_the_card_reads_the_same_tokens_and_differs_by_rounding(tmp_path):
    whole, moved = (tiny_config(tmp_path, run_dir=str(tmp_path / name), precision="fp32") for name in ("whole", "moved"))
    stop = "after = trainer.advance\ntrainer.advance = lambda *known: (os.kill(os.getpid(), 10), after(*known))[1]"
    expect_success(launch(tmp_path, training_script(whole, ""), ["python"]))
    launch(tmp_path, training_script(moved, stop), ["python"])
    less = replace(moved, micro_batch_rows=1, activation_checkpointing="block_offload", loss_chunk_rows=7, accumulate_on="gpu")
    expect_success(launch(tmp_path, training_script(less, ""), ["python"]))
    ours, theirs = ([line for line in metrics(config) if line["kind"] == "train"] for config in (moved, whole))
    assert [line["tokens_hash"] for line in ours] == [line["tokens_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


def logged(config) -> list[tuple]:
    names = ("kind", "step", "loss", "grad_norm", "learning_rate", "tokens_hash", "windows_hash", "val_loss")
    return [tuple(line.get(name) for name in names) for line in metrics(config) if line["kind"] != "event"]


def events(config, name: str) -> list[dict]:
    return [line for line in metrics(config) if line.get("event") == name]


def final_hashes(config) -> dict[str, str]:
    folder = newest_folder(config)
    assert folder is not None and find_fault(folder) is None
    names = ("model.safetensors", "training/optimizer-00000-of-00001.safetensors")
    return {name: sha256_of(folder / name) for name in names}


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
        (storage, "write_blocks", 20), (checkpoint, "publish", 2), (checkpoint, "prune", 2), (os, "fsync", 30),
        (checkpoint, "delete", 3), (checkpoint, "read_back", 2),
    ])
    setattr(module, name, dying(getattr(module, name), chance.randrange(calls)))
elif chance.random() < 0.7:
    started = threading.Timer(chance.uniform(0.0, 1.0), die)
    begin = trainer.log_start
    trainer.log_start = lambda *arguments: (started.start(), begin(*arguments))
else:
    threading.Timer(chance.uniform(0.0, 4.0), die).start()
"""


@pytest.mark.slow
@all_cores()
def test_killed_twenty_times_anywhere_the_run_is_bitwise_the_uninterrupted_one(tmp_path):
    short = {"optimizer": "muon", "optimizer_state_precision": "bf16"}
    alone = tiny_config(tmp_path, num_steps=KILLED_STEPS, save_every_steps=3, eval_every_steps=5, keep_checkpoints=2, **short)
    config = tiny_mixture(alone, run_dir=str(tmp_path / "whole"))
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
    kept = [folder.name for folder in sorted((Path(killed.run_dir) / "checkpoints").iterdir())]
    assert kept == sorted({*kept[-2:], (Path(killed.run_dir) / "best").resolve(strict=True).name})


ELASTIC_STEPS = 24
ELASTIC = """
import json, os, signal
from scripts import trainer
from scripts.engine import watch
from scripts.config import TrainingConfig
from scripts.prepare_data import prepare
from scripts.train_distill import from_labels, label
from scripts.model.losses import next_token

stop_after = {stop_after}

def stopping(*everything):
    if run.watch.step == stop_after and run.ranks.rank == run.ranks.world_size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return (next_token if everything[-1].teacher_dir is None else from_labels)(*everything)

if __name__ == "__main__":
    for fields in json.loads({described!r}):
        fields = {{name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}}
        run = trainer.set_up(TrainingConfig(**fields), prepare, label)
        try:
            trainer.train(run, stopping)
        except SystemExit as left:
            assert left.code == 75
    watch.end(0)
"""


def elastic_configs(folder: Path, name: str, teacher: TrainingConfig) -> list:
    changes: dict = dict(num_steps=ELASTIC_STEPS, save_every_steps=100, eval_every_steps=12)
    places = {kind: str(folder / f"{name}-{kind}") for kind in PRECISIONS}
    short = {"mask_across_documents": True, "optimizer": "muon", "optimizer_state_precision": "bf16"}
    ways = {"fp32": GROWING | {"batch_warmup_steps": 20}, "bf16": short}
    alone = [tiny_config(folder, run_dir=place, precision=kind, **changes, **ways[kind]) for kind, place in places.items()]
    teacher = replace(alone[0], run_dir=teacher.run_dir)
    student, mixed = (tiny_student(teacher, "labels", folder / f"{name}-{kind}") for kind in ("labels", "mixture"))
    muon = replace(alone[0], run_dir=str(folder / f"{name}-muon"), optimizer="muon", learning_rate=3e-3)
    return [*alone, student, tiny_mixture(mixed), muon]


def launch_elastic(folder: Path, configs: list, ranks: int, stop_after: int | None) -> None:
    code = ELASTIC.format(described=json.dumps([asdict(config) for config in configs]), stop_after=stop_after)
    expect_success(launch(folder, code, TORCHRUN[ranks]))


@pytest.fixture(scope="module")
def elastic_runs(finished_runs, tmp_path_factory) -> tuple[list, list]:
    """Some steps on one rank, and the same on one, two and again one rank; in each precision, from labels, of a mixture, and
    under Muon, also with 16-bit moments. In all but bf16 steps grow, and both changes come amid that.
    """
    folder = tmp_path_factory.mktemp("elastic")
    whole, moved = (elastic_configs(folder, name, finished_runs[1, "fp32"]) for name in ("whole", "moved"))
    launch_elastic(folder, whole, 1, None)
    for ranks, stop_after in ((1, 8), (2, 16), (1, None)):
        launch_elastic(folder, moved, ranks, stop_after)
    return whole, moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "tolerance"), [(0, 1e-4), (1, 1e-2), (2, 1e-2), (3, 1e-2), (4, 1e-4)], ids=(*PRECISIONS, *RUNS[3:], "muon")
)
def test_one_two_and_one_rank_make_the_run_of_one(elastic_runs, number, tolerance):
    whole, moved = (runs[number] for runs in elastic_runs)
    assert [event["ranks"] for event in events(moved, "started")] == [1, 2, 1]
    assert [event["step"] for event in events(moved, "started")] == [0, 8, 16]
    for name in ("tokens_hash", "windows_hash", "step", "tokens", "learning_rate"):
        ours, theirs = ([line[name] for line in metrics(run) if line["kind"] == "train"] for run in (moved, whole))
        assert ours == theirs, name
    np.testing.assert_allclose([row[1] for row in losses(moved)], [row[1] for row in losses(whole)], rtol=tolerance)
    np.testing.assert_allclose([row[1] for row in held_out(moved)], [row[1] for row in held_out(whole)], rtol=tolerance)
    assert prove(Path(moved.run_dir))


def test_the_log_of_every_run_proves_that_no_window_was_skipped_or_read_twice(finished_runs, resumed_runs, resuming_ranks):
    for config in (
        finished_runs[resuming_ranks, "bf16"],
        *(resumed_runs[name] for name in ("bf16", "labels", "mixture", "elastic")),
    ):
        assert prove(Path(config.run_dir))


def test_nothing_of_a_finished_run_is_left_in_its_process(finished_runs, num_ranks):
    """Four runs in turn, with and without a teacher: a fifth would have all the memory."""
    folder = Path(finished_runs[num_ranks, "fp32"].run_dir).parent
    assert [(folder / f"left-{rank}").read_text() for rank in range(num_ranks)] == [""] * num_ranks


def test_another_number_of_ranks_reads_the_same_tokens_in_each_step(finished_runs):
    hashes = [
        [line["tokens_hash"] for line in metrics(finished_runs[ranks, "fp32"]) if line["kind"] == "train"] for ranks in (1, 2)
    ]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == STEPS


def poisoned_steps(config) -> list[int]:
    data, share = prepare(config), {"rank": 0, "world_size": 1, "micro_batch_rows": config.rows_per_step}
    order = data_order(config, data)
    batches = [next(micro_batches(data.train, order, step=step, **share)) for step in range(config.num_steps)]
    return [step + 1 for step, batch in enumerate(batches) if (batch.ids == POISON).any()]


def test_a_micro_batch_that_is_not_finite_is_skipped_counted_and_its_document_named(exact_runs):
    config, output = exact_runs.poisoned, exact_runs.output
    skipped = events(config, "skipped")
    assert [event["step"] for event in skipped] == poisoned_steps(config) != []
    assert [event["skipped_steps"] for event in skipped] == list(range(1, len(skipped) + 1))
    for event in skipped:
        assert any(document["beginning"].startswith("poison: ") for document in event["documents"])
        assert f"step {event['step']}/{POISONED_STEPS}: skipped" in output


def test_a_skipped_step_keeps_the_schedule_the_count_of_tokens_and_the_weights(exact_runs):
    config = exact_runs.poisoned
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


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint_named(tmp_path):
    config = tiny_config(tmp_path, num_steps=40, max_skipped_steps=3)
    (result,) = launch(tmp_path, training_script(config, OVERFLOWING), ["python"])
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    assert "failed: 3 steps in a row up to step 8" in result.stdout
    assert f"the last good checkpoint is {newest_folder(config)}" in result.stdout
    assert [event["step"] for event in events(config, "skipped")] == [6, 7, 8]


HALF = """
from deepspeed.accelerator import get_accelerator
from scripts.run import setup
get_accelerator().is_fp16_supported = lambda: True  # float16 on a CPU is slow, not wrong
setup.refuse_on_this_device = lambda *_: None
calls, steps = [], {steps}

def objective(engine, windows, config):
    calls.append(1)
    loss, step = next_token(engine, windows, config), (len(calls) - 1) // 8
    return loss * float("inf") if step == 4 else loss + {factor} * (loss - loss.detach()) if step in steps else loss
"""


@pytest.fixture(scope="module")
def half_runs(tmp_path_factory) -> tuple[TrainingConfig, TrainingConfig, str]:
    """Two fp16 runs of eight steps, the second one stopped after four; step 3 overflows with finite losses, step 5 without."""
    folder = tmp_path_factory.mktemp("half")
    whole = tiny_config(folder, precision="fp16", run_dir=str(folder / "whole"), eval_every_steps=None)
    stopped = replace(whole, run_dir=str(folder / "stopped"))
    (result,) = launch(folder, training_script(whole, HALF.format(steps=(2,), factor=1e9)), ["python"])
    assert result.returncode == 0, result.stdout
    as_if_stopped_after(4, whole, folder / "stopped")
    again = HALF.format(steps=(), factor=1.0).replace("step == 4", "step == 0")
    (resumed,) = launch(folder, training_script(stopped, again), ["python"])
    assert resumed.returncode == 0, resumed.stdout
    return whole, stopped, result.stdout


@pytest.mark.slow
def test_an_overflow_of_fp16_with_finite_losses_names_the_loss_scale_and_no_document(half_runs):
    whole, _, output = half_runs
    natural, skipped = [3, 5], {event["step"]: event for event in events(whole, "skipped")}
    assert set(natural) <= set(skipped)
    assert all(event["cause"] == "the loss scale" and not event["documents"] for step, event in skipped.items() if step != 5)
    assert "cause" not in skipped[5] and skipped[5]["documents"]
    assert "step 3/8: skipped, the loss scale was too high" in output


@pytest.mark.slow
def test_a_run_in_fp16_continues_bitwise_with_its_loss_scale(half_runs):
    whole, stopped, _ = half_runs
    folders = [newest_folder(config) for config in (whole, stopped)]
    weights = [load_file(folder / "model.safetensors") for folder in folders if folder is not None]
    assert len(weights) == 2 and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(whole) == losses(stopped)


def test_a_loss_spike_names_the_garbage_that_was_planted(exact_runs):
    spikes = events(exact_runs.garbage, "spike")
    assert spikes, exact_runs.output
    for event in spikes:
        assert event["documents"][0]["beginning"].startswith("garbage "), event
        assert f"step {event['step']}/{GARBAGE_STEPS}: the loss jumped to" in exact_runs.output
