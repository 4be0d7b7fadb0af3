"""Laws of scripts/generate.py: one seed gives one text, transformers gives the same one, unfit folders are refused; a
conversation at a real pseudo-terminal, and prompts through real pipes.
"""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, clean_environment
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds import tokenizer as bpe
from ds.encoder import encode, plain_encoder
from scripts.config import TrainingConfig
from scripts.generate import (
    Loaded,
    continue_lines,
    converse,
    generate,
    named_checkpoint,
    open_model,
    stream,
    whole_characters,
)
from scripts.model.decoder import Decoder, empty_model, initialise
from scripts.model.sampling import Sampling
from scripts.report import visible
from scripts.run.checkpoint import STATE, model_texts, publish, state_file, write_model
from scripts.run.run_dir import best_link, checkpoints_dir
from scripts.run.storage import write_safetensors, write_text
from scripts.run.teacher import find_teacher

RAW = bpe.raw_bytes()
END = 256
CONFIG = TrainingConfig(
    vocab_size=257, context_length=32, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
    tokens_per_step=32, micro_batch_rows=1, eval_tokens=32, precision="fp32", init_std=0.2, logits_init_std=2.0,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0, repetition_penalty=1.0)


def written(folder: Path, model: Decoder) -> Path:
    folder.mkdir(exist_ok=True)
    write_model(folder, model, model_texts(model.config, bpe.to_json(RAW), END))
    return folder


def fresh(**changes) -> Decoder:
    return initialise(empty_model(replace(CONFIG, **changes), torch.device("cpu")))


def chain(text: bytes) -> Decoder:
    """A model that says `text` and then ends: blocks that add nothing, and a head that answers each byte with the next."""
    return answering({here: following for here, following in pairwise([*text, END])})


def answering(following: dict[int, int]) -> Decoder:
    """A model that says the id after another one that `following` names."""
    model = fresh(tie_embeddings=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.lm_head.weight.zero_()
        for here, then in following.items():
            model.lm_head.weight[then] += model.model.embed_tokens.weight[here] * 5
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("model"), fresh())


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_one_seed_gives_one_text_and_another_seed_another(folder):
    texts = [generate(str(folder), "def ", 20, 1.0, 50, seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", ["def f(x):", "é漢 ", "<|endoftext|>"])
def test_greedy_text_is_the_one_that_transformers_generates(folder, theirs, prompt):
    model, tokenizer = theirs
    ids = tokenizer(prompt.replace("<|endoftext|>", "x"), return_tensors="pt").input_ids
    # 12 tokens stay within context_length; beyond it the two cut the context differently.
    made = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids), pad_token_id=END)
    new = made[0, ids.shape[1] :]
    assert generate(str(folder), prompt.replace("<|endoftext|>", "x"), 12, 0.0, 1, 0) == tokenizer.decode(
        new, skip_special_tokens=True
    )


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_greedy_text_with_a_repetition_penalty_is_the_one_that_transformers_generates(folder, theirs, penalty):
    model, tokenizer = theirs
    ids = tokenizer("def f(x): ", return_tensors="pt").input_ids
    how = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "pad_token_id": END}
    plain, penalized = (
        tokenizer.decode(model.generate(ids, **how, repetition_penalty=value)[0, ids.shape[1] :], skip_special_tokens=True)
        for value in (1.0, penalty)
    )
    sampling = GREEDY._replace(repetition_penalty=penalty)
    pieces = stream(open_model(str(folder)), b"def f(x): ", 12, sampling=sampling, seed=0)
    assert b"".join(pieces).decode(errors="replace") == penalized != plain


@given(text=st.text(max_size=60))
def test_transformers_tokenizer_gives_every_text_back_and_the_same_ids(theirs, text):
    ids = theirs[1](text).input_ids
    assert "<|endoftext|>" in text or ids == encode(plain_encoder(RAW), text.encode("utf-8")).tolist()
    assert theirs[1].decode(ids) == text


