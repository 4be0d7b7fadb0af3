"""The run directory's only author: metrics, save, verify, resume, export. A checkpoint is a folder that transformers opens.

Every checkpoint is written to a temporary folder, fsynced, listed in training/manifest.json with the sha256 of each block of
HASH_BYTES, and renamed. Then it is read back from the disk while training goes on, and until it has been, the checkpoints
before it are left alone. Weights and optimizer state are safetensors; every rank writes and reads its own slices of the state
and none ever holds the whole.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scripts import offload
from scripts.config import MAKE_TEACHER, TrainingConfig
from scripts.model import Decoder, architecture_fields, empty_model, tensor_shapes, transformers_config

FORMAT = 2
MOVABLE_FIELDS = (
    "run_dir",
    "data_dir",
    "micro_batch_rows",
    "accumulate_on",
    "accumulation_precision",
    "activation_checkpointing",
    "loss_chunk_rows",
)
DISTILL_FIELDS = ("distill_weight", "distill_temperature", "distill_divergence")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
READABLE_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()} | {"F64": torch.float64}
HASH_BYTES = 2**22
DIGEST_BYTES = 32
HASH_THREADS, READ_THREADS, LOAD_THREADS = 2, 8, 2
WRITE_BACK_BYTES = 2**25
PIECE_ELEMENTS = 2**22
SAVE_BYTES = 2**26
TEXTS_BYTES = 2**20
LARGEST_JSON_BYTES = 2**26
LARGEST_STEP = 10**8 - 1
MANIFEST, STATE = "training/manifest.json", "training/state.json"
FOLDERS = "step-" + "[0-9]" * 8
CODE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", "model.safetensors.index.json")
NOT_READ_BACK = errno.EBADMSG
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
POLL_SECONDS = 0.2
GIB = 2**30


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder and the contents of its training/state.json."""

    folder: Path
    state: dict


class Teacher(NamedTuple):
    """A model to learn from: its transformers `folder`, and its shape as a configuration."""

    folder: Path
    config: TrainingConfig


class Saved(NamedTuple):
    """Where `save` was to write; `fault`: why there is no such checkpoint, None when there is; `proof`: the reading back of
    this rank's files, which goes on.
    """

    folder: Path
    fault: str | None
    proof: Future | None


class Settled(NamedTuple):
    """Whether a saved checkpoint read back as it was written; what is wrong, with it or with deleting an older one."""

    good: bool
    words: str | None


class FileRecord(NamedTuple):
    """What the manifest knows of a file: its length, and the sha256 in hex of each block of HASH_BYTES."""

    num_bytes: int
    digests: list[str]


class Block(NamedTuple):
    """Bytes start..stop of the file `name`, and the sha256 in hex that they had when they were saved."""

    name: str
    start: int
    stop: int
    digest: str


class Stored(NamedTuple):
    """A tensor in a safetensors file: its dtype and shape, and the byte at which it starts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int


def config_record(config: TrainingConfig) -> dict:
    """The configuration as JSON holds it."""
    return json.loads(json.dumps(asdict(config)))


def refuse_other_run(config: TrainingConfig) -> None:
    """Raises ValueError, with the fields that differ, when run_dir holds a run of another configuration.

    A field that the stored configuration does not name is newer than the run and counts as TrainingConfig's default.
    """
    path = Path(config.run_dir) / "config.json"
    if not path.exists():
        return
    ours, theirs = config_record(config), config_record(TrainingConfig()) | _read_json(path)
    names = [name for name in {**ours, **theirs} if name not in MOVABLE_FIELDS and ours.get(name) != theirs.get(name)]
    if names:
        listed = ", ".join(f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)" for name in names)
        raise ValueError(
            f"run_dir={config.run_dir!r} holds a run of a different configuration: {listed}; choose another run_dir"
        )


def hold_run(config: TrainingConfig, wait_seconds: float) -> int | None:
    """Holds run_dir for this process, which ends with the process or when the descriptor is closed; None when it is not there.

    A file system without locks is not held.

    Raises:
        ValueError: another launch still holds it after `wait_seconds`.
    """
    if not Path(config.run_dir).is_dir():
        return None
    descriptor, limit = os.open(config.run_dir, os.O_RDONLY), time.monotonic() + wait_seconds
    while not _lock(descriptor):
        if time.monotonic() > limit:
            os.close(descriptor)
            raise ValueError(f"run_dir={config.run_dir!r} is in use by another launch; wait for its end, or stop it")
        time.sleep(POLL_SECONDS)
    return descriptor


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        return fault.errno in NO_LOCKS
    return True


def claim_run(config: TrainingConfig, step: int) -> None:
    """Creates run_dir and its config.json; clears away checkpoints that a killed process left half-written or replaced, and
    sets aside, as step-XXXXXXXX.faulty, those newer than the `step` that the run continues from: they did not verify.
    """
    folder = Path(config.run_dir)
    _checkpoints(config).mkdir(parents=True, exist_ok=True)
    kept = _folders(config).values()
    for leftover in [*_checkpoints(config).glob(".step-*.draft"), *_checkpoints(config).glob(".step-*.replaced")]:
        if leftover not in kept:
            shutil.rmtree(leftover)
    for at, newer in _folders(config).items():
        if at > step:
            shutil.rmtree(aside := _faulty(newer), ignore_errors=True)
            newer.rename(aside)
    _write_text(folder / "config.json", json.dumps(config_record(config), indent=2) + "\n")


def metrics_path(config: TrainingConfig) -> Path:
    """The run's metrics.jsonl."""
    return Path(config.run_dir) / "metrics.jsonl"


