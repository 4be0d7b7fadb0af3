"""Checkpoints: save, verify, resume. A checkpoint is a folder that transformers opens.

A checkpoint is written to a temporary folder, fsynced, listed in training/manifest.json with the sha256 of each block of
HASH_BYTES, and renamed. Training goes on while it is read back from the disk; until then older checkpoints are left alone.
Weights and optimizer state are safetensors; every rank writes and reads its own slices of the state, none holds the whole.
"""

import errno
import json
import math
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ds.shards import sync_folder
from scripts.config import GIB, VERIFY_THREADS, TrainingConfig
from scripts.engine import offload
from scripts.engine.distributed import gather, gather_numbers, together
from scripts.model.decoder import Decoder
from scripts.model.huggingface import (
    CODE_ENDINGS,
    first_id,
    model_card,
    read_into,
    read_json,
    tensors_in,
    tokenizer_config,
    transformers_config,
)
from scripts.plan.footprint import checkpoint_bytes
from scripts.run.metrics import best_step, evaluations, sync_metrics
from scripts.run.run_dir import (
    FOLDERS,
    checkpoint_folders,
    checkpoints_dir,
    config_record,
    link_best,
    metrics_path,
    read_metrics,
)
from scripts.run.state import decay_start
from scripts.run.storage import DIGEST_BYTES, HASH_BYTES, FileRecord, find_changed, forget_pages, write_safetensors, write_text

