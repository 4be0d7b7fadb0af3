"""Laws of the run directory: every checkpoint opens in transformers, nothing damaged is read, nothing half-written is seen."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import (
    SAVE_EVERY,
    STEPS,
    TORCHRUN,
    Planted,
    expect_success,
    held_out,
    launch,
    metrics,
    on_a_small_disk,
    tiny_config,
)
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds.tokenizer import load
from scripts.config import TrainingConfig
from scripts.model.decoder import empty_model, initialise
from scripts.model.huggingface import described_config, load_weights, model_card, tensor_shapes, transformers_config
from scripts.run import checkpoint, run_dir, storage
from scripts.run import metrics as log
from scripts.run.storage import HASH_BYTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def newest_folder(config: TrainingConfig) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step-{STEPS:08d}"


@pytest.fixture
def copied_run(finished_run, tmp_path) -> TrainingConfig:
    shutil.copytree(finished_run.run_dir, tmp_path / "run")
    return replace(finished_run, run_dir=str(tmp_path / "run"))


def test_a_checkpoint_opens_in_transformers_with_equal_logits(finished_run):
    folder = newest_folder(finished_run)
    ours = empty_model(replace(described_config(folder), precision="fp32"), torch.device("cpu"))
    load_weights(ours, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        logits = torch.nn.functional.linear(ours(ids), ours.head)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_checkpoint_keeps_the_training_dtype(finished_runs):
    for config in finished_runs.values():
        assert {tensor.dtype for tensor in load_file(newest_folder(config) / "model.safetensors").values()} == {config.dtype}
        model = AutoModelForCausalLM.from_pretrained(newest_folder(config))
        assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]


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
        "training/state.json", "training/manifest.json", "training/optimizer-00000-of-00001.safetensors", "README.md",
    }  # fmt: skip


def test_a_checkpoint_describes_itself_and_a_person_may_write_into_that(copied_run):
    card, evaluated = newest_folder(copied_run) / "README.md", held_out(copied_run)[-1]
    text = card.read_text()
    assert ModelCard.load(card).data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tightfit"],
    }  # fmt: skip
    for words in (
        f"{copied_run.num_parameters:,} parameters",
        f"{evaluated[1]:.4f} nats",
        f"{copied_run.num_tokens:,} in 8 of 8",
    ):
        assert words in text
    assert copied_run.corpus[0] in text and "Chat template: it has none." in text
    card.write_text(text + "more")
    assert checkpoint.find_fault(newest_folder(copied_run)) is None
    licensed = model_card(replace(copied_run, model_license="apache-2.0"), 8, None)
    assert "not evaluated" in model_card(copied_run, 8, {"step": 8, "val_loss": 1.0, "val_bits_per_byte": None})
    assert ModelCard(licensed).data.to_dict()["license"] == "apache-2.0" and "not evaluated" in licensed


def test_a_damaged_line_of_the_log_ends_no_save(copied_run):
    good = [row[:2] for row in held_out(copied_run)]
    with run_dir.metrics_path(copied_run).open("a") as file:
        file.write('{"kind": "eval", "step"\n{"kind": "eval", "step": "x", "val_loss": 1.0}\n[1, "eval"]\n')
        file.write('{"kind": "eval", "step": 8, "val_loss": "x"}\n')
    assert [(line["step"], line["val_loss"]) for line in log.evaluations(copied_run)] == good
    assert log.best_step(copied_run) == min(good[1:], key=lambda row: row[1])[0]


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
    return sorted(json.loads((folder / "training" / "manifest.json").read_text())["files"])


def test_any_changed_missing_or_shortened_file_is_named(copied_run):
    folder = newest_folder(copied_run)
    assert checkpoint.find_fault(folder) is None
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], content[:-1], content + b" "):
            (folder / name).write_bytes(damaged)
            assert (checkpoint.find_fault(folder) or "").startswith(f"{name} was changed after it was saved")
        (folder / name).unlink()
        assert checkpoint.find_fault(folder) == f"{name} is missing"
        (folder / name).write_bytes(content)
    assert checkpoint.find_fault(folder) is None


def test_a_damaged_manifest_is_named(copied_run):
    manifest = newest_folder(copied_run) / "training" / "manifest.json"
    saved = json.loads(manifest.read_text())
    one = saved["files"]["config.json"]
    files = (None, {}, 3, *(saved["files"] | {"config.json": record} for record in (
        None, {}, one | {"bytes": -1}, one | {"bytes": 10**18}, one | {"bytes": True}, one | {"sha256": "a"},
        one | {"sha256": [3]},
    )), saved["files"] | {"../../../config.json": one}, saved["files"] | {"/etc/hostname": one})  # fmt: skip
    for damage in ("", "{", "[]", "{" * 10**6, "[" * 10**6, *(json.dumps(saved | {"files": each}) for each in files)):
        manifest.write_text(damage)
        assert (checkpoint.find_fault(manifest.parent.parent) or "").startswith("training/manifest.json ")


def test_a_manifest_of_another_format_is_named_as_such(copied_run):
    manifest = newest_folder(copied_run) / "training" / "manifest.json"
    for number in (1, 3, None, "x" * 10**5):
        manifest.write_text(json.dumps({"format": number, "sha256": {}}))
        fault = checkpoint.find_fault(manifest.parent.parent) or ""
        assert fault.startswith("training/manifest.json is of format ") and len(fault) < 200


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
    run_dir.refuse_other_run(replace(finished_run, data_dir="elsewhere"))
    with pytest.raises(ValueError, match="learning_rate") as refusal:
        run_dir.refuse_other_run(replace(finished_run, learning_rate=0.5, seed=7))
    assert "seed (0 there, 7 here)" in str(refusal.value) and "num_steps" not in str(refusal.value)


def test_rewinding_drops_later_lines_and_a_half_written_one(copied_run):
    with run_dir.metrics_path(copied_run).open("a") as file:
        file.write('{"kind": "train", "st')
    log.rewind_metrics(copied_run, SAVE_EVERY, True)
    assert {line["step"] for line in metrics(copied_run)} == set(range(SAVE_EVERY + 1))


def test_an_evaluation_that_will_be_made_again_is_dropped(copied_run):
    log.rewind_metrics(copied_run, SAVE_EVERY, False)
    lines = metrics(copied_run)
    assert {line["step"] for line in lines if line["kind"] == "train"} == set(range(1, SAVE_EVERY + 1))
    assert {line["step"] for line in lines if line["kind"] == "eval"} == {0}


def test_a_run_that_another_launch_holds_is_refused_until_it_ends(copied_run):
    held = run_dir.hold_run(copied_run, 0)
    assert held is not None
    with pytest.raises(ValueError, match="in use by another launch"):
        run_dir.hold_run(copied_run, 0.3)
    os.close(held)
    again = run_dir.hold_run(copied_run, 0)
    assert again is not None
    os.close(again)
    assert run_dir.hold_run(replace(copied_run, run_dir=copied_run.run_dir + "-new"), 0) is None


def test_newer_checkpoints_that_did_not_verify_are_set_aside_until_training_has_passed_them(copied_run):
    newest = newest_folder(copied_run)
    (newest / "config.json").write_text("{}")
    run_dir.claim_run(copied_run, SAVE_EVERY)
    aside = newest.with_name(newest.name + ".faulty")
    assert aside.is_dir() and not newest.exists()
    assert checkpoint.newest_verified(copied_run)[1] == []
    checkpoint.prune(copied_run, SAVE_EVERY)
    assert aside.is_dir()
    checkpoint.prune(copied_run, STEPS)
    assert not aside.exists()


def test_half_written_checkpoints_are_cleared_away_and_never_taken(copied_run):
    draft = newest_folder(copied_run).rename(newest_folder(copied_run).with_name(".step-00000009.draft"))
    found, faults = checkpoint.newest_verified(copied_run)
    assert found is not None and found.state["step"] == SAVE_EVERY and not faults
    run_dir.claim_run(copied_run, SAVE_EVERY)
    assert not draft.exists()


@given(st.data())
def test_streamed_safetensors_are_what_the_library_reads(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
    dtype = st.sampled_from(DTYPES)
    tensors = {f"t{i}": torch.randn(shape, dtype=torch.float32).to(data.draw(dtype)) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    written = storage.write_safetensors(path, tensors)
    content = path.read_bytes()
    blocks = [content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES)]
    assert written == (len(content), [hashlib.sha256(each).hexdigest() for each in blocks])
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@given(num_elements=st.integers(1, 50), ranks=st.integers(1, 5), data=st.data())
def test_any_slice_of_the_flat_state_is_read_whoever_wrote_it(tmp_path_factory, num_elements, ranks, data):
    folder, flat = tmp_path_factory.mktemp("state"), torch.arange(num_elements, dtype=torch.float32)
    (folder / "training").mkdir()
    partition = -(-num_elements // (2 * ranks)) * 2
    for rank in range(ranks):
        piece = flat[rank * partition : (rank + 1) * partition]
        storage.write_safetensors(folder / checkpoint.state_file(rank, ranks), {"group.0.master": piece})
    start = data.draw(st.integers(0, num_elements))
    stop = data.draw(st.integers(start, num_elements))
    read = checkpoint.slice_reader(folder, ranks, [min(partition, num_elements)])
    target = torch.empty(stop - start)
    read("group.0.master", start, target)
    assert torch.equal(target, flat[start:stop])


def steps_of(config: TrainingConfig) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (Path(config.run_dir) / "checkpoints").iterdir())


def with_steps(config: TrainingConfig, *steps: int) -> TrainingConfig:
    for step in steps:
        shutil.copytree(newest_folder(config), newest_folder(config).with_name(f"step-{step:08d}"))
    return config


def test_only_the_newest_checkpoints_are_kept(copied_run):
    with_steps(copied_run, 5, 6, 7)
    checkpoint.prune(replace(copied_run, keep_checkpoints=3), STEPS)
    assert run_dir.best_link(copied_run).resolve().name == f"step-{STEPS:08d}"
    assert steps_of(copied_run) == [6, 7, 8]
    checkpoint.prune(replace(copied_run, keep_checkpoints=1), STEPS)
    assert steps_of(copied_run) == [STEPS]


def test_what_was_just_saved_is_kept_and_newer_faulty_ones_are_left(copied_run):
    (newest_folder(with_steps(copied_run, 6)) / "model.safetensors").unlink()
    checkpoint.prune(replace(copied_run, keep_checkpoints=1), 6)
    assert steps_of(copied_run) == [6, STEPS]
    found, faults = checkpoint.newest_verified(copied_run)
    assert found is not None and found.folder.name == "step-00000006" and len(faults) == 1


def kept_whole_when_killed(config: TrainingConfig, work) -> int:
    """Runs `work` in forks, each killed before one more change to the disk, until one ends; returns how many were killed.

    After every kill a checkpoint verifies, before and after the next launch clears the leftovers away.
    """
    backup = Path(config.run_dir).with_name("backup")
    shutil.copytree(config.run_dir, backup)
    for killed in range(1000):
        shutil.rmtree(config.run_dir)
        shutil.copytree(backup, config.run_dir)
        if _forked(work, killed) == 0:
            return killed
        for _ in range(2):
            found, _ = checkpoint.newest_verified(config)
            assert found is not None and found.state["step"] == STEPS
            run_dir.claim_run(config, STEPS)
        leftovers = [path for path in (Path(config.run_dir) / "checkpoints").iterdir() if path.suffix == ".draft"]
        assert not leftovers
    raise AssertionError("it never ends")


def _forked(work, num_changes: int) -> int:
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
    child, seen = os.fork(), []
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def die(event: str, _) -> None:
        seen.extend([event] if event in changes else [])
        if len(seen) > num_changes:
            os._exit(9)

    sys.addaudithook(die)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.slow
def test_a_kill_at_any_moment_of_publishing_and_pruning_leaves_what_was_there(copied_run):
    folder = newest_folder(copied_run)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.copytree(folder, draft)
    (draft / "training" / "manifest.json").unlink()
    records = checkpoint.read_manifest(folder)

    def publish_and_prune() -> None:
        checkpoint.publish(draft, folder, records)
        checkpoint.prune(replace(copied_run, keep_checkpoints=1), STEPS)

    assert kept_whole_when_killed(copied_run, publish_and_prune) > 20
    assert steps_of(copied_run) == [STEPS] and checkpoint.find_fault(folder) is None


def test_checkpoints_that_the_log_tells_of_and_nobody_finds_are_never_begun_again(copied_run):
    shutil.rmtree(Path(copied_run.run_dir) / "checkpoints")
    with pytest.raises(ValueError, match=r"step 8: put the checkpoints back, or choose another run_dir$") as refusal:
        checkpoint.newest_verified(copied_run)
    assert "\n" not in str(refusal.value)
    records = [record for record in metrics(copied_run) if record.get("event") != "saved"]
    run_dir.metrics_path(copied_run).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert checkpoint.newest_verified(copied_run) == (None, []) and log.unsaved_steps(copied_run) == STEPS


def test_steps_are_lost_only_where_the_log_is_ahead_of_the_checkpoints(copied_run, tmp_path):
    assert log.unsaved_steps(copied_run) == log.unsaved_steps(tiny_config(tmp_path / "new")) == 0
    shutil.rmtree(newest_folder(copied_run))
    assert log.unsaved_steps(copied_run) == STEPS - SAVE_EVERY


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "x"}', '{"loss": 1.0}', "[" * 10**5, '{"step": 1, "step": 2}'])
def test_a_damaged_line_of_the_log_is_named(copied_run, line):
    with run_dir.metrics_path(copied_run).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line \d+ ") as refusal:
        run_dir.read_metrics(copied_run)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "muon"}, r"optimizer \('adamw' there, 'muon' here\)"),
        ({"optimizer_state_precision": "bf16"}, r"optimizer_state_precision \('fp32' there, 'bf16' here\)"),
    ],
)
def test_a_run_from_before_muon_goes_on_with_adamw_in_float32_alone(tmp_path, changes, named):
    config = tiny_config(tmp_path, run_dir=str(tmp_path))
    stored = run_dir.config_record(config)
    for name in run_dir.AS_BEFORE:
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    run_dir.refuse_other_run(config)
    with pytest.raises(ValueError, match=named):
        run_dir.refuse_other_run(replace(config, **changes))


def test_a_run_from_before_the_momentum_rose_goes_on_where_it_does_not(tmp_path):
    constant = {"muon_first_momentum": None, "muon_momentum_warmup_steps": None}
    config = tiny_config(tmp_path, run_dir=str(tmp_path), optimizer="muon", **constant)
    stored = run_dir.config_record(config)
    for name in constant:
        del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    run_dir.refuse_other_run(config)
    with pytest.raises(ValueError, match=r"muon_first_momentum \(None there, 0\.5 here\)"):
        run_dir.refuse_other_run(replace(config, muon_first_momentum=0.5, muon_momentum_warmup_steps=4))


def test_muons_fields_may_differ_where_adamw_is_the_optimizer(tmp_path):
    config = tiny_config(tmp_path, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(run_dir.config_record(config)))
    changed = {"muon_momentum": 0.7, "muon_first_momentum": 0.6, "muon_momentum_warmup_steps": 7}
    run_dir.refuse_other_run(replace(config, **changed))
    with pytest.raises(ValueError, match="muon_momentum"):
        run_dir.refuse_other_run(replace(config, **changed, optimizer="muon"))


def test_a_field_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=TrainingConfig.save_every_steps)
    run_dir.claim_run(config, 0)
    path = Path(config.run_dir) / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in stored.items() if name != "save_every_steps"}))
    run_dir.refuse_other_run(config)
    with pytest.raises(ValueError, match=rf"save_every_steps \({TrainingConfig.save_every_steps} there, 3 here\)"):
        run_dir.refuse_other_run(replace(config, save_every_steps=3))


@given(num_bytes=st.integers(0, 100) | st.integers(2 * HASH_BYTES, 3 * HASH_BYTES), data=st.data())
def test_the_first_changed_block_is_named_by_its_offset(tmp_path_factory, num_bytes, data):
    path = tmp_path_factory.mktemp("blocks") / "file"
    content = bytearray(os.urandom(num_bytes))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_bytes), max_size=4)))
    pieces = [memoryview(bytes(content[a:b])) for a, b in zip([0, *cuts], [*cuts, num_bytes], strict=True)]
    records = {"file": storage.write_blocks(path, iter(pieces))}
    assert path.read_bytes() == content and storage.find_changed(path.parent, records, 2) is None
    anywhere = st.integers(0, 99) | st.integers(HASH_BYTES, HASH_BYTES + 9) | st.integers(0, num_bytes)
    changed = [at for at in data.draw(st.lists(anywhere, max_size=3)) if at < num_bytes]
    for at in set(changed):
        content[at] ^= 1
    path.write_bytes(content)
    first = min(changed, default=0) // HASH_BYTES * HASH_BYTES
    expected = f"file was changed after it was saved, in the block at byte {first}" if changed else None
    assert storage.find_changed(path.parent, records, 2) == expected


@pytest.fixture
def planted(tmp_path):
    """Pickles that make a file when they are read; afterwards it is not there, although reading them would make it."""
    marker = tmp_path / "it ran"
    torch.save(Planted(marker), tmp_path / "zip")
    yield {"pickle": pickle.dumps(Planted(marker)), "torch": (tmp_path / "zip").read_bytes()}
    assert not marker.exists()
    pickle.loads(pickle.dumps(Planted(marker)))
    assert marker.exists()


def listed_anew(folder: Path) -> None:
    """The manifest as it would be if the folder had been saved as it is."""
    files = {}
    for name in files_of(folder):
        content = (folder / name).read_bytes()
        blocks = [content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES)]
        files[name] = {"bytes": len(content), "sha256": [hashlib.sha256(block).hexdigest() for block in blocks]}
    (folder / "training" / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "files": files}))


def loaded(config: TrainingConfig, folder: Path) -> None:
    load_weights(empty_model(config, torch.device("cpu")), folder)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_place_of_tensors_is_refused_and_never_runs(copied_run, planted, kind):
    folder, state = newest_folder(copied_run), "training/optimizer-00000-of-00001.safetensors"
    for name in ("model.safetensors", state):
        (folder / name).write_bytes(planted[kind])
        assert f"{name} was changed" in (checkpoint.find_fault(folder) or "")
        listed_anew(folder)
    for read in (
        lambda: loaded(copied_run, folder),
        lambda: checkpoint.slice_reader(folder, 1, [8])("group.0.master", 0, torch.empty(8)),
    ):
        with pytest.raises(ValueError, match="is no readable safetensors file") as refusal:
            read()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [
    "pytorch_model.bin", "training/x.pt", "a.PTH", "b.pkl", "c.ckpt", "d.pickle", "model.safetensors.index.json",
])  # fmt: skip
def test_an_added_file_that_others_would_load_is_named(copied_run, planted, name):
    folder = newest_folder(copied_run)
    for harmless in ("README.md", "model-q4.gguf", "training/notes.txt"):
        (folder / harmless).write_text("added")
    assert checkpoint.find_fault(folder) is None
    (folder / name).write_bytes(planted["pickle"])
    assert checkpoint.find_fault(folder) == f"{name} was added after it was saved"


def test_pickled_weights_are_never_read_beside_safetensors_nor_alone(copied_run, planted):
    folder = newest_folder(copied_run)
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(planted["torch"])
    loaded(copied_run, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.pt may hold code and is never read") as refusal:
        loaded(copied_run, folder)
    assert "\n" not in str(refusal.value)


def safetensors_bytes(header: object, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


TINY = TrainingConfig(
    vocab_size=257, context_length=32, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=8, tokens_per_step=32,
    micro_batch_rows=1, eval_tokens=32, precision="fp32", tie_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("tiny"), initialise(empty_model(TINY, torch.device("cpu")))
    (folder / "config.json").write_text(json.dumps(transformers_config(TINY, 256)))
    storage.write_safetensors(folder / "model.safetensors", dict(model.named_parameters()))
    loaded(TINY, folder)
    return folder


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


ABSURD = {
    "empty": b"",
    "four bytes": b"\0\0\0\0",
    "length of 2^63 - 1": safetensors_bytes({}, b"", 2**63 - 1),
    "length of 2^64 - 1": safetensors_bytes({}, b"", 2**64 - 1),
    "length beyond the file": safetensors_bytes({}, b"", 100),
    "no length": safetensors_bytes({}, b"", 0),
    "no JSON": safetensors_bytes(b"{'a': 1}", b""),
    "no UTF-8": safetensors_bytes(b"\xff\xfe{}", b""),
    "a list": safetensors_bytes([], b""),
    "nested lists": safetensors_bytes(b"[" * 10**6, b""),
    "nested objects": safetensors_bytes(b'{"a":' * 10**5, b""),
    "nested in the metadata": safetensors_bytes({"__metadata__": {"a": {"b": [1]}}}, b""),
    "unknown dtype": safetensors_bytes({"a": entry(dtype="F12")}, b"\0" * 16),
    "integers": safetensors_bytes({"a": entry(dtype="I32")}, b"\0" * 16),
    "no dtype": safetensors_bytes({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 16),
    "negative shape": safetensors_bytes({"a": entry(shape=[-2, -2])}, b"\0" * 16),
    "huge shape": safetensors_bytes({"a": entry(shape=[2**62, 2**62])}, b"\0" * 16),
    "shape that wraps around": safetensors_bytes({"a": entry(shape=[2**32, 2**32, 4])}, b"\0" * 16),
    "shape of words": safetensors_bytes({"a": entry(shape=["2", "2"])}, b"\0" * 16),
    "offsets beyond the file": safetensors_bytes({"a": entry(shape=[4, 2], data_offsets=[0, 32])}, b"\0" * 16),
    "offsets backwards": safetensors_bytes({"a": entry(data_offsets=[16, 0])}, b"\0" * 16),
    "negative offsets": safetensors_bytes({"a": entry(data_offsets=[-16, 0])}, b"\0" * 16),
    "overlapping": safetensors_bytes({"a": entry(), "b": entry(data_offsets=[8, 24])}, b"\0" * 24),
    "the same bytes twice": safetensors_bytes({"a": entry(), "b": entry()}, b"\0" * 16),
    "a hole": safetensors_bytes({"a": entry(data_offsets=[8, 24])}, b"\0" * 24),
    "bytes behind": safetensors_bytes({"a": entry()}, b"\0" * 24),
    "one name twice": safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 16),
    "one name twice, apart": safetensors_bytes(
        b'{"a":%s,"a":%s}' % tuple(json.dumps(entry(data_offsets=at)).encode() for at in ([0, 16], [16, 32])), b"\0" * 32
    ),
    "a name of lines": safetensors_bytes({"a\nb" * 1000: entry()}, b"\0" * 16),
    "nothing": safetensors_bytes({}, b""),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_tensor_file_is_refused_in_one_line(tiny_folder, tmp_path, kind):
    shutil.copytree(tiny_folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(ABSURD[kind])
    with pytest.raises(ValueError) as refusal:
        loaded(TINY, tmp_path / "copy")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


VALUES = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)]), st.floats(), st.text(max_size=3),
    st.none(), st.booleans(), st.lists(st.integers(-1, 2**40), max_size=4), st.dictionaries(st.text(max_size=2), st.none()),
    st.sampled_from(["F32", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64"]),
)  # fmt: skip


@given(st.data())
@settings(max_examples=3 * settings().max_examples)
def test_a_changed_tensor_file_is_read_whole_or_refused_in_one_line(tiny_folder, tmp_path_factory, data):
    content = (tiny_folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), content[end:]
    name = data.draw(st.sampled_from(sorted(header)))
    kind = data.draw(st.sampled_from(["field", "value", "drop", "rename", "bytes", "cut", "length"]))
    if kind == "field":
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(VALUES)
    elif kind == "value":
        header[name] = data.draw(VALUES)
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[data.draw(st.text(max_size=4))] = header.pop(name)
    changed = bytearray(safetensors_bytes(header, body, data.draw(st.integers(0, 2**64 - 1)) if kind == "length" else None))
    for _ in range(data.draw(st.integers(1, 4)) if kind == "bytes" else 0):
        changed[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(tiny_folder / "config.json", folder)
    (folder / "model.safetensors").write_bytes(changed[: data.draw(st.integers(0, len(changed)))] if kind == "cut" else changed)
    try:
        loaded(TINY, folder)
    except ValueError as refusal:
        assert "\n" not in str(refusal)
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
        assert shapes == dict(tensor_shapes(TINY))


DEEP = ("[" * 10**5, '{"a":' * 10**5, "", "{", "[]", "3", "null", '"x"', "NaN", "\ud800".encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_absurd_descriptions_are_refused_in_one_line(tiny_folder, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    described = json.loads((folder / "config.json").read_text())
    changes = [
        {field: value} for field in described for value in (None, "x", [], {}, -1, 0, 10**30, float("nan"), float("inf"))
    ]
    maps = [
        None,
        [],
        {},
        {"a": 1},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ""},
        {"a": ".."},
        {"a": "x\0y"},
        {"a": "a\nb"},
    ]
    absurd = (
        [json.dumps(described | change) for change in changes]
        if name == "config.json"
        else [json.dumps({"weight_map": m}) for m in maps]
    )
    refused = 0
    for content in [*DEEP, *absurd]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for read in (lambda: loaded(TINY, folder), lambda: described_config(folder)):
            try:
                read()
            except ValueError as refusal:
                assert "\n" not in str(refusal), refusal
                refused += 1
    assert refused >= 2 * len(DEEP) + len(maps)


def test_an_absurd_state_makes_a_checkpoint_that_does_not_verify(copied_run):
    folder = newest_folder(copied_run)
    state = json.loads((folder / "training" / "state.json").read_text())
    numbers = (None, "x", -1, 1.5, True, 10**30, float("nan"), [], {}, [-1], ["x"])
    outer = [state | {field: value} for field in ("step", "data_fingerprint", "optimizer") for value in (*numbers, "x")]
    fields = ("world_size", "adam_steps", "group_elements", "group_partitions", "loss_scaler")
    inner = [state | {"optimizer": state["optimizer"] | {field: value}} for field in fields for value in numbers]
    scalers = [state | {"optimizer": state["optimizer"] | {"loss_scaler": {name: value}}}
               for name, value in (("cur_scale", float("nan")), ("cur_iter", "x"), ("__class__", 1))]  # fmt: skip
    allowed = (state | {"data_fingerprint": "x"}, state | {"optimizer": state["optimizer"] | {"loss_scaler": {}}})
    for content in [*DEEP, *(json.dumps(each) for each in [*outer, *inner, *scalers] if each not in allowed)]:
        (folder / "training" / "state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        listed_anew(folder)
        fault = checkpoint.find_fault(folder) or ""
        assert ("state.json" in fault or "is missing" in fault) and "\n" not in fault, (content[:200], fault)
    found, faults = checkpoint.newest_verified(copied_run)
    assert found is not None and found.state["step"] == SAVE_EVERY and len(faults) == 1


def test_the_bytes_of_a_checkpoint_are_known_before_it_is_written(finished_runs):
    for config in finished_runs.values():
        folder = newest_folder(config)
        text = (folder / "tokenizer.json").read_text()
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        tensors = sum(tensor.nbytes for path in folder.rglob("*.safetensors") for tensor in load_file(path).values())
        expected = checkpoint.save_num_bytes(config, text)
        assert num_bytes <= expected == tensors + len(text.encode()) + checkpoint.TEXTS_BYTES


ENGINE = """
import errno, json, os, resource, signal, sys, threading, time
from pathlib import Path
import deepspeed, torch
from ds.tokenizer import raw_bytes, to_json
from scripts.config import TrainingConfig
from scripts.engine import offload, watch
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.huggingface import load_weights
from scripts.run import checkpoint, metrics, run_dir, storage
fields = json.loads({fields!r})
fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
config = TrainingConfig(**fields)
torch.use_deterministic_algorithms(True)
deepspeed.init_distributed("gloo", verbose=False)
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = initialise(empty_model(config, torch.device("cpu")))
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=parameter_groups(model, config.weight_decay),
    config=TrainingConfig.deepspeed_config(config, world_size),
)
tokenizer_json = to_json(raw_bytes())
num_bytes = checkpoint.save_num_bytes(config, tokenizer_json)
folders = Path(config.run_dir) / "checkpoints"
def save(step):
    return checkpoint.save(engine, config, tokenizer_json, 256, {{"step": step, "data_fingerprint": ""}})