def test_transformers_knows_the_end_of_text_and_the_length_of_the_context(theirs):
    model, tokenizer = theirs
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == END
    assert tokenizer.model_max_length == model.config.max_position_embeddings == CONFIG.context_length
    assert tokenizer.decode([97, END, 98], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(("prompt", "length", "text"), [("a", 50, "bc.de"), ("a", 3, "bc."), ("xyc", 50, ".de"), ("e", 9, "")])
def test_text_ends_at_the_end_of_text_or_at_the_length(tmp_path, prompt, length, text):
    folder = str(written(tmp_path / "chain", chain(b"abc.de")))
    assert generate(folder, prompt, length, 0.0, 1, 0) == text


def test_empty_prompt_starts_a_document(tmp_path):
    model = chain(b"abc")
    with torch.no_grad():
        model.lm_head.weight[ord("a")] = model.model.embed_tokens.weight[END] * 5
        model.lm_head.weight[ord("z")] = model.model.embed_tokens.weight[0] * 5
    assert generate(str(written(tmp_path / "chain", model)), "", 9, 0.0, 1, 0) == "abc"


def test_spelled_out_end_of_text_in_a_prompt_is_ordinary_text(tmp_path):
    model = chain(b"abc")
    with torch.no_grad():
        model.lm_head.weight[ord("a")] = model.model.embed_tokens.weight[ord(">")] * 5
    assert generate(str(written(tmp_path / "chain", model)), "<|endoftext|>", 9, 0.0, 1, 0) == "abc"


def test_bytes_come_one_token_at_a_time_and_the_text_replaces_what_is_no_utf8(tmp_path):
    folder = written(tmp_path / "chain", chain("aé\x80b".encode("latin-1") + "漢".encode()))
    pieces = list(stream(open_model(str(folder)), b"a", 9, sampling=GREEDY, seed=0))
    assert pieces == [b"\xe9", b"\x80", b"b", *(bytes([byte]) for byte in "漢".encode())]
    assert generate(str(folder), "a", 9, 0.0, 1, 0) == b"".join(pieces).decode(errors="replace")


def test_text_goes_on_beyond_the_context(folder):
    pieces = stream(open_model(str(folder)), b"def " * 20, 80, sampling=Sampling(1.0, 50, 1.0, 1.0), seed=1)
    assert len(b"".join(pieces)) > CONFIG.context_length


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_folder_is_opened_in_its_own_dtype(tmp_path, precision):
    model = fresh(precision=precision)
    loaded = open_model(str(written(tmp_path / "model", model))).model
    assert {name: weight.dtype for name, weight in loaded.state_dict().items()} == {
        name: model.config.dtype for name in model.state_dict()
    }
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())


def without(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()

    return change


def with_tensors(edit):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def with_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("config.json"), "no transformers model folder"),
        (without("tokenizer.json"), "tokenizer.json is not there"),
        (without("model.safetensors"), "model.safetensors is missing"),
        (shutil.rmtree, "no transformers model folder"),
        (only_pickle, "only safetensors weights are read"),
        (truncated, "no readable safetensors file"),
        (with_tensors(lambda tensors: tensors.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
        (with_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))), "tensor extra has shape"),
        (with_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)})), r"has shape \(31,\)"),
        (with_config(vocab_size=300), r"weight has shape \(257, 32\), the model needs \(300, 32\)"),
        (with_config(model_type="gpt2"), "'gpt2' is not supported"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
    ],
)  # fmt: skip
def test_folder_that_does_not_fit_is_refused_in_one_line(copy, change, reason):
    change(copy)
    with pytest.raises(ValueError) as caught:
        generate(str(copy), "def ", 3, 0.0, 1, 0)
    assert re.search(reason, str(caught.value)) and "\n" not in str(caught.value)


def test_sharded_folder_with_a_missing_shard_is_refused(copy, theirs):
    theirs[0].save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    assert generate(str(copy), "def ", 3, 0.0, 1, 0)
    sorted(copy.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="weights file model-00002-of-.* is missing"):
        generate(str(copy), "def ", 3, 0.0, 1, 0)


def test_index_that_points_out_of_the_folder_is_refused(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"../{copy.name}/model.safetensors"}}))
    with pytest.raises(ValueError, match="is missing; only safetensors"):
        generate(str(copy), "def ", 3, 0.0, 1, 0)


@given(text=st.binary(max_size=20) | st.text(max_size=9).map(str.encode), cuts=st.sets(st.integers(1, 30)))
def test_characters_come_whole_as_soon_as_they_are_and_together_are_the_decoded_text(text, cuts):
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces, num_read, shown = [text[start:stop] for start, stop in pairwise(borders)], 0, ""
    for piece, characters in zip([*pieces, b""], whole_characters(pieces), strict=True):
        num_read, shown = num_read + len(piece), shown + characters
        # What is not shown yet is the beginning of one character, of at most three bytes.
        assert any(shown == text[: num_read - held].decode(errors="replace") for held in range(4))
    assert shown == text.decode(errors="replace")


@given(text=st.text(max_size=20))
def test_a_terminal_is_only_written_to(text):
    shown = visible(text)
    assert all(each.isprintable() or each in "\n\t" for each in shown)
    assert shown == text or any(not each.isprintable() and each not in "\n\t" for each in text)


