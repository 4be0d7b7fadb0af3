"""What several test files share: launching real ranks, tiny configurations, and the runs that many assertions look at."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

from scripts.config import TrainingConfig
from scripts.engine.watch import Watch

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("default")

REPOSITORY = Path(__file__).parent.parent
STEPS, SAVE_EVERY = 8, 4
PRECISIONS = ("fp32", "bf16")
RUNS = (*PRECISIONS, "distill", "labels", "mixture")
# Steps of 4 rows that grow to 16: the smallest that two ranks share. A stop after SAVE_EVERY steps is amid them.
GROWING = {"first_tokens_per_step": 128, "batch_warmup_steps": 6}
STEADY = dict.fromkeys(GROWING)
LAUNCHING = (
    "test_main_job", "test_trainer", "test_offload", "test_truth_check", "test_gpu_benchmark", "test_scheduler",
    "test_footprint", "test_plan", "test_watch", "test_setup", "test_checkpoint", "test_train_distill",
)  # fmt: skip

NEXT_PORT = iter(range(10000 + os.getpid() * 511 % 20000, 32768))
ALL_CORES = sorted(os.sched_getaffinity(0))

HIDE_GPUS = """import os; os.environ["CUDA_VISIBLE_DEVICES"] = ""
"""


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, before CUDA looks for them, unless `-m gpu` asks for them. Each worker and all that it starts have their own
    share of the cores, and idle threads of OpenMP wait instead of spinning: what runs side by side slows nothing else.
    """
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    if share := ALL_CORES[int(worker.removeprefix("gw")) :: int(count)]:
        os.sched_setaffinity(0, share)
        torch.set_num_threads(len(share))
    words = (config.getoption("markexpr") or "").split()
    if "gpu" not in words or words[words.index("gpu") - 1 : words.index("gpu")] == ["not"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def all_cores() -> Iterator[None]:
    """Where the number of threads or processes is what a test is about: every core, also those of other workers."""
    share = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, share)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers take one file after another: those that launch most come first, so that none of them is left for the end.
    Those between test_trainer and test_watch need no `finished_runs`, which it makes meanwhile.
    """
    items.sort(key=lambda item: LAUNCHING.index(item.path.stem) if item.path.stem in LAUNCHING else len(LAUNCHING))


def tiny_config(folder: Path, **changes) -> TrainingConfig:
    """A configuration that trains a tiny model on a corpus of its own in seconds; `changes` replace fields of it."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number in range(40):
            (corpus / f"{number}.txt").write_text(f"document {number} says: " + f"{number * number} and then " * 40)
    fields: dict = dict(
        run_dir=str(folder / "run"), data_dir=str(folder / "data"), corpus=(str(corpus),), corpus_exclude=(), vocab_size=257,
        validation_fraction=0.2, context_length=32, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
        tokens_per_step=512, micro_batch_rows=2, num_steps=STEPS, warmup_steps=2, learning_rate=1e-2, min_learning_rate=1e-3,
        loss_chunk_rows=48, eval_every_steps=SAVE_EVERY, eval_tokens=256, sample_every_steps=None, save_every_steps=SAVE_EVERY,
        keep_checkpoints=9, qk_norm=False, optimizer="adamw", optimizer_state_precision="fp32", beta2=0.98,
        muon_first_momentum=0.5, muon_momentum_warmup_steps=SAVE_EVERY + 2,
    )  # fmt: skip
    return TrainingConfig(**(fields | changes))


def tiny_student(teacher: TrainingConfig, name: str, run_dir: Path, **changes) -> TrainingConfig:
    """A smaller model that learns from a tiny run: "distill" beside it in fp32, "labels" from what it wrote, in bf16."""
    labels = {"precision": "bf16", "teacher_top_k": 8, "distill_temperature": 2.0, "distill_weight": 0.7}
    labels |= {"optimizer_state_precision": "bf16"}
    fields = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 24, "teacher_dir": teacher.run_dir}
    fields |= {"precision": "fp32", "optimizer": "muon"} if name == "distill" else labels
    return replace(teacher, run_dir=str(run_dir), **(fields | changes))


def tiny_mixture(student: TrainingConfig, **changes) -> TrainingConfig:
    """The same on the same documents as three sources by weight, masked: the first is one document, read again and again."""
    (corpus,) = student.corpus
    sources = {"corpus": (f"{corpus}/2.txt", f"{corpus}/1*.txt", f"{corpus}/[03-9]*.txt"), "corpus_weights": (0.5, 0.3, 0.2)}
    return replace(student, data_dir=f"{student.data_dir}-mixture", mask_across_documents=True, **(sources | changes))


