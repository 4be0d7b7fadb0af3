"""tests/benchmarks/gpu.py without a card: its laws, and every kind of row in tiny shapes, by the same functions."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import DONE, FAULT, OUT_OF_MEMORY, REFUSED, Limits, Row
from conftest import REPOSITORY, clean_environment
from hypothesis import given
from hypothesis import strategies as st

from scripts.config import TrainingConfig
from scripts.plan.footprint import plan
from scripts.plan.machine import flops_per_token

LIMITS = Limits(whole_seconds=100_000, compile_seconds=3600, least_free_gb=0)
TINY = {
    "vocab_size": 257, "context_length": 32, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "mlp_size": 48, "micro_batch_rows": 2, "tokens_per_step": 128, "eval_tokens": 32,
}  # fmt: skip
ONCE = {"least": 1, "most": 1, "seconds": 0.0, "is_split": True}
RUN = TINY | {"num_steps": 6, "warmup_steps": 1}
JOB = (
    "corpus=(STANDARD_LIBRARY.replace('**', 'asyncio'),), vocab_size=300, validation_fraction=0.3, num_steps=4, warmup_steps=1,"
    " eval_tokens=512, sample_tokens=4"
)
ON_DEVICE = {"offload_optimizer": False, "accumulate_on": "gpu"}
OUTCOMES = (DONE, FAULT, REFUSED, OUT_OF_MEMORY)


def row(part: str, contender: str, kind: str, limit_seconds: float = 3600, **settings) -> Row:
    return Row(part, "tiny", contender, kind, settings, limit_seconds)


def ours(part: str, contender: str, cap_gb: float | None = None, teacher: dict | None = None, **fields) -> Row:
    described = row(part, contender, "ours", fields=TINY | fields, timing=ONCE, cap_gb=cap_gb, teacher=teacher)
    return described._replace(extension="FusedAdamBuilder" if fields.get("offload_optimizer") is False else "CPUAdamBuilder")


def stock(contender: str, checkpointing: bool) -> Row:
    return row("speed", contender, "stock", fields=TINY, timing=ONCE, checkpointing=checkpointing, liger=False)


def tiny_rows(pytest_file: Path) -> list[Row]:
    """A row of every kind and of every part, and one whose limit is too short."""
    whole, stopped, second = {"fields": [RUN]}, {"fields": [RUN], "stop_after": 3}, {"fields": [RUN | {"hidden_size": 48}, RUN]}
    return [
        row("exact", "too slow", "train", 0.5, fields=[RUN]),
        row("exact", "tests", "tests", arguments=[str(pytest_file)]),
        row("exact", "truth check, bf16", "train", fields=[RUN | {"precision": "bf16"}]),
        row("exact", "truth check, fp16", "train", fields=[RUN | {"precision": "fp16"}]),
        row("exact", "main job", "job", changes=JOB),
        ours("speed", "tightfit"),
        stock("stock", False),
        stock("stock, checkpointing", True),
        ours("speed", "no offload, 2 micro-batches", **ON_DEVICE),
        ours("capped", "1 GB", cap_gb=1),
        ours("plan", "teacher", teacher=TINY | {"hidden_size": 48}, teacher_dir=gpu.TEACHER),
        row("exact", "resume", "alike", one=[whole], other=[stopped, whole]),
        row("exact", "two runs", "alike", one=[whole], other=[second]),
        row("exact", "other runs", "alike", one=[whole], other=[{"fields": [RUN | {"seed": 1}]}]),
    ]


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[dict]:
    """The results after a first launch, and after a second one, for which the row that was too slow has time."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "test_one.py").write_text("def test_one():\n    pass\n")
    rows, path, found = tiny_rows(folder / "test_one.py"), folder / "gpu.json", []
    variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for limit in (rows[0].limit_seconds, 3600):
            gpu.measure_missing([rows[0]._replace(limit_seconds=limit), *rows[1:]], path, LIMITS)
            found.append(json.loads(path.read_text()))
    return found


