"""How fast a step is, what its time goes to, and what slows it: parts, each measured in turns on an idle machine.

`python tests/benchmarks/speed.py PART...` measures the named parts and writes them to tests/benchmarks/results/speed.json; the
parts are those of PARTS. Contenders live in processes of their own and take turns while the others sleep. nanoGPT is measured
where its `model` can be imported, such as from a checkout on PYTHONPATH; its code is not here.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pretrain_vs_stock
import torch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from pretrain_vs_stock import machine

from ds.shards import TokenStream, open_shard, write_shard
from scripts import trainer
from scripts.config import PRETRAIN
from scripts.engine.updates import add_to, sum_of_squares
from scripts.engine.watch import sharing_cores
from scripts.model.decoder import empty_model, initialise
from scripts.model.documents import Windows
from scripts.model.losses import next_token
from scripts.model.operations import product_dtype
from scripts.plan.machine import flops_per_token, keep_freed_memory, measure_rates, tokens_per_second

ROOT = Path(__file__).parents[2]
RESULT, GROWTH_PICTURE = Path(__file__).parent / "results" / "speed.json", ROOT / "docs" / "growth.png"
ROUNDS, SETTLING, STARTS = 11, 2, 5
# nanoGPT's own example for a CPU: 4 blocks of width 128, 12 rows of 64 tokens (its README, "I only have a macbook").
VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT, ROWS = 257, 128, 4, 4, 64, 12
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=HEADS, head_size=None,
    mlp_size=344, qk_norm=False, tie_embeddings=True, context_length=CONTEXT, micro_batch_rows=ROWS, optimizer="adamw",
    tokens_per_step=CONTEXT * ROWS, loss_chunk_rows=CONTEXT * ROWS, optimizer_state_precision="fp32", precision="fp32",
)  # fmt: skip
MICRO_BATCHES, PRODUCT_SIZE = 64, 2048
OUR_STEPS, NANOGPT_STEPS, HELD_OUT_WINDOWS = 300, 2000, 1000
ELEMENTS = 2**25
SHARING = ExitStack()
GROWTH, GROWN_WIDTH, GROWN_TOKENS, GROWN_STEPS, LEAST_SPAN = (1, 4, 16, 64), 64, 4096, 6, 20
LAUNCH = """
import json, sys
from scripts.config import TrainingConfig
from scripts.train_pretrain import pretrain
fields = json.loads(sys.argv[1])
fields |= {name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}
pretrain(TrainingConfig(**fields))
"""


class Contender(NamedTuple):
    """`make(*arguments)` builds a step, on each of `ranks` processes; `steps` of them are a turn; `cores` limits them."""

    make: Callable[..., Callable[[], Any]]
    arguments: tuple = ()
    steps: int = 1
    ranks: int = 1
    cores: int | None = None


class Measured(NamedTuple):
    """Seconds of a contender's step, one number a round, and where they went, as far as it tells."""

    seconds: list[float]
    parts: list[dict[str, float]]


def main() -> None:
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in sys.argv[1:]:
        kept[name] = {"machine": machine(), **PARTS[name]()}
        print(name, json.dumps(kept[name], indent=1))
        RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def in_turns(contenders: dict[str, Contender], between: Callable[[], Any] | None = None) -> dict[str, Measured]:
    """Every contender's steps: ROUNDS turns after SETTLING. With `between` as many follow it, under "NAME, after"."""
    pipes, found = {name: started(contender) for name, contender in contenders.items()}, {}
    for words in ("", *([] if between is None else [", after"])):
        if words and between is not None:
            between()
        found |= {f"{name}{words}": Measured([], []) for name in pipes}
        for turn in range(SETTLING + ROUNDS):
            for name, own in pipes.items():
                take_turn(own, found[f"{name}{words}"] if turn >= SETTLING else Measured([], []), contenders[name])
    for pipe in (pipe for own in pipes.values() for pipe in own):
        pipe.send("end")
    return found


