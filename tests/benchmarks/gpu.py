"""All that only a card can tell: `python tests/benchmarks/gpu.py` measures what is still missing, the most telling first.

Each row is a process of its own with a limit, and none is begun that might outlast WHOLE_SECONDS. After each one the results
are written. A row is measured once for a card and a state of the code: its `code` is a digest of what measures it, of the
versions of torch and DeepSpeed, and, but for a stock peer, of ds/ and scripts/. The same command again goes on with what is
missing; rows that failed by a fault come last. Rows of other code or of another card are kept. Without a CUDA device nothing is
measured.

GB are 10^9 bytes. Peaks are the whole process's, on the card as torch's allocator counts, of a stock peer from before
deepspeed.initialize on. Where speed is measured, tokens and weights are random. MFU counts 6 FLOP for each parameter of a
matrix and causal attention, nothing twice that is recomputed, over the card's dense bf16 peak.
"""

import inspect
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import count, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from scripts import config as presets  # noqa: E402
from scripts.config import CUDA_CONTEXT_BYTES, CUDA_LIBRARIES_BYTES, GIB, TrainingConfig, refusing  # noqa: E402
from scripts.memory import HOST, OUT_OF_MEMORY_WORDS, allocated_bytes, needs, plan  # noqa: E402
from scripts.plan.machine import flops_per_token, peak_bytes, room_free  # noqa: E402

RESULT = Path(__file__).parent / "results" / "gpu.json"
FOUND, OUTPUT, TEACHER = "found.json", "output", "teacher"
GB = 1e9
WHOLE_SECONDS, END_SECONDS, POLL_SECONDS, LEAST_FREE_GB = 530, 20, 0.1, 4.0
TESTS_SECONDS, JOB_SECONDS, COMPILE_SECONDS, LAUNCHES_SECONDS, WHOLE_STEP_SECONDS = 200, 150, 150, 100, 180
ROW_SECONDS, SECONDS_OF_LARGE = 50, {"3B": 90, "6.7B": 150}
OFTEN = {"least": 3, "most": 12, "seconds": 5.0, "is_split": True}
BRIEFLY = {"least": 1, "most": 1, "seconds": 0.0, "is_split": False}
DONE, FAULT, REFUSED, OUT_OF_MEMORY, STOPPED = "done", "fault", "refused", "out of memory", 75
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PYTEST = ("-m", "pytest", "-o", "addopts=", "-n", "0", "-o", "filterwarnings=default", "-q", "-rf")
TELLING = re.compile(r"failed: |refused: |[\w.]*(Error|Exception|Interrupt)\b")
MOST_CHARACTERS, WIDTH = 400, 100
# Dense bf16 products with float32 sums, 10^12 FLOP/s, by torch's name of the card: NVIDIA's data sheets of H100, H200 and A100,
# and for the GeForce cards its white papers on the architectures Ada and Ampere GA102.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 3090": 71.0,
}  # fmt: skip
PUBLISHED_TOKENS, DOCUMENT_TOKENS, END_OF_TEXT_ID = 524_288, 256, 256
SECTIONS = {
    "Speed and peaks, at two micro-batches a step or what the name tells; without offload x ours is what offload costs": (
        "speed",
        "published",
    ),
    "Within a cap, as on a card of that size": ("capped",),
    "Other configurations": ("plan",),
}
MUON_ROWS = (("1.3B", 2), ("1.3B", 16), ("124M", 2), ("3B", 2))
EXACT: dict[str, Any] = {
    "vocab_size": 257, "context_length": 512, "hidden_size": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4,
    "mlp_size": 1408, "micro_batch_rows": 4, "tokens_per_step": 8192, "num_steps": 8, "warmup_steps": 2,
    "activation_checkpointing": "block_offload",
}  # fmt: skip
BEFORE = EXACT | {"context_length": 384, "hidden_size": 768, "num_layers": 3, "mlp_size": 1024, "tokens_per_step": 6144}
TINY = EXACT | {"hidden_size": 128, "num_layers": 2, "mlp_size": 320, "activation_checkpointing": "block"}
NEVER: dict[str, Any] = dict.fromkeys(("eval_every_steps", "sample_every_steps"))


Step = Callable[[Callable[[], None]], None]  # takes one step, and calls what it is given after each micro-batch


class Published(NamedTuple):
    """Tokens/s in bf16 at PUBLISHED_TOKENS a step: the model, of ours the nearest in size; by whom or how; the card."""

    model: str
    trainer: str
    card: str | None
    tokens_per_second: float


PUBLISHED = (
    Published("3B", "llmq (arXiv 2512.15306)", "NVIDIA GeForce RTX 4090", 7000),
    Published("3B", "LLaMA-Factory, ZeRO-2 offload", None, 5450),
    Published("6.7B", "llmq (arXiv 2512.15306), 7B", "NVIDIA GeForce RTX 4090", 2780),
)


class Row(NamedTuple):
    """One process: its part of the table, what is measured, `kind` of KINDS with its settings as JSON holds them, the limit,
    the extension of DeepSpeed's that is compiled before, and the most GB that the peak may be.
    """

    part: str
    model: str
    contender: str
    kind: str
    settings: dict[str, Any]
    limit_seconds: float
    extension: str | None = "CPUAdamBuilder"
    goal_gb: float | None = None


