"""Laws of scripts/model/huggingface.py: transformers' own numbers both ways, and nothing that is not computed exactly."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_decoder import CPU, TINY, configs, fresh, logits_of, some_ids
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.config import DISTILL, PRETRAIN
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import (
    SHAPE_FIELDS,
    architecture_fields,
    described_config,
    load_weights,
    teacher_config,
    tensor_shapes,
    transformers_config,
)

LLAMA = transformers_config(replace(TINY, qk_norm=False), 256)
VARIANTS = (
    {"model_type": "gpt2"},
    {"model_type": "mistral"},
    {"model_type": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"use_sliding_window": True},
)


def written(model: Decoder, folder: Path) -> Path:
    """A transformers folder without a tokenizer."""
    save_file(
        {name: weight.detach() for name, weight in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(transformers_config(model.config, 256)))
    return folder


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5, measured on the scale of the logits."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def assert_same_logits_and_gradients(model: Decoder, theirs, ids: torch.Tensor) -> None:
    """Training and inference may take different kernels, so both are compared."""
    assert_same(logits_of(model, ids), theirs(ids).logits.detach())
    gradient = torch.randn((*ids.shape, model.config.vocab_size), generator=torch.Generator().manual_seed(0))
    logits = functional.linear(model(ids), model.head)
    assert_same(logits.detach(), theirs(ids).logits.detach())
    (logits * gradient).sum().backward()
    (theirs(ids).logits * gradient).sum().backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    rounding = 1e-5 * torch.stack([each.norm() for each in wanted.values()]).norm()  # all that queries of one position get
    for name, weight in model.named_parameters():
        assert (weight.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + rounding, name


@given(config=configs(), rows=st.integers(1, 3), data=st.data())
def test_exported_model_gives_the_same_logits_in_transformers(tmp_path_factory, config, rows, data):
    folder, model = tmp_path_factory.mktemp("ours"), fresh(config)
    theirs = AutoModelForCausalLM.from_pretrained(written(model, folder))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32
    assert sum(weight.numel() for weight in theirs.parameters()) == config.num_parameters
    assert_same_logits_and_gradients(model, theirs, some_ids(config, rows, data.draw(st.integers(1, config.context_length))))


@given(config=configs(), rows=st.integers(1, 3), sharded=st.booleans(), data=st.data())
def test_transformers_own_folder_gives_the_same_logits_here(tmp_path_factory, config, rows, sharded, data):
    folder, described = tmp_path_factory.mktemp("theirs"), transformers_config(config, 256)
    torch.manual_seed(config.seed)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**described, "initializer_range": 0.2})).eval()
    theirs.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    assert not sharded or config.num_parameters < 10_000 or len(list(folder.glob("*.safetensors"))) > 1
    found = described_config(folder)
    for name in (*architecture_fields(described), "context_length", "precision"):
        assert getattr(found, name) == getattr(config, name), name
    model = empty_model(found, CPU)
    load_weights(model, folder)
    assert_same_logits_and_gradients(model, theirs, some_ids(config, rows, data.draw(st.integers(1, config.context_length))))


@given(config=configs())
def test_tensor_shapes_are_those_of_the_model_and_its_description_leads_back_to_it(config):
    model = empty_model(config, CPU)
    assert tensor_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    fields = architecture_fields(transformers_config(config, 256))
    assert replace(config, **fields) == config and {*fields} >= {"num_heads", "norm_eps", "rope_theta", "tie_embeddings"}


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_architecture_that_is_not_computed_exactly_is_refused(change):
    architecture_fields(LLAMA)
    with pytest.raises(ValueError, match="^[^\n]+ not supported; [^\n]+$"):
        architecture_fields(LLAMA | change)


@given(config=configs())
def test_a_teacher_has_the_same_shape_by_its_run_and_by_its_transformers_folder(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("teacher")
    student = replace(TINY, teacher_dir=str(folder), teacher_top_k=4, activation_checkpointing="block")
    for description in (asdict(config), transformers_config(config, 256)):
        (folder / "config.json").write_text(json.dumps(description))
        found = teacher_config(student)
        assert found is not None and tensor_shapes(found) == tensor_shapes(config)
        assert (found.context_length, found.precision) == (student.context_length, student.precision)
        assert (found.teacher_dir, found.teacher_top_k, found.activation_checkpointing) == (None, None, "none")


def test_the_teacher_is_of_pretrains_shape_before_that_run_has_begun_and_none_without_a_teacher_dir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = teacher_config(DISTILL)
    assert found is not None and all(getattr(found, name) == getattr(PRETRAIN, name) for name in SHAPE_FIELDS)
    assert teacher_config(PRETRAIN) is None


def test_a_teacher_that_is_not_there_is_refused_with_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match="^teacher_dir=[^\n]+config.json is not there; deepspeed scripts/train_pretrain.py"):
        teacher_config(replace(TINY, teacher_dir=str(tmp_path)))


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"vocab', *(json.dumps(LLAMA | change) for change in VARIANTS)])
def test_a_teacher_that_is_no_model_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="^teacher_dir=[^\n]+describes no model[^\n]+; name a run or a transformers folder$"):
        teacher_config(replace(TINY, teacher_dir=str(tmp_path)))


def test_reading_a_folder_changes_nothing_in_it(tmp_path):
    written(fresh(TINY), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    load_weights(empty_model(TINY, CPU), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
