"""Laws of scripts/export_gguf.py: transformers and llama.cpp read the checkpoint's model and tokenizer out of the one file.

transformers' reader of GGUF (5.24) needs a Qwen3 whose heads have 128 features, since it reads no key_length. It leaves
rope_freqs out, knows no "smollm", and gives <|endoftext|> an id even where a vocabulary has none. There the file itself is
held against what llama.cpp's converter says, and llama.cpp against the checkpoint, where it is installed.
"""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from conftest import clean_environment
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import TINY, fresh, logits_of, some_ids
from test_tokenizer import LLAMA3_PATTERN, PUBLISHED, RAW, SMOLLM_LACKS, TRAINED, placed, split
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds import tokenizer as bpe
from scripts.config import TrainingConfig
from scripts.export_gguf import export, pre_tokenizer_name
from scripts.generate import open_model, stream
from scripts.model.decoder import Decoder
from scripts.model.sampling import Sampling
from scripts.run.checkpoint import STATE, model_texts, publish, state_file, write_model
from scripts.run.storage import write_text

LLAMA = replace(TINY, vocab_size=600, mlp_size=64, qk_norm=False)
QWEN3 = replace(LLAMA, qk_norm=True, head_size=128)
FORMATS = ("f16", "bf16", "q8_0")
SCALING = (8.0, 1.0, 4.0, 16)


class Exported(NamedTuple):
    """A checkpoint of one model, and the GGUF of it."""

    model: Decoder
    checkpoint: Path
    file: Path

    def opened(self, kind: Any):
        """The file as transformers reads it."""
        words = {"dtype": torch.float32} if kind is AutoModelForCausalLM else {}
        return kind.from_pretrained(self.file.parent, gguf_file=self.file.name, **words)


def saved(folder: Path, model: Decoder, tokenizer: Tokenizer, **changes) -> TrainingConfig:
    """A run whose one checkpoint holds the model; the optimizer's state is that of nothing."""
    config = replace(model.config, run_dir=str(folder / "pretrain"), **changes)
    draft = Path(config.run_dir) / "checkpoints" / ".draft"
    (draft / "training").mkdir(parents=True)
    records = write_model(draft, model, model_texts(config, bpe.to_json(tokenizer), bpe.end_of_text_id(tokenizer)))
    optimizer = {"world_size": 1, "group_elements": [], "group_partitions": [], "adam_steps": 0, "loss_scaler": {}}
    state = {"step": 500, "data_fingerprint": "", "optimizer": optimizer}
    records |= {name: write_text(draft / name, json.dumps(state)) for name in (STATE, state_file(0, 1))}
    publish(draft, draft.with_name("step-00000500"), records)
    return config


def exported(folder: Path, config: TrainingConfig, tokenizer: Tokenizer = TRAINED) -> Exported:
    model = fresh(config)
    run = saved(folder, model, tokenizer)
    return Exported(model, Path(run.run_dir) / "checkpoints" / "step-00000500", export(run))


def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """A matrix after a round trip through the format, by its own definition; q8_0: 32 integers and their scale in float16."""
    if precision != "q8_0":
        return weight.to({"f16": torch.float16, "bf16": torch.bfloat16}[precision]).float()
    blocks = weight.float().reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    return (scales.half().float() * (blocks * (1 / scales)).round()).view(weight.shape)


@torch.no_grad()
def rounded_model(model: Decoder, precision: str) -> Decoder:
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(rounded(weight, precision))
    return model


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Exported:
    return exported(tmp_path_factory.mktemp("one"), LLAMA)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_transformers_gives_the_logits_of_the_checkpoint_rounded_to_the_format(tmp_path, shape, tied, precision):
    config = replace(shape, tie_embeddings=tied, gguf_precision=precision, norm_eps=1e-3, rope_theta=500.0)
    found = exported(tmp_path, config)
    assert found.file.name == f"pretrain-step-00000500-{precision}.gguf"
    theirs, ids = found.opened(AutoModelForCausalLM), some_ids(config, 2, 20)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM")
    assert theirs.config.max_position_embeddings == config.context_length
    ours = logits_of(rounded_model(found.model, precision), ids)
    torch.testing.assert_close(theirs(ids).logits.detach(), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_checkpoint_in_16_bits_loses_nothing_in_its_own_format(tmp_path, precision):
    found = exported(tmp_path, replace(QWEN3, precision=precision, gguf_precision=precision.replace("fp", "f")))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(found.file).tensors}
    assert len(tensors) == len(list(found.model.parameters()))
    weights = dict(found.model.named_parameters())
    for ours, theirs in SAME_IN_BOTH.items():
        stored = tensors[theirs]
        values = gguf.dequantize(stored.data, stored.tensor_type)
        assert np.array_equal(values, weights[ours].detach().float().numpy())