class Limits(NamedTuple):
    """Seconds within which all rows that are begun have ended, those of compiling one extension, and GB of host memory that a
    row must leave free.
    """

    whole_seconds: float
    compile_seconds: float
    least_free_gb: float


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing is measured.")
        records = load(RESULT)["rows"]
        print(table(records, records[-1]["card"]) if records else "There are no results yet.")
        return
    every = [*first_rows(), *more_rows(), *last_rows()]
    able = [row for row in every if "Liger" not in row.contender or installed("liger-kernel")]
    measure_missing(able, RESULT, Limits(WHOLE_SECONDS, COMPILE_SECONDS, LEAST_FREE_GB))
    if able != every:
        print(f"liger-kernel is not installed: {len(every) - len(able)} rows are left out")


def first_rows() -> list[Row]:
    """What tells most of a card, in the first ten minutes."""
    whole, stopped, second = {"fields": [EXACT]}, {"fields": [EXACT], "stop_after": 4}, {"fields": [BEFORE, EXACT]}
    fast = {"fields": [EXACT | {"compile_kernels": "gpu"}]}
    compiled = {"one": [fast], "other": [fast | {"stop_after": 4}, fast]}
    return [
        Row("exact", "GPU tests", "", "tests", {"arguments": ["-m", "gpu"]}, TESTS_SECONDS),
        Row("exact", "truth check", "bf16", "train", {"fields": [TINY | {"precision": "bf16"}]}, ROW_SECONDS),
        Row("exact", "truth check", "fp16", "train", {"fields": [TINY | {"precision": "fp16"}]}, ROW_SECONDS),
        Row("exact", "main job", "", "job", {"changes": ""}, JOB_SECONDS),
        ours("speed", "1.3B", "tightfit"),
        stock("1.3B", "stock, checkpointing"),
        ours("speed", "3B", "tightfit"),
        ours("speed", "3B", "compiled kernels", compile_kernels="gpu"),
        ours("speed", "6.7B", "tightfit"),
        ours("capped", "GPU_4GB", "4 GB", cap_gb=4),
        Row("exact", "resume", "", "alike", {"one": [whole], "other": [stopped, whole]}, LAUNCHES_SECONDS),
        Row("exact", "resume, compiled kernels", "", "alike", compiled, LAUNCHES_SECONDS),
        ours("speed", "124M", "tightfit"),
        ours("speed", "124M", "compiled kernels", compile_kernels="gpu"),
        stock("124M", "stock"),
        Row("exact", "two runs in a process", "", "alike", {"one": [whole], "other": [second]}, LAUNCHES_SECONDS),
    ]