def picture_path(config: TrainingConfig) -> Path:
    """The run's loss.png."""
    return Path(config.run_dir) / "loss.png"


def tensorboard_dir(config: TrainingConfig) -> Path:
    """The run's folder of TensorBoard event files."""
    return Path(config.run_dir) / "tensorboard"


def append_metrics(config: TrainingConfig, records: list[dict]) -> bool:
    """Adds a line for each record to metrics.jsonl, all or none; False when the disk took none, for the caller to try again."""
    path = metrics_path(config)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    num_bytes = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            _write_all(file.fileno(), memoryview(lines.encode()))
    except OSError:
        if path.exists():
            os.truncate(path, num_bytes)
        return False
    return True


def read_metrics(config: TrainingConfig) -> list[dict]:
    """Every whole line of metrics.jsonl.

    Raises:
        ValueError: a whole line is no record of a step.
    """
    path = metrics_path(config)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [_parse_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.endswith("\n")]


def rewind_metrics(config: TrainingConfig, step: int, looked_around: bool) -> None:
    """Drops every line after `step`, and a half-written last one, so that a resumed run logs each step once; without
    `looked_around` the evaluation and the sample of `step` too, which are then made again.
    """

    def is_kept(record: dict) -> bool:
        repeated = not looked_around and (record["kind"] == "eval" or record.get("event") == "sample")
        return record["step"] < step or (record["step"] == step and not repeated)

    kept = [record for record in read_metrics(config) if is_kept(record)]
    _write_text(metrics_path(config), "".join(json.dumps(record) + "\n" for record in kept))


def lost_steps(config: TrainingConfig) -> int:
    """Steps that metrics.jsonl holds beyond the newest checkpoint: they were not saved and are trained again."""
    newest = max(_folders(config), default=0)
    return max(0, max((record["step"] for record in read_metrics(config)), default=0) - newest)


def save_num_bytes(config: TrainingConfig, tokenizer_json: str) -> int:
    """Bytes on the disk that a checkpoint takes at most: weights, 12 a parameter of optimizer state, texts and digests."""
    tensors = config.num_parameters * (config.dtype.itemsize + 12)
    return tensors + len(tokenizer_json.encode()) + TEXTS_BYTES + tensors // HASH_BYTES * 3 * DIGEST_BYTES


def save(engine, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int, progress: dict) -> Saved:
    """Writes and publishes the checkpoint after `progress["step"]` steps; begins to read it back. Every rank must call this.

    A disk that is full or fails on any rank is told on every rank in `fault`, no rank waits for another that failed, and the
    checkpoints before it stay; older ones than `keep_checkpoints` go only in `settle`. Memory beside the engine's: at most
    SAVE_BYTES, for any size of tensor, on the GPU as on the host.

    Args:
        progress: what state.json remembers beside the optimizer: at least `step`, and the fingerprint of the data.
    """
    rank = torch.distributed.get_rank()
    folder = _checkpoints(config) / f"step-{progress['step']:08d}"
    draft = folder.with_name(f".{folder.name}.draft")
    num_bytes = save_num_bytes(config, tokenizer_json)
    try:
        _together(lambda: _begin(draft, num_bytes) if rank == 0 else None)
        _together(lambda: _sync_metrics(config) if rank == 0 else None)
        records = _together(lambda: _write_files(draft, engine, config, tokenizer_json, end_of_text_id, progress))
        gathered = _gather_records(records)
        _together(lambda: _publish(draft, folder, gathered) if rank == 0 else None)
    except OSError as fault:
        return Saved(folder, _give_up(config, folder, draft, num_bytes, fault) if rank == 0 else fault.strerror, None)
    reader = ThreadPoolExecutor(1)
    proof = reader.submit(_read_back, folder, records)
    reader.shutdown(wait=False)
    return Saved(folder, None, proof)


