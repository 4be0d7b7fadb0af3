"""Laws of scripts/config.py: every bad value is refused in one line that names the field and a value that works."""

import ast
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, clean_environment
from hypothesis import assume, example, given
from hypothesis import strategies as st

from scripts import config as config_module
from scripts.config import (
    AT_LEAST,
    TrainingConfig,
    refuse_arguments,
    refusing,
)
from scripts.model.decoder import Decoder
from scripts.run.setup import refuse_on_this_machine

ROOT = Path(config_module.__file__).parents[1]
NAN, INF = math.nan, math.inf
LAUNCHER_FREE = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
BASE: dict[str, Any] = {
    "vocab_size": 4096, "context_length": 256, "hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2,
    "mlp_size": 704, "tokens_per_step": 8192, "micro_batch_rows": 8, "num_steps": 300, "warmup_steps": 20, "schedule": "cosine",
    "learning_rate": 3e-3, "min_learning_rate": 3e-4, "eval_every_steps": 100, "eval_tokens": 2**20, "precision": "fp32",
    "data_dir": "no-data", "corpus": (__file__,),
}  # fmt: skip
CONTRACT = {
    "run_dir", "data_dir", "corpus", "text_field", "validation_fraction", "vocab_size", "tokenizer_path", "context_length",
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "mlp_size", "qk_norm", "tie_embeddings", "rope_theta",
    "tokens_per_step", "micro_batch_rows", "num_steps", "learning_rate", "min_learning_rate", "warmup_steps", "schedule",
    "beta1", "beta2", "adam_eps", "weight_decay", "max_grad_norm", "precision", "offload_optimizer",
    "activation_checkpointing", "loss_chunk_rows", "log_every_steps", "eval_every_steps", "sample_every_steps",
    "save_every_steps", "keep_checkpoints", "seed", "init_from", "teacher_dir",
}  # fmt: skip
TOO_SMALL = [(name, {name: least - 1}) for name, least in AT_LEAST.items()]
BAD = [
    *TOO_SMALL,
    ("hidden_size", {"hidden_size": -256}),
    ("num_steps", {"num_steps": -(2**70)}),
    ("num_heads", {"num_heads": 3}),
    ("num_heads", {"num_heads": 512}),
    ("num_heads", {"hidden_size": 250}),
    ("num_kv_heads", {"num_kv_heads": 3}),
    ("num_kv_heads", {"num_kv_heads": 8}),
    ("num_kv_heads", {"num_heads": 1}),
    ("head_size", {"head_size": 33}),
    ("head_size", {"hidden_size": 12}),
    ("tokens_per_step", {"tokens_per_step": 8191}),
    ("tokens_per_step", {"tokens_per_step": 1024}),
    ("tokens_per_step", {"context_length": 100}),
    ("tokens_per_step", {"micro_batch_rows": 3}),
    ("first_tokens_per_step", {"first_tokens_per_step": 4096}),
    ("first_tokens_per_step", {"first_tokens_per_step": 3000, "batch_warmup_steps": 9}),
    ("first_tokens_per_step", {"first_tokens_per_step": 1024, "batch_warmup_steps": 9}),
    ("first_tokens_per_step", {"first_tokens_per_step": 6144, "batch_warmup_steps": 9}),
    ("first_tokens_per_step", {"first_tokens_per_step": 8192, "batch_warmup_steps": 9}),
    ("first_tokens_per_step", {"first_tokens_per_step": 2048, "batch_warmup_steps": 9, "tokens_per_step": 2048}),
    ("batch_warmup_steps", {"batch_warmup_steps": 9}),
    ("batch_warmup_steps", {"first_tokens_per_step": 2048, "batch_warmup_steps": 301}),
    ("eval_tokens", {"eval_tokens": 255}),
    ("teacher_top_k", {"teacher_top_k": 32}),
    ("teacher_top_k", {"teacher_top_k": 4096, "teacher_dir": "teacher"}),
    ("distill_weight", {"distill_weight": 1.5}),
    ("distill_weight", {"distill_weight": 0.0}),
    ("distill_temperature", {"distill_temperature": -1.0}),
    ("distill_divergence", {"distill_divergence": "backward"}),
    ("warmup_steps", {"warmup_steps": 300}),
    ("warmup_steps", {"num_steps": 20}),
    ("min_learning_rate", {"min_learning_rate": 4e-3}),
    ("min_learning_rate", {"learning_rate": 1e-4}),
    ("learning_rate", {"learning_rate": NAN}),
    ("learning_rate", {"learning_rate": INF}),
    ("learning_rate", {"learning_rate": -1e-3}),
    ("learning_rate", {"learning_rate": 0}),
    ("min_learning_rate", {"min_learning_rate": -1e-9}),
    ("min_learning_rate", {"min_learning_rate": NAN}),
    ("weight_decay", {"weight_decay": -0.1}),
    ("weight_decay", {"weight_decay": INF}),
    ("adam_eps", {"adam_eps": 0.0}),
    ("max_grad_norm", {"max_grad_norm": -1.0}),
    ("max_grad_norm", {"max_grad_norm": INF}),
    ("rope_theta", {"rope_theta": 0.0}),
    ("norm_eps", {"norm_eps": 0.0}),
    ("rope_scaling", {"rope_scaling": (8.0, 1.0, 4.0)}),
    ("rope_scaling", {"rope_scaling": (8.0, 4.0, 1.0, 8192)}),
    ("rope_scaling", {"rope_scaling": (8.0, 1.0, 4.0, "8192")}),
    ("rope_scaling", {"rope_scaling": (8.0, 1.0, INF, 8192)}),
    ("init_std", {"init_std": 0.0}),
    ("logits_init_std", {"logits_init_std": -0.3}),
    ("embedding_init_std", {"embedding_init_std": 0.0}),
    ("num_heads", {"hidden_size": 250, "num_heads": 4, "head_size": 64, "qk_norm": False}),
    ("seed", {"seed": 2**32}),
    ("learning_rate", {"learning_rate": 10**400}),
    ("run_dir", {"run_dir": "runs/a\0b"}),
    ("sample_temperature", {"sample_temperature": -1.0}),
    ("beta1", {"beta1": 1.0}),
    ("beta1", {"beta1": -0.1}),
    ("beta2", {"beta2": 1}),
    ("beta2", {"beta2": NAN}),
    ("precision", {"precision": "float32"}),
    ("precision", {"precision": ""}),
    ("schedule", {"schedule": "step"}),
    ("optimizer", {"optimizer": "sgd"}),
    ("muon_learning_rate", {"optimizer": "muon", "muon_learning_rate": 0.0}),
    ("muon_learning_rate", {"optimizer": "muon", "muon_learning_rate": INF}),
    ("muon_learning_rate", {"optimizer": "adamw", "muon_learning_rate": 1e-3}),
    ("muon_momentum", {"muon_momentum": 1.0}),
    ("muon_momentum", {"muon_momentum": -0.1}),
    ("muon_first_momentum", {"muon_first_momentum": 1.0}),
    ("muon_first_momentum", {"muon_first_momentum": -0.1}),
    ("muon_first_momentum", {"muon_momentum_warmup_steps": None}),
    ("muon_momentum_warmup_steps", {"muon_first_momentum": None}),
    ("muon_momentum_warmup_steps", {"muon_momentum_warmup_steps": 0}),
    ("optimizer_state_precision", {"optimizer_state_precision": "fp16"}),
    ("activation_checkpointing", {"activation_checkpointing": "full"}),
    ("accumulate_on", {"accumulate_on": "disk"}),
    ("compile_kernels", {"compile_kernels": "cuda"}),
    ("accumulate_on", {"offload_optimizer": False}),
    ("accumulation_precision", {"accumulation_precision": "fp16"}),
    ("accumulation_precision", {"accumulation_precision": "bf16"}),
    ("accumulation_precision", {"accumulate_on": "gpu", "accumulation_precision": "bf16", "precision": "fp32"}),
    ("decay_steps", {"schedule": "wsd"}),
    ("decay_steps", {"decay_steps": 10}),
    ("decay_steps", {"schedule": "wsd", "decay_steps": 281}),
    ("validation_fraction", {"validation_fraction": 1.0}),
    ("validation_fraction", {"validation_fraction": -0.05}),
    ("validation_fraction", {"validation_fraction": 0.0}),
    ("corpus", {"corpus": ()}),
    ("corpus", {"corpus": ("",)}),
    ("max_skipped_steps", {"max_skipped_steps": 0}),
    ("spike_window_steps", {"spike_window_steps": 1}),
    ("spike_sigmas", {"spike_sigmas": 0.0}),
    ("silent_rank_seconds", {"silent_rank_seconds": 1}),
    ("corpus", {"corpus": "text.txt"}),
    ("corpus", {"corpus": ["text.txt"]}),
    ("corpus", {"corpus": (1,)}),
    ("corpus_weights", {"corpus_weights": (0.5, 0.5)}),
    ("corpus_weights", {"corpus_weights": ()}),
    ("corpus_weights", {"corpus_weights": (0.0,)}),
    ("corpus_weights", {"corpus_weights": (-1.0,)}),
    ("corpus_weights", {"corpus_weights": (NAN,)}),
    ("corpus_weights", {"corpus_weights": (INF,)}),
    ("corpus_weights", {"corpus_weights": (True,)}),
    ("corpus_weights", {"corpus_weights": ("1",)}),
    ("corpus_weights", {"corpus_weights": 0.5}),
    ("corpus_weights", {"corpus": (__file__, "b"), "corpus_weights": (1.0, 1e-6)}),
    ("mask_across_documents", {"mask_across_documents": 1}),
    ("corpus_exclude", {"corpus_exclude": "tests"}),
    ("corpus_exclude", {"corpus_exclude": (None,)}),
    ("text_field", {"text_field": ""}),
    ("document_separator", {"document_separator": ""}),
    ("document_separator", {"document_separator": b"x"}),
    ("document_separator", {"document_separator": "\ud800"}),
    ("shortest_document_characters", {"shortest_document_characters": 0}),
    ("shortest_document_characters", {"shortest_document_characters": 9, "longest_document_characters": 8}),
    ("longest_document_characters", {"longest_document_characters": 0}),
    ("dask_scheduler", {"dask_scheduler": ""}),
    ("validation_corpus", {"validation_corpus": "held"}),
    ("validation_corpus", {"validation_corpus": ("",)}),
    ("validation_corpus", {"validation_corpus": (1,)}),
    ("skip_faulty_rows", {"skip_faulty_rows": 1}),
    ("sample_prompt", {"sample_prompt": ""}),
    ("sample_top_p", {"sample_top_p": 0.0}),
    ("sample_top_p", {"sample_top_p": 1.01}),
    ("sample_repetition_penalty", {"sample_repetition_penalty": 0.0}),
    ("sample_stop", {"sample_stop": ("",)}),
    ("sample_stop", {"sample_stop": (1,)}),
    ("sample_stop", {"sample_stop": ("a\ud800",)}),
    ("sample_stop", {"sample_stop": "def"}),
    ("sample_checkpoint", {"sample_checkpoint": "last"}),
    ("model_license", {"model_license": ""}),
    ("model_license", {"model_license": "mit\nmodel: x"}),
    ("gguf_precision", {"gguf_precision": "q4_0"}),
    ("tracker", {"tracker": "mlflow"}),
    ("run_dir", {"run_dir": ""}),
    ("run_dir", {"run_dir": None}),
    ("data_dir", {"run_dir": "same", "data_dir": "./same"}),
    ("data_dir", {"data_dir": Path("data")}),
    ("tokenizer_path", {"vocab_size": 257, "tokenizer_path": "tokenizer.json"}),
    ("tokenizer_path", {"tokenizer_path": 1}),
    ("begin_of_text", {"begin_of_text": True}),
    ("begin_of_text", {"begin_of_text": 1, "tokenizer_path": "tokenizer.json"}),
    ("end_of_text", {"end_of_text": "<|end|>"}),
    ("end_of_text", {"end_of_text": "", "tokenizer_path": "tokenizer.json"}),
    ("num_layers", {"num_layers": True}),
    ("num_layers", {"num_layers": 6.0}),
    ("num_layers", {"num_layers": 6.7}),
    ("num_layers", {"num_layers": INF}),
    ("num_layers", {"num_layers": None}),
    ("num_layers", {"num_layers": "6"}),
    ("eval_every_steps", {"eval_every_steps": False}),
    ("qk_norm", {"qk_norm": 1}),
    ("offload_optimizer", {"offload_optimizer": "cpu"}),
    ("learning_rate", {"learning_rate": "3e-3"}),
    ("beta1", {"beta1": True}),
    ("precision", {"precision": torch.float32}),
]