FORMAT = 2
TEXTS_BYTES = 2**20
LARGEST_STEP = 10**8 - 1
MANIFEST = "training/manifest.json"
STATE = "training/state.json"
# Not in the manifest: a person may write into it.
CARD = "README.md"


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder and the contents of its training/state.json."""

    folder: Path
    state: dict


class Newest(NamedTuple):
    """The newest checkpoint that verifies, None without any; and a line about each newer one that does not."""

    checkpoint: Checkpoint | None
    faults: list[str]


class Saved(NamedTuple):
    """The folder that `save` wrote, of at most `num_bytes`, or in `fault` why it could not; in `proof` a thread reads this
    rank's files back.
    """

    folder: Path
    num_bytes: int
    fault: str | None
    proof: Future | None


class Verified(NamedTuple):
    """Whether a checkpoint reads back as written, and what is wrong with it, or with an older one that cannot be deleted."""

    good: bool
    words: str | None


def save(engine, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int, progress: dict) -> Saved:
    """Writes the checkpoint after `progress["step"]` steps and begins to read it back. Every rank must call this.

    `progress` is what state.json holds beside the optimizer: at least `step`, and the fingerprint of the data. When a disk is
    full or fails on any rank, every rank gets the words in `fault`, and the older checkpoints stay. Memory beside the
    engine's: a few blocks of HASH_BYTES, on the GPU as on the host, for any size of tensor.
    """
    rank = torch.distributed.get_rank()
    folder = checkpoints_dir(config) / f"step-{progress['step']:08d}"
    draft = folder.with_name(f".{folder.name}.draft")
    num_bytes, texts = save_num_bytes(config, tokenizer_json), model_texts(config, tokenizer_json, end_of_text_id)
    try:
        together(lambda: _begin_draft(draft, num_bytes) if rank == 0 else None)
        together(lambda: sync_metrics(config) if rank == 0 else None)
        records = together(lambda: _write_files(draft, engine, config, texts, progress))
        gathered = _gather_records(records)
        together(lambda: publish(draft, folder, gathered) if rank == 0 else None)
    except OSError as fault:
        words = _give_up(config, folder, draft, num_bytes, fault) if rank == 0 else fault.strerror
        return Saved(folder, num_bytes, words, None)
    reader = ThreadPoolExecutor(1)
    proof = reader.submit(read_back, folder, records)
    reader.shutdown(wait=False)
    return Saved(folder, num_bytes, None, proof)


def verify_saved(config: TrainingConfig, saved: Saved) -> Verified:
    """Waits until every rank has read its files of `saved` back from the disk. Every rank must call this before the next save.

    Then `prune` deletes older ones. A checkpoint that reads back otherwise than it was written is deleted instead, and older
    ones stay.
    """
    rank, step, proof = torch.distributed.get_rank(), int(saved.folder.name[-8:]), saved.proof
    if proof is None:
        return Verified(False, None)
    try:
        together(proof.result)
    except OSError as fault:
        good = _still_good(config, saved.folder) if rank == 0 else ""
        together(lambda: delete(saved.folder) if rank == 0 else None)
        return Verified(False, f"{saved.folder} was not saved: {fault.strerror}; {good}; the next save tries again")
    try:
        together(lambda: prune(config, step) if rank == 0 else None)
    except OSError as fault:
        words = "older checkpoints could not be deleted, or `best` not be linked"
        return Verified(True, f"{saved.folder} is saved, but beside it {words}: {fault.strerror}")
    return Verified(True, None)


def room_for(saved: Saved) -> int:
    """Bytes that are free on the disk where `saved` was to be."""
    return shutil.disk_usage(next(folder for folder in saved.folder.parents if folder.exists())).free


def newest_verified(config: TrainingConfig, last_step: int | None = None) -> Newest:
    """The newest checkpoint whose every byte matches its manifest, of those after at most `last_step` steps, if that is given.

    Raises ValueError when there are checkpoints and none verifies, or metrics.jsonl tells of one and none is left.
    """
    faults, folders = [], checkpoint_folders(config)
    early = {at: folder for at, folder in folders.items() if last_step is None or at <= last_step}
    if folders and not early:
        raise ValueError(
            f"{checkpoints_dir(config)} holds no checkpoint from before its decay, which began after step {last_step}: choose"
            " another run_dir for more steps"
        )
    for _, folder in sorted(early.items(), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return Newest(Checkpoint(folder, read_state(folder)), faults)
        faults.append(f"checkpoint {folder} does not verify: {fault}")
    if faults:
        raise ValueError(f"{faults[0]}; no checkpoint in it verifies: restore that file, or choose another run_dir")
    saved = [record["step"] for record in read_metrics(config) if record.get("event") == "saved"]
    if saved:
        raise ValueError(
            f"{checkpoints_dir(config)} holds no checkpoint, and {metrics_path(config)} says that one was saved at step"
            f" {max(saved)}: put the checkpoints back, or choose another run_dir"
        )
    return Newest(None, [])


def verified_folder(config: TrainingConfig) -> Path | None:
    """The newest checkpoint that verifies, for use after training. A line on standard error names each newer one that does not.

    Raises ValueError as `newest_verified`.
    """
    found, faults = newest_verified(config)
    for fault in faults:
        print(f"{fault}; taking an older one", file=sys.stderr, flush=True)
    return None if found is None else found.folder


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every file matches the manifest.

    A file that was not saved is a fault where other programs would load it as weights: it may hold code. VERIFY_THREADS
    threads read the files; each holds one block of HASH_BYTES in memory.
    """
    try:
        records = read_manifest(folder)
        present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
        added = (name for name in present if name not in records and name.lower().endswith(CODE_ENDINGS))
        fault = next((f"{name} was added after it was saved" for name in added), None)
        fault = fault or find_changed(folder, records, VERIFY_THREADS)
        if fault is None:
            num_ranks = read_state(folder)["optimizer"]["world_size"]
            names = (state_file(rank, num_ranks) for rank in range(num_ranks))
            fault = next((f"{name} is missing" for name in names if name not in records), None)
    except (OSError, ValueError) as problem:
        return str(problem)
    return fault


def load_state(engine, checkpoint: Checkpoint) -> None:
    """Restores the optimizer from files of any number of ranks; the weights come by `load_weights`.

    Extra memory: none on the host; OPTIMIZER_CHUNK_ELEMENTS float32 for an optimizer on the GPU. Raises ValueError when the
    saved groups are not this model's, or a file of them is not what a rank writes.
    """
    saved = checkpoint.state["optimizer"]
    sizes = [part.num_elements for part in offload.partitions(engine)]
    if saved["group_elements"] != sizes:
        raise ValueError(f"{checkpoint.folder}: optimizer groups of {saved['group_elements']} elements do not fit {sizes}")
    read = slice_reader(checkpoint.folder, saved["world_size"], saved["group_partitions"])
    offload.load_optimizer(engine, read, saved["adam_steps"], saved["loss_scaler"])


def save_num_bytes(config: TrainingConfig, tokenizer_json: str) -> int:
    """Bytes on the disk that a checkpoint takes at most: tensors, texts and digests."""
    tensors = checkpoint_bytes(config)
    return tensors + len(tokenizer_json.encode()) + TEXTS_BYTES + tensors // HASH_BYTES * 3 * DIGEST_BYTES


