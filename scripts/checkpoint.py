"""The run directory's only author: metrics, save, verify, resume, export. A checkpoint is a folder that transformers opens.

Every checkpoint is written to a temporary folder, fsynced, listed with sha256 in training/manifest.json and renamed. Weights
and optimizer state are safetensors; every rank writes and reads its own slices of the state and none ever holds the whole.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scripts import offload
from scripts.config import TrainingConfig
from scripts.model import Decoder, architecture_fields, tensor_shapes, transformers_config

FORMAT = 1
MOVABLE_FIELDS = ("run_dir", "data_dir")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HASH_BYTES = 2**22
STATE = "training/state.json"
FOLDERS = "step-" + "[0-9]" * 8


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder and the contents of its training/state.json."""

    folder: Path
    state: dict


def config_record(config: TrainingConfig) -> dict:
    """The configuration as JSON holds it."""
    return json.loads(json.dumps(asdict(config)))


def refuse_other_run(config: TrainingConfig) -> None:
    """Raises ValueError, with the fields that differ, when run_dir holds a run of another configuration."""
    path = Path(config.run_dir) / "config.json"
    if not path.exists():
        return
    ours, theirs = config_record(config), _read_json(path)
    names = [name for name in {**ours, **theirs} if name not in MOVABLE_FIELDS and ours.get(name) != theirs.get(name)]
    if names:
        listed = ", ".join(f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)" for name in names)
        raise ValueError(
            f"run_dir={config.run_dir!r} holds a run of a different configuration: {listed}; choose another run_dir"
        )


def claim_run(config: TrainingConfig) -> None:
    """Creates run_dir and its config.json; clears away checkpoints that a killed process left half-written."""
    folder = Path(config.run_dir)
    _checkpoints(config).mkdir(parents=True, exist_ok=True)
    for draft in _checkpoints(config).glob(".step-*.draft"):
        shutil.rmtree(draft)
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


def append_metrics(config: TrainingConfig, record: dict) -> None:
    """Adds one line to metrics.jsonl."""
    with metrics_path(config).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(config: TrainingConfig) -> list[dict]:
    """Every whole line of metrics.jsonl."""
    path = metrics_path(config)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_metrics(config: TrainingConfig, step: int) -> None:
    """Drops every line after `step`, and a half-written last one, so that a resumed run logs each step once."""
    kept = [record for record in read_metrics(config) if record["step"] <= step]
    _write_text(metrics_path(config), "".join(json.dumps(record) + "\n" for record in kept))


