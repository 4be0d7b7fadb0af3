"""Laws of scripts/report.py: a picture of whatever the metrics hold, that shows them all and is never half-written; of several
runs, what tells them apart.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import on_a_small_disk
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ds.corpus import Tally
from scripts.config import NUM_NAMED_DOCUMENTS, TrainingConfig
from scripts.report import (  # fmt: skip
    HELD_OUT,
    NORM,
    RATE,
    TABLE_COLUMNS,
    TRAIN,
    Row,
    apart,
    compare,
    data_notes,
    data_table,
    draw_data,
    draw_losses,
    held_out_words,
    is_told,
    line_of,
    training_seconds,
)  # fmt: skip
from scripts.run.metrics import Alone, summary_words, table

LINES, ROOT = 40, Path(__file__).parents[1]


def train(step: int, **changes) -> dict:
    numbers = {"loss": 8.0 / (step + 1), "grad_norm": 1.0 + step % 3, "learning_rate": 1e-3 * step, "seconds": 0.5}
    return {"kind": "train", "step": step, "tokens": step * 8192} | numbers | changes


def held_out(step: int) -> dict:
    return {"kind": "eval", "step": step, "tokens": step * 8192, "val_loss": 6.0 - step / 10, "val_bits_per_byte": 2.5}


def event(step: int) -> dict:
    return {"kind": "event", "step": step, "event": "sample", "text": "def \u2028 f"}


TRAINED = [train(step) for step in range(1, LINES)]
EVALUATED = [held_out(0), *TRAINED, held_out(LINES - 1)]


def drawn(folder: Path, records: list[dict]) -> np.ndarray:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_losses(folder / "metrics.jsonl", folder / "loss.png")
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "metrics.jsonl"]
    return matplotlib.image.imread(folder / "loss.png")


def num_pixels(picture: np.ndarray, color: str) -> int:
    wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return int((np.abs(picture[..., :3] - wanted).max(-1) < 0.02).sum())


def shown(picture: np.ndarray) -> set[str]:
    return {color for color in (TRAIN, HELD_OUT, RATE, NORM) if num_pixels(picture, color) > 20}


@pytest.mark.parametrize(
    ("records", "colors"),
    [
        (EVALUATED + [event(LINES)], {TRAIN, HELD_OUT, RATE, NORM}),
        (TRAINED, {TRAIN, RATE, NORM}),
        ([held_out(0), held_out(5)], {HELD_OUT}),
        ([held_out(3)], {HELD_OUT}),
        ([train(1), held_out(1)], {HELD_OUT}),
    ],
    ids=["all kinds", "no eval", "no train", "one eval", "one of each"],
)
def test_picture_shows_each_kind_that_the_metrics_hold(tmp_path, records, colors):
    assert colors <= shown(drawn(tmp_path, records)) <= colors | {TRAIN, RATE, NORM}


@pytest.mark.parametrize("records", [[train(1)], [event(1)], []], ids=["one train", "one event", "no line"])
def test_picture_of_next_to_nothing_has_axes(tmp_path, records):
    picture = drawn(tmp_path, records)
    assert picture.shape[0] > 500 and picture.shape[1] > 500 and picture[..., :3].min() < 0.1 < 0.9 < picture[..., :3].max()
    assert HELD_OUT not in shown(picture)


def test_events_change_nothing_and_the_same_metrics_give_the_same_picture(tmp_path):
    first = drawn(tmp_path, EVALUATED)
    assert np.array_equal(first, drawn(tmp_path, [event(0), *EVALUATED, event(LINES)]))
    assert not np.array_equal(first, drawn(tmp_path, EVALUATED[:-2]))


def kept_figures(monkeypatch) -> list[Figure]:
    """Every figure that is written from now on, as it is written."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (figures.append(self), savefig(self, *args, **options))
    )
    return figures


