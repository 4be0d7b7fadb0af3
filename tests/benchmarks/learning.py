"""What each optimizer learns from the same tokens: the held-out loss of the main job's model against tokens and seconds.

`python tests/benchmarks/learning.py` trains what is missing in tests/benchmarks/results/learning.json, one row after another,
writes after each, and draws docs/learning.png. The same command again goes on. Each row is a process of its own on one core,
with the main job's model, data order and schedule, and the two texts run side by side; the held-out loss is that of the whole
held-out part. The learning rate of AdamW and those of nanochat's classes come from sweeps, which are rows too. nanochat is
measured where `nanochat` can be imported, such as from a checkout on PYTHONPATH; its code is not here.

`python tests/benchmarks/learning.py steps` measures the seconds of a step of each contender, turn by turn on all cores: the
picture's seconds are the median of these times the steps. `python tests/benchmarks/learning.py updates` measures the time of an
update by kind, turn by turn, and what 10,000 steps leave of a second moment.
"""

import ast
import json
import math
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from masking import as_only_rank
from pretrain_vs_stock import machine

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ds.loader import micro_batches
from scripts import trainer
from scripts.config import PRETRAIN, TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.engine.updates import Adam, Draws, adam_in_16_bits, descend, orthogonalise, take_momentum
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.documents import Windows
from scripts.model.losses import next_token
from scripts.plan.machine import muon_parameters, newton_schulz_flops, update_bytes
from scripts.prepare_data import prepare
from scripts.run.evaluate import evaluate, held_out_windows
from scripts.run.state import data_order
from scripts.train_pretrain import pretrain
from scripts.trainer import learning_rate_at

RESULT, PICTURE = Path(__file__).parent / "results" / "learning.json", Path(__file__).parents[2] / "docs" / "learning.png"
TEXTS = ("the standard library", "Python's documentation")
SEEDS, EVAL_EVERY, GOAL = (0, 1, 2), 100, 0.75
NANOCHAT = "nanochat's MuonAdamW"
RISING, GROWING = "Muon, 16-bit moments, momentum warm-up", "Muon, 16-bit moments, batch warm-up"
CONSTANT = {"muon_first_momentum": None, "muon_momentum_warmup_steps": None}
OURS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "optimizer_state_precision": "fp32", "muon_learning_rate": None},
    "AdamW, 16-bit moments": {"optimizer": "adamw", "optimizer_state_precision": "bf16", "muon_learning_rate": None},
    "Muon": {"optimizer": "muon", "optimizer_state_precision": "fp32", **CONSTANT},
    "Muon, 16-bit moments": {"optimizer": "muon", "optimizer_state_precision": "bf16", **CONSTANT},
    RISING: {"optimizer": "muon", "optimizer_state_precision": "bf16"},
}
# The same tokens in 38 steps more: the first 100 rise in four stages from a quarter of the batch.
BATCH_WARM_UP = {
    "first_tokens_per_step": PRETRAIN.tokens_per_step // 4, "batch_warmup_steps": 100,
    "micro_batch_rows": PRETRAIN.tokens_per_step // PRETRAIN.context_length // 4, "num_steps": PRETRAIN.num_steps + 38,
}  # fmt: skip
ADAMW_RATES, NANOCHAT_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2), (0.005, 0.01, 0.02, 0.04)
LONGER = (1.0, 1.25, 1.5)
ELEMENTS, ROUNDS, STALL_STEPS = 2**24, 7, 10_000
STEPS_TIMED, SETTLING = 20, 3
DOCUMENTATION_HELD_OUT = 0.12
# A block of width 1024, with 16 heads, 8 of keys and values, and an MLP of 2816.
BLOCK = ((1024, 1024), (512, 1024), (512, 1024), (1024, 1024), (2816, 1024), (2816, 1024), (1024, 2816))
# The host and the link of a desktop, and a card's dense 16-bit products: GB/s of two channels of DDR5-5600 at 0.7, GB/s of PCIe
# 4.0 x8 at 0.8, and TFLOP/s with float32 sums of a GeForce RTX 4060 (NVIDIA's data sheets). Nothing here was measured on it.
DESKTOP = {"host_gb_per_s": 62.7, "link_gb_per_s": 12.6, "tflops": 30.2, "name": "GeForce RTX 4060, planned"}


class Row(NamedTuple):
    """One training: `rate` is the learning rate, of nanochat that of its matrices; `length` in steps of the main job."""

    text: str
    contender: str
    seed: int
    rate: float
    length: float = 1.0


