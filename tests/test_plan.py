"""Laws of the plan: its arithmetic, its accuracy against tracked storages in fake mode, the presets, the teacher."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tracker
from hypothesis import given
from hypothesis import strategies as st

from scripts import config as config_module
from scripts.config import ACTIVATION_CHECKPOINTING, COMPILED_ON, DISTILL, PRECISIONS, PRETRAIN, TrainingConfig
from scripts.memory import GPU, HOST, OUTSIDE_TORCH, allocated_bytes, needs
from scripts.model.huggingface import teacher_config, transformers_config
from scripts.plan.footprint import PHASES, TEACHER_ALONE, WINDOW_BYTES, checkpoint_bytes, device_moments, phases, plan
from scripts.plan.machine import moments_bytes

GB, GIB, MIB, CLOSE = 10**9, 2**30, 2**20, 0.01
STEP = "training step"
CARDS = {
    "GPU_4GB": 4, "GPU_6GB": 6, "GPU_8GB": 8, "GPU_12GB": 12, "GPU_16GB": 16, "GPU_24GB": 24, "GPUS_8X80GB": 80,
}  # fmt: skip
UNTRACKED = {
    "CUDA and its libraries", "allocator's slack", "cuBLAS's workspaces", "kernels' own work",
    "gradients being copied to the host",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "124M": dict(hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, mlp_size=2048, vocab_size=50304),
    "350M": dict(hidden_size=1024, num_layers=24, num_heads=16, num_kv_heads=4, mlp_size=2816, vocab_size=32768),
    "1.3B": dict(hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=16, mlp_size=5504, vocab_size=50304),
    "3B": dict(hidden_size=3072, num_layers=28, num_heads=24, num_kv_heads=8, mlp_size=8192, vocab_size=50304),
    "6.7B": dict(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_size=11008, vocab_size=32000),
}
THREE_LAYERS, TIED, LABELS = {"num_layers": 3}, {"tie_embeddings": True}, {"teacher_top_k": 32}
FEW_WORDS = dict(vocab_size=257, loss_chunk_rows=1024)
NO_MLP = FEW_WORDS | {"mlp_size": 64, "hidden_size": 256, "head_size": 64}
LOSS, LOSS_BACKWARD, EMBEDDING = "the loss", "the loss's backward", "the embedding's backward"
LAST_PRODUCT, FIRST_PRODUCTS = "the backward of an MLP's last product", "the backward of an MLP's first products"
ATTENTION, TEACHER_FORWARD = "the backward of attention", "the teacher's forward"


class Goal(NamedTuple):
    """The most that a shape of SHAPES may take with a micro-batch of `tokens`: GB of the card, GiB of the host."""

    shape: str
    tokens: int
    gpu_gb: float
    host_gib: float


class Fake(NamedTuple):
    """A step that the tracker runs in fake mode, and the moment at which it takes most."""

    shape: str
    mode: str
    changes: dict[str, Any]
    moment: str


GOALS = (Goal("124M", 8192, 1.5, 4.5), Goal("1.3B", 8192, 5.5, 23), Goal("3B", 4096, 9.0, 48), Goal("6.7B", 4096, 17.5, 105))
FAKES = (
    Fake("124M", "none", TIED, LOSS), Fake("124M", "block_offload", {}, LOSS), Fake("350M", "none", {"qk_norm": True}, LOSS),
    Fake("350M", "block", {"micro_batch_rows": 8, "loss_chunk_rows": 512, "qk_norm": True}, LAST_PRODUCT),
    Fake("350M", "block", {"loss_chunk_rows": 8192}, LOSS), Fake("350M", "block_offload", {"accumulate_on": "gpu"}, LOSS),
    Fake("350M", "none", {"mlp_size": 128, "loss_chunk_rows": 256}, LOSS_BACKWARD),
    Fake("350M", "block", FEW_WORDS | {"mlp_size": 64}, FIRST_PRODUCTS),
    Fake("350M", "none", FEW_WORDS | {"mlp_size": 64, "hidden_size": 256, "head_size": 128, "qk_norm": True}, ATTENTION),
    Fake("350M", "block", TIED | {"context_length": 16, "micro_batch_rows": 2, "mlp_size": 64}, EMBEDDING),
    Fake("1.3B", "block_offload", TIED | {"micro_batch_rows": 4, "loss_chunk_rows": 1024}, LAST_PRODUCT),
    Fake("1.3B", "none", {}, LOSS), Fake("3B", "block_offload", {"accumulate_on": "gpu"}, LOSS),
    Fake("6.7B", "block", {}, LOSS),
    Fake("350M", "none", NO_MLP | {"precision": "fp16", "qk_norm": True}, ATTENTION),
    Fake("350M", "block", NO_MLP | {"precision": "fp32"}, ATTENTION),
    Fake("350M", "block", NO_MLP | {"head_size": 200}, ATTENTION),
    Fake("350M", "none", FEW_WORDS | {"precision": "fp16", "head_size": 100}, LAST_PRODUCT),
    Fake("350M", "none", NO_MLP | {"head_size": 100}, ATTENTION), Fake("350M", "none", {"head_size": 264}, LOSS),
)  # fmt: skip
WHOLE = (Fake("124M", "none", TIED, LOSS), Fake("1.3B", "block_offload", {}, LOSS), Fake("6.7B", "block", TIED, LOSS))

TINY = dict(hidden_size=64, num_heads=4, num_kv_heads=2, mlp_size=96, num_layers=2, vocab_size=512, loss_chunk_rows=256)
WIDE = dict(hidden_size=256, num_heads=4, num_kv_heads=2, head_size=16, mlp_size=1000, num_layers=3)
NARROW_MLP = WIDE | dict(mlp_size=64, num_heads=8, num_kv_heads=1, head_size=64, qk_norm=True)
MANY_WORDS = dict(vocab_size=8192, loss_chunk_rows=1024, distill_temperature=2.0)
SMALL = SHAPES["124M"] | THREE_LAYERS
SHALLOW = dict(hidden_size=1280, num_heads=4, num_kv_heads=1, head_size=16, num_layers=1, mlp_size=128)


class Pair(NamedTuple):
    """A student's and a teacher's shape, and the moment at which a step of both takes most on a GPU."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    moment: str


