"""Records of metrics.jsonl -> pictures and words for people, of one run or of several. Owns matplotlib; knows no model."""

import json
import math
import os
import sys
import textwrap
import warnings
from io import BytesIO
from itertools import count, cycle, product
from pathlib import Path
from shutil import get_terminal_size
from statistics import multimode
from typing import TYPE_CHECKING, Any, NamedTuple

from ds.corpus import Tally, no_text
from ds.pieces import LENGTH_CLASSES, SPLITS, held_out_sources
from scripts.config import FEW_DOCUMENTS, NUM_NAMED_DOCUMENTS, PRETRAIN, TrainingConfig, refuse_arguments, refusing
from scripts.memory import duration
from scripts.run import run_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, HELD_OUT, RATE, NORM = "#9aa7b4", "#c2410c", "#1d4ed8", "#4d7c0f"
SOURCES = ("#0891b2", "#7c3aed", "#65a30d", "#db2777", "#ca8a04", "#1e293b", "#92400e", "#14532d")
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
SHOWN_CHARACTERS, SHOWN_NAME_CHARACTERS, TABLE_COLUMNS = 90, 36, 100
CUT_OR_NAME = "document_separator cuts a file into documents, and validation_corpus names held-out files"
COMPARED_FIELDS = {"train": ("tokens", "loss", "seconds"), "eval": ("tokens", "val_loss", "val_bits_per_byte"), "event": ()}
UNKNOWN_AS_NULL = ("loss", "val_loss", "val_bits_per_byte")
LOOKS = ((".", "s", "^", "x", "D", "v", "+", "*"), ("-", "--", ":", "-."))
NOTES = {
    "faulty": "faulty rows skipped",
    "separator": "texts that may be many documents",
    "json": ".json files read as text, not rows",
}


class Row(NamedTuple):
    """A model in a table: its name, its size, the record of its held-out loss (empty without one), and where it is."""

    name: str
    num_parameters: int
    record: dict
    where: str


class Compared(NamedTuple):
    """A run beside others: its folder's name, what it was configured to do, what it logged, and how much it has trained."""

    name: str
    config: TrainingConfig
    records: list[dict]
    tokens: int
    seconds: float


def compare(folder: str | Path) -> Path:
    """Prints a table of all runs whose folders stand in `folder`, and draws their curves into the picture that it returns.

    A folder without a run, or with a damaged one, is named and left out. Raises ValueError where no run is left, and after the
    table where the picture cannot be written.
    """
    runs = []
    for path in sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir()):
        try:
            runs.append(_read_run(path))
        except (OSError, ValueError) as fault:
            print(f"left out: {printable(f'{path.name}: {fault}')}")
    if not runs:
        raise ValueError(f"{str(folder)!r} holds no run; deepspeed scripts/train_pretrain.py makes one")
    print("\n".join([*comparison_table(runs), ""]), flush=True)
    picture = run_dir.comparison_path(Path(folder))
    try:
        _draw_runs(runs, picture)
    except OSError as fault:
        remedy = "make room on its disk and let its folder be written to, or move away what has its name"
        raise ValueError(f"{picture} cannot be written: {fault.strerror or fault}; {remedy}") from None
    print(f"  picture: {picture}")
    return picture


def _read_run(folder: Path) -> Compared:
    config = run_dir.stored_config(folder)
    try:
        records = run_dir.read_metrics(config)
    except UnicodeDecodeError as fault:
        line = fault.object.count(b"\n", 0, fault.start) + 1
        raise ValueError(f"{run_dir.metrics_path(config)}: line {line} is not UTF-8") from None
    _refuse_damage(records, run_dir.metrics_path(config))
    tokens = max((each["tokens"] for each in records if each["kind"] != "event"), default=0)
    if not tokens:
        raise ValueError("no step is logged yet")
    return Compared(printable(folder.name), config, records, tokens, training_seconds(records))


def _refuse_damage(records: list[dict], log: Path) -> None:
    """Raises ValueError at the first of the `records` of a log that no run writes, as far as a comparison reads it."""
    trained = 0
    for number, record in enumerate(records, 1):
        kind, step = record.get("kind"), record["step"]
        if kind not in [*COMPARED_FIELDS]:
            raise ValueError(f"{log}: line {number}: kind={kind!r:.40} is none of {', '.join(COMPARED_FIELDS)}")
        for name in ("step", *COMPARED_FIELDS[kind]):
            value, wanted = record.get(name), int if name in ("step", "tokens") else (int, float)
            if name not in record:
                raise ValueError(f"{log}: line {number}: {name} is missing")
            if value is None and name in UNKNOWN_AS_NULL:
                continue
            if isinstance(value, bool) or not isinstance(value, wanted) or not 0 <= value <= sys.maxsize:
                raise ValueError(f"{log}: line {number}: {name}={value!r:.40} is no {'count' if wanted is int else 'amount'}")
        if kind == "train" and step < trained:
            raise ValueError(f"{log}: line {number}: step {step} comes after step {trained}")
        trained = step if kind == "train" else trained