def made(**changes) -> TrainingConfig:
    return TrainingConfig(**BASE | changes)


def refusal(**changes) -> str:
    with pytest.raises(ValueError) as caught:
        made(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advice(message: str, field: str) -> dict:
    """The change that a refusal proposes: the first `nearest is 3`, `nearest is data_dir="x"`, `set head_size=4`; or none."""
    found = re.search(r"(?:nearest is|set) (?:(\w+)=)?(\"\S+\"|None|[\d.e-]+)", message)
    return {found[1] or field: ast.literal_eval(found[2].rstrip("."))} if found else {}


@pytest.mark.parametrize(("field", "changes"), BAD, ids=[", ".join(f"{k}={v!r}" for k, v in bad.items()) for _, bad in BAD])
def test_bad_value_is_refused_in_one_line_that_names_the_field_and_a_remedy_that_ends_it(field, changes):
    message = refusal(**changes)
    assert re.search(rf"\b{field}\b", message) and len(message) < 250
    remedy = advice(message, field)
    assert remedy or re.search(r"; (the default is|write|name|set) |; one of .+ works", message)
    try:
        made(**changes | remedy)
    except ValueError as other:
        assert not remedy or law(str(other)) != law(message)


@given(rows=st.integers(1, 5000))
def test_share_of_a_source_that_a_refusal_names_is_valid(rows):
    step = {"context_length": 1, "micro_batch_rows": 1, "tokens_per_step": rows, "corpus": ("one", "other")}
    found = re.search(r"write a share of 1/(\d+) or more$", refusal(corpus_weights=(1e-9, 1), **step))
    assert found
    made(corpus_weights=(1 / int(found[1]), 1 - 1 / int(found[1])), **step)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(-2, 40)
            for name in (
                "hidden_size", "num_heads", "num_kv_heads", "head_size", "micro_batch_rows", "context_length", "eval_tokens",
                "tokens_per_step", "first_tokens_per_step", "batch_warmup_steps", "num_steps", "warmup_steps", "decay_steps",
                "validation_fraction", "vocab_size", "num_layers", "muon_momentum_warmup_steps",
            )
        },
    )
)  # fmt: skip
def test_who_takes_the_advice_of_each_refusal_arrives_at_a_valid_config(changes):
    refusals = []
    for _ in range(20):
        try:
            made(**changes)
            return
        except ValueError as caught:
            refusals.append(str(caught))
            changes = changes | (advice(refusals[-1], refusals[-1].split("=")[0]) or default_of(refusals[-1]))
    pytest.fail("\n".join(refusals))