# What the models of these tests say: é and what would clear the screen after A, letters after a for ever, digits after 0.
ANSWER = {here: then for here, then in pairwise([*"Aé\x1b[2J!".encode(), END])}
ENDLESS = {here: then for here, then in pairwise(b"abcdefghijklmnopqrstuvwxyza")}
DIGITS = {here: then for here, then in pairwise(b"034567891")}
TALKING = dict(sample_temperature=0.0, sample_stop=("nowhere", "67"), sample_tokens=10**6)


def saved(config: TrainingConfig, model: Decoder, step: int) -> Path:
    """A checkpoint of `model`, as a run of one rank leaves it, without an optimizer."""
    folder = checkpoints_dir(config) / f"step-{step:08d}"
    draft = folder.with_name(f".{folder.name}.draft")
    (draft / "training").mkdir(parents=True)
    optimizer = {"world_size": 1, "group_elements": [], "group_partitions": [], "adam_steps": 0, "loss_scaler": {}}
    state = {"step": step, "data_fingerprint": "", "optimizer": optimizer}
    records = write_model(draft, model, model_texts(model.config, bpe.to_json(RAW), END))
    records[STATE] = write_text(draft / STATE, json.dumps(state))
    records[state_file(0, 1)] = write_safetensors(draft / state_file(0, 1), {"empty": torch.zeros(1)})
    publish(draft, folder, records)
    return folder


def talking() -> Decoder:
    return answering(ANSWER | ENDLESS | DIGITS)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A copy of the program, with a checkpoint of its PRETRAIN."""
    base = tmp_path_factory.mktemp("installed")
    for room in ("ds", "scripts"):
        shutil.copytree(REPOSITORY / room, base / room, ignore=shutil.ignore_patterns("__pycache__"))
    words = ", ".join(f"{name}={value!r}" for name, value in (TALKING | {"run_dir": "run"}).items())
    with (base / "scripts" / "config.py").open("a") as file:
        file.write(f"\nPRETRAIN = replace(PRETRAIN, {words})\n")
    saved(replace(CONFIG, run_dir=str(base / "run")), talking(), 7)
    return base


COMMAND = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_path("scripts/generate.py", run_name="__main__")
"""