PAIRS = {
    "the teacher's MLP": Pair({}, WIDE, TEACHER_FORWARD),
    "the teacher's attention": Pair({}, NARROW_MLP, TEACHER_FORWARD),
    "many words": Pair(MANY_WORDS | {"distill_divergence": "reverse"}, SHALLOW, LOSS),
    "many words and labels": Pair(MANY_WORDS | LABELS, WIDE, LOSS),
    "many labels": Pair({"loss_chunk_rows": 1024, "teacher_top_k": 500}, WIDE, LOSS),
    "a wide teacher of a student that keeps all": Pair(
        dict(hidden_size=128, mlp_size=352, num_layers=4, vocab_size=257, loss_chunk_rows=64),
        SHALLOW | {"hidden_size": 1024}, "the forward",
    ),
    "350M to 124M": Pair(SMALL | {"activation_checkpointing": "block"}, SHAPES["350M"] | THREE_LAYERS, LOSS),
    "350M to 124M by labels": Pair(SMALL | LABELS, SHAPES["350M"] | THREE_LAYERS, LOSS),
}  # fmt: skip
INPUTS_KEPT = dict(hidden_size=512, num_kv_heads=1, head_size=16, mlp_size=64, num_layers=8, activation_checkpointing="block")
GPU_PAIRS = PAIRS | {"a wide teacher of a student that keeps inputs": Pair(FEW_WORDS | INPUTS_KEPT, SHALLOW, LOSS)}
ALONE = {
    "MLP": Pair(LABELS, WIDE, TEACHER_FORWARD), "attention": Pair(LABELS, NARROW_MLP, TEACHER_FORWARD),
    "many words": Pair(LABELS | MANY_WORDS, WIDE, "the labels"),
    "many labels": Pair({"teacher_top_k": 500, "loss_chunk_rows": 1024}, WIDE, "the labels"),
}  # fmt: skip


def named(cases: dict[str, Pair]) -> list:
    """Test cases with their names as ids; those with many chunks are slow."""
    slow = {name: [pytest.mark.slow] for name in cases if name.startswith("a wide teacher")}
    return [pytest.param(case, id=name, marks=slow.get(name, [])) for name, case in cases.items()]


