"""Laws of the plan: its arithmetic, its accuracy against tracked storages, the presets, what is refused and what is offered."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tracker
from conftest import launch, metrics, tiny_config, training_script
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import config as config_module
from scripts import memory
from scripts.checkpoint import find_fault, newest_folder
from scripts.config import ACTIVATION_CHECKPOINTING, DISTILL, PRETRAIN, TrainingConfig
from scripts.memory import GPU, HOST, PHASES, TEACHER_ALONE, Room, needs, phases, plan

GB, CLOSE = 10**9, 0.01
CARDS = {
    "GPU_4GB": 4, "GPU_6GB": 6, "GPU_8GB": 8, "GPU_12GB": 12, "GPU_16GB": 16, "GPU_24GB": 24, "GPUS_8X80GB": 80,
}  # fmt: skip
UNTRACKED = {
    "CUDA and its libraries", "allocator's slack", "cuBLAS's workspace", "kernels' own work", "gradients on their way down",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "124M": dict(hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, mlp_size=2048, vocab_size=50304),
    "350M": dict(hidden_size=1024, num_layers=24, num_heads=16, num_kv_heads=4, mlp_size=2816, vocab_size=32768),
    "1.3B": dict(hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=16, mlp_size=5504, vocab_size=50304),
    "3B": dict(hidden_size=3072, num_layers=28, num_heads=24, num_kv_heads=8, mlp_size=8192, vocab_size=50304),
    "6.7B": dict(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_size=11008, vocab_size=32000),
}
GOALS = [("124M", 8192, 1.5, 115), ("1.3B", 8192, 5.5, 115), ("3B", 4096, 9.0, 115), ("6.7B", 4096, 17.5, 115)]
GRID = [
    ("124M", "none", {"tie_embeddings": True}), ("124M", "block_offload", {}),
    ("350M", "none", {"qk_norm": True}), ("6.7B", "block", {}),
    ("350M", "block", {"micro_batch_rows": 8, "loss_chunk_rows": 512, "qk_norm": True}),
    ("1.3B", "block_offload", {"micro_batch_rows": 4, "loss_chunk_rows": 1024, "tie_embeddings": True}),
]  # fmt: skip
SLOW_GRID = [
    ("350M", "block", {"loss_chunk_rows": 8192}), ("350M", "block_offload", {"accumulate_on": "gpu"}), ("1.3B", "none", {}),
    ("1.3B", "block", {"tie_embeddings": True}), ("3B", "none", {}), ("3B", "block_offload", {"accumulate_on": "gpu"}),
    ("6.7B", "none", {}), ("6.7B", "block_offload", {"tie_embeddings": True}),
]  # fmt: skip
GRIDS = [pytest.param(*at, id=" ".join(at[:2])) for at in GRID]
GRIDS += [pytest.param(*at, id=" ".join(at[:2]), marks=pytest.mark.slow) for at in SLOW_GRID]


TINY = dict(hidden_size=64, num_heads=4, num_kv_heads=2, mlp_size=96, num_layers=2, vocab_size=512, loss_chunk_rows=256)
WIDE = dict(hidden_size=256, num_heads=4, num_kv_heads=2, head_size=16, mlp_size=1000, num_layers=3)
NARROW_MLP = WIDE | dict(mlp_size=64, num_heads=8, num_kv_heads=1, head_size=64, qk_norm=True)
MANY_WORDS = dict(vocab_size=8192, loss_chunk_rows=1024, distill_temperature=2.0)
SHALLOW = dict(hidden_size=1280, num_heads=4, num_kv_heads=1, head_size=16, num_layers=1, mlp_size=128)
LABELS = {"teacher_top_k": 32}
PAIRS = {
    "the teacher's MLP": ({}, WIDE, "the teacher's forward"),
    "the teacher's attention": ({}, NARROW_MLP, "the teacher's forward"),
    "many words": (MANY_WORDS | {"distill_divergence": "reverse"}, SHALLOW, "the loss"),
    "many words and labels": (MANY_WORDS | LABELS, WIDE, "the loss"),
    "many labels": ({"loss_chunk_rows": 1024, "teacher_top_k": 500}, WIDE, "the loss"),
}
OTHER_PAIRS = {
    "a wide teacher of a student that keeps all": (
        dict(hidden_size=128, mlp_size=352, num_layers=4, vocab_size=257, loss_chunk_rows=64),
        SHALLOW | {"hidden_size": 1024}, "the forward",
    ),
    "350M to 124M": (SHAPES["124M"] | {"activation_checkpointing": "block"}, SHAPES["350M"], "the loss"),
    "350M to 124M by labels": (SHAPES["124M"] | LABELS, SHAPES["350M"], "the loss"),
}  # fmt: skip
GPU_PAIRS = {
    "a wide teacher of a student that keeps inputs": (
        dict(hidden_size=512, num_kv_heads=1, head_size=16, mlp_size=64, num_layers=8, vocab_size=257, loss_chunk_rows=64,
             activation_checkpointing="block"), SHALLOW, "the loss",
    ),
}  # fmt: skip
PAIRINGS = [pytest.param(*pair, id=name) for name, pair in PAIRS.items()]
PAIRINGS += [pytest.param(*pair, id=name, marks=pytest.mark.slow) for name, pair in OTHER_PAIRS.items()]
GPU_PAIRINGS = [pytest.param(*pair, id=name, marks=pytest.mark.slow) for name, pair in GPU_PAIRS.items()]


def shaped(name: str, tokens: int, **changes) -> TrainingConfig:
    """A model of SHAPES with one micro-batch of `tokens` tokens four times a step."""
    length = min(tokens, 2048)
    fields: dict[str, Any] = dict(
        **SHAPES[name], head_size=None, tie_embeddings=False, context_length=length, micro_batch_rows=tokens // length,
        tokens_per_step=4 * tokens, eval_tokens=length, loss_chunk_rows=2048, run_dir="no-run", data_dir="no-data",
    )  # fmt: skip
    return replace(PRETRAIN, **(fields | changes))


def taught(config: TrainingConfig, folder: Path, **shape) -> TrainingConfig:
    """`config` with a teacher of another shape and the same words, of which a config.json in `folder`, as of a run, tells."""
    fixed = {"teacher_top_k": None, "vocab_size": config.vocab_size}
    fields = asdict(replace(config, **({"head_size": None} | shape | fixed)))
    (folder / "config.json").write_text(json.dumps(fields))
    return replace(config, teacher_dir=str(folder))


def student(**changes) -> TrainingConfig:
    """A small model that is to have a teacher, 2048 tokens a micro-batch."""
    rows = dict(context_length=256, micro_batch_rows=8, tokens_per_step=4096, eval_tokens=256)
    places = {"run_dir": "no-run", "data_dir": "no-data", "teacher_dir": "no-teacher"}
    return replace(PRETRAIN, **(TINY | {"head_size": None} | places | rows | changes))


@st.composite
def configs(draw) -> TrainingConfig:
    heads, per_group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    layers, rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.sampled_from([16, 64, 1024]))
    place = draw(st.sampled_from([("cpu", "fp32"), ("gpu", "fp32"), ("gpu", "bf16")]))
    teacher_dir, top_k = draw(st.sampled_from([(None, None), (PRETRAIN.run_dir, None), (PRETRAIN.run_dir, 16)]))
    return replace(
        PRETRAIN, hidden_size=heads * per_group * 16, num_heads=heads * per_group, num_kv_heads=heads, num_layers=layers,
        mlp_size=draw(st.integers(1, 400)), vocab_size=draw(st.sampled_from([257, 4096])), micro_batch_rows=rows,
        context_length=length, tokens_per_step=rows * length * 16, eval_tokens=length, qk_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()), loss_chunk_rows=draw(st.sampled_from([8, 64, 512])), accumulate_on=place[0],
        accumulation_precision=place[1], activation_checkpointing=draw(st.sampled_from(ACTIVATION_CHECKPOINTING)),
        precision="bf16" if place[1] == "bf16" else draw(st.sampled_from(["bf16", "fp32"])), teacher_dir=teacher_dir,
        teacher_top_k=top_k,
    )  # fmt: skip


def totals(config: TrainingConfig, device_type: str) -> list[int]:
    """The device's and the host's bytes of each phase."""
    planned = plan(config, 1, device_type)
    return [at.total for moments in (planned.device, planned.host) for at in moments.values()]


def tracked_part(config: TrainingConfig, device_type: str, phase: str) -> tuple[int, str]:
    """A phase's peak without what no tracker of storages sees, and at which moment it is."""
    moments = memory.device_moments(config, 1, device_type, phase)
    return max((sum(size for kind, size in at.parts.items() if kind not in UNTRACKED), at.name) for at in moments)


