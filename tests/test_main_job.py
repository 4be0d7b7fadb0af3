"""The main job as a new user does it: text in, a trained model out, by the README's commands. Slow."""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import HIDE_GPUS, REPOSITORY, clean_environment, free_port
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ds import tokenizer as bpe

LIMIT_SECONDS = 3600
pytestmark = pytest.mark.slow


def shell(command: str, folder: Path, text: str = "") -> subprocess.CompletedProcess:
    environment = clean_environment() | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, input=text, text=True, capture_output=True, timeout=LIMIT_SECONDS
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str, float]:
    """A copy of the repository in which the main job has run: folder, printed lines, seconds."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("ds", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / "scripts" / "__init__.py").write_text(HIDE_GPUS)
    (folder / "tests" / "benchmarks").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "benchmarks" / "distill_smollm2.py", folder / "tests" / "benchmarks")
    started = time.monotonic()
    result = shell("deepspeed scripts/train_pretrain.py", folder)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return folder, result.stdout, time.monotonic() - started


def test_the_main_job_ends_in_time(trained):
    """Minutes on an idle machine; the limit only tells work that hangs from work on a slow machine."""
    assert trained[2] < LIMIT_SECONDS


def test_it_tells_held_out_loss_before_and_after_and_the_loss_fell(trained):
    before, after = (float(bits) for bits in re.findall(r"held out (?:before|after): .*, (\S+) bits per byte", trained[1]))
    assert before > 3 and after < 2.1


ALL_THAT_IS_HELD_OUT = """
import torch
from pathlib import Path
from scripts.config import PRETRAIN
from scripts.engine.distributed import Ranks
from scripts.model.decoder import empty_model
from scripts.model.huggingface import load_weights
from scripts.prepare_data import prepare
from scripts.run.evaluate import evaluate, held_out_windows

data, model = prepare(PRETRAIN), empty_model(PRETRAIN, torch.device("cpu"))
load_weights(model, max(Path(PRETRAIN.run_dir, "checkpoints").iterdir()))
windows = held_out_windows(PRETRAIN, Ranks(0, 1, 0, 1, 0), data, data.validation.num_tokens)
found = evaluate(model, windows, torch.tensor(data.token_num_bytes()), PRETRAIN.loss_chunk_rows)
print("all that is held out:", found.bits_per_byte)
"""


def test_it_learns_to_1_82_bits_per_byte_of_all_that_is_held_out(trained):
    result = shell(f"python -c '{ALL_THAT_IS_HELD_OUT}'", trained[0])
    assert result.returncode == 0, result.stderr
    bits = float(re.findall(r"all that is held out: (\S+)", result.stdout)[-1])
    print(f"{bits:.4f} bits per byte")
    assert bits <= 1.82


def test_its_sample_looks_like_python(trained):
    sample = trained[1][trained[1].rindex("sample:") :]
    assert "def " in sample and ("self" in sample or "return" in sample or "if " in sample)


def test_its_checkpoint_opens_in_transformers(trained):
    folder = trained[0] / re.findall(r"checkpoint \(opens in transformers\): (\S+)", trained[1])[-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = tokenizer("import os\nimport sys\n", return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < 5


def test_its_picture_is_there(trained):
    assert imread(trained[0] / "runs/pretrain/loss.png").shape[0] > 500


def test_the_next_command_continues_a_prompt(trained):
    command = re.findall(r"next: (.*)", trained[1])[-1]
    result = shell(command, trained[0])
    assert result.returncode == 0 and result.stdout.startswith("def") and len(result.stdout) > 100, result.stderr


@pytest.fixture(scope="module")
def distilled(trained) -> tuple[str, float]:
    """What distillation prints where the main job has run, and its seconds."""
    started = time.monotonic()
    result = shell("deepspeed scripts/train_distill.py", trained[0])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout, time.monotonic() - started


def test_distillation_from_the_main_jobs_model_ends_in_time_with_a_table(trained, distilled):
    assert distilled[1] < LIMIT_SECONDS
    rows = {row.split()[0]: row.split() for row in distilled[0][distilled[0].rindex("held out  ") :].splitlines()[1:3]}
    teacher, student = (float(rows[name][4]) for name in ("teacher", "student"))
    assert student < 1.1 * teacher
    assert rows["teacher"][-1].startswith("runs/pretrain/checkpoints/step-") and rows["student"][-1] == "runs/distill"


def test_the_student_is_smaller_and_opens_in_transformers(trained, distilled):
    folders = [
        re.findall(r"checkpoint \(opens in transformers\): (\S+)", printed)[-1] for printed in (trained[1], distilled[0])
    ]
    teacher, student = (AutoModelForCausalLM.from_pretrained(trained[0] / folder) for folder in folders)
    assert student.num_parameters() < teacher.num_parameters()


README = (REPOSITORY / "README.md").read_text()
PROGRAMS = ("deepspeed", "echo", "pip", "python", "srun", "torchrun")
# Several machines, and Slurm, are not here. `pytest` is what runs this.
NOT_HERE = ("--hostfile", "--nnodes", "srun", "pytest")


def commands_of_the_readme() -> list[str]:
    """Every command in a block of its own, without what installs."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", README, re.S | re.M)
    words = "\n".join(block for language, block in blocks if language in ("", "bash"))
    lines = [line.strip() for line in words.splitlines() if line.strip().split(" ")[0] in PROGRAMS]
    return list(dict.fromkeys(line.split(" && ")[-1] for line in lines))