def more_rows() -> list[Row]:
    """What offload costs, the other caps, the published setting, most of the peers."""
    step = {"micro_batches": PUBLISHED_TOKENS // (16 * 2048), "micro_batch_rows": 16, "timing": BRIEFLY}
    on_card = {"offload_optimizer": False, "accumulate_on": "gpu"}
    muon = {"optimizer": "muon", "optimizer_state_precision": "bf16"}
    return [
        *(ours("speed", model, f"Muon, 16-bit moments, {many} micro-batches", many, **muon) for model, many in MUON_ROWS),
        ours("speed", "1.3B", "AdamW, 16-bit moments", optimizer_state_precision="bf16"),
        ours("speed", "1.3B", "sums on the card", accumulate_on="gpu", accumulation_precision="bf16"),
        ours("speed", "124M", "masked documents", mask_across_documents=True),
        *(ours("speed", "1.3B", f"no offload, {many} micro-batches", many, **on_card) for many in (2, 16)),
        ours("speed", "1.3B", "tightfit, 16 micro-batches", 16),
        *(ours("capped", f"GPU_{cap}GB", f"{cap} GB", cap_gb=cap) for cap in (8, 6)),
        ours("published", "3B", f"a step of {PUBLISHED_TOKENS:,} tokens", **step)._replace(limit_seconds=WHOLE_STEP_SECONDS),
        *(ours("speed", "124M", f"no offload, {many} micro-batches", many, **on_card) for many in (2, 16)),
        ours("speed", "124M", "tightfit, 16 micro-batches", 16),
        *(stock("124M", name) for name in ("stock, checkpointing", "stock, checkpointing, Liger")),
        *(stock("1.3B", name) for name in ("stock, checkpointing, Liger", "stock")),
        ours("published", "6.7B", "16 rows a micro-batch", micro_batch_rows=16),
        stock("3B", "stock, checkpointing"),
    ]


def last_rows() -> list[Row]:
    """The grid of plans, and the peers that take longest."""
    return [
        grid("none"),
        grid("block_offload"),
        grid("none", micro_batch_rows=2),
        grid("block", micro_batch_rows=16),
        grid("block", loss_chunk_rows=256),
        grid("block", accumulate_on="gpu"),
        grid("block", accumulate_on="gpu", accumulation_precision="bf16"),
        grid("block", teacher="1.3B"),
        grid("block", teacher="1.3B", teacher_top_k=32),
        grid("block", tie_embeddings=False),
        grid("none", num_kv_heads=4, qk_norm=True),
        grid("block", context_length=4096, micro_batch_rows=2),
        grid("block", num_layers=24, vocab_size=8192),
        grid("block", precision="fp32"),
        *(stock("3B", name) for name in ("stock, checkpointing, Liger", "stock")),
        *(stock("6.7B", name) for name in ("stock, checkpointing", "stock, checkpointing, Liger", "stock")),
    ]


def ours(part: str, model: str, contender: str, micro_batches: int = 2, **changes: Any) -> Row:
    """A row of the trainer: a shape of footprint_vs_stock.py in its mode, or a preset. `changes` are fields, or settings."""
    timing, cap_gb, teacher = (changes.pop(name, None) for name in ("timing", "cap_gb", "teacher"))
    base = replace(our_config(model), teacher_dir=None if teacher is None else TEACHER)
    rows, length = (changes.get(name, getattr(base, name)) for name in ("micro_batch_rows", "context_length"))
    config = replace(base, tokens_per_step=micro_batches * rows * length, eval_tokens=length, **changes)
    taught = None if teacher is None else fields_of(our_config(teacher))
    settings = {"fields": fields_of(config), "timing": timing or OFTEN, "cap_gb": cap_gb, "teacher": taught}
    limit, adam = SECONDS_OF_LARGE.get(model, ROW_SECONDS), "CPUAdamBuilder" if config.offload_optimizer else "FusedAdamBuilder"
    goal_gb = shapes()[model].goal_gb if contender == "tightfit" else None
    return Row(part, model, contender, "ours", settings, limit, adam, goal_gb)


def grid(mode: str, **changes: Any) -> Row:
    """A row of the 124M model for its plan."""
    name = ", ".join([mode, *(f"{field}={value}" for field, value in changes.items())])
    return ours("plan", "124M", name, activation_checkpointing=mode, timing=BRIEFLY, **changes)


def stock(model: str, contender: str) -> Row:
    """A row of transformers' Llama under DeepSpeed's own offload, as the name says."""
    row = ours("speed", model, contender, activation_checkpointing="none")
    chosen = {"checkpointing": "checkpointing" in contender, "liger": "Liger" in contender, "timing": OFTEN}
    return row._replace(kind="stock", settings=chosen | {"fields": row.settings["fields"]})


@cache
def shapes() -> dict[str, Any]:
    """The models of footprint_vs_stock.py by their size."""
    from footprint_vs_stock import MODELS

    return {shape.name.split(",")[0]: shape for shape in MODELS}


def our_config(model: str) -> TrainingConfig:
    """A model of `shapes` in our mode for it, or a preset."""
    from footprint_vs_stock import config_of

    return config_of(shapes()[model], shapes()[model].mode) if model in shapes() else getattr(presets, model)


def fields_of(config: TrainingConfig) -> dict[str, Any]:
    """The fields that are not the default's, without paths: what `TrainingConfig(**fields)` needs beside them."""
    default, own = asdict(TrainingConfig()), asdict(config)
    return {name: value for name, value in own.items() if value != default[name] and name not in ("run_dir", "data_dir")}


def measure_missing(rows: list[Row], path: Path, limits: Limits) -> None:
    """Measures each row that the results in `path` lack for this card and code and that surely ends in time. Prints a line a
    row, and at last the table.
    """
    started, here, ready = time.monotonic(), machine(), {None}
    waiting = missing(rows, load(path)["rows"], here["gpu"], limits)
    for number, row in enumerate(waiting, 1):
        if time.monotonic() - started + row.limit_seconds > limits.whole_seconds or row.extension not in ready:
            continue
        record = blank(row, here["gpu"]) | {"commit": commit(), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        print(f"{number:>3}/{len(waiting)}  {title(record):<40}", end="", flush=True)
        record |= in_a_process(row, limits.least_free_gb)
        save(path, record, here)
        print(f"{record['seconds']:>6.1f} s  {words_of(record)}", flush=True)
        ready |= {row.model} if row.kind == "compile" and record["outcome"] == DONE else set()
    records = load(path)["rows"]
    left = sum(row.kind != "compile" for row in missing(rows, records, here["gpu"], limits))
    print(table(records, here["gpu"]))
    print(f"{left} of {len(rows)} rows are still to be measured: the same command goes on" if left else "All is measured.")


def missing(rows: list[Row], records: list[dict], card: str | None, limits: Limits) -> list[Row]:
    """The rows never tried, then those that failed by a fault, each in their order. Before the first row that needs an
    extension it is compiled, or found compiled, in every launch.
    """
    outcomes = {record["id"]: record["outcome"] for record in records}
    ids = [blank(row, card)["id"] for row in rows]
    ordered: list[Row] = []
    for row in [row for wanted in (None, FAULT) for row, each in zip(rows, ids, strict=True) if outcomes.get(each) == wanted]:
        name = row.extension or ""
        compiling = Row("compile", name, "", "compile", {"name": name}, limits.compile_seconds, None)
        ordered += [row] if row.extension is None or compiling in ordered else [compiling, row]
    return ordered


def blank(row: Row, card: str | None) -> dict[str, Any]:
    """A row's record before it is measured; `id` is the same for what need not be measured again."""
    same = {"part": row.part, "model": row.model, "contender": row.contender, "kind": row.kind, "settings": row.settings}
    same |= {"card": card, "code": code_digest(row.kind)}
    return {"id": digest(json.dumps(same, sort_keys=True)), "goal_gb": row.goal_gb} | same


def digest(text: str) -> str:
    """Twelve hex digits of sha256."""
    return sha256(text.encode()).hexdigest()[:12]


@cache
def code_digest(kind: str) -> str:
    """The digest of all the code that a kind of row depends on."""
    folders = {"stock": (), "tests": ("ds", "scripts", "tests")}.get(kind, ("ds", "scripts"))
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.parent.name != "benchmarks"]
    parts = [*map(inspect.getsource, KINDS[kind]), *(f"{name} {installed(name)}" for name in ("torch", "deepspeed"))]
    return digest("\n".join([*parts, *(f"{path.relative_to(ROOT)}\n{path.read_text()}" for path in files)]))


@cache
def commit() -> str | None:
    """The git commit that the code is of or was changed from; None where git cannot tell."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


@cache
def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code; `gpu` is None without a card."""
    card: dict[str, Any] = {"gpu": None, "gpu_gb": None, "capability": None}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        card = {"gpu": about.name, "gpu_gb": round(about.total_memory / GB, 1), "capability": [about.major, about.minor]}
    host = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "cuda": torch.version.cuda}
    return card | host | {name: installed(name) for name in ("torch", "deepspeed", "transformers", "liger-kernel")}