def settle(config: TrainingConfig, saved: Saved) -> Settled:
    """Waits until every rank has read its files of `saved` back from the disk; then the older checkpoints than
    `keep_checkpoints` go. A checkpoint that reads back otherwise is removed. Every rank must call this, before the next `save`.
    """
    rank, step, proof = torch.distributed.get_rank(), int(saved.folder.name[-8:]), saved.proof
    if proof is None:
        return Settled(False, None)
    try:
        _together(proof.result)
    except OSError as fault:
        good = _still_good(config, saved.folder) if rank == 0 else ""
        _together(lambda: _remove(saved.folder) if rank == 0 else None)
        return Settled(False, f"{saved.folder} was not saved: {fault.strerror}; {good}; the next save tries again")
    try:
        _together(lambda: _prune(config, step) if rank == 0 else None)
    except OSError as fault:
        return Settled(True, f"an older checkpoint beside {saved.folder} could not be deleted: {fault.strerror}")
    return Settled(True, None)


def newest_verified(config: TrainingConfig) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte matches its manifest, and a line for each newer one that does not.

    Raises:
        ValueError: there are checkpoints and none of them verifies, or metrics.jsonl tells of one and none is left.
    """
    faults = []
    for _, folder in sorted(_folders(config).items(), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return Checkpoint(folder, _read_state(folder)), faults
        faults.append(f"checkpoint {folder} does not verify: {fault}")
    if faults:
        raise ValueError(f"{faults[0]}; no checkpoint in it verifies: restore that file, or choose another run_dir")
    _refuse_lost_checkpoints(config)
    return None, []


def newest_folder(config: TrainingConfig) -> Path | None:
    """The newest checkpoint's folder, verified or not."""
    return max(_folders(config).items(), default=(0, None))[1]


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every file matches the manifest.

    Reads with READ_THREADS threads, one block of HASH_BYTES in the memory of each.
    """
    try:
        records = _read_manifest(folder)
        fault = _find_added(folder, records) or _find_changed(folder, records, READ_THREADS)
        if fault is None:
            num_ranks = _read_state(folder)["optimizer"]["world_size"]
            names = (_state_file(rank, num_ranks) for rank in range(num_ranks))
            fault = next((f"{name} is missing" for name in names if name not in records), None)
    except (OSError, ValueError) as problem:
        return str(problem)
    return fault


def described_config(folder: Path) -> TrainingConfig:
    """A configuration whose model is the one that a transformers folder describes, in the folder's own dtype.

    Raises:
        ValueError: the folder is none of transformers', its model no plain Llama or Qwen3, or larger than its weights files.
    """
    description = _describe(folder)
    context = description.get("max_position_embeddings") or TrainingConfig.context_length
    dtype = description.get("torch_dtype") or description.get("dtype")
    config = TrainingConfig(
        **_architecture(folder, description),
        context_length=context,
        micro_batch_rows=1,
        tokens_per_step=context,
        eval_tokens=context,
        precision={"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype), "fp32"),
    )
    num_bytes = sum(path.stat().st_size for path in _weight_files(folder))
    if 2 * config.num_parameters > num_bytes:
        raise ValueError(f"{folder} describes {config.num_parameters} parameters and holds {num_bytes} bytes of weights")
    return config


def load_weights(model: Decoder, folder: Path) -> None:
    """Copies a transformers folder's safetensors weights, sharded or not, into `model`.

    Memory beside the model's: none where the dtypes agree on the host, else LOAD_THREADS pieces of PIECE_ELEMENTS. Files are
    read, not mapped, so that a failing disk is an error and not the end of the process. Nothing is read before every tensor's
    name and shape are found right.

    Raises:
        ValueError: the folder is no plain Llama or Qwen3 of this shape, or a tensor is missing, extra or misshapen.
    """
    _refuse_other_architecture(model.config, folder)
    targets = dict(model.named_parameters())
    for path, name, stored in _stored_weights(model.config, folder):
        _read_into(path, stored.position, stored.dtype, targets[name].detach().view(-1))


def find_teacher(config: TrainingConfig) -> Teacher | None:
    """What `teacher_dir` names, looked at but not read: a transformers folder, or a run, whose newest checkpoint that
    verifies is meant. None without a teacher_dir.

    Raises:
        ValueError: there is no plain Llama or Qwen3 with whole safetensors weights, or it does not reach over context_length.
    """
    if config.teacher_dir is None:
        return None
    folder = Path(config.teacher_dir)
    try:
        folder = _newest_of(folder) if _is_run(folder) else folder
        described = described_config(folder)
        list(_stored_weights(described, folder))
    except (OSError, ValueError) as fault:
        raise ValueError(f"teacher_dir={config.teacher_dir!r}: {fault}") from None
    if described.context_length < config.context_length:
        raise ValueError(
            f"teacher_dir={config.teacher_dir!r}: context_length={config.context_length} is longer than the"
            f" {described.context_length} positions that this teacher knows; nearest is {described.context_length}"
        )
    return Teacher(folder, described)


def load_teacher(teacher: Teacher, config: TrainingConfig, device: torch.device) -> Decoder:
    """The teacher on `device` in the training dtype, without gradients. Memory beside it: as `load_weights`."""
    same = {"context_length": config.context_length, "precision": config.precision}
    batch = {"micro_batch_rows": 1, "tokens_per_step": config.context_length, "eval_tokens": config.context_length}
    model = empty_model(replace(teacher.config, **same, **batch), device)
    load_weights(model, teacher.folder)
    return model.requires_grad_(False).eval()


def fingerprint_of(teacher: Teacher) -> str:
    """sha256 (hex) of what decides what a teacher says: its shape, and the sha256 of each block of its weights files.

    Raises:
        ValueError: a file cannot be read.
    """
    shape = {name: getattr(teacher.config, name) for name in _architecture(teacher.folder, _describe(teacher.folder))}
    blocks = [(path, at) for path in _weight_files(teacher.folder) for at in range(0, path.stat().st_size, HASH_BYTES)]
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            digests = list(pool.map(lambda block: _sha256([_block_at(*block)]), blocks))
    except OSError as fault:
        raise ValueError(f"{teacher.folder} cannot be read: {fault.strerror}") from None
    return hashlib.sha256(json.dumps([shape, digests], sort_keys=True).encode()).hexdigest()


def labels_identity(config: TrainingConfig, fingerprint: str) -> str:
    """sha256 (hex) of all that decides what a teacher of that fingerprint says of windows: it, and how it is asked."""
    return hashlib.sha256(json.dumps([fingerprint, *config.asked_of_teacher]).encode()).hexdigest()


def same_without_teacher(config: TrainingConfig) -> TrainingConfig | None:
    """The run beside run_dir that differs from it in nothing but its teacher, which it lacks, and in MOVABLE_FIELDS."""
    alone, run_dir = replace(config, teacher_dir=None, teacher_top_k=None), Path(config.run_dir)
    ours, defaults = config_record(alone), config_record(TrainingConfig())
    for name in {*MOVABLE_FIELDS, *DISTILL_FIELDS}:
        del ours[name]
    for path in sorted(run_dir.absolute().parent.glob("*/config.json")):
        try:
            theirs = defaults | _read_json(path)
        except (OSError, ValueError):
            continue
        if all(theirs[name] == value for name, value in ours.items()):
            return replace(alone, run_dir=str(run_dir.parent / path.parent.name))
    return None


def load_state(engine, checkpoint: Checkpoint) -> None:
    """Restores the optimizer from any number of ranks' files onto this one's ranks; the weights come by `load_weights`.

    Memory beside the optimizer's: none on the host, one chunk of offload.CHUNK_ELEMENTS float32 for an optimizer on the GPU.

    Raises:
        ValueError: the saved groups are not this model's, or a file of them is not what a rank writes.
    """
    saved = checkpoint.state["optimizer"]
    sizes = [part.num_elements for part in offload.partitions(engine)]
    if saved["group_elements"] != sizes:
        raise ValueError(f"{checkpoint.folder}: optimizer groups of {saved['group_elements']} elements do not fit {sizes}")
    read = _slice_reader(checkpoint.folder, saved["world_size"], saved["group_partitions"])
    offload.load_optimizer(engine, read, saved["adam_steps"], saved["loss_scaler"])


def file_sha256(path: Path) -> str:
    """The hex sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(config: TrainingConfig) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _folders(config: TrainingConfig) -> dict[int, Path]:
    """Checkpoints by step. One that was set aside counts as long as the one that replaces it is not there."""
    found = {}
    for folder in [*_checkpoints(config).glob(f".{FOLDERS}.replaced"), *_checkpoints(config).glob(FOLDERS)]:
        found[int(folder.name.split("-")[1].removesuffix(".replaced"))] = folder
    return found