def test_a_loss_that_is_not_finite_leaves_the_rest_visible(tmp_path):
    broken = train(20, loss=float("nan"), grad_norm=float("inf"))
    picture = drawn(tmp_path, [*TRAINED[:18], broken, *TRAINED[20:]])
    assert all(num_pixels(picture, color) > 20 for color in (TRAIN, RATE, NORM))


def test_axes_say_what_they_show_in_which_unit(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch)
    drawn(tmp_path, EVALUATED)
    loss, rate, norm = figures[-1].axes
    assert [axes.get_ylabel() for axes in (loss, rate, norm)] == ["loss (nats per token)", "learning rate", "gradient norm"]
    assert norm.get_xlabel() == "tokens read"
    assert [line.get_label() for line in loss.lines] == ["training", "held out"] and loss.get_legend()
    assert loss.texts[0].get_text() == "2.10 nats, 2.50 bits per byte"
    assert np.array_equal(loss.lines[0].get_ydata(), [record["loss"] for record in TRAINED])
    assert np.array_equal(loss.lines[1].get_xdata(), [0, (LINES - 1) * 8192])


@pytest.mark.parametrize("num_sources", [2, 8, 11])
def test_each_source_has_a_line_as_far_as_there_are_colours(tmp_path, monkeypatch, num_sources):
    figures = kept_figures(monkeypatch)
    losses = {f"/data/$web_{number}^2/*.txt": number + 0.5 for number in range(num_sources)}
    drawn(tmp_path, [record | ({"val_loss_by_source": losses} if record["kind"] == "eval" else {}) for record in EVALUATED])
    lines = figures[-1].axes[0].lines
    labels, shown = [str(line.get_label()).replace("\\", "") for line in lines], min(num_sources, 8)
    more = ["and 3 more in metrics.jsonl"] if num_sources == 11 else []
    assert labels == ["training", "held out", *(f"held out, $web_{number}^2" for number in range(shown)), *more]
    for number, line in enumerate(lines[2 : 2 + shown]):
        assert np.array_equal(line.get_ydata(), [number + 0.5] * 2)
    assert len({line.get_color() for line in lines[: 2 + shown]}) == 2 + shown


def test_held_out_text_of_no_byte_has_a_curve_and_a_line(tmp_path):
    bare = held_out(LINES - 1) | {"val_bits_per_byte": None}
    picture = drawn(tmp_path, [held_out(0) | {"val_bits_per_byte": None}, *TRAINED, bare])
    assert num_pixels(picture, HELD_OUT) > 0
    assert line_of(bare, 40, None) == "step 39/40: held out 2.100 nats per token"


def test_a_source_that_begins_again_and_again_is_told_of_when_its_readings_have_doubled():
    def repeats(*epochs: list[int]) -> dict:
        sources = [{"name": name, "epoch_before": old, "epoch": new} for name, (old, new) in zip("ab", epochs, strict=False)]
        return {"kind": "event", "event": "repeats", "step": 7, "sources": sources}

    told = [epoch for epoch in range(1, 100) if is_told(repeats([epoch - 1, epoch]))]
    assert told == [1, 2, 4, 8, 16, 32, 64]
    words = line_of(repeats([0, 1], [5, 9]), 8, None)
    assert words == "step 7/8: from the beginning again: a (reading 2), b (reading 10)"
    assert line_of(repeats([4, 5], [7, 8]), 8, None) == "step 7/8: from the beginning again: b (reading 9)"


def test_held_out_losses_of_few_sources_stand_in_the_line_and_of_many_only_in_the_log():
    record = {"val_loss": 2.0, "val_bits_per_byte": 1.0}
    few, many = ({f"/data/web/{number}.txt": 2.0 for number in range(count)} for count in (2, 9))
    assert held_out_words(record | {"val_loss_by_source": few}).endswith("bits per byte (0.txt 2.000, 1.txt 2.000)")
    assert held_out_words(record | {"val_loss_by_source": many}) == held_out_words(record)


