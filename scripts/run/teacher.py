"""The teacher of a run: found, checked, loaded, and with `teacher_top_k` run for its labels before the student is there."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ds.loader import read_windows, windows_of_run
from ds.shards import Labels, LabelStream
from scripts.config import LABEL_ERROR_TOKENS, LABEL_PROGRESS_SECONDS, MAKE_TEACHER, VERIFY_THREADS, TrainingConfig
from scripts.engine.distributed import Ranks, device_of, in_turn, say, together
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import architecture, describe, described_config, load_weights, stored_weights, weight_files
from scripts.plan.machine import release_memory
from scripts.run.checkpoint import Checkpoint, Newest, newest_verified
from scripts.run.evaluate import held_out_fields, held_out_loss, held_out_windows
from scripts.run.run_dir import checkpoints_dir
from scripts.run.state import Teaching, data_grid, data_order, windows_on_device
from scripts.run.storage import HASH_BYTES, block_at, sha256

# Part of the format: a block of labels has at least so many tokens, so that its digest of 32 bytes adds little to it.
LEAST_BLOCK_TOKENS = 64
LabelWindows = Callable[..., Any]


class Teacher(NamedTuple):
    """A model to learn from: its transformers `folder`, its shape as a configuration, and the `faults` of newer checkpoints."""

    folder: Path
    config: TrainingConfig
    faults: list[str]


class Labelling(NamedTuple):
    """One labelling: a run's own, the `labels` on the disk that it fills, the teacher `model` and `label`, which asks it."""

    config: TrainingConfig
    ranks: Ranks
    data: Any
    labels: Any
    model: Decoder
    label: LabelWindows


def find_teacher(config: TrainingConfig) -> Teacher | None:
    """What `teacher_dir` names: a transformers folder, or a run, of which the newest checkpoint that verifies is taken. None
    without a teacher_dir. Looks at headers and sizes; reads no weights.

    Raises:
        ValueError: it is no plain Llama or Qwen3 with complete safetensors weights, or its context is below context_length.
    """
    if config.teacher_dir is None:
        return None
    try:
        newest = _newest_of_run(config.teacher_dir)
        folder = Path(config.teacher_dir) if newest.checkpoint is None else newest.checkpoint.folder
        described = described_config(folder)
        stored_weights(described, folder)
    except (OSError, ValueError) as fault:
        raise ValueError(f"teacher_dir={config.teacher_dir!r}: {fault}") from None
    if described.context_length < config.context_length:
        raise ValueError(
            f"teacher_dir={config.teacher_dir!r}: context_length={config.context_length} is longer than the"
            f" {described.context_length} positions that this teacher knows; nearest is {described.context_length}"
        )
    return Teacher(folder, described, newest.faults)


def load_teacher(teacher: Teacher, config: TrainingConfig, device: torch.device) -> Decoder:
    """The teacher's model on `device` in the training dtype, without gradients. Memory beside it: as `load_weights`."""
    batch = dict.fromkeys(("context_length", "tokens_per_step", "eval_tokens"), config.context_length)
    model = empty_model(replace(teacher.config, precision=config.precision, micro_batch_rows=1, **batch), device)
    load_weights(model, teacher.folder)
    return model.requires_grad_(False).eval()


def fingerprint_of(teacher: Teacher) -> str:
    """sha256 (hex) of all that decides a teacher's logits: its shape, and the sha256 of each block of its weights files. Raises
    ValueError where a file cannot be read.
    """
    shape = {name: getattr(teacher.config, name) for name in architecture(teacher.folder, describe(teacher.folder))}
    blocks = [(path, at) for path in weight_files(teacher.folder) for at in range(0, path.stat().st_size, HASH_BYTES)]
    try:
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            digests = list(pool.map(lambda block: sha256([block_at(*block)]), blocks))
    except OSError as fault:
        raise ValueError(f"{teacher.folder} cannot be read: {fault.strerror}") from None
    return hashlib.sha256(json.dumps([shape, digests], sort_keys=True).encode()).hexdigest()


