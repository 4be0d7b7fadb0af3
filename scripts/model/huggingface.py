"""Transformers' format: config.json, names of tensors, safetensors weights read into a decoder. Writes nothing.

A transformers folder's config.json has transformers' names; a run folder's has the fields of TrainingConfig. What a file from
elsewhere can get wrong is refused here in one line.
"""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds.files import one_line
from scripts.config import LOAD_PIECE_ELEMENTS, LOAD_THREADS, MAKE_TEACHER, PRETRAIN, TrainingConfig
from scripts.model.decoder import Decoder

SHAPE_FIELDS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "mlp_size", "qk_norm",
    "tie_embeddings",
)  # fmt: skip
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
READABLE_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()} | {"F64": torch.float64}
LARGEST_JSON_BYTES = 2**26
LARGEST_TEMPLATE_BYTES = 2**18
CODE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", "model.safetensors.index.json")

CARD = """---
{licence}library_name: transformers
pipeline_tag: text-generation
tags:
- tightfit
---

# {name}

A base model: it continues text, and was not trained to follow instructions. Chat template: {template}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("def", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))
```

`training/` holds the state from which the training continues. Nothing else needs it, and it may be left out of a copy.
"""


class Stored(NamedTuple):
    """A tensor in a safetensors file: the file, the tensor's dtype and shape, and the byte at which it starts."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int


def transformers_config(config: TrainingConfig, end_of_text_id: int) -> dict:
    """The contents of transformers' config.json for this architecture."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    return {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_width, "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.context_length, "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta, **_rope_description(config), "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }  # fmt: skip


def tokenizer_config(config: TrainingConfig, tokenizer_json: str, end_of_text_id: int) -> dict:
    """The contents of transformers' tokenizer_config.json for the tokenizer that `tokenizer_json` describes."""
    content, template = (
        {token["id"]: token["content"] for token in json.loads(tokenizer_json)["added_tokens"]},
        chat_template(config),
    )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": content[first_id(tokenizer_json, end_of_text_id)],
        "eos_token": content[end_of_text_id], "clean_up_tokenization_spaces": False, "model_max_length": config.context_length,
    } | ({} if template is None else {"chat_template": template})  # fmt: skip


def chat_template(config: TrainingConfig) -> str | None:
    """The chat template that comes with what the model began with, learns from, or has its tokenizer from; None without any
    that can be read.
    """
    for name in filter(None, (config.init_from, config.teacher_dir, config.tokenizer_path)):
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        written, described = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if written.is_file() and written.stat().st_size <= LARGEST_TEMPLATE_BYTES:
            return written.read_text(errors="replace")
        try:
            found = read_json(described).get("chat_template") if described.is_file() else None
        except (OSError, ValueError):
            continue
        if isinstance(found, str) and len(found.encode()) <= LARGEST_TEMPLATE_BYTES:
            return found
    return None


def model_card(config: TrainingConfig, step: int, held_out: dict | None) -> str:
    """A checkpoint's README.md, as hubs read it: what the model is, what it was trained on and how to load it. `held_out` is
    the record of its last evaluation, if there was any.
    """
    kind, tokens = "Qwen3" if config.qk_norm else "Llama", config.tokens_before(step)
    licence = f"license: {json.dumps(config.model_license)}\n" if config.model_license else ""
    loss, (nats, bits) = "not evaluated", ((held_out or {}).get(name) for name in ("val_loss", "val_bits_per_byte"))
    if held_out is not None and isinstance(nats, float) and isinstance(bits, float):
        loss = f"{nats:.4f} nats per token, {bits:.4f} bits per byte (after {held_out['step']:,} steps)"
    told = {
        "Model": f"{kind}, {config.num_parameters:,} parameters, {config.num_layers} blocks of width {config.hidden_size}",
        "Context": f"{config.context_length:,} tokens of a vocabulary of {config.vocab_size:,}",
        "Trained on": ", ".join(f"`{name}`" for name in config.corpus),
        "Tokens read": f"{tokens:,} in {step:,} of {config.num_steps:,} steps",
        "Began with": config.init_from and f"`{config.init_from}`",
        "Teacher": config.teacher_dir and f"`{config.teacher_dir}`",
        "Held-out loss": loss,
        "Licence": config.model_license or "not stated: `model_license` in the configuration names one",
    }
    template = "it has none" if chat_template(config) is None else "that of its teacher or its tokenizer is kept"
    rows = "\n".join(f"| {name} | {text} |" for name, text in told.items() if text)
    return CARD.format(licence=licence, name=Path(config.run_dir).name, rows=rows, template=template, dtype=config.precision)


