"""The smallest footprint, as laws of tracked storages: in fake mode, over the real engine on the CPU, and on a GPU."""

import json
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import tracker
from conftest import REPOSITORY, expect_success, launch, metrics, pretrain_script, tiny_config
from safetensors.torch import save_file
from test_plan import CLOSE, STEP, TEACHER_ALONE, tracked_part
from torch.nn import functional
from tracker import Peak, Sides, Tracker, fake_labelling, fake_mode, fake_model, fake_step, fake_teacher_peak, named, peak_of

from ds.tokenizer import to_json
from scripts.config import ACTIVATION_CHECKPOINTING, PRECISIONS, TrainingConfig
from scripts.memory import OUTSIDE_TORCH, allocated_bytes, plan
from scripts.model.decoder import empty_model, initialise
from scripts.model.documents import Windows
from scripts.model.huggingface import transformers_config
from scripts.model.losses import token_nats
from scripts.model.sampling import Sampling, continue_ids, new_cache
from scripts.plan.footprint import Moment
from scripts.prepare_data import prepare
from scripts.run.evaluate import evaluate

MICRO_BATCHES = 3
OUTSIDE_STORAGES = (*OUTSIDE_TORCH, "the program", "the data", "pieces of files")
GPU_SHAPES = {
    "none": dict(activation_checkpointing="none"),
    "block": dict(activation_checkpointing="block", tie_embeddings=True),
    "block_offload": dict(activation_checkpointing="block_offload", qk_norm=True),
}
CARDS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
HEAD_WIDTHS = (64, 80, 18, 100, 200, 224, 256, 264)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "text": {}, "teacher": {"distill_temperature": 2.0, "distill_divergence": "reverse"}, "labels": {"teacher_top_k": 16},
}  # fmt: skip
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
fake_step_peak = cache(tracker.fake_step_peak)


class Engine(NamedTuple):
    """A configuration, and what `engine_peaks` finds of it in a process of its own."""

    config: TrainingConfig
    phases: dict[str, Sides]


def wide_config(**changes) -> TrainingConfig:
    """Tokens times vocabulary is by far the largest of its sizes: 512 tokens, 8192 ids."""
    fields: dict = dict(
        vocab_size=8192, context_length=128, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_size=64,
        tokens_per_step=512, micro_batch_rows=4, loss_chunk_rows=32, eval_tokens=512, precision="bf16", qk_norm=False,
    )  # fmt: skip
    return TrainingConfig(**(fields | changes))


def deep_config(**changes) -> TrainingConfig:
    """Blocks' inputs are by far the largest of its sizes."""
    return wide_config(
        **(dict(vocab_size=257, num_layers=4, context_length=512, tokens_per_step=2048, loss_chunk_rows=512) | changes)
    )


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
def test_logits_are_never_whole_in_a_step(mode):
    config = wide_config(activation_checkpointing=mode)
    tokens, whole = config.tokens_per_step, replace(config, loss_chunk_rows=config.tokens_per_step)
    assert fake_step_peak(config).largest_bytes < tokens * config.vocab_size < fake_step_peak(whole).largest_bytes


@pytest.mark.parametrize("top_k", [None, 16])
def test_logits_of_neither_model_are_whole_in_a_step_of_distillation(top_k, tmp_path):
    config = wide_config(teacher_dir=str(tmp_path), teacher_top_k=top_k)
    (tmp_path / "config.json").write_text(json.dumps(asdict(wide_config(hidden_size=64))))
    tokens, whole = config.tokens_per_step, replace(config, loss_chunk_rows=config.tokens_per_step)
    assert fake_step_peak(config).largest_bytes < tokens * config.vocab_size < fake_step_peak(whole).largest_bytes
    if top_k is not None:
        assert fake_teacher_peak(config).largest_bytes < tokens * config.vocab_size < fake_teacher_peak(whole).largest_bytes


def test_logits_are_never_whole_in_evaluation_and_sampling():
    config = wide_config()
    model = initialise(empty_model(config, torch.device("cpu"))).eval()
    windows, num_bytes = torch.zeros(4, 129, dtype=torch.int64), torch.ones(8192)
    evaluated = peak_of(lambda: evaluate(model, [Windows(windows)], num_bytes, config.loss_chunk_rows), [])
    prompt = torch.arange(128)
    sampled = peak_of(lambda: list(continue_ids(model, prompt, 3, sampling=Sampling(0.0, 1, 1.0, 1.0), seed=0)), [])
    weights = 2 * config.vocab_size * config.hidden_size
    assert evaluated.largest_bytes < 512 * config.vocab_size
    assert sampled.largest_bytes <= max(weights, 128 * config.vocab_size)