def installed(name: str) -> str | None:
    """A package's version, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load(path: Path) -> dict[str, Any]:
    """The results so far: machines by a digest, and the rows, each with its machine's."""
    return json.loads(path.read_text()) if path.exists() else {"machines": {}, "rows": []}


def save(path: Path, record: dict, here: dict[str, Any]) -> None:
    """Adds a row's record, in the place of an earlier one of the same row, card and code."""
    results, name = load(path), digest(json.dumps(here))
    others = [each for each in results["rows"] if each["id"] != record["id"]]
    results = {"machines": results["machines"] | {name: here}, "rows": [*others, record | {"machine": name}]}
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(path)


def in_a_process(row: Row, least_free_gb: float) -> dict[str, Any]:
    """A row's outcome, seconds, and what it found, or the words that tell what went wrong."""
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="gpu-"))
    command = [sys.executable, __file__, json.dumps([row.kind, row.settings])]
    try:
        with (folder / OUTPUT).open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(folder), cwd=folder)
            stopped = wait(process, row.limit_seconds, least_free_gb)
        end_all(folder)
        process.poll()
        ended = stopped or outcome_of(folder, process.returncode)
    finally:
        end_all(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return ended | {"seconds": round(time.monotonic() - started, 1)}


def environment(folder: Path) -> dict[str, str]:
    """This one without a launcher's, pytest's or an allocator's variables. Temporary files of a row and of all that it starts
    lie in its folder: that variable tells its processes, whatever session or parent they have.
    """
    foreign = re.compile(f"({'|'.join(LAUNCHERS)}|PYTEST_.*|.*ALLOC_CONF)")
    kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    importable = [str(ROOT), *(os.path.abspath(place) for place in kept.get("PYTHONPATH", "").split(os.pathsep) if place)]
    return kept | {"PYTHONPATH": os.pathsep.join(importable), "TMPDIR": str(folder)}


def wait(process: subprocess.Popen, limit_seconds: float, least_free_gb: float) -> dict[str, Any] | None:
    """Returns when the process has ended; or, for the caller to end it, why it may not go on."""
    last, default = time.monotonic() + limit_seconds, TrainingConfig()
    while process.poll() is None:
        if time.monotonic() > last:
            return {"outcome": FAULT, "words": f"not done after {limit_seconds:g} s"}
        if room_free(default, torch.device("cpu")).host < least_free_gb * GB:
            return {"outcome": OUT_OF_MEMORY, "words": f"less than {least_free_gb:g} GB of host memory were left"}
        time.sleep(POLL_SECONDS)
    return None


def end_all(folder: Path) -> None:
    """Kills every process of a row, until there is none, or until it is clear that the kernel does not let one go."""
    last = time.monotonic() + END_SECONDS
    while (found := list(processes_of(folder))) and time.monotonic() < last:
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_SECONDS)


def processes_of(folder: Path) -> Iterator[int]:
    """The processes whose temporary files are to lie in `folder`; one that has ended shows no variables."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"TMPDIR={folder}".encode() in variables:
            yield int(path.parent.name)


def outcome_of(folder: Path, status: int) -> dict[str, Any]:
    """What a process that ended with `status` left in its folder."""
    if status == 0 and (folder / FOUND).exists():
        return json.loads((folder / FOUND).read_text())
    words, outcome = last_words(folder / OUTPUT) or f"exit status {status}", FAULT
    if words.startswith("refused: "):
        words, outcome = words.removeprefix("refused: "), REFUSED
    elif status == -signal.SIGKILL or any(each in words for each in OUT_OF_MEMORY_WORDS):
        outcome = OUT_OF_MEMORY
    return {"outcome": outcome, "words": words}


def last_words(output: Path) -> str:
    """The last line of an output that names a fault, or else the last."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in output.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.match(line)]
    return (telling or lines or [""])[-1][:MOST_CHARACTERS]


def measure(kind: str, settings: dict[str, Any]) -> None:
    """A row's process: leaves what it found in its folder, and ends."""
    from scripts.engine.distributed import leaving

    with leaving(), refusing() if kind in ("ours", "train") else nullcontext():
        found = KINDS[kind][0](**settings)
        Path(FOUND).write_text(json.dumps({"outcome": DONE, "found": found}))


def compile_extension(name: str) -> dict[str, Any]:
    """Compiles DeepSpeed's Adam for the host or for the card where that has not been done, which no row has the time for."""
    from deepspeed.accelerator import get_accelerator

    from scripts.engine.toolchain import compiling

    config = TrainingConfig(offload_optimizer=name == "CPUAdamBuilder", accumulate_on="gpu")
    with compiling(config, 0):
        get_accelerator().create_op_builder(name).load(verbose=False)  # pyright: ignore[reportOptionalMemberAccess]
    return {}


