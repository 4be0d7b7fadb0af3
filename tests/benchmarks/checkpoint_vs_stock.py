"""Seconds and GB/s of save, verify and load against the disk's own rate and DeepSpeed's save_checkpoint and load_checkpoint.

`python tests/benchmarks/checkpoint_vs_stock.py` prints a table and writes tests/benchmarks/results/checkpoint_vs_stock.json.
One rank, one engine for all, in turns; files are dropped from the page cache before they are read. At most 2 GB of disk.
"""

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "checkpoint_vs_stock.json"
ROUNDS = 9
BLOCK_BYTES, WRITE_BACK_BYTES = 2**23, 2**25
FIELDS = dict(
    corpus_exclude=(), validation_fraction=0.0, vocab_size=257, context_length=32, hidden_size=768, num_layers=8, num_heads=12,
    num_kv_heads=4, mlp_size=2560, tokens_per_step=64, micro_batch_rows=2, num_steps=100, warmup_steps=1,
    eval_every_steps=None, eval_tokens=32, sample_every_steps=None, save_every_steps=1, keep_checkpoints=1, precision="bf16",
)  # fmt: skip
PRETRAIN = """
import json, sys
from scripts.config import TrainingConfig
from scripts.train_pretrain import pretrain
fields = json.loads(sys.argv[1])
fields |= {name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}
pretrain(TrainingConfig(**fields))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("a line of text that is trained on\n" * 200)
        resume_seconds = time_resume(folder)
        seconds, sizes = time_checkpoints(folder)
    publish(seconds, sizes, resume_seconds)


def configure(folder: Path):
    """The configuration of about 60 million parameters whose run is in `folder`."""
    from scripts.config import TrainingConfig

    paths = dict(run_dir=str(folder / "run"), data_dir=str(folder / "data"), corpus=(str(folder / "text.txt"),))
    return TrainingConfig(**paths, **FIELDS)  # pyright: ignore[reportArgumentType]


def time_resume(folder: Path) -> float:
    """Seconds from the start of the process to the end of the first step of a run that was killed after its first save."""
    until_logged(folder, "event", 1)
    saved = folder / "run" / "checkpoints"
    step = int(max(path.name for path in saved.glob("step-*"))[-8:])
    forget(saved)
    seconds = until_logged(folder, "train", step + 1)
    shutil.rmtree(folder / "run")
    return seconds


def until_logged(folder: Path, kind: str, step: int) -> float:
    """Starts the training, kills it when the log holds that line of `step`, and returns the seconds from start to line."""
    command = [sys.executable, "-c", PRETRAIN, json.dumps(asdict(configure(folder)))]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL)
    while not logged(folder, kind, step):
        assert process.poll() is None, "the run ended"
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seconds


def logged(folder: Path, kind: str, step: int) -> bool:
    """Whether the log has a train line of `step`, or for an event the one that says that it was saved."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return any(
        record["step"] == step and record["kind"] == kind and (kind == "train" or record["event"] == "saved")
        for record in records
    )