COMMANDS = [command for command in commands_of_the_readme() if not any(word in command for word in NOT_HERE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works_as_it_is_written(trained, distilled, command):
    result = shell(command, trained[0], "def")
    assert result.returncode == 0 and result.stdout.strip(), result.stdout + result.stderr
    assert "train_pretrain" not in command or "This run is finished" in result.stdout


def test_machines_meet_by_the_readmes_torchrun_with_one_rank_on_each(trained):
    (command,) = [each for each in commands_of_the_readme() if "--nnodes 2" in each and each.startswith("torchrun")]
    here = {"node1": "127.0.0.1", "29500": str(free_port()), "--nproc-per-node 8": "--nproc-per-node 1"}
    for written, meant in here.items():
        assert written in command
        command = command.replace(written, meant)
    with ThreadPoolExecutor(2) as machines:
        run = [machines.submit(shell, command.replace("--node-rank 0", f"--node-rank {each}"), trained[0]) for each in (0, 1)]
    first, second = (each.result() for each in run)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "This run is finished" in first.stdout and "This run is finished" not in second.stdout


SNIPPETS = re.findall(r"```python\n((PRETRAIN|DISTILL) = .*?)```", README, re.S)
SMALL = """
{name} = replace(
    {name}, vocab_size={vocabulary}, context_length=64, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8,
    mlp_size=40, tokens_per_step=256, micro_batch_rows=2, num_steps=4, warmup_steps=1, eval_tokens=256, sample_every_steps=None,
    qk_norm=True, tie_embeddings=False, validation_fraction=0.2, rope_theta=10000.0,
)
"""


def write_books_and_teacher(folder: Path) -> int:
    """What the README's paths name, below `folder`: texts, and a Qwen3 folder, whose number of ids is returned."""
    texts = [f"chapter {number} of a book about {number * number} ways to write " * 30 for number in range(60)]
    (folder / "books").mkdir(parents=True)
    (folder / "notes").mkdir()
    for number, text in enumerate(texts):
        (folder / "books" / f"{number}.txt").write_text(text)
    (folder / "notes" / "one.md").write_text("a note")
    (folder / "web.jsonl").write_text(json.dumps({"text": "a page"}) + "\n")
    tokenizer = bpe.train([text.encode() for text in texts], 280)
    sizes: dict = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40)
    described = Qwen3Config(vocab_size=280, head_dim=8, rms_norm_eps=1e-5, **sizes)
    Qwen3ForCausalLM(described).save_pretrained(folder / "teacher")
    (folder / "teacher" / "tokenizer.json").write_text(bpe.to_json(tokenizer))
    return 280


@pytest.mark.parametrize(("snippet", "name"), SNIPPETS, ids=[f"{number}" for number in range(len(SNIPPETS))])
def test_a_snippet_of_the_readme_works_where_it_is_pasted(snippet, name, tmp_path):
    """Planned as it stands, with paths that are there, and trained in a small size."""
    for folder in ("ds", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    num_ids = write_books_and_teacher(tmp_path / "me")
    pasted = snippet.replace("/home/me", str(tmp_path / "me"))
    for published, vocabulary in (("/models/Qwen3-8B", "151936"), ("runs/smollm2/teacher", "49152")):
        pasted = pasted.replace(published, str(tmp_path / "me" / "teacher")).replace(vocabulary, str(num_ids))
    has_teacher = "/teacher" in pasted
    with (tmp_path / "scripts" / "config.py").open("a") as config:
        config.write(pasted)
    planned = shell("python scripts/memory.py", tmp_path)
    assert planned.returncode == 0 and "PRETRAIN: " in planned.stdout, planned.stdout + planned.stderr
    with (tmp_path / "scripts" / "config.py").open("a") as config:
        config.write(SMALL.format(name=name, vocabulary=num_ids if has_teacher else 257))
    trained = shell(f"python scripts/train_{'distill' if name == 'DISTILL' else 'pretrain'}.py", tmp_path)
    assert trained.returncode == 0 and "Finished: 4 steps." in trained.stdout, trained.stdout + trained.stderr
