"""Entry: the newest checkpoint as one GGUF file, which llama.cpp, Ollama and LM Studio run.

Knows GGUF's keys and how llama.cpp names the ways to split text, as its own convert_hf_to_gguf.py writes them (2026).
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ds.shards import sync_folder
from ds.tokenizer import QWEN2_PATTERN, begin_of_text_id, end_of_text_id, load, to_json
from scripts.config import MIB, PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.model.decoder import rotary_frequencies
from scripts.model.huggingface import Stored, bytes_of, described_config, read_into, stored_weights
from scripts.run.checkpoint import verified_folder
from scripts.run.run_dir import gguf_path
from scripts.run.storage import write_all

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2_SPLIT = [{"type": "ByteLevel", "use_regex": True}]
DIGITS = {"type": "Digits", "individual_digits": True}


class Weight(NamedTuple):
    """A tensor of the file: its name there, its shape, the type of its numbers, and where the checkpoint has it."""

    name: str
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    num_bytes: int
    stored: Stored


class Token(NamedTuple):
    """An id of the vocabulary, as GGUF spells it, and what sort of token it is."""

    text: str
    kind: int


def export(config: TrainingConfig) -> Path:
    """Writes the newest checkpoint that verifies as `gguf_precision` into the run directory and returns the file's path.

    Matrices get that type, norms stay float32. Memory: one tensor in float32 and in its own type. The file appears whole or
    not at all.

    Raises:
        ValueError: the package gguf is not there, the run has no checkpoint, llama.cpp does not compute such a model or would
            split text otherwise than the tokenizer does, or the disk is too full.
    """
    _refuse_missing_library()
    folder = verified_folder(config)
    if folder is None:
        raise ValueError(f"run_dir={config.run_dir!r} holds no checkpoint; run: deepspeed scripts/train_pretrain.py")
    model, tokenizer = described_config(folder), load(folder)
    weights = _weights(model, folder, config.gguf_precision)
    path = gguf_path(config, folder.name)
    head = _head(model, config)
    _add_tokenizer(head, tokenizer, model.vocab_size)
    scales = _rotary_scales(model)
    for each in scales:
        head.add_tensor_info("rope_freqs.weight", each.shape, np.dtype("float32"), each.nbytes)
    for weight in weights:
        head.add_tensor_info(weight.name, weight.shape, np.dtype("float32"), weight.num_bytes, weight.kind)
    tensors = chain(map(bytes_of, scales), (_encoded(weight, model) for weight in weights))
    num_bytes = (folder / "tokenizer.json").stat().st_size + sum(weight.num_bytes for weight in weights)
    _write(path, head, tensors, num_bytes)
    if model.rope_scaling is not None or model.qk_norm and model.head_width != 128:
        given = f'config=AutoConfig.from_pretrained("{folder}")'
        print(f"transformers reads this file right only with {given}; llama.cpp needs nothing more", file=sys.stderr)
    return path


def main() -> None:
    """Exports PRETRAIN's newest checkpoint and prints the file's path on standard output."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        print(export(PRETRAIN))


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """What llama.cpp calls the way in which this tokenizer splits text and merges the parts.

    Raises:
        ValueError: llama.cpp has no name for it that is known here: another name would give other ids, and say nothing.
    """
    state = json.loads(to_json(tokenizer))
    split, whole_words = _split(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    names = {
        "qwen2": (_pattern(QWEN2_PATTERN), False),
        "llama-bpe": (_pattern(LLAMA3_PATTERN), True),
        "smaug-bpe": (_pattern(LLAMA3_PATTERN), False),
        "gpt-2": (GPT2_SPLIT, False),
        "smollm": ([DIGITS, *GPT2_SPLIT], False),
    }
    for name, known in names.items():
        if known == (split, whole_words):
            return name
    raise ValueError(
        f"its pre-tokenizer, {json.dumps(split)[:200]}, is none that is known by name in llama.cpp, which would make other ids"
        f" of the same text; known are {', '.join(names)}; train with one of these tokenizers"
    )


def _refuse_missing_library() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError('a GGUF is written by the package gguf, which is not there; pip install -e ".[gguf]"') from None


def _weights(model: TrainingConfig, folder: Path, precision: str) -> list[Weight]:
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.QWEN3 if model.qk_norm else MODEL_ARCH.LLAMA, model.num_layers)
    weights = []
    for name, stored in stored_weights(model, folder).items():
        rows, *columns = stored.shape
        kind = GGMLQuantizationType[precision.upper() if columns else "F32"]
        if columns and columns[0] % GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16  # As llama.cpp's converter does with rows that are no whole blocks.
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = torch.Size(stored.shape).numel() // block_elements * block_bytes
        weights.append(Weight(f"{names.get_name(name, ('.weight',))}", stored.shape, kind, num_bytes, stored))
    return weights