def comparison_table(runs: list[Compared]) -> list[str]:
    """A head, and for each run its numbers and the fields in which it differs, in TABLE_COLUMNS or a wider terminal."""
    head = f"{'parameters':>12}{'tokens':>12}{'bits per byte':>15}{'tokens/s':>11}{'trained for':>16}"
    room = max(TABLE_COLUMNS, get_terminal_size((TABLE_COLUMNS, 0)).columns) - len(f"  {head}")
    names = apart([run.name for run in runs], room)
    width = max(26, *map(len, names))
    lines = [f"  {'run':<{width}}{head}"]
    for short, (_, config, records, tokens, seconds) in zip(names, runs, strict=True):
        bits = last_held_out(records).get("val_bits_per_byte")
        size, read = (_in_thousands(places=1)(number) for number in (config.num_parameters, tokens))
        speed, took = (f"{tokens / seconds:,.0f}", duration(seconds / 3600)) if seconds else ("-", "-")
        lines.append(f"  {short:<{width}}{size:>12}{read:>12}{'-' if bits is None else f'{bits:.3f}':>15}{speed:>11}{took:>16}")
        words = ", ".join(f"{field}={printable(repr(value))}" for field, value in _differences(config, runs).items())
        lines += textwrap.wrap(words, TABLE_COLUMNS, initial_indent="      ", subsequent_indent="      ")
    return lines


def _differences(config: TrainingConfig, runs: list[Compared]) -> dict[str, object]:
    """The fields whose values fewer than the most runs have; where as many have another, all are told."""
    described, own = [run_dir.config_record(run.config) for run in runs], run_dir.config_record(config)
    most = {name: multimode(json.dumps(each[name]) for each in described) for name in own if name != "run_dir"}
    return {name: own[name] for name, values in most.items() if values != [json.dumps(own[name])]}


def _draw_runs(runs: list[Compared], picture: Path) -> None:
    """Held-out bits per byte of all runs where any has them, else nats per token, else the training loss, against tokens."""
    units = {"val_bits_per_byte": "held out (bits per byte)", "val_loss": "held out (nats per token)"}
    logged = {name for run in runs for each in run.records for name, value in each.items() if value is not None}
    name = next((name for name in units if name in logged), "loss")
    figure = _figure(0.19 * math.ceil(len(runs) / 3) + 5)
    bottom_inches = figure.get_figheight() - 4.3
    figure.subplots_adjust(left=0.1, right=0.97, top=0.96, bottom=bottom_inches / (bottom_inches + 4.3))
    axes = figure.subplots()
    points = [[each for each in run.records if each["kind"] != "event" and each.get(name) is not None] for run in runs]
    told = [run.name if found else f"{run.name} (not evaluated)" for run, found in zip(runs, points, strict=True)]
    labels = [label.replace("$", r"\$") for label in apart(told, SHOWN_NAME_CHARACTERS)]
    for found, label, (marker, style, color) in zip(points, labels, cycle(product(*LOOKS, SOURCES)), strict=False):
        line = {"color": color, "linestyle": style, "linewidth": 1.2, "marker": marker, "markersize": 4}
        line["markevery"] = 0.1 if name == "loss" else None
        axes.plot(_values(found, "tokens"), _values(found, name), label=f"\u200b{label}", **line)
    axes.set(xlabel="tokens read", ylabel=units.get(name, "training loss (nats per token)"))
    axes.xaxis.set_major_formatter(_in_thousands())
    axes.grid(alpha=0.25)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=9)
    _print_png(figure, picture)


def training_seconds(records: list[dict]) -> float:
    """Seconds that the steps of a run took, without evaluations and saves: a line stands for the steps since the one before."""
    train = [record for record in records if record["kind"] == "train"]
    steps = [0, *(record["step"] for record in train)]
    return math.fsum(each["seconds"] * (each["step"] - before) for each, before in zip(train, steps, strict=False))


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draws losses, the teacher's too, learning rate and gradient norm of a metrics.jsonl into a PNG file; a null is a gap."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    teacher = next((record for record in records if record.get("event") == "teacher"), None)
    figure = _figure(8)
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.07, top=0.97, hspace=0.13)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _plot_losses(loss, train, held_out, teacher)
    _plot_line(rate, train, "learning_rate", unit="learning rate", color=RATE)
    _plot_line(norm, train, "grad_norm", unit="gradient norm", color=NORM)
    rate.set_ylim(bottom=0)
    norm.set(ylim=(0, None), xlabel="tokens read")
    norm.xaxis.set_major_formatter(_in_thousands())
    _print_png(figure, picture)


