"""Laws of distillation: who may be a teacher, what it says, what is kept of it, and what a run from it is."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STEPS, expect_success, launch, metrics, tiny_config, tiny_student, training_script
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tracker import Alone
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ds import tokenizer as bpe
from ds.loader import micro_batches, read_labels, windows_of_run
from ds.shards import Labels
from scripts.config import TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.memory import refuse_too_large
from scripts.model.decoder import empty_model, initialise
from scripts.model.documents import Windows, windows_of
from scripts.plan.machine import room_in_all
from scripts.prepare_data import Data, open_data, prepare
from scripts.run.checkpoint import Checkpoint
from scripts.run.run_dir import claim_run, newest_folder, same_without_teacher
from scripts.run.setup import model_to_train, refuse_on_this_machine
from scripts.run.state import data_order, windows_on_device
from scripts.run.teacher import check_teacher, find_teacher, fingerprint_of, labels_identity, load_teacher, open_labels
from scripts.train_distill import distill, from_labels, from_teacher, label

CPU = torch.device("cpu")
KINDS = [
    (kind, tied, num_files) for kind in ("llama", "qwen3") for tied in (True, False) for num_files in ("one file", "shards")
]
ENTRY = """
import scripts.config, json
from scripts.config import TrainingConfig
fields = json.loads({fields!r})
fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
scripts.config.DISTILL = TrainingConfig(**fields)
from scripts import train_distill
train_distill.main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[TrainingConfig, Data]:
    """A tiny configuration without a teacher, and its data."""
    config = tiny_config(tmp_path_factory.mktemp("data"), precision="fp32")
    return config, prepare(config)


def theirs(kind: str, tied: bool):
    """A model of transformers' own, drawn at random."""
    sizes: dict = dict(
        vocab_size=257, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes))


def saved(folder: Path, model, tokenizer, max_shard_size: str = "1GB") -> Path:
    """A folder as it is found in the world: a model in float32 and its tokenizer."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(bpe.to_json(tokenizer))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data) -> Path:
    return saved(tmp_path_factory.mktemp("teachers") / "teacher", theirs("llama", False), data[1].tokenizer, "8KB")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "teacher"))


@pytest.mark.parametrize(("kind", "tied", "num_files"), KINDS)
def test_any_llama_or_qwen3_folder_teaches_what_transformers_says_it_does(data, tmp_path, kind, tied, num_files):
    model, config = theirs(kind, tied), data[0]
    saved(tmp_path / "teacher", model, data[1].tokenizer, "8KB" if num_files == "shards" else "1GB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) == 1 or num_files == "shards"
    config = replace(config, teacher_dir=str(tmp_path / "teacher"))
    found = find_teacher(config)
    assert found is not None and found.config.num_parameters == model.num_parameters()
    teacher, ids = load_teacher(found, config, CPU), torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(functional.linear(teacher(ids), teacher.head), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_is_in_the_training_dtype_and_has_no_gradients(data, folder, precision):
    config = replace(data[0], teacher_dir=str(folder), precision=precision)
    found = find_teacher(config)
    assert found is not None
    teacher = load_teacher(found, config, CPU)
    assert {(weight.dtype, weight.requires_grad) for weight in teacher.parameters()} == {(config.dtype, False)}
    assert not teacher.training


def renamed(folder: Path, change) -> None:
    """Writes a weights file anew with its tensors changed."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def described(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_gpt2(folder: Path) -> None:
    shutil.rmtree(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)


