"""Laws of what comes before step one: refusals, where a run starts from, and what the README promises of a run."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
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
    all_cores,
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
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.rendezvous import rendezvous
from transformers import AutoModelForCausalLM

from scripts.config import TrainingConfig
from scripts.engine.distributed import Ranks, card_index, ranks_from_launcher, refuse_shared_cards
from scripts.engine.offload import keep_to_device
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
    changes = {"micro_batch_rows": 1, "activation_checkpointing": "block", "loss_chunk_rows": 7, "compile_kernels": "gpu"}
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


def test_a_process_without_a_launcher_holds_the_port_that_it_names(monkeypatch):
    """Nobody else can take it before the process group meets there: each store that the process asks for is the one held."""
    kept = {name: value for name, value in os.environ.items() if name != "RANK" and not name.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", kept)
    assert ranks_from_launcher()[:2] == (0, 1)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int(kept["MASTER_PORT"])))
    first, second = (next(rendezvous("env://"))[0] for _ in range(2))
    first.set("said by", "the first")
    assert second.get("said by") == b"the first"


FLAGS = ["srun --ntasks-per-node", "torchrun --nproc-per-node", "deepspeed --num_gpus"]


@pytest.mark.parametrize(("num_launchers", "num_cards", "local_size"), [*product(range(3), (1, 2, 8), (1, 2, 8, 16))])
def test_each_rank_of_a_machine_has_a_card_of_its_own_or_those_without_are_refused(num_launchers, num_cards, local_size):
    """Where a process sees one card and no launcher of torch's or DeepSpeed's says that all see the same, it is its own."""
    has_its_own, refused = num_cards == 1 and num_launchers == 0, set()
    for local_rank in range(local_size):
        try:
            index = card_index(Ranks(local_rank, local_size, local_rank, local_size, num_launchers), num_cards)
            assert index == (0 if has_its_own else local_rank)
        except ValueError as refusal:
            refused.add(str(refusal))
            assert local_rank >= num_cards
    if has_its_own or local_size <= num_cards:
        assert not refused
        return
    cards, flag = "1 GPU" if num_cards == 1 else f"{num_cards} GPUs", FLAGS[num_launchers]
    words = f"{local_size} ranks on one machine see {cards} and each needs its own"
    assert refused == {f"{words}; nearest is {num_cards} ({flag} {num_cards})"}


def test_a_launcher_that_does_not_say_how_many_ranks_it_started_is_told_of_as_many_as_are_known():
    with pytest.raises(ValueError, match="^4 ranks on one machine see 2 GPUs "):
        card_index(Ranks(3, 4, 3, 1, 0), 2)


def test_deepspeed_takes_the_card_that_is_the_ranks_whatever_its_local_rank(monkeypatch):
    """As DeepSpeed's init_process_group and engine ask for it, of the third task of a machine that sees one card."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 + device.index, 10))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    accelerator, device = CUDA_Accelerator(), torch.device("cuda", 0)
    keep_to_device(accelerator, device)
    accelerator.set_device(2)
    assert accelerator.device(2) == torch.device(accelerator.device_name(2)) == device and chosen == [device]
    assert accelerator.device_name() == "cuda" and accelerator.available_memory(2) == 5


@given(st.lists(st.sampled_from(["one GPU-1", "one GPU-2", "two GPU-1", "two GPU-3"]), min_size=2, max_size=4))
def test_two_ranks_on_one_card_are_refused_in_one_line_by_all(cards):
    if len(set(cards)) == len(cards):
        return refuse_shared_cards(cards)
    pairs = [(first, second) for second in range(len(cards)) for first in range(second) if cards[first] == cards[second]]
    with pytest.raises(ValueError, match=rf"^ranks {pairs[0][0]} and {pairs[0][1]} have the same GPU; [^\n]+$"):
        refuse_shared_cards(cards)


ENTRY = """
import scripts.config, json
from scripts.config import TrainingConfig
fields = json.loads({fields!r})
fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
scripts.config.PRETRAIN = TrainingConfig(**fields)
from scripts import train_pretrain
train_pretrain.main()
"""


@pytest.mark.slow
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
import socket
print(f"sees {os.environ['CUDA_VISIBLE_DEVICES']!r}")
from scripts import prepare_data
whole = prepare_data.prepare

def prepare(config):
    if os.environ["RANK"] == "1":
        raise ValueError("the disk of this machine holds no shards")
    return whole(config)

prepare_data.prepare = prepare
"""


@pytest.fixture(scope="module")
def one_rank_refused(tmp_path_factory) -> subprocess.CompletedProcess:
    folder = tmp_path_factory.mktemp("one_rank_refused")
    (result,) = launch(folder, ONE_RANK_REFUSED + ENTRY.format(fields=json.dumps(asdict(tiny_config(folder)))), LAUNCHERS[2])
    return result


@pytest.mark.slow
def test_one_rank_alone_that_is_refused_says_why_and_the_deepspeed_launcher_passes_status_2_on(one_rank_refused):
    refusal = [line for line in one_rank_refused.stdout.splitlines() if line.startswith("refused: ")]
    assert one_rank_refused.returncode == 2, one_rank_refused.stdout
    assert refusal == ["refused: rank 1: the disk of this machine holds no shards"], one_rank_refused.stdout


@pytest.mark.slow
def test_launched_ranks_see_no_gpu(one_rank_refused):
    """Without `-m gpu`: two ranks must pass on a machine with one card. DeepSpeed's launcher sets the variable anew."""
    assert one_rank_refused.stdout.count("sees ''") == 2, one_rank_refused.stdout
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