def line_of(record: dict, num_steps: int, top_k: int | None) -> str:
    """What a person reads of a record that `is_told`. `top_k` is how many ids a teacher labels."""
    words = {
        "train": train_words,
        "eval": lambda record: f"held out {held_out_words(record)}",
        "teacher": lambda record: f"teacher, {_teacher_words(record, top_k)}",
        "sample": lambda record: f"sample\n{indented(record.get('text'))}",
        "saved": lambda record: f"saved {record.get('checkpoint')}",
        "save_failed": lambda record: f"{record.get('fault')}; training goes on",
        "skipped": _skipped_words,
        "repeats": _repeat_words,
        "spike": lambda record: f"the loss jumped to {record.get('loss') or math.nan:.3f}; {_named_documents(record)}",
    }
    return visible(f"step {record['step']}/{num_steps}: {words[record.get('event') or record['kind']](record)}")


def is_told(record: dict) -> bool:
    """Whether `line_of` has a line of a record: of a source that begins again, when the number of its epochs has doubled."""
    event = record.get("event")
    return event not in ("started", "memory") and (event != "repeats" or bool(_doubled(record)))


def _skipped_words(record: dict) -> str:
    if "cause" in record and record["loss_scale"] <= 1:
        return "skipped, its gradients are too large for float16 with any loss scale"
    if "cause" in record:
        return f"skipped, {record['cause']} was too high for gradients in float16; it is {record['loss_scale']:,.0f} now"
    return f"skipped, its gradients are not finite; {_named_documents(record)}"


def train_words(record: dict) -> str:
    """Loss and speed of a train record."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
    return f"loss {loss}, {record['tokens_per_second']:,.0f} tokens/s"


def held_out_words(record: dict) -> str:
    """Nats and bits of an evaluation, no bits where its text has no byte, and the nats of each source where there are few."""
    bits, by_source = record["val_bits_per_byte"], record.get("val_loss_by_source", {})
    if record["val_loss"] is None:
        return "not finite"
    short = zip(short_names([*by_source]), by_source.values(), strict=True)
    of_each = ", ".join(f"{name} {math.nan if value is None else value:.3f}" for name, value in short)
    words = f"{record['val_loss']:.3f} nats per token" + ("" if bits is None else f", {bits:.3f} bits per byte")
    return f"{words} ({of_each})" if 0 < len(of_each) <= SHOWN_CHARACTERS else words


def _doubled(record: dict) -> list[dict]:
    return [each for each in record["sources"] if each["epoch"].bit_length() > each["epoch_before"].bit_length()]


def _repeat_words(record: dict) -> str:
    doubled = _doubled(record)
    names = apart([each["name"] for each in doubled], SHOWN_NAME_CHARACTERS)
    named = [f"{name} (reading {each['epoch'] + 1:,})" for name, each in zip(names, doubled, strict=True)]
    more = f" and {len(named) - len(SOURCES)} more" if len(named) > len(SOURCES) else ""
    return f"from the beginning again: {', '.join(named[: len(SOURCES)])}{more}"


def indented(text: str | None) -> str:
    """A text as part of a longer one."""
    return "\n".join(f"    {line}" for line in visible(text or "").removesuffix("\n").split("\n"))


def data_notes(config: TrainingConfig, manifest: dict, met: Tally) -> list[str]:
    """Lines on what may be otherwise than was meant, with the first place of each kind. ValueError if there is no text."""
    num_documents = sum(manifest[split]["num_documents"] for split in SPLITS)
    if not num_documents and met.counts.get("documents"):
        bounds = "shortest_document_characters, raise longest_document_characters"
        raise ValueError(f"corpus: all {met.counts['documents']:,} documents are too short or too long; lower {bounds}")
    if not num_documents:
        raise ValueError(no_text(met))
    seen = [kind for kind in NOTES if kind in met.first]
    lines = [f"note: {met.counts[kind]:,} {NOTES[kind]}, the first: {printable(met.first[kind])}" for kind in seen]
    if num_documents < FEW_DOCUMENTS and config.has_validation and not config.validation_corpus:
        lines.append(f"note: only {num_documents} documents, each held out whole or not at all; {CUT_OR_NAME}")
    sources = held_out_sources(manifest) if config.has_validation else ()
    unseen = [name for name, num_tokens in sources if num_tokens <= config.context_length]
    if unseen and len(sources) > 1:
        where, others = printable(unseen[0]), f" and {len(unseen) - 1} more" if unseen[1:] else ""
        lines.append(f"note: {where}{others}: less than a window is held out, so its loss is not told apart; {CUT_OR_NAME}")
    return lines


def apart(names: list[str], room: int) -> list[str]:
    """Names of at most `room` characters, without the middle where they have more; of more where two would become equal."""
    cut = (
        [name if len(name) <= most else f"{name[: most // 2]}…{name[-((most - 1) // 2) :]}" for name in names]
        for most in count(room)
    )
    return next(short for short in cut if len({*short}) == len({*names}))


def short_names(names: list[str]) -> list[str]:
    """Names of sources without the folders that all begin with and the parts that all end in."""
    start = os.path.commonprefix(names).rfind("/") + 1
    rests = [name[start:] for name in names]
    num_same = os.path.commonprefix([rest[::-1] for rest in rests]).rfind("/") + 1
    told = [rest[: len(rest) - num_same] or name for rest, name in zip(rests, names, strict=True)]
    return apart(told, SHOWN_NAME_CHARACTERS)


def printable(name: str) -> str:
    """A name of a file in one line that every terminal takes: it may hold what moves the cursor and bytes that are no UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


