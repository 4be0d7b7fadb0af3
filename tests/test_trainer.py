"""Laws of the engine and the loop, on real DeepSpeed with one and two ranks and every launcher."""

import json
import os
import shutil
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
    SAVE_EVERY,
    STEPS,
    as_if_stopped_after,
    clean_environment,
    expect_success,
    launch,
    metrics,
    pretrain_script,
    tiny_config,
)
from safetensors import safe_open
from safetensors.torch import load_file

from ds.loader import micro_batches
from scripts.checkpoint import file_sha256, refuse_other_run
from scripts.model import empty_model, initialise, parameter_groups
from scripts.prepare_data import prepare
from scripts.trainer import learning_rate_at, ranks_from_launcher

EXACT_STEPS = 6
TORCHRUN = {
    1: ["torchrun", "--nproc-per-node", "1", "--master-port", "{port}"],
    2: ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"],
}
STEP_SCRIPT = """
import hashlib, json
from dataclasses import replace
from safetensors.torch import save_file
from scripts import trainer
from scripts.config import TrainingConfig
from scripts.prepare_data import prepare
from scripts.train_pretrain import next_token

if __name__ == "__main__":
    for fields in json.loads({described!r}):
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude")}}
        config = TrainingConfig(**fields)
        run = trainer.ready(config, prepare)
        losses = [trainer.run_step(run, next_token, step) for step in range({steps})]
        if run.ranks.rank == 0:
            weights = {{name: weight.detach().clone() for name, weight in run.engine.module.named_parameters()}}
            save_file(weights, config.run_dir + ".safetensors", {{"losses": json.dumps(losses)}})
    trainer.leave()
"""


def exact_configs(folder: Path, ranks: int) -> list:
    """Accumulation over 1, 4 and 8 micro-batches of 2 rows of 32 tokens on each rank, with tied and untied heads."""
    return [
        tiny_config(
            folder, run_dir=str(folder / f"{accumulation}-tied{tied}"), precision="fp32", tie_embeddings=tied,
            tokens_per_step=64 * ranks * accumulation, max_grad_norm=0.5, learning_rate=1e-3, min_learning_rate=1e-4,
        )
        for accumulation in (1, 4, 8) for tied in (True, False)
    ]  # fmt: skip


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
        windows = torch.from_numpy(batch)
        logits = torch.nn.functional.linear(model(windows[:, :-1]), model.head)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), losses


def launch_exact(folder: Path, ranks: int) -> list:
    """One rank under srun's variables; two ranks as two machines, each a torchrun agent on the loopback address."""
    configs = exact_configs(folder, ranks)
    code = STEP_SCRIPT.format(described=json.dumps([asdict(config) for config in configs]), steps=EXACT_STEPS)
    if ranks == 1:
        slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
        expect_success(launch(folder, code, ["python"], env=slurm | {"MASTER_PORT": "{port}"}))
        return configs
    agent = ["torchrun", "--nnodes", "2", "--node-rank", "{index}", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    expect_success(launch(folder, code, [*agent, "--master-port", "{port}"], num_processes=2))
    return configs


def test_zero_offload_with_accumulation_equals_plain_adamw(num_ranks, tmp_path):
    for config in launch_exact(tmp_path, num_ranks):
        weights, losses = plain_adamw(config)
        ours = load_file(config.run_dir + ".safetensors")
        assert ours.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-6, msg=lambda text, where=name: f"{where}: {text}")
        with safe_open(config.run_dir + ".safetensors", "pt") as file:
            np.testing.assert_allclose(json.loads(file.metadata()["losses"]), losses, rtol=1e-5)


@pytest.fixture(scope="module")
def resumed_runs(finished_runs, num_ranks, tmp_path_factory) -> dict:
    """Runs that stopped after the first save, continued by a fresh launch; "elastic" was begun by another number of ranks."""
    folder = tmp_path_factory.mktemp(f"resumed{num_ranks}")
    copies = {name: as_if_stopped_after(SAVE_EVERY, finished_runs[num_ranks, name], folder / name) for name in PRECISIONS}
    copies["elastic"] = as_if_stopped_after(SAVE_EVERY, finished_runs[3 - num_ranks, "fp32"], folder / "elastic")
    again = "        pretrain(TrainingConfig(**fields))"
    output = expect_success(launch(folder, pretrain_script(list(copies.values()), again), TORCHRUN[num_ranks]))
    return {"output": output, **copies}


def losses(config) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(config) if line["kind"] == "train"]


def held_out(config) -> list[tuple]:
    return [(line["step"], line["val_loss"], line["val_bits_per_byte"]) for line in metrics(config) if line["kind"] == "eval"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_bitwise_the_uninterrupted_run(finished_runs, resumed_runs, num_ranks, precision):
    whole, resumed = finished_runs[num_ranks, precision], resumed_runs[precision]
    assert losses(resumed) == losses(whole)
    assert held_out(resumed) == held_out(whole)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    names = ["model.safetensors", *(f"training/optimizer-{r:05d}-of-{num_ranks:05d}.safetensors" for r in range(num_ranks))]
    for name in names:
        assert file_sha256(resumed.run_dir / last / name) == file_sha256(whole.run_dir / last / name), name


def test_another_number_of_ranks_continues_the_run(finished_runs, resumed_runs, num_ranks):
    whole, resumed = finished_runs[3 - num_ranks, "fp32"], resumed_runs["elastic"]
    np.testing.assert_allclose([loss for _, loss, _ in losses(resumed)], [loss for _, loss, _ in losses(whole)], rtol=1e-4)
    assert f"training/optimizer-00000-of-{num_ranks:05d}.safetensors" in {
        path.relative_to(resumed.run_dir).as_posix().split("/", 2)[2] for path in Path(resumed.run_dir).rglob("*.safetensors")
    }


def test_a_finished_run_says_so_when_started_again(resumed_runs):
    assert resumed_runs["output"].count("This run is finished: 8 steps.") == 3


def test_each_step_is_logged_once(finished_runs, resumed_runs, num_ranks):
    for config in (finished_runs[num_ranks, "bf16"], resumed_runs["bf16"]):
        assert [step for step, _, _ in losses(config)] == list(range(1, STEPS + 1))
        assert [step for step, _, _ in held_out(config)] == [0, SAVE_EVERY, STEPS]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_one_and_two_ranks_agree_in_loss(finished_runs, precision, tolerance):
    one, two = (losses(finished_runs[ranks, precision]) for ranks in (1, 2))
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
        "host_peak_gib",
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
    assert ranks_from_launcher() == (9, 16, 1, 8)
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