def main() -> None:
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    parts = {"steps": measure_steps, "updates": measure_updates}
    for name in sys.argv[1:]:
        found[name] = parts[name]()
        print(json.dumps(found[name], indent=1))
    kept = {Row(**{name: row[name] for name in Row._fields}): row for row in found["rows"]}
    if not sys.argv[1:]:
        folder, writing = Path(tempfile.mkdtemp()), threading.Lock()
        with ThreadPoolExecutor(len(TEXTS)) as pool:
            list(pool.map(lambda text: measure_text(text, folder, found, kept, writing), TEXTS))
    if kept and "steps" in found:
        draw(kept, found["steps"]["seconds"])
    write(found, kept)


def measure_text(text: str, folder: Path, found: dict[str, Any], kept: dict[Row, dict], writing: threading.Lock) -> None:
    """Trains the rows of one text that are missing, one after another."""
    for row in rows_of(text, kept):
        if row not in kept:
            result = row._asdict() | measured(row, folder) | {"machine": machine()}
            with writing:
                kept[row] = result
                print(json.dumps({name: result[name] for name in (*Row._fields, "val_bits_per_byte")}), flush=True)
                write(found, kept)


def write(found: dict[str, Any], kept: dict[Row, dict]) -> None:
    """Everything found so far, with its summary."""
    found |= {"summary": summary(kept), "rows": list(kept.values())}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


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
    yield Row(text, GROWING, 0, PRETRAIN.learning_rate)
    yield from (Row(text, RISING, seed, PRETRAIN.learning_rate) for seed in SEEDS)


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
    return {"curve": curve, **{name: last[name] for name in ("tokens", "val_loss", "val_bits_per_byte")}}