def law(message: str) -> str:
    return re.sub(r"-?\d[\d.e-]*", "N", message.split(";")[0])


def default_of(message: str) -> dict:
    found = re.search(r"^(\w+)=.*; the default is (\S+)$", message)
    return {found[1]: ast.literal_eval(found[2])} if found else {}


def test_every_field_has_a_bad_value_that_is_known():
    unconstrained = {"tie_embeddings", "init_from", "teacher_dir"}
    assert {field.name for field in fields(TrainingConfig)} - {field for field, _ in BAD} == unconstrained
    for name in unconstrained:
        assert name in refusal(**{name: 1})


@given(
    tokens=st.integers(1, 2**16),
    rows=st.integers(1, 9),
    context=st.integers(1, 99),
    world_size=st.sampled_from([1, 2, 3, 8]),
)
def test_remainder_of_a_step_names_the_nearest_sizes_on_both_sides(tokens, rows, context, world_size):
    unit = rows * context * world_size
    assume(tokens % unit)
    batch = {"micro_batch_rows": rows, "context_length": context}
    with pytest.raises(ValueError, match=f"^tokens_per_step={tokens} ") as caught:
        made(**batch, tokens_per_step=tokens).accumulation_steps(world_size)
    sizes, _, fewer_rows = str(caught.value).split("nearest is")[1].partition(", or set micro_batch_rows=")
    named = [int(number) for number in re.findall(r"\d+", sizes)]
    if fewer_rows:
        fitting = made(context_length=context, tokens_per_step=tokens, micro_batch_rows=int(fewer_rows))
        assert fitting.accumulation_steps(world_size if tokens % (rows * context) == 0 else 1) >= 1
    fits_one_rank = tokens % (rows * context) == 0
    assert named == [size for size in neighbours(tokens, unit if fits_one_rank else rows * context) if size]
    for size in named:
        fitting = made(**batch, tokens_per_step=size)
        assert fitting.accumulation_steps(world_size if fits_one_rank else 1) >= 1


