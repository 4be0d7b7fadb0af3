"""The footprint on a GPU: the plan against what torch's allocator counts, the goals for ours and stock, capped runs, tokens/s.

`python tests/benchmarks/gpu_memory.py` prints a line a row and writes tests/benchmarks/results/gpu_memory.json, again after
every row, so that what is measured is kept whatever ends it. Each row is a process of its own with a limit of time, and none is
begun that might outlast WHOLE_SECONDS. Without a CUDA device it says so and writes nothing. Peaks are from before
deepspeed.initialize to the end of the last step, in GB of 10^9 bytes. Tokens and weights are random.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from footprint_vs_stock import MODELS, Model, config_of  # noqa: E402

RESULT = Path(__file__).parent / "results" / "gpu_memory.json"
GB = 1e9
COMPILE_SECONDS, WHOLE_SECONDS, ROW_SECONDS = 180, 530, 60
SECONDS_OF_LARGE = {"3B": 90, "6.7B": 150}
NUM_STEPS, MICRO_BATCHES = 3, 2
BY_NAME = {shape.name.split(",")[0]: shape for shape in MODELS}


class Row(NamedTuple):
    """One process: what it is part of, the model, ours by `mode` or a stock peer by name, changes to our configuration as JSON,
    and the GB that the process may take of the card (None: all).
    """

    part: str
    model: str
    contender: str
    changes: str
    capped_gb: float | None


def changed(**changes: Any) -> str:
    """Changes to a configuration as a row holds them."""
    return json.dumps(changes)


GOALS = (
    Row("goal", "124M", "block", changed(), None),
    Row("goal", "1.3B", "block_offload", changed(), None),
    Row("capped", "124M", "block", changed(), 2.0),
    Row("capped", "1.3B", "block_offload", changed(), 6.0),
    Row("goal", "124M", "stock", changed(), None),
    Row("goal", "1.3B", "stock, checkpointing", changed(), None),
    Row("goal", "1.3B", "stock, checkpointing, Liger", changed(), None),
    Row("capped", "3B", "block_offload", changed(), 10.0),
    Row("goal", "3B", "block_offload", changed(), None),
    Row("goal", "6.7B", "block_offload", changed(), None),
)
GRID = (
    Row("grid", "124M", "none", changed(), None),
    Row("grid", "124M", "block_offload", changed(), None),
    Row("grid", "124M", "none", changed(micro_batch_rows=2), None),
    Row("grid", "124M", "block", changed(micro_batch_rows=16), None),
    Row("grid", "124M", "block", changed(loss_chunk_rows=256), None),
    Row("grid", "124M", "block", changed(accumulate_on="gpu"), None),
    Row("grid", "124M", "block", changed(accumulate_on="gpu", accumulation_precision="bf16"), None),
    Row("grid", "124M", "block", changed(tie_embeddings=False), None),
    Row("grid", "124M", "none", changed(num_kv_heads=4, qk_norm=True), None),
    Row("grid", "124M", "block", changed(context_length=4096, micro_batch_rows=2), None),
    Row("grid", "124M", "block", changed(num_layers=24, vocab_size=8192), None),
    Row("grid", "124M", "block", changed(precision="fp32"), None),
)
TAUGHT = (
    Row("teacher", "124M", "block", changed(teacher="1.3B"), None),
    Row("teacher", "124M", "block", changed(teacher="1.3B", teacher_top_k=32), None),
)


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing is measured.")
        return
    started, rows = time.perf_counter(), []
    compile_adam()
    for row in (*GRID[:6], *GOALS[:4], *TAUGHT, *GOALS[4:], *GRID[6:]):
        limit = SECONDS_OF_LARGE.get(row.model, ROW_SECONDS)
        if time.perf_counter() - started + limit > WHOLE_SECONDS:
            found = {"fault": "not begun: it might outlast the whole's time"}
        else:
            found = in_a_process(row, limit)
        rows.append(row._asdict() | {"changes": json.loads(row.changes)} | found)
        show(rows[-1])
        RESULT.write_text(json.dumps({"machine": machine(), "rows": rows, "summary": summary(rows)}, indent=2) + "\n")
    print(json.dumps(summary(rows), indent=2))


def compile_adam() -> None:
    """Compiles DeepSpeed's CPU Adam where that has not been done, which no row has the time for."""
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", code], timeout=COMPILE_SECONDS, env=environment(), check=True)