def test_held_out_losses_of_sources_stand_under_that_in_which_their_names_differ():
    def told(*names: str) -> str:
        by_source = dict(zip(names, (2.0, 3.0), strict=True))
        return held_out_words({"val_loss": 2.5, "val_bits_per_byte": 1.0, "val_loss_by_source": by_source}).split(" (")[1]

    rest = "processed/2024/tokens/part-*.parquet"
    assert told(f"/data/english/{rest}", f"/data/german/{rest}") == "english 2.000, german 3.000)"
    assert told("s3://bucket/web/", "s3://bucket/code/") == "web 2.000, code 3.000)"
    assert told("data", "more/data") == "data 2.000, more/data 3.000)"
    assert told("/x", "a/x") == "/x 2.000, a 3.000)"


def test_failed_drawing_leaves_the_old_picture(tmp_path):
    before = drawn(tmp_path, EVALUATED)
    with pytest.raises(KeyError):
        drawn(tmp_path, [{"kind": "train", "tokens": 1}])
    assert np.array_equal(before, matplotlib.image.imread(tmp_path / "loss.png"))


TEACHER = {"kind": "event", "step": 0, "event": "teacher", "val_loss": 2.0, "val_bits_per_byte": 1.0}


def test_the_teachers_held_out_loss_is_a_line_across_the_picture(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch)
    for records in ([TEACHER, *EVALUATED], [TEACHER | {"val_loss": None}, *EVALUATED]):
        drawn(tmp_path, records)
    whole, without = (figure.axes[0].lines for figure in figures)
    assert [line.get_label() for line in whole] == ["training objective, with the teacher", "held out, the teacher", "held out"]
    assert np.array_equal(whole[1].get_ydata(), [2.0, 2.0]) and len(without) == 2


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (train(3, tokens_per_second=1234.5), ("step 3/9: loss 2.000, 1,23",)),
        (train(3, loss=None, tokens_per_second=1.0), ("not finite",)),
        (held_out(5), ("step 5/9: held out 5.500 nats per token, 2.500 bits per byte",)),
        (TEACHER, ("step 0/9: teacher, held out 2.000 nats per token, 1.000 bits per byte",)),
        (
            TEACHER | {"tail_mass": 0.031, "left_out_nats": 0.012},
            ("3.1% of its probability is outside its 32 likeliest", "0.012 nats"),
        ),
        ({"kind": "event", "step": 0, "event": "teacher"}, ("not evaluated",)),
        (
            {
                "kind": "event",
                "step": 2,
                "event": "skipped",
                "documents": [{"document": n, "beginning": "x"} for n in range(5)],
            },
            ("step 2/9: skipped", "0 'x', 1 'x'", f"and {5 - NUM_NAMED_DOCUMENTS} more in metrics.jsonl"),
        ),
        (
            {"kind": "event", "step": 2, "event": "skipped", "cause": "the loss scale", "loss_scale": 32768.0, "documents": []},
            ("step 2/9: skipped, the loss scale was too high for gradients in float16; it is 32,768 now",),
        ),
        (
            {"kind": "event", "step": 2, "event": "skipped", "cause": "the loss scale", "loss_scale": 1.0, "documents": []},
            ("step 2/9: skipped, its gradients are too large for float16 with any loss scale",),
        ),
    ],
)
def test_a_record_is_told_in_one_line_with_units(record, words):
    line = line_of(record, 9, 32)
    assert "\n" not in line and all(each in line for each in words), line


def test_a_table_has_a_line_for_each_model_also_for_one_that_was_not_evaluated():
    rows = [Row("teacher", 2_360_000, TEACHER, "there"), Row("student", 10, held_out(5), "here"), Row("x", 1, {}, "y")]
    head, *lines = table(rows)
    assert {line.rindex(row.where) for line, row in zip(lines, rows, strict=True)} == {head.index("where")}
    assert [line.split() for line in lines] == [
        ["teacher", "2.36", "M", "2.000", "1.000", "there"],
        ["student", "0.00", "M", "5.500", "2.500", "5", "here"],
        ["x", "0.00", "M", "-", "-", "y"],
    ]