def measure_tests(arguments: list[str]) -> dict[str, Any]:
    """How many tests of the project end how, by pytest with `arguments`. Raises RuntimeError when any fails or none passes."""
    done = subprocess.run([sys.executable, *PYTEST, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    numbers = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    if done.returncode or not numbers.get("passed"):
        raise RuntimeError("; ".join([lines[-1], *(line for line in lines if line.startswith(("FAILED", "ERROR")))]))
    return numbers


def measure_job(changes: str) -> dict[str, Any]:
    """The README's main job in a copy of the code, with `changes` to PRETRAIN as a person writes them."""
    for name in ("ds", "scripts"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    with Path("scripts", "config.py").open("a") as config:
        config.write(f"\nPRETRAIN = replace(PRETRAIN, {changes})\n")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ["PYTHONPATH"]])}
    started = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port, "scripts/train_pretrain.py"]
    done = subprocess.run(command, env=variables, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    seconds, records = time.perf_counter() - started, records_of(Path("runs/pretrain"))
    bits = [record["val_bits_per_byte"] for record in records if record["kind"] == "eval"]
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    memory = next(record for record in records if record.get("event") == "memory")
    return {
        "job_seconds": round(seconds, 1), "steps": len(speeds), "bits_before": bits[0], "bits_after": bits[-1],
        "tokens_per_second": round(statistics.median(speeds)),
        "planned_gb": in_gb(memory.get("gpu_planned_gib"), GIB), "allocated_gb": in_gb(memory.get("gpu_peak_gib"), GIB),
        "host_planned_gb": in_gb(memory["host_planned_gib"], GIB), "host_gb": in_gb(memory["host_peak_gib"], GIB),
    }  # fmt: skip


def measure_alike(one: list[dict], other: list[dict]) -> dict[str, Any]:
    """Whether two series of launches, side by side, leave the same, bit by bit."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(launch_all, ("one", "other"), (one, other))
    unlike = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return {"files": len(first) - 1, "steps": len(first["losses"]), "unlike": unlike}


def launch_all(name: str, launches: list[dict]) -> dict[str, Any]:
    """Runs `train` for one launch after another in a folder, each with kernels of its own. What the last run leaves: weights
    and optimizer files by sha256, and losses. Raises RuntimeError where a launch does not end as it should.
    """
    folder = Path(name)
    folder.mkdir()
    for number, launch in enumerate(launches):
        command, wanted = [sys.executable, __file__, json.dumps(["train", launch])], STOPPED if "stop_after" in launch else 0
        own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str((folder / f"kernels-{number}").absolute())}
        with (folder / OUTPUT).open("wb") as output:
            status = subprocess.run(command, stdout=output, stderr=output, cwd=folder, check=False, env=own).returncode
        if status != wanted:
            raise RuntimeError(f"exit status {status} and not {wanted}: {last_words(folder / OUTPUT)}")
    run = folder / f"run-{len(launches[-1]['fields']) - 1}"
    files = max((run / "checkpoints").glob("step-*")).rglob("*.safetensors")
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files} | {"losses": losses_of(run)}


def records_of(run: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[float]:
    """The loss of each step in a run's log."""
    return [record["loss"] for record in records_of(run) if record["kind"] == "train"]


def train(fields: list[dict[str, Any]], stop_after: int | None = None) -> dict[str, Any]:
    """Trains one configuration after another on a small corpus, in run-0, run-1, ..., each a whole launch with its truth check;
    asks for a stop in step `stop_after`. The losses are the last one's.
    """
    from scripts import trainer
    from scripts.model.losses import next_token
    from scripts.prepare_data import prepare

    write_corpus(Path("corpus"))
    for number, each in enumerate(fields):
        places: dict[str, Any] = {"run_dir": f"run-{number}", "data_dir": f"data-{number}", "corpus": ("corpus",)}
        run, asked = trainer.set_up(TrainingConfig(**(NEVER | places | each)), prepare), []

        def objective(*inputs: Any, run: Any = run, asked: list = asked) -> torch.Tensor:
            if run.watch.step == stop_after and not asked:
                asked.append(os.kill(os.getpid(), signal.SIGUSR1))
            return next_token(*inputs)

        trainer.train(run, objective)
    last = Path(f"run-{len(fields) - 1}")
    losses = losses_of(last)
    lost = sum(record.get("event") == "skipped" for record in records_of(last))
    return {"steps": len(losses), "skipped_steps": lost, "first_loss": losses[0], "last_loss": losses[-1]}


def write_corpus(folder: Path) -> None:
    """Two hundred documents of random words, the same at every call."""
    folder.mkdir(exist_ok=True)
    for number, words in enumerate(np.random.default_rng(0).integers(0, 999, (200, 400))):
        (folder / f"{number}.txt").write_text(" ".join(f"{word:x}" for word in words))


def measure_ours(
    fields: dict[str, Any], timing: dict[str, Any], cap_gb: float | None, teacher: dict[str, Any] | None
) -> dict[str, Any]:
    """The trainer's own steps on random tokens: planned and measured peaks, and the speed."""
    from scripts import train_distill, trainer
    from scripts.model.losses import next_token
    from scripts.run import setup

    started, numbers, micro_batch = time.perf_counter(), count(), trainer.run_micro_batch
    places: dict[str, Any] = {"run_dir": "run", "data_dir": "data", "corpus": (".",), "save_every_steps": None}
    config, objective = TrainingConfig(**(fields | NEVER | places)), next_token
    if teacher is not None:
        write_teacher(TrainingConfig(**teacher), Path(TEACHER))
        objective = train_distill.objective_of(config)
    with patch.object(setup, "initialise", draw_on_device):
        run = trainer.set_up(config, lambda _: random_data(config, cap_gb), train_distill.label)
    ready = when_ready(started)

    def step(mark: Callable[[], None]) -> None:
        def marked(*inputs: Any) -> torch.Tensor:
            loss = micro_batch(*inputs)
            mark()
            return loss

        with patch.object(trainer, "run_micro_batch", marked):
            trainer.run_step(run, objective, next(numbers))  # pyright: ignore[reportArgumentType]

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    planned, found = plan(config, 1, kind), speed(step, config, timing)
    of_plan = {"host_planned_gb": in_gb(needs(planned, 1)[HOST].moment.total)}
    of_plan["planned_gb"] = in_gb(allocated_bytes(planned)) if kind == "cuda" else None
    return ready | of_plan | peaks() | found


def random_data(config: TrainingConfig, cap_gb: float | None) -> Any:
    """What the trainer reads; asked for it after CUDA is set up and before anything is loaded, this caps the process too, to
    what CUDA itself leaves of a card of `cap_gb`.
    """
    from ds.shards import TokenStream, open_shard, write_shard
    from ds.tokenizer import raw_bytes
    from scripts.prepare_data import Data

    if cap_gb is not None and torch.cuda.is_available():
        left = cap_gb * GB - CUDA_CONTEXT_BYTES - CUDA_LIBRARIES_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, left / torch.cuda.get_device_properties(0).total_memory))
    num_tokens, path = max(200_000, config.tokens_per_step + config.context_length + 1), Path("train.bin")
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, num_tokens).astype(np.uint16)
    if config.mask_across_documents:
        ids[generator.random(num_tokens) < 1 / DOCUMENT_TOKENS] = END_OF_TEXT_ID
    write_shard(path, ids, config.vocab_size, "0" * 64)
    return Data({}, TokenStream((open_shard(path),), "0" * 64), None, raw_bytes(), "")