@given(configs(), st.sampled_from([1, 2, 4]), st.sampled_from(["cuda", "cpu"]))
def test_every_total_is_the_sum_of_parts_and_each_need_the_largest_total(config, ranks, device_type):
    planned = plan(config, ranks, device_type)
    for moments in (planned.device, planned.host):
        assert tuple(moments) == phases(config)
        assert all(at.total == sum(at.parts.values()) and min(at.parts.values()) > 0 for at in moments.values())
    wanted = needs(planned, ranks)
    if device_type == "cuda":
        assert wanted[GPU][1].total == max(at.total for at in planned.device.values())
        assert wanted[HOST][1].total == ranks * max(at.total for at in planned.host.values())
    else:
        both = (planned.device[phase].total + planned.host[phase].total for phase in phases(config))
        assert set(wanted) == {HOST} and wanted[HOST][1].total == ranks * max(both)


@given(configs(), st.sampled_from(["cuda", "cpu"]))
def test_more_rows_context_layers_width_words_or_chunk_never_take_less(config, device_type):
    before, split = totals(config, device_type), 2 * config.loss_chunk_rows < config.micro_batch_rows * config.context_length
    larger = {name: 2 * getattr(config, name) for name in ("micro_batch_rows", "num_layers", "mlp_size", "vocab_size")}
    wider = {"hidden_size": 2 * config.hidden_size, "num_heads": 2 * config.num_heads, "num_kv_heads": 2 * config.num_kv_heads}
    longer = {name: 2 * getattr(config, name) for name in ("context_length", "eval_tokens", "tokens_per_step")}
    chunk = [{"loss_chunk_rows": 2 * config.loss_chunk_rows}] if split else []
    for changes in [{name: value} for name, value in larger.items()] + [wider, longer, *chunk]:
        after = totals(replace(config, **changes), device_type)
        assert all(less <= more for less, more in zip(before, after, strict=True)), changes
        assert before != after or "loss_chunk_rows" in changes or device_type == "cpu", changes