@pytest.mark.parametrize("character", ["\x1b", "\a", "\0", "\x7f", "\r", "\x9b", "\u2028", "\u202e", "\u2066"])
def test_what_a_model_or_a_file_system_says_only_writes_to_the_terminal(character):
    text = f"def{character}[2J\n\tf"
    lines = [
        line_of(event(3) | {"text": text}, 9, None),
        line_of({"kind": "event", "step": 3, "event": "save_failed", "fault": text}, 9, None),
        line_of({"kind": "event", "step": 3, "event": "saved", "checkpoint": text}, 9, None),
        summary_words(TrainingConfig(), [event(3) | {"text": text}], pictures=[], saved=None, alone=None),
    ]
    escaped = character.encode("unicode_escape").decode()
    assert all(character not in line and f"def{escaped}[2J\n" in line and "\tf" in line for line in lines)


def memory(peak_gib: float) -> dict:
    return {"kind": "event", "step": 9, "event": "memory", "host_planned_gib": 1.5, "host_peak_gib": peak_gib}


LOSSES = """
  held out before: 6.000 nats per token, 2.500 bits per byte
  held out after:  2.100 nats per token, 2.500 bits per byte"""
END = """
  host memory: 1.50 GiB planned, 1.25 GiB measured
  pictures: run/loss.png, run/report.html"""


def test_a_run_ends_with_its_losses_its_last_sample_its_memory_and_what_to_do_next():
    records = [*EVALUATED, event(3) | {"text": "not the last"}, memory(9.0), event(9) | {"text": "def f\n  g"}, memory(1.25)]
    told = summary_words(
        TrainingConfig(), records, pictures=[Path("run/loss.png"), Path("run/report.html")], saved=None, alone=None
    )
    assert told == f'{LOSSES}\n  sample:\n    def f\n      g{END}\n  next: echo "def" | python scripts/generate.py'


@pytest.mark.parametrize("alone", [None, Alone("alone", [held_out(0), held_out(10)]), Alone("alone", [])])
def test_a_student_ends_with_a_comparison(alone):
    config = TrainingConfig(teacher_dir="there")
    records = [TEACHER | {"folder": "there", "num_parameters": 2_360_000}, *EVALUATED, memory(1.25)]
    told = summary_words(
        config, records, pictures=[Path("run/loss.png"), Path("run/report.html")], saved=Path("run/step-9"), alone=alone
    )
    head = f"{LOSSES}{END}\n  checkpoint (opens in transformers): run/step-9\n"
    assert told.startswith(head)
    _, teacher, student, last = told.removeprefix(head).splitlines()
    size = f"{config.num_parameters / 1e6:.2f}"
    assert teacher.split() == ["teacher", "2.36", "M", "2.000", "1.000", "there"]
    assert student.split() == ["student", size, "M", "2.100", "2.500", "39", "runs/pretrain"]
    if alone is None:
        assert last == "  to compare: train the same student without a teacher, as the README says"
    else:
        numbers = ["5.000", "2.500", "10"] if alone.records else ["-", "-"]
        assert last.split() == ["without", "teacher", size, "M", *numbers, "alone"]


def test_a_run_without_any_record_still_names_its_picture():
    told = summary_words(TrainingConfig(), [], pictures=[Path("loss.png")], saved=None, alone=None)
    assert told.splitlines()[:2] == ["", "  pictures: loss.png"]


DATA = {
    "num_duplicates": 1234, "num_empty": 5, "num_short": 1, "num_long": 2, "num_faulty": 0, "num_invalid": 7,
    "sources": [{"name": "text/**/*.md", "num_tokens": 10**9}, {"name": "/a" * 99, "num_tokens": 0}],
    "train": {
        "num_documents": 1000, "num_bytes": 3_000_000, "num_tokens": 900_000, "lengths": {"0": 1, "40": 999}, "shards": [1] * 9,
    },
    "validation": {"num_documents": 9, "num_bytes": 600_000, "num_tokens": 100_000, "lengths": {"44": 9}, "shards": [1]},
}  # fmt: skip