def _refuse_lost_checkpoints(config: TrainingConfig) -> None:
    saved = [record["step"] for record in read_metrics(config) if record.get("event") == "saved"]
    if saved:
        raise ValueError(
            f"{_checkpoints(config)} holds no checkpoint, and {metrics_path(config)} says that one was saved at step"
            f" {max(saved)}: put the checkpoints back, or choose another run_dir"
        )


def _state_file(rank: int, world_size: int) -> str:
    return f"training/optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def _together(work: Callable) -> Any:
    """`work` on this rank; raises OSError on every rank, with the same words, when it failed on any. All ranks call this."""
    result, number = None, 0
    try:
        result = work()
    except OSError as fault:
        number = fault.errno or errno.EIO
    failed = [(int(number), rank) for rank, number in enumerate(_gather(torch.tensor([number]))) if number]
    if failed:
        words = [f"rank {rank}: {_words_of(number)}" for number, rank in failed[:3]]
        raise OSError(failed[0][0], ", ".join(words) + (f" and {len(failed) - 3} more ranks" if failed[3:] else ""))
    return result


def _words_of(number: int) -> str:
    return "the disk returns other bytes than were written" if number == NOT_READ_BACK else os.strerror(number)


def _begin(draft: Path, num_bytes: int) -> None:
    """Makes the draft folder where there is room for the checkpoint."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    if shutil.disk_usage(draft.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (draft / "training").mkdir(parents=True)


def _sync_metrics(config: TrainingConfig) -> None:
    """The log up to this step must outlive a power cut if the checkpoint does."""
    if metrics_path(config).exists():
        with metrics_path(config).open("rb") as file:
            os.fsync(file.fileno())


def _write_files(
    draft: Path, engine, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int, progress: dict
) -> dict[str, FileRecord]:
    """This rank's files: its slices of the optimizer state, on rank 0 everything else too."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = _state_file(rank, world_size)
    records = {own: _write_safetensors(draft / own, offload.optimizer_tensors(engine))}
    if rank == 0:
        records |= _write_model(draft, engine.module, config, tokenizer_json, end_of_text_id)
        records |= _write_state(draft, engine, config, progress, world_size)
    return records


