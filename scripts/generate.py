"""Entry: text from a checkpoint, or from any Llama or Qwen3 folder. As a script: reads prompts from standard input.

Knows folders and text; how ids are sampled is in scripts/model/sampling.py.
"""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from ds.encoder import encode, plain_encoder
from ds.tokenizer import end_of_text_id, load, token_bytes
from scripts.config import PRETRAIN, refuse_arguments, refusing
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import described_config, load_weights
from scripts.model.sampling import continue_ids
from scripts.plan.machine import usable_card
from scripts.run.checkpoint import newest_verified


class Loaded(NamedTuple):
    """A model on its device and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer


def generate(model_dir: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The continuation of `prompt` by at most `max_new_tokens` tokens; it ends at end of text. One seed gives one text.

    Raises:
        ValueError: the folder holds no Llama or Qwen3 with safetensors weights and a byte-level tokenizer, `temperature` is
            negative, or `top_k` is below 1.
    """
    pieces = stream(open_model(model_dir), prompt.encode(), max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return b"".join(pieces).decode(errors="replace")


def open_model(model_dir: str) -> Loaded:
    """Loads a transformers folder onto the GPU, or into host memory where there is none. Raises ValueError as `generate`."""
    folder, device = Path(model_dir), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable_card(device)
    model = empty_model(described_config(folder), device)
    load_weights(model, folder)
    return Loaded(model.eval(), load(folder))


def stream(loaded: Loaded, prompt: bytes, max_new_tokens: int, *, temperature: float, top_k: int, seed: int) -> Iterator[bytes]:
    """Yields the bytes of each new token as soon as it is sampled; no bytes for an id that the tokenizer does not know. Raises
    ValueError as `continue_ids`.
    """
    end, known = end_of_text_id(loaded.tokenizer), token_bytes(loaded.tokenizer)
    start = torch.tensor(encode(plain_encoder(loaded.tokenizer), prompt).tolist() or [end])
    for token in continue_ids(loaded.model, start, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed):
        if token == end:
            return
        yield known[token] if token < len(known) else b""


def main() -> None:
    """Continues each line of standard input with the newest checkpoint of PRETRAIN's run, on standard output."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        found, _ = newest_verified(PRETRAIN)
        if found is None:
            raise ValueError(f"run_dir={PRETRAIN.run_dir!r} holds no checkpoint; run: deepspeed scripts/train_pretrain.py")
        loaded = open_model(str(found.folder))
        print(f"{found.folder}: type a prompt and press Enter; Ctrl-D ends", file=sys.stderr)
        write, (temperature, top_k) = sys.stdout.buffer.write, (PRETRAIN.sample_temperature, PRETRAIN.sample_top_k)
        for prompt in (line.rstrip(b"\n") for line in sys.stdin.buffer):
            write(prompt)
            pieces = stream(loaded, prompt, PRETRAIN.sample_tokens, temperature=temperature, top_k=top_k, seed=PRETRAIN.seed)
            for piece in chain(pieces, [b"\n\n"]):
                write(piece)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
