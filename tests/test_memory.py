"""Laws of what fits: refusals and offers, the words of a plan, the table, and runs whose memory ends all the same."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, clean_environment, launch, metrics, tiny_config, training_script
from hypothesis import given
from hypothesis import strategies as st
from test_plan import CARDS, GB, GIB, LABELS, SHAPES, configs, shaped, taught

from scripts import config as config_module
from scripts import memory
from scripts.config import DISTILL, PRETRAIN, TrainingConfig
from scripts.memory import GPU, HOST, needs, plan
from scripts.plan.footprint import phases
from scripts.plan.machine import Peaks, Rates, Room
from scripts.run.checkpoint import find_fault
from scripts.run.run_dir import newest_folder

CPU = torch.device("cpu")
UNITS = {"MiB": 2**20, "GiB": GIB}


@given(configs(), st.sampled_from([1, 2]), st.sampled_from(["cuda", "cpu"]), st.floats(0.1, 1.1), st.floats(0.3, 1.1))
def test_what_is_refused_is_too_large_and_what_is_offered_fits(config, ranks, device_type, gpu_share, host_share):
    wanted = needs(plan(config, ranks, device_type), ranks)
    gpu = int(gpu_share * wanted[GPU].moment.total) if GPU in wanted else None
    room = Room(gpu, int(host_share * wanted[HOST].moment.total), 0, "free")
    room_of = {GPU: room.gpu, HOST: room.host}
    fits = all(need.moment.total <= room_of[kind] for kind, need in wanted.items())
    try:
        memory.refuse_too_large(config, ranks, ranks, room, device_type)
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
            assert all(need.moment.total <= room_of[kind] for kind, need in offered.items())


def test_refusal_names_peak_item_and_the_nearest_that_fit():
    config = shaped("124M", 8192)
    with pytest.raises(ValueError) as refusal:
        memory.refuse_too_large(config, 1, 1, Room(2 * GIB, 64 * GB, 0, "free"), "cuda")
    assert "the largest item is saved activations" in str(refusal.value)
    assert 'what fits: micro_batch_rows=1, or activation_checkpointing="block", or context_length=' in str(refusal.value)
    big = replace(shaped("6.7B", 4096), num_layers=200, activation_checkpointing="block_offload")
    with pytest.raises(ValueError, match="choose a smaller model$|num_layers=.* with that fits"):
        memory.refuse_too_large(big, 1, 1, Room(2 * GB, 64 * GB, 0, "there in all"), "cuda")


def test_a_teacher_for_which_there_is_no_room_beside_the_student_is_offered_as_labels(tmp_path):
    config = taught(shaped("124M", 2048, micro_batch_rows=1), tmp_path, **SHAPES["6.7B"])
    beside, alone = (needs(plan(each, 1), 1)[GPU].moment.total for each in (config, replace(config, **LABELS)))
    with pytest.raises(ValueError) as refusal:
        memory.refuse_too_large(config, 1, 1, Room((beside + alone) // 2, 64 * GB, 0, "free"), "cuda")
    assert "the largest item is teacher, 1" in str(refusal.value) and "what fits: " in str(refusal.value)
    assert "teacher_top_k=32" in str(refusal.value)
    for changes in ({}, LABELS):
        with pytest.raises(ValueError, match="the largest item is teacher, .*choose a smaller teacher$"):
            memory.refuse_too_large(replace(config, **changes), 1, 1, Room(8 * GB, 64 * GB, 0, "free"), "cuda")


def test_a_plan_beside_its_measured_peaks_is_a_record_and_words():
    config = shaped("124M", 8192)
    on_gpu, on_host = plan(config, 1), plan(config, 1, "cpu")
    peaks = Peaks(int(1.5 * GIB), 3 * GIB)
    record = memory.comparison(on_gpu, peaks)
    assert record["gpu_planned_gib"] == memory.allocated_bytes(on_gpu) / GIB and record["gpu_peak_gib"] == 1.5
    assert record["host_planned_gib"] == needs(on_gpu, 1)[HOST].moment.total / GIB and record["host_peak_gib"] == 3.0
    words = "GPU memory: .* GiB planned, 1.50 GiB measured, host memory: .* GiB planned, 3.00 GiB measured"
    assert re.fullmatch(words, memory.comparison_words(record))
    assert set(memory.comparison(on_host, peaks)) == {"host_planned_gib", "host_peak_gib"}


def test_time_is_told_with_the_teachers_own(tmp_path):
    config = taught(shaped("124M", 8192), tmp_path, **SHAPES["350M"])
    rates = Rates(1e12, 1e10, 1e10)
    words = memory.time_words(replace(config, **LABELS), 1, 1, "cuda", rates)
    assert re.fullmatch(r"about \S+ hours, \S+ hours of it the teacher alone, for \S+ steps at \S+ tokens/s", words), words
    assert re.fullmatch(r"about \S+ hours for \S+ steps at \S+ tokens/s", memory.time_words(config, 1, 1, "cuda", rates))


def test_table_and_offers_know_that_a_batch_that_warms_up_has_smaller_steps():
    """Three rows would share the whole step of 12 rows and not the first, of 4."""
    config = replace(PRETRAIN, tokens_per_step=3072, first_tokens_per_step=1024, batch_warmup_steps=9)
    assert "1,024 to 3,072 tokens a step" in memory.table("A preset", config, 1, CPU)
    total = needs(plan(config, 1, "cuda"), 1)[GPU].moment.total
    assert {"micro_batch_rows": 2} in memory.offers(config, 1, 1, Room(total - 1, 10**12, 0, "free"), "cuda")


@pytest.mark.parametrize("config", [PRETRAIN, DISTILL, replace(DISTILL, **LABELS)], ids=["PRETRAIN", "DISTILL", "labels"])
def test_table_has_every_kind_adds_up_and_keeps_to_its_columns(config):
    text = memory.table("A preset", config, 1, CPU)
    planned = plan(config, 1, "cpu")
    kinds = {kind for moments in (planned.device, planned.host) for at in moments.values() for kind in at.parts}
    assert all(kind in text for kind in kinds | set(phases(config))) and "it fits" in text and "tokens/s" in text
    assert "preparing the data takes 0.75 GiB of host memory for each of its processes" in text
    assert max(map(len, text.splitlines())) <= 128
    for title in ("what a GPU would hold, in host memory", "host memory"):
        block = text.split(f"\n{title}\n")[1].split("  together")
        sums = [sum(column) for column in zip(*map(cells, block[0].splitlines()), strict=True)]
        assert cells("  together" + block[1].splitlines()[0]) == pytest.approx(sums, abs=2**23), title


def cells(line: str) -> list[float]:
    """The bytes in a row of the table, one for each phase; 0 where a cell is empty."""
    columns = memory.NUMBER_COLUMNS
    words = [line[at : at + columns].split() for at in range(memory.NAME_COLUMNS, len(line), columns)]
    return [float(cell[0]) * UNITS[cell[1]] if cell else 0.0 for cell in words]


@pytest.mark.slow
def test_command_prints_both_presets_and_ends_well():
    command = [sys.executable, str(REPOSITORY / "scripts" / "memory.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stderr
    for name, config in (("PRETRAIN", PRETRAIN), ("DISTILL", DISTILL)):
        assert f"{name}: {config.num_parameters / 1e6:,.1f} million parameters" in done.stdout
    assert done.stdout.count(" steps at ") == done.stdout.count("training step   ") == 2
    assert "What to train on this machine" in done.stdout and "GPU_8GB   RTX 4060 " in done.stdout


def test_the_readmes_table_of_presets_is_the_presets():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (\d+) \| (.+) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    wanted = []
    for name in CARDS:
        config, ranks = getattr(config_module, name), 8 if name.startswith("GPUS") else 1
        host_gib = math.ceil(needs(plan(config, ranks), ranks)[HOST].moment.total / GIB)
        wanted.append((name, f"{config.num_parameters / 1e9:.1f} billion", str(config.context_length), f"{host_gib} GiB"))
    assert rows == wanted


def test_memory_that_cuda_itself_lacked_is_named_and_torchs_own_is_not():
    parked = replace(PRETRAIN, activation_checkpointing="block_offload")
    words, others = (memory.driver_words("CUDA error: out of memory", config) for config in (parked, PRETRAIN))
    assert "nvidia-smi" in words and 'activation_checkpointing="block" page-locks less' in words and "WSL2" not in words
    assert "nvidia-smi" in others and "page-locks" not in others
    assert memory.driver_words("CUDA out of memory. Tried to allocate 2.00 GiB.", parked) == ""
    assert memory.is_out_of_memory(RuntimeError("CUDA error: out of memory"))


def test_what_is_not_page_locked_is_told_with_its_cost():
    line = memory.pageable_words(2 * GIB, 3 * GIB)
    assert "\n" not in line and "Of 3.00 GiB" in line and "2.00 GiB cannot be page-locked" in line and "slower" in line


LIMIT_MEMORY = """
import resource
calls = []

def objective(engine, windows, config):
    calls.append(1)
    if len(calls) == 4:
        kilobytes = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024 + 2**20, resource.RLIM_INFINITY))
        windows = windows._replace(ids=windows.ids.repeat(8, 1))
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


@pytest.mark.slow
def test_out_of_memory_ends_with_the_plan_the_peak_and_advice_and_leaves_the_checkpoint(starved):
    config, output = starved
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert "Traceback" not in output
    assert re.search(r"host memory: \S+ [GM]iB planned, \S+ [GM]iB measured; less is needed with micro_batch_rows=", line), line
    folder = newest_folder(config)
    assert folder is not None and folder.name == "step-00000002" and find_fault(folder) is None
    assert max(record["step"] for record in metrics(config)) == 3


@pytest.mark.slow
def test_start_says_the_plan_in_one_line(starved):
    (line,) = [line for line in starved[1].splitlines() if line.startswith("The plan: ")]
    assert re.search(r"\S+ [GM]iB of \S+ [GM]iB free host memory \(.+\), about \S+ \S+ for 6 steps at \S+ tokens/s", line)


@pytest.mark.slow
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
