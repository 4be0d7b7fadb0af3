"""The engine, the schedule, the one training loop. Knows ranks and steps; an objective and the data are given to it."""

import math
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds.loader import count_windows, held_out_batches, micro_batches
from scripts import checkpoint, offload
from scripts.config import TrainingConfig, refuse_unfit
from scripts.evaluate import HeldOut, evaluate
from scripts.model import Decoder, continue_ids, empty_model, initialise, parameter_groups
from scripts.report import draw_losses

GIB = 2**30
Objective = Callable[..., Tensor]


class Ranks(NamedTuple):
    """This process among all: `rank` of `world_size`, `local_rank` of `local_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


class Run(NamedTuple):
    """What the loop works on. `first_step` is 0, or the step of the checkpoint that the run continues from."""

    config: TrainingConfig
    ranks: Ranks
    device: torch.device
    engine: Any
    data: Any
    first_step: int


def ranks_from_launcher() -> Ranks:
    """Reads what `deepspeed`, `torchrun` or `srun` say of this process; without a launcher it is the only one."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        env |= _slurm_as_torch(env)
    if "RANK" not in env:
        port = str(random.SystemRandom().randint(20000, 60000))
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
    return Ranks(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), int(local_size))


def ready(config: TrainingConfig, prepare: Callable) -> Run | None:
    """Everything before step one: checks, process group, data, model, engine. None when the run is already finished.

    `prepare(config)` makes or opens the data; rank 0 calls it first.

    Raises:
        ValueError: the configuration does not fit the machine, the ranks, the data or what run_dir holds.
    """
    ranks = ranks_from_launcher()
    offload.refuse_other_versions()
    refuse_unfit(config, ranks.world_size)
    checkpoint.refuse_other_run(config)
    found = _newest_checkpoint(config, ranks)
    if found is not None and found.state["step"] == config.num_steps:
        _say(ranks, f"This run is finished: {config.num_steps} steps. {_summary(config)}")
        return None
    _say(ranks, "Starting DeepSpeed. Its first start on a machine compiles the CPU Adam, which takes a minute or two.")
    _join(config, ranks)
    return _build(config, ranks, _prepare_in_turn(config, ranks, prepare), found)


def train(run: Run | None, objective: Objective) -> None:
    """The one training loop: every step, then what is due after it. Nothing to do for a finished run."""
    if run is None:
        return
    config = run.config
    with _reporting(run) as report:
        if run.first_step == 0 and config.eval_every_steps is not None:
            report(_evaluate(run, 0))
        for step in range(run.first_step, config.num_steps):
            started, skipped = time.perf_counter(), run.engine.skipped_steps
            nats = run_step(run, objective, step)
            if run.engine.skipped_steps > skipped:
                report({"kind": "event", "step": step + 1, "event": "skipped", "loss": nats})
            if _due(step + 1, config.log_every_steps, config):
                report(_measure(run, step + 1, nats, time.perf_counter() - started))
            if _due(step + 1, config.eval_every_steps, config):
                report(_evaluate(run, step + 1))
            if _due(step + 1, config.sample_every_steps, config):
                report(_sample(run, step + 1))
            if _due(step + 1, config.save_every_steps, config):
                report(_save(run, step + 1))
    _say(run.ranks, f"Finished: {config.num_steps} steps. {_summary(config)}")


def leave() -> None:
    """Leaves the process group, at the end of a process that trains no more."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_step(run: Run, objective: Objective, step: int) -> float:
    """One optimizer update over `tokens_per_step` tokens; returns the mean loss over the step and all ranks, a float."""
    config, engine = run.config, run.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    total = torch.zeros((), device=run.device)
    for windows in step_batches(run, step):
        loss = objective(engine, windows, config)
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    torch.distributed.all_reduce(total)
    return total.item() / (config.accumulation_steps(run.ranks.world_size) * run.ranks.world_size)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of the update that turns `step` into `step + 1`: linear warm-up, then cosine, or stable and linear decay.

    Cosine: Loshchilov & Hutter 2017. Warm-up/stable/decay ("wsd"): Hu et al. 2024, MiniCPM.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = config.decay_steps or 1
        share = min(1.0, (config.num_steps - 1 - step) / decay_steps)
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


def step_batches(run: Run, step: int) -> Iterator[Tensor]:
    """This rank's micro-batches of one step on the device: windows (B, T + 1) int64."""
    config = run.config
    batches = micro_batches(
        run.data.train,
        step=step,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        micro_batch_rows=config.micro_batch_rows,
        rows_per_step=config.rows_per_step,
        context_length=config.context_length,
        seed=config.seed,
    )
    return (torch.from_numpy(windows).to(run.device, non_blocking=True) for windows in batches)