def visible(text: str) -> str:
    """A text that only writes: what moves the cursor or sets the terminal otherwise is shown as an escape, such as \\x1b."""
    return "".join(each if each in "\n\t" else printable(each) for each in text)


def data_table(manifest: dict, seconds: float) -> str:
    """What a manifest says of the data, a line for each number; `seconds` is how long it took."""
    train, held_out = (manifest[split] for split in SPLITS)
    num_bytes, num_tokens = (train[count] + held_out[count] for count in ("num_bytes", "num_tokens"))
    rows = {
        "documents": f"{train['num_documents'] + held_out['num_documents']:,}",
        "bytes of text": f"{num_bytes:,}",
        "tokens": f"{num_tokens:,}",
        "bytes a token": f"{num_bytes / num_tokens:.2f}",
        "held out": f"{held_out['num_documents']:,} documents, {held_out['num_tokens']:,} tokens",
        "duplicates dropped": f"{manifest['num_duplicates']:,}",
        "empty, skipped": f"{manifest['num_empty']:,}",
        "too short or long, skipped": f"{manifest['num_short'] + manifest['num_long']:,}",
        "faulty rows, skipped": f"{manifest['num_faulty']:,}",
        "not UTF-8, kept": f"{manifest['num_invalid']:,}",
        "shards": f"{len(train['shards']) + len(held_out['shards']):,}",
        "seconds": f"{seconds:,.1f}",
    }
    return "\n".join(f"  {name:<28}{value}" for name, value in rows.items())


def draw_data(manifest: dict, picture: Path) -> None:
    """Draws how long the documents are, and the training tokens of each entry of the corpus, into a PNG file."""
    sources, bars_inches = manifest["sources"], 0.4 + 0.3 * len(manifest["sources"])
    figure = _figure(5 + bars_inches)
    lengths, tokens = figure.subplots(2, 1, height_ratios=(3.5, bars_inches))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.6 / (5 + bars_inches), top=0.95, hspace=1.6 / (4 + bars_inches))
    _plot_lengths(lengths, manifest)
    tokens.barh(range(len(sources)), [each["num_tokens"] for each in sources], color=TRAIN)
    for place, name in enumerate(apart([each["name"] for each in sources], SHOWN_CHARACTERS)):
        tokens.text(0.01, place, printable(name), transform=tokens.get_yaxis_transform(), va="center", parse_math=False)
    tokens.invert_yaxis()
    tokens.set_title("What the training tokens come from", loc="left")
    tokens.set(yticks=[], xlabel="tokens")
    tokens.xaxis.set_major_formatter(_in_thousands())
    _print_png(figure, picture)


def _plot_lengths(axes: "Axes", manifest: dict) -> None:
    for split, color, label in zip(SPLITS, (TRAIN, HELD_OUT), ("training", "held out"), strict=True):
        classes = {int(number): count for number, count in manifest[split]["lengths"].items()}
        starts = [2 ** (number / LENGTH_CLASSES) for number in classes]
        widths = [start * (2 ** (1 / LENGTH_CLASSES) - 1) for start in starts]
        axes.bar(starts, list(classes.values()), widths, align="edge", color=color, label=label)
    axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_formatter(_in_thousands())
    axes.yaxis.set_major_formatter(_in_thousands())
    axes.set_title("How long the documents are", loc="left")
    axes.set(xscale="log", ylim=(0.5, None), xlabel="characters", ylabel="documents")
    axes.legend(frameon=False)


