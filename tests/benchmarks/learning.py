"""What each optimizer learns from the same tokens: the held-out loss of the main job's model against tokens and seconds.

`python tests/benchmarks/learning.py` trains what is missing in tests/benchmarks/results/learning.json, one row after another,
writes after each, and draws docs/learning.png. The same command again goes on. Each row is a process of its own, with the main
job's model, data order and schedule; the held-out loss is that of the whole held-out part. The learning rate of AdamW and
those of nanochat's classes come from sweeps, which are rows too. nanochat is measured where `nanochat` can be imported, such as
from a checkout on PYTHONPATH; its code is not here.
"""

import ast
import json
import math
import multiprocessing
import os
import socket
import statistics
import sysconfig
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from pretrain_vs_stock import machine

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ds.loader import micro_batches
from scripts.config import PRETRAIN, TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.documents import Windows
from scripts.model.losses import next_token
from scripts.prepare_data import prepare
from scripts.run.evaluate import evaluate, held_out_windows
from scripts.run.state import data_order
from scripts.train_pretrain import pretrain
from scripts.trainer import learning_rate_at

RESULT, PICTURE = Path(__file__).parent / "results" / "learning.json", Path(__file__).parents[2] / "docs" / "learning.png"
TEXTS = ("the standard library", "Python's documentation")
SEEDS, EVAL_EVERY, GOAL = (0, 1, 2), 100, 0.75
NANOCHAT = "nanochat's MuonAdamW"
OURS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "optimizer_state_precision": "fp32"},
    "AdamW, 16-bit moments": {"optimizer": "adamw", "optimizer_state_precision": "bf16"},
    "Muon": {"optimizer": "muon", "optimizer_state_precision": "fp32"},
    "Muon, 16-bit moments": {"optimizer": "muon", "optimizer_state_precision": "bf16"},
}
ADAMW_RATES, NANOCHAT_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2), (0.01, 0.02, 0.04)
LONGER = (1.0, 1.25, 1.5)


class Row(NamedTuple):
    """One training: `rate` is the learning rate, of nanochat that of its matrices; `length` in steps of the main job."""

    text: str
    contender: str
    seed: int
    rate: float
    length: float = 1.0


def main() -> None:
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    kept = {Row(**{name: row[name] for name in Row._fields}): row for row in found["rows"]}
    folder = Path(tempfile.mkdtemp())
    for text in TEXTS:
        for row in rows_of(text, kept):
            if row not in kept:
                kept[row] = row._asdict() | measured(row, folder) | {"machine": machine()}
                print(
                    json.dumps({name: kept[row][name] for name in (*Row._fields, "val_bits_per_byte", "seconds")}), flush=True
                )
                RESULT.write_text(json.dumps({"summary": summary(kept), "rows": list(kept.values())}, indent=1) + "\n")
    draw(kept)
    print(json.dumps(summary(kept), indent=2))


def rows_of(text: str, kept: dict[Row, dict]):
    """The rows of one text, in an order in which those that a later one depends on have been measured."""
    yield from (Row(text, "Muon, 16-bit moments", seed, PRETRAIN.learning_rate) for seed in SEEDS)
    yield from (Row(text, "AdamW", 0, rate) for rate in ADAMW_RATES)
    best = best_rate(kept, text, "AdamW")
    yield from (Row(text, "AdamW", seed, best) for seed in SEEDS)
    yield from (Row(text, "AdamW", 0, best, length) for length in LONGER)
    yield from (Row(text, name, seed, PRETRAIN.learning_rate) for name in ("Muon",) for seed in SEEDS)
    yield from (Row(text, "AdamW, 16-bit moments", seed, best) for seed in SEEDS)
    if find_spec("nanochat") is not None:
        yield from (Row(text, NANOCHAT, 0, rate) for rate in NANOCHAT_RATES)
        yield from (Row(text, NANOCHAT, seed, best_rate(kept, text, NANOCHAT)) for seed in SEEDS)


def best_rate(kept: dict[Row, dict], text: str, contender: str) -> float:
    """The rate at which a contender's loss with the first seed is least."""
    tried = [row for row in kept if (row.text, row.contender, row.seed, row.length) == (text, contender, 0, 1.0)]
    return min(tried, key=lambda row: kept[row]["val_loss"]).rate