def by_name(results: dict) -> dict[str, dict]:
    return {record["contender"] or record["model"]: record for record in results["rows"]}


@pytest.mark.slow
def test_every_kind_of_row_is_measured_in_a_process_of_its_own(launches):
    records = by_name(launches[0])
    outcomes = {name: record["outcome"] for name, record in records.items()}
    assert outcomes.pop("too slow") == FAULT and records["too slow"]["words"] == "not done after 0.5 s"
    assert outcomes.pop("truth check, fp16") == REFUSED and "fp16" in records["truth check, fp16"]["words"]
    assert set(outcomes.values()) == {DONE}, [record for record in records.values() if record["outcome"] == FAULT]
    assert outcomes.keys() >= {"CPUAdamBuilder", "FusedAdamBuilder"}


@pytest.mark.slow
def test_speed_and_peaks_are_real_and_what_only_a_card_has_is_none(launches):
    for record in launches[0]["rows"]:
        if record["kind"] in ("ours", "stock") and record["outcome"] == DONE:
            found = record["found"]
            assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / found["step_seconds"], rel=0.01)
            assert found["micro_batches"] == 2 and found["micro_batch_seconds"] > 0 and found["host_gb"] > 0.1
            assert (found["host_planned_gb"] is None) == (record["kind"] == "stock")
            assert {found[name] for name in ("planned_gb", "allocated_gb", "reserved_gb", "mfu")} == {None}


@pytest.mark.slow
def test_runs_are_compared_bit_by_bit(launches):
    found: dict = {name: record.get("found") for name, record in by_name(launches[0]).items()}
    for name in ("resume", "two runs"):
        assert found[name]["unlike"] == [] and found[name]["files"] >= 2 and found[name]["steps"] == RUN["num_steps"]
    assert len(found["other runs"]["unlike"]) == found["other runs"]["files"] + 1
    assert found["truth check, bf16"]["last_loss"] < found["truth check, bf16"]["first_loss"]
    assert found["main job"]["bits_after"] < found["main job"]["bits_before"] and found["main job"]["steps"] == 4


@pytest.mark.slow
def test_a_second_launch_measures_again_what_failed_by_a_fault_and_nothing_else(launches):
    first, second = map(by_name, launches)
    again = {name for name in second if second[name] != first[name]}
    assert again == {"too slow", "CPUAdamBuilder"} and second["too slow"]["outcome"] == DONE


@pytest.mark.slow
def test_each_record_tells_its_machine_and_its_code(launches):
    for record in launches[1]["rows"]:
        about = launches[1]["machines"][record["machine"]]
        assert about["torch"] == torch.__version__ and about["deepspeed"] and about["gpu"] is record["card"] is None
        assert record["code"] == gpu.code_digest(record["kind"]) and record["at"] and record["seconds"] > 0


@pytest.mark.slow
def test_the_table_shows_every_row(launches):
    shown = gpu.table(launches[0]["rows"], None)
    assert all(row.contender in shown for row in tiny_rows(Path()))
    assert "NOT EQUAL" in shown and "not done after 0.5 s" in shown and "\n* of older code" not in shown


def test_without_a_card_the_command_says_so_and_writes_nothing():
    before = gpu.RESULT.read_bytes() if gpu.RESULT.exists() else None
    variables = clean_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, env=variables, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("There is no CUDA device: nothing is measured.\n"), done.stderr
    assert before == (gpu.RESULT.read_bytes() if gpu.RESULT.exists() else None)


BEARING = """
import subprocess, sys, time
child = "import time; from pathlib import Path; Path('alive').touch(); time.sleep(1000)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(1000)
"""


def test_a_row_that_outlasts_its_limit_is_killed_with_all_its_children(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BEARING], env=gpu.environment(tmp_path), cwd=tmp_path)
    while not (tmp_path / "alive").exists():
        assert process.poll() is None
        time.sleep(0.05)
    family = [psutil.Process(number) for number in gpu.processes_of(tmp_path)]
    assert len(family) == 2
    assert gpu.wait(process, 0, 0) == {"outcome": FAULT, "words": "not done after 0 s"}
    gpu.end_all(tmp_path)
    assert process.wait() == -signal.SIGKILL
    assert not list(gpu.processes_of(tmp_path)) and psutil.wait_procs(family, timeout=60)[1] == []