def shaped(name: str, tokens: int, **changes) -> TrainingConfig:
    """A model of SHAPES with one micro-batch of `tokens` tokens four times a step."""
    length = min(tokens, 2048)
    fields: dict[str, Any] = dict(
        **SHAPES[name], head_size=None, tie_embeddings=False, context_length=length, micro_batch_rows=tokens // length,
        tokens_per_step=4 * tokens, eval_tokens=length, loss_chunk_rows=2048, run_dir="no-run", data_dir="no-data",
        optimizer="adamw", optimizer_state_precision="fp32", qk_norm=False,
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
    """Any small configuration with the optimizer on the host: alone, with PRETRAIN as its teacher, or with its labels."""
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
        teacher_top_k=top_k, optimizer=draw(st.sampled_from(["adamw", "muon"])),
        optimizer_state_precision=draw(st.sampled_from(["bf16", "fp32"])),
    )  # fmt: skip


def norms_of(config: TrainingConfig) -> int:
    return config.num_layers * (config.block_parameters - config.block_matrix_parameters) + config.hidden_size


def totals(config: TrainingConfig, device_type: str) -> list[int]:
    """The device's and the host's bytes of each phase."""
    planned = plan(config, 1, device_type)
    return [at.total for moments in (planned.device, planned.host) for at in moments.values()]


class Tracked(NamedTuple):
    """A phase's peak of what a tracker of storages sees, and the moment of it."""

    num_bytes: int
    moment: str


def tracked_part(config: TrainingConfig, device_type: str, phase: str) -> Tracked:
    """What a plan says of a phase, without the kinds that no tracker of storages sees."""
    moments = device_moments(config, 1, device_type, phase)
    return max(Tracked(sum(size for kind, size in at.parts.items() if kind not in UNTRACKED), at.name) for at in moments)