class Terminal:
    """The other side of a pseudo-terminal: what was seen on it, and keys."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.seen, self.at = descriptor, "", 0

    def see(self, words: str) -> str:
        """Waits for `words`; what was seen from the last such place up to them."""
        limit = time.monotonic() + 300
        while words not in self.seen[self.at :]:
            assert time.monotonic() < limit and self._read(), self.seen
        start, self.at = self.at, self.seen.index(words, self.at) + len(words)
        return self.seen[start : self.at]

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def _read(self) -> bool:
        if not select.select([self.descriptor], [], [], 300)[0]:
            return False
        self.seen += os.read(self.descriptor, 2**16).decode(errors="replace")
        return True


@contextmanager
def at_a_terminal(folder: Path) -> Iterator[tuple[Terminal, subprocess.Popen]]:
    ours, theirs = pty.openpty()
    environment = clean_environment() | {"PYTHONPATH": str(folder), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=folder, env=environment, start_new_session=True,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


ENTER, NEW_LINE, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"
READY, BOLD, DIM, PLAIN = "\x1b[?2004h", "\x1b[1m", "\x1b[2m", "\x1b[0m"


@pytest.mark.slow
def test_a_conversation_at_a_terminal(installed):
    """A text that a Ctrl-C ends, and several end no more, a prompt of two lines, the same again, a stop text; then Ctrl-D."""
    with at_a_terminal(installed) as (terminal, process):
        first = terminal.see(READY)
        assert first.startswith("run/checkpoints/step-00000007: Enter sends, Alt-Enter or Esc Enter") and "\n" in first
        terminal.press("a" + ENTER)
        assert f"{BOLD}a{PLAIN}bcdefghijklmnopqrstuvwxyzabc" in terminal.see("xyzabc")
        for _ in range(9):
            terminal.press(CTRL_C)
            time.sleep(0.02)
        assert re.search(rf"\^C\r\n{re.escape(DIM)}\d[\d,]* tokens, [\d,]+ tokens/s", terminal.see("tokens/s"))
        terminal.see(READY)
        for keys in ("a" + NEW_LINE + "A" + ENTER, UP + ENTER):
            terminal.press(keys)
            seen = terminal.see("tokens/s")
            assert f"{BOLD}a\r\nA{PLAIN}é\\x1b[2J!\r\n{DIM}7 tokens, " in seen, seen
            terminal.see(READY)
        terminal.press("0" + ENTER)
        assert f"{BOLD}0{PLAIN}345\r\n{DIM}5 tokens, " in terminal.see("tokens/s")
        terminal.see(READY)
        terminal.press(CTRL_D)
        assert process.wait(300) == 0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    return open_model(str(written(tmp_path_factory.mktemp("talking"), talking())))


def test_ctrl_c_empties_a_prompt_and_does_nothing_at_an_empty_one_and_ctrl_d_ends_the_program(loaded, capfd):
    with create_pipe_input() as keyboard, create_app_session(input=keyboard):
        keyboard.send_text(f"{CTRL_C}A half{CTRL_C}{CTRL_C}0{ENTER}{CTRL_D}A{ENTER}")
        converse(loaded, replace(CONFIG, **TALKING))
    written, said = capfd.readouterr()
    assert "0345\n" in written and "é" not in written and said.startswith("5 tokens, ") and said.count("\n") == 1


def test_lines_of_a_pipe_are_continued_in_their_order_as_if_each_came_alone(loaded, capfdbinary):
    config = replace(CONFIG, sample_temperature=1.0, sample_tokens=20, sample_stop=("e",))
    alone = []
    for prompt in (b"0", b"A\xff", b"", b"a", b"0"):
        continue_lines(loaded, config, [prompt + b"\n"])
        written, said = capfdbinary.readouterr()
        assert written.startswith(prompt) and written.endswith(b"\n\n") and b"e" not in written
        assert re.fullmatch(rb"[\d,]+ tokens, [\d,]+ tokens/s\n", said)
        alone.append(written)
    continue_lines(loaded, config, [b"0\n", b"A\xff\r\n", b"\n", b"a\n", b"0"])
    written, said = capfdbinary.readouterr()
    assert written == b"".join(alone) and said.count(b"\n") == 1


@pytest.mark.slow
def test_a_closed_output_pipe_ends_the_program_quietly(installed, tmp_path):
    (tmp_path / "prompts").write_text("A\n\n" + "a\n" * 9)
    with (tmp_path / "prompts").open() as prompts, (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "scripts/generate.py"], cwd=installed, env=clean_environment() | {"PYTHONPATH": str(installed)},
            stdin=prompts, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "Aé\x1b[2J!\n".encode()
        process.stdout.close()
        assert process.wait(300) == 0
    assert (tmp_path / "said").read_text() == ""


def test_the_checkpoint_is_the_newest_or_the_one_that_best_links_to(tmp_path, capfd):
    config = replace(CONFIG, run_dir=str(tmp_path / "run"))
    best = replace(config, sample_checkpoint="best")
    with pytest.raises(ValueError, match=r"^run_dir='.*run' holds no checkpoint; run: deepspeed scripts/train_pretrain.py$"):
        named_checkpoint(config)
    older, newer = (saved(config, fresh(), step) for step in (3, 6))
    with pytest.raises(ValueError, match=r'^sample_checkpoint="best": .*/best is missing; .* set sample_checkpoint="newest"$'):
        named_checkpoint(best)
    best_link(config).symlink_to(older.relative_to(config.run_dir))
    assert (named_checkpoint(config), named_checkpoint(best)) == (newer, older.resolve())
    truncated(older)
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match=r'^sample_checkpoint="best": .*step-00000003 does not verify: model.safetensors'):
        named_checkpoint(best)
    assert named_checkpoint(config) == newer


def test_a_newer_checkpoint_that_is_damaged_is_named_where_an_older_one_is_taken(tmp_path, capfd):
    config = replace(CONFIG, run_dir=str(tmp_path / "run"))
    older, newer = (saved(config, fresh(), step) for step in (3, 6))
    truncated(newer)
    assert named_checkpoint(config) == older
    said = capfd.readouterr().err
    assert re.fullmatch(r"checkpoint [^\n]+step-00000006 does not verify: [^\n]+; taking an older one\n", said)
    teacher = find_teacher(replace(CONFIG, teacher_dir=config.run_dir))
    assert teacher is not None and teacher.folder == older
    assert [re.sub(" does not verify.*", "", fault) for fault in teacher.faults] == [f"checkpoint {newer}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "words"),
    [("< /dev/null > /dev/full", ""), ("<&-", "is closed"), (">&-", "is closed"), ("> /dev/full", "No space left on device")],
)
def test_streams_that_fail_are_said_in_one_line(installed, streams, words):
    command = f"{'' if '<' in streams else 'echo A |'} {sys.executable} scripts/generate.py {streams}"
    environment = clean_environment() | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, shell=True, cwd=installed, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    refusals = [line for line in done.stderr.splitlines() if not line.startswith("0 tokens")]
    assert done.returncode == (2 if words else 0), done.stderr
    assert all(line.startswith("refused: ") and words in line for line in refusals) and len(refusals) == bool(words)