@given(configs(), st.sampled_from([2, 4, 8]))
def test_ranks_share_what_zero_2_partitions_and_nothing_else(config, ranks):
    alone, one_of = plan(config, 1).host[PHASES[1]].parts, plan(config, ranks).host[PHASES[1]].parts
    for kind in ("master weights", "gradients", "Adam's moments"):
        assert alone[kind] / ranks <= one_of[kind] < alone[kind] / ranks + 16
    assert plan(config, 1).device[PHASES[1]].parts["weights"] == plan(config, ranks).device[PHASES[1]].parts["weights"]
    assert {kind: alone[kind] for kind in ("the program", "the data")} == {
        kind: one_of[kind] for kind in ("the program", "the data")
    }


@given(configs())
def test_host_takes_sixteen_bytes_a_parameter_and_staging_of_two_groups_but_less_at_first(config):
    parts, first = (plan(config, 1, "cpu").host[phase].parts for phase in (PHASES[1], PHASES[0]))
    assert first["master weights"] + first["gradients"] == 8 * config.num_parameters and "Adam's moments" not in first
    assert sum(parts[kind] for kind in ("master weights", "gradients", "Adam's moments")) == 16 * config.num_parameters
    largest = max(config.vocab_size * config.hidden_size, config.block_parameters)
    assert parts["staging"] <= 2 * config.dtype.itemsize * largest


@pytest.mark.parametrize(("name", "mode", "changes"), GRIDS)
def test_plan_is_what_a_tracker_counts_in_the_graph_of_a_gpu(name, mode, changes):
    config = shaped(name, 4096, activation_checkpointing=mode, **changes)
    assert tracked_part(config, "cuda", PHASES[1])[0] == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 256])