@given(rows=st.integers(1, 4), whole=st.integers(2, 60), first=st.integers(1, 500), world_size=st.sampled_from([1, 2, 3]))
@example(rows=4, whole=6, first=8, world_size=2)
def test_first_step_that_does_not_divide_names_the_nearest_size_that_works(rows, whole, first, world_size):
    """And, where it only needs smaller micro-batches, the largest of those."""
    unit = rows * world_size
    sizes = [size for size in range(unit, whole * unit, unit) if whole * unit % size == 0]
    assume(first not in sizes)
    batch = {"context_length": 1, "micro_batch_rows": rows, "tokens_per_step": whole * unit, "batch_warmup_steps": 9}
    with pytest.raises(ValueError, match=f"^first_tokens_per_step={first} ") as caught:
        made(**batch, first_tokens_per_step=first).accumulation_steps(world_size)
    if f"world size = {unit} " not in str(caught.value):
        return
    (nearest,) = advice(str(caught.value), "first_tokens_per_step").values()
    assert abs(nearest - first) == min(abs(size - first) for size in sizes)
    assert made(**batch, first_tokens_per_step=nearest).accumulation_steps(world_size) == whole
    fewer = [n for n in range(1, rows) if first % (n * world_size) == 0 == whole * unit % first and first < whole * unit]
    found = re.search(r"set micro_batch_rows=(\d+)", str(caught.value))
    assert (found and int(found[1])) == max(fewer, default=None)