def take_turn(pipes: list, found: Measured, contender: Contender) -> None:
    for pipe in pipes:
        pipe.send("turn")
    told = [pipe.recv() for pipe in pipes]
    found.seconds.append(max(seconds for seconds, _ in told) / contender.steps)
    found.parts.append({name: value / contender.steps for name, value in told[0][1].items()})


def started(contender: Contender) -> list:
    """A pipe to each rank of a contender, which is ready."""
    context, pipes, port = multiprocessing.get_context("spawn"), [], free_port()
    for rank in range(contender.ranks):
        pipe, theirs = context.Pipe()
        context.Process(target=contend, args=(contender, rank, port, theirs), daemon=True).start()
        pipes.append(pipe)
    for pipe in pipes:
        pipe.recv()
    return pipes


def contend(contender: Contender, rank: int, port: int, pipe) -> None:
    """One rank of a contender: makes a turn whenever it is told to."""
    if contender.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: contender.cores])
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": contender.ranks, "LOCAL_WORLD_SIZE": contender.ranks}
    os.environ |= {name: str(number) for name, number in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step = contender.make(*contender.arguments)
    pipe.send("ready")
    while pipe.recv() == "turn":
        begun, parts = time.perf_counter(), {}
        for _ in range(contender.steps):
            for name, seconds in getattr(step(), "seconds_by_part", {}).items():
                parts[name] = parts.get(name, 0.0) + seconds
        pipe.send((time.perf_counter() - begun, parts))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ours(changes: dict[str, Any]) -> Callable[[], Any]:
    """The trainer's own step of the main job with `changes`, on random tokens."""
    folder = Path(tempfile.mkdtemp())
    config = replace(PRETRAIN, run_dir=str(folder / "run"), data_dir=str(folder), num_steps=10**6, **changes)
    run: Any = trainer.set_up(config, lambda _: random_data(folder / f"{os.environ['RANK']}.bin", config.vocab_size))
    steps = iter(range(config.num_steps))
    return lambda: trainer.run_step(run, next_token, next(steps))


def random_data(path: Path, vocab_size: int) -> Any:
    return data_of(path, random_ids(vocab_size), vocab_size)


def data_of(path: Path, ids: np.ndarray, vocab_size: int) -> Any:
    """What a run asks of its data, over `ids` (n,)."""
    write_shard(path, ids, vocab_size, "0" * 64)
    stream = TokenStream((open_shard(path),), "0" * 64)
    return type("Random", (), {"fingerprint": "", "train": stream, "end_of_text_id": 0})


def random_ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab_size, 400_000).astype(np.uint16)


def bare(changes: dict[str, Any]) -> Callable[[], Any]:
    """Forward and backward of such a model with the trainer's memory allocator, and nothing around them."""
    keep_freed_memory()
    config = replace(PRETRAIN, **changes)
    model = initialise(empty_model(config, torch.device("cpu")))
    ids = random_ids(config.vocab_size)[: config.micro_batch_rows * (config.context_length + 1)].astype(np.int64)
    windows = Windows(torch.from_numpy(ids).view(config.micro_batch_rows, -1))

    def step() -> None:
        next_token(Alone(model), windows, config).backward()
        model.zero_grad()

    return step


class Alone:
    """A model as losses take it from an engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's hidden states."""
        return self.module(*inputs, **named)


def nanogpt() -> Callable[[], Any]:
    """The step of nanoGPT's train.py on random tokens."""
    ids = random_ids(VOCABULARY)
    step = nanogpt_training(ids).step
    return lambda: step(1e-3)


class Training(NamedTuple):
    """A model, and its step at a learning rate."""

    model: torch.nn.Module
    step: Callable[[float], Any]