def test_plan_is_what_a_tracker_counts_in_the_graph_of_a_processor(monkeypatch, precision, mode, width):
    monkeypatch.setattr(tracker, "graph_of_gpu", nullcontext)
    config = replace(
        PRETRAIN, hidden_size=width, num_heads=4, num_kv_heads=2, mlp_size=2 * width + 96, num_layers=3,
        context_length=256, micro_batch_rows=10, tokens_per_step=5120, precision=precision, activation_checkpointing=mode,
        tie_embeddings=width == 64, qk_norm=mode == "block", vocab_size=1031 if width == 64 else 8192,
    )  # fmt: skip
    assert tracked_part(config, "cpu", PHASES[1])[0] == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)


@pytest.mark.parametrize(("name", "tokens", "gpu_gb", "host_gib"), GOALS, ids=[goal[0] for goal in GOALS])
def test_goals_are_planned(name, tokens, gpu_gb, host_gib):
    config = shaped(name, tokens, activation_checkpointing="block", loss_chunk_rows=1024, tie_embeddings=name != "6.7B")
    planned = plan(config, 1)
    assert memory.allocated_bytes(planned) <= gpu_gb * GB
    assert max(planned.device[phase].total for phase in PHASES) <= (gpu_gb + 0.5) * GB
    assert needs(planned, 1)[HOST][1].total <= host_gib * 2**30


@pytest.mark.parametrize("name", CARDS)
def test_each_preset_plans_three_to_nine_tenths_of_its_card_and_twenty_tokens_a_parameter(name):
    config, ranks = getattr(config_module, name), 8 if name.startswith("GPUS") else 1
    share = needs(plan(config, ranks), ranks)[GPU][1].total / (CARDS[name] * GB)
    assert 0.6 <= share <= 0.9
    assert 19 <= config.num_steps * config.tokens_per_step / config.num_parameters <= 22
    assert config.accumulation_steps(ranks) >= 8


def test_presets_are_runs_of_their_own():
    presets = [PRETRAIN, DISTILL, *(getattr(config_module, name) for name in CARDS)]
    assert len({preset.run_dir for preset in presets}) == len(presets)
    assert DISTILL.data_dir == PRETRAIN.data_dir and DISTILL.teacher_dir == PRETRAIN.run_dir
    assert DISTILL.num_parameters < PRETRAIN.num_parameters and DISTILL.vocab_size == PRETRAIN.vocab_size


def test_teacher_is_counted_from_pretrain_or_from_its_folder(tmp_path):
    held = plan(DISTILL, 1).device[PHASES[2]].parts
    assert held["teacher"] == 2 * PRETRAIN.num_parameters
    described = {theirs: getattr(PRETRAIN, ours) for ours, theirs in memory.TRANSFORMERS_NAMES.items()}
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_key_value_heads": PRETRAIN.num_kv_heads}))
    assert plan(replace(DISTILL, teacher_dir=str(tmp_path)), 1).device[PHASES[2]].parts["teacher"] == held["teacher"]
    assert (
        plan(taught(DISTILL, tmp_path, **{name: getattr(PRETRAIN, name) for name in memory.TRANSFORMERS_NAMES}), 1)
        .device[PHASES[2]]
        .parts["teacher"]
        == held["teacher"]
    )
    for text in ("{}", "[]", "7", '{"vocab', '{"hidden_size": "wide"}', json.dumps(described | {"num_attention_heads": 5})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match="teacher_dir=.*describes no model.*name a run or a transformers folder"
        ) as refusal:
            plan(replace(DISTILL, teacher_dir=str(tmp_path)), 1)
        assert "\n" not in str(refusal.value)


def test_a_teacher_runs_with_the_students_micro_batch_and_precision(tmp_path):
    config = taught(student(precision="fp32", activation_checkpointing="block"), tmp_path, **WIDE)
    teacher = memory._teacher(config)
    assert teacher is not None and teacher.hidden_size == 256 and teacher.activation_checkpointing == "none"
    assert (teacher.context_length, teacher.micro_batch_rows, teacher.precision) == (256, 8, "fp32")