SAME_IN_BOTH = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


@pytest.mark.parametrize("precision", FORMATS)
def test_norms_stay_float32_and_rows_that_fill_no_block_are_float16(tmp_path, precision):
    found = exported(tmp_path, replace(LLAMA, mlp_size=40, gguf_precision=precision))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(found.file).tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert kinds["blk.0.ffn_down.weight"] == ("BF16" if precision == "bf16" else "F16")
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == precision.upper()


def test_heads_of_any_width_and_their_scaled_positions_stand_in_the_file(tmp_path):
    """transformers reads no scaled positions: its own Llama says here what they are."""
    found = exported(tmp_path, replace(LLAMA, head_size=16, rope_scaling=SCALING, rope_theta=100.0))
    reader = gguf.GGUFReader(found.file)
    named = {name: reader.fields[f"llama.{name}"].contents() for name in KEYS}
    assert list(named.values()) == [24, 32, 2, 64, 4, 2, 16, 16, 16, 100.0]
    rotary = AutoModelForCausalLM.from_pretrained(found.checkpoint).model.rotary_emb
    plain = 100.0 ** (-torch.arange(0, 16, 2) / 16)
    (scales,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    torch.testing.assert_close(plain / torch.tensor(scales), rotary.inv_freq)
    assert not torch.equal(torch.tensor(scales), torch.ones(8))


def test_scaled_positions_of_a_qwen3_are_refused_because_llama_cpp_has_none(tmp_path):
    with pytest.raises(ValueError, match="^rope_scaling=[^\n]+ is not read by llama.cpp in a Qwen3[^\n]+$"):
        exported(tmp_path, replace(QWEN3, rope_scaling=SCALING))


KEYS = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(one):
    return one.opened(AutoTokenizer), AutoTokenizer.from_pretrained(one.checkpoint)


TEXTS = st.text(max_size=60) | st.text(st.sampled_from("a 1\n\r\t\u00e9e\u0301'lL\u00a0<|endoftext|>def"), max_size=60)


@given(text=TEXTS)
def test_transformers_tokenizer_gives_every_text_the_checkpoints_ids(tokenizers, text):
    theirs, own = tokenizers
    assert theirs(text).input_ids == own(text).input_ids
    assert theirs.decode(theirs(text).input_ids) == text


def test_transformers_tokenizer_knows_the_end_of_text(tokenizers):
    theirs, own = tokenizers
    for name in ("eos_token_id", "bos_token_id"):
        assert getattr(theirs, name) == getattr(own, name) == bpe.end_of_text_id(TRAINED)
    assert theirs("a<|endoftext|>").input_ids[-1] == bpe.end_of_text_id(TRAINED)


@pytest.mark.parametrize(
    ("name", "wanted"), [("qwen3", "qwen2"), ("llama3", "llama-bpe"), ("smollm", "smollm"), ("gpt2", "gpt-2")]
)
def test_a_published_tokenizer_is_named_as_llama_cpp_names_it_and_keeps_its_ids(tmp_path, name, wanted):
    tokenizer = bpe.load(placed(tmp_path, name, PUBLISHED[name]))
    found = exported(tmp_path, replace(LLAMA, vocab_size=640), tokenizer)
    fields = gguf.GGUFReader(found.file).fields
    assert fields["tokenizer.ggml.pre"].contents() == wanted
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (name == "llama3")
    assert fields["tokenizer.ggml.bos_token_id"].contents() == (
        bpe.begin_of_text_id(tokenizer) or bpe.end_of_text_id(tokenizer)
    )
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 640
    kinds = fields["tokenizer.ggml.token_type"].contents()
    for number, added in tokenizer.get_added_tokens_decoder().items():
        assert kinds[number] == (gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED)
    assert kinds.count(gguf.TokenType.UNUSED) == 640 - bpe.vocab_size(tokenizer) and kinds[40] == gguf.TokenType.NORMAL
    theirs, own = found.opened(AutoTokenizer), AutoTokenizer.from_pretrained(found.checkpoint)
    for text in (f"It's I'LL, 2024\r\n\n  \u00e9\u6f22 {own.eos_token} x_y", " a", ""):
        assert name == "smollm" or theirs(text).input_ids == own(text).input_ids


def with_pre_tokenizer(*parts: dict, ignore_merges: bool = False) -> Tokenizer:
    state = json.loads(bpe.to_json(TRAINED))
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(parts)}
    state["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(state))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
OTHERS = [
    (split(bpe.QWEN2_PATTERN.replace("'s|", "")), BYTES),
    (split(bpe.QWEN2_PATTERN), BYTES | {"add_prefix_space": True}),
    (split(bpe.QWEN2_PATTERN) | {"behavior": "Removed"}, BYTES),
    (split(bpe.QWEN2_PATTERN) | {"invert": True}, BYTES),
    ({"type": "Digits", "individual_digits": True}, BYTES),
    ({"type": "Digits", "individual_digits": False}, BYTES | {"use_regex": True}),
    (split(r"\p{N}{1,3}"), split(LLAMA3_PATTERN), BYTES),
    (BYTES,),
]


@pytest.mark.parametrize("parts", OTHERS, ids=lambda parts: json.dumps(parts)[-150:])
def test_a_way_to_split_text_that_has_no_name_is_refused_in_one_line(parts):
    with pytest.raises(ValueError, match="^its pre-tokenizer[^\n]+known are qwen2, llama-bpe[^\n]+$"):
        pre_tokenizer_name(with_pre_tokenizer(*parts))


def test_a_run_whose_way_to_split_text_has_no_name_is_refused(tmp_path):
    run = saved(tmp_path, fresh(LLAMA), with_pre_tokenizer(*OTHERS[0]))
    with pytest.raises(ValueError, match="its pre-tokenizer"):
        export(run)
    assert not list(tmp_path.rglob("*.gguf*"))


def test_whole_words_before_merges_are_part_of_the_name():
    pair = (split(LLAMA3_PATTERN), BYTES)
    assert pre_tokenizer_name(with_pre_tokenizer(*pair)) == "smaug-bpe"
    assert pre_tokenizer_name(with_pre_tokenizer(*pair, ignore_merges=True)) == "llama-bpe"
    with pytest.raises(ValueError, match="its pre-tokenizer"):
        pre_tokenizer_name(with_pre_tokenizer(split(bpe.QWEN2_PATTERN), BYTES, ignore_merges=True))


def test_a_run_on_raw_bytes_is_refused_with_the_reason(tmp_path):
    run = saved(tmp_path, fresh(replace(LLAMA, vocab_size=257)), RAW)
    with pytest.raises(ValueError, match="^vocab_size=257 is raw bytes: llama.cpp opens no vocabulary without merges"):
        export(run)


def test_numbers_beyond_float16_are_refused_and_leave_nothing(tmp_path):
    model = fresh(LLAMA)
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000.0
    run = saved(tmp_path, model, TRAINED)
    with pytest.raises(ValueError, match='^blk.1.ffn_up.weight has a number above 65504[^\n]+set gguf_precision="bf16"$'):
        export(replace(run, gguf_precision="f16"))
    assert not list(tmp_path.rglob("*.gguf*")) and export(run).is_file()


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint; run: deepspeed scripts/train_pretrain.py"):
        export(replace(LLAMA, run_dir=str(tmp_path)))


def test_the_package_that_is_missing_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'^a GGUF is written by the package gguf[^\n]+pip install -e "\.\[gguf\]"$'):
        export(replace(LLAMA, run_dir=str(tmp_path)))