def write_model(folder: Path, model: Decoder, texts: dict[str, str]) -> dict[str, FileRecord]:
    """Writes what transformers opens: the files `texts` and the weights, in the dtype that they have."""
    records = {name: write_text(folder / name, text) for name, text in texts.items()}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return records | {"model.safetensors": write_safetensors(folder / "model.safetensors", weights)}


def model_texts(config: TrainingConfig, tokenizer_json: str, end_of_text_id: int) -> dict[str, str]:
    """The text files of a transformers folder, by name."""
    first = {"bos_token_id": first_id(tokenizer_json, end_of_text_id)}
    described = {
        "config.json": transformers_config(config, end_of_text_id) | first,
        "generation_config.json": first | {"eos_token_id": end_of_text_id},
        "tokenizer_config.json": tokenizer_config(config, tokenizer_json, end_of_text_id),
    }
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in described.items()}
    return texts | {"tokenizer.json": tokenizer_json}


def publish(draft: Path, folder: Path, records: dict[str, FileRecord]) -> None:
    """Lists the files of a draft in its manifest and renames it to `folder`. A checkpoint of that name is replaced at once."""
    files = {name: {"bytes": record.num_bytes, "sha256": record.digests} for name, record in sorted(records.items())}
    write_text(draft / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    for inner in (draft / "training", draft):
        sync_folder(inner)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        delete(replaced)
        folder.rename(replaced)
    try:
        draft.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync_folder(folder.parent)
    delete(replaced)


def prune(config: TrainingConfig, step: int) -> None:
    """Deletes old checkpoints: of those up to `step` all but the newest `keep_checkpoints`, the one with the best held-out
    loss, which `best` then names, and the one before a decay. The one at `step` always stays.

    Faulty ones of steps that training has made again are deleted too.
    """
    kept = {best_step(config), decay_start(config)}
    for aside in checkpoints_dir(config).glob(f"{FOLDERS}.faulty"):
        if int(aside.name[5:13]) <= step:
            shutil.rmtree(aside)
    older = [at for at in sorted(checkpoint_folders(config)) if at < step]
    for at in older[: max(0, len(older) + 1 - config.keep_checkpoints)]:
        if at not in kept:
            delete(checkpoint_folders(config)[at])
    link_best(config, best_step(config))


def state_file(rank: int, world_size: int) -> str:
    """The name, inside a checkpoint, of a rank's file of optimizer state."""
    return f"training/optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def slice_reader(folder: Path, world_size: int, partitions: list[int]) -> offload.ReadSlice:
    """Reads slices of whole optimizer tensors, of which each of `world_size` ranks has saved `partitions[group]` elements."""
    tensors_of = cache(lambda rank: tensors_in(folder / state_file(rank, world_size)))

    def read(name: str, start: int, target: Tensor) -> None:
        partition = max(1, partitions[int(name.split(".")[1])])
        stop = start + len(target)
        for rank in range(start // partition, min(world_size, -(-stop // partition))):
            path, stored, first = folder / state_file(rank, world_size), tensors_of(rank).get(name), rank * partition
            low, high = max(start, first), min(stop, first + partition)
            dtype, size = target.dtype, target.itemsize
            if stored is None or stored.dtype != dtype or len(stored.shape) != 1 or stored.shape[0] < high - first:
                raise ValueError(f"{path}: tensor {name} is not the {dtype} slice that rank {rank} saved")
            read_into(path, stored.position + size * (low - first), dtype, target[low - start : high - start])

    return read


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """A checkpoint's files as its manifest lists them; ValueError when it is missing, of another format or changed."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        raise ValueError(f"{MANIFEST} is missing or unreadable") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest.get('format')!r:.40}, and format {FORMAT} is read")
    files, needed = manifest.get("files"), {"model.safetensors", "config.json", STATE}
    if not (isinstance(files, dict) and needed <= files.keys() and all(_is_record(*entry) for entry in files.items())):
        raise ValueError(f"{MANIFEST} was changed after it was saved")
    return {name: FileRecord(value["bytes"], value["sha256"]) for name, value in files.items()}


def read_state(folder: Path) -> dict:
    """The contents of training/state.json; ValueError when it does not hold what `load_state` needs."""
    state = read_json(folder / STATE)
    step, saved = state.get("step"), state.get("optimizer")
    if not _is_count(step) or step > LARGEST_STEP or not isinstance(state.get("data_fingerprint"), str):
        raise ValueError(f"{STATE} names no step or no data")
    if not isinstance(saved, dict) or not _is_optimizer(saved) or saved["adam_steps"] > step:
        raise ValueError(f"{STATE} describes no optimizer that this program saves")
    return state


def _begin_draft(draft: Path, num_bytes: int) -> None:
    draft.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    if shutil.disk_usage(draft.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (draft / "training").mkdir(parents=True)


def _write_files(draft: Path, engine, config: TrainingConfig, texts: dict[str, str], progress: dict) -> dict[str, FileRecord]:
    """This rank's files: its slices of the optimizer state, on rank 0 everything else too."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = state_file(rank, world_size)
    records = {own: write_safetensors(draft / own, offload.optimizer_tensors(engine))}
    if rank != 0:
        return records
    parts = offload.partitions(engine)
    optimizer = {
        "world_size": world_size,
        "group_elements": [part.num_elements for part in parts],
        "group_partitions": [part.stop - part.start for part in parts],
        "adam_steps": offload.adam_steps(engine),
        "loss_scaler": offload.loss_scaler_state(engine),
    }
    state = {**progress, "format": FORMAT, "config": config_record(config), "optimizer": optimizer}
    write_text(draft / CARD, model_card(config, progress["step"], next(reversed(evaluations(config)), None)))
    records |= write_model(draft, engine.module, texts)
    return records | {STATE: write_text(draft / STATE, json.dumps(state, indent=2) + "\n")}


def read_back(folder: Path, records: dict[str, FileRecord]) -> None:
    """Reads this rank's files from the disk itself, on one thread, to leave the processor to the training."""
    for name in records:
        forget_pages(folder / name)
    if find_changed(folder, records, 1) is not None:
        raise OSError(errno.EBADMSG, "the disk returns other bytes than were written")


def _give_up(config: TrainingConfig, folder: Path, draft: Path, num_bytes: int, fault: OSError) -> str:
    """Removes the draft; the line that tells what happened, what is needed and what is still good."""
    shutil.rmtree(draft, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
    return (
        f"{folder} was not saved: {fault.strerror}; it needs {num_bytes / GIB:.3f} GiB and {free / GIB:.3f} GiB are free;"
        f" {_still_good(config, folder)}; the next save tries again"
    )


def _still_good(config: TrainingConfig, folder: Path) -> str:
    older = sorted(checkpoint_folders(config).items(), reverse=True)
    good = next((path for step, path in older if step < int(folder.name[-8:]) and find_fault(path) is None), None)
    return f"{good} is still good" if good else "there is no checkpoint before it"


def _gather_records(records: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """`records` and every rank's of its optimizer file, as tensors: lengths first, then digests padded to the most blocks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own, gathered = records[state_file(rank, world_size)], dict(records)
    lengths = gather_numbers(own.num_bytes)
    digests = torch.zeros(-(-max(lengths) // HASH_BYTES), DIGEST_BYTES, dtype=torch.uint8)
    digests[: len(own.digests)] = torch.tensor([list(bytes.fromhex(digest)) for digest in own.digests], dtype=torch.uint8)
    for other, (length, rows) in enumerate(zip(lengths, gather(digests), strict=True)):
        words = [bytes(row).hex() for row in rows[: -(-length // HASH_BYTES)].tolist()]
        gathered[state_file(other, world_size)] = FileRecord(length, words)
    return gathered


def delete(folder: Path) -> None:
    """Deletes a checkpoint; killed in the middle, it leaves a draft and no half checkpoint."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.doomed.draft")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _is_record(name: str, value) -> bool:
    path, entry = PurePosixPath(name), value if isinstance(value, dict) else {}
    num_bytes, digests = entry.get("bytes"), entry.get("sha256")
    if path.is_absolute() or ".." in path.parts or "\0" in name or not _is_count(num_bytes) or not isinstance(digests, list):
        return False
    return len(digests) == -(-num_bytes // HASH_BYTES) and all(isinstance(digest, str) for digest in digests)


def _is_count(value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_optimizer(saved: dict) -> bool:
    elements, partitions, scaler = (saved.get(name) for name in ("group_elements", "group_partitions", "loss_scaler"))
    if not (isinstance(elements, list) and isinstance(partitions, list) and isinstance(scaler, dict)):
        return False
    counts = [saved.get("world_size"), saved.get("adam_steps"), *elements, *partitions]
    if not all(map(_is_count, counts)) or saved["world_size"] == 0 or len(elements) != len(partitions):
        return False
    is_known = scaler.keys() <= set(offload.SCALER_FIELDS)
    return is_known and all(isinstance(number, int | float) and math.isfinite(number) for number in scaler.values())