def test_table_of_the_data_has_the_sums_of_both_splits():
    lines = dict(line.strip().split("  ", 1) for line in data_table(DATA, 12.34).splitlines())
    assert {name: words.strip() for name, words in lines.items()} == {
        "documents": "1,009", "bytes of text": "3,600,000", "tokens": "1,000,000", "bytes a token": "3.60",
        "held out": "9 documents, 100,000 tokens", "duplicates dropped": "1,234", "empty, skipped": "5",
        "too short or long, skipped": "3", "faulty rows, skipped": "0", "not UTF-8, kept": "7", "shards": "10",
        "seconds": "12.3",
    }  # fmt: skip


def test_picture_of_the_data_shows_both_splits_and_every_source(tmp_path):
    draw_data(DATA, tmp_path / "data.png")
    whole = matplotlib.image.imread(tmp_path / "data.png")
    for change in ("train", "validation", "sources"):
        less = DATA["sources"][:1] if change == "sources" else DATA[change] | {"lengths": {}}
        draw_data(DATA | {change: less}, tmp_path / "changed.png")
        other = matplotlib.image.imread(tmp_path / "changed.png")
        assert other.shape != whole.shape or not np.array_equal(other, whole), change
    assert whole.shape[1] == 1080 and [path.name for path in tmp_path.glob(".*")] == []


def test_a_picture_takes_names_as_they_are(tmp_path):
    pictures = []
    for name in ("a$b$c", "abc", "$\\foo{$", "a\udcff\n", "文"):
        draw_data(DATA | {"sources": [{"name": name, "num_tokens": 1}]}, tmp_path / "data.png")
        pictures.append(matplotlib.image.imread(tmp_path / "data.png"))
    assert len({picture.shape for picture in pictures}) == 1 and len({picture.tobytes() for picture in pictures}) == 5


def test_notes_are_one_line_each_whatever_a_file_is_called():
    met = Tally({"documents": 1, "separator": 1}, {"separator": "\x1b[2J\ra\udcff\nb holds"})
    (line,) = data_notes(TrainingConfig(validation_fraction=0, eval_every_steps=None), DATA, met)
    assert line.endswith(r"\x1b[2J\ra\udcff\nb holds") and line.encode()


def test_a_source_without_a_held_out_window_is_named():
    shards = [{"num_tokens": 256, "source": 0}, {"num_tokens": 257, "source": 1}]
    sources = [{"name": name, "num_tokens": 10**6} for name in ("web\n", "code", "books")]
    data = DATA | {"sources": sources, "validation": DATA["validation"] | {"shards": shards}}
    (line,) = data_notes(TrainingConfig(corpus=("web\n", "code", "books")), data, Tally({"documents": 99}))
    assert line.startswith(r"note: web\n and 1 more: less than a window is held out")
    assert data_notes(TrainingConfig(validation_fraction=0, eval_every_steps=None), data, Tally({"documents": 99})) == []


def test_without_documents_the_cause_is_told():
    nothing = {split: DATA[split] | {"num_documents": 0} for split in ("train", "validation")}
    causes = {"every file is empty": Tally({"empty": 2}), "all 3 documents are too short or too long": Tally({"documents": 3})}
    for words, met in causes.items():
        with pytest.raises(ValueError, match=words):
            data_notes(TrainingConfig(), nothing, met)


