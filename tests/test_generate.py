"""Laws of scripts/generate.py: one seed gives one text, transformers gives the same one, unfit folders are refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds import tokenizer as bpe
from ds.encoder import encode, plain_encoder
from scripts.config import TrainingConfig
from scripts.generate import generate, open_model, stream
from scripts.model.decoder import Decoder, empty_model, initialise
from scripts.run.checkpoint import model_texts, write_model

RAW = bpe.raw_bytes()
END = 256
CONFIG = TrainingConfig(
    vocab_size=257, context_length=32, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
    tokens_per_step=32, micro_batch_rows=1, eval_tokens=32, precision="fp32", init_std=0.2, logits_init_std=2.0,
)  # fmt: skip


def written(folder: Path, model: Decoder) -> Path:
    folder.mkdir(exist_ok=True)
    write_model(folder, model, model_texts(model.config, bpe.to_json(RAW), END))
    return folder


def fresh(**changes) -> Decoder:
    return initialise(empty_model(replace(CONFIG, **changes), torch.device("cpu")))


def chain(text: bytes) -> Decoder:
    """A model that says `text` and then ends: blocks that add nothing, and a head that answers each byte with the next."""
    model, ids = fresh(tie_embeddings=False), [*text, END]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.lm_head.weight.zero_()
        for here, following in zip(ids, ids[1:], strict=False):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[here] * 5
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
    pieces = list(stream(open_model(str(folder)), b"a", 9, temperature=0.0, top_k=1, seed=0))
    assert pieces == [b"\xe9", b"\x80", b"b", *(bytes([byte]) for byte in "漢".encode())]
    assert generate(str(folder), "a", 9, 0.0, 1, 0) == b"".join(pieces).decode(errors="replace")


def test_text_goes_on_beyond_the_context(folder):
    pieces = stream(open_model(str(folder)), b"def " * 20, 80, temperature=1.0, top_k=50, seed=1)
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