def _read_back(folder: Path, records: dict[str, FileRecord]) -> None:
    """Reads this rank's files from the disk itself, on one thread, to leave the processor to the training."""
    for name in records:
        _forget_pages(folder / name)
    if _find_changed(folder, records, 1) is not None:
        raise OSError(NOT_READ_BACK, _words_of(NOT_READ_BACK))


def _give_up(config: TrainingConfig, folder: Path, draft: Path, num_bytes: int, fault: OSError) -> str:
    """Removes the draft; the line that tells what happened, what is needed and what is still good."""
    shutil.rmtree(draft, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
    return (
        f"{folder} was not saved: {fault.strerror}; it needs {num_bytes / GIB:.3f} GiB and {free / GIB:.3f} GiB are free;"
        f" {_still_good(config, folder)}; the next save tries again"
    )


def _still_good(config: TrainingConfig, folder: Path) -> str:
    older = sorted((pair for pair in _folders(config).items() if pair[0] < int(folder.name[-8:])), reverse=True)
    good = next((path for _, path in older if find_fault(path) is None), None)
    return f"{good} is still good" if good else "there is no checkpoint before it"


def _write_model(
    draft: Path, model: Decoder, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int
) -> dict[str, FileRecord]:
    texts = {
        "config.json": transformers_config(config, end_of_text_id),
        "generation_config.json": {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id},
        "tokenizer_config.json": _tokenizer_config(config, tokenizer_json, end_of_text_id),
    }
    records = {name: _write_text(draft / name, json.dumps(value, indent=2) + "\n") for name, value in texts.items()}
    records["tokenizer.json"] = _write_text(draft / "tokenizer.json", tokenizer_json)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    records["model.safetensors"] = _write_safetensors(draft / "model.safetensors", weights)
    return records


def _tokenizer_config(config: TrainingConfig, tokenizer_json: str, end_of_text_id: int) -> dict:
    added = json.loads(tokenizer_json)["added_tokens"]
    end = next(token["content"] for token in added if token["id"] == end_of_text_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
    }


def _write_state(draft: Path, engine, config: TrainingConfig, progress: dict, world_size: int) -> dict[str, FileRecord]:
    parts = offload.partitions(engine)
    state = {
        **progress,
        "format": FORMAT,
        "config": config_record(config),
        "optimizer": {
            "world_size": world_size,
            "group_elements": [part.num_elements for part in parts],
            "group_partitions": [part.stop - part.start for part in parts],
            "adam_steps": offload.adam_steps(engine),
            "loss_scaler": offload.loss_scaler_state(engine),
        },
    }
    return {STATE: _write_text(draft / STATE, json.dumps(state, indent=2) + "\n")}


def _gather_records(records: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """`records` and every rank's of its optimizer file, as tensors: lengths first, then digests padded to the most blocks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = records[_state_file(rank, world_size)]
    lengths = _gather(torch.tensor([own.num_bytes]))
    num_blocks = [-(-int(length) // HASH_BYTES) for length in lengths]
    padded = torch.zeros(max(num_blocks) * DIGEST_BYTES, dtype=torch.uint8)
    digests = torch.frombuffer(bytearray.fromhex("".join(own.digests)), dtype=torch.uint8)
    padded[: len(digests)] = digests
    gathered = dict(records)
    for other, (length, row) in enumerate(zip(lengths, _gather(padded), strict=True)):
        whole = bytes(row.tolist()).hex()
        digests = [whole[block * 2 * DIGEST_BYTES : (block + 1) * 2 * DIGEST_BYTES] for block in range(num_blocks[other])]
        gathered[_state_file(other, world_size)] = FileRecord(int(length), digests)
    return gathered


def _gather(tensor: Tensor) -> list[Tensor]:
    mine = tensor.to(_collective_device())
    others = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(others, mine)
    return [other.cpu() for other in others]


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _publish(draft: Path, folder: Path, records: dict[str, FileRecord]) -> None:
    """Lists the draft's files in its manifest and gives it its name. What had that name stays whole until it is replaced."""
    files = {name: {"bytes": record.num_bytes, "sha256": record.digests} for name, record in sorted(records.items())}
    _write_text(draft / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    for inner in (draft / "training", draft):
        _sync_folder(inner)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        _remove(replaced)
        folder.rename(replaced)
    try:
        draft.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    _sync_folder(folder.parent)
    _remove(replaced)


def _faulty(folder: Path) -> Path:
    return folder.with_name(f"{folder.name.lstrip('.').removesuffix('.replaced')}.faulty")


def _prune(config: TrainingConfig, step: int) -> None:
    """Deletes all but `keep_checkpoints` of the checkpoints up to `step`, never the one at `step` nor a newer one, and those
    set aside that training has made anew.
    """
    for aside in _checkpoints(config).glob(f"{FOLDERS}.faulty"):
        if int(aside.name[5:13]) <= step:
            shutil.rmtree(aside)
    older = [folder for at, folder in sorted(_folders(config).items()) if at < step]
    for folder in older[: max(0, len(older) + 1 - config.keep_checkpoints)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; killed in the middle, it leaves a draft and no half checkpoint."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.doomed.draft")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    try:
        manifest = _read_json(folder / MANIFEST)
    except (OSError, ValueError):
        raise ValueError(f"{MANIFEST} is missing or unreadable") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest.get('format')!r:.40}, and format {FORMAT} is read")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"model.safetensors", "config.json", STATE} <= files.keys():
        raise ValueError(f"{MANIFEST} was changed after it was saved")
    if not all(_is_record(name, value) for name, value in files.items()):
        raise ValueError(f"{MANIFEST} was changed after it was saved")
    return {name: FileRecord(value["bytes"], value["sha256"]) for name, value in files.items()}


def _is_record(name: str, value) -> bool:
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\0" not in name
    if (
        not inside
        or not isinstance(value, dict)
        or not _is_count(value.get("bytes"))
        or not isinstance(value.get("sha256"), list)
    ):
        return False
    return len(value["sha256"]) == -(-value["bytes"] // HASH_BYTES) and all(isinstance(word, str) for word in value["sha256"])


def _is_count(value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _find_added(folder: Path, records: dict[str, FileRecord]) -> str | None:
    """Names a file that other programs would load as weights, and that may hold code, although it was not saved."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in records and name.lower().endswith(CODE_ENDINGS):
            return f"{name} was added after it was saved"
    return None


def _find_changed(folder: Path, records: dict[str, FileRecord], num_threads: int) -> str | None:
    """The first file, in the order of names, that is missing or changed; the blocks of all files are read in parallel."""
    blocks = []
    for name, record in sorted(records.items()):
        if not (folder / name).is_file():
            return f"{name} is missing"
        num_bytes = (folder / name).stat().st_size
        if num_bytes != record.num_bytes:
            return f"{name} was changed after it was saved: it has {num_bytes} bytes and had {record.num_bytes}"
        starts = range(0, num_bytes, HASH_BYTES)
        blocks += [
            Block(name, at, min(at + HASH_BYTES, num_bytes), word) for at, word in zip(starts, record.digests, strict=True)
        ]
    with ThreadPoolExecutor(num_threads) as pool:
        shares = (blocks[thread::num_threads] for thread in range(num_threads))
        found = [fault for faults in pool.map(lambda share: _changed_blocks(folder, share), shares) for fault in faults]
    return min(found)[1] if found else None


def _changed_blocks(folder: Path, blocks: list[Block]) -> list[tuple[Block, str]]:
    buffer, faults = memoryview(bytearray(min(HASH_BYTES, max((b.stop - b.start for b in blocks), default=0)))), []
    for name, of_file in groupby(blocks, lambda block: block.name):
        with (folder / name).open("rb", buffering=0) as file:
            for block in of_file:
                try:
                    _read_all(file.fileno(), buffer[: block.stop - block.start], block.start)
                except OSError as fault:
                    faults.append((block, f"{name} cannot be read at byte {block.start}: {fault.strerror}"))
                    continue
                if hashlib.sha256(buffer[: block.stop - block.start]).hexdigest() != block.digest:
                    faults.append((block, f"{name} was changed after it was saved, in the block at byte {block.start}"))
    return faults


def _read_state(folder: Path) -> dict:
    """training/state.json, when it holds what `load_state` needs."""
    state = _read_json(folder / STATE)
    step, saved = state.get("step"), state.get("optimizer")
    if not _is_count(step) or step > LARGEST_STEP or not isinstance(state.get("data_fingerprint"), str):
        raise ValueError(f"{STATE} names no step or no data")
    if not isinstance(saved, dict) or not _is_optimizer(saved) or saved["adam_steps"] > step:
        raise ValueError(f"{STATE} describes no optimizer that this program saves")
    return state


def _is_optimizer(saved: dict) -> bool:
    elements, partitions, scaler = (saved.get(name) for name in ("group_elements", "group_partitions", "loss_scaler"))
    return (
        _is_count(saved.get("world_size"))
        and saved["world_size"] > 0
        and _is_count(saved.get("adam_steps"))
        and isinstance(elements, list)
        and isinstance(partitions, list)
        and len(elements) == len(partitions)
        and all(_is_count(size) for size in elements + partitions)
        and isinstance(scaler, dict)
        and scaler.keys() <= set(offload.SCALER_FIELDS)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in scaler.values())
    )


def _slice_reader(folder: Path, world_size: int, partitions: list[int]) -> offload.ReadSlice:
    tensors_of = cache(lambda rank: _tensors_in(folder / _state_file(rank, world_size)))

    def read(name: str, start: int, target: Tensor) -> None:
        partition = max(1, partitions[int(name.split(".")[1])])
        stop = start + len(target)
        for rank in range(start // partition, min(world_size, -(-stop // partition))):
            path, stored = folder / _state_file(rank, world_size), tensors_of(rank).get(name)
            low, high = max(start, rank * partition), min(stop, (rank + 1) * partition)
            if (
                stored is None
                or stored.dtype != torch.float32
                or len(stored.shape) != 1
                or stored.shape[0] < high - rank * partition
            ):
                raise ValueError(f"{path}: tensor {name} is not the float32 slice that rank {rank} saved")
            position = stored.position + 4 * (low - rank * partition)
            _read_into(path, position, torch.float32, target[low - start : high - start])

    return read


def _is_run(folder: Path) -> bool:
    return _checkpoints(TrainingConfig(run_dir=str(folder))).is_dir()


def _newest_of(run: Path) -> Path:
    found, _ = newest_verified(TrainingConfig(run_dir=str(run)))
    if found is None:
        raise ValueError(f"this run has no checkpoint yet; {MAKE_TEACHER}")
    return found.folder


def _stored_weights(config: TrainingConfig, folder: Path) -> Iterator[tuple[Path, str, Stored]]:
    """File, name and place of every tensor of the model, when they are all there and there is no other."""
    wanted, found = dict(tensor_shapes(config)), []
    for path in _weight_files(folder):
        for name, stored in _tensors_in(path).items():
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            if wanted.get(name) != stored.shape:
                needed = f"the model needs {wanted[name]}" if name in wanted else "the model has no such tensor"
                raise ValueError(f"{path}: tensor {_shown(name)} has shape {stored.shape}, {needed}")
            found.append((path, name, stored))
    missing = sorted(set(wanted) - {name for _, name, _ in found})
    if missing:
        raise ValueError(f"{folder}: tensor {missing[0]} is missing; the download or copy is not complete")
    yield from found


def _block_at(path: Path, position: int) -> memoryview:
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(HASH_BYTES, path.stat().st_size - position)))
        _read_all(file.fileno(), buffer, position)
    return buffer


def _refuse_other_architecture(config: TrainingConfig, folder: Path) -> None:
    theirs = _architecture(folder, _describe(folder))
    ours = {name: getattr(config, name) for name in theirs} | {"head_size": config.head_width}
    names = [name for name in theirs if theirs[name] != ours[name]]
    if names:
        listed = ", ".join(f"{name} ({theirs[name]!r} there, {ours[name]!r} here)" for name in names)
        raise ValueError(f"{folder} holds a model of another shape: {listed}")


def _describe(folder: Path) -> dict:
    try:
        return _read_json(folder / "config.json")
    except OSError as fault:
        raise ValueError(f"{folder} is no transformers model folder: {fault}") from None


def _architecture(folder: Path, description: dict) -> dict:
    try:
        return architecture_fields(description)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as fault:
        raise ValueError(f"{folder}/config.json describes no model: {fault}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    shards = _read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} names no weight_map; the download or copy is not complete")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not (folder / name).is_file():
            pickled = [path.name for path in sorted(folder.iterdir()) if path.name.endswith(CODE_ENDINGS[:-1])]
            instead = f"; {pickled[0]} may hold code and is never read: convert it to safetensors" if pickled else ""
            raise ValueError(f"{folder}: weights file {_shown(name)} is missing; only safetensors weights are read{instead}")
    return [folder / name for name in names]


def _tensors_in(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, whose header the library has found consistent."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header = _parse_json(file.read(num_bytes), str(path))
    except (SafetensorError, OSError, ValueError) as fault:
        raise ValueError(f"{path} is no readable safetensors file: {_one_line(fault)}") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in READABLE_DTYPES:
            raise ValueError(f"{path}: tensor {_shown(name)} is of {entry['dtype']}; floating-point weights are needed")
    return {
        name: Stored(READABLE_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + num_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_into(path: Path, position: int, dtype: torch.dtype, target: Tensor) -> None:
    """Fills the flat `target` (n,) from the file's elements of `dtype` at byte `position`, LOAD_THREADS pieces at a time."""
    pieces = target.split(PIECE_ELEMENTS)
    starts = range(position, position + len(target) * dtype.itemsize, PIECE_ELEMENTS * dtype.itemsize)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(LOAD_THREADS) as pool:
        list(pool.map(lambda piece, start: _read_piece(file.fileno(), start, dtype, piece), pieces, starts))


def _read_piece(descriptor: int, position: int, dtype: torch.dtype, piece: Tensor) -> None:
    if piece.dtype == dtype and piece.device.type == "cpu":
        _read_all(descriptor, _bytes_of(piece), position)
        return
    landing = torch.empty(len(piece), dtype=dtype)
    _read_all(descriptor, _bytes_of(landing), position)
    piece.copy_(landing)


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Streams the tensors block by block, hashing what it writes. safetensors' own writer copies all first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return _write_blocks(path, _pieces(struct.pack("<Q", len(text)) + text, tensors))


def _pieces(header: bytes, tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The file's bytes in pieces of at most HASH_BYTES; a tensor on the GPU is copied to the host piece by piece."""
    yield memoryview(header)
    for tensor in tensors.values():
        for piece in tensor.reshape(-1).split(HASH_BYTES // tensor.element_size()):
            yield _bytes_of(piece.cpu())


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _blocks(pieces: Iterator[memoryview]) -> Iterator[list[memoryview]]:
    """Regroups bytes into blocks of HASH_BYTES, the last one shorter, without a copy."""
    block, room = [], HASH_BYTES
    for piece in pieces:
        while len(piece):
            block.append(piece[:room])
            piece, room = piece[room:], room - len(block[-1])
            if not room:
                yield block
                block, room = [], HASH_BYTES
    if block:
        yield block


def _write_blocks(path: Path, pieces: Iterator[memoryview]) -> FileRecord:
    """Writes and fsyncs; blocks are hashed by HASH_THREADS threads meanwhile, and the disk is started early."""
    digests, waiting, num_bytes, started = [], deque(), 0, 0
    with ThreadPoolExecutor(HASH_THREADS) as pool, path.open("wb", buffering=0) as file:
        for block in _blocks(pieces):
            waiting.append(pool.submit(_sha256, block))
            for piece in block:
                _write_all(file.fileno(), piece)
                num_bytes += len(piece)
            if num_bytes - started >= WRITE_BACK_BYTES:
                os.posix_fadvise(file.fileno(), started, num_bytes - started, os.POSIX_FADV_DONTNEED)
                started = num_bytes
            if len(waiting) > 2 * HASH_THREADS:
                digests.append(waiting.popleft().result())
        os.fsync(file.fileno())
        digests += [each.result() for each in waiting]
    return FileRecord(num_bytes, digests)


def _sha256(block: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in block:
        digest.update(piece)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> FileRecord:
    draft = path.with_name(f".{path.name}.draft")
    try:
        record = _write_blocks(draft, iter((memoryview(text.encode()),)))
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return record


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_all(descriptor: int, target: memoryview, position: int) -> None:
    while target:
        num_bytes = os.preadv(descriptor, [target], position)
        if not num_bytes:
            raise OSError(errno.EIO, "the file ends early")
        target, position = target[num_bytes:], position + num_bytes


def _forget_pages(path: Path) -> None:
    """Drops the file from the page cache, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict:
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {LARGEST_JSON_BYTES} bytes")
    return _parse_json(path.read_bytes(), str(path))


def _parse_record(line: str, source: str) -> dict:
    record = _parse_json(line.encode(), source)
    if not isinstance(record.get("step"), int):
        raise ValueError(f"{source} names no step")
    return record


def _parse_json(content: bytes, source: str) -> dict:
    """A JSON object in which no name stands twice. NaN and Infinity are read, as Python writes them: a loss may be one."""
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{source} is not JSON: {_one_line(fault)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds no JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands in it twice")
    return value


def _shown(name: str) -> str:
    """A name from a file, for a line of text."""
    return name[:100] if name.isprintable() else repr(name[:100])


def _one_line(fault: BaseException) -> str:
    return (str(fault).splitlines() or [type(fault).__name__])[0]