"""


def engine_script(config: TrainingConfig, code: str) -> str:
    """A script with a real engine of `config` on each rank, and then `code`."""
    return ENGINE.format(fields=json.dumps(asdict(config))) + code


MEMORY = """
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def most_during(work):
    before, peak, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return max(peak, anonymous()) - before, result

tensors = offload.optimizer_tensors(engine)
for number, tensor in enumerate(tensors.values()):
    tensor.fill_(number + 0.5)
largest = max(tensor.nbytes for tensor in tensors.values())
saving, saved = most_during(lambda: save(0))
reading, _ = most_during(lambda: checkpoint.verify_saved(config, saved))
saving, fault = max(saving, reading), saved.fault
for tensor in tensors.values():
    tensor.fill_(-1.0)
verifying, found = most_during(lambda: checkpoint.newest_verified(config)[0])
weights, _ = most_during(lambda: load_weights(model, found.folder))
loading, _ = most_during(lambda: checkpoint.load_state(engine, found))
assert all(bool((tensor == number + 0.5).all()) for number, tensor in enumerate(tensors.values()))
print("MEASURED " + json.dumps([fault, 3 * largest, saving, verifying, weights, loading]))
watch.end(0)
"""


@pytest.mark.slow
def test_saving_and_loading_take_no_more_memory_than_they_say(tmp_path):
    config = tiny_config(tmp_path, precision="bf16", vocab_size=60000, hidden_size=512, tie_embeddings=True)
    output = expect_success(launch(tmp_path, engine_script(config, MEMORY), TORCHRUN[1]))
    fault, state, *measured = json.loads(next(line for line in output.splitlines() if line.startswith("MEASURED "))[9:])
    assert fault is None and state > 300 * 2**20
    saving, verifying, weights, loading = (num_bytes / 2**20 for num_bytes in measured)
    bound = 64
    assert saving < bound and verifying < bound and weights < bound / 2 and loading < bound / 2, measured


FULL_DISK = """
def fill(leave):
    with open(folders.parent / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(folders.parent).f_bavail * 4096 - leave)

