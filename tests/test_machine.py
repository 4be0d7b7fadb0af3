"""Laws of the machine: its cards, control groups, peaks, pinned memory, FLOP, and hours that follow the rates."""

import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from hypothesis import given
from hypothesis import strategies as st
from test_plan import LABELS, SHAPES, shaped, taught
from torch.utils.flop_counter import FlopCounterMode

from scripts.config import PRETRAIN
from scripts.engine.updates import orthogonalise
from scripts.model.decoder import empty_model, parameter_groups
from scripts.plan import machine
from scripts.plan.machine import (
    Card,
    GroupLimit,
    Rates,
    allocator_settings,
    can_pin_exactly,
    flops_per_token,
    has_kernels,
    hours,
    is_wsl,
    limits_above,
    measure_rates,
    muon_parameters,
    newton_schulz_flops,
    peak_bytes,
    pinned_bytes,
    proc_bytes,
    refuse_card,
    refuse_on_this_device,
    refuse_precision,
    room_free,
    room_in_all,
    teacher_seconds,
    tokens_per_second,
    update_bytes,
)

CPU = torch.device("cpu")
FOREVER = float("inf")


def test_room_is_what_the_control_groups_leave(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (tmp_path / "a", "1000"), (tmp_path, "3000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("900")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    found = sorted(limits_above(str(tmp_path), "/a/b", "memory.max", "memory.current"))
    assert found == [GroupLimit(1000, 600), GroupLimit(3000, 600)]


def test_room_is_within_the_machine_and_has_no_gpu_on_a_processor():
    free, in_all = room_free(PRETRAIN, CPU), room_in_all(PRETRAIN, CPU)
    assert free.host > 0 and 0 < in_all.host <= proc_bytes("/proc/meminfo")["MemTotal"]
    assert free.gpu is None and in_all.gpu is None and 0 < free.disk <= in_all.disk
    assert (free.which, in_all.which) == ("free", "there in all")


def test_peak_of_the_host_is_the_most_that_was_ever_resident():
    peaks, resident = peak_bytes(), proc_bytes("/proc/self/status")["VmHWM"]
    assert 0.99 * resident <= peaks.host_bytes <= proc_bytes("/proc/meminfo")["MemTotal"]
    assert peaks.gpu_bytes == 0 or torch.cuda.is_available()


def test_peak_of_the_host_leaves_out_the_program_that_started_this_one():
    """Linux hands a process's peak on to what it starts, also to another program."""
    held = np.ones(2**30, dtype=np.uint8)
    script = "from scripts.plan.machine import peak_bytes; print(peak_bytes().host_bytes)"
    found = int(subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY))
    assert 0 < found < held.nbytes < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("version", "wanted"), [("2.11.0", 4096), ("2.12.1", 4096), ("2.13.0", 3000), ("2.14.0", 3000)])
def test_pinned_memory_is_a_power_of_two_before_torch_2_13(monkeypatch, version, wanted):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    assert pinned_bytes(3000, "cuda") == wanted and pinned_bytes(3000, "cpu") == 3000 and pinned_bytes(4096, "cuda") == 4096


def test_versions_of_torch_are_compared_as_versions():
    assert [can_pin_exactly(version) for version in ("2.9.1", "2.12.1+cu130", "2.13.0+cpu", "2.100.0", "10.0")] == [
        False, False, True, True, True,
    ]  # fmt: skip


@given(st.text(st.sampled_from("expandable_segments:TrueFalse,max_split_size_mb:1 "), max_size=40), st.booleans())
def test_what_the_user_set_for_torchs_allocator_stays(own, on_wsl):
    for version, exact in (("2.12.1", []), ("2.13.0", ["pinned_max_cached_size_mb:1"])):
        found = allocator_settings(own, version, on_wsl)
        assert allocator_settings(found, version, on_wsl) == found
        kept = [part for part in own.split(",") if part.strip()]
        growing = [] if kept or on_wsl else ["expandable_segments:True"]
        assert [part for part in found.split(",") if part] == kept + growing + exact


def test_segments_grow_and_page_locked_blocks_are_not_kept_unless_the_user_says_otherwise():
    assert allocator_settings("", "2.13.0", False) == "expandable_segments:True,pinned_max_cached_size_mb:1"
    assert allocator_settings("", "2.12.0", False) == "expandable_segments:True"
    assert allocator_settings("", "2.12.0", True) == ""
    own = "max_split_size_mb:64,pinned_max_round_threshold_mb:1, pinned_max_cached_size_mb:64"
    assert allocator_settings(own, "2.13.0", False) == "max_split_size_mb:64,pinned_max_cached_size_mb:1"


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [("5.15.167.4-microsoft-standard-WSL2", True), ("4.4.0-19041-Microsoft", True), ("6.8.0-45-generic", False)],
)
def test_wsl_is_known_by_its_kernel(kernel, wanted):
    assert is_wsl(kernel) is wanted