def held_out_loss(run: Run) -> HeldOut:
    """The loss over the first `eval_tokens` held-out tokens, all ranks together."""
    config, data = run.config, run.data
    available = count_windows(data.validation.num_tokens, config.context_length)
    batches = held_out_batches(
        data.validation,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        micro_batch_rows=config.micro_batch_rows,
        context_length=config.context_length,
        num_windows=min(available, config.eval_tokens // config.context_length),
    )
    on_device = (torch.from_numpy(windows).to(run.device) for windows in batches)
    return evaluate(
        run.engine.module, on_device, torch.tensor(data.token_num_bytes(), device=run.device), config.loss_chunk_rows
    )


def _slurm_as_torch(env) -> dict[str, str]:
    nodes = env["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0] if "[" not in nodes.split(",")[0] else nodes)
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": env.get("MASTER_ADDR", first),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def _newest_checkpoint(config: TrainingConfig, ranks: Ranks) -> checkpoint.Checkpoint | None:
    found, faults = checkpoint.newest_verified(config)
    for fault in faults:
        _say(ranks, f"{fault}; going back to an older one")
    return found


def _join(config: TrainingConfig, ranks: Ranks) -> None:
    """Makes the process deterministic and joins the process group."""
    deepspeed_logger.setLevel("WARNING")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_size))
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(minutes=config.rank_timeout_minutes))


def _prepare_in_turn(config: TrainingConfig, ranks: Ranks, prepare: Callable):
    """Rank 0 first, then the others; when one is refused, all leave with it instead of waiting for it."""
    data, refusal = None, None
    for turn in (ranks.rank == 0, ranks.rank != 0):
        try:
            data = prepare(config) if turn else data
        except ValueError as fault:
            refusal = fault
        if _largest(float(refusal is not None), ranks):
            raise refusal or ValueError("another rank's data is refused; its line says why")
    return data


def _largest(number: float, ranks: Ranks) -> float:
    value = torch.tensor(number, dtype=torch.float64, device=_device(ranks))
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return value.item()


def _device(ranks: Ranks) -> torch.device:
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _build(config: TrainingConfig, ranks: Ranks, data, found: checkpoint.Checkpoint | None) -> Run:
    if found is not None and found.state["data_fingerprint"] != data.fingerprint:
        raise ValueError(f"data_dir={config.data_dir!r} is not the data that {found.folder} was trained on; put that data back")
    first_step = 0 if found is None else found.state["step"]
    if _largest(first_step, ranks) != -_largest(-first_step, ranks):
        raise ValueError(f"run_dir={config.run_dir!r} does not hold the same on every machine; put it on a shared path")
    device = _device(ranks)
    model = _model_to_train(config, device, found)
    engine = _initialize(config, ranks, model)
    if found is not None:
        checkpoint.load_state(engine, found)
        _say(ranks, f"Continuing after step {first_step} from {found.folder}")
    if ranks.rank == 0:
        checkpoint.claim_run(config)
        checkpoint.rewind_metrics(config, -1 if found is None else first_step)
    return Run(config, ranks, device, engine, data, first_step)


def _initialize(config: TrainingConfig, ranks: Ranks, model: Decoder):
    """DeepSpeed's engine; a ValueError from inside it is no refusal of the user's values."""
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.weight_decay),  # pyright: ignore[reportArgumentType]
            config=TrainingConfig.deepspeed_config(config, ranks.world_size),
        )
    except ValueError as fault:
        raise RuntimeError("deepspeed.initialize failed") from fault
    return engine


def _model_to_train(config: TrainingConfig, device: torch.device, found: checkpoint.Checkpoint | None) -> Decoder:
    model, source = empty_model(config, device), config.init_from if found is None else found.folder
    if source is None:
        return initialise(model)
    checkpoint.load_weights(model, Path(source))
    return model


def _due(step: int, every: int | None, config: TrainingConfig) -> bool:
    return every is not None and (step % every == 0 or step == config.num_steps)


