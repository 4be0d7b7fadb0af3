"""What masking across documents costs, at 2 to 64 documents a window, and what it does to the held-out loss of the main job.

`python tests/benchmarks/masking.py` measures tokens/s and peak memory of the main job's step: each contender lives in a process
of its own, and they take turns, one optimizer step at a time. `python tests/benchmarks/masking.py loss` trains the main job
with and without the mask, with three seeds. Both write to tests/benchmarks/results/masking.json.
"""

import json
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_vs_stock import machine

from ds.shards import TokenStream, open_shard, write_shard
from scripts import trainer
from scripts.config import PRETRAIN, TrainingConfig
from scripts.model.losses import next_token
from scripts.train_pretrain import pretrain

RESULT = Path(__file__).parent / "results" / "masking.json"
ROUNDS, WARM_UP_ROUNDS, NUM_TOKENS = 10, 2, 100_000
DOCUMENTS = (2, 4, 8, 16, 32, 64)
UNMASKED = "no mask"
SEEDS, LOSS_STEPS = (0, 1, 2), PRETRAIN.num_steps


def main() -> None:
    found = measure_losses() if sys.argv[1:] == ["loss"] else measure_speed()
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(kept | found, indent=2) + "\n")


def measure_speed() -> dict[str, Any]:
    """Each number of documents a window with the mask, beside the same step without it; ratios are masked over unmasked."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in (UNMASKED, *map(str, DOCUMENTS)):
        pipes[name], theirs = context.Pipe()
        context.Process(target=contend, args=(name, theirs), daemon=True).start()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(WARM_UP_ROUNDS + ROUNDS):
        for name, pipe in pipes.items():
            pipe.send("step")
            taken = pipe.recv()
            seconds[name] += [taken] if turn >= WARM_UP_ROUNDS else []
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send("stop")
        peaks[name] = pipe.recv()
    rows = [row_of(name, seconds, peaks) for name in pipes]
    for row in rows:
        print(row)
    return {"machine": machine(), "rounds": ROUNDS, "speed": rows}


def row_of(name: str, seconds: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    """One contender's median step, and the median over rounds of its ratio to the unmasked step of the same round."""
    ratios = [base / own for base, own in zip(seconds[UNMASKED], seconds[name], strict=True)]
    return {
        "documents_a_window": name,
        "tokens_per_second": round(PRETRAIN.tokens_per_step / statistics.median(seconds[name]), 1),
        "peak_gib": round(peaks[name], 3),
        "speed_ratio": round(statistics.median(ratios), 3),
        "memory_ratio": round(peaks[name] / peaks[UNMASKED], 3),
        "seconds_per_step": [round(value, 4) for value in seconds[name]],
    }


def contend(name: str, pipe: Any) -> None:
    """One contender: makes a step of the main job's shape whenever it is told to; at the end its peak in GiB."""
    as_only_rank()
    folder, is_masked = Path(tempfile.mkdtemp()), name != UNMASKED
    stream = drawn_stream(folder / "train.bin", int(name) if is_masked else DOCUMENTS[0])
    config = replace(PRETRAIN, run_dir=str(folder / "run"), data_dir=str(folder), mask_across_documents=is_masked)
    data: Any = type("Random", (), {"fingerprint": "", "train": stream, "end_of_text_id": 0})
    run: Any = trainer.set_up(config, lambda _: data)
    steps = iter(range(config.num_steps))
    pipe.send("ready")
    while pipe.recv() == "step":
        started = time.perf_counter()
        trainer.run_step(run, next_token, next(steps))
        pipe.send(time.perf_counter() - started)
    own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    pipe.send((torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own_bytes) / 2**30)


def drawn_stream(path: Path, documents_a_window: int) -> TokenStream:
    """Random tokens of which each window of the main job holds so many documents, cut at random; id 0 ends a document."""
    generator, length = np.random.default_rng(documents_a_window), PRETRAIN.context_length
    ids = generator.integers(1, PRETRAIN.vocab_size, NUM_TOKENS).astype(np.uint16)
    for first in range(0, NUM_TOKENS - length, length):
        ids[first + generator.choice(length - 1, documents_a_window - 1, replace=False)] = 0
    write_shard(path, ids, PRETRAIN.vocab_size, "0" * 64)
    return TokenStream((open_shard(path),), "0" * 64)


def measure_losses() -> dict[str, Any]:
    """The held-out loss of the main job after LOSS_STEPS steps, each evaluated as it was trained."""
    context, folder, rows = multiprocessing.get_context("spawn"), Path(tempfile.mkdtemp()), []
    for seed in SEEDS:
        for is_masked in (False, True):
            config = replace(
                PRETRAIN, run_dir=str(folder / f"{seed}-{is_masked}"), data_dir=str(folder / "data"), seed=seed,
                mask_across_documents=is_masked, num_steps=LOSS_STEPS, warmup_steps=min(PRETRAIN.warmup_steps, LOSS_STEPS - 1),
                save_every_steps=None, sample_every_steps=None,
            )  # fmt: skip
            process = context.Process(target=train_alone, args=(config,))
            process.start()
            process.join()
            rows.append({"seed": seed, "masked": is_masked} | outcome(config))
            print(rows[-1], flush=True)
    steps = {"loss_steps": LOSS_STEPS, "steps_of_the_main_job": PRETRAIN.num_steps}
    means = {"mean_with": mean_of(rows, True), "mean_without": mean_of(rows, False)}
    return {"loss_machine": machine(), **steps, "loss": rows, **means}


def mean_of(rows: list[dict[str, Any]], masked: bool) -> dict[str, float]:
    """Over the seeds."""
    kept, keys = [row for row in rows if row["masked"] == masked], ("val_loss", "val_bits_per_byte")
    return {key: statistics.mean(row[key] for row in kept) for key in keys}


def train_alone(config: TrainingConfig) -> None:
    as_only_rank()
    pretrain(config)


def outcome(config: TrainingConfig) -> dict[str, Any]:
    """The last evaluation of a run, the share of windows that crossed documents and the time that its steps took."""
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    steps = [line for line in lines if line["kind"] == "train"]
    return {
        "tokens": last["tokens"],
        "val_loss": last["val_loss"],
        "val_bits_per_byte": last["val_bits_per_byte"],
        "crossing_share": round(statistics.mean(line["crossing_share"] for line in steps), 4),
        "seconds": round(sum(line["seconds"] for line in steps), 1),
    }


def as_only_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    main()