@pytest.mark.parametrize("num_bytes", [0, 5000, 60_000])
def test_a_disk_that_fills_leaves_the_older_file_and_no_half_one(one, num_bytes):
    before, run = one.file.read_bytes(), replace(one.model.config, run_dir=str(one.file.parent))
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        with pytest.raises(ValueError, match="^[^\n]+ was not written: File too large; it needs [^\n]+ MiB were free[^\n]+$"):
            export(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one.file.read_bytes() == before and [path.name for path in one.file.parent.glob("*.gguf*")] == [one.file.name]
    assert not list(one.file.parent.glob(".*")) and export(run).read_bytes() == before


def test_a_file_that_cannot_be_written_is_refused_without_advice_to_make_room(tmp_path, one):
    folder = tmp_path / one.file.parent.name
    shutil.copytree(one.file.parent, folder, ignore=shutil.ignore_patterns("*.gguf"))
    (folder / ".other-step-00000001-f16.gguf.draft").touch()
    (folder / one.file.name).mkdir()
    with pytest.raises(ValueError, match="^[^\n]+ was not written: [^\n]+; make [^\n]+ can be written, and run[^\n]+ again$"):
        export(replace(one.model.config, run_dir=str(folder)))
    assert not list(folder.glob(".*"))


def command(run: TrainingConfig, *arguments: str) -> subprocess.CompletedProcess:
    """`python scripts/export_gguf.py` with this run as PRETRAIN."""
    code = f"""
import json, sys
from scripts import export_gguf
from scripts.config import TrainingConfig
fields = json.loads({json.dumps(asdict(run))!r})
fields = {{name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}}
export_gguf.PRETRAIN = TrainingConfig(**fields)
export_gguf.main()
"""
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_prints_the_file_and_refuses_arguments(one):
    run = replace(one.model.config, run_dir=str(one.file.parent))
    refused = command(run, "--outtype", "q8_0")
    assert refused.returncode == 2 and refused.stderr.startswith("refused: ") and "config.py" in refused.stderr
    done = command(replace(run, gguf_precision="q8_0"))
    assert (done.returncode, done.stdout) == (0, f"{one.file.with_stem('pretrain-step-00000500-q8_0')}\n"), done.stderr


def llama_cpp(found: Exported):
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python==0.3.36")
    return module.Llama(str(found.file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)


LLAMA_CPP = {
    "llama": LLAMA,
    "scaled": replace(LLAMA, head_size=16, rope_scaling=SCALING, rope_theta=100.0),
    "qwen3": replace(QWEN3, head_size=16, tie_embeddings=True),
}


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_gives_the_logits_and_the_ids_of_the_checkpoint(tmp_path, name):
    found = exported(tmp_path, replace(LLAMA_CPP[name], gguf_precision="f16"))
    theirs, own = llama_cpp(found), AutoTokenizer.from_pretrained(found.checkpoint)
    text = "It's I'LL, 2024\r\n\n  \u00e9\u6f22 x_y"
    ids = theirs.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == own(text).input_ids and theirs.detokenize(ids) == text.encode()
    theirs.eval(ids[:20])
    ours = logits_of(rounded_model(found.model, "f16"), torch.tensor([ids[:20]]))[0]
    torch.testing.assert_close(torch.tensor(theirs.scores[:20]), ours, rtol=0, atol=0.02 * ours.abs().max().item())
    theirs.reset()
    made = theirs.create_completion("def", max_tokens=16, temperature=0.0)["choices"][0]["text"]
    ours = stream(open_model(str(found.checkpoint)), b"def", 16, sampling=Sampling(0.0, 1, 1.0, 1.0), seed=0)
    assert made == b"".join(ours).decode(errors="ignore")  # As llama-cpp-python decodes what is no UTF-8.


@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm", "gpt2"])
def test_llama_cpp_splits_text_as_each_published_tokenizer_does(tmp_path, name):
    tokenizer = bpe.load(placed(tmp_path, name, PUBLISHED[name]))
    found = exported(tmp_path, replace(LLAMA, vocab_size=640), tokenizer)
    theirs, own = llama_cpp(found), AutoTokenizer.from_pretrained(found.checkpoint)
    for text in ("It's I'LL, 2024 12345\r\n\n  \u00e9\u6f22 x_y", " a", "def f(x):\n\treturn 1\n"):
        assert not set(text.encode()) & set(SMOLLM_LACKS)
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == own(text).input_ids