def run_in(folder: Path, records: list[dict], **changes) -> Path:
    """A folder as a run leaves it, but for its checkpoints."""
    folder.mkdir(parents=True)
    config = TrainingConfig(run_dir="elsewhere", **changes)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_runs_are_compared_by_their_numbers_and_by_the_fields_in_which_they_differ(tmp_path, capsys):
    for name, rate in (("first", 6e-3), ("second", 6e-3), ("third", 1e-2)):
        run_in(tmp_path / name, EVALUATED, learning_rate=rate)
    run_in(tmp_path / ("long" * 20), EVALUATED, corpus=("/data/" + "x y" * 60,), num_steps=77, seed=1)
    picture = compare(tmp_path)
    told = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  ") and line[2] != " ")
    assert lines["first"].split() == ["1.9", "M", "319.5", "k", "2.500", "16,384", "20", "seconds"]
    parts = told.replace("\n      ", " ").split("\n")
    (third,) = [line for line in parts if line.startswith("  third")]
    assert third.endswith(" learning_rate=0.01") and told.count("learning_rate") == 1 and told.count("run_dir") == 0
    assert "num_steps=77, seed=1" in told.replace("\n     ", "")
    assert max(map(len, told.splitlines()[:-1])) <= TABLE_COLUMNS
    assert picture == tmp_path / "compare.png" and matplotlib.image.imread(picture).shape[0] > 500


@pytest.mark.parametrize(("columns", "is_whole"), [(80, False), (100, False), (140, True)])
def test_names_of_runs_are_whole_where_they_fit_and_else_lose_their_middle_and_stay_apart(
    tmp_path, capsys, monkeypatch, columns, is_whole
):
    monkeypatch.setenv("COLUMNS", str(columns))
    long = [f"smollm2-python-of-2024-{middle}-wsd-muon-lr3e-4-seed{seed}" for middle in ("a" * 6, "b" * 6) for seed in (1, 2)]
    for name in [*long, "one two  three four five six"]:
        run_in(tmp_path / name, EVALUATED)
    compare(tmp_path)
    _, *lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] == "  " and line[2] != " "]
    names = [line[2:].split("   ")[0] for line in lines if "2.500" in line]
    assert names[0] == "one two  three four five six" and len({*names}) == 5 and len({*map(len, lines[:5])}) == 1
    assert {*names[1:]} == {*long} if is_whole else all(name.startswith("smollm2-python") for name in names[1:])
    assert is_whole or all("…" in name and name.endswith(("seed1", "seed2")) for name in names[1:])


@given(st.lists(st.text("ab…", max_size=30), max_size=8), st.integers(5, 40))
def test_different_names_are_never_told_as_equal_ones(names, room):
    short = apart(names, room)
    assert [len({*short}), len(short)] == [len({*names}), len(names)]
    assert all(told == name for told, name in zip(short, names, strict=True) if len(name) <= room)


def test_of_two_runs_both_values_are_told(tmp_path, capsys):
    for name, rate in (("first", 6e-3), ("second", 1e-2)):
        run_in(tmp_path / name, EVALUATED, learning_rate=rate)
    compare(tmp_path)
    told = capsys.readouterr().out
    assert "learning_rate=0.006" in told and "learning_rate=0.01" in told


DAMAGED = {
    "no number": json.dumps({"kind": "train", "step": 1}) + "\n",
    "no kind": json.dumps({"step": 1}) + "\n",
    "no JSON": "{\n",
    "no text": "\udcff\n",
    "nothing": "",
}
# What no run writes: a change of a good line by its place in the log, and what is told of it.
WRONG = {
    "word": (1, {"loss": "oops"}, "loss='oops' is no amount"),
    "list": (0, {"val_bits_per_byte": [1]}, "val_bits_per_byte=[1] is no amount"),
    "huge": (0, {"val_bits_per_byte": 1e308}, "val_bits_per_byte=1e+308 is no amount"),
    "infinite": (1, {"loss": float("inf")}, "loss=inf is no amount"),
    "no number": (0, {"val_loss": float("nan")}, "val_loss=nan is no amount"),
    "truth": (1, {"tokens": True}, "tokens=True is no count"),
    "part": (1, {"tokens": 1.5}, "tokens=1.5 is no count"),
    "negative": (2, {"seconds": -0.5}, "seconds=-0.5 is no amount"),
    "null": (2, {"seconds": None}, "seconds=None is no amount"),
    "before": (2, {"step": -1}, "step=-1 is no count"),
    "back": (3, {"step": 1}, "step 1 comes after step 2"),
    "kind": (2, {"kind": ["train"]}, "kind=['train'] is none of train, eval, event"),
    "long": (2, {"loss": "x" * 999}, f"loss={repr('x' * 999)[:40]} is no amount"),
}