def labels_identity(config: TrainingConfig, fingerprint: str) -> str:
    """sha256 (hex) of all that decides a window's labels: the teacher's fingerprint, the fields of its settings, and whether
    windows are those of each source alone, whatever their weights.
    """
    inputs = [fingerprint, config.teacher_top_k, config.distill_temperature, config.context_length, config.precision]
    inputs += ["each source"] if config.is_mixture else []
    inputs += ["mask_across_documents"] if config.mask_across_documents else []
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def open_teaching(
    teacher: Teacher, config: TrainingConfig, ranks: Ranks, data, *, label: LabelWindows | None, found: Checkpoint | None
) -> Teaching:
    """What the student learns from: the teacher's model on the device or, with `teacher_top_k`, its labels on the disk.

    For labels the teacher is loaded alone, labels the windows that the run reads and that are not labelled yet, and is freed.
    `label(model, windows, config)` gives labels and the nats that they leave out; `found` is the checkpoint that the run
    continues from. Every rank must call this.

    Raises:
        ValueError: the teacher does not fit the data, or is not the one that the run began with.
    """
    fingerprint = together(lambda: check_teacher(config, teacher, data, found))
    say(ranks, f"Teacher: {teacher.folder}, {teacher.config.num_parameters / 1e6:,.2f} million parameters")
    if label is None or config.teacher_top_k is None:
        model = together(lambda: load_teacher(teacher, config, device_of(ranks)))
        return Teaching(fingerprint, model, _teacher_record(teacher, config, ranks, data, model) if found is None else None)
    identity = labels_identity(config, fingerprint)
    labels = in_turn(lambda: open_labels(config, data, config.teacher_top_k or 0, identity), config, ranks)
    groups = _incomplete_groups(config, ranks, data, labels)
    if found is not None and not len(groups):
        return Teaching(fingerprint, labels, None)
    model, record = together(lambda: load_teacher(teacher, config, device_of(ranks))), None
    if found is None:
        record = _teacher_record(teacher, config, ranks, data, model) | _label_error(config, ranks, data, model, label)
    seconds = _write_labels(Labelling(config, ranks, data, labels, model, label), groups)
    del model
    release_memory()
    return Teaching(fingerprint, labels, record and record | {"label_seconds": seconds})


def open_labels(config: TrainingConfig, data, top_k: int, identity: str) -> LabelStream:
    """The files beside the shards that keep a teacher's labels of the training windows; the first call makes them empty.

    `identity` (sha256 hex) tells the teacher and the settings that made them. Raises ValueError when the labels there are
    not of these shards or this identity, or when there is no room for them.
    """
    context_length = config.context_length
    labels = LabelStream(
        folder=data.folder / f"labels-{identity[:16]}",
        stream=data.train,
        top_k=top_k,
        vocab_size=config.vocab_size,
        block_tokens=context_length * -(-LEAST_BLOCK_TOKENS // context_length),
        num_positions=data_grid(config, data).num_windows * context_length,
        identity=identity,
    )
    try:
        labels.create()
    except OSError as fault:
        raise ValueError(f"{labels.folder} cannot be written ({fault.strerror}); make room for the teacher's labels") from None
    labels.check()
    return labels


def check_teacher(config: TrainingConfig, teacher: Teacher, data, found: Checkpoint | None) -> str:
    """The teacher's fingerprint. Raises ValueError where its ids are not the data's or it is not the teacher of `found`."""
    named = f"teacher_dir={config.teacher_dir!r}"
    data.refuse_other_tokenizer(teacher.folder, named)
    if teacher.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"{named}: it gives probabilities to {teacher.config.vocab_size} ids and vocab_size={config.vocab_size};"
            f" nearest is {teacher.config.vocab_size}, with tokenizer_path={str(teacher.folder)!r}"
        )
    fingerprint = fingerprint_of(teacher)
    if found is not None and found.state.get("teacher_fingerprint") != fingerprint:
        raise ValueError(f"{named}: {teacher.folder} is not the teacher that {found.folder} learned from; put that one back")
    return fingerprint


def _newest_of_run(teacher_dir: str) -> Newest:
    """The checkpoint to learn from where the folder is a run's; none where it is of transformers' format."""
    run = TrainingConfig(run_dir=str(Path(teacher_dir)))
    if not checkpoints_dir(run).is_dir():
        return Newest(None, [])
    newest = newest_verified(run)
    if newest.checkpoint is None:
        raise ValueError(f"this run has no checkpoint yet; {MAKE_TEACHER}")
    return newest


def _teacher_record(teacher: Teacher, config: TrainingConfig, ranks: Ranks, data, model: Decoder) -> dict:
    """What metrics.jsonl holds of the teacher. Every rank must call this."""
    record = {"kind": "event", "step": 0, "event": "teacher", "folder": str(teacher.folder)}
    record |= {"num_parameters": teacher.config.num_parameters}
    return record if data.validation is None else record | held_out_fields(held_out_loss(config, ranks, data, model))