def test_teacher_and_student_are_never_planned_together_with_labels(tmp_path):
    config = taught(student(), tmp_path, **WIDE)
    beside, alone = plan(config, 1), plan(replace(config, **LABELS), 1)
    assert tuple(beside.device) == PHASES and tuple(alone.device) == (TEACHER_ALONE, *PHASES)
    teacher = alone.device[TEACHER_ALONE].parts
    assert teacher["teacher"] == beside.device[PHASES[2]].parts["teacher"] and "weights" not in teacher
    assert not {"master weights", "Adam's moments", "staging"} & set(alone.host[TEACHER_ALONE].parts)
    for phase in PHASES:
        assert "teacher" in beside.device[phase].parts and "teacher" not in alone.device[phase].parts


@pytest.mark.parametrize(("changes", "teacher", "moment"), PAIRINGS + GPU_PAIRINGS)
def test_plan_of_a_step_with_a_teacher_is_what_a_tracker_counts_in_the_graph_of_a_gpu(tmp_path, changes, teacher, moment):
    config = taught(student(**changes), tmp_path, **teacher)
    planned, name = tracked_part(config, "cuda", PHASES[1])
    assert planned == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE) and name == moment


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("changes", "teacher", "moment"), PAIRINGS)
def test_plan_of_a_step_with_a_teacher_is_what_a_tracker_counts_in_the_graph_of_a_processor(
    monkeypatch, tmp_path, changes, teacher, moment, precision
):
    monkeypatch.setattr(tracker, "graph_of_gpu", nullcontext)
    config = taught(student(precision=precision, **changes), tmp_path, **teacher)
    planned, _ = tracked_part(config, "cpu", PHASES[1])
    assert planned == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("changes", "teacher"),
    [
        (LABELS, WIDE),
        (LABELS, NARROW_MLP),
        (LABELS | MANY_WORDS, WIDE),
        ({"teacher_top_k": 500, "loss_chunk_rows": 1024}, WIDE),
    ],
    ids=["MLP", "attention", "many words", "many labels"],
)
def test_plan_of_the_teacher_alone_is_what_a_tracker_counts(monkeypatch, tmp_path, changes, teacher, device_type):
    if device_type == "cpu":
        monkeypatch.setattr(tracker, "graph_of_gpu", nullcontext)
    config = taught(student(**changes), tmp_path, **teacher)
    planned, _ = tracked_part(config, device_type, TEACHER_ALONE)
    assert planned == pytest.approx(tracker.fake_teacher_peak(config).num_bytes, rel=CLOSE)


@pytest.mark.parametrize(("vocab_size", "record"), [(2**16, 4 * 32 + 4), (2**16 + 1, 6 * 32 + 4)])
def test_a_label_on_the_disk_is_its_ids_their_logarithms_and_a_tail(vocab_size, record):
    config = replace(DISTILL, vocab_size=vocab_size)
    assert plan(config, 1).disk["the teacher's labels"] == 0
    num_tokens = config.num_steps * config.tokens_per_step
    assert plan(replace(config, **LABELS), 1).disk["the teacher's labels"] == num_tokens * record