def test_products_reach_six_tenths_of_their_rate():
    """With copies that take no time, products alone decide."""
    for config in (shaped("124M", 8192), shaped("1.3B", 4096, activation_checkpointing="block")):
        speed = tokens_per_second(config, 1, 1, "cuda", Rates(1e12, FOREVER, FOREVER))
        assert speed == pytest.approx(0.6e12 / flops_per_token(config))


def test_gradients_go_down_each_micro_batch_beside_two_thirds_of_it_and_adam_reads_and_writes_34_bytes_a_parameter():
    config = shaped("124M", 8192)
    num_parameters, products = config.num_parameters, 8192 * flops_per_token(config) / 0.6e12
    down, up, adam = (num_parameters * size / rate for size, rate in ((2, 1e7), (2, 1e7), (34, 1e10)))
    for place, trips, hidden in (("cpu", 4, products * 2 / 3), ("gpu", 1, 0.0)):
        seconds = 4 * products + trips * (down - hidden) + adam + up
        speed = tokens_per_second(replace(config, accumulate_on=place), 1, 1, "cuda", Rates(1e12, 1e10, 1e7))
        assert speed == pytest.approx(4 * 8192 / seconds)


def test_newton_schulz_takes_the_products_that_torch_counts():
    for changes in ({}, {"num_kv_heads": 4, "head_size": 64, "mlp_size": 100}):
        config = replace(PRETRAIN, optimizer="muon", hidden_size=48, num_heads=8, num_layers=3, **changes)
        groups = parameter_groups(empty_model(config, CPU), 0.0)
        matrices = [matrix for group in groups if group["is_block"] for matrix in group["params"]]
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            for matrix in matrices:
                orthogonalise(matrix, torch.float32)
        assert counted.get_total_flops() == newton_schulz_flops(config)
        assert sum(matrix.numel() for matrix in matrices) == muon_parameters(config)
    assert (
        newton_schulz_flops(replace(PRETRAIN, optimizer="adamw")) == muon_parameters(replace(PRETRAIN, optimizer="adamw")) == 0
    )


def test_an_update_moves_34_bytes_a_parameter_26_with_short_moments_and_muon_30_and_26():
    for optimizer, precision, adam, muon in (
        ("adamw", "fp32", 34, 34), ("adamw", "bf16", 26, 26), ("muon", "fp32", 34, 30), ("muon", "bf16", 26, 26),
    ):  # fmt: skip
        config = replace(PRETRAIN, optimizer=optimizer, optimizer_state_precision=precision, precision="bf16")
        matrices = config.num_layers * config.block_matrix_parameters
        assert update_bytes(config) == adam * (config.num_parameters - matrices) + muon * matrices


def test_flop_of_a_token_are_six_a_parameter_and_causal_attention():
    """124M: 6 * (84.9 million in blocks + 38.6 million of the head), and 12 layers * 6 * 1024 positions * 768."""
    config = shaped("124M", 1024)
    assert flops_per_token(config) == pytest.approx(6 * (84.9e6 + 38.6e6) + 12 * 6 * 1024 * 768, rel=1e-3)
    kept = flops_per_token(config) - 6 * 50304 * 768
    assert flops_per_token(replace(config, activation_checkpointing="block")) - flops_per_token(config) == kept // 3


def test_hours_follow_the_rates():
    slow = Rates(1e9, 1e9, 1e9)
    for field in ("flops", "host_bytes", "link_bytes"):
        fast = slow._replace(**{field: 1e12})
        speeds = [tokens_per_second(shaped("124M", 8192), 1, 1, "cuda", rates) for rates in (slow, fast)]
        assert speeds[0] < speeds[1]
    assert hours(PRETRAIN, PRETRAIN.tokens_per_step / 3600, 0.0) == pytest.approx(PRETRAIN.num_steps)
    assert hours(PRETRAIN, PRETRAIN.tokens_per_step / 3600, 7200.0) == pytest.approx(PRETRAIN.num_steps + 2)
    assert all(rate > 0 for rate in measure_rates(PRETRAIN, CPU))


def test_hours_of_steps_that_grow_are_those_of_each_step():
    config = shaped("124M", 8192, accumulate_on="gpu", num_steps=40, warmup_steps=1)
    whole = replace(config, tokens_per_step=8 * 8192, first_tokens_per_step=8192, batch_warmup_steps=30)
    rates, seconds = Rates(1e12, 1e10, 1e9), 0.0
    for step in range(whole.num_steps):
        tokens = whole.rows_of_step(step) * whole.context_length
        seconds += tokens / tokens_per_second(replace(config, tokens_per_step=tokens), 1, 1, "cuda", rates)
    assert hours(whole, tokens_per_second(whole, 1, 1, "cuda", rates), 0.0) * 3600 == pytest.approx(seconds)