def write_teacher(config: TrainingConfig, folder: Path) -> None:
    """A transformers folder of weights that are all alike, with the tokenizer of `random_data`. CUDA is left alone, because the
    trainer sets it up.
    """
    from safetensors.torch import save_file

    from ds.tokenizer import raw_bytes, to_json
    from scripts.model.decoder import empty_model
    from scripts.model.huggingface import transformers_config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(transformers_config(config, 256)))
    (folder / "tokenizer.json").write_text(to_json(raw_bytes()))
    weights = dict(empty_model(config, torch.device("cpu")).named_parameters())
    save_file({name: weight.detach().fill_(0.01) for name, weight in weights.items()}, folder / "model.safetensors")


@torch.no_grad()
def draw_on_device(model: Any) -> Any:
    """In the place of the trainer's own draw, which would take a minute of one core for the largest model."""
    for weight in model.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02)
    return model


def measure_stock(fields: dict[str, Any], timing: dict[str, Any], checkpointing: bool, liger: bool) -> dict[str, Any]:
    """LlamaForCausalLM under DeepSpeed's documented ZeRO-2 offload settings with its own defaults, pinned on a card. DeepSpeed
    forgets the card's peak at each group of parameters; here it may not.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from scripts.engine.distributed import device_of, ranks_from_launcher

    config, started, device = TrainingConfig(**fields), time.perf_counter(), device_of(ranks_from_launcher())
    is_cuda, shape = device.type == "cuda", (config.micro_batch_rows, config.context_length)
    settings = {
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        "gradient_accumulation_steps": config.accumulation_steps(1),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": is_cuda}},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    }
    deepspeed.init_distributed("nccl" if is_cuda else "gloo", verbose=False)
    module = stock_model(config, device, checkpointing, liger)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    get_accelerator().reset_peak_memory_stats = lambda device_index=None: None  # pyright: ignore
    engine = deepspeed.initialize(model=module, config=settings)[0]
    ready = when_ready(started)

    def step(mark: Callable[[], None]) -> None:
        for _ in range(config.accumulation_steps(1)):
            ids = torch.randint(0, config.vocab_size, shape, device=device)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            mark()

    found = speed(step, config, timing)
    return ready | {"planned_gb": None, "host_planned_gb": None} | peaks() | found


def stock_model(config: TrainingConfig, device: torch.device, checkpointing: bool, liger: bool) -> Any:
    """transformers' Llama of the same shape, made on the device in bfloat16."""
    from footprint_vs_stock import llama

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        module = llama(config)  # pyright: ignore[reportArgumentType]
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        newer = hasattr(module, "activation_checkpointing_enable")
        module.activation_checkpointing_enable() if newer else module.gradient_checkpointing_enable()
    return module


def when_ready(started: float) -> dict[str, float | None]:
    """Seconds since `started` and the card's peak, before the first step."""
    return {"ready_seconds": round(time.perf_counter() - started, 1), "initialisation_gb": peaks()["allocated_gb"]}