BOUND_TO_CORES = """
import os
import resource
import torch
from scripts.config import PRETRAIN
from scripts.engine import distributed

ranks, cores = distributed.ranks_from_launcher(), sorted(os.sched_getaffinity(0))[:2]
with distributed.leaving():
    os.sched_setaffinity(0, cores[ranks.rank :])
    distributed.join(PRETRAIN, ranks)
    print(f"rank {ranks.rank} has {torch.get_num_threads()} threads\\n", end="", flush=True)
    for turn in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for step in range(3):
            made = [torch.ones(6 * 2**20) for _ in range(6)]
            made.clear()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before  # else 110,000
    print("no memory is asked for anew\\n" if faults < 20_000 else f"{faults} faults\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_a_rank_uses_all_cores_that_its_launcher_gave_it_alone_and_keeps_the_memory_of_its_last_step(tmp_path):
    with all_cores():
        results = launch(tmp_path, BOUND_TO_CORES, TORCHRUN[2])
    output = expect_success(results)
    assert sorted(line for line in output.splitlines() if line.startswith("rank ")) == [
        "rank 0 has 2 threads",
        "rank 1 has 1 threads",
    ]
    assert output.count("no memory is asked for anew") == 2, output


SLOW_FIRST_RANK = """
import time
from datetime import timedelta
import torch
from scripts.config import PRETRAIN
from scripts.engine.distributed import in_turn, leaving, ranks_from_launcher

def work():
    began.append(ranks.rank)
    if ranks.rank == 0 and len(began) == 1:
        time.sleep(20)
    return ranks.rank

ranks, began = ranks_from_launcher(), []
with leaving():
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=15))
    for turn in range(2):
        assert in_turn(work, PRETRAIN, ranks) == ranks.rank
    print(f"rank {ranks.rank} is well", flush=True)
"""


@pytest.mark.slow
def test_ranks_wait_for_the_first_longer_than_the_process_group_would(tmp_path):
    (result,) = launch(tmp_path, SLOW_FIRST_RANK, TORCHRUN[2])
    assert result.returncode == 0 and result.stdout.count("is well") == 2, result.stdout


# torch says that there is one card on this machine, first an old one; what would run on it is not reached.
ONE_CARD = """
import os, types
import torch
from scripts import trainer

def show(name, major, minor, num_cards):
    card = types.SimpleNamespace(name=name, major=major, minor=minor)
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: num_cards
    torch.cuda.get_device_properties, torch.cuda.get_arch_list = lambda _: card, lambda: ["sm_75", "sm_80", "sm_90"]
    torch.cuda.mem_get_info = lambda _: (2**36, 2**36)
"""
TWICE = """
for name, major, minor, num_cards in (("Tesla V100", 7, 0, 2), ("H100", 9, 0, 1)):
    show(name, major, minor, num_cards)
    try:
        train_pretrain.main()
    except SystemExit as left:
        with open(f"left-{os.environ['RANK']}", "a") as file:
            file.write(str(left.code))
"""


@pytest.mark.slow
def test_a_rank_is_refused_before_the_ranks_have_met_for_its_card_or_for_none(tmp_path):
    """Where one rank alone has no card, that one's words are said."""
    entry = ENTRY.format(fields=json.dumps(asdict(tiny_config(tmp_path)))).replace("train_pretrain.main()\n", TWICE)
    (result,) = launch(tmp_path, ONE_CARD + entry, TORCHRUN[2])
    old, too_many = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert old.startswith("refused: Tesla V100 has compute capability 7.0 and torch ") and "a card of 7.5 or newer" in old
    assert too_many == (
        "refused: rank 1: 2 ranks on one machine see 1 GPU and each needs its own; nearest is 1 (torchrun --nproc-per-node 1)"
    )
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["22", "22"], result.stdout
    assert "Traceback" not in result.stdout, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare_data", "generate"])
def test_a_ctrl_c_ends_a_command_in_one_line(name, tmp_path):
    """Interrupted where its work begins. Neither command loads DeepSpeed, which would say a line of its own."""
    code = f"""
import os, signal
from scripts import {name}
{name}.{"prepare" if name == "prepare_data" else "verified_folder"} = lambda _: os.kill(os.getpid(), signal.SIGINT)
{name}.main()
"""
    (result,) = launch(tmp_path, code, ["python"])
    assert result.returncode == 130 and result.stdout == "Stopped; the same command begins again\n", result.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_engine_that_loses_micro_batches_is_refused_before_the_first_step(tmp_path):
    """The fault of DeepSpeed's issue 6550, mended by its pull request 7967: all but the first and the last were dropped."""
    config = tiny_config(tmp_path, precision="fp32")
    (result,) = launch(tmp_path, training_script(config, LOSING, unchecked=""), ["python"])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "update" in refusal[0], result.stdout
    assert "Traceback" not in result.stdout and not Path(config.run_dir).exists()


@pytest.mark.slow
def test_a_run_works_without_home_and_in_folders_with_spaces(tmp_path):
    folder = tmp_path / "a folder" / "of mine"
    config = tiny_config(folder, num_steps=1, warmup_steps=0)
    output = expect_success(launch(folder, training_script(config, ""), ["env", "-u", "HOME", *LAUNCHERS[1]]))
    assert "Finished: 1 steps" in output and newest_folder(config) is not None
