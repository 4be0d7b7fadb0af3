"""Sampling with a key/value cache from a checkpoint or any Llama or Qwen3 folder. As a script: prompts on standard input."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from ds.tokenizer import encode, end_of_text_id, load, token_bytes
from scripts import checkpoint
from scripts.config import PRETRAIN, refuse_arguments, refusing
from scripts.model import Decoder, continue_ids, empty_model


class Loaded(NamedTuple):
    """A model on its device and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer


def generate(model_dir: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The continuation of `prompt` by at most `max_new_tokens` tokens, ended by end of text; one seed gives one text.

    Raises:
        ValueError: the folder holds no Llama or Qwen3 with safetensors weights and a byte-level tokenizer.
    """
    return b"".join(stream(open_model(model_dir), prompt.encode(), max_new_tokens, temperature, top_k, seed)).decode(
        errors="replace"
    )


def open_model(model_dir: str) -> Loaded:
    """Loads a transformers folder onto the GPU where there is one.

    Raises:
        ValueError: as `generate`.
    """
    folder = Path(model_dir)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = empty_model(checkpoint.described_config(folder), device)
    checkpoint.load_weights(model, folder)
    return Loaded(model.eval(), load(folder))


def stream(loaded: Loaded, prompt: bytes, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> Iterator[bytes]:
    """Yields the bytes of one token after the other; an id that pads the vocabulary has none.

    Raises:
        ValueError: `temperature` is negative or `top_k` below 1.
    """
    if temperature < 0 or top_k < 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k}: at least 0 and 1 work")
    end, pieces = end_of_text_id(loaded.tokenizer), token_bytes(loaded.tokenizer)
    ids = encode(loaded.tokenizer, prompt)
    start = torch.tensor(ids.tolist() or [end])
    for token in continue_ids(loaded.model, start, max_new_tokens, temperature, top_k, seed):
        if token == end:
            return
        yield pieces[token] if token < len(pieces) else b""


def main() -> None:
    with refusing():
        refuse_arguments(sys.argv[1:])
        found, _ = checkpoint.newest_verified(PRETRAIN)
        if found is None:
            raise ValueError(f"run_dir={PRETRAIN.run_dir!r} holds no checkpoint; run: deepspeed scripts/train_pretrain.py")
        loaded = open_model(str(found.folder))
    print(f"{found.folder}: type a prompt and press Enter; Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin.buffer:
        _answer(loaded, line.rstrip(b"\n"))


def _answer(loaded: Loaded, prompt: bytes) -> None:
    write = sys.stdout.buffer.write
    write(prompt)
    for piece in stream(
        loaded, prompt, PRETRAIN.sample_tokens, PRETRAIN.sample_temperature, PRETRAIN.sample_top_k, PRETRAIN.seed
    ):
        write(piece)
        sys.stdout.flush()
    write(b"\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