def as_on_host(monkeypatch, has_16_bit_products: bool) -> None:
    """From here on, the processor multiplies 16-bit matrices, or does not."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_16_bit_products)


@given(configs(), st.sampled_from([1, 2, 4]), st.sampled_from(["cuda", "cpu"]))
def test_a_plan_is_each_phases_largest_moment_and_a_need_the_largest_phase(config, ranks, device_type):
    planned = plan(config, ranks, device_type)
    assert tuple(planned.device) == tuple(planned.host) == phases(config)
    device, host = ([sum(at.parts.values()) for at in moments.values()] for moments in (planned.device, planned.host))
    for phase, total in zip(phases(config), device, strict=True):
        moments = list(device_moments(config, ranks, device_type, phase))
        assert total == max(sum(at.parts.values()) for at in moments)
        assert all(min(at.parts.values()) > 0 for at in (*moments, planned.host[phase]))
    wanted = {kind: sum(need.moment.parts.values()) for kind, need in needs(planned, ranks).items()}
    both = max(on_device + on_host for on_device, on_host in zip(device, host, strict=True))
    assert wanted == ({GPU: max(device), HOST: ranks * max(host)} if device_type == "cuda" else {HOST: ranks * both})


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
    alone, one_of = plan(config, 1).host[STEP].parts, plan(config, ranks).host[STEP].parts
    shared = {"master weights", "gradients", "the optimizer's moments"} & alone.keys()
    assert len(shared) == (3 if config.accumulate_on == "cpu" else 2)
    for kind in shared:
        assert alone[kind] / ranks <= one_of[kind] < alone[kind] / ranks + 16
    assert plan(config, 1).device[STEP].parts["weights"] == plan(config, ranks).device[STEP].parts["weights"]
    assert all(alone[kind] == one_of[kind] for kind in ("the program", "the data"))


@given(configs())
def test_host_takes_masters_gradients_and_moments_and_staging_of_two_groups_but_less_at_first(config):
    """A parameter: AdamW 16 bytes, with 16-bit moments 12; a matrix under Muon 12 and 10; 4 less with gradients on the GPU."""
    parts, first = (plan(config, 1, "cpu").host[phase].parts for phase in (STEP, "initialisation"))
    matrices = config.num_layers * (config.block_parameters - 2 * config.hidden_size - 2 * config.head_width * config.qk_norm)
    others, short = config.num_parameters - matrices, config.optimizer_state_precision == "bf16"
    of_matrix = {("adamw", False): 16, ("adamw", True): 12, ("muon", False): 12, ("muon", True): 10}[config.optimizer, short]
    whole, gradients = (12 if short else 16) * others + of_matrix * matrices, 4 * config.num_parameters
    is_up = config.accumulate_on == "gpu"
    assert first.get("gradients", 0) == parts.get("gradients", 0) == (0 if is_up else gradients)
    assert first["master weights"] == 4 * config.num_parameters and "the optimizer's moments" not in first
    kinds = {"master weights", "gradients", "the optimizer's moments"} & parts.keys()
    assert sum(parts[kind] for kind in kinds) == whole - gradients * is_up
    largest = max(config.vocab_size * config.hidden_size, config.block_parameters)
    piece = 4 * min(largest, 2**22) * (is_up and config.accumulation_precision == "bf16")
    assert parts["staging"] <= 2 * config.dtype.itemsize * largest + piece


@given(configs(), st.sampled_from([1, 16]))
def test_with_the_optimizer_on_the_gpu_its_state_and_sums_are_there_and_no_gradient_goes_down(config, micro_batches):
    tokens = config.micro_batch_rows * config.context_length * micro_batches
    on_gpu = replace(config, offload_optimizer=False, accumulate_on="gpu", tokens_per_step=tokens)
    size = {"bf16": 2, "fp32": 4}[config.accumulation_precision]
    for at in device_moments(on_gpu, 1, "cuda", STEP):
        assert at.parts["optimizer state"] == 4 * config.num_parameters + moments_bytes(config)
        assert at.parts["sums of gradients"] == size * config.num_parameters
        assert "gradients being copied to the host" not in at.parts
    assert not {"master weights", "gradients", "page-locked staging"} & set(plan(on_gpu, 1).host[STEP].parts)


@given(configs(), st.sampled_from([1, 2, 8]))
def test_a_gpu_also_holds_two_cublas_workspaces_cuda_two_communicators_of_nccl_and_two_percent_of_slack(config, ranks):
    """cuBLAS keeps 32 MiB for the main thread and 32 MiB for autograd's: measured on an H100. One rank talks to nobody."""
    for at in plan(config, ranks).device.values():
        own = {kind: size for kind, size in at.parts.items() if kind not in OUTSIDE_TORCH}
        assert at.parts.get("NCCL's communicators", 0) == (512 * MIB if ranks > 1 else 0)
        assert own["cuBLAS's workspaces"] == 64 * MIB and at.parts["CUDA and its libraries"] == 512 * MIB
        assert at.parts["allocator's slack"] == int(0.02 * sum(own.values()))
    for at in plan(config, ranks, "cpu").device.values():
        assert not {"cuBLAS's workspaces", "NCCL's communicators"} & set(at.parts)


