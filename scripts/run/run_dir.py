"""The run directory: its names, the hold that keeps a second launch out, and whose run it is. Reads no checkpoint."""

import json
import os
import secrets
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from scripts.config import RUN_DIR_POLL_SECONDS, TrainingConfig
from scripts.model.huggingface import parse_json, read_json
from scripts.run.storage import lock, lock_words, write_text

MEMORY_FIELDS = (
    "micro_batch_rows", "accumulate_on", "accumulation_precision", "activation_checkpointing", "loss_chunk_rows",
    "compile_kernels",
)  # fmt: skip
# What a person reads or makes of a run. It changes no update.
USE_FIELDS = (
    "sample_every_steps", "sample_prompt", "sample_tokens", "sample_temperature", "sample_top_k", "sample_top_p",
    "sample_repetition_penalty", "sample_stop", "sample_checkpoint", "keep_checkpoints", "model_license", "gguf_precision",
    "tracker",
)  # fmt: skip
MOVABLE_FIELDS = ("run_dir", "data_dir", *MEMORY_FIELDS, *USE_FIELDS)
# A finished or stopped run goes on where these alone differ and its steps become more.
GROWING_FIELDS = ("num_steps", "decay_steps")
# They change nothing where AdamW is the optimizer.
MUON_FIELDS = ("muon_learning_rate", "muon_momentum", "muon_first_momentum", "muon_momentum_warmup_steps")
DISTILL_FIELDS = ("distill_weight", "distill_temperature", "distill_divergence")
# What runs did before there were these fields, where the default is another now.
AS_BEFORE = {
    "optimizer": "adamw", "optimizer_state_precision": "fp32", "muon_first_momentum": None, "muon_momentum_warmup_steps": None,
}  # fmt: skip
FOLDERS = "step-" + "[0-9]" * 8


def config_record(config: TrainingConfig) -> dict:
    """The configuration as config.json and state.json hold it."""
    return json.loads(json.dumps(asdict(config)))


def refuse_other_run(config: TrainingConfig) -> None:
    """Raises ValueError when run_dir holds a run of another configuration; MOVABLE_FIELDS may differ, and a run may go on to
    more steps.
    """
    differing = _differing(config)
    if differing and shorter_run(config) is None:
        listed = ", ".join(f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in differing.items())
        raise ValueError(
            f"run_dir={config.run_dir!r} holds a run of a different configuration: {listed}; choose another run_dir"
        )


def shorter_run(config: TrainingConfig) -> TrainingConfig | None:
    """The configuration of the run in run_dir where it is `config` with fewer steps, and perhaps another decay; else None."""
    differing = _differing(config)
    there, here = differing.get("num_steps", (0, 0))
    if not differing.keys() <= {*GROWING_FIELDS} or not there < here:
        return None
    return replace(config, **{name: values[0] for name, values in differing.items()})


def _differing(config: TrainingConfig) -> dict[str, list]:
    """The fields in which the run in run_dir differs, but for MOVABLE_FIELDS and fields without effect: its value and ours.

    A field that the stored configuration does not name is newer than the run. It counts as AS_BEFORE or TrainingConfig has it.
    """
    path = Path(config.run_dir) / "config.json"
    if not path.exists():
        return {}
    ours, theirs = config_record(config), config_record(TrainingConfig()) | AS_BEFORE | read_json(path)
    idle = MUON_FIELDS if theirs["optimizer"] == ours["optimizer"] == "adamw" else ()
    both = {name: [theirs.get(name), ours.get(name)] for name in {**ours, **theirs} if name not in (*MOVABLE_FIELDS, *idle)}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def stored_config(folder: Path) -> TrainingConfig:
    """The configuration of the run in a folder, wherever that is now. Raises OSError or ValueError where there is none."""
    if not (folder / "config.json").exists():
        raise ValueError("no run: it holds no config.json")
    stored = config_record(TrainingConfig()) | AS_BEFORE | read_json(folder / "config.json") | {"run_dir": str(folder)}
    values = {field.name: stored[field.name] for field in fields(TrainingConfig)}
    named: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TrainingConfig(**named)


def hold_run(config: TrainingConfig, wait_seconds: float) -> int | None:
    """Locks run_dir for this process and returns the descriptor of the lock; None when run_dir is not there.

    The lock ends when the descriptor is closed, or with the process. Where the file system has no locks, a line says so. Raises
    ValueError when another launch still holds run_dir after `wait_seconds`.
    """
    if not Path(config.run_dir).is_dir():
        return None
    descriptor, limit = os.open(config.run_dir, os.O_RDONLY), time.monotonic() + wait_seconds
    while not lock(descriptor):
        if time.monotonic() > limit:
            os.close(descriptor)
            raise ValueError(f"run_dir={config.run_dir!r} is in use by another launch; wait for its end, or stop it")
        time.sleep(RUN_DIR_POLL_SECONDS)
    if unlocked := lock_words(descriptor, Path(config.run_dir)):
        print(unlocked, flush=True)
    return descriptor


