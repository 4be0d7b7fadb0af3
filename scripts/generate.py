"""Entry: text from a checkpoint, or from any Llama or Qwen3 folder. As a script: prompts at a terminal or from a pipe.

Knows folders, text and the terminal; how ids are sampled is in scripts/model/sampling.py.
"""

import os
import signal
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TextIO

import torch
from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output
from tokenizers import Tokenizer

from ds.encoder import encode, plain_encoder
from ds.tokenizer import end_of_text_id, load, token_bytes
from scripts.config import PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import described_config, load_weights
from scripts.model.sampling import Sampling, before_stop, continue_ids, sampling_of, stop_bytes
from scripts.plan.machine import usable_card
from scripts.report import visible
from scripts.run.checkpoint import find_fault, verified_folder
from scripts.run.run_dir import best_link

BOLD, DIM = "1", "2"
HELP = "Enter sends, Alt-Enter or Esc Enter begins a new line, Ctrl-C ends a text, Ctrl-D the program"


class Loaded(NamedTuple):
    """A model on its device and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer


@dataclass
class Pace:
    """How many tokens were sampled in how many seconds; the seconds that prompts take are among them."""

    num_tokens: int = 0
    seconds: float = 0

    def __str__(self) -> str:
        rate = self.num_tokens / self.seconds if self.seconds else 0
        return f"{self.num_tokens:,} tokens, {rate:,.0f} tokens/s"


def generate(model_dir: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The continuation of `prompt` by at most `max_new_tokens` tokens; it ends at end of text. One seed gives one text.

    Raises:
        ValueError: the folder holds no Llama or Qwen3 with safetensors weights and a byte-level tokenizer, `temperature` is
            negative, or `top_k` is below 1.
    """
    sampling = Sampling(temperature, top_k, top_p=1.0, repetition_penalty=1.0)
    pieces = stream(open_model(model_dir), prompt.encode(), max_new_tokens, sampling=sampling, seed=seed)
    return b"".join(pieces).decode(errors="replace")


def open_model(model_dir: str) -> Loaded:
    """Loads a transformers folder onto the GPU, or into host memory where there is none. Raises ValueError as `generate`."""
    folder, device = Path(model_dir), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable_card(device)
    model = empty_model(described_config(folder), device)
    load_weights(model, folder)
    return Loaded(model.eval(), load(folder))


def stream(loaded: Loaded, prompt: bytes, max_new_tokens: int, *, sampling: Sampling, seed: int) -> Iterator[bytes]:
    """Yields the bytes of each new token as soon as it is sampled; no bytes for an id that the tokenizer does not know. Raises
    ValueError as `continue_ids`.
    """
    end, known = end_of_text_id(loaded.tokenizer), token_bytes(loaded.tokenizer)
    start = torch.tensor(encode(plain_encoder(loaded.tokenizer), prompt).tolist() or [end])
    for token in continue_ids(loaded.model, start, max_new_tokens, sampling=sampling, seed=seed):
        if token == end:
            return
        yield known[token] if token < len(known) else b""


def whole_characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """The text of UTF-8 bytes, each character as soon as it is complete; what is no UTF-8 is replaced as by `bytes.decode`."""
    decoder = getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def named_checkpoint(config: TrainingConfig) -> Path:
    """The folder of the checkpoint that `sample_checkpoint` names. Raises ValueError where it is missing or damaged."""
    if config.sample_checkpoint == "newest":
        newest = verified_folder(config)
        if newest is None:
            raise ValueError(f"run_dir={config.run_dir!r} holds no checkpoint; run: deepspeed scripts/train_pretrain.py")
        return newest
    link, newest = best_link(config), 'set sample_checkpoint="newest"'
    if not link.exists():
        raise ValueError(f'sample_checkpoint="best": {link} is missing; a run makes it when it evaluates, or {newest}')
    folder = link.resolve()
    fault = find_fault(folder)
    if fault is not None:
        raise ValueError(f'sample_checkpoint="best": checkpoint {folder} does not verify: {fault}; {newest}')
    return folder