class OnCard(NamedTuple):
    """A configuration, the compute capability of a card that runs it, and the objective, one of OBJECTIVES."""

    config: TrainingConfig
    capability: tuple[int, int]
    objective: str


def on_cards() -> list[OnCard]:
    """Every precision in every mode, with two of the objectives; all else takes turns, each at its own pace."""
    found = []
    for turn, (precision, mode, second) in enumerate(product(PRECISIONS, ACTIVATION_CHECKPOINTING, (0, 1))):
        cards, (heads, kv_heads) = CARDS[precision == "bf16" :], ((4, 2), (3, 3), (3, 1))[turn // 2 % 3]
        config = wide_config(
            precision=precision, activation_checkpointing=mode, num_heads=heads, num_kv_heads=kv_heads,
            head_size=HEAD_WIDTHS[turn % len(HEAD_WIDTHS)], hidden_size=48 * heads, mlp_size=96, vocab_size=4099,
            context_length=1003, micro_batch_rows=2, tokens_per_step=2006, eval_tokens=1003, loss_chunk_rows=700,
            qk_norm=turn % 4 < 2, tie_embeddings=turn % 5 < 2,
        )  # fmt: skip
        found.append(OnCard(config, cards[turn % len(cards)], list(OBJECTIVES)[(turn // 6 + turn // 2 + second) % 3]))
    return found


def named_run(case: OnCard) -> str:
    config = case.config
    return f"{config.precision} {config.activation_checkpointing} {case.objective} {config.head_width} on {case.capability}"


@pytest.mark.parametrize("case", on_cards(), ids=named_run)
def test_every_operation_of_a_step_runs_on_a_card_within_the_plan_and_nothing_grows_with_the_square_of_the_context(
    case, tmp_path
):
    """Forward, loss and backward of CUDA tensors that hold no numbers. Only `block_offload` makes any on the host."""
    config, of_blocks = case.config, 0
    if case.objective != "text":
        (tmp_path / "config.json").write_text(json.dumps(asdict(replace(config, hidden_size=2 * config.hidden_size))))
        config = replace(config, teacher_dir=str(tmp_path), **OBJECTIVES[case.objective])
    if config.activation_checkpointing == "block_offload":
        of_blocks = 2 * config.tokens_per_step * config.hidden_size * config.dtype.itemsize
    works = {STEP: (fake_step, of_blocks)} | ({TEACHER_ALONE: (fake_labelling, 0)} if config.teacher_top_k else {})
    for phase, (fake, host_bytes) in works.items():
        with fake_mode("cuda", case.capability) as card:
            work = fake(config, card.device)
            with Tracker(work.held) as ledger:
                work.work()
        assert sum(each.num_bytes for each in ledger.storages if each.device_type != "cuda") == host_bytes
        assert_within_plan(config, ledger, card.kernels, phase)


def assert_within_plan(config: TrainingConfig, ledger: Tracker, kernels: list[str], phase: str) -> None:
    """Neither scores nor logits were whole, and the peak on the device is no more than the plan says of the phase."""
    size, tokens, length = config.dtype.itemsize, config.micro_batch_rows * config.context_length, config.context_length
    peak = ledger.peak(False, 0, len(ledger.events))
    assert kernels and "math" not in kernels
    assert peak.largest_bytes < size * min(tokens * config.vocab_size, tokens * config.num_heads * length)
    assert peak.num_bytes <= (1 + CLOSE) * tracked_part(config, "cuda", phase).num_bytes


@pytest.mark.parametrize(
    ("precision", "mode", "lengths"),
    [
        ("bf16", "none", (129,)), ("bf16", "none", (17, 300, 9)), ("bf16", "block", (33,)), ("bf16", "block", (100, 200)),
        ("fp16", "none", (100, 200)), ("fp32", "block", (1023, 1)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_a_step_over_masked_documents_is_within_the_plan_and_nothing_grows_with_the_square_of_the_context(
    device_type, precision, mode, lengths
):
    """Long documents on end and short ones in groups, where attention takes most of what a step does."""
    config = wide_config(
        precision=precision, activation_checkpointing=mode, mask_across_documents=True, qk_norm=mode == "none", vocab_size=257,
        context_length=1024, micro_batch_rows=2, tokens_per_step=2048, eval_tokens=1024, num_heads=8, num_kv_heads=4,
        head_size=30, hidden_size=64, loss_chunk_rows=128,
    )  # fmt: skip
    with fake_mode(device_type, tracker.WORST_CARDS[precision]) as place:
        work = fake_step(config, place.device, lengths)
        peak = peak_of(work.work, work.held)
    most = 2.5 if device_type == "cuda" else 1.7  # on the host short documents leave out scores
    assert peak.num_bytes <= tracked_part(config, device_type, STEP).num_bytes < most * peak.num_bytes
    assert peak.largest_bytes < config.tokens_per_step * config.num_heads * config.context_length
    flash = "flash on end" if sum(lengths) >= 128 * len(lengths) else "flash"
    wanted = flash if precision == "bf16" else "efficient"
    assert set(place.kernels) == ({wanted} if device_type == "cuda" else set())


@torch.no_grad()
@pytest.mark.parametrize(
    ("precision", "head_size", "capability"),
    [("bf16", 64, (8, 0)), ("bf16", 200, (8, 6)), ("fp16", 18, (12, 0)), ("fp16", 64, (7, 5)), ("fp32", 264, (9, 0))],
)
def test_evaluation_and_sampling_run_on_a_card_within_the_plan_of_a_step(precision, head_size, capability):
    """A sample's last id is attended with every score of its one position: what that takes is linear in the context."""
    rows = dict(context_length=1003, micro_batch_rows=2, tokens_per_step=2006, eval_tokens=1003, loss_chunk_rows=300)
    config, length = wide_config(precision=precision, head_size=head_size, **rows), 1003
    with fake_mode("cuda", capability) as card:
        model, windows = fake_model(config, card.device), torch.zeros(2, length + 1, dtype=torch.int64, device=card.device)
        weights = named("weights", model.parameters())
        with Tracker(weights) as evaluated:
            token_nats(model(windows[:, :-1]), model.head, windows[:, 1:], config.loss_chunk_rows)
        assert_within_plan(config, evaluated, card.kernels, STEP)
        card.kernels.clear()
        with Tracker(weights) as sampled:
            cache = new_cache(model, 1, length)
            for start, stop in ((0, length - 1), (length - 1, length)):
                functional.linear(model(windows[:1, start:stop], cache, start)[0, -1], model.head).float()
        half = len(card.kernels) // 2
        assert card.kernels[half:] == ["math"] * half
        assert_within_plan(config, sampled, card.kernels[:half], STEP)
    assert {each.device_type for ledger in (evaluated, sampled) for each in ledger.storages} == {"cuda"}


def kept_after_forward(config: TrainingConfig) -> int:
    """Bytes alive on the device between forward and backward besides the weights, on a GPU."""
    with fake_mode("cuda", (8, 6)) as card:
        decoder = fake_model(config, card.device)
        ids = torch.zeros(config.micro_batch_rows, config.context_length, dtype=torch.int64, device=card.device)
        with Tracker(named("weights", decoder.parameters())) as ledger:
            begin = ledger.now()
            hidden = decoder(ids)
            now = ledger.now()
            after, before = ledger.sides(now, now).device, ledger.sides(begin, begin).device
            del hidden
    return after.num_bytes - before.num_bytes


def test_a_forward_keeps_what_the_formula_says():
    """none: everything that a block's docstring lists; block: its input; block_offload: one input, whatever the depth."""
    config = deep_config()
    tokens, width, layers = config.tokens_per_step, config.hidden_size, config.num_layers
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_width
    whole = tokens * (2 * (2 * width + heads + 2 * config.mlp_size) + 4 * config.num_heads)
    kept = {mode: kept_after_forward(replace(config, activation_checkpointing=mode)) for mode in ACTIVATION_CHECKPOINTING}
    random_numbers = kept["none"] - kept["block"] - layers * (whole - 2 * tokens * width)
    assert 0 <= random_numbers < 64 * layers, "the state of them, which flash attention keeps also where it needs none"
    assert kept["block"] - kept["block_offload"] == (layers - 1) * 2 * tokens * width


def test_the_peak_falls_from_none_to_block_to_block_offload():
    config = deep_config()
    none, block, offload = (
        fake_step_peak(replace(config, activation_checkpointing=mode)).num_bytes for mode in ACTIVATION_CHECKPOINTING
    )
    input_bytes = 2 * config.tokens_per_step * config.hidden_size
    assert none > 2 * block
    assert block - offload == (config.num_layers - 2) * input_bytes, "two inputs are up at once in the backward"


def test_sums_of_gradients_on_the_gpu_take_their_dtype_a_parameter():
    config = deep_config(tokens_per_step=2 * 2048)
    peaks = {
        precision: fake_step_peak(replace(config, accumulate_on="gpu", accumulation_precision=precision)).num_bytes
        for precision in ("bf16", "fp32")
    }
    least = fake_step_peak(config).num_bytes
    assert peaks["bf16"] - least == 2 * config.num_parameters
    assert peaks["fp32"] - least == 4 * config.num_parameters


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("engine")
    config = tiny_config(
        folder, hidden_size=128, mlp_size=320, num_layers=4, context_length=64, micro_batch_rows=4, precision="bf16",
        tokens_per_step=256 * MICRO_BATCHES, activation_checkpointing="block", loss_chunk_rows=64, sample_tokens=4,
        sample_every_steps=8,
    )  # fmt: skip
    return Engine(config, engine_peaks_of(config, folder))


def engine_peaks_of(config: TrainingConfig, folder: Path) -> dict[str, Sides]:
    (result,) = launch(folder, engine_script(config), ["python"], env={"CUDA_VISIBLE_DEVICES": ""})
    output = expect_success([result])
    found = json.loads(next(line for line in output.splitlines() if line.startswith('{"initialisation"')))
    return {phase: Sides(Peak(*device), Peak(*host), down, up) for phase, (device, host, down, up) in found.items()}


def engine_script(config: TrainingConfig) -> str:
    """A script that prints `engine_peaks(config)` as JSON."""
    return f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from scripts.config import TrainingConfig
from scripts.engine.distributed import leaving
from tracker import engine_peaks

fields = json.loads({json.dumps(asdict(config))!r})
fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
if __name__ == "__main__":
    with leaving():
        print(json.dumps(engine_peaks(TrainingConfig(**fields))), flush=True)
"""


def largest_group_elements(config: TrainingConfig) -> int:
    return max(config.block_parameters, config.vocab_size * config.hidden_size)


def test_initialisation_takes_the_weights_and_one_group(engine):
    config, phases = engine
    bound = 2 * config.num_parameters + 2 * largest_group_elements(config)
    assert phases["initialisation"].device.num_bytes <= 1.02 * bound, phases["initialisation"].device.places


def test_between_steps_the_device_holds_the_weights_alone(engine):
    config, phases = engine
    for phase in ("after initialisation", "after step", "after second step", "after save"):
        held = phases[phase].device
        assert held.num_bytes <= 1.01 * 2 * config.num_parameters, held
        assert held.largest_bytes <= 2 * largest_group_elements(config), held


def test_the_host_holds_sixteen_bytes_a_parameter_and_the_staging(engine):
    config, phases = engine
    wanted = 16 * config.num_parameters + 2 * 2 * largest_group_elements(config)
    assert phases["after second step"].host.num_bytes == pytest.approx(wanted, rel=0.01)


def test_a_step_moves_each_gradient_down_and_each_weight_up_once(engine):
    config, phases = engine
    assert phases["second step"].num_bytes_down == MICRO_BATCHES * 2 * config.num_parameters
    assert phases["second step"].num_bytes_up == pytest.approx(2 * config.num_parameters, abs=64)


@pytest.mark.parametrize("side", ["device", "host"])
def test_the_plan_is_within_five_percent_of_the_engine(engine, side):
    """A load comes with an initialisation, whose device side has a phase of its own."""
    config, phases = engine
    planned = getattr(plan(config, 1, "cpu"), side)
    tracked = {
        "initialisation": ("initialisation",),
        "training step": ("step", "second step", "evaluation", "sample"),
        "save and load": ("save",) if side == "device" else ("save", "load"),
    }
    for phase, names in tracked.items():
        counted = max(getattr(phases[name], side).num_bytes for name in names)
        assert storages(planned[phase]) == pytest.approx(counted, rel=0.05), (phase, planned[phase])


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 16])
def test_the_plan_of_a_distillation_is_within_five_percent_of_the_engine(top_k, tmp_path):
    """The first look at a teacher, or the teacher alone, comes with the initialisation."""
    sizes = dict(context_length=64, micro_batch_rows=4, precision="bf16", tokens_per_step=256)
    config = tiny_config(
        tmp_path, hidden_size=128, mlp_size=320, num_layers=3, loss_chunk_rows=64, sample_tokens=4, sample_every_steps=8,
        activation_checkpointing="block", teacher_dir=str(tmp_path / "teacher"), teacher_top_k=top_k, **sizes,
    )  # fmt: skip
    save_teacher(tiny_config(tmp_path, hidden_size=256, mlp_size=640, num_layers=4, **sizes), tmp_path / "teacher")
    tracked, planned = engine_peaks_of(config, tmp_path), plan(config, 1, "cpu").device
    first = max(storages(planned[phase]) for phase in ("teacher alone", "initialisation") if phase in planned)
    assert first == pytest.approx(tracked["initialisation"].device.num_bytes, rel=0.05)
    steps = max(tracked[name].device.num_bytes for name in ("step", "second step", "evaluation", "sample"))
    assert storages(planned["training step"]) == pytest.approx(steps, rel=0.05)
    assert storages(planned["save and load"]) == pytest.approx(tracked["save"].device.num_bytes, rel=0.05)


def save_teacher(config: TrainingConfig, folder: Path) -> None:
    """An untrained model as transformers has it, with the tokenizer of its data."""
    folder.mkdir()
    data = prepare(config)
    (folder / "tokenizer.json").write_text(to_json(data.tokenizer))
    (folder / "config.json").write_text(json.dumps(transformers_config(config, data.end_of_text_id)))
    save_file(dict(initialise(empty_model(config, torch.device("cpu"))).state_dict()), folder / "model.safetensors")


def storages(moment: Moment) -> int:
    """A moment's bytes without what no tensor holds."""
    return sum(size for kind, size in moment.parts.items() if kind not in OUTSIDE_STORAGES)


def test_a_peak_counts_a_storage_once_from_birth_to_death():
    """Views are free, what is freed is gone, what stood before counts when it is named."""

    def work() -> None:
        first = torch.zeros(1000)
        first.view(10, 100)[3].add_(1.0)
        del first
        second, third = torch.zeros(700), torch.zeros(600)
        del second, third

    before = torch.zeros(50)
    peak = peak_of(work, [("before", before), ("before", before[:3])])
    assert isinstance(peak, Peak)
    assert peak.num_bytes == 4 * (50 + 1300)
    assert peak.places["before"] == 4 * 50
    assert peak.largest_bytes == 4 * 1000


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu_peak_is_within_ten_percent_of_the_plan(shape, tmp_path):
    config = gpu_config(tmp_path, **GPU_SHAPES[shape])
    expect_success(launch(tmp_path, pretrain_script([config]), ["python"]))
    measured = max(record["gpu_peak_gib"] for record in metrics(config) if record["kind"] == "train")
    assert allocated_bytes(plan(config, 1)) / 2**30 == pytest.approx(measured, rel=0.10)


@pytest.mark.gpu
@ON_A_GPU
def test_gpu_block_offload_equals_block(tmp_path):
    configs = [
        gpu_config(tmp_path, run_dir=str(tmp_path / mode), activation_checkpointing=mode) for mode in ("block", "block_offload")
    ]
    expect_success(launch(tmp_path, pretrain_script(configs), ["python"]))
    block, offload = ([record["loss"] for record in metrics(config) if record["kind"] == "train"] for config in configs)
    assert block == offload


def gpu_config(folder: Path, **changes) -> TrainingConfig:
    """About 100 million parameters and 8192 tokens a micro-batch, two of them a step; three steps."""
    fields: dict = dict(
        hidden_size=768, mlp_size=2048, num_layers=12, num_heads=12, num_kv_heads=4, context_length=1024, micro_batch_rows=8,
        tokens_per_step=2 * 8192, num_steps=3, warmup_steps=1, eval_every_steps=None, save_every_steps=None, precision="bf16",
        loss_chunk_rows=1024, eval_tokens=1024,
    )  # fmt: skip
    return tiny_config(folder, **(fields | changes))