def test_a_teacher_beside_costs_its_forward_in_each_step_and_one_alone_before_the_first(tmp_path):
    config = taught(shaped("124M", 8192), tmp_path, **SHAPES["350M"])
    labelled, without, rates = replace(config, **LABELS), replace(config, teacher_dir=None), Rates(1e12, 1e10, 1e10)
    forward = flops_per_token(config) - flops_per_token(without)
    assert flops_per_token(labelled) == flops_per_token(without)
    body = replace(without, **(SHAPES["350M"] | {"vocab_size": config.vocab_size})).num_parameters - 1024 * config.vocab_size
    assert forward == pytest.approx(2 * body + 2 * 24 * 2048 * 1024, rel=1e-3)
    seconds = [teacher_seconds(each, 1, rates) for each in (without, config, labelled)]
    assert seconds == [0, 0, pytest.approx(config.num_steps * config.tokens_per_step * forward / 0.6e12)]
    assert teacher_seconds(labelled, 2, rates) == seconds[2] / 2


def test_half_precision_without_a_cuda_device_is_refused_and_the_nearest_precision_works():
    config, cpu = replace(PRETRAIN, precision="fp16"), torch.device("cpu")
    with pytest.raises(ValueError, match='^precision="fp16" .*; nearest is "bf16"$'):
        refuse_on_this_device(config, cpu)
    refuse_on_this_device(replace(config, precision="bf16"), cpu)
    refuse_on_this_device(replace(config, precision="fp32"), cpu)


# What torch's wheels of CUDA 12.6 and 13.0 are built for (pytorch/pytorch#175253), and cards.
WHEELS = {
    "12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
}
CARDS = {
    "GeForce GTX 1080 Ti": (6, 1), "Tesla V100": (7, 0), "GeForce RTX 2060": (7, 5), "A100": (8, 0), "GeForce RTX 3060": (8, 6),
    "GeForce RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "GeForce RTX 5090": (12, 0), "GB10": (12, 1),
}  # fmt: skip
ON_CHIPS = {53, 62, 72, 87, 101}
capabilities = st.tuples(st.integers(3, 13), st.integers(0, 9))


@pytest.mark.parametrize("name", CARDS)
def test_the_wheels_run_from_turing_on_and_those_of_cuda_12_6_up_to_hopper(name):
    card = Card(name, *CARDS[name])
    assert has_kernels(card, WHEELS["13.0"]) == (CARDS[name] >= (7, 5))
    assert has_kernels(card, WHEELS["12.6"]) == (CARDS[name] < (10, 0))


@pytest.mark.parametrize("code", [*product(range(8, 13), range(4))])
def test_binaries_run_within_their_major_ptx_on_all_that_is_newer_and_a_special_one_on_its_own_card(code):
    number = "".join(map(str, code))
    for card in product(range(7, 14), range(5)):
        runs = {
            kind: has_kernels(Card("", *card), [f"{kind[:-1]}_{number}{kind[-1].strip()}"])
            for kind in ("sm ", "smf", "sma", "compute ", "computef", "computea")
        }
        assert runs["sm "] == runs["smf"] == runs["computef"] == (card >= code and card[0] == code[0])
        assert runs["sma"] == runs["computea"] == (card == code)
        assert runs["compute "] == (card >= code)


@given(card=capabilities, names=st.lists(st.sampled_from(WHEELS["12.6"] + WHEELS["13.0"]), min_size=1))
def test_a_torch_runs_where_one_of_its_architectures_does(card, names):
    own = Card("", *card)
    assert has_kernels(own, names) == any(has_kernels(own, [name]) for name in names)
    assert has_kernels(own, []) and has_kernels(own, ["gfx90a"]) and not has_kernels(own, ["gfx90a", "sm_140"])


def test_no_card_that_torch_itself_would_take_is_refused():
    """torch's table, by which it warns, also knows that a chip with a GPU in it runs only what was made for that chip."""
    for code, takes in torch.cuda.DEVICE_REQUIREMENT.items():
        for card in range(30, 140):
            ours = has_kernels(Card("", *divmod(card, 10)), [f"sm_{code}"])
            assert (card in takes) == ours or {card, code} & ON_CHIPS, (card, code)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("cuda", WHEELS)