def in_a_process(row: Row, limit_seconds: int) -> dict:
    """The numbers of a row, or in `fault` the last line of what went wrong."""
    started = time.perf_counter()
    command = [sys.executable, __file__, json.dumps(row)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, env=environment(), check=False)
    except subprocess.TimeoutExpired:
        return {"fault": f"not done after {limit_seconds} s", "process_seconds": limit_seconds}
    seconds = {"process_seconds": round(time.perf_counter() - started, 1)}
    found = [line for line in done.stdout.splitlines() if line.startswith('{"planned_gb"')]
    if done.returncode or not found:
        return {"fault": " ".join((done.stdout + done.stderr).strip().splitlines()[-1:]), **seconds}
    return json.loads(found[0]) | seconds


def environment() -> dict[str, str]:
    """A launcher's variables for the only rank, and no allocator's but the trainer's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return kept | rank | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}


def measure(row: Row) -> None:
    """The row's process: prints its numbers as JSON and ends."""
    from scripts.engine.distributed import leaving

    shape = BY_NAME[row.model]
    with leaving():
        found = measure_stock(shape, row.contender) if row.contender.startswith("stock") else measure_ours(shape, row)
        print(json.dumps(found), flush=True)


def measure_ours(shape: Model, row: Row) -> dict:
    """The trainer's own steps on random tokens: the plan's peak and the measured ones, and tokens/s of the last step."""
    from scripts import train_distill, trainer
    from scripts.memory import allocated_bytes, plan
    from scripts.model.losses import next_token
    from scripts.run import setup

    folder = Path(tempfile.mkdtemp())
    config = configure(shape, row, folder)
    objective = next_token if config.teacher_dir is None else train_distill.objective_of(config)
    started, setup.initialise = time.perf_counter(), draw_on_device
    run = trainer.set_up(config, lambda _: random_data(folder, config.vocab_size, row.capped_gb), train_distill.label)
    ready_seconds, initial = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    for step in range(NUM_STEPS):
        started = time.perf_counter()
        trainer.run_step(run, objective, step)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {
        "planned_gb": round(allocated_bytes(plan(config, 1)) / GB, 3),
        **peaks(initial),
        "tokens_per_second": round(config.tokens_per_step / seconds),
        "ready_seconds": round(ready_seconds, 1),
    }


def random_data(folder: Path, vocab_size: int, capped_gb: float | None):
    """What the trainer reads; asked for it after CUDA is set up and before anything is loaded, this caps the process too."""
    from ds.shards import TokenStream, open_shard, write_shard
    from ds.tokenizer import raw_bytes
    from scripts.prepare_data import Data

    if capped_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, capped_gb * GB / total))
    ids = np.random.default_rng(0).integers(0, vocab_size, 200_000).astype(np.uint16)
    write_shard(folder / "train.bin", ids, vocab_size, "0" * 64)
    stream = TokenStream((open_shard(folder / "train.bin"),), "0" * 64)
    return Data({}, stream, None, raw_bytes(), "")


def write_teacher(shape: Model, folder: Path) -> str:
    """A transformers folder of bfloat16 weights, all alike, with the tokenizer of `random_data`; its path. CUDA is left alone,
    because the trainer sets it up.
    """
    from safetensors.torch import save_file

    from ds.tokenizer import raw_bytes, to_json
    from scripts.model.decoder import empty_model
    from scripts.model.huggingface import transformers_config

    config = config_of(shape, "none")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(transformers_config(config, 256)))
    (folder / "tokenizer.json").write_text(to_json(raw_bytes()))
    weights = dict(empty_model(config, torch.device("cpu")).named_parameters())
    save_file({name: weight.detach().fill_(0.01) for name, weight in weights.items()}, folder / "model.safetensors")
    return str(folder)


@torch.no_grad()
def draw_on_device(model: Any) -> Any:
    """In the place of the trainer's own draw, which would take a minute of one core for the largest model."""
    for weight in model.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02)
    return model


def configure(shape: Model, row: Row, folder: Path):
    """Our configuration of a row: two micro-batches a step, nothing evaluated, sampled or saved."""
    changes = json.loads(row.changes)
    if "teacher" in changes:
        changes["teacher_dir"] = write_teacher(BY_NAME[changes.pop("teacher")], folder / "teacher")
    length = changes.get("context_length", shape.context_length)
    rows = changes.get("micro_batch_rows", shape.rows)
    never = dict.fromkeys(("eval_every_steps", "sample_every_steps", "save_every_steps"))
    return config_of(
        shape, row.contender, run_dir=str(folder / "run"), data_dir=str(folder), corpus=(str(folder),), eval_tokens=length,
        tokens_per_step=rows * length * MICRO_BATCHES, num_steps=NUM_STEPS + 1, warmup_steps=1, **never, **changes,
    )  # fmt: skip