@given(configs(), st.sampled_from([1, 2]))
def test_page_locked_memory_is_two_groups_of_weights_and_the_block_inputs_and_is_there_from_the_first_step_on(config, ranks):
    hidden = config.dtype.itemsize * config.micro_batch_rows * config.context_length * config.hidden_size
    inputs = (config.num_layers - 1) * hidden * (config.activation_checkpointing == "block_offload")
    step, saving = (
        {kind: size for kind, size in plan(config, ranks).host[phase].parts.items() if kind.startswith("page-locked")}
        for phase in (STEP, "save and load")
    )
    assert step == saving and step.get("page-locked block inputs", 0) == inputs
    size = {"bf16": 2, "fp32": 4}[config.accumulation_precision]
    group = -(-max(config.vocab_size * config.hidden_size, config.block_matrix_parameters, norms_of(config)) // ranks)
    landing = 2 * size * min(group, 2**22) * (config.accumulate_on == "gpu")
    assert step["page-locked staging"] == plan(config, ranks, "cpu").host[STEP].parts["staging"] + landing


@given(configs())
def test_a_checkpoint_is_weights_masters_and_moments_and_the_disk_holds_one_more_than_it_keeps(config):
    tensors = config.num_parameters * (8 if config.precision == "fp32" else 6) + moments_bytes(config)
    assert checkpoint_bytes(config) == tensors
    disk, never = plan(config, 1).disk, plan(replace(config, save_every_steps=None), 1).disk
    saved = disk["checkpoints"] + disk["the checkpoint being written"]
    assert saved == (config.keep_checkpoints + 1) * checkpoint_bytes(config)
    assert disk["the best one"] == checkpoint_bytes(config) * (config.eval_every_steps is not None)
    assert disk["the one before the decay"] == checkpoint_bytes(config) * (config.decay_steps is not None)
    assert never["checkpoints"] == never["the checkpoint being written"] == 0


@pytest.mark.parametrize("case", FAKES, ids=lambda case: f"{case.shape} {case.mode} {case.moment}")
def test_plan_is_what_a_tracker_counts_on_a_gpu(case):
    config = shaped(case.shape, 4096, activation_checkpointing=case.mode, **(THREE_LAYERS | case.changes))
    planned = tracked_part(config, "cuda", STEP)
    assert planned.num_bytes == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)
    assert planned.moment == case.moment


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # Flash attention: 192 multiprocessors over 2 * 4 heads are 24 sums; 96 of 80 features, 1024 of 1000 positions.
        ({"head_size": 80}, 4 * 8 * 1024 * (24 * 96 + 1) + 2 * 2 * 2000 * 320),
        ({"head_size": 80, "num_kv_heads": 4}, 4 * 8 * 1024 * (24 * 96 + 1)),
        ({"head_size": 160, "num_kv_heads": 4, "micro_batch_rows": 50}, 4 * 200 * 1024 * (1 * 192 + 1)),
        # A width that is no multiple of 8: the output and its gradient, with the zeros of 104 features, once more.
        ({"head_size": 100, "num_kv_heads": 4}, 4 * 8 * 1024 * (24 * 128 + 1) + 2 * 2 * 2000 * 416),
        ({"head_size": 100, "precision": "fp16"}, 4 * 8 * (1024 * (128 + 1) + 2 * 64 * 128) + 2 * 2000 * 416),
        # The memory-efficient kernel: one sum, and a tile of 64 positions each of k and v.
        ({"head_size": 80, "precision": "fp16"}, 4 * 8 * (1024 * (128 + 1) + 2 * 64 * 128)),
        ({"head_size": 200}, 4 * 8 * (1024 * (256 + 1) + 2 * 64 * 256)),
        ({"head_size": 64, "precision": "fp32", "num_kv_heads": 4}, 4 * 8 * (1024 * (64 + 1) + 2 * 64 * 128)),
    ],
)  # fmt: skip
def test_attentions_kernels_take_for_themselves_what_torchs_sources_say(changes, wanted):
    fields = {"num_heads": 4, "num_kv_heads": 1, "context_length": 1000, "micro_batch_rows": 2, "eval_tokens": 1000}
    fields |= {"hidden_size": 256} | changes
    config = replace(PRETRAIN, tokens_per_step=1000 * fields["micro_batch_rows"], **fields)
    found = {at.parts["kernels' own work"] for at in device_moments(config, 1, "cuda", STEP) if at.name == ATTENTION}
    assert found == {wanted}


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case.shape} {case.mode}")
def test_plan_of_a_whole_model_is_what_a_tracker_counts(case):
    config = shaped(case.shape, 4096, activation_checkpointing=case.mode, **case.changes)
    assert tracked_part(config, "cuda", STEP).num_bytes == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)


@pytest.mark.parametrize(
    ("precision", "has_16_bit_products", "mode", "width"),
    [
        ("bf16", True, "none", 64), ("bf16", True, "block", 256), ("bf16", True, "block_offload", 64),
        ("bf16", False, "none", 256), ("bf16", False, "block", 64), ("bf16", False, "block_offload", 256),
        ("fp32", False, "none", 64), ("fp32", False, "block", 256), ("fp32", False, "block_offload", 64),
    ],
)  # fmt: skip
def test_plan_is_what_a_tracker_counts_on_a_processor(monkeypatch, precision, has_16_bit_products, mode, width):
    as_on_host(monkeypatch, has_16_bit_products)
    config = replace(
        PRETRAIN, hidden_size=width, num_heads=4, num_kv_heads=2, mlp_size=2 * width + 96, num_layers=3,
        context_length=256, micro_batch_rows=10, tokens_per_step=5120, precision=precision, activation_checkpointing=mode,
        tie_embeddings=width == 64, qk_norm=mode == "block", vocab_size=1031 if width == 64 else 8192,
    )  # fmt: skip
    planned = tracked_part(config, "cpu", STEP).num_bytes
    assert planned == pytest.approx(tracker.fake_step_peak(config, "cpu").num_bytes, rel=CLOSE)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.shape)