def claim_run(config: TrainingConfig, step: int) -> None:
    """Creates run_dir and its config.json, and deletes half-written and replaced checkpoints of earlier launches.

    Checkpoints after `step`, from which the run continues, did not verify: they are renamed to step-XXXXXXXX.faulty. Where a
    run goes on from before its decay, they are good: they are renamed to step-XXXXXXXX.decayed, and stay.
    """
    folder = checkpoints_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    found, ending = checkpoint_folders(config), "faulty" if shorter_run(config) is None else "decayed"
    for leftover in {*folder.glob(".step-*.draft"), *folder.glob(".step-*.replaced")} - {*found.values()}:
        shutil.rmtree(leftover)
    for newer in [at for at in found if at > step]:
        aside = folder / f"step-{newer:08d}.{ending}"
        shutil.rmtree(aside, ignore_errors=True)
        found[newer].rename(aside)
    write_text(folder.parent / "config.json", json.dumps(config_record(config), indent=2) + "\n")


def metrics_path(config: TrainingConfig) -> Path:
    """The run's metrics.jsonl."""
    return Path(config.run_dir) / "metrics.jsonl"


def read_metrics(config: TrainingConfig) -> list[dict]:
    """Every whole line of metrics.jsonl; ValueError when one is no record of a step."""
    path = metrics_path(config)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [_parse_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _parse_record(line: str, source: str) -> dict:
    record = parse_json(line.encode(), source)
    if not isinstance(record.get("step"), int):
        raise ValueError(f"{source} names no step")
    return record


def picture_path(config: TrainingConfig) -> Path:
    """The run's loss.png."""
    return Path(config.run_dir) / "loss.png"


def page_path(config: TrainingConfig) -> Path:
    """The run's report.html."""
    return Path(config.run_dir) / "report.html"


def tracker_log_path(config: TrainingConfig) -> Path:
    """What the tracker's library said in the run's last launch."""
    return Path(config.run_dir) / "tracker.log"


def tracker_identity(config: TrainingConfig) -> str:
    """The name that no other run has at a tracker. It is made once, and stays and goes with run_dir."""
    path = Path(config.run_dir) / "tracker-id"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text().strip()


def comparison_path(folder: Path) -> Path:
    """The picture of all runs in a folder."""
    return folder / "compare.png"


def best_link(config: TrainingConfig) -> Path:
    """The run's link to its checkpoint with the best held-out loss."""
    return Path(config.run_dir) / "best"


def link_best(config: TrainingConfig, step: int | None) -> None:
    """Makes `best` name the checkpoint of `step`, or nothing. Raises OSError where the disk takes no link."""
    link, draft = best_link(config), Path(config.run_dir) / ".best.draft"
    draft.unlink(missing_ok=True)
    if not link.is_symlink() and link.is_dir():  # where a run was copied, its link may have become a copy
        shutil.rmtree(link)
    if step is None:
        link.unlink(missing_ok=True)
        return
    draft.symlink_to(checkpoint_folders(config)[step].relative_to(config.run_dir))
    draft.replace(link)


def tensorboard_dir(config: TrainingConfig) -> Path:
    """The run's folder of TensorBoard event files."""
    return Path(config.run_dir) / "tensorboard"


def gguf_path(config: TrainingConfig, checkpoint: str) -> Path:
    """Where the GGUF of the checkpoint of that name stands, such as pretrain-step-00000500-bf16.gguf."""
    run_dir = Path(config.run_dir)
    return run_dir / f"{run_dir.absolute().name}-{checkpoint}-{config.gguf_precision}.gguf"


def newest_folder(config: TrainingConfig) -> Path | None:
    """The newest checkpoint's folder, verified or not."""
    return max(checkpoint_folders(config).items(), default=(0, None))[1]


def same_without_teacher(config: TrainingConfig) -> TrainingConfig | None:
    """The configuration of a run beside run_dir that is the same without a teacher, or None; MOVABLE_FIELDS may differ."""
    alone, run_dir = replace(config, teacher_dir=None, teacher_top_k=None), Path(config.run_dir)
    compared = config_record(alone).keys() - {*MOVABLE_FIELDS, *DISTILL_FIELDS}
    ours, defaults = config_record(alone), config_record(TrainingConfig()) | AS_BEFORE
    for path in sorted(run_dir.absolute().parent.glob("*/config.json")):
        try:
            theirs = defaults | read_json(path)
        except (OSError, ValueError):
            continue
        if all(theirs[name] == ours[name] for name in compared):
            return replace(alone, run_dir=str(run_dir.parent / path.parent.name))
    return None


def checkpoints_dir(config: TrainingConfig) -> Path:
    """The run's folder of checkpoints."""
    return Path(config.run_dir) / "checkpoints"


def checkpoint_folders(config: TrainingConfig) -> dict[int, Path]:
    """Every checkpoint's folder by its step. One that is being replaced counts until the new one is there."""
    folders = [*checkpoints_dir(config).glob(f".{FOLDERS}.replaced"), *checkpoints_dir(config).glob(FOLDERS)]
    return {int(folder.name.removesuffix(".replaced")[-8:]): folder for folder in folders}