def neighbours(number: int, unit: int) -> tuple[int, int]:
    return number // unit * unit, number // unit * unit + unit


@given(hidden=st.integers(1, 300), heads=st.integers(1, 40), kv_heads=st.integers(1, 40))
def test_heads_that_do_not_divide_name_the_nearest_divisor(hidden, heads, kv_heads):
    assume(hidden % heads or heads % kv_heads)
    message = refusal(hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads)
    number, wanted, name = (hidden, heads, "num_heads") if hidden % heads else (heads, kv_heads, "num_kv_heads")
    nearest = int(message.split("nearest is ")[1])
    assert message.startswith(f"{name}={wanted} does not divide")
    assert number % nearest == 0
    assert all(number % n for n in range(1, 301) if abs(n - wanted) < abs(nearest - wanted))


def test_config_is_frozen_and_keyword_only_and_replace_checks_again():
    with pytest.raises(FrozenInstanceError):
        made().num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]
    kinds = {parameter.kind for parameter in inspect.signature(TrainingConfig).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(ValueError, match="num_layers=0"):
        replace(made(), num_layers=0)


def test_every_field_of_the_contract_exists():
    assert not CONTRACT - {field.name for field in fields(TrainingConfig)}


@st.composite
def batches(draw):
    rows, context, accumulation = draw(st.integers(1, 64)), draw(st.integers(1, 4096)), draw(st.integers(1, 64))
    world_size = draw(st.integers(1, 64))
    tokens = rows * context * accumulation * world_size
    return world_size, {"micro_batch_rows": rows, "context_length": context, "tokens_per_step": tokens}


@st.composite
def shapes(draw):
    kv_heads, head_size, qk_norm = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4, 6, 32])), draw(st.booleans())
    heads, named = kv_heads * draw(st.integers(1, 4)), draw(st.booleans())
    free_width = draw(st.integers(1, 99)) if qk_norm else heads * draw(st.integers(1, 9))
    return {
        "num_heads": heads, "num_kv_heads": kv_heads, "qk_norm": qk_norm, "tie_embeddings": draw(st.booleans()),
        "head_size": head_size if named else None, "hidden_size": free_width if named else heads * head_size,
        "mlp_size": draw(st.integers(1, 99)), "num_layers": draw(st.integers(1, 3)), "vocab_size": draw(st.integers(257, 999)),
    }  # fmt: skip