def measured(row: Row, folder: Path) -> dict[str, Any]:
    """What a training of its own process found: its curve, and the last loss in nats a token and bits a byte."""
    pipe, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=train_row, args=(row, folder, theirs))
    process.start()
    theirs.close()
    curve = pipe.recv()
    process.join()
    last = curve[-1]
    return {"curve": curve, **{name: last[name] for name in ("tokens", "seconds", "val_loss", "val_bits_per_byte")}}


def train_row(row: Row, folder: Path, pipe) -> None:
    """One training, ours by `pretrain`, nanochat's by a plain loop; sends its curve."""
    as_only_rank()
    config = config_of(row, folder)
    if row.contender == NANOCHAT:
        pipe.send(train_by_nanochat(config, row.rate))
        return
    pretrain(config)
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train"}
    pipe.send(
        [
            {name: line[name] for name in ("tokens", "val_loss", "val_bits_per_byte")}
            | {"seconds": round(sum(seconds for step, seconds in steps.items() if step <= line["step"]), 1)}
            for line in lines
            if line["kind"] == "eval"
        ]
    )


def config_of(row: Row, folder: Path) -> TrainingConfig:
    """The main job with one optimizer, on one text, evaluated on all that is held out."""
    name, steps = (
        f"{row.contender}-{row.seed}-{row.rate}-{row.length}".replace(" ", "-"),
        round(row.length * PRETRAIN.num_steps),
    )
    text = TEXTS.index(row.text)
    data = {"data_dir": str(folder / f"data-{text}"), "corpus": PRETRAIN.corpus if text == 0 else documentation(folder)}
    changes = OURS.get(row.contender, {"optimizer": "adamw", "optimizer_state_precision": "fp32"})
    rate = PRETRAIN.learning_rate if row.contender == NANOCHAT else row.rate
    rates = {"learning_rate": rate, "min_learning_rate": rate * PRETRAIN.min_learning_rate / PRETRAIN.learning_rate}
    config = replace(
        PRETRAIN, **data, **changes, **rates, run_dir=str(folder / f"{text}-{name}"), seed=row.seed, num_steps=steps,
        eval_every_steps=EVAL_EVERY, sample_every_steps=None, save_every_steps=None,
    )  # fmt: skip
    length, validation = config.context_length, prepare(config).validation
    return replace(config, eval_tokens=0 if validation is None else validation.num_tokens // length * length)


def documentation(folder: Path) -> tuple[str, ...]:
    """Python's documentation as files: the topics of its language reference, and the docstrings of each module."""
    made = folder / "documentation"
    if not made.exists():
        made.mkdir()
        for name, text in topics.items():
            (made / f"topic-{name}.txt").write_text(text)
        library = Path(sysconfig.get_path("stdlib"))
        for path in sorted(library.glob("**/*.py")):
            parts = path.relative_to(library).parts
            if not {"test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib"} & {*parts}:
                text = docstrings(path)
                if text:
                    (made / (".".join(parts) + ".txt")).write_text(text)
    return (str(made),)


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and functions, in the order in which they stand."""
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(getattr(node, "name", path.stem), ast.get_docstring(node)) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(f"{name}\n\n{text}" for name, text in found if text)


def train_by_nanochat(config: TrainingConfig, matrix_rate: float) -> list[dict[str, float]]:
    """The same model and order under nanochat's classes as its base training sets them, but for rates, on our schedule: of
    matrices `matrix_rate`, of all else ours. Returns the curve.
    """
    from nanochat.optim import MuonAdamW  # pyright: ignore[reportMissingImports]

    data, model = prepare(config), initialise(empty_model(replace(config, precision="fp32"), torch.device("cpu")))
    groups, matrices = parameter_groups(model, config.weight_decay), {}
    for weight in (weight for group in groups if group["is_block"] for weight in group["params"]):
        matrices.setdefault(weight.shape, []).append(weight)
    muon = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": config.weight_decay}
    adam = {"kind": "adamw", "betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    kinds = [muon | {"params": same, "lr": matrix_rate, "peak": matrix_rate} for same in matrices.values()]
    kinds += [group | adam | {"lr": 0.0, "peak": config.learning_rate} for group in groups if not group["is_block"]]
    optimizer, curve, seconds = MuonAdamW(kinds), [held_out(config, data, model, 0, 0.0)], 0.0
    for step in range(config.num_steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_at(step, config) / config.learning_rate
        gradients(config, data, model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        seconds += time.perf_counter() - started
        if (step + 1) % EVAL_EVERY == 0:
            curve.append(held_out(config, data, model, step + 1, seconds))
    return curve


def gradients(config: TrainingConfig, data, model, step: int) -> None:
    """Adds the mean gradient of a step's windows up in `model`."""

    class Engine:
        module = model
        __call__ = staticmethod(model)

    share = {"rank": 0, "world_size": 1, "micro_batch_rows": config.micro_batch_rows}
    for batch in micro_batches(data.train, data_order(config, data), step=step, **share):
        loss = next_token(Engine(), Windows(torch.from_numpy(batch.ids)), config)
        (loss / config.accumulation_steps(1)).backward()


def held_out(config: TrainingConfig, data, model, step: int, seconds: float) -> dict[str, float]:
    """One point of a curve."""
    windows = held_out_windows(config, Ranks(0, 1, 0, 1, 0), data, config.eval_tokens)
    found = evaluate(model, windows, torch.tensor(data.token_num_bytes()), config.loss_chunk_rows)
    tokens = {"tokens": step * config.tokens_per_step, "seconds": round(seconds, 1)}
    return tokens | {"val_loss": found.nats_per_token, "val_bits_per_byte": found.bits_per_byte}


def summary(kept: dict[Row, dict]) -> dict[str, Any]:
    """For each text the mean last loss of each contender at its rate, and the share of AdamW's tokens that Muon needs."""
    found: dict[str, Any] = {}
    for text in TEXTS:
        names = dict.fromkeys(row.contender for row in kept if row.text == text)
        means = {name: mean_of(kept, text, name) for name in names}
        found[text] = {"goal_of_the_ratio": GOAL, "contenders": means, "tokens_of_muon_over_adamw": ratio(kept, text)}
    return found


def mean_of(kept: dict[Row, dict], text: str, contender: str) -> dict[str, Any]:
    rate = best_rate(kept, text, contender) if any(row.seed == 0 for row in kept if row.contender == contender) else None
    same = [kept[row] for row in kept if row[:2] == (text, contender) and row.rate == rate and row.length == 1.0]
    losses = [row["val_loss"] for row in same]
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    bits, seconds = (statistics.mean(row[name] for row in same) for name in ("val_bits_per_byte", "seconds"))
    mean = {"rate": rate, "seeds": len(same), "val_loss": statistics.mean(losses), "val_loss_deviation": spread}
    return mean | {"val_bits_per_byte": bits, "seconds": round(seconds, 1)}


def ratio(kept: dict[Row, dict], text: str) -> float | None:
    """Muon's tokens over those that AdamW needs for the loss with which Muon ends, both with the first seed: between AdamW's
    runs of several lengths the logarithm of tokens is interpolated over the loss. None where no run of AdamW gets there.
    """
    muon = [row for row in kept if row[:3] == (text, "Muon, 16-bit moments", 0)]
    runs = sorted((row for row in kept if row[:3] == (text, "AdamW", 0)), key=lambda row: row.length)
    runs = [row for row in runs if runs and row.rate == best_rate(kept, text, "AdamW")]
    if not muon or len(runs) < len(LONGER):
        return None
    losses, tokens = ([kept[row][name] for row in runs] for name in ("val_loss", "tokens"))
    wanted = kept[muon[0]]["val_loss"]
    if wanted < min(losses):
        return None
    return float(kept[muon[0]]["tokens"] / math.exp(np.interp(-wanted, [-loss for loss in losses], np.log(tokens))))


def draw(kept: dict[Row, dict]) -> None:
    """Curves of the first seed: a column for each text, above against tokens, below against seconds."""
    texts = [text for text in TEXTS if any(row.text == text for row in kept)]
    figure, axes = plt.subplots(2, len(texts), figsize=(6 * len(texts), 8), squeeze=False, layout="constrained")
    for column, text in enumerate(texts):
        for contender in dict.fromkeys(row.contender for row in kept if row.text == text):
            rate = best_rate(kept, text, contender)
            curve = kept[Row(text, contender, 0, rate)]["curve"][1:]
            for panel, name, unit in zip(axes[:, column], ("tokens", "seconds"), (1e6, 60), strict=True):
                x = [point[name] / unit for point in curve]
                panel.plot(x, [point["val_bits_per_byte"] for point in curve], label=f"{contender}, {rate:g}")
        for panel, label in zip(axes[:, column], ("tokens, millions", "minutes of steps"), strict=True):
            panel.set(xlabel=label, ylabel="held-out bits per byte", title=text)
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(PICTURE, dpi=110)


def as_only_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    main()