def nanogpt_training(ids: np.ndarray) -> Training:
    """nanoGPT's model, optimizer and the step of its train.py, in float32 as on any CPU without 16-bit products."""
    from model import GPT, GPTConfig  # pyright: ignore[reportMissingImports]

    shape = dict(block_size=CONTEXT, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0, bias=False)
    model, path = GPT(GPTConfig(**shape)), Path(tempfile.mkdtemp()) / "train.bin"
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    ids.tofile(path)

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        data = np.memmap(path, dtype=np.uint16, mode="r")
        begins = torch.randint(len(data) - CONTEXT, (ROWS,))
        rows = torch.stack([torch.from_numpy(data[begin : begin + CONTEXT + 1].astype(np.int64)) for begin in begins])
        _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Training(model, step)


def loss() -> dict[str, Any]:
    """Held-out nats a byte of the standard library after nanoGPT's steps and after OUR_STEPS of ours of as many tokens, and the
    seconds that each took: both in this process, NANOGPT_STEPS / OUR_STEPS of nanoGPT's after each of ours.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    train, held_out = np.split(ids, [len(ids) - HELD_OUT_WINDOWS * (CONTEXT + 1)])
    folder = Path(tempfile.mkdtemp())
    fields = SMALL | {"optimizer": PRETRAIN.optimizer, "num_steps": OUR_STEPS}
    config = replace(PRETRAIN, run_dir=str(folder / "run"), data_dir=str(folder), **fields)
    run: Any = trainer.set_up(config, lambda _: data_of(folder / "train.bin", train, VOCABULARY))
    theirs, seconds = nanogpt_training(train), {"tightfit": 0.0, "nanoGPT": 0.0}
    for number in range(OUR_STEPS):
        begun = time.perf_counter()
        trainer.run_step(run, next_token, number)
        middle = time.perf_counter()
        for their_number in range(number * NANOGPT_STEPS // OUR_STEPS, (number + 1) * NANOGPT_STEPS // OUR_STEPS):
            theirs.step(nanogpt_rate(their_number))
        seconds["tightfit"] += middle - begun
        seconds["nanoGPT"] += time.perf_counter() - middle
    windows = torch.from_numpy(held_out.astype(np.int64)).view(HELD_OUT_WINDOWS, -1)
    with torch.no_grad():
        own = next_token(Alone(run.engine.module), Windows(windows), config)
        _, other = theirs.model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    return {
        "steps": {"tightfit": OUR_STEPS, "nanoGPT": NANOGPT_STEPS},
        "held_out_nats_a_byte": {"tightfit": round(own.item(), 4), "nanoGPT": round(other.item(), 4)},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_over_nanogpt": round(seconds["tightfit"] / seconds["nanoGPT"], 3),
    }


def nanogpt_rate(step: int) -> float:
    """The learning rate of its train.py with the numbers of its example: 100 steps up to 1e-3, then a cosine down to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * (step - 100) / (NANOGPT_STEPS - 100))) * 9e-4


def small() -> dict[str, Any]:
    """A model of 0.8 million parameters: tokens/s beside nanoGPT's, and the share of a step that is neither model nor Adam."""
    contenders = {"tightfit": Contender(ours, (SMALL,), 10), "forward and backward alone": Contender(bare, (SMALL,), 10)}
    if find_spec("model") is not None:
        contenders["nanoGPT"] = Contender(nanogpt, (), 10)
    found = in_turns(contenders)
    seconds = {name: statistics.median(measured.seconds) for name, measured in found.items()}
    parts = found["tightfit"].parts
    update = statistics.median(each["update"] for each in parts)
    around = seconds["tightfit"] - seconds["forward and backward alone"] - update
    return {
        "tokens_per_second": {name: round(CONTEXT * ROWS / value, 1) for name, value in seconds.items()},
        "parts_ms": {name: round(1e3 * statistics.median(each[name] for each in parts), 3) for name in parts[0]},
        "overhead_share": round(around / seconds["tightfit"], 3),
        **({"speed_over_nanogpt": ratio(found["nanoGPT"], found["tightfit"])} if "nanoGPT" in found else {}),
    }


def ratio(over: Measured, under: Measured) -> float:
    """The median over rounds of one contender's seconds over another's in the same round."""
    return round(statistics.median(a / b for a, b in zip(over.seconds, under.seconds, strict=True)), 3)