def save(engine, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int, progress: dict) -> Path:
    """Writes the checkpoint after `progress["step"]` steps and returns its folder. Every rank must call this.

    Args:
        progress: what state.json remembers beside the optimizer: at least `step`, and the fingerprint of the data.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder = _checkpoints(config) / f"step-{progress['step']:08d}"
    draft = folder.with_name(f".{folder.name}.draft")
    if rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "training").mkdir(parents=True)
    torch.distributed.barrier()
    own = _state_file(rank, world_size)
    digests = {own: _write_safetensors(draft / own, offload.optimizer_tensors(engine))}
    if rank == 0:
        digests |= _write_model(draft, engine.module, config, tokenizer_json, end_of_text_id)
        digests |= _write_state(draft, engine, config, progress, world_size)
    gathered = _gather_digests(digests, rank, world_size)
    if rank == 0:
        _write_text(draft / "training" / "manifest.json", json.dumps({"format": FORMAT, "sha256": gathered}, indent=2) + "\n")
        _publish(draft, folder)
        _prune(config)
    torch.distributed.barrier()
    return folder


def newest_verified(config: TrainingConfig) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte matches its manifest, and a line for each newer one that does not.

    Raises:
        ValueError: there are checkpoints and none of them verifies.
    """
    faults = []
    for folder in sorted(_checkpoints(config).glob(FOLDERS), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return Checkpoint(folder, _read_json(folder / STATE)), faults
        faults.append(f"checkpoint {folder} does not verify: {fault}")
    if faults:
        raise ValueError(f"{faults[0]}; no checkpoint in it verifies: restore that file, or choose another run_dir")
    return None, []


def newest_folder(config: TrainingConfig) -> Path | None:
    """The newest checkpoint's folder, verified or not."""
    return max(_checkpoints(config).glob(FOLDERS), default=None)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every file matches the manifest."""
    try:
        recorded = _read_json(folder / "training" / "manifest.json")["sha256"]
    except (OSError, ValueError, KeyError):
        return "training/manifest.json is missing or unreadable"
    if not isinstance(recorded, dict) or not {"model.safetensors", "config.json", STATE} <= recorded.keys():
        return "training/manifest.json was changed after it was saved"
    if (folder / "model.safetensors.index.json").exists():
        return "model.safetensors.index.json was added after it was saved"
    for name in sorted(recorded):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != recorded[name]:
            return f"{name} was changed after it was saved"
    return None


def described_config(folder: Path) -> TrainingConfig:
    """A configuration whose model is the one that a transformers folder describes, in the folder's own dtype.

    Raises:
        ValueError: the folder is none of transformers', or its model no plain Llama or Qwen3.
    """
    description = _describe(folder)
    context = int(description.get("max_position_embeddings") or TrainingConfig.context_length)
    dtype = description.get("torch_dtype") or description.get("dtype")
    return TrainingConfig(
        **architecture_fields(description),
        context_length=context,
        micro_batch_rows=1,
        tokens_per_step=context,
        eval_tokens=context,
        precision={"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype), "fp32"),
    )


def load_weights(model: Decoder, folder: Path) -> None:
    """Copies a transformers folder's safetensors weights, sharded or not, into `model`, one tensor at a time.

    Raises:
        ValueError: the folder is no plain Llama or Qwen3 of this shape, or a tensor is missing, extra or misshapen.
    """
    _refuse_other_architecture(model.config, folder)
    wanted, targets = dict(tensor_shapes(model.config)), dict(model.named_parameters())
    missing = set(wanted)
    for path in _weight_files(folder):
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name == "lm_head.weight" and model.config.tie_embeddings:
                    continue
                shape = tuple(file.get_slice(name).get_shape())
                if wanted.get(name) != shape:
                    raise ValueError(f"{path}: tensor {name} has shape {shape}, the model needs {wanted.get(name)}")
                with torch.no_grad():
                    targets[name].copy_(file.get_tensor(name))
                missing.discard(name)
    if missing:
        raise ValueError(f"{folder}: tensor {sorted(missing)[0]} is missing; the download or copy is not complete")


def load_state(engine, checkpoint: Checkpoint) -> None:
    """Restores the optimizer from any number of ranks' files onto this one's ranks; the weights come by `load_weights`.

    Raises:
        ValueError: the saved groups are not this model's.
    """
    saved = checkpoint.state["optimizer"]
    sizes = [part.num_elements for part in offload.partitions(engine)]
    if saved["group_elements"] != sizes:
        raise ValueError(f"{checkpoint.folder}: optimizer groups of {saved['group_elements']} elements do not fit {sizes}")
    read = _slice_reader(checkpoint.folder, saved["world_size"], saved["group_partitions"])
    offload.load_optimizer(engine, read, saved["adam_steps"], saved["loss_scaler"])


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _checkpoints(config: TrainingConfig) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _state_file(rank: int, world_size: int) -> str:
    return f"training/optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def _write_model(
    draft: Path, model: Decoder, config: TrainingConfig, tokenizer_json: str, end_of_text_id: int
) -> dict[str, str]:
    texts = {
        "config.json": transformers_config(config, end_of_text_id),
        "generation_config.json": {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id},
        "tokenizer_config.json": _tokenizer_config(config, tokenizer_json, end_of_text_id),
    }
    digests = {name: _write_text(draft / name, json.dumps(value, indent=2) + "\n") for name, value in texts.items()}
    digests["tokenizer.json"] = _write_text(draft / "tokenizer.json", tokenizer_json)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    digests["model.safetensors"] = _write_safetensors(draft / "model.safetensors", weights)
    return digests


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


def _write_state(draft: Path, engine, config: TrainingConfig, progress: dict, world_size: int) -> dict[str, str]:
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


def _gather_digests(digests: dict[str, str], rank: int, world_size: int) -> dict[str, str]:
    own = bytes.fromhex(digests[_state_file(rank, world_size)])
    tensor = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(_collective_device())
    others = [torch.empty_like(tensor) for _ in range(world_size)]
    torch.distributed.all_gather(others, tensor)
    return digests | {_state_file(other, world_size): bytes(row.tolist()).hex() for other, row in enumerate(others)}


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _publish(draft: Path, folder: Path) -> None:
    for inner in (draft / "training", draft):
        _sync_folder(inner)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    _sync_folder(folder.parent)


def _prune(config: TrainingConfig) -> None:
    for folder in sorted(_checkpoints(config).glob(FOLDERS))[: -config.keep_checkpoints]:
        shutil.rmtree(folder)


def _slice_reader(folder: Path, world_size: int, partitions: list[int]) -> offload.ReadSlice:
    def read(name: str, start: int, stop: int) -> Tensor:
        partition = max(1, partitions[int(name.split(".")[1])])
        pieces = []
        for rank in range(start // partition, min(world_size, -(-stop // partition))):
            offset = rank * partition
            with _open_safetensors(folder / _state_file(rank, world_size)) as file:
                pieces.append(file.get_slice(name)[max(0, start - offset) : min(partition, stop - offset)])
        return torch.cat(pieces) if pieces else torch.empty(0)

    return read


def _refuse_other_architecture(config: TrainingConfig, folder: Path) -> None:
    theirs = architecture_fields(_describe(folder))
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


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    shards = _read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} names no weight_map; the download or copy is not complete")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder}: weights file {name} is missing; only safetensors weights are read")
    return [folder / name for name in names]


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as fault:
        raise ValueError(f"{path} is no readable safetensors file: {fault}") from None


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Streams one tensor at a time, hashing what it writes; returns the sha256. safetensors' own writer copies all first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return _write_pieces(path, _pieces(struct.pack("<Q", len(text)) + text, tensors))


def _pieces(header: bytes, tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors.values():
        if tensor.numel():
            yield memoryview(tensor.cpu().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _write_text(path: Path, text: str) -> str:
    draft = path.with_name(f".{path.name}.draft")
    digest = _write_pieces(draft, iter((memoryview(text.encode()),)))
    draft.rename(path)
    return digest


def _write_pieces(path: Path, pieces: Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), HASH_BYTES):
                digest.update(piece[start : start + HASH_BYTES])
                file.write(piece[start : start + HASH_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise ValueError(f"{path} is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