def measure_stock(shape: Model, contender: str) -> dict:
    """LlamaForCausalLM under DeepSpeed's documented ZeRO-2 offload settings with its own defaults, pinned."""
    import deepspeed

    deepspeed.init_distributed("nccl", verbose=False)
    if "Liger" in contender:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        apply_liger_kernel_to_llama()
    engine = stock_engine(shape, "checkpointing" in contender)
    initial, seconds = torch.cuda.max_memory_allocated(), 0.0
    for _ in range(NUM_STEPS):
        started = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(0, shape.vocab_size, (shape.rows, shape.context_length), device=engine.device)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    tokens = shape.rows * shape.context_length * MICRO_BATCHES
    return {"planned_gb": None, **peaks(initial), "tokens_per_second": round(tokens / seconds)}


def stock_engine(shape: Model, checkpointing: bool) -> Any:
    """The stock engine of a shape; weights are made on the GPU in bfloat16."""
    import deepspeed
    from footprint_vs_stock import llama

    settings = {
        "train_micro_batch_size_per_gpu": shape.rows,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    }
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        module = llama(shape)
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        module.activation_checkpointing_enable()
    torch.cuda.reset_peak_memory_stats()
    return deepspeed.initialize(model=module, config=settings)[0]


def peaks(initial: int) -> dict:
    """Peaks of this process as torch's allocator counts them; `initial` is the one when the first step began."""
    return {
        "initialisation_gb": round(initial / GB, 3),
        "allocated_gb": round(torch.cuda.max_memory_allocated() / GB, 3),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 3),
    }


def summary(rows: list[dict]) -> dict:
    """The worst of the plan, the goals, and what is missing."""
    ours = [row for row in rows if row.get("planned_gb")]
    ratios = [row["planned_gb"] / row["allocated_gb"] for row in ours]
    goals = {
        f"{row['model']}, {row['contender']}": {
            "allocated_gb": row["allocated_gb"],
            "goal_gb": BY_NAME[row["model"]].goal_gb,
            "reached": row["allocated_gb"] <= BY_NAME[row["model"]].goal_gb,
        }
        for row in ours
        if row["part"] == "goal"
    }
    return {
        "configurations": len(ratios),
        "planned_over_measured": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else [],
        "goals": goals,
        "ratios_to_stock": stock_ratios(rows),
        "capped_and_done": [row["model"] for row in rows if row["part"] == "capped" and "fault" not in row],
        "faults": [f"{row['part']}, {row['model']}, {row['contender']}: {row['fault']}" for row in rows if "fault" in row],
    }


def stock_ratios(rows: list[dict]) -> dict[str, float]:
    """Our peak over each stock peer's of the same model."""
    done = [row for row in rows if row["part"] == "goal" and "fault" not in row]
    mine = {row["model"]: row["allocated_gb"] for row in done if row["planned_gb"]}
    return {
        f"{row['model']}, {row['contender']}": round(mine[row["model"]] / row["allocated_gb"], 3)
        for row in done
        if not row["planned_gb"] and row["model"] in mine
    }


def show(row: dict) -> None:
    """One line a row."""
    capped = f", capped at {row['capped_gb']} GB" if row["capped_gb"] else ""
    name = f"{row['part']}: {row['model']}, {row['contender']}{capped} {json.dumps(row['changes'])}"
    if "fault" in row:
        print(f"{name}: {row['fault']}", flush=True)
        return
    planned = f"{row['planned_gb']:.2f} planned / " if row["planned_gb"] else ""
    print(f"{name}: {planned}{row['allocated_gb']:.2f} allocated, {row['reserved_gb']:.2f} reserved GB", end="")
    print(f", {row['tokens_per_second']:,} tokens/s, {row['process_seconds']} s", flush=True)


def machine() -> dict:
    """What the numbers depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "deepspeed", "transformers", "liger-kernel")},
    }


def installed(name: str) -> str | None:
    """A package's version, None where it is not there: the rows that need it say so."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Row(*json.loads(sys.argv[1])))
    else:
        main()