def as_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "another architecture": (as_gpt2, "model_type='gpt2' is not supported"),
    "a missing tensor": (lambda folder: renamed(folder, lambda tensors: tensors.popitem()), "is missing; the download or copy"),
    "an extra tensor": (
        lambda folder: renamed(folder, lambda tensors: tensors.update({"model.more.weight": torch.zeros(2)})),
        "tensor model.more.weight has shape (2,), the model has no such tensor",
    ),
    "a misshapen tensor": (
        lambda folder: renamed(folder, lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 5)})),
        "has shape (3, 5), the model needs",
    ),
    "pickled weights alone": (as_pickle, "pytorch_model.bin may hold code and is never read"),
    "half a shard": (cut, "is no readable safetensors file"),
    "a lost shard": (lambda folder: sorted(folder.glob("*.safetensors"))[-1].unlink(), "is missing; only safetensors"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], "model.safetensors is missing"),
    "no description": (lambda folder: (folder / "config.json").unlink(), "is no transformers model folder"),
    "scaled positions": (
        lambda folder: described(folder, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        "rotary positions of type 'yarn', or partial ones, are not supported",
    ),
    "too few positions": (lambda folder: described(folder, max_position_embeddings=16), "nearest is 16"),
    "whole numbers": (
        lambda folder: renamed(folder, lambda tensors: tensors.update({name: t.int() for name, t in tensors.items()})),
        "floating-point weights are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_an_unfit_teacher_is_refused_in_one_line_with_what_is_wrong(data, copied, kind):
    spoil, words = BAD[kind]
    spoil(copied)
    with pytest.raises(ValueError) as refusal:
        find_teacher(replace(data[0], teacher_dir=str(copied)))
    line = str(refusal.value)
    assert line.startswith(f"teacher_dir='{copied}': ") and words in line and "\n" not in line, line


def test_a_teacher_larger_than_the_machine_is_refused_by_the_plan_as_the_largest_item(data, copied):
    described(copied, num_hidden_layers=10**6, hidden_size=8192, intermediate_size=32768)
    config = replace(data[0], teacher_dir=str(copied))
    with pytest.raises(ValueError, match="the largest item is teacher") as refusal:
        refuse_too_large(config, 1, 1, room_in_all(config, CPU), "cpu")
    assert "\n" not in str(refusal.value)


def test_without_a_teacher_the_command_that_makes_one_is_named(data, tmp_path):
    absent = replace(data[0], teacher_dir=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="is not there; deepspeed scripts/train_pretrain.py makes a teacher"):
        refuse_on_this_machine(absent, 1)
    (tmp_path / "absent" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint yet; deepspeed scripts/train_pretrain.py makes a teacher"):
        find_teacher(absent)
    with pytest.raises(ValueError, match="^teacher_dir=None: distillation needs a teacher; name [^\n]+$"):
        distill(data[0])


def permuted(parts: dict) -> None:
    vocabulary = parts["model"]["vocab"]
    a, b = list(vocabulary)[70:72]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


OTHER_TOKENIZERS = {
    "ids that are permuted": (permuted, "id "),
    "another end of text": (lambda parts: parts["added_tokens"][0].update(content="</s>"), ""),
    "another way to cut words": (lambda parts: parts["pre_tokenizer"]["pretokenizers"].pop(0), "pre-tokenizer"),
}


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_a_teacher_of_another_tokenizer_is_refused_by_name_also_when_the_sizes_agree(data, copied, kind):
    change, words = OTHER_TOKENIZERS[kind]
    parts = json.loads((copied / "tokenizer.json").read_text())
    change(parts)
    (copied / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match="^teacher_dir: its tokenizer is not that of the shards in [^\n]+$") as refusal:
        data[1].refuse_other_tokenizer(copied, "teacher_dir")
    assert words in str(refusal.value) and f"tokenizer_path='{copied}'" in str(refusal.value)


def test_a_teacher_without_a_tokenizer_is_refused(data, copied):
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is not there"):
        data[1].refuse_other_tokenizer(copied, "teacher_dir")


def test_the_fingerprint_of_a_teacher_tells_its_weights_and_its_shape(data, copied):
    def fingerprint() -> str:
        found = find_teacher(replace(data[0], teacher_dir=str(copied)))
        assert found is not None
        return fingerprint_of(found)

    whole = fingerprint()
    described(copied, rms_norm_eps=1e-3)
    other_shape = fingerprint()
    renamed(copied, lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(1))
    assert len({whole, other_shape, fingerprint()}) == 3


def test_a_run_goes_on_with_the_teacher_that_it_began_with_or_is_refused(data, copied):
    config = replace(data[0], teacher_dir=str(copied))
    found = find_teacher(config)
    assert found is not None
    state = {"teacher_fingerprint": check_teacher(config, found, data[1], None)}
    begun = Checkpoint(copied / "step-00000004", state)
    check_teacher(config, found, data[1], begun)
    renamed(copied, lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(1))
    with pytest.raises(ValueError, match="is not the teacher that .*step-00000004 learned from; put that one back"):
        check_teacher(config, found, data[1], begun)


def test_a_teacher_of_more_ids_than_the_student_is_refused_and_its_logits_are_not_cut(data, tmp_path):
    wide = theirs("llama", True)
    wide.resize_token_embeddings(320)
    config = replace(data[0], teacher_dir=str(saved(tmp_path / "wide", wide, data[1].tokenizer)))
    found = find_teacher(config)
    assert found is not None
    with pytest.raises(ValueError, match="gives probabilities to 320 ids and vocab_size=257; nearest is 320, with tokenizer_"):
        check_teacher(config, found, data[1], None)


def test_a_starting_point_of_another_tokenizer_is_refused(data, copied):
    parts = json.loads((copied / "tokenizer.json").read_text())
    permuted(parts)
    (copied / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match="^init_from=.*: its tokenizer is not that of the shards in [^\n]+$"):
        model_to_train(replace(data[0], init_from=str(copied)), Ranks(0, 1, 0, 1, 0), data[1], None)


def refused(folder: Path, config: TrainingConfig) -> str:
    (result,) = launch(folder, ENTRY.format(fields=json.dumps(asdict(config))), ["python"])
    refusal = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 2 and len(refusal) == 1 and "Traceback" not in result.stdout, result.stdout
    return refusal[0]


def test_a_launch_with_an_unfit_teacher_ends_in_one_line_and_status_2(data, copied, tmp_path):
    parts = json.loads((copied / "tokenizer.json").read_text())
    permuted(parts)
    (copied / "tokenizer.json").write_text(json.dumps(parts))
    config = replace(data[0], run_dir=str(tmp_path / "run"), teacher_dir=str(copied))
    assert "its tokenizer is not that of the shards" in refused(tmp_path, config)
    assert not Path(config.run_dir).exists()


@pytest.fixture(scope="module")
def students(finished_runs) -> list[TrainingConfig]:
    return [finished_runs[ranks, name] for ranks in (1, 2) for name in ("distill", "labels")]


def test_the_teacher_is_neither_saved_nor_optimized(students):
    for config in students:
        folder = newest_folder(config)
        assert folder is not None
        tensors = load_file(folder / "model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == config.num_parameters
        state = json.loads((folder / "training/state.json").read_text())
        assert sum(state["optimizer"]["group_elements"]) == config.num_parameters


def test_a_checkpoint_carries_the_fingerprints_of_tokenizer_and_teacher(students):
    for config in students:
        folder, found = newest_folder(config), find_teacher(config)
        assert folder is not None and found is not None
        state = json.loads((folder / "training/state.json").read_text())
        assert state["teacher_fingerprint"] == fingerprint_of(found)
        assert state["tokenizer_fingerprint"] == open_data(config).train.fingerprint


def test_the_teacher_is_the_newest_checkpoint_of_its_run_and_its_held_out_loss_is_what_that_run_logged(students):
    for config in students:
        (record,) = [line for line in metrics(config) if line.get("event") == "teacher"]
        assert record["folder"] == str(Path(config.teacher_dir or "") / "checkpoints" / f"step-{STEPS:08d}")
        logged = [line for line in metrics(replace(config, run_dir=config.teacher_dir)) if line["kind"] == "eval"][-1]
        assert record["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-6 if config.precision == "fp32" else 1e-2)
        assert ("tail_mass" in record and "left_out_nats" in record) == (config.teacher_top_k is not None)


def labels_of(config: TrainingConfig):
    (folder,) = Path(config.data_dir).glob("labels-*")
    data, found = open_data(config), find_teacher(config)
    assert found is not None
    identity = labels_identity(config, fingerprint_of(found))
    assert folder.name == f"labels-{identity[:16]}"
    return data, found, open_labels(config, data, config.teacher_top_k or 0, identity)


@pytest.mark.parametrize("name", ["labels", "mixture"])
def test_labels_on_the_disk_are_what_the_teacher_says_of_every_window_that_is_read(finished_runs, name):
    config = finished_runs[2, name]
    data, found, labels = labels_of(config)
    teacher = load_teacher(found, config, CPU)
    order, share = data_order(config, data), {"rank": 0, "world_size": 1, "micro_batch_rows": 2}
    for step in range(config.num_steps):
        for batch in micro_batches(data.train, order, step=step, **share):
            ids, logs, tail = read_labels(labels, batch.windows, config.context_length)
            said, _ = label(teacher, windows_on_device(batch.ids, config, data, CPU), config)
            np.testing.assert_allclose(np.exp(logs.astype(np.float32)).sum(-1) + tail, 1, atol=2e-3)
            np.testing.assert_allclose(tail, said.tail, atol=2e-3)
            np.testing.assert_allclose(logs, said.logs, atol=2e-2)
            assert (ids == said.ids.numpy()).mean() > 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_teacher_and_student_see_the_same_documents(masked):
    """A loss of windows is the mean of those of their documents alone, and labels are those of the documents alone."""
    changes: dict = dict(
        vocab_size=300, context_length=12, tokens_per_step=24, micro_batch_rows=2, eval_tokens=12, precision="fp32"
    )
    config = TrainingConfig(**changes, teacher_dir="teacher", teacher_top_k=299, init_std=0.3, logits_init_std=3.0, seed=1)
    teacher, student = (initialise(empty_model(each, CPU)) for each in (replace(config, seed=2, hidden_size=96), config))
    ids, borders = np.random.default_rng(0).integers(0, 300, (2, 13)), np.array([0, 5, 6, 12, 20, 24], dtype=np.int32)
    windows, alone = windows_of(ids, borders if masked else None, CPU), []
    for row, start, stop in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 8), (1, 8, 12)):
        alone.append(Windows(torch.from_numpy(ids[row : row + 1, start : stop + 1])))
    said = [label(teacher, each, config) for each in (windows, *alone)]
    labels = [each.labels for each in said]
    apart = Labels(*(torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*labels[1:], strict=True)))
    dense = [
        torch.zeros(24, 300).scatter_(1, each.ids.flatten(0, -2).long(), each.logs.flatten(0, -2).float())
        for each in (labels[0], apart)
    ]
    assert torch.allclose(dense[0], dense[1], atol=1e-2) == masked
    pairs: tuple = ((from_teacher, [teacher] * 6), (from_labels, labels))
    for objective, sources in pairs:
        whole, *parts = (
            objective(Alone(student), each, source, config).item() * each.inputs.numel() / 24
            for each, source in zip((windows, *alone), sources, strict=True)
        )
        assert (whole == pytest.approx(sum(parts), rel=1e-5)) == masked


def test_labels_of_masked_documents_are_others_and_those_of_old_runs_stay():
    config = TrainingConfig(teacher_dir="teacher", teacher_top_k=4)
    masked = labels_identity(replace(config, mask_across_documents=True), "0" * 64)
    fields = [config.teacher_top_k, config.distill_temperature, config.context_length, config.precision]
    unmasked = hashlib.sha256(json.dumps(["0" * 64, *fields]).encode()).hexdigest()
    assert labels_identity(config, "0" * 64) == unmasked != masked


@pytest.mark.parametrize("name", ["labels", "mixture"])
def test_only_windows_that_the_run_reads_are_labelled(finished_runs, name):
    config = finished_runs[1, name]
    data, _, labels = labels_of(config)
    windows = windows_of_run(config.num_steps, data_order(config, data))
    blocks = np.unique(windows * config.context_length // labels.block_tokens)
    assert 0 < len(blocks) < labels.num_blocks
    unread = np.setdiff1d(np.arange(labels.num_blocks), blocks)
    assert labels.faulty(blocks).tolist() == [] and labels.faulty(unread).tolist() == unread.tolist()


def test_one_rank_and_two_write_the_same_labels(finished_runs):
    one, two = (next(Path(finished_runs[ranks, "labels"].data_dir).glob("labels-*/train-00000.labels")) for ranks in (1, 2))
    ours, others = labels_of(finished_runs[1, "labels"])[2], labels_of(finished_runs[2, "labels"])[2]
    assert one.stat().st_size == two.stat().st_size
    for mine, its in zip(ours.read(0, ours.num_positions), others.read(0, others.num_positions), strict=True):
        np.testing.assert_allclose(mine.astype(np.float32), its.astype(np.float32), atol=0.05)


def test_the_same_student_without_a_teacher_is_found_beside_the_run_by_its_configuration(data, tmp_path):
    teacher = replace(data[0], run_dir=str(tmp_path / "teacher"))
    student = tiny_student(teacher, "labels", tmp_path / "student")
    assert same_without_teacher(student) is None
    alone = replace(student, run_dir=str(tmp_path / "plain"), teacher_dir=None, teacher_top_k=None, micro_batch_rows=1)
    others = [teacher, student, replace(alone, learning_rate=5e-3, run_dir=str(tmp_path / "other"))]
    for config in others:
        claim_run(config, 0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert same_without_teacher(student) is None
    claim_run(alone, 0)
    found = same_without_teacher(student)
    assert found is not None and Path(found.run_dir) == tmp_path / "plain"


def test_the_end_tells_teacher_and_student_and_the_student_without_a_teacher(finished_runs, tmp_path):
    config = finished_runs[1, "distill"]
    run_dir = shutil.copytree(config.run_dir, tmp_path / "runs" / "distill")
    again = replace(config, run_dir=str(run_dir))
    alone = replace(again, run_dir=str(tmp_path / "runs" / "plain"), teacher_dir=None)
    claim_run(alone, 0)
    shutil.copy(run_dir / "metrics.jsonl", alone.run_dir)
    output = expect_success(launch(tmp_path, training_script(again, ""), ["python"]))
    rows = [
        line.split() for line in output.splitlines() if line.lstrip().startswith(("teacher ", "student ", "without teacher "))
    ]
    assert [row[0] for row in rows] == ["teacher", "student", "without"]
    last = [line for line in metrics(again) if line["kind"] == "eval"][-1]
    (teacher,) = [line for line in metrics(again) if line.get("event") == "teacher"]
    for row, record in zip(rows, (teacher, last, last), strict=True):
        assert f"{record['val_loss']:.3f}" in row and f"{record['val_bits_per_byte']:.3f}" in row


APART = """
import gc
from scripts.model.decoder import empty_model, initialise
from scripts.model.documents import Windows, windows_of
from scripts.model.decoder import Decoder

def apart(function):
    def call(*everything, **named):
        models = [each for each in gc.get_objects() if isinstance(each, Decoder)]
        assert len(models) == 1, [model.config for model in models]
        return function(*everything, **named)
    return call

label, objective = apart(label), apart(objective)
"""
KILLED = """
import random, signal, threading
chance, number = random.Random({seed}), {seed}
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if number < 3:
    from ds.shards import LabelStream
    countdown, write = 5 + chance.randrange(80), LabelStream.write

    def dying(*arguments):
        global countdown
        countdown -= 1
        return die() if countdown < 0 else write(*arguments)

    LabelStream.write = dying
else:
    begin = trainer.log_start
    timer = threading.Timer(chance.uniform(0.05, 0.4), die)
    trainer.log_start = lambda *arguments: (timer.start(), begin(*arguments))
"""


@pytest.mark.slow
def test_killed_while_the_teacher_labels_and_while_the_student_trains_the_run_is_the_uninterrupted_one(finished_runs, tmp_path):
    """In the uninterrupted one, the teacher and the student are never in memory together."""
    teacher = finished_runs[1, "fp32"]
    whole, killed = (
        replace(
            tiny_student(teacher, "labels", tmp_path / name, num_steps=60, save_every_steps=3), data_dir=str(tmp_path / data)
        )
        for name, data in (("whole", "data"), ("killed", "more-data"))
    )
    expect_success(launch(tmp_path, training_script(whole, APART), ["python"]))
    for number in range(5):
        (result,) = launch(tmp_path, training_script(killed, KILLED.format(seed=number)), ["python"])
        assert result.returncode == -9, result.stdout
    expect_success(launch(tmp_path, training_script(killed, ""), ["python"]))
    names = ("kind", "step", "loss", "grad_norm", "tokens_hash", "windows_hash", "val_loss")
    ours, others = (
        [[line.get(n) for n in names] for line in metrics(run) if line["kind"] != "event"] for run in (killed, whole)
    )
    assert ours == others
    mine, its = (next(Path(run.data_dir).glob("labels-*/*.labels")).read_bytes() for run in (killed, whole))
    assert mine == its
