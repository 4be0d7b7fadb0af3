"""Tokens/s and peak memory of the pre-training step against transformers' Llama under stock DeepSpeed ZeRO-2 offload.

`python tests/benchmarks/pretrain_vs_stock.py` prints a table and writes tests/benchmarks/results/pretrain_vs_stock.json. Each
contender lives in a process of its own; they take turns, one optimizer step at a time, while the others wait.
"""

import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "pretrain_vs_stock.json"
ROUNDS = 2
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, CONTEXT, ROWS, MICRO_BATCHES = 8192, 384, 8, 6, 2, 1024, 512, 8, 2
TOKENS_PER_STEP = CONTEXT * ROWS * MICRO_BATCHES
CONTENDERS = {
    "tightfit, bf16": "none",
    "tightfit, bf16, block": "block",
    "stock, bf16": "bf16",
    "stock, fp32": "fp32",
}
LEARNING_RATE = 1e-3


def main() -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(name, theirs), daemon=True))
        processes[-1].start()
        pipes[name].recv()
    seconds = {name: [] for name in CONTENDERS}
    for turn in range(ROUNDS):
        for name, pipe in pipes.items():
            pipe.send("step")
            seconds[name].append(pipe.recv())
            print(f"round {turn + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send("stop")
        peaks[name] = pipe.recv()
    publish(seconds, peaks)


def contend(name: str, pipe) -> None:
    """One contender: builds its step, then makes one whenever it is told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step = (ours if name.startswith("tightfit") else stock)(CONTENDERS[name])
    pipe.send("ready")
    while pipe.recv() == "step":
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def ours(activation_checkpointing: str):
    """The trainer's own step on random shards."""
    import numpy as np

    from ds.shards import TokenStream, open_shard, write_shard
    from scripts import trainer
    from scripts.model.losses import next_token

    folder = Path(tempfile.mkdtemp())
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 400_000).astype(np.uint16)
    write_shard(folder / "train.bin", ids, VOCABULARY, "0" * 64)
    stream = TokenStream((open_shard(folder / "train.bin"),), "0" * 64)
    config = our_config(folder, activation_checkpointing)
    run = trainer.set_up(config, lambda _: type("Random", (), {"fingerprint": "", "train": stream, "end_of_text_id": 0}))
    steps = iter(range(config.num_steps))
    return lambda: trainer.run_step(run, next_token, next(steps))  # pyright: ignore[reportArgumentType]


def our_config(folder: Path, activation_checkpointing: str):
    """The model that all contenders train, as ours, with its run in `folder`."""
    from scripts.config import TrainingConfig

    return TrainingConfig(
        run_dir=str(folder / "run"), corpus=(str(folder),), vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS,
        num_heads=HEADS, num_kv_heads=KV_HEADS, mlp_size=MLP, context_length=CONTEXT, micro_batch_rows=ROWS, qk_norm=False,
        tokens_per_step=TOKENS_PER_STEP, learning_rate=LEARNING_RATE, min_learning_rate=LEARNING_RATE / 10, optimizer="adamw",
        optimizer_state_precision="fp32", activation_checkpointing=activation_checkpointing, loss_chunk_rows=256,
        tie_embeddings=True,
    )  # fmt: skip


def stock(precision: str):
    """LlamaForCausalLM with labels, and DeepSpeed's documented ZeRO-2 offload settings with its own defaults."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, intermediate_size=MLP, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}},
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    }
    model = LlamaForCausalLM(shape)
    model = model.bfloat16() if precision == "bf16" else model
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(0, VOCABULARY, (ROWS, CONTEXT), generator=generator).to(engine.device)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

    return step


def publish(seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """The table on the terminal and the numbers as JSON; ratios are ours over the contender's."""
    speed = {name: TOKENS_PER_STEP / statistics.median(values) for name, values in seconds.items()}
    mine = next(iter(CONTENDERS))
    rows = [
        {
            "contender": name,
            "tokens_per_second": round(speed[name], 1),
            "peak_rss_gib": round(peaks[name], 3),
            "our_speed_ratio": round(speed[mine] / speed[name], 2),
            "our_memory_ratio": round(peaks[mine] / peaks[name], 2),
            "seconds_per_step": [round(value, 2) for value in seconds[name]],
        }
        for name in CONTENDERS
    ]
    print(f"\n{'':24}{'tokens/s':>10}{'peak RSS GiB':>14}{'our speed':>11}{'our memory':>12}")
    for row in rows:
        print(f"{row['contender']:24}{row['tokens_per_second']:>10,.0f}{row['peak_rss_gib']:>14.2f}", end="")
        print(f"{row['our_speed_ratio']:>10.2f}x{row['our_memory_ratio']:>11.2f}x")
    RESULT.write_text(json.dumps({"machine": machine(), "rounds": ROUNDS, "rows": rows}, indent=2) + "\n")


def machine() -> dict:
    """What the numbers depend on."""
    import torch

    return {
        "processor": next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_products": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }


def _cpu_lines() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


if __name__ == "__main__":
    main()