def _figure(inches: float) -> "Figure":
    from matplotlib.figure import Figure  # here, because no first step shall wait half a second for it

    return Figure(figsize=(9, inches), dpi=120)


def _in_thousands(**options) -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ", **options)


def _print_png(figure: "Figure", picture: Path) -> None:
    draft, drawn = picture.with_name(f".{picture.name}.draft"), BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that its font has not
        figure.savefig(drawn, format="png")
    try:
        draft.write_bytes(drawn.getbuffer())
        draft.rename(picture)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def last_held_out(records: list[dict]) -> dict:
    """The last evaluation among records; empty without one."""
    return next((record for record in reversed(records) if record["kind"] == "eval"), {})


def _teacher_words(record: dict, top_k: int | None) -> str:
    words = f"held out {held_out_words(record)}" if "val_loss" in record else "not evaluated"
    if "tail_mass" not in record:
        return words
    return (
        f"{words}; {record['tail_mass']:.1%} of its probability is outside its {top_k} likeliest ids, which leaves out"
        f" {record['left_out_nats']:.3f} nats per token of the divergence for a student with uniform probabilities"
    )


def _named_documents(record: dict) -> str:
    named = [f"{each['document']} {each['beginning'][:60]!r}" for each in record.get("documents", [])]
    more = f" and {len(named) - NUM_NAMED_DOCUMENTS} more in metrics.jsonl" if len(named) > NUM_NAMED_DOCUMENTS else ""
    return f"documents: {', '.join(named[:NUM_NAMED_DOCUMENTS])}{more}"


def _plot_losses(axes: "Axes", train: list[dict], held_out: list[dict], teacher: dict | None) -> None:
    label = "training" if teacher is None else "training objective, with the teacher"
    _plot_line(axes, train, "loss", unit="loss (nats per token)", color=TRAIN, label=label)
    if teacher is not None and teacher.get("val_loss") is not None:
        axes.axhline(teacher["val_loss"], color=HELD_OUT, linewidth=1, linestyle="--", label="held out, the teacher")
    if held_out:
        tokens, losses = _values(held_out, "tokens"), _values(held_out, "val_loss")
        axes.plot(tokens, losses, color=HELD_OUT, marker="o", markersize=4, label="held out", zorder=3)
        _plot_sources(axes, held_out)
    numbers = ("val_loss", "val_bits_per_byte")
    last = next((record for record in reversed(held_out) if all(record[name] is not None for name in numbers)), None)
    if last is not None:
        words = f"{last['val_loss']:.2f} nats, {last['val_bits_per_byte']:.2f} bits per byte"
        at = (last["tokens"], last["val_loss"])
        axes.annotate(words, at, (0, -18), textcoords="offset points", ha="right", color=HELD_OUT, zorder=4, bbox=BEHIND)
    axes.set_title("Loss")
    axes.legend(edgecolor="none", framealpha=0.7)


def _plot_sources(axes: "Axes", held_out: list[dict]) -> None:
    """The held-out loss of each source, of as many as there are colours."""
    tokens, by_source = _values(held_out, "tokens"), [record.get("val_loss_by_source", {}) for record in held_out]
    names = list(dict.fromkeys(name for each in by_source for name in each))
    for name, short, color in zip(names, short_names(names), SOURCES, strict=False):
        losses, label = _values([{name: each.get(name)} for each in by_source], name), short.replace("$", r"\$")
        axes.plot(tokens, losses, color=color, linewidth=1, marker=".", label=f"held out, {label}")
    if len(names) > len(SOURCES):
        axes.plot([], [], linestyle="none", label=f"and {len(names) - len(SOURCES)} more in metrics.jsonl")


def _plot_line(axes: "Axes", records: list[dict], name: str, *, unit: str, color: str, label: str | None = None) -> None:
    marker = "." if len(records) == 1 else None
    axes.plot(_values(records, "tokens"), _values(records, name), color=color, linewidth=1, marker=marker, label=label)
    axes.set_ylabel(unit)
    axes.yaxis.set_label_coords(-0.11, 0.5)
    axes.grid(alpha=0.25)


def _values(records: list[dict], name: str) -> list[float]:
    return [math.nan if record[name] is None else record[name] for record in records]


def main() -> None:
    """Compares every run beside that of PRETRAIN."""
    with refusing():
        refuse_arguments(sys.argv[1:])
        compare(Path(PRETRAIN.run_dir).parent)


if __name__ == "__main__":
    main()