def train_row(row: Row, folder: Path, pipe) -> None:
    """One training, ours by `pretrain`, nanochat's by a plain loop; sends its curve."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[TEXTS.index(row.text) % len(cores)]})
    as_only_rank()
    config = config_of(row, folder)
    if row.contender == NANOCHAT:
        pipe.send(train_by_nanochat(config, row.rate))
        return
    pretrain(config)
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    names = ("tokens", "val_loss", "val_bits_per_byte")
    pipe.send([{name: line[name] for name in names} for line in lines if line["kind"] == "eval"])


def config_of(row: Row, folder: Path) -> TrainingConfig:
    """The main job with one optimizer, on one text, evaluated on all that is held out."""
    name, steps = (
        f"{row.contender}-{row.seed}-{row.rate}-{row.length}".replace(" ", "-"),
        round(row.length * PRETRAIN.num_steps),
    )
    text = TEXTS.index(row.text)
    data: dict[str, Any] = {"data_dir": str(folder / f"data-{text}")}
    if text == 1:
        data |= {"corpus": documentation(folder), "validation_fraction": DOCUMENTATION_HELD_OUT}
    changes = (OURS | {GROWING: OURS["Muon, 16-bit moments"]}).get(row.contender, OURS["AdamW"])
    rate = PRETRAIN.learning_rate if row.contender == NANOCHAT else row.rate
    rates = {"learning_rate": rate, "min_learning_rate": rate * PRETRAIN.min_learning_rate / PRETRAIN.learning_rate}
    config = replace(
        PRETRAIN, **data, **changes, **rates, run_dir=str(folder / f"{text}-{name}"), seed=row.seed,
        eval_every_steps=EVAL_EVERY, sample_every_steps=None, save_every_steps=None,
        **({"num_steps": steps} | (BATCH_WARM_UP if row.contender == GROWING else {})),
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
    """The same model and order under nanochat's classes as its base training sets them, but for a momentum that stays and for
    rates on our schedule: of matrices `matrix_rate`, of all else ours. Returns the curve.
    """
    data = prepare(config)
    model, take_step = by_nanochat(config, data, matrix_rate)
    curve = [held_out(config, data, model, 0)]
    for step in range(config.num_steps):
        take_step(step)
        if (step + 1) % EVAL_EVERY == 0:
            curve.append(held_out(config, data, model, step + 1))
    return curve


def by_nanochat(config: TrainingConfig, data, matrix_rate: float):
    """The model, and a call that trains it by one step under nanochat's classes."""
    from nanochat.optim import MuonAdamW  # pyright: ignore[reportMissingImports]

    model = initialise(empty_model(replace(config, precision="fp32"), torch.device("cpu")))
    groups, matrices = parameter_groups(model, config.weight_decay), {}
    for weight in (weight for group in groups if group["is_block"] for weight in group["params"]):
        matrices.setdefault(weight.shape, []).append(weight)
    muon = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": config.weight_decay}
    adam = {"kind": "adamw", "betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    kinds = [muon | {"params": same, "lr": matrix_rate, "peak": matrix_rate} for same in matrices.values()]
    kinds += [group | adam | {"lr": 0.0, "peak": config.learning_rate} for group in groups if not group["is_block"]]
    optimizer = MuonAdamW(kinds)

    def take_step(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_at(step, config) / config.learning_rate
        gradients(config, data, model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return model, take_step


def gradients(config: TrainingConfig, data, model, step: int) -> None:
    """Adds the mean gradient of a step's windows up in `model`."""

    class Engine:
        module = model
        __call__ = staticmethod(model)

    share = {"rank": 0, "world_size": 1, "micro_batch_rows": config.micro_batch_rows}
    for batch in micro_batches(data.train, data_order(config, data), step=step, **share):
        loss = next_token(Engine(), Windows(torch.from_numpy(batch.ids)), config)
        (loss / config.accumulation_steps(1)).backward()


def held_out(config: TrainingConfig, data, model, step: int) -> dict[str, float]:
    """One point of a curve."""
    windows = held_out_windows(config, Ranks(0, 1, 0, 1, 0), data, config.eval_tokens)
    found = evaluate(model, windows, torch.tensor(data.token_num_bytes()), config.loss_chunk_rows)
    tokens = step * config.tokens_per_step
    return {"tokens": tokens, "val_loss": found.nats_per_token, "val_bits_per_byte": found.bits_per_byte}


def summary(kept: dict[Row, dict]) -> dict[str, Any]:
    """For each text the mean last loss of each contender at its rate, and the share of AdamW's tokens that Muon needs."""
    found: dict[str, Any] = {}
    for text in TEXTS:
        names = dict.fromkeys(row.contender for row in kept if row.text == text)
        means = {name: mean_of(kept, text, name) for name in names}
        lengths = [row.length for row in kept if row[:3] == (text, "AdamW", 0) and row.rate == best_rate(kept, text, "AdamW")]
        found[text] = {
            "goal_of_the_ratio": GOAL,
            "contenders": means,
            "tokens_of_muon_over_adamw": ratio(kept, text),
            "which_is_below": round(1 / max(lengths), 3) if lengths and ratio(kept, text) is None else None,
        }
    return found


def mean_of(kept: dict[Row, dict], text: str, contender: str) -> dict[str, Any]:
    rate = best_rate(kept, text, contender) if any(row.seed == 0 for row in kept if row.contender == contender) else None
    same = [kept[row] for row in kept if row[:2] == (text, contender) and row.rate == rate and row.length == 1.0]
    losses = [row["val_loss"] for row in same]
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    bits = statistics.mean(row["val_bits_per_byte"] for row in same)
    mean = {"rate": rate, "seeds": len(same), "val_loss": statistics.mean(losses), "val_loss_deviation": spread}
    return mean | {"val_bits_per_byte": bits}


def ratio(kept: dict[Row, dict], text: str) -> float | None:
    """Muon's tokens over those that AdamW needs for the loss with which Muon ends, both with the first seed: between AdamW's
    runs of several lengths the logarithm of tokens is interpolated over the loss. None where no run of AdamW gets there: then
    it is below Muon's tokens over those of the longest.
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


def draw(kept: dict[Row, dict], seconds: dict[str, float]) -> None:
    """Curves of the first seed: a column for each text, above against tokens, below against the time of their steps, from the
    measured `seconds` a step of each contender; who was not timed has tokens alone.
    """
    texts = [text for text in TEXTS if any(row.text == text for row in kept)]
    figure, axes = plt.subplots(2, len(texts), figsize=(6 * len(texts), 9), squeeze=False, layout="constrained")
    for column, text in enumerate(texts):
        for contender in dict.fromkeys(row.contender for row in kept if row.text == text):
            rate = best_rate(kept, text, contender)
            curve = kept[Row(text, contender, 0, rate)]["curve"][1:]
            a_token = seconds.get(contender, math.nan) / PRETRAIN.tokens_per_step / 60
            for panel, unit in zip(axes[:, column], (1e-6, a_token), strict=True):
                if not math.isnan(unit):
                    x = [point["tokens"] * unit for point in curve]
                    panel.plot(x, [point["val_bits_per_byte"] for point in curve], label=f"{contender}, {rate:g}")
        for panel, label in zip(axes[:, column], ("tokens, millions", "minutes of steps"), strict=True):
            panel.set(xlabel=label, ylabel="held-out bits per byte", title=text)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


def measure_steps() -> dict[str, Any]:
    """Seconds of a step of each contender, which take turns in processes of their own: the medians of STEPS_TIMED."""
    context, pipes, folder = multiprocessing.get_context("spawn"), {}, Path(tempfile.mkdtemp())
    for name in (*OURS, *([NANOCHAT] if find_spec("nanochat") else [])):
        pipes[name], theirs = context.Pipe()
        context.Process(target=contend, args=(name, folder, theirs), daemon=True).start()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(STEPS_TIMED):
        for name, pipe in pipes.items():
            pipe.send("step")
            seconds[name].append(pipe.recv())
    return {"machine": machine(), "seconds": {name: round(statistics.median(taken), 4) for name, taken in seconds.items()}}


def contend(name: str, folder: Path, pipe) -> None:
    """One contender: makes a step whenever it is told to, and says how many seconds it took."""
    as_only_rank()
    config = config_of(Row(TEXTS[0], name, 0, PRETRAIN.learning_rate), folder)
    if name == NANOCHAT:
        _, take_step = by_nanochat(config, prepare(config), NANOCHAT_RATES[0])
    else:
        run = trainer.set_up(config, prepare)
        assert run is not None, "a new run directory holds no finished run"
        take_step = partial(trainer.run_step, run, next_token)
    for step in range(SETTLING):
        take_step(step)
    pipe.send("ready")
    for step in range(SETTLING, SETTLING + STEPS_TIMED):
        pipe.recv()
        started = time.perf_counter()
        take_step(step)
        pipe.send(time.perf_counter() - started)


def measure_updates() -> dict[str, Any]:
    """Nanoseconds a parameter of each kind of update on this host, medians of turns, and the plan of a step's update of 1.3
    billion parameters on a desktop whose rates are known.
    """
    kinds: dict[str, Any] = update_kinds()
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, (update, _) in kinds.items():
            started = time.perf_counter()
            update()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = {name: {"ns_a_parameter": round(1e9 * medians[name] / number, 3)} for name, (_, number) in kinds.items()}
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "second_moment": stalls(),
        "plan": desktop(),
    }


def update_kinds() -> dict[str, Any]:
    """Each kind of update as a call, and the parameters that it updates."""
    gradient, halves = torch.randn(ELEMENTS), [torch.zeros(ELEMENTS, dtype=torch.bfloat16) for _ in range(3)]
    master, block = torch.randn(ELEMENTS), [torch.randn(shape) for shape in BLOCK]
    whole, short = (adam_of(torch.randn(ELEMENTS, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    numbers, draws = Adam(1, 1e-3, 0.9, 0.98, 1e-8, 0.1), Draws(0, 1, 0)

    def muon() -> None:
        take_momentum(gradient, halves[0], halves[1], 0.95)
        descend(master, halves[1], rate=1e-3, scale=1.0, decay=0.1)

    return {
        "AdamW, DeepSpeed's": (whole.step, ELEMENTS),
        "AdamW, DeepSpeed's, all in bf16": (short.step, ELEMENTS),
        "AdamW, 16-bit moments": (
            lambda: adam_in_16_bits(master, gradient, halves[1:], numbers, draws=draws, first=0),
            ELEMENTS,
        ),
        "Muon, 16-bit momentum, host's part": (muon, ELEMENTS),
        "Muon, Newton-Schulz in float32": (
            lambda: [orthogonalise(each, torch.float32) for each in block],
            sum(map(torch.numel, block)),
        ),
    }


def adam_of(weight: torch.Tensor) -> Any:
    """DeepSpeed's CPU Adam of one vector, its moments in the dtype of the vector."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight.grad = torch.randn_like(weight)
    return DeepSpeedCPUAdam([weight], fp32_optimizer_states=False)


def stalls() -> dict[str, float]:
    """The second moment of a gradient of ones after STALL_STEPS at beta2 = 0.999, which should be 1."""
    found = {}
    theirs = adam_of(torch.zeros(64, dtype=torch.bfloat16))
    (weight,) = theirs.param_groups[0]["params"]
    weight.grad.fill_(1.0)
    halves = [torch.zeros(64, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(1, STALL_STEPS + 1):
        theirs.step()
        numbers = Adam(step, 0.0, 0.9, 0.999, 1e-8, 0.0)
        adam_in_16_bits(torch.zeros(64), torch.ones(64), halves, numbers, draws=Draws(0, step, 0), first=0)
    found["AdamW, DeepSpeed's, all in bf16"] = float(theirs.state[weight]["exp_avg_sq"].float().mean())
    return found | {"AdamW, 16-bit moments": float(halves[1].float().mean())}


def desktop() -> dict[str, Any]:
    """Seconds of a step's update of 1.3 billion parameters, from bytes and FLOP and the rates of DESKTOP."""
    found: dict[str, Any] = dict(DESKTOP)
    base = replace(
        PRETRAIN, hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=8, head_size=None, mlp_size=5632,
        vocab_size=32768, tie_embeddings=True, tokens_per_step=2**19, context_length=2048, eval_tokens=2048, precision="bf16",
    )  # fmt: skip
    for name, changes in OURS.items():
        config = replace(base, **changes)
        host = update_bytes(config) / DESKTOP["host_gb_per_s"] / 1e9
        products = newton_schulz_flops(config) / (0.6 * DESKTOP["tflops"] * 1e12)
        link = (2 * config.num_parameters + 4 * muon_parameters(config)) / DESKTOP["link_gb_per_s"] / 1e9
        found[name] = {"host_s": round(host, 2), "newton_schulz_s": round(products, 2), "link_s": round(link, 2)}
    return found


if __name__ == "__main__":
    main()