def launch(
    folder: Path, code: str, command: list[str], num_processes: int = 1, env: dict | None = None
) -> list[subprocess.CompletedProcess]:
    """Runs `code` as a script under a launcher's `command`, once a process; {index} and {port} in it are filled in."""
    running = start(folder, code, command, num_processes, env)
    try:
        outputs = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            _kill_family(process)
    return [subprocess.CompletedProcess(p.args, p.returncode, output) for p, output in zip(running, outputs, strict=True)]


def start(
    folder: Path, code: str, command: list[str], num_processes: int = 1, env: dict | None = None
) -> list[subprocess.Popen]:
    """As `launch`, but returns while they run, each in a session of its own. The script hides GPUs once more where they are
    hidden: the `deepspeed` command shows its ranks the GPUs 0, 1, ... even where it sees none.
    """
    script = folder / "script.py"
    script.write_text((HIDE_GPUS if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "") + code)
    port = str(free_port())
    running = []
    for index in range(num_processes):
        filled = [word.format(index=index, port=port) for word in command] + [str(script)]
        variables = {name: value.format(index=index, port=port) for name, value in (env or {}).items()}
        running.append(
            subprocess.Popen(
                filled,
                env=clean_environment() | variables,
                cwd=folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    return running


def _kill_family(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


def clean_environment() -> dict[str, str]:
    """This environment without a launcher's variables, with the repository importable and this Python's commands first."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launchers and not name.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    importable = os.pathsep.join([str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": importable, "PATH": path}


def free_port() -> int:
    """A port that nobody uses, never the same twice, and below those that the system gives to connections of its own choice:
    one of these may be taken before a launch listens at it.
    """
    for port in NEXT_PORT:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


UNCHECKED = """
from scripts.engine import truth_check
truth_check.refuse_untrue_updates = lambda *_: None
"""


LEFT_OVER = """
import gc, os, sys
gc.collect()
slow = {"torch._dynamo", "torch._inductor", "sympy", "transformers"} & {*sys.modules}
assert not slow, f"{slow} take seconds to load, and nothing here needs them"
kinds = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", "Decoder")
left = [type(each).__name__ for each in gc.get_objects() if type(each).__name__ in kinds]
open(f"left-{os.environ['RANK']}", "w").write(" ".join(left))
"""


def pretrain_script(configs: list[TrainingConfig], after: str = "", before: str = UNCHECKED) -> str:
    """A script that trains each configuration in turn, through the Python calls that users have.

    Without the truth check, unless `before` is empty: one launch of each kind makes it.
    """
    described = json.dumps([asdict(config) for config in configs])
    return f"""
import json
{before}
from scripts.config import TrainingConfig
from scripts.engine.distributed import leaving
from scripts.train_distill import distill
from scripts.train_pretrain import pretrain

def train(config):
    (pretrain if config.teacher_dir is None else distill)(config)

def train_all():
    for fields in json.loads({described!r}):
        fields = {{name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}}
        train(TrainingConfig(**fields))

if __name__ == "__main__":
    with leaving():
        train_all()
{textwrap.indent(after, " " * 8)}
"""


def training_script(config: TrainingConfig, before: str, unchecked: str = UNCHECKED) -> str:
    """A script that trains one configuration with `before`, code that may change what `objective` and others do, and that
    leaves each rank's exit status in a file exit-<rank>. Without the truth check, unless `unchecked` is empty.
    """
    return f"""
import json, os, time
from pathlib import Path
import numpy as np
import torch
from scripts import prepare_data, train_distill, trainer
from scripts.config import TrainingConfig, refusing
from scripts.engine import distributed, offload, truth_check, watch
from scripts.model.losses import next_token
from scripts.run import checkpoint, storage, teacher

fields = json.loads({json.dumps(asdict(config))!r})
fields = {{name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}}
config, rank = TrainingConfig(**fields), int(os.environ.get("RANK", "0"))
{unchecked}
prepare, label = prepare_data.prepare, train_distill.label
objective = next_token if config.teacher_dir is None else train_distill.objective_of(config)
{before}
if __name__ == "__main__":
    with distributed.leaving():
        try:
            with refusing():
                run = trainer.set_up(config, prepare, label)
            trainer.train(run, objective)
        except SystemExit as left:
            Path(f"exit-{{rank}}").write_text(str(left.code))
            raise
"""


class Planted:
    """Unpickling it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def expect_success(results: list[subprocess.CompletedProcess]) -> str:
    """The whole output of a launch whose every process ended well."""
    output = "\n".join(result.stdout for result in results)
    assert all(result.returncode == 0 for result in results), output
    return output


def metrics(config: TrainingConfig) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(config) -> list[tuple]:
    """Step, loss and gradient norm of each train line."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(config) if line["kind"] == "train"]


def held_out(config) -> list[tuple]:
    """Step, loss and bits per byte of each evaluation."""
    return [(line["step"], line["val_loss"], line["val_bits_per_byte"]) for line in metrics(config) if line["kind"] == "eval"]


def as_if_stopped_after(step: int, config: TrainingConfig, folder: Path) -> TrainingConfig:
    """A copy of a finished run as it stood on the disk right after the save at `step`."""
    copied = replace(config, run_dir=str(folder))
    shutil.copytree(config.run_dir, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copied


LAUNCHERS = {
    1: ["deepspeed", "--num_gpus", "1", "--master_port", "{port}"],
    2: ["deepspeed", "--num_gpus", "2", "--master_port", "{port}"],
}
TORCHRUN = {
    1: ["torchrun", "--nproc-per-node", "1", "--master-port", "{port}"],
    2: ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"],
}


def ended_watch() -> Watch:
    """The watch of a run that no test starts: it listens to no signal any more."""
    watch = Watch(0, 0, 1, 60)
    watch.close(clean=True)
    return watch


def on_a_small_disk(disk: Path, megabytes: int, command: list[str]) -> list[str]:
    """`command` with a file system of its own at `disk`, which ends with it. Skips the test where that is not permitted."""
    disk.mkdir()
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"] if os.getuid() else ["unshare", "--mount"]
    mount = f"mount -t tmpfs -o size={megabytes}m none {disk}"
    if subprocess.run([*own_mounts, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not permit a file system of one's own (unshare, mount)")
    return [*own_mounts, "sh", "-c", f'{mount} && exec "$@"', "sh", *command]


@pytest.fixture(scope="session", params=[1, 2], ids=["1 rank", "2 ranks"])
def num_ranks(request) -> int:
    return request.param


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> dict[tuple[int, str], TrainingConfig]:
    """Uninterrupted runs by number of ranks and name, one of RUNS: one rank without a launcher, two through `deepspeed`.

    The first of the workers that needs them makes them for all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configs = {(ranks, name): config for ranks in (1, 2) for name, config in _configs(folder / f"{ranks}").items()}
        for ranks in (1, 2):
            _finish([config for (number, _), config in configs.items() if number == ranks], folder / f"{ranks}", ranks)
    return configs


def _configs(folder: Path) -> dict[str, TrainingConfig]:
    short = {"mask_across_documents": True, "optimizer": "muon", "optimizer_state_precision": "bf16"}
    configs = {
        name: tiny_config(folder, run_dir=str(folder / name), precision=name, **changes)
        for name, changes in {"fp32": GROWING, "bf16": short}.items()
    }
    students = {name: tiny_student(configs["fp32"], name, folder / name, **STEADY) for name in ("distill", "labels")}
    mixture = tiny_mixture(tiny_student(configs["fp32"], "mixture", folder / "mixture"))
    return configs | students | {"mixture": mixture}


def _finish(configs: list[TrainingConfig], folder: Path, ranks: int) -> None:
    if (folder / "done").exists():
        return
    before, command = shared_buffers(), ["python"] if ranks == 1 else LAUNCHERS[ranks]
    output = expect_success(launch(folder, pretrain_script(configs, before="", after=LEFT_OVER), command))
    left, limit = shared_buffers() - before, time.monotonic() + 60
    while left & shared_buffers():
        assert time.monotonic() < limit, "buffers of a launch that is over, not of one beside it"
        time.sleep(0.5)
    assert output.count("Finished: 8 steps.") == len(configs) and "Warning: " not in output, output
    (folder / "done").touch()


def shared_buffers() -> set[str]:
    """Names of the buffers that DeepSpeed shares among ranks of one machine without a GPU."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")}


@pytest.fixture(scope="session")
def finished_run(finished_runs) -> TrainingConfig:
    """One of the uninterrupted runs: bf16, on one rank."""
    return finished_runs[1, "bf16"]