def test_goals_are_planned(goal):
    tied = goal.shape != "6.7B"
    config = shaped(goal.shape, goal.tokens, activation_checkpointing="block", loss_chunk_rows=1024, tie_embeddings=tied)
    planned = plan(config, 1)
    assert allocated_bytes(planned) <= goal.gpu_gb * GB
    assert max(planned.device[phase].total for phase in PHASES) <= (goal.gpu_gb + 0.5) * GB
    assert 0.9 * goal.host_gib * GIB <= needs(planned, 1)[HOST].moment.total <= goal.host_gib * GIB


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("compiled", COMPILED_ON)
def test_torchs_compiler_is_in_the_plan_of_the_host_where_it_compiles_and_nowhere_on_the_card(compiled, device_type):
    without = plan(replace(DISTILL, compile_kernels="never"), 1, device_type)
    planned = plan(replace(DISTILL, compile_kernels=compiled), 1, device_type)
    more = config_module.COMPILER_BYTES[device_type] * (compiled == "always" or (compiled, device_type) == ("gpu", "cuda"))
    assert needs(planned, 1)[HOST].moment.total - needs(without, 1)[HOST].moment.total == more
    assert planned.device == without.device


@pytest.mark.parametrize("name", CARDS)
def test_each_preset_plans_six_to_nine_tenths_of_its_card_and_twenty_tokens_a_parameter(name):
    config, ranks = getattr(config_module, name), 8 if name.startswith("GPUS") else 1
    share = needs(plan(config, ranks), ranks)[GPU].moment.total / (CARDS[name] * GB)
    assert 0.6 <= share <= 0.9
    assert 19 <= config.num_steps * config.tokens_per_step / config.num_parameters <= 22
    assert config.accumulation_steps(ranks) >= 8


def test_presets_are_runs_of_their_own():
    presets = [PRETRAIN, DISTILL, *(getattr(config_module, name) for name in CARDS)]
    assert len({preset.run_dir for preset in presets}) == len(presets)
    assert DISTILL.data_dir == PRETRAIN.data_dir and DISTILL.teacher_dir == PRETRAIN.run_dir
    assert DISTILL.num_parameters < PRETRAIN.num_parameters and DISTILL.vocab_size == PRETRAIN.vocab_size


def test_teacher_is_counted_from_pretrain_or_from_its_folder(tmp_path):
    found = []
    for described in (None, asdict(PRETRAIN), transformers_config(PRETRAIN, 256)):
        folder = PRETRAIN.run_dir if described is None else str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(described))
        found.append(plan(replace(DISTILL, teacher_dir=folder), 1).device["save and load"].parts["teacher"])
    assert found == [2 * PRETRAIN.num_parameters] * 3


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"vocab', '{"hidden_size": "wide"}'])
def test_a_teacher_that_is_not_described_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="teacher_dir=.*describes no model.*name a run or a transformers folder") as refusal:
        plan(replace(DISTILL, teacher_dir=str(tmp_path)), 1)
    assert "\n" not in str(refusal.value)


def test_a_teacher_runs_with_the_students_micro_batch_and_precision(tmp_path):
    config = taught(student(precision="fp32", activation_checkpointing="block"), tmp_path, **WIDE)
    teacher = teacher_config(config)
    assert teacher is not None and teacher.hidden_size == 256 and teacher.activation_checkpointing == "none"
    assert (teacher.context_length, teacher.micro_batch_rows, teacher.precision) == (256, 8, "fp32")


def test_teacher_and_student_are_never_planned_together_with_labels(tmp_path):
    config = taught(student(), tmp_path, **WIDE)
    beside, alone = plan(config, 1), plan(replace(config, **LABELS), 1)
    assert tuple(beside.device) == PHASES and tuple(alone.device) == (TEACHER_ALONE, *PHASES)
    teacher = alone.device[TEACHER_ALONE].parts
    assert teacher["teacher"] == beside.device[PHASES[2]].parts["teacher"] and "weights" not in teacher
    assert not {"master weights", "the optimizer's moments", "staging"} & set(alone.host[TEACHER_ALONE].parts)
    for phase in PHASES:
        assert "teacher" in beside.device[phase].parts and "teacher" not in alone.device[phase].parts