def peaks() -> dict[str, float | None]:
    """The peaks of this process until now, on a card and on the host."""
    counted: dict[str, float | None] = {"allocated_gb": None, "reserved_gb": None, "host_gb": in_gb(peak_bytes().host_bytes)}
    if torch.cuda.is_available():
        counted["allocated_gb"] = in_gb(torch.cuda.max_memory_allocated())
        counted["reserved_gb"] = in_gb(torch.cuda.max_memory_reserved())
    return counted


def in_gb(amount: float | None, unit: float = 1) -> float | None:
    """Bytes, or multiples of `unit` bytes, in GB as the results hold them."""
    return None if amount is None else round(amount * unit / GB, 3)


def speed(step: Step, config: TrainingConfig, timing: dict[str, Any]) -> dict[str, Any]:
    """The median of some steps after one that is not counted, and the parts of one more."""
    taken: list[float] = []
    seconds_of(step)
    while len(taken) < timing["least"] or (len(taken) < timing["most"] and sum(taken) < timing["seconds"]):
        taken.append(seconds_of(step))
    seconds = statistics.median(taken)
    per_second = config.tokens_per_step / seconds
    return {
        "num_parameters": config.num_parameters, "tokens_per_step": config.tokens_per_step,
        "micro_batches": config.accumulation_steps(1), "step_seconds": round(seconds, 4),
        "tokens_per_second": float(f"{per_second:.4g}"), "mfu": share_of_peak(config, per_second, machine()["gpu"]),
    } | (parts_of(step) if timing["is_split"] else {"micro_batch_seconds": None, "end_seconds": None})  # fmt: skip


def seconds_of(step: Step) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    step(lambda: None)
    synchronise()
    return time.perf_counter() - started


def parts_of(step: Step) -> dict[str, float]:
    """Seconds of a micro-batch, the first and the last left out where there are others, and what the last takes beyond it."""
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronise()
        marks.append(time.perf_counter())

    step(mark)
    each = [stop - start for start, stop in pairwise(marks)]
    micro_batch = statistics.median(each[1:-1] or each[:1])
    return {"micro_batch_seconds": round(micro_batch, 4), "end_seconds": round(max(0.0, each[-1] - micro_batch), 4)}


def share_of_peak(config: TrainingConfig, tokens_per_second: float, gpu: str | None) -> float | None:
    """The model's FLOP in a second over what the card can do at most; None for a card that is not in PEAK_TFLOPS."""
    flops = flops_per_token(replace(config, activation_checkpointing="none")) * tokens_per_second
    return round(flops / (PEAK_TFLOPS[gpu] * 1e12), 4) if gpu in PEAK_TFLOPS else None


def synchronise() -> None:
    """Waits for the card, if there is one."""
    torch.cuda.synchronize() if torch.cuda.is_available() else None


def words_of(record: dict) -> str:
    """What a row found, in a few words."""
    found, kind = record.get("found", {}), record["kind"]
    if record["outcome"] != DONE:
        return f"{record['outcome']}: {record['words']}"
    if kind == "compile":
        return "ready"
    if kind == "tests":
        return ", ".join(f"{number} {name}" for name, number in found.items())
    if kind == "train":
        losses = f"loss {found['first_loss']:.2f} -> {found['last_loss']:.2f} in {found['steps']} steps"
        return f"passed; {losses}, {found['skipped_steps']} skipped"
    if kind == "alike":
        same = f"bitwise equal: {found['files']} files and {found['steps']} losses"
        return f"NOT EQUAL: {', '.join(found['unlike'])}" if found["unlike"] else same
    planned = "" if found["planned_gb"] is None else f" of {found['planned_gb']:.2f} planned"
    kind_of_peak = "host" if found["allocated_gb"] is None else "allocated"
    peak = f"{kind_of_peak} {found[f'{kind_of_peak}_gb']:.2f} GB{planned}"
    words = f"{found['tokens_per_second']:,.0f} tokens/s, {peak}{cell(found.get('mfu'), ', MFU {:.1%}')}"
    bits = "{bits_before:.2f} -> {bits_after:.2f} bits per byte held out, {job_seconds:.0f} s, "
    return bits.format(**found) + words if kind == "job" else words


def table(records: list[dict], card: str | None) -> str:
    """All that is known of a card, the newest record of each row, as a person reads it."""
    newest = {(each["part"], each["model"], each["contender"]): each for each in records if each["card"] == card}
    found = [each for each in newest.values() if each["kind"] != "compile" or each["outcome"] != DONE]
    done = [each for each in found if each["outcome"] == DONE]
    numbers = [each for each in done if each["part"] != "exact"]
    numbers.sort(key=lambda each: (each["found"]["num_parameters"], each["found"]["micro_batches"], not is_ours(each)))
    ratios = [each for each in map(planned_ratio, numbers) if each is not None]
    commits = {str(each["commit"]) for each in found if is_old(each)}
    sections = [
        columns("What is exact, and the main job", [[title(each), words_of(each)] for each in done if each["part"] == "exact"]),
        *(speeds(heading, [each for each in numbers if each["part"] in parts]) for heading, parts in SECTIONS.items()),
        f"\nplanned / measured in {len(ratios)} rows: {min(ratios):.3f} to {max(ratios):.3f}" if ratios else "",
        against_published([each for each in numbers if each["kind"] == "ours"], card),
        columns("Without numbers", [[title(each), words_of(each)[:WIDTH]] for each in found if each["outcome"] != DONE]),
        f"\n* of older code, commit {', '.join(sorted(commits))}" if commits else "",
    ]
    return "\n".join([f"\n{card or 'No card'}", *filter(None, sections)])