@given(batch=batches(), shape=shapes(), norm=st.floats(1e-3, 9.0), precision=st.sampled_from(["bf16", "fp16", "fp32"]))
def test_deepspeed_dict_is_stage_2_and_its_batch_adds_up(batch, shape, norm, precision):
    world_size, sizes = batch
    config = made(**sizes, **shape, max_grad_norm=norm, precision=precision, offload_optimizer=True)
    dictionary = TrainingConfig.deepspeed_config(config, world_size)
    micro, accumulation = dictionary["train_micro_batch_size_per_gpu"], dictionary["gradient_accumulation_steps"]
    assert dictionary["train_batch_size"] == micro * accumulation * world_size
    assert micro == config.micro_batch_rows and dictionary["train_batch_size"] * config.context_length == config.tokens_per_step
    zero = dictionary["zero_optimization"]
    assert (zero["stage"], zero["contiguous_gradients"], zero["offload_optimizer"]["device"]) == (2, True, "cpu")
    for bucket in (zero["reduce_bucket_size"], zero["allgather_bucket_size"]):
        assert bucket % 2 == 0 and 0 <= bucket - config.block_parameters <= 1
    assert dictionary["gradient_clipping"] == norm
    assert dictionary["data_types"] == {"grad_accum_dtype": precision} and not zero["offload_optimizer"]["pin_memory"]
    assert {name for name in ("bf16", "fp16") if dictionary[name]["enabled"]} == {precision} - {"fp32"}
    json.dumps(dictionary)


def test_buckets_are_even_when_a_block_is_not():
    config = made(hidden_size=5, head_size=2, num_heads=1, num_kv_heads=1, mlp_size=3)
    zero = TrainingConfig.deepspeed_config(config, 1)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == config.block_parameters + 1


def test_optimizer_stays_on_the_device_when_it_is_not_offloaded():
    dictionary = TrainingConfig.deepspeed_config(made(offload_optimizer=False, accumulate_on="gpu"), 1)
    assert dictionary["zero_optimization"]["offload_optimizer"]["device"] == "none"


def test_optimizer_gets_the_numbers_of_the_config():
    config = made(learning_rate=0.5, beta1=0.1, beta2=0.2, adam_eps=0.3, weight_decay=0.4)
    dictionary = TrainingConfig.deepspeed_config(config, 1)["optimizer"]
    assert dictionary == {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.1, 0.2], "eps": 0.3, "weight_decay": 0.4}}


def test_world_size_that_does_not_divide_is_refused_by_the_deepspeed_dict_and_by_the_machine():
    config = made()
    for check in (TrainingConfig.deepspeed_config, refuse_on_this_machine):
        with pytest.raises(ValueError, match=r"tokens_per_step=8192 .* = 6144; nearest is 6144 and 12288"):
            check(config, 3)