def _head(model: TrainingConfig, config: TrainingConfig) -> "GGUFWriter":
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    head = GGUFWriter(None, "qwen3" if model.qk_norm else "llama")
    head.add_type("model")
    head.add_name(Path(config.run_dir).absolute().name)
    head.add_license(config.model_license or "")
    head.add_file_type(LlamaFileType[f"MOSTLY_{config.gguf_precision.upper()}"])
    head.add_quantization_version(GGML_QUANT_VERSION)
    head.add_vocab_size(model.vocab_size)
    head.add_context_length(model.context_length)
    head.add_embedding_length(model.hidden_size)
    head.add_block_count(model.num_layers)
    head.add_feed_forward_length(model.mlp_size)
    head.add_head_count(model.num_heads)
    head.add_head_count_kv(model.num_kv_heads)
    head.add_key_length(model.head_width)
    head.add_value_length(model.head_width)
    head.add_rope_dimension_count(model.head_width)
    head.add_rope_freq_base(model.rope_theta)
    head.add_layer_norm_rms_eps(model.norm_eps)
    return head


def _add_tokenizer(head: "GGUFWriter", tokenizer: Tokenizer, vocab_size: int) -> None:
    merges = json.loads(to_json(tokenizer))["model"]["merges"]
    if not merges:
        raise ValueError("vocab_size=257 is raw bytes: llama.cpp opens no vocabulary without merges; train with vocab_size=512")
    tokens, begin, end = _tokens(tokenizer, vocab_size), begin_of_text_id(tokenizer), end_of_text_id(tokenizer)
    head.add_tokenizer_model("gpt2")
    head.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    head.add_token_list([token.text for token in tokens])
    head.add_token_types([token.kind for token in tokens])
    head.add_token_merges([" ".join(pair) for pair in merges])
    head.add_bos_token_id(end if begin is None else begin)
    head.add_eos_token_id(end)
    head.add_add_bos_token(begin is not None)
    head.add_add_eos_token(False)


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> list[Token]:
    from gguf import TokenType

    tokens = [Token(f"[PAD{number}]", TokenType.UNUSED) for number in range(vocab_size)]
    for text, number in tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[number] = Token(text, TokenType.NORMAL)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        tokens[number] = Token(added.content, TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return tokens


def _split(pre_tokenizer: dict | None) -> list[dict]:
    """The parts of a pre-tokenizer without what has no effect on ids."""
    part = pre_tokenizer or {}
    parts = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    return [{name: value for name, value in each.items() if name != "trim_offsets" and value is not False} for each in parts]


def _pattern(regex: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}, {"type": "ByteLevel"}]


def _rotary_scales(model: TrainingConfig) -> list[Tensor]:
    """What llama.cpp divides each rotary frequency by, (K / 2,) float32; none where they are not scaled."""
    if model.rope_scaling is None:
        return []
    if model.qk_norm:
        raise ValueError(
            f"rope_scaling={model.rope_scaling} is not read by llama.cpp in a Qwen3; a Llama has it: qk_norm=False"
        )
    plain, scaled = (rotary_frequencies(each, torch.device("cpu")) for each in (replace(model, rope_scaling=None), model))
    return [plain / scaled]


def _encoded(weight: Weight, model: TrainingConfig) -> memoryview:
    """The tensor's bytes in the file. In a Llama's q and k, rows of features that turn together come one after the other."""
    from gguf import GGMLQuantizationType, quantize

    tensor = torch.empty(weight.shape, dtype=torch.float32)
    read_into(weight.stored.path, weight.stored.position, weight.stored.dtype, tensor.view(-1))
    if not model.qk_norm and weight.name.endswith(("attn_q.weight", "attn_k.weight")):
        rows, columns = weight.shape
        tensor = tensor.view(-1, 2, model.head_width // 2, columns).transpose(1, 2).reshape(rows, columns)
    largest = torch.finfo(torch.float16).max
    if weight.kind is GGMLQuantizationType.F16 and not torch.linalg.vector_norm(tensor, torch.inf) <= largest:
        raise ValueError(f'{weight.name} has a number above {largest:.0f}, the largest of float16; set gguf_precision="bf16"')
    return bytes_of(torch.from_numpy(quantize(tensor.numpy(), weight.kind)).view(-1))


def _write(path: Path, head: "GGUFWriter", tensors: Iterable[memoryview], num_bytes: int) -> None:
    draft, free = path.with_name(f".{path.name}.draft"), shutil.disk_usage(path.parent).free
    try:
        for left_over in path.parent.glob(".*.gguf.draft"):
            left_over.unlink()
        if free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            head.write_header_to_file(draft)
            head.write_kv_data_to_file()
            head.write_ti_data_to_file()
        finally:
            head.close()
        # The library's own writer of tensors does not learn of it when the last bytes of one find no room.
        with draft.open("ab", buffering=0) as file:
            for data in _padded(draft.stat().st_size, tensors, head.data_alignment):
                write_all(file.fileno(), data)
            os.fsync(file.fileno())
        draft.rename(path)
        sync_folder(path.parent)
    except OSError as fault:
        remedy = f"make {path.parent} a folder in which such a file can be written"
        if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"it needs {num_bytes / MIB:,.1f} MiB and {free / MIB:,.1f} MiB were free; make room"
        reason = f"{path} was not written: {fault.strerror or fault}"
        raise ValueError(f"{reason}; {remedy}, and run the command again") from None
    finally:
        if draft.exists():
            draft.unlink()


def _padded(start: int, tensors: Iterable[memoryview], alignment: int) -> Iterator[memoryview]:
    """The tensors, each at a multiple of `alignment`; the first follows a head of `start` bytes."""
    yield memoryview(bytes(-start % alignment))
    for data in tensors:
        yield data
        yield memoryview(bytes(-len(data) % alignment))


if __name__ == "__main__":
    main()