def products() -> Callable[[], Any]:
    """Large products in the dtype in which a model of bfloat16 has them here: how fast this host multiplies."""
    dtype = product_dtype(torch.bfloat16, torch.device("cpu"))
    left, right, made = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=made)


def beside_stock() -> dict[str, Any]:
    """A model of 16 million parameters beside transformers under stock DeepSpeed in its faster precision, and the share of the
    host's matrix rate.
    """
    contenders = {
        "tightfit, bf16": Contender(pretrain_vs_stock.ours, ("none",)),
        "stock, fp32": Contender(pretrain_vs_stock.stock, ("fp32",)),
        "stock, bf16": Contender(pretrain_vs_stock.stock, ("bf16",)),
        "products": Contender(products, (), 16),
    }
    found = in_turns(contenders)
    config = pretrain_vs_stock.our_config(Path(tempfile.mkdtemp()), "none")
    rate = 2 * PRODUCT_SIZE**3 / statistics.median(found["products"].seconds)
    seconds = {name: statistics.median(found[name].seconds) for name in contenders if name != "products"}
    ours_per_second = flops_per_token(config) * config.tokens_per_step / seconds["tightfit, bf16"]
    return {
        "tokens_per_second": {name: round(config.tokens_per_step / value, 1) for name, value in seconds.items()},
        "speed_over_stock": min(ratio(found[name], found["tightfit, bf16"]) for name in contenders if "stock" in name),
        "gflops_of_products": round(rate / 1e9, 1),
        "of_matrix_rate": round(ours_per_second / rate, 3),
    }


def accumulation() -> dict[str, Any]:
    """Seconds a micro-batch with MICRO_BATCHES of them in a step, over those with one."""
    size = PRETRAIN.micro_batch_rows * PRETRAIN.context_length
    one, many = ({"tokens_per_step": count * size} for count in (1, MICRO_BATCHES))
    found = in_turns({"one": Contender(ours, (one,), 16), "many": Contender(ours, (many,))})
    return {
        "micro_batches": MICRO_BATCHES,
        "time_of_many_over_one": round(ratio(found["many"], found["one"]) / MICRO_BATCHES, 3),
    }


