"""Laws of the run directory: every checkpoint opens in transformers, nothing damaged is read, nothing half-written is seen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SAVE_EVERY, STEPS, metrics, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds.tokenizer import load
from scripts import checkpoint
from scripts.config import TrainingConfig
from scripts.model import empty_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def newest_folder(config: TrainingConfig) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step-{STEPS:08d}"


@pytest.fixture
def copied_run(finished_run, tmp_path) -> TrainingConfig:
    shutil.copytree(finished_run.run_dir, tmp_path / "run")
    return replace(finished_run, run_dir=str(tmp_path / "run"))


def test_a_checkpoint_opens_in_transformers_with_equal_logits(finished_run):
    folder = newest_folder(finished_run)
    ours = empty_model(replace(checkpoint.described_config(folder), precision="fp32"), torch.device("cpu"))
    checkpoint.load_weights(ours, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        logits = torch.nn.functional.linear(ours(ids), ours.head)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_keeps_the_training_dtype(finished_runs):
    for (_, precision), config in finished_runs.items():
        assert {tensor.dtype for tensor in load_file(newest_folder(config) / "model.safetensors").values()} == {config.dtype}
        model = AutoModelForCausalLM.from_pretrained(newest_folder(config))
        assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_the_tokenizer_opens_in_transformers_with_equal_ids(finished_run):
    theirs, ours = AutoTokenizer.from_pretrained(newest_folder(finished_run)), load(newest_folder(finished_run))
    text = "def f(x):\n    return 'naïve' + x  # 日本"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == 256


def test_a_checkpoint_holds_no_pickle_and_only_named_files(finished_run):
    names = {path.relative_to(newest_folder(finished_run)).as_posix() for path in newest_folder(finished_run).rglob("*.*")}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training/state.json", "training/manifest.json", "training/optimizer-00000-of-00001.safetensors",
    }  # fmt: skip


def test_the_optimizer_state_is_split_over_ranks_and_whole_together(finished_runs):
    one, two = (newest_folder(finished_runs[ranks, "fp32"]) / "training" for ranks in (1, 2))
    whole = load_file(one / "optimizer-00000-of-00001.safetensors")
    halves = [load_file(two / f"optimizer-0000{rank}-of-00002.safetensors") for rank in range(2)]
    for name, tensor in whole.items():
        joined = torch.cat([half[name] for half in halves])
        assert joined.shape == tensor.shape
        torch.testing.assert_close(joined, tensor, rtol=1e-3, atol=1e-4)
    assert sum(half[name].numel() for half in halves for name in half) == sum(tensor.numel() for tensor in whole.values())


def files_of(folder: Path) -> list[str]:
    return sorted(json.loads((folder / "training" / "manifest.json").read_text())["sha256"])


def test_any_changed_missing_or_shortened_file_is_named(copied_run):
    folder = newest_folder(copied_run)
    assert checkpoint.find_fault(folder) is None
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], content[:-1], content + b" "):
            (folder / name).write_bytes(damaged)
            assert checkpoint.find_fault(folder) == f"{name} was changed after it was saved"
        (folder / name).unlink()
        assert checkpoint.find_fault(folder) == f"{name} is missing"
        (folder / name).write_bytes(content)
    assert checkpoint.find_fault(folder) is None


def test_a_damaged_manifest_is_named(copied_run):
    manifest = newest_folder(copied_run) / "training" / "manifest.json"
    for damage in ("", "{", "[]", '{"format": 1}', '{"sha256": null}', '{"sha256": {}}', '{"sha256": 3}'):
        manifest.write_text(damage)
        assert "manifest.json" in (checkpoint.find_fault(manifest.parent.parent) or "")


def test_the_newest_checkpoint_that_verifies_is_taken_and_the_fault_told(copied_run):
    (newest_folder(copied_run) / "model.safetensors").unlink()
    found, faults = checkpoint.newest_verified(copied_run)
    assert found is not None and found.state["step"] == SAVE_EVERY
    assert len(faults) == 1 and "model.safetensors is missing" in faults[0]


def test_a_run_whose_checkpoints_all_fail_is_refused_and_never_begun_again(copied_run):
    for folder in (Path(copied_run.run_dir) / "checkpoints").iterdir():
        (folder / "training" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"training/state\.json was changed") as refusal:
        checkpoint.newest_verified(copied_run)
    assert "\n" not in str(refusal.value)


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert checkpoint.newest_verified(tiny_config(tmp_path)) == (None, [])


def test_a_run_of_another_configuration_is_refused_with_every_field_that_differs(finished_run):
    checkpoint.refuse_other_run(replace(finished_run, data_dir="elsewhere"))
    with pytest.raises(ValueError, match="learning_rate") as refusal:
        checkpoint.refuse_other_run(replace(finished_run, learning_rate=0.5, seed=7))
    assert "seed (0 there, 7 here)" in str(refusal.value) and "num_steps" not in str(refusal.value)


def test_rewinding_drops_later_lines_and_a_half_written_one(copied_run):
    with checkpoint.metrics_path(copied_run).open("a") as file:
        file.write('{"kind": "train", "st')
    checkpoint.rewind_metrics(copied_run, SAVE_EVERY)
    assert {line["step"] for line in metrics(copied_run)} == set(range(SAVE_EVERY + 1))


def test_half_written_checkpoints_are_cleared_away_and_never_taken(copied_run):
    draft = newest_folder(copied_run).rename(newest_folder(copied_run).with_name(".step-00000009.draft"))
    found, faults = checkpoint.newest_verified(copied_run)
    assert found is not None and found.state["step"] == SAVE_EVERY and not faults
    checkpoint.claim_run(copied_run)
    assert not draft.exists()


@given(st.data())
@settings(deadline=None)
def test_streamed_safetensors_are_what_the_library_reads(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
    dtype = st.sampled_from(DTYPES)
    tensors = {f"t{i}": torch.randn(shape, dtype=torch.float32).to(data.draw(dtype)) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    assert checkpoint._write_safetensors(path, tensors) == checkpoint.file_sha256(path)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@given(num_elements=st.integers(1, 50), ranks=st.integers(1, 5), data=st.data())
@settings(deadline=None)
def test_any_slice_of_the_flat_state_is_read_whoever_wrote_it(tmp_path_factory, num_elements, ranks, data):
    folder, flat = tmp_path_factory.mktemp("state"), torch.arange(num_elements, dtype=torch.float32)
    (folder / "training").mkdir()
    partition = -(-num_elements // (2 * ranks)) * 2
    for rank in range(ranks):
        piece = flat[rank * partition : (rank + 1) * partition]
        checkpoint._write_safetensors(folder / checkpoint._state_file(rank, ranks), {"group.0.master": piece})
    start = data.draw(st.integers(0, num_elements))
    stop = data.draw(st.integers(start, num_elements))
    read = checkpoint._slice_reader(folder, ranks, [min(partition, num_elements)])
    assert torch.equal(read("group.0.master", start, stop), flat[start:stop])


def test_only_the_newest_checkpoints_are_kept(copied_run):
    checkpoint._prune(replace(copied_run, keep_checkpoints=1))
    assert [path.name for path in (Path(copied_run.run_dir) / "checkpoints").iterdir()] == [newest_folder(copied_run).name]