@given(shape=shapes())
def test_number_of_parameters_is_that_of_the_real_model(shape):
    config = made(**shape)
    with torch.device("meta"):
        model = Decoder(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.block_parameters == sum(parameter.numel() for parameter in model.model.layers[0].parameters())


@pytest.mark.parametrize("field", ["tokenizer_path", "init_from", "teacher_dir"])
def test_path_that_is_not_there_is_refused_before_training_not_in_the_config(tmp_path, field):
    config = made(**{field: f"{tmp_path}/absent"})
    with pytest.raises(ValueError, match=f"^{field}='{tmp_path}/absent' is not there; [^\n]*name [^\n]+$"):
        refuse_on_this_machine(config, 1)
    (tmp_path / "absent").mkdir()
    refuse_on_this_machine(config, 1)


def test_corpus_that_is_not_there_is_refused_unless_the_data_is_prepared(tmp_path):
    config = made(corpus=(f"{tmp_path}/*.none", f"{tmp_path}/absent"), data_dir=f"{tmp_path}")
    with pytest.raises(ValueError, match=f"^corpus: '{tmp_path}/absent' is not there; name [^\n]+$"):
        refuse_on_this_machine(config, 1)
    (tmp_path / "manifest.json").touch()
    refuse_on_this_machine(config, 1)


@pytest.mark.parametrize("arguments", [[], ["--local_rank=0"], ["--local-rank=11"]])
def test_launchers_own_argument_passes(arguments):
    refuse_arguments(arguments)


@pytest.mark.parametrize(
    "word",
    ["--learning_rate=1", "--local_rank=", "--local_rank=a", "x--local_rank=0", "--local_rank=0\n", "-h", "", "config.py"],
)
def test_any_other_argument_is_refused_with_a_pointer_to_the_config(word):
    with pytest.raises(ValueError, match=r"no command-line arguments; edit PRETRAIN or DISTILL in scripts/config\.py$"):
        refuse_arguments(["--local_rank=0", word])


@pytest.mark.parametrize(
    ("ranks", "speaks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_LOCALID": "0"}, True),
        ({"SLURM_LOCALID": "3"}, False),
    ],
)
def test_refusal_exits_with_2_and_one_rank_a_machine_speaks(monkeypatch, capsys, ranks, speaks):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_, refusing():
        raise ValueError("a\nvalue; law; nearest")
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "refused: a\\nvalue; law; nearest\n" if speaks else "")


def test_refusing_lets_every_other_error_through():
    with pytest.raises(KeyError), refusing():
        raise KeyError("not a refusal")


def test_preset_edited_to_a_bad_value_gives_one_line_and_status_2(tmp_path):
    text = (ROOT / "scripts" / "config.py").read_text()
    (tmp_path / "config.py").write_text(
        text.replace("PRETRAIN = TrainingConfig()", "PRETRAIN = TrainingConfig(hidden_size=-1)")
    )
    ran = subprocess.run([sys.executable, "config.py"], cwd=tmp_path, env=LAUNCHER_FREE, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "refused: hidden_size=-1 is below 1; nearest is 1\n"


COMMANDS = ("memory", "prepare_data", "generate", "train_pretrain", "train_distill")


@pytest.mark.slow
@pytest.mark.parametrize(("names", "pasted", "line"), [
    (COMMANDS, "PRETRAIN = replace(PRETRAIN, num_steps=-1)", "num_steps=-1 is below 1; nearest is 1"),
    (["memory"], 'PRETRAIN = TrainingConfig("runs/books")', "TrainingConfig('runs/books') names no field; write field=value"),
    (["generate"], "GPU_4GB = replace(GPU_4GB, hiden_size=9)",
     "hiden_size is no field of TrainingConfig; nearest is hidden_size"),
])  # fmt: skip
def test_a_wrong_preset_ends_every_command_in_one_line_and_status_2(tmp_path, names, pasted, line):
    for folder in ("ds", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    with (tmp_path / "scripts" / "config.py").open("a") as config:
        config.write(f"\n{pasted}\n")
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    commands = [[sys.executable, str(tmp_path / "scripts" / f"{name}.py")] for name in names]
    running = [subprocess.Popen(each, env=environment, text=True, stderr=subprocess.PIPE, cwd=tmp_path) for each in commands]
    for command, process in zip(commands, running, strict=True):
        _, words = process.communicate(timeout=400)
        assert process.returncode == 2 and words == f"refused: {line}\n", (command, words)