def test_what_is_no_run_or_damaged_is_named_and_left_out(tmp_path, capsys):
    run_in(tmp_path / "good", EVALUATED)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, log in DAMAGED.items():
        (run_in(tmp_path / name, []) / "metrics.jsonl").write_text(log, errors="surrogateescape")
    (run_in(tmp_path / "other\nconfig", EVALUATED) / "config.json").write_text('{"schedule": "odd"}')
    compare(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    left = [line for line in lines if line.startswith("left out: ")]
    assert len(left) == len(DAMAGED) + 2 and all(any(name in line for line in left) for name in ["notes", *DAMAGED])
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["run", "good", "picture:"]


@pytest.mark.parametrize("name", WRONG)
def test_a_line_that_no_run_writes_is_named_and_its_run_left_out(tmp_path, capsys, name):
    place, change, words = WRONG[name]
    records = [record | (change if place == number else {}) for number, record in enumerate(EVALUATED)]
    log = run_in(tmp_path / "wrong", records) / "metrics.jsonl"
    run_in(tmp_path / "good", EVALUATED)
    compare(tmp_path)
    left, *lines = capsys.readouterr().out.splitlines()
    assert left == f"left out: wrong: {log}: line {place + 1}: {words}"
    assert [line.split()[0] for line in lines if line] == ["run", "good", "picture:"]


@pytest.mark.parametrize("field", ["loss", "tokens", "seconds", "val_loss", "val_bits_per_byte"])
def test_a_line_without_a_number_that_a_run_writes_is_named(tmp_path, capsys, field):
    run_in(tmp_path / "good", EVALUATED)
    lacking = [{name: value for name, value in record.items() if name != field} for record in EVALUATED]
    number = 1 if field in EVALUATED[0] else 2
    log = run_in(tmp_path / "wrong", lacking) / "metrics.jsonl"
    compare(tmp_path)
    assert capsys.readouterr().out.startswith(f"left out: wrong: {log}: line {number}: {field} is missing\n")


def test_a_log_that_is_no_utf_8_is_named_with_its_line(tmp_path, capsys):
    run_in(tmp_path / "good", EVALUATED)
    log = run_in(tmp_path / "wrong", EVALUATED) / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b"eval", b"ev\xffl").replace(b"\xff", b"a", 1))
    compare(tmp_path)
    assert capsys.readouterr().out.startswith(f"left out: wrong: {log}: line {LINES + 1} is not UTF-8\n")


def test_what_is_not_finite_or_has_no_byte_is_no_damage(tmp_path, capsys):
    unknown = {"loss": None, "val_loss": None, "val_bits_per_byte": None}
    records = [record | {name: None for name in unknown.keys() & record.keys()} for record in EVALUATED]
    run_in(tmp_path / "run", records)
    compare(tmp_path)
    assert "left out" not in capsys.readouterr().out


def test_a_half_written_last_line_is_no_damage(tmp_path, capsys):
    with (run_in(tmp_path / "going", EVALUATED) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    compare(tmp_path)
    assert "left out" not in capsys.readouterr().out


def test_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match="holds no run; deepspeed scripts/train_pretrain.py makes one"):
        compare(tmp_path)