def write_text(loaded: Loaded, prompt: bytes, config: TrainingConfig, pace: Pace, interrupts: list[int]) -> None:
    """Writes a prompt and its continuation to standard output, as `config` samples it and while it is sampled, up to the first
    of `sample_stop` or until there is one of `interrupts`. A terminal gets whole characters that only write, all else gets the
    bytes. Counts tokens in `pace`.
    """
    pieces = _paced(stream(loaded, prompt, config.sample_tokens, sampling=sampling_of(config), seed=config.seed), pace)
    pieces = before_stop(takewhile(lambda _: not interrupts, pieces), stop_bytes(config))
    if sys.stdout.isatty():
        prompt = _styled(BOLD, visible(prompt.decode(errors="replace")), sys.stdout).encode()
        pieces = (visible(text).encode() for text in whole_characters(pieces))
    for piece in chain([prompt], pieces):
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()


def converse(loaded: Loaded, config: TrainingConfig) -> None:
    """Reads prompts at the terminal and continues each; a Ctrl-C ends the text or empties the prompt, Ctrl-D leaves."""
    session = PromptSession(
        "> ", prompt_continuation="  ", multiline=True, key_bindings=_keys(), erase_when_done=True,
        output=create_output(always_prefer_tty=True),
    )  # fmt: skip
    with _noting_interrupts() as interrupts:
        while True:
            pace = Pace()
            try:
                prompt = session.prompt().encode(errors="surrogateescape")
            except EOFError:
                return
            write_text(loaded, prompt, config, pace, interrupts)
            interrupts.clear()
            print(flush=True)
            _say_pace(pace)


def continue_lines(loaded: Loaded, config: TrainingConfig, lines: Iterable[bytes]) -> None:
    """Continues each line, one after another, with an empty line after each text. At the end it says how fast."""
    pace = Pace()
    for line in lines:
        write_text(loaded, line.rstrip(b"\r\n"), config, pace, [])
        print("\n", flush=True)
    _say_pace(pace)


def main() -> None:
    """Continues prompts with a checkpoint of PRETRAIN's run: those typed at a terminal, or each line of standard input."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        if None in (sys.stdin, sys.stdout, sys.stderr):
            raise ValueError("standard input, output or error is closed; type prompts at a terminal, or pipe them in")
        folder = named_checkpoint(PRETRAIN)
        loaded = open_model(str(folder))
        try:
            if sys.stdin.isatty():
                print(f"{folder}: {HELP}", file=sys.stderr)
                converse(loaded, PRETRAIN)
            else:
                continue_lines(loaded, PRETRAIN, sys.stdin.buffer)
        except OSError as fault:
            # What is left must go somewhere, or the interpreter complains when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(fault, BrokenPipeError):
                raise ValueError(f"a text was not read or written: {fault}") from None


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Gives a list to which each Ctrl-C adds. As an exception it would be lost in a callback."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _paced(pieces: Iterable[bytes], pace: Pace) -> Iterator[bytes]:
    before = perf_counter()
    for piece in pieces:
        now = perf_counter()
        pace.num_tokens, pace.seconds, before = pace.num_tokens + 1, pace.seconds + now - before, now
        yield piece


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter begins a line, Ctrl-C empties the prompt; the rest is prompt_toolkit's."""
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.newline(copy_margin=False))
    keys.add("c-c")(_empty)
    keys.add("<sigint>")(_empty)
    return keys


def _empty(event: KeyPressEvent) -> None:
    event.current_buffer.reset()


def _say_pace(pace: Pace) -> None:
    print(_styled(DIM, str(pace), sys.stderr), file=sys.stderr)


def _styled(style: str, text: str, file: TextIO) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if file.isatty() else text


if __name__ == "__main__":
    main()