def first_id(tokenizer_json: str, end_of_text_id: int) -> int:
    """What stands before the text of each document: the begin of text of `tokenizer_json`, without one the end of text."""
    template = json.loads(tokenizer_json)["post_processor"] or {"single": [{}]}
    token = template["single"][0].get("SpecialToken")
    return template["special_tokens"][token["id"]]["ids"][0] if token else end_of_text_id


def architecture_fields(description: dict) -> dict:
    """The TrainingConfig fields that a transformers config.json describes.

    Raises:
        ValueError: the model is not a Llama or Qwen3 that this decoder computes exactly.
    """
    kind = description.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f'model_type={kind!r} is not supported; "llama" and "qwen3" are')
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(description.get(name), int):
            raise ValueError(f"config.json names no {name}; the download or copy is not complete")
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    scaling = _rope_scaling(description, rope)
    heads = description["num_attention_heads"]
    return {
        "vocab_size": description["vocab_size"],
        "hidden_size": description["hidden_size"],
        "num_layers": description["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": description.get("num_key_value_heads") or heads,
        "head_size": description.get("head_dim") or description["hidden_size"] // heads,
        "mlp_size": description["intermediate_size"],
        "qk_norm": kind == "qwen3",
        "tie_embeddings": bool(description.get("tie_word_embeddings", False)),
        "rope_theta": float(description.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        "rope_scaling": scaling,
        "norm_eps": float(description.get("rms_norm_eps", 1e-6)),
    }


def describe(folder: Path) -> dict:
    """The config.json of a transformers folder. Raises ValueError where it is not there or is no JSON object."""
    try:
        return read_json(folder / "config.json")
    except OSError as fault:
        raise ValueError(f"{folder} is no transformers model folder: {fault}") from None


def architecture(folder: Path, description: dict) -> dict:
    """`architecture_fields` of the config.json of `folder`. Raises ValueError also where a value is of a wrong type."""
    try:
        return architecture_fields(description)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as fault:
        raise ValueError(f"{folder}/config.json describes no model: {fault}") from None


def described_config(folder: Path) -> TrainingConfig:
    """A configuration whose model is the one that a transformers folder describes, in the folder's own dtype.

    Raises:
        ValueError: it is no transformers folder, holds no plain Llama or Qwen3, or describes more than its weights files hold.
    """
    description = describe(folder)
    context = description.get("max_position_embeddings") or TrainingConfig.context_length
    dtype = description.get("torch_dtype") or description.get("dtype")
    config = TrainingConfig(
        **architecture(folder, description), context_length=context, micro_batch_rows=1, tokens_per_step=context,
        eval_tokens=context, precision={"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype), "fp32"),
    )  # fmt: skip
    num_bytes = sum(path.stat().st_size for path in weight_files(folder))
    if 2 * config.num_parameters > num_bytes:
        raise ValueError(f"{folder} describes {config.num_parameters} parameters and holds {num_bytes} bytes of weights")
    return config


def teacher_config(config: TrainingConfig) -> TrainingConfig | None:
    """A configuration with the teacher's shape and the student's micro-batch, from the config.json in `teacher_dir`, which is a
    run or a transformers folder. None without a `teacher_dir`; PRETRAIN's shape for PRETRAIN's run before it has begun.

    Raises:
        ValueError: the file cannot be read, or it describes no model that this decoder computes.
    """
    if config.teacher_dir is None:
        return None
    path = Path(config.teacher_dir) / "config.json"
    try:
        is_planned = config.teacher_dir == PRETRAIN.run_dir and not path.exists()
        return _with_shape_of(None if is_planned else path.read_bytes(), config)
    except FileNotFoundError:
        raise ValueError(f"teacher_dir={config.teacher_dir!r}: {path} is not there; {MAKE_TEACHER}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as fault:
        raise ValueError(
            f"teacher_dir={config.teacher_dir!r}: {path} describes no model: {fault!r}; name a run or a transformers folder"
        ) from None


def load_weights(model: Decoder, folder: Path) -> None:
    """Copies a transformers folder's safetensors weights, sharded or not, into `model`.

    Memory beside the model's: none where the dtypes agree on the host, else LOAD_THREADS pieces of LOAD_PIECE_ELEMENTS. Files
    are read, not mapped, so that a failing disk is an error and does not end the process. Every tensor's name and shape are
    checked before the first is read.

    Raises:
        ValueError: the folder is no plain Llama or Qwen3 of this shape, or a tensor is missing, extra or misshapen.
    """
    theirs = architecture(folder, describe(folder))
    ours = {name: getattr(model.config, name) for name in theirs} | {"head_size": model.config.head_width}
    names = [name for name in theirs if theirs[name] != ours[name]]
    if names:
        listed = ", ".join(f"{name} ({theirs[name]!r} there, {ours[name]!r} here)" for name in names)
        raise ValueError(f"{folder} holds a model of another shape: {listed}")
    targets = dict(model.named_parameters())
    for name, stored in stored_weights(model.config, folder).items():
        read_into(stored.path, stored.position, stored.dtype, targets[name].detach().view(-1))


def tensor_shapes(config: TrainingConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a weights file of this model holds."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).named_parameters()}


def stored_weights(config: TrainingConfig, folder: Path) -> dict[str, Stored]:
    """Where each tensor of the model lies in a transformers folder, by name.

    Raises:
        ValueError: a file is missing or unreadable, or a tensor is missing, extra or misshapen.
    """
    wanted, found = tensor_shapes(config), {}
    for path in weight_files(folder):
        for name, stored in tensors_in(path).items():
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            if wanted.get(name) != stored.shape:
                needed = f"the model needs {wanted[name]}" if name in wanted else "the model has no such tensor"
                raise ValueError(f"{path}: tensor {_shown(name)} has shape {stored.shape}, {needed}")
            found[name] = stored
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing; the download or copy is not complete")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder: model.safetensors, or those that its index names. Raises ValueError where
    the index is not valid or a file is missing.
    """
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} names no weight_map; the download or copy is not complete")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not (folder / name).is_file():
            pickled = [path.name for path in sorted(folder.iterdir()) if path.name.endswith(CODE_ENDINGS[:-1])]
            instead = f"; {pickled[0]} may hold code and is never read: convert it to safetensors" if pickled else ""
            raise ValueError(f"{folder}: weights file {_shown(name)} is missing; only safetensors weights are read{instead}")
    return [folder / name for name in names]


def tensors_in(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, after the safetensors library has checked its header.

    Raises:
        ValueError: the file cannot be read, its header is not valid, or a tensor is not of a floating-point dtype.
    """
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(num_bytes), str(path))
    except (SafetensorError, OSError, ValueError) as fault:
        raise ValueError(f"{path} is no readable safetensors file: {one_line(fault)}") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in READABLE_DTYPES:
            raise ValueError(f"{path}: tensor {_shown(name)} is of {entry['dtype']}; floating-point weights are needed")
        position = 8 + num_bytes + entry["data_offsets"][0]
        found[name] = Stored(path, READABLE_DTYPES[entry["dtype"]], tuple(entry["shape"]), position)
    return found


def read_into(path: Path, position: int, dtype: torch.dtype, target: Tensor) -> None:
    """Fills the flat `target` (n,) with the file's elements of `dtype` from byte `position` on; raises as `read_all`."""
    pieces = target.split(LOAD_PIECE_ELEMENTS)
    starts = range(position, position + len(target) * dtype.itemsize, LOAD_PIECE_ELEMENTS * dtype.itemsize)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(LOAD_THREADS) as pool:
        list(pool.map(lambda piece, start: _read_piece(file.fileno(), start, dtype, piece), pieces, starts))


def read_all(descriptor: int, target: memoryview, position: int) -> None:
    """Fills `target` with an open file's bytes from `position` on. Raises OSError where it cannot be read or ends early."""
    while target:
        num_bytes = os.preadv(descriptor, [target], position)
        if not num_bytes:
            raise OSError(errno.EIO, "the file ends early")
        target, position = target[num_bytes:], position + num_bytes


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, as bytes; nothing is copied."""
    return memoryview(tensor.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def read_json(path: Path) -> dict:
    """`parse_json` of a file. Raises OSError where it cannot be read, ValueError where it is too large or no JSON object."""
    if path.stat().st_size > LARGEST_JSON_BYTES:
        raise ValueError(f"{path} is larger than {LARGEST_JSON_BYTES} bytes")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, source: str) -> dict:
    """A JSON object in which no name stands twice, else a ValueError that begins with `source`.

    NaN and Infinity are read, as Python writes them: a loss may be one.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{source} is not JSON: {one_line(fault)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds no JSON object")
    return value


def _rope_description(config: TrainingConfig) -> dict:
    if config.rope_scaling is None:
        return {}
    *factors, length = config.rope_scaling
    return {"rope_scaling": {"rope_type": "llama3", **dict(zip(ROPE_SCALING, (*factors, int(length)), strict=True))}}


def _rope_scaling(description: dict, rope: dict) -> tuple[float, ...] | None:
    """The values of ROPE_SCALING, None where positions are not scaled. Refuses what this decoder does not compute."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    is_whole = rope.get("partial_rotary_factor", 1.0) == 1.0 == description.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "llama3") or not is_whole:
        named = f"{kind!r:.40}"
        raise ValueError(f"rotary positions of type {named}, or partial ones, are not supported; a plain Llama or Qwen3 is")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if description.get(name):
            raise ValueError(f"{name}={description[name]!r} is not supported; use a plain Llama or Qwen3")
    if description.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={description['hidden_act']!r} is not supported; use a plain Llama or Qwen3")
    if kind == "default":
        return None
    if not all(isinstance(rope.get(name), int | float) for name in ROPE_SCALING):
        raise ValueError(f"its scaled rotary positions name not all of {', '.join(ROPE_SCALING)}")
    return tuple(float(rope[name]) for name in ROPE_SCALING)


@lru_cache(maxsize=16)
def _with_shape_of(described: bytes | None, config: TrainingConfig) -> TrainingConfig:
    found = vars(PRETRAIN) if described is None else parse_json(described, "it")
    shape = architecture_fields(found) if "model_type" in found else {name: found[name] for name in SHAPE_FIELDS}
    alone = dict.fromkeys(("teacher_dir", "teacher_top_k", "init_from", "tokenizer_path", "begin_of_text", "end_of_text"))
    return replace(config, **alone, **shape, activation_checkpointing="none")


def _read_piece(descriptor: int, position: int, dtype: torch.dtype, piece: Tensor) -> None:
    is_direct = piece.dtype == dtype and piece.device.type == "cpu"
    landing = piece if is_direct else torch.empty(len(piece), dtype=dtype)
    read_all(descriptor, bytes_of(landing), position)
    if not is_direct:
        piece.copy_(landing)


def _unique(pairs: list) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands in it twice")
    return value


def _shown(name: str) -> str:
    return name[:100] if name.isprintable() else repr(name[:100])