COMPARE = "from scripts.config import refusing; from scripts.report import compare; import sys\nwith refusing(): compare({!r})"
# How the disk at $1 comes not to take the picture, once a run lies there.
UNWRITABLE = {
    "full": "head -c 3M /dev/zero >$1/filling 2>&-",
    "nearly full": "head -c 990k /dev/zero >$1/filling",
    "read-only": "mount -o remount,ro $1",
    "a directory": "mkdir $1/compare.png",
}


@pytest.mark.parametrize("cause", UNWRITABLE)
def test_where_the_picture_cannot_be_written_the_table_stands_and_one_line_says_what_to_do(tmp_path, cause):
    run_in(tmp_path / "runs" / "first", EVALUATED)
    disk = tmp_path / "disk"
    script = f'cp -r "$0/first" "$1"; {UNWRITABLE[cause]}; shift; "$@"; echo $?; ls -A {disk}'
    command = on_a_small_disk(disk, 1, ["sh", "-c", script, str(tmp_path / "runs"), str(disk)])
    done = subprocess.run([*command, sys.executable, "-c", COMPARE.format(str(disk))], text=True, capture_output=True, cwd=ROOT)
    (refusal,) = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert refusal.startswith(f"refused: {disk}/compare.png cannot be written: ") and "; make room" in refusal
    assert "Traceback" not in done.stderr and "  first  " in done.stdout and "picture:" not in done.stdout
    status, *left = done.stdout[done.stdout.index("\n\n") :].split()
    assert (
        status == "2" and {*left} <= {"first", "filling", "compare.png"} and ("compare.png" in left) == (cause == "a directory")
    )


@pytest.mark.parametrize("bits", [2.5, None])
def test_the_curves_of_runs_have_units_names_and_a_legend_beside_them(tmp_path, monkeypatch, bits):
    figures = kept_figures(monkeypatch)
    for number in range(12):
        run_in(tmp_path / f"_$run_{number:02}", [record | ({"val_bits_per_byte": bits} if "val_loss" in record else {})
               for record in EVALUATED])  # fmt: skip
    run_in(tmp_path / "unevaluated", TRAINED)
    compare(tmp_path)
    (axes,), (legend,) = figures[-1].axes, figures[-1].legends
    names = [text.get_text().strip("\u200b").replace("\\", "") for text in legend.get_texts()]
    assert names == [*(f"_$run_{number:02}" for number in range(12)), "unevaluated (not evaluated)"]
    assert axes.get_xlabel() == "tokens read"
    assert axes.get_ylabel() == ("held out (nats per token)" if bits is None else "held out (bits per byte)")
    assert np.array_equal(axes.lines[0].get_ydata(), [6.0, 2.1] if bits is None else [2.5, 2.5])
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 13
    figures[-1].draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("num_runs", [1, 30, 100])
def test_each_of_many_runs_looks_like_no_other_and_their_legend_stands_close_below(tmp_path, monkeypatch, num_runs):
    figures = kept_figures(monkeypatch)
    for number in range(num_runs):
        run_in(tmp_path / f"run-{number}", EVALUATED[::13])
    compare(tmp_path)
    (axes,), (legend,) = figures[-1].axes, figures[-1].legends
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    figures[-1].draw_without_rendering()
    words_end, legend_box = axes.xaxis.label.get_window_extent().y0, legend.get_window_extent()
    assert len(looks) == num_runs and 0 <= words_end - legend_box.y1 < 40 and 0 <= legend_box.y0 < 20


def test_runs_that_were_never_evaluated_are_drawn_by_their_training_loss(tmp_path, monkeypatch):
    figures = kept_figures(monkeypatch)
    run_in(tmp_path / "run", TRAINED)
    compare(tmp_path)
    assert figures[-1].axes[0].get_ylabel() == "training loss (nats per token)" and len(figures[-1].axes[0].lines) == 1


def test_training_takes_the_seconds_of_all_steps_also_of_those_between_two_lines():
    assert training_seconds([train(10, seconds=2.0), held_out(15), train(20, seconds=3.0), train(25, seconds=1.0)]) == 55.0