def _measure(run: Run, step: int, nats: float, seconds: float) -> dict:
    config = run.config
    return {
        "kind": "train",
        "step": step,
        "tokens": step * config.tokens_per_step,
        "loss": nats,
        "grad_norm": float(run.engine.get_global_grad_norm() or 0.0),
        "learning_rate": learning_rate_at(step - 1, config),
        "tokens_per_second": config.tokens_per_step / seconds,
        "seconds": seconds,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def _evaluate(run: Run, step: int) -> dict:
    found, tokens = held_out_loss(run), step * run.config.tokens_per_step
    return {
        "kind": "eval",
        "step": step,
        "tokens": tokens,
        "val_loss": found.nats_per_token,
        "val_bits_per_byte": found.bits_per_byte,
    }


def _sample(run: Run, step: int) -> dict:
    """A continuation of `sample_prompt`; only rank 0 samples, no other rank waits for it."""
    config, text = run.config, None
    if run.ranks.rank == 0:
        prompt = torch.tensor(run.data.encode(config.sample_prompt))
        ids = continue_ids(
            run.engine.module, prompt, config.sample_tokens, config.sample_temperature, config.sample_top_k, config.seed + step
        )
        text = config.sample_prompt + run.data.decode(list(ids))
    return {"kind": "event", "step": step, "event": "sample", "text": text}


def _save(run: Run, step: int) -> dict:
    config = run.config
    progress = {"step": step, "tokens": step * config.tokens_per_step, "data_fingerprint": run.data.fingerprint}
    folder = checkpoint.save(run.engine, config, run.data.tokenizer_json, run.data.end_of_text_id, progress)
    return {"kind": "event", "step": step, "event": "saved", "checkpoint": str(folder)}


@contextmanager
def _reporting(run: Run) -> Iterator[Callable[[dict], None]]:
    """Where records go: metrics.jsonl, TensorBoard and the terminal on rank 0, nowhere on the others."""
    if run.ranks.rank != 0:
        yield lambda record: None
        return
    config = run.config
    live = sys.stderr.isatty()
    with (
        tqdm(total=config.num_steps, initial=run.first_step, unit="step", dynamic_ncols=True, disable=not live) as bar,
        SummaryWriter(str(checkpoint.tensorboard_dir(config)), purge_step=run.first_step + 1) as board,
    ):

        def report(record: dict) -> None:
            checkpoint.append_metrics(config, record)
            _plot_scalars(board, record)
            if record["kind"] == "train" and live:
                bar.set_postfix_str(_train_line(record), refresh=False)
                bar.update(record["step"] - bar.n)
            else:
                bar.write(_line(record, config), file=sys.stdout)
            if record.get("event") == "saved":
                draw_losses(checkpoint.metrics_path(config), checkpoint.picture_path(config))

        yield report
    draw_losses(checkpoint.metrics_path(config), checkpoint.picture_path(config))


def _plot_scalars(board: SummaryWriter, record: dict) -> None:
    if record["kind"] in ("train", "eval"):
        for name, value in record.items():
            if name not in ("kind", "step"):
                board.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def _train_line(record: dict) -> str:
    return f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"


def _line(record: dict, config: TrainingConfig) -> str:
    where = f"step {record['step']}/{config.num_steps}"
    if record["kind"] == "train":
        return f"{where}: {_train_line(record)}"
    if record["kind"] == "eval":
        return f"{where}: held out {_held_out_words(record)}"
    return {
        "sample": f"{where}: sample\n{_indented(record.get('text'))}",
        "saved": f"{where}: saved {record.get('checkpoint')}",
        "skipped": f"{where}: skipped, its gradients are not finite (loss {record.get('loss')})",
    }[record["event"]]


def _held_out_words(record: dict) -> str:
    return f"{record['val_loss']:.3f} nats per token, {record['val_bits_per_byte']:.3f} bits per byte"


def _indented(text: str | None) -> str:
    return "\n".join(f"    {line}" for line in (text or "").splitlines())


def _summary(config: TrainingConfig) -> str:
    """What a person wants to know at the end, from the run's own files."""
    records = checkpoint.read_metrics(config)
    held_out = [record for record in records if record["kind"] == "eval"]
    samples = [record["text"] for record in records if record.get("event") == "sample"]
    saved = checkpoint.newest_folder(config)
    lines = [""]
    if held_out:
        lines += [f"  held out before: {_held_out_words(held_out[0])}", f"  held out after:  {_held_out_words(held_out[-1])}"]
    if samples:
        lines += ["  sample:", _indented(samples[-1])]
    lines += [f"  picture: {checkpoint.picture_path(config)}"]
    lines += [f"  checkpoint (opens in transformers): {saved}"] if saved else []
    return "\n".join([*lines, '  next: echo "def" | python scripts/generate.py'])


def _say(ranks: Ranks, line: str) -> None:
    if ranks.rank == 0:
        print(line, flush=True)