def test_a_teacher_for_which_there_is_no_room_beside_the_student_is_offered_as_labels(tmp_path):
    config = taught(shaped("124M", 2048, micro_batch_rows=1), tmp_path, **SHAPES["6.7B"])
    beside, alone = (needs(plan(each, 1), 1)[GPU][1].total for each in (config, replace(config, **LABELS)))
    with pytest.raises(ValueError) as refusal:
        memory.refuse_unfit_memory(config, 1, 1, Room((beside + alone) // 2, 64 * GB, 0, "free"), "cuda")
    assert "the largest item is teacher, 1" in str(refusal.value) and "what fits: " in str(refusal.value)
    assert "teacher_top_k=32" in str(refusal.value)
    for changes in ({}, LABELS):
        with pytest.raises(ValueError, match="the largest item is teacher, .*choose a smaller teacher$"):
            memory.refuse_unfit_memory(replace(config, **changes), 1, 1, Room(8 * GB, 64 * GB, 0, "free"), "cuda")


def test_a_teacher_beside_costs_its_forward_in_each_step_and_one_alone_before_the_first(tmp_path):
    config = taught(shaped("124M", 8192), tmp_path, **SHAPES["350M"])
    labelled, without, rates = replace(config, **LABELS), replace(config, teacher_dir=None), memory.Rates(1e12, 1e10, 1e10)
    forward = memory.flops_per_token(config) - memory.flops_per_token(without)
    assert memory.flops_per_token(labelled) == memory.flops_per_token(without)
    body = replace(without, **(SHAPES["350M"] | {"vocab_size": config.vocab_size})).num_parameters - 1024 * config.vocab_size
    assert forward == pytest.approx(2 * body + 2 * 24 * 2048 * 1024, rel=1e-3)
    seconds = [memory.teacher_seconds(each, 1, rates) for each in (without, config, labelled)]
    num_tokens = config.num_steps * config.tokens_per_step
    assert seconds == [0, 0, pytest.approx(num_tokens * forward / (memory.EFFICIENCY * rates.flops))]
    assert memory.teacher_seconds(labelled, 2, rates) == seconds[2] / 2
    words = memory._time_words(labelled, 1, 1, "cuda", rates)
    assert re.fullmatch(r"about \S+ hours, \S+ hours of it the teacher alone, for \S+ steps at \S+ tokens/s", words), words


@settings(max_examples=40, deadline=None)
@given(configs(), st.sampled_from([1, 2]), st.sampled_from(["cuda", "cpu"]), st.floats(0.1, 1.1), st.floats(0.3, 1.1))
def test_what_is_refused_is_too_large_and_what_is_offered_fits(config, ranks, device_type, gpu_share, host_share):
    wanted = needs(plan(config, ranks, device_type), ranks)
    gpu = int(gpu_share * wanted[GPU][1].total) if GPU in wanted else None
    room = Room(gpu, int(host_share * wanted[HOST][1].total), 0, "free")
    room_of = {GPU: room.gpu, HOST: room.host}
    fits = all(at.total <= room_of[kind] for kind, (_, at) in wanted.items())
    try:
        memory.refuse_unfit_memory(config, ranks, ranks, room, device_type)
        assert fits
    except ValueError as refusal:
        assert not fits and "\n" not in str(refusal)
        assert re.match(
            r"(teacher alone|initialisation|training step|save and load) \(.+\) needs \S+ [GM]iB of (GPU|host) memory"
            r"( for 2 ranks)? and"
            r" \S+ [GM]iB are free; the largest item is .+, \S+ [GM]iB; (what fits: |with |choose )",
            str(refusal),
        )
        for changes in memory.offers(config, ranks, ranks, room, device_type):
            assert memory.as_written(changes) in str(refusal)
            offered = needs(plan(replace(config, **changes), ranks, device_type), ranks)
            assert all(at.total <= room_of[kind] for kind, (_, at) in offered.items())


def test_refusal_names_peak_item_and_the_nearest_that_fit():
    config = shaped("124M", 8192)
    with pytest.raises(ValueError) as refusal:
        memory.refuse_unfit_memory(config, 1, 1, Room(2 * GB, 64 * GB, 0, "free"), "cuda")
    assert "the largest item is saved activations" in str(refusal.value)
    assert 'what fits: micro_batch_rows=1, or activation_checkpointing="block", or context_length=' in str(refusal.value)
    big = replace(shaped("6.7B", 4096), num_layers=200, activation_checkpointing="block_offload")
    with pytest.raises(ValueError, match="choose a smaller model$|num_layers=.* with that fits"):
        memory.refuse_unfit_memory(big, 1, 1, Room(2 * GB, 64 * GB, 0, "there in all"), "cuda")


def test_room_is_what_the_control_groups_leave(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (tmp_path / "a", "1000"), (tmp_path, "3000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("900")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert sorted(memory._limits_above(str(tmp_path), "/a/b", ("memory.max", "memory.current"))) == [(1000, 600), (3000, 600)]
    room = memory.room_free(PRETRAIN, torch.device("cpu"))
    assert room.host > 0 and room.gpu is None and room.disk > 0
    assert memory.room_in_all(PRETRAIN, torch.device("cpu")).host <= memory._kilobytes("/proc/meminfo")["MemTotal"]


def test_hours_follow_the_rates():
    slow = memory.Rates(1e9, 1e9, 1e9)
    for field in ("flops", "host_bytes", "link_bytes"):
        fast = slow._replace(**{field: 1e12})
        speeds = [memory.tokens_per_second(shaped("124M", 8192), 1, 1, "cuda", rates) for rates in (slow, fast)]
        assert speeds[0] < speeds[1]
    assert memory.hours(PRETRAIN, PRETRAIN.tokens_per_step / 3600, 0.0) == pytest.approx(PRETRAIN.num_steps)
    assert memory.hours(PRETRAIN, PRETRAIN.tokens_per_step / 3600, 7200.0) == pytest.approx(PRETRAIN.num_steps + 2)
    assert all(rate > 0 for rate in memory.measure_rates(PRETRAIN, torch.device("cpu")))


@pytest.mark.parametrize("config", [PRETRAIN, DISTILL, replace(DISTILL, **LABELS)], ids=["PRETRAIN", "DISTILL", "labels"])
def test_table_has_every_kind_and_keeps_to_its_columns(config):
    text = memory.table("A preset", config, 1, torch.device("cpu"))
    planned = plan(config, 1, "cpu")
    kinds = {kind for moments in (planned.device, planned.host) for at in moments.values() for kind in at.parts}
    assert all(kind in text for kind in kinds | set(phases(config))) and "it fits" in text and "tokens/s" in text
    assert max(map(len, text.splitlines())) <= 128


LIMIT_MEMORY = """
import resource
calls = []

def objective(engine, windows, config):
    calls.append(1)
    if len(calls) == 4:
        kilobytes = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024 + 2**20, resource.RLIM_INFINITY))
        windows = windows.repeat(8, 1)
    return next_token(engine, windows, config)
"""


@pytest.fixture(scope="module")
def starved(tmp_path_factory) -> tuple[TrainingConfig, str]:
    """A run whose memory was limited after its save at step 2, in step 4, which reads much at once; what it printed."""
    folder = tmp_path_factory.mktemp("starved")
    config = tiny_config(
        folder, precision="fp32", num_layers=4, context_length=256, micro_batch_rows=64, tokens_per_step=2**14, num_steps=6,
        save_every_steps=2, eval_every_steps=None,
    )  # fmt: skip
    (result,) = launch(folder, training_script(config, LIMIT_MEMORY), ["python"])
    assert (folder / "exit-0").read_text() == "1" and result.returncode == 1, result.stdout
    return config, result.stdout


def test_out_of_memory_ends_with_the_plan_the_peak_and_advice_and_leaves_the_checkpoint(starved):
    config, output = starved
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert "Traceback" not in output
    assert re.search(r"host memory: \S+ [GM]iB planned, \S+ [GM]iB measured; less is needed with micro_batch_rows=", line), line
    folder = newest_folder(config)
    assert folder is not None and folder.name == "step-00000002" and find_fault(folder) is None
    assert max(record["step"] for record in metrics(config)) == 3


def test_start_says_the_plan_in_one_line(starved):
    (line,) = [line for line in starved[1].splitlines() if line.startswith("The plan: ")]
    assert re.search(r"\S+ [GM]iB of \S+ [GM]iB free host memory \(.+\), about \S+ \S+ for 6 steps at \S+ tokens/s", line)


def test_a_model_far_too_large_is_refused_before_anything_is_loaded(tmp_path):
    config = tiny_config(
        tmp_path, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_size=28672, vocab_size=32000
    )
    (result,) = launch(tmp_path, training_script(config, ""), ["python"])
    assert result.returncode == 2, result.stdout
    refusals = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 1 and "GiB are there in all" in refusals[0]
    assert not Path(config.data_dir).exists() and "Starting DeepSpeed" not in result.stdout


@pytest.mark.parametrize("name", ["bf16", "distill", "labels"])
def test_finished_run_holds_predicted_beside_measured(finished_runs, name):
    config = finished_runs[1, name]
    (record,) = [record for record in metrics(config) if record.get("event") == "memory"]
    assert record["step"] == config.num_steps
    assert record["host_planned_gib"] == pytest.approx(record["host_peak_gib"], rel=0.5)