def test_a_card_without_kernels_is_refused_in_one_line_that_names_it_and_what_works(name, cuda):
    card, arch_list = Card(name, *CARDS[name]), WHEELS[cuda]
    if has_kernels(card, arch_list):
        return refuse_card(card, arch_list)
    with pytest.raises(ValueError) as caught:
        refuse_card(card, arch_list)
    nearest, words = "a torch of a newer CUDA, https://pytorch.org/get-started/locally", str(caught.value)
    if cuda == "13.0":
        nearest = "a card of 7.5 or newer, or the torch of CUDA 12.6, https://download.pytorch.org/whl/cu126"
    assert words.startswith(f"{name} has compute capability {card.major}.{card.minor} and torch ") and "\n" not in words
    assert words.endswith(f" is built for {' '.join(arch_list)}; nearest is {nearest}")


@given(capability=capabilities, precision=st.sampled_from(["bf16", "fp16", "fp32"]))
def test_a_precision_that_a_card_lacks_is_refused_and_the_nearest_is_not(capability, precision):
    card, works = Card("GeForce", *capability), {"bf16": capability >= (8, 0), "fp16": capability >= (7, 0), "fp32": True}
    if works[precision]:
        return refuse_precision(precision, card)
    with pytest.raises(ValueError, match=f'^precision="{precision}" does not run on GeForce of [^\n]*; nearest is ') as caught:
        refuse_precision(precision, card)
    nearest = str(caught.value).split('"')[-2]
    assert nearest == next(name for name in works if works[name])
    refuse_precision(nearest, card)


@pytest.mark.parametrize("major", range(3, 14))
def test_half_precision_runs_where_deepspeed_says_so(monkeypatch, major):
    monkeypatch.delenv("DS_ALLOW_DEPRECATED_FP16", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    if CUDA_Accelerator().is_fp16_supported():
        return refuse_precision("fp16", Card("", major, 0))
    with pytest.raises(ValueError, match='nearest is "fp32"$'):
        refuse_precision("fp16", Card("", major, 0))


def test_a_rank_is_judged_by_its_own_card_and_torchs_many_lines_about_it_are_left_out(monkeypatch):
    """Machines mix cards: of these two the second alone is too old."""

    def properties(device: torch.device) -> SimpleNamespace:
        warnings.warn("Found GPU1 which is of compute capability 6.1", stacklevel=2)
        return [SimpleNamespace(name="A100", major=8, minor=0), SimpleNamespace(name="GTX 1080", major=6, minor=1)][
            device.index
        ]

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEELS["13.0"])
    refuse_on_this_device(replace(PRETRAIN, precision="bf16"), torch.device("cuda", 0))
    with pytest.raises(ValueError, match="^GTX 1080 has compute capability 6.1 "):
        refuse_on_this_device(replace(PRETRAIN, precision="bf16"), torch.device("cuda", 1))


def test_a_card_that_torch_does_not_see_is_told_with_the_remedy(tmp_path):
    """A card is what says so to the kernel; its sound device is none."""
    for name, vendor, kind in (("a", "0x10de", "0x040300"), ("b", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert not machine.has_nvidia_card(str(tmp_path)) and not machine.has_nvidia_card(str(tmp_path / "absent"))
    (tmp_path / "a" / "class").write_text("0x030200\n")
    assert machine.has_nvidia_card(str(tmp_path))
    driver = tmp_path / "version"
    without, unloaded = (machine.unused_card_words(cuda, str(driver)) for cuda in (None, "13.0"))
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May 2 14:37:44 UTC 2024\nGCC version: 12"
    )
    old = machine.unused_card_words("13.0", str(driver))
    assert "built without CUDA; pip install" in without and "ubuntu-drivers install" in unloaded
    assert "its driver 470.256.02 does not run CUDA 13.0" in old and "newer driver, or pip install" in old
    assert all("\n" not in words and words.count("goes on the CPU") == 1 for words in (without, unloaded, old))


@given(st.integers(0, 2**36), st.integers(0, 2**36))
def test_swap_in_use_is_told_from_a_gibibyte_on(total, free):
    words = machine.swap_words({"SwapTotal": total, "SwapFree": min(free, total)})
    assert (words is None) == (total - min(free, total) < 2**30) and (words is None or "sudo swapoff -a" in words)
    assert machine.swap_words({}) is None


@given(st.dictionaries(st.integers(0, 5), st.tuples(st.integers(1, 64), st.integers(1, 8)), min_size=1), st.randoms())
def test_ranks_with_the_same_cores_share_them_and_one_with_cores_of_its_own_uses_all(places, random):
    """`places`: by number, how many cores there are and how many ranks have them."""
    numbers = [number for number, (_, num_ranks) in places.items() for _ in range(num_ranks)]
    random.shuffle(numbers)
    for number, (num_cores, num_ranks) in places.items():
        (threads,) = {machine.num_threads(num_cores, numbers, rank) for rank, each in enumerate(numbers) if each == number}
        assert threads == 1 if num_ranks > num_cores else num_cores - num_ranks < threads * num_ranks <= num_cores