@pytest.mark.parametrize("pair", named(GPU_PAIRS))
def test_plan_of_a_step_with_a_teacher_is_what_a_tracker_counts_on_a_gpu(tmp_path, pair):
    config = taught(student(**pair.student), tmp_path, **pair.teacher)
    planned = tracked_part(config, "cuda", STEP)
    assert planned.num_bytes == pytest.approx(tracker.fake_step_peak(config).num_bytes, rel=CLOSE)
    assert planned.moment == pair.moment


@pytest.mark.parametrize(
    ("precision", "has_16_bit_products"),
    [("bf16", False), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in (("bf16", True), ("fp32", False)))],
)
@pytest.mark.parametrize("pair", named(PAIRS))
def test_plan_of_a_step_with_a_teacher_is_what_a_tracker_counts_on_a_processor(
    monkeypatch, tmp_path, pair, precision, has_16_bit_products
):
    as_on_host(monkeypatch, has_16_bit_products)
    config = taught(student(precision=precision, **pair.student), tmp_path, **pair.teacher)
    planned = tracked_part(config, "cpu", STEP).num_bytes
    assert planned == pytest.approx(tracker.fake_step_peak(config, "cpu").num_bytes, rel=CLOSE)


@pytest.mark.parametrize("length", [100, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("has_16_bit_products", [False, True])
def test_plan_of_heads_wider_than_the_mlp_is_what_a_tracker_counts_on_a_processor(
    monkeypatch, precision, has_16_bit_products, heads, kv_heads, length
):
    """The moments of attention, and of the products that make its heads."""
    as_on_host(monkeypatch, has_16_bit_products)
    config = shaped("124M", length, precision=precision, num_layers=2, mlp_size=64, vocab_size=257, loss_chunk_rows=64)
    config = replace(config, hidden_size=64 * heads, head_size=128, num_heads=heads, num_kv_heads=kv_heads)
    planned, tracked = tracked_part(config, "cpu", STEP), tracker.fake_step_peak(config, "cpu").num_bytes
    assert planned.moment in (ATTENTION, "the backward of attention's first products")
    assert 0.99 * tracked <= planned.num_bytes <= 1.2 * tracked


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("pair", named(ALONE))
def test_plan_of_the_teacher_alone_is_what_a_tracker_counts(monkeypatch, tmp_path, pair, device_type):
    if device_type == "cpu":
        as_on_host(monkeypatch, False)
    config = taught(student(**pair.student), tmp_path, **pair.teacher)
    planned = tracked_part(config, device_type, TEACHER_ALONE)
    assert planned.num_bytes == pytest.approx(tracker.fake_teacher_peak(config, device_type).num_bytes, rel=CLOSE)
    assert planned.moment == pair.moment or device_type == "cpu"


def test_plan_counts_the_tokens_of_steps_that_grow():
    config = replace(DISTILL, **LABELS, tokens_per_step=8192, first_tokens_per_step=1024, batch_warmup_steps=101)
    num_rows = sum(config.rows_of_step(step) for step in range(config.num_steps))
    planned = plan(config, 1)
    assert planned.disk["shards of the tokens it reads"] == num_rows * config.context_length * 2
    assert planned.disk["the teacher's labels"] == num_rows * config.context_length * (4 * 32 + 4)
    assert planned.host[TEACHER_ALONE].parts["numbers of windows"] == WINDOW_BYTES * num_rows


@pytest.mark.parametrize(("vocab_size", "record"), [(2**16, 4 * 32 + 4), (2**16 + 1, 6 * 32 + 4)])
def test_a_label_on_the_disk_is_its_ids_their_logarithms_and_a_tail(vocab_size, record):
    config = replace(DISTILL, vocab_size=vocab_size)
    assert plan(config, 1).disk["the teacher's labels"] == 0
    num_tokens = config.num_steps * config.tokens_per_step
    assert plan(replace(config, **LABELS), 1).disk["the teacher's labels"] == num_tokens * record