def time_checkpoints(folder: Path) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by name, a number a round, and the bytes of a checkpoint of ours and of stock DeepSpeed."""
    import deepspeed
    import torch

    from ds.tokenizer import raw_bytes, to_json
    from scripts.config import TrainingConfig
    from scripts.model.decoder import empty_model, initialise, parameter_groups
    from scripts.model.huggingface import load_weights
    from scripts.run import checkpoint

    config = configure(folder)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    model = initialise(empty_model(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    groups, settings = parameter_groups(model, config.weight_decay), TrainingConfig.deepspeed_config(config, 1)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)  # pyright: ignore
    ids = torch.arange(64, device=engine.device).view(2, 32)
    engine.backward(engine(ids).float().square().mean())
    engine.step()
    tokenizer_json, progress = to_json(raw_bytes()), {"step": 1, "data_fingerprint": ""}
    ours, stock = folder / "run" / "checkpoints" / "step-00000001", folder / "stock"
    sizes, seconds, saved = {}, {}, None

    def timed(name: str, work: Callable) -> None:
        os.sync()
        started = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        print(f"round {turn + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)

    def save() -> None:
        nonlocal saved
        saved = checkpoint.save(engine, config, tokenizer_json, 256, progress)
        assert saved.fault is None, saved

    def read_back() -> None:
        assert saved is not None and checkpoint.verify_saved(config, saved) == (True, None)

    def load() -> None:
        found = checkpoint.Checkpoint(ours, json.loads((ours / checkpoint.STATE).read_text()))
        load_weights(model, ours)
        checkpoint.load_state(engine, found)

    def stock_synced() -> None:
        engine.save_checkpoint(str(stock), tag="1")
        for path in stock.rglob("*"):
            sync(path)

    for turn in range(ROUNDS):  # noqa: B007
        timed("save", save)
        timed("read back, while training goes on", read_back)
        sizes["ours"] = size_of(ours)
        forget(ours)
        timed("verify", lambda: checkpoint.find_fault(ours))
        forget(ours)
        timed("load", load)
        timed("disk write", lambda: write_plainly(folder / "plain", sizes["ours"]))
        forget(folder / "plain")
        timed("disk read", lambda: read_plainly(folder / "plain"))
        (folder / "plain").unlink()
        timed("stock save", lambda: engine.save_checkpoint(str(stock), tag="1"))
        shutil.rmtree(stock)
        timed("stock save, fsync", stock_synced)
        sizes["stock"] = size_of(stock)
        forget(stock)
        timed("stock load", lambda: engine.load_checkpoint(str(stock), tag="1"))
        shutil.rmtree(stock)
    torch.distributed.destroy_process_group()
    return seconds, sizes


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Makes a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(path: Path) -> None:
    """Drops a file, or all files below a folder, from the page cache."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            sync(file)
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_plainly(path: Path, num_bytes: int) -> None:
    """The disk's own rate: the same number of bytes from memory, write-back begun every WRITE_BACK_BYTES, and fsync."""
    block = memoryview(os.urandom(BLOCK_BYTES))
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        for start in range(0, num_bytes, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, num_bytes - start)])
            if start % WRITE_BACK_BYTES == 0:
                pool.submit(os.fdatasync, file.fileno())
        pool.shutdown()
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """The disk's own rate: into one buffer, in order."""
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            continue


def publish(seconds: dict[str, list[float]], sizes: dict[str, int], resume_seconds: float) -> None:
    """The table on the terminal and the numbers as JSON; a ratio above 1 means that ours is the faster."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: sizes["stock" if "stock" in name else "ours"] / medians[name] / 1e9 for name in medians}
    pairs = {
        "save over disk write": ("save", "disk write"),
        "verify over disk read": ("verify", "disk read"), "load over disk read": ("load", "disk read"),
        "save over stock save": ("save", "stock save"), "save over stock save, fsync": ("save", "stock save, fsync"),
        "load over stock load": ("load", "stock load"),
    }  # fmt: skip
    ratios = {name: medians[theirs] / medians[ours] for name, (ours, theirs) in pairs.items()}
    print(f"\n{'':<20} {'seconds':>8} {'GB/s':>6}")
    for name in medians:
        print(f"{name:<20} {medians[name]:8.2f} {rates[name]:6.2f}")
    for name, ratio in ratios.items():
        print(f"{name:<30} {ratio:5.2f}")
    print(f"process start to the first step of a resumed run: {resume_seconds:.1f} s")
    found = {
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "kernel": platform.release()},
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        "bytes": sizes, "seconds": seconds, "median_seconds": medians, "gb_per_second": rates, "ratios": ratios,
        "resume_to_first_step_seconds": resume_seconds,
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


def processor() -> str:
    """The CPU's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