def test_a_row_that_leaves_too_little_host_memory_is_out_of_memory(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BEARING], env=gpu.environment(tmp_path), cwd=tmp_path)
    ended = gpu.wait(process, 60, 1e9)
    gpu.end_all(tmp_path)
    assert ended is not None and ended["outcome"] == OUT_OF_MEMORY and process.wait() == -signal.SIGKILL


def test_a_row_has_no_variable_of_a_launcher_of_pytest_or_of_an_allocator(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "PYTEST_XDIST_WORKER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    found = gpu.environment(tmp_path)
    assert {name for name in os.environ if name not in found} >= {"RANK", "LOCAL_RANK", "PYTEST_XDIST_WORKER"}
    assert found["RANKING"] == "kept" and not any("ALLOC_CONF" in name for name in found)


ENDS = {
    "failed: CUDA out of memory; the plan\nwarning": (1, OUT_OF_MEMORY, "failed: CUDA out of memory; the plan"),
    "Traceback\n[rank0]: torch.OutOfMemoryError: out of memory": (1, OUT_OF_MEMORY, "torch.OutOfMemoryError: out of memory"),
    "a line\n": (-signal.SIGKILL, OUT_OF_MEMORY, "a line"),
    "refused: seed=-1 is below 0; nearest is 0\n": (2, REFUSED, "seed=-1 is below 0; nearest is 0"),
    "Traceback\nKeyError: 'a'\n\n": (1, FAULT, "KeyError: 'a'"),
    "": (1, FAULT, "exit status 1"),
}  # fmt: skip


@pytest.mark.parametrize("output", ENDS)
def test_how_a_process_ended_is_told_from_its_status_and_its_last_telling_line(output, tmp_path):
    status, outcome, words = ENDS[output]
    (tmp_path / gpu.OUTPUT).write_text(output)
    assert gpu.outcome_of(tmp_path, status) == {"outcome": outcome, "words": words}


def test_what_a_process_found_counts_only_when_it_ended_well(tmp_path):
    (tmp_path / gpu.OUTPUT).write_text("AssertionError\n")
    (tmp_path / gpu.FOUND).write_text('{"outcome": "done"}')
    assert gpu.outcome_of(tmp_path, 0) == {"outcome": DONE}
    assert gpu.outcome_of(tmp_path, 1)["outcome"] == FAULT


def simple(number: int, extension: str | None = None, limit_seconds: float = 1) -> Row:
    return Row("exact", f"row {number}", "", "train", {"fields": [{"seed": number}]}, limit_seconds, extension)


def record_of(measured: Row, outcome: str, card: str | None = None) -> dict:
    return gpu.blank(measured, card) | {"outcome": outcome}


@given(known=st.lists(st.tuples(st.sampled_from([None, *OUTCOMES]), st.sampled_from([None, "A", "B"])), max_size=8))
def test_rows_never_tried_come_first_then_faults_and_nothing_that_is_known(known):
    rows = [simple(number, extension) for number, (_, extension) in enumerate(known)]
    tried = {each.model: outcome for each, (outcome, _) in zip(rows, known, strict=True)}
    records = [record_of(each, outcome) for each in rows if (outcome := tried[each.model]) is not None]
    found = gpu.missing(rows, records, None, LIMITS)
    wanted = [each for state in (None, FAULT) for each in rows if tried[each.model] == state]
    assert [each for each in found if each.kind != "compile"] == wanted
    compiled = [each.model for each in found if each.kind == "compile"]
    assert len(set(compiled)) == len(compiled) and set(compiled) == {each.extension for each in wanted} - {None}
    for at, each in enumerate(found):
        assert each.extension is None or each.extension in [before.model for before in found[:at]]


@given(changed=st.sampled_from(["card", "code", "settings", "nothing"]), outcome=st.sampled_from(OUTCOMES))
def test_a_record_of_another_card_code_or_setting_is_kept_and_does_not_count(tmp_path_factory, changed, outcome):
    path, measured = tmp_path_factory.mktemp("results") / "gpu.json", simple(1)
    other = measured._replace(settings={}) if changed == "settings" else measured
    with pytest.MonkeyPatch.context() as patch:
        if changed == "code":
            patch.setattr(gpu, "code_digest", lambda kind: "another")
        earlier = record_of(other, outcome, "another" if changed == "card" else None)
    gpu.save(path, earlier, {"gpu": "one"})
    is_known = changed == "nothing" and outcome != FAULT
    assert gpu.missing([measured], gpu.load(path)["rows"], None, LIMITS) == ([] if is_known else [measured])
    gpu.save(path, record_of(measured, DONE), {"gpu": "two"})
    results = gpu.load(path)
    assert [each["outcome"] for each in results["rows"]] == ([DONE] if changed == "nothing" else [outcome, DONE])
    assert [results["machines"][each["machine"]]["gpu"] for each in results["rows"]][-1] == "two"
    assert gpu.missing([measured], results["rows"], None, LIMITS) == []


@pytest.mark.parametrize("folder", ["ds", "scripts", "tests"])
def test_a_row_is_of_other_code_when_a_file_changes_on_which_it_depends(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / folder / "inner").mkdir(parents=True)
    before = {kind: gpu.code_digest.__wrapped__(kind) for kind in gpu.KINDS}
    (tmp_path / folder / "inner" / "module.py").touch()
    changed = {kind for kind, digest in before.items() if gpu.code_digest.__wrapped__(kind) != digest}
    assert changed == ({"tests"} if folder == "tests" else gpu.KINDS.keys() - {"stock"}) and len(set(before.values())) == len(
        before
    )
    monkeypatch.setattr(gpu, "installed", lambda name: "another" if name == "deepspeed" else None)
    assert not {gpu.code_digest.__wrapped__(kind) for kind in before} & set(before.values())


def test_no_row_is_begun_that_might_outlast_the_whole_and_a_shorter_one_is(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text("def test_right():\n    pass\n\ndef test_wrong():\n    assert False\n")
    short = Row("exact", "short", "", "tests", {"arguments": [str(tmp_path / "test_some.py")]}, 3000, None)
    long = [simple(1, None, 4000), simple(2, "CPUAdamBuilder")]
    gpu.measure_missing([*long, short], tmp_path / "gpu.json", Limits(3500, 4000, 0))
    record = gpu.load(tmp_path / "gpu.json")["rows"][0]
    assert record["model"] == "short" and record["outcome"] == FAULT, "failing tests are a fault, which is tried again"
    assert "1 failed, 1 passed" in record["words"] and "test_some.py::test_wrong" in record["words"]
    printed = capsys.readouterr().out
    assert printed.endswith("\n3 of 3 rows are still to be measured: the same command goes on\n") and record["words"] in printed
    assert len(gpu.load(tmp_path / "gpu.json")["rows"]) == 1


@pytest.fixture(scope="module")
def real_rows() -> list[Row]:
    return [*gpu.first_rows(), *gpu.more_rows(), *gpu.last_rows()]


def test_the_rows_of_a_card_are_valid_distinct_and_short_enough(real_rows):
    assert len({(each.part, each.model, each.contender) for each in real_rows}) == len(real_rows)
    for each in real_rows:
        assert each.kind in gpu.KINDS and gpu.COMPILE_SECONDS + each.limit_seconds <= gpu.WHOLE_SECONDS
        assert json.loads(json.dumps(each.settings)) == each.settings
        if each.kind in ("ours", "stock"):
            config = TrainingConfig(**each.settings["fields"])
            assert each.extension == ("CPUAdamBuilder" if config.offload_optimizer else "FusedAdamBuilder")
            assert config.accumulation_steps(1) in (2, 16)
    whole = next(each for each in real_rows if each.model == "3B" and each.part == "published")
    assert whole.settings["fields"]["tokens_per_step"] == gpu.PUBLISHED_TOKENS


def test_peers_have_the_shapes_of_ours_and_are_checkpointed_by_their_own_means(real_rows):
    speed = {(each.model, each.contender): each for each in real_rows if each.part == "speed"}
    models = {model for model, _ in speed}
    assert models == {"124M", "1.3B", "3B", "6.7B"}
    for model in models:
        mine = TrainingConfig(**speed[model, "tightfit"].settings["fields"])
        for name in ("stock", "stock, checkpointing", "stock, checkpointing, Liger"):
            settings = speed[model, name].settings
            theirs = TrainingConfig(**settings["fields"])
            unlike = {field for field, value in asdict(mine).items() if asdict(theirs)[field] != value}
            assert unlike == {"activation_checkpointing"} and theirs.activation_checkpointing == "none"
            assert (settings["checkpointing"], settings["liger"]) == ("check" in name, "Liger" in name)


def test_plans_of_capped_rows_stay_below_what_cuda_leaves_of_the_cap(real_rows):
    capped = [each for each in real_rows if each.part == "capped"]
    assert {each.settings["cap_gb"] for each in capped} == {4, 6, 8}
    for each in capped:
        config = TrainingConfig(**each.settings["fields"])
        at_most = max(at.total for at in plan(config, 1).device.values())
        assert at_most < each.settings["cap_gb"] * gpu.GB


@given(
    micro_batch=st.floats(0.01, 10), end=st.floats(0, 100), micro_batches=st.sampled_from([2, 16]),
    tokens=st.sampled_from([2**12, 2**13, 2**14]),
)  # fmt: skip
def test_the_estimate_is_the_speed_of_a_step_whose_micro_batches_and_end_take_as_long(micro_batch, end, micro_batches, tokens):
    parts = {"micro_batch_seconds": micro_batch, "end_seconds": end, "micro_batches": micro_batches}
    found = parts | {"tokens_per_step": tokens * micro_batches, "tokens_per_second": 1.0}
    whole = {"tokens_per_step": gpu.PUBLISHED_TOKENS, "tokens_per_second": 7.0}
    assert gpu.at_published([found, whole], "3B", None) == ("3B", "a whole step", None, 7)
    estimate, seconds = gpu.at_published([found], "3B", None), gpu.PUBLISHED_TOKENS // tokens * micro_batch + end
    assert estimate is not None and abs(estimate.tokens_per_second - gpu.PUBLISHED_TOKENS / seconds) <= 0.5
    assert gpu.at_published([found | {"end_seconds": end + 1e6}, found], "3B", None) == estimate
    assert gpu.at_published([found | {"micro_batch_seconds": None}], "3B", None) is None


@given(st.sampled_from(list(gpu.PEAK_TFLOPS)), st.sampled_from(["none", "block"]))
def test_all_of_a_cards_peak_is_an_mfu_of_one_whatever_is_recomputed(card, mode):
    config = TrainingConfig(activation_checkpointing=mode)
    flops = flops_per_token(TrainingConfig())
    assert gpu.share_of_peak(config, gpu.PEAK_TFLOPS[card] * 1e12 / flops, card) == 1.0
    assert gpu.share_of_peak(config, 1.0, "an unknown card") is gpu.share_of_peak(config, 1.0, None) is None


@given(st.lists(st.lists(st.text("ab", max_size=5), min_size=3, max_size=3), min_size=2, max_size=6))
def test_columns_are_aligned_and_lose_no_cell(lines):
    lines = [[f"row {number}", *cells] for number, (_, *cells) in enumerate(lines)]
    shown = gpu.columns("heading", lines).splitlines()
    assert shown[:2] == ["", "heading"] and [line.split()[2:] for line in shown[2:]] == [
        [text for at, text in enumerate(line[1:], 1) if text and any(other[at] for other in lines[1:])] for line in lines
    ]
    assert all(line == line.rstrip() for line in shown) and gpu.columns("heading", []) == ""
