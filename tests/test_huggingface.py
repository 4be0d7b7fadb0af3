"""Laws of scripts/model/huggingface.py: transformers' own numbers both ways, and nothing that is not computed exactly."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_decoder import CPU, TINY, configs, fresh, logits_of, some_ids
from test_generate import chain
from test_generate import written as saved
from test_tokenizer import BYTE_LEVEL, PUBLISHED, SMOLLM_LACKS, placed
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from scripts.config import DISTILL, PRETRAIN
from scripts.model.decoder import Decoder, empty_model
from scripts.model.huggingface import (
    SHAPE_FIELDS,
    architecture_fields,
    described_config,
    load_weights,
    model_card,
    teacher_config,
    tensor_shapes,
    transformers_config,
)
from scripts.prepare_data import Data, prepare
from scripts.run.checkpoint import model_texts

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


SIZES = {"raw": 257, "own": 400, "qwen3": 603, "llama3": 601, "smollm": 580, "gpt2": 600, "deepseek": 602}


def drawn_texts() -> list[str]:
    """1,000 texts of words, whitespace, digits, apostrophes, and characters of every plane; none is empty."""
    draw = random.Random(0)
    words = [
        "don't",
        " the",
        "\n\n",
        "  ",
        "\t",
        "12345",
        "'LL",
        "caf\u00e9",
        "e\u0301",
        "\u6f22\u5b57",
        "return",
        "\r\n",
        "<think>",
    ]

    def part() -> str:
        numbers = draw.choice((range(1, 0x7F), range(0x80, 0x800), range(0x800, 0xD800), range(0xE000, 0x110000)))
        return draw.choice(words) if draw.random() < 0.7 else chr(draw.choice(numbers))

    return [f"{number}" + "".join(part() for _ in range(draw.randrange(30))) for number in range(1000)]


TEXTS = drawn_texts()


def kept_texts(name: str) -> list[str]:
    return [text for text in TEXTS if name != "smollm" or not set(text.encode()) & set(SMOLLM_LACKS)]


def prepared(folder: Path, name: str, **changes) -> Data:
    """Shards of `kept_texts`."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in kept_texts(name))
    (folder / "corpus.jsonl").write_text(lines)
    tokenizer = str(placed(folder, name, PUBLISHED[name])) if name in PUBLISHED else None
    fields = {"data_dir": f"{folder}/data", "run_dir": f"{folder}/run", "corpus": (f"{folder}/corpus.jsonl",)}
    fields |= {"validation_fraction": 0.0, "eval_every_steps": None, "vocab_size": SIZES[name], "tokenizer_path": tokenizer}
    return prepare(replace(TINY, **(fields | changes)))


def documents_of(data: Data) -> list[list[int]]:
    """The ids of each document in the shards, without the end of text."""
    found: list[list[int]] = [[]]
    for number in data.train.read(0, data.train.num_tokens).tolist():
        if number == data.end_of_text_id:
            found.append([])
        else:
            found[-1].append(number)
    assert found.pop() == []
    return found


@pytest.mark.parametrize("begin_of_text", [None, False])
@pytest.mark.parametrize("name", SIZES)
def test_the_exported_tokenizer_gives_a_text_the_ids_of_its_document_in_the_shards(tmp_path, name, begin_of_text):
    data, folder = prepared(tmp_path, name, begin_of_text=begin_of_text), tmp_path / "model"
    folder.mkdir()
    for file, text in model_texts(replace(TINY, vocab_size=SIZES[name]), data.tokenizer_json, data.end_of_text_id).items():
        (folder / file).write_text(text)
    theirs, documents = AutoTokenizer.from_pretrained(folder), documents_of(data)
    assert [theirs(text).input_ids for text in kept_texts(name)] == documents
    assert [data.encode(text) for text in kept_texts(name)[:50]] == documents[:50]
    spelled = "a<|endoftext|><|im_end|> <|begin_of_text|>"
    assert theirs(spelled, split_special_tokens=True).input_ids == data.encode(spelled)
    begins = name in ("llama3", "deepseek") and begin_of_text is None
    assert {ids[0] for ids in documents} == {599} if begins else 599 not in {ids[0] for ids in documents}
    for each in (theirs, AutoConfig.from_pretrained(folder)):
        assert (each.bos_token_id, each.eos_token_id) == (599 if begins else data.end_of_text_id, data.end_of_text_id)


TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("field", ["teacher_dir", "init_from", "tokenizer_path"])
def test_a_chat_template_is_kept_from_where_the_tokenizer_comes(tmp_path, place, field):
    data, source, folder = prepared(tmp_path, "gpt2"), tmp_path / "source", tmp_path / "model"
    for made in (source, folder):
        made.mkdir()
    (source / place).write_text(TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": TEMPLATE}))
    config = replace(TINY, vocab_size=SIZES["gpt2"], **{field: str(source)})
    for file, text in model_texts(config, data.tokenizer_json, data.end_of_text_id).items():
        (folder / file).write_text(text)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert "is kept" in model_card(config, 1, None) and "it has none" in model_card(TINY, 1, None)
    (source / place).write_text("x" * 2**19)
    assert "it has none" in model_card(config, 1, None)


def test_data_from_before_begin_of_text_opens_as_it_was_made_whatever_its_template_says(tmp_path):
    data = prepared(tmp_path, "llama3", begin_of_text=False)
    folder = tmp_path / "data"
    manifest = {name: value for name, value in data.manifest.items() if name not in ("begin_of_text", "end_of_text")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tokenizer.json").write_text(json.dumps(PUBLISHED["llama3"]))
    again = prepared(tmp_path, "llama3")
    assert again.encode(TEXTS[7]) == documents_of(again)[7] and 599 not in again.encode(TEXTS[7])
    again.refuse_other_tokenizer(tmp_path, "teacher_dir")


@pytest.mark.parametrize("place", ["", "tokenizer.json"])
def test_a_tokenizer_and_its_folder_mean_the_same_and_so_do_their_padded_vocabularies(tmp_path, place):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 640}))
    placed(tmp_path, "gpt2", PUBLISHED["gpt2"])
    assert prepared(tmp_path, "gpt2", vocab_size=640, tokenizer_path=str(tmp_path / place)).train.num_tokens > 1000


def test_a_teachers_end_of_text_that_only_the_configuration_names_is_known_again(tmp_path):
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "tokenizer.json").write_text(json.dumps(PUBLISHED["deepseek"]))
    data = prepared(tmp_path, "deepseek", tokenizer_path=str(teacher), end_of_text=end)
    assert data.end_of_text_id == 600
    data.refuse_other_tokenizer(teacher, "teacher_dir")
    with pytest.raises(ValueError, match="is not that of the shards"):
        data.refuse_other_tokenizer(
            placed(tmp_path, "deepseek", PUBLISHED["deepseek"] | {"pre_tokenizer": BYTE_LEVEL}), "teacher_dir"
        )


def test_a_pipeline_of_transformers_speaks(tmp_path):
    speak = pipeline("text-generation", model=str(saved(tmp_path / "model", chain(b"abc.de"))))
    (made,) = speak("a", do_sample=False, max_new_tokens=20)
    assert made["generated_text"] == "abc.de"


TASK = """task: goes_on
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
"""
QUESTIONS = [("a", ["bc", "cb"], 0), ("ab", ["c.", "dd"], 0), ("xc", ["de", ".d"], 1), ("c", [".", ":"], 1)]


@pytest.mark.slow
def test_the_harness_runs_a_local_task_offline_and_counts_what_the_model_knows(tmp_path):
    """The model says "abc.de": it has three of the four answers."""
    pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[bench]"')
    folder = saved(tmp_path / "model", chain(b"abc.de"))
    rows = [dict(zip(("start", "ends", "right"), question, strict=True)) for question in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "goes_on.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    words = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"]
    words += ["--tasks", "goes_on", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*words, "--device", "cpu", "--batch_size", "1"],
        env=os.environ | offline,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    (found,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["goes_on"]["acc,none"] == 0.75