def free():
    (folders.parent / "filler").unlink(missing_ok=True)

def on_opening(ending, action):
    armed.append((ending, action))

def hook(event, arguments):
    if event == "open" and armed and str(arguments[0]).endswith(armed[0][0]):
        armed.pop(0)[1](arguments[0])

def flip(path):
    descriptor = os.open(path, os.O_RDWR)
    byte = os.pread(descriptor, 1, 5000)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), 5000)
    os.close(descriptor)

def small_files(_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

def tried(name, step, rank0=lambda: None, rank1=lambda: None):
    torch.distributed.barrier()
    (rank1 if rank else rank0)()
    torch.distributed.barrier()
    saved = save(step)
    fault = saved.fault or checkpoint.verify_saved(config, saved).words
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    torch.distributed.barrier()
    if rank == 0:
        here = sorted(path.name for path in folders.iterdir())
        faults = [checkpoint.find_fault(path) for path in folders.iterdir()]
        report[name] = [saved.folder.name, fault, here, faults]
    else:
        others[name] = fault
    torch.distributed.barrier()

armed, report, others = [], {}, {}
sys.addaudithook(hook)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if rank == 0:
    run_dir.claim_run(config, 0)
own = f"{rank:05d}-of-00002.safetensors"
tried("first", 1)
tried("too little room", 2, lambda: fill(num_bytes // 2), lambda: on_opening(own, flip))
others["unopened"], _ = len(armed), armed.clear()
tried("room again", 3, free)
tried("full in the middle", 4, lambda: on_opening(own, lambda _: fill(0)))
tried("full at the end", 5, lambda: (free(), on_opening(".manifest.json.draft", lambda _: fill(0))))
tried("rank 1 alone", 6, free, lambda: on_opening(own, small_files))
tried("a byte flips", 7, rank1=lambda: on_opening(own, lambda _: on_opening(own, flip)))
tried("good", 8)
if rank == 0:
    fill(8192)
    lines = 0
    while metrics.append_metrics(config, [{"step": lines, "text": "x" * 1000}, {"step": lines, "text": "y" * 300}]):
        lines += 2
    whole = len(run_dir.read_metrics(config)), run_dir.metrics_path(config).read_bytes()[-1:] == b"\\n"
    free()
    again = metrics.append_metrics(config, [{"step": lines}]), len(run_dir.read_metrics(config))
    report["metrics"] = [lines, *whole, *again]
    fill(0)
    try:
        storage.write_text(folders.parent / "text.json", "x" * 10**5)
    except OSError as fault:
        report["text"] = [fault.errno, sorted(path.name for path in folders.parent.iterdir() if "text" in path.name)]
print(f"REPORT{rank} " + json.dumps(others if rank else report))
watch.end(0)
"""
FULL_DISK_STEPS = {
    "first": (1, None),
    "too little room": (1, "No space left on device"),
    "room again": (3, None),
    "full in the middle": (3, "No space left on device"),
    "full at the end": (3, "rank 0: No space left on device"),
    "rank 1 alone": (3, "rank 1: File too large"),
    "a byte flips": (3, "rank 1: the disk returns other bytes than were written"),
    "good": (8, None),
}


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory) -> tuple[dict, dict]:
    """What happened on each of two ranks whose run directory is on a small disk of its own that fills up."""
    folder = tmp_path_factory.mktemp("full")
    command = on_a_small_disk(folder / "disk", 12, TORCHRUN[2])
    config = tiny_config(folder, run_dir=str(folder / "disk" / "run"), hidden_size=64, keep_checkpoints=1)
    output = expect_success(launch(folder, engine_script(config, FULL_DISK), command))
    found = [line.split(f"REPORT{rank} ")[1] for rank in range(2) for line in output.splitlines() if f"REPORT{rank} " in line]
    return json.loads(found[0]), json.loads(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_DISK_STEPS)
def test_a_disk_that_is_full_or_fails_costs_no_checkpoint_and_no_later_save(full_disk, name):
    (folder, fault, here, faults), good, reason = full_disk[0][name], *FULL_DISK_STEPS[name]
    assert here == [f"step-{good:08d}"] and faults == [None]
    if reason is None:
        assert fault is None and folder == here[0]
    else:
        assert fault.count("\n") == 0 and f"{folder} was not saved: " in fault and reason in fault
        assert f"step-{good:08d} is still good" in fault and (" GiB" in fault) != (name == "a byte flips")
    assert name not in full_disk[1] or (full_disk[1][name] is None) == (reason is None)


@pytest.mark.slow
def test_too_little_room_is_seen_before_anything_is_written(full_disk):
    assert full_disk[1]["unopened"] == 1


@pytest.mark.slow
def test_the_log_on_a_full_disk_keeps_whole_lines_and_goes_on(full_disk):
    lines, num_read, ends_whole, again, num_read_again = full_disk[0]["metrics"]
    assert lines == num_read > 0 and ends_whole and again and num_read_again == lines + 1


@pytest.mark.slow
def test_a_text_that_finds_no_room_leaves_nothing(full_disk):
    assert full_disk[0]["text"] == [errno.ENOSPC, []]