def _label_error(config: TrainingConfig, ranks: Ranks, data, model: Decoder, label: LabelWindows) -> dict:
    """Means over some held-out tokens, in nats where they are not shares: what labels leave to the ids that they do not name,
    and by how much they make the divergence of a uniform student too small. Every rank must call this.
    """
    if data.validation is None:
        return {}
    sums = torch.zeros(3, dtype=torch.float64, device=device_of(ranks))
    num_tokens = max(config.context_length, min(config.eval_tokens, LABEL_ERROR_TOKENS))
    for windows in held_out_windows(config, ranks, data, num_tokens):
        found = label(model, windows, config)
        left_out = found.left_out_nats
        sums += torch.stack((found.labels.tail.double().sum(), left_out.double().sum(), sums.new_tensor(left_out.numel())))
    torch.distributed.all_reduce(sums)
    tail, left_out, count = sums.tolist()
    return {"tail_mass": tail / count, "left_out_nats": left_out / count}


def _incomplete_groups(config: TrainingConfig, ranks: Ranks, data, labels) -> np.ndarray:
    """The blocks of labels that the run reads, (groups, blocks of a group), where a block of the group is not on the disk. The
    teacher labels one group at a time, the same for any number of ranks; the last group repeats its last block. Each rank
    looks at its share of the labels. Every rank must call this.
    """
    at_once = max(1, config.micro_batch_rows * config.context_length // labels.block_tokens)
    windows = windows_of_run(config.num_steps, data_order(config, data))
    blocks = np.unique(windows * config.context_length // labels.block_tokens)
    blocks = np.pad(blocks, (0, -len(blocks) % at_once), "edge").reshape(-1, at_once)
    own, is_faulty = blocks[ranks.rank :: ranks.world_size], torch.zeros(len(blocks), dtype=torch.int32)
    is_faulty[ranks.rank :: ranks.world_size] = torch.from_numpy(np.isin(own, labels.faulty(np.unique(own))).any(1)).int()
    of_all = is_faulty.to(device_of(ranks))
    torch.distributed.all_reduce(of_all)
    return blocks[of_all.cpu().numpy() != 0]


def _write_labels(labelling: Labelling, groups: np.ndarray) -> float:
    """Labels `groups` (groups, blocks of a group), each rank its share; the seconds that it took. Every rank must call this."""
    ranks, started = labelling.ranks, time.perf_counter()
    if len(groups):
        num_tokens = groups.size * labelling.labels.block_tokens
        say(ranks, f"The teacher alone labels {num_tokens:,} tokens; the same command goes on where it stopped")

    def write() -> None:
        try:
            for group in _with_progress(groups[ranks.rank :: ranks.world_size], ranks):
                label_blocks(labelling, np.unique(group))
            labelling.labels.sync()
        except OSError as fault:
            words = f"a label cannot be written: {fault.strerror}; make room"
            raise ValueError(f"data_dir={labelling.config.data_dir!r}: {words}") from None

    together(write)
    return time.perf_counter() - started


def _with_progress(groups: np.ndarray, ranks: Ranks) -> Iterator[np.ndarray]:
    """The groups, with a bar on a terminal and else a line every LABEL_PROGRESS_SECONDS."""
    said_at, is_terminal = time.perf_counter(), ranks.rank == 0 and sys.stderr.isatty()
    for number, group in enumerate(tqdm(groups, unit="batch", desc="labels", dynamic_ncols=True, disable=not is_terminal)):
        yield group
        if not is_terminal and time.perf_counter() - said_at > LABEL_PROGRESS_SECONDS:
            said_at = time.perf_counter()
            say(ranks, f"labels: {(number + 1) / len(groups):.0%}")


def label_blocks(labelling: Labelling, blocks: np.ndarray) -> None:
    """Runs the teacher on the windows of `blocks` (N,) int64, `micro_batch_rows` at a time, and writes its labels."""
    config, labels, grid = labelling.config, labelling.labels, data_grid(labelling.config, labelling.data)
    length, rows, per_block = config.context_length, config.micro_batch_rows, labels.block_tokens // config.context_length
    windows = (blocks[:, None] * per_block + np.arange(per_block)).flatten()
    windows, answers = windows[windows < labels.num_positions // length], []
    for piece in np.split(windows, range(rows, len(windows), rows)):
        ids = read_windows(labelling.data.train, piece, grid)
        own = windows_on_device(ids, config, labelling.data, device_of(labelling.ranks))
        answers.append([part.flatten(0, 1).cpu().numpy() for part in labelling.label(labelling.model, own, config).labels])
    parts = [np.concatenate(pieces) for pieces in zip(*answers, strict=True)]
    for number, block in enumerate(blocks.tolist()):
        own = slice(number * labels.block_tokens, (number + 1) * labels.block_tokens)
        labels.write(block * labels.block_tokens, Labels(*(part[own] for part in parts)))