def title(record: dict) -> str:
    """What is measured, in one phrase, with a star where the code has changed since."""
    return ", ".join(filter(None, [record["model"], record["contender"]])) + "*" * is_old(record)


def is_old(record: dict) -> bool:
    """Whether a record is of other code than the present."""
    return record["code"] != code_digest(record["kind"])


def speeds(heading: str, rows: list[dict]) -> str:
    """Speed and peaks by model, those of others as multiples of ours with as many micro-batches too."""
    head = ["", "tokens/s", "x ours", "MFU", "GPU GB", "x ours", "planned", "/ measured", "goal", "host GB", "planned"]
    own = {key_of(each): each["found"] for each in rows if is_ours(each)}
    lines = []
    for each in rows:
        its, mine = each["found"], {} if is_ours(each) else own.get(key_of(each), {})
        faster, larger = (over(its[name], mine.get(name)) for name in ("tokens_per_second", "allocated_gb"))
        speed, mfu = cell(its["tokens_per_second"], "{:,.0f}"), cell(its["mfu"], "{:.1%}")
        numbers = [speed, cell(faster), mfu, cell(its["allocated_gb"]), cell(larger), cell(its["planned_gb"])]
        numbers += [cell(planned_ratio(each), "{:.3f}"), cell(each["goal_gb"])]
        lines.append([title(each), *numbers, cell(its["host_gb"]), cell(its["host_planned_gb"])])
    return columns(heading, [head, *lines] if lines else [])


def is_ours(record: dict) -> bool:
    """Whether a record is of the trainer with offload, to which others are compared."""
    return record["contender"].startswith("tightfit")


def key_of(record: dict) -> str:
    """The same for rows whose speed can be compared."""
    return f"{record['model']} {record['found']['tokens_per_step']}"


def over(amount: float | None, other: float | None) -> float | None:
    """One number over another, None where either is missing."""
    return amount / other if amount and other else None


def planned_ratio(record: dict) -> float | None:
    """The plan of a row's peak on the card over what was measured."""
    return over(record["found"]["planned_gb"], record["found"]["allocated_gb"])


def cell(amount: float | None, form: str = "{:.2f}") -> str:
    """A number as a column holds it, nothing where there is none."""
    return "" if amount is None else form.format(amount)


def against_published(ours: list[dict], card: str | None) -> str:
    """Ours at PUBLISHED_TOKENS a step over what others publish, as it is, and for each TFLOP/s that the two cards can do."""
    lines = []
    for each in PUBLISHED:
        own = at_published([record["found"] for record in ours if record["model"] == each.model], each.model, card)
        if own is not None:
            line = [f"{own.model}, ours, {own.trainer}", f"{own.tokens_per_second:,}"]
            plain = own.tokens_per_second / each.tokens_per_second
            peak = over(PEAK_TFLOPS.get(each.card or ""), PEAK_TFLOPS.get(card or ""))
            where = each.card.removeprefix("NVIDIA GeForce ") if each.card else "card not named"
            fair = cell(peak and plain * peak)
            lines += [] if line in lines else [line]
            lines.append([f"  {each.trainer}, {where}", f"{each.tokens_per_second:,}", f"{plain:.2f}", fair])
    head = ["", "tokens/s", "ours over it", "for each TFLOP/s"]
    return columns(f"Against published figures: bf16, {PUBLISHED_TOKENS:,} tokens a step", [head, *lines] if lines else [])


def at_published(found: list[dict], model: str, card: str | None) -> Published | None:
    """Ours at PUBLISHED_TOKENS a step: of a whole step where one was measured, else the best estimate from a step's parts."""
    estimates = []
    for its in found:
        if its["tokens_per_step"] == PUBLISHED_TOKENS:
            return Published(model, "a whole step", card, round(its["tokens_per_second"]))
        if its["micro_batch_seconds"]:
            many = PUBLISHED_TOKENS * its["micro_batches"] // its["tokens_per_step"]
            seconds = many * its["micro_batch_seconds"] + its["end_seconds"]
            words = f"estimated: {many} x {its['micro_batch_seconds']:.3f} s + {its['end_seconds']:.2f} s at the end"
            estimates.append(Published(model, words, card, round(PUBLISHED_TOKENS / seconds)))
    return max(estimates, key=lambda each: each.tokens_per_second, default=None)


def columns(heading: str, lines: list[list[str]]) -> str:
    """A table without its empty columns: numbers flush right, words and the first column flush left. "" without lines."""
    filled = [column for column in zip_longest(*lines, fillvalue="") if any(column[1:]) or len(lines) == 1]
    sides = ["<" if at == 0 or len(filled) == 2 else ">" for at in range(len(filled))]
    widths = [max(map(len, column)) for column in filled]
    aligned = [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in zip(*filled, strict=True)
    ]
    return "\n  ".join([f"\n{heading}", *aligned]) if lines else ""


KINDS: dict[str, tuple[Callable, ...]] = {
    "compile": (compile_extension,),
    "tests": (measure_tests,),
    "job": (measure_job,),
    "alike": (measure_alike, launch_all, train, write_corpus),
    "train": (train, write_corpus),
    "ours": (measure_ours, random_data, write_teacher, draw_on_device, peaks, speed, seconds_of, parts_of),
    "stock": (measure_stock, stock_model, peaks, speed, seconds_of, parts_of),
}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*json.loads(sys.argv[1]))
    else:
        main()