def ranks() -> dict[str, Any]:
    """The main job's step by two ranks on two cores against one rank on one core."""
    changes = {"micro_batch_rows": PRETRAIN.tokens_per_step // PRETRAIN.context_length // 2}
    found = in_turns({"one": Contender(ours, (changes,), 4, cores=1), "two": Contender(ours, (changes,), 4, ranks=2, cores=2)})
    return {"speed_of_two_over_one": ratio(found["one"], found["two"])}


def in_company(changes: dict[str, Any]) -> Callable[[], Any]:
    """The trainer's own step as in a run, which shares cores with other programs."""
    step = ours(changes)
    SHARING.enter_context(sharing_cores())
    return step


def company() -> dict[str, Any]:
    """How much longer steps take while another process takes a core whole: as a run shares its cores, and without that."""
    models = {"the main job": ({}, 8), "0.8 million parameters": (SMALL, 30)}
    makes = {"time_with_a_core_taken": in_company, "without_sharing": ours}
    found: dict[str, Any] = {kind: {} for kind in makes}
    for name, (changes, steps) in models.items():
        for kind, make in makes.items():
            burning: list[subprocess.Popen] = []
            begin = partial(lambda into: into.append(subprocess.Popen([sys.executable, "-c", "while True: pass"])), burning)
            try:
                seconds = in_turns({name: Contender(make, (changes,), steps)}, begin)
            finally:
                for process in burning:
                    process.kill()
            alone, beside = (statistics.median(seconds[f"{name}{words}"].seconds) for words in ("", ", after"))
            found[kind][name] = {"ms": round(1e3 * alone, 1), "times_as_long": round(beside / alone, 2)}
    return found


def host() -> dict[str, Any]:
    """GB/s of the passes over host memory in a step, and their share of a STREAM triad's, by number of threads."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    master, gradient, halves = torch.randn(ELEMENTS), torch.randn(ELEMENTS), torch.randn(ELEMENTS, dtype=torch.bfloat16)
    second, third = torch.randn(ELEMENTS), torch.empty(ELEMENTS)
    weight = torch.randn(ELEMENTS)
    weight.grad = gradient
    adam = DeepSpeedCPUAdam([weight])
    passes: dict[str, tuple[Callable[[], Any], int]] = {
        "triad": (lambda: torch.add(master, second, alpha=3.0, out=third), 12),
        "sum of gradients": (lambda: add_to(halves, gradient, False), 10),
        "norm": (lambda: sum_of_squares(gradient), 4),
        "AdamW": (adam.step, 28),
        "cast for the copy up": (lambda: halves.copy_(master), 6),
    }
    found: dict[str, Any] = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(SETTLING + ROUNDS):
            for name, (work, _) in passes.items():
                begun = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begun)
        rates = {
            name: size * ELEMENTS / 1e9 / statistics.median(seconds[name][SETTLING:]) for name, (_, size) in passes.items()
        }
        shares = {name: round(rate / rates["triad"], 2) for name, rate in rates.items()}
        found[f"{threads} threads"] = {name: {"gb_per_s": round(rates[name], 1), "of_triad": shares[name]} for name in rates}
    return found


def start() -> dict[str, Any]:
    """Seconds from a launch to the end of the first step of the main job's model, with data and extensions ready."""
    folder = Path(tempfile.mkdtemp())
    (folder / "text.txt").write_text("a line of text that is trained on\n" * 200)
    config = replace(
        PRETRAIN, corpus=(str(folder / "text.txt"),), data_dir=str(folder / "data"), validation_fraction=0.0, vocab_size=257,
        num_steps=10**6, eval_every_steps=None, sample_every_steps=None, save_every_steps=None, run_dir=str(folder / "run"),
    )  # fmt: skip
    (folder / "launch.py").write_text(LAUNCH.replace("sys.argv[1]", repr(json.dumps(asdict(config)))))
    commands = {"python": [sys.executable], "deepspeed": ["deepspeed"]}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + STARTS):
        for name, command in commands.items():
            found[name].append(until_first_step([*command, str(folder / "launch.py")], folder))
    return {"seconds": {name: round(statistics.median(taken[1:]), 2) for name, taken in found.items()}}


def until_first_step(command: list[str], folder: Path) -> float:
    log = folder / "run" / "metrics.jsonl"
    shutil.rmtree(log.parent, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not log.exists() or '"kind": "train"' not in log.read_text():
        assert process.poll() is None, "the run ended"
        time.sleep(0.01)
    taken = time.perf_counter() - begun
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return taken


def growth() -> dict[str, Any]:
    """Tokens/s, the host's peak and the seconds of a save as parameters grow, and as the context grows, beside the plan's."""
    folder, found = Path(tempfile.mkdtemp()), {}
    (folder / "text.txt").write_text("".join(f"line {number} of a text that is trained on\n" for number in range(20_000)))
    changed = {"parameters": grown_parameters, "context": grown_contexts}
    runs = {f"{axis}-{factor}": changes(factor) for axis, changes in changed.items() for factor in GROWTH}
    turns = [{run: measured_growth(folder / f"{run}-{turn}", runs[run]) for run in runs} for turn in range(ROUNDS)]
    for axis in changed:
        found[axis] = [{"factor": factor, **medians([turn[f"{axis}-{factor}"] for turn in turns])} for factor in GROWTH]
        first, last = found[axis][0], found[axis][-1]
        found[f"{axis}, exponents"] = {
            name: round(math.log(last[name] / first[name], GROWTH[-1]), 2) + 0.0 for name in first if name != "factor"
        }
    draw_growth(found)
    return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Rows of the same names as one: the median of each number."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def grown_parameters(factor: int) -> dict[str, Any]:
    """Two blocks with `factor` times the parameters: width by its root."""
    width = GROWN_WIDTH * math.isqrt(factor)
    heads = width // 32
    return {"hidden_size": width, "mlp_size": 3 * width, "num_heads": heads, "num_kv_heads": heads, "context_length": 256}


def grown_contexts(factor: int) -> dict[str, Any]:
    """`factor` times the context, and as many fewer rows."""
    return grown_parameters(4) | {"context_length": 64 * factor, "micro_batch_rows": GROWN_TOKENS // (64 * factor)}


def measured_growth(run: Path, changes: dict[str, Any]) -> dict[str, float]:
    """One run of GROWN_STEPS steps and a save, from what it logs of itself, and the plan of its speed."""
    folder, length = run.parent, changes["context_length"]
    rows = {"micro_batch_rows": GROWN_TOKENS // length, "tokens_per_step": GROWN_TOKENS, "loss_chunk_rows": 1024}
    config = replace(
        PRETRAIN, corpus=(str(folder / "text.txt"),), data_dir=str(folder / "data"), validation_fraction=0.0, vocab_size=257,
        num_layers=2, head_size=None, optimizer="adamw", precision="fp32", num_steps=GROWN_STEPS, warmup_steps=1,
        eval_every_steps=None, sample_every_steps=None, save_every_steps=GROWN_STEPS, run_dir=str(run), **rows | changes,
    )  # fmt: skip
    (folder / "launch.py").write_text(LAUNCH.replace("sys.argv[1]", repr(json.dumps(asdict(config)))))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(folder / "launch.py")]
    subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (memory,) = (record for record in records if record.get("event") == "memory")
    (saved,) = (record for record in records if record.get("event") == "saved")
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
    rates = measure_rates(config, torch.device("cpu"))
    row = {
        "parameters": config.num_parameters,
        "context_length": length,
        "tokens_per_second": round(statistics.median(speeds[1:]), 1),
        "tokens_per_second_planned": round(tokens_per_second(config, 1, 1, "cpu", rates), 1),
        "host_peak_gib": round(memory["host_peak_gib"], 3),
        "host_planned_gib": round(memory["host_planned_gib"], 3),
        "save_seconds": round(saved["seconds"], 3),
    }
    print(run.name, json.dumps(row), flush=True)
    return row


def draw_growth(found: dict[str, Any]) -> None:
    """Each cost against the growth of parameters and of context, the plan dashed, exponents in the legends. A panel's highest
    cost is at least LEAST_SPAN times its lowest, so that noise does not look like growth.
    """
    matplotlib.use("agg")
    panels = {"tokens_per_second": "tokens/s", "host_peak_gib": "peak on the host, GiB", "save_seconds": "seconds of a save"}
    plans = {"tokens_per_second": "tokens_per_second_planned", "host_peak_gib": "host_planned_gib"}
    figure, axes = plt.subplots(2, len(panels), figsize=(13, 7), layout="constrained")
    for row, axis in zip(axes, ("parameters", "context"), strict=True):
        exponents, sizes = found[f"{axis}, exponents"], [each["factor"] for each in found[axis]]
        for panel, (name, label) in zip(row, panels.items(), strict=True):
            lines = {name: ("measured", "o-")} | ({plans[name]: ("planned", "s--")} if name in plans else {})
            for kind, (word, style) in lines.items():
                costs = [each[kind] for each in found[axis]]
                panel.plot(sizes, costs, style, label=f"{word}, exponent {exponents[kind]:g}")
            panel.set(xscale="log", yscale="log", xlabel=f"{axis}, times the first", ylabel=label, xticks=sizes)
            panel.set_xticklabels([str(size) for size in sizes])
            low, high = panel.get_ylim()
            missing = max(1.0, math.sqrt(LEAST_SPAN * low / high))
            panel.set_ylim(low / missing, high * missing)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(GROWTH_PICTURE, dpi=100)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    each.__name__: each for each in (small, loss, beside_stock, accumulation, ranks, company, host, start, growth)
}

if __name__ == "__main__":
    main()
