"""Metrics file -> pictures. Knows the lines of metrics.jsonl and matplotlib; nothing of models."""

import json
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

TRAIN, HELD_OUT, RATE, NORM = "#9aa7b4", "#c2410c", "#1d4ed8", "#4d7c0f"


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draws training and held-out loss against tokens, with learning rate and gradient norm below, into a PNG file.

    `metrics` holds one JSON object a line, of kind "train", "eval" or "event"; events are passed over,
    and a null is a gap.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    figure = Figure(figsize=(9, 8), dpi=120, layout="constrained")
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _plot_losses(loss, train, held_out)
    _plot_line(rate, train, "learning_rate", "learning rate", RATE)
    _plot_line(norm, train, "grad_norm", "gradient norm", NORM)
    for axes in (rate, norm):
        axes.set_ylim(bottom=0)
    norm.set_xlabel("tokens read")
    norm.xaxis.set_major_formatter(EngFormatter(sep=" "))
    draft = picture.with_name(f".{picture.name}.draft")
    FigureCanvasAgg(figure).print_png(draft)
    draft.rename(picture)


def _plot_losses(axes: Axes, train: list[dict], held_out: list[dict]) -> None:
    _plot_line(axes, train, "loss", "loss (nats per token)", TRAIN, "training")
    if held_out:
        axes.plot(*_series(held_out, "val_loss"), color=HELD_OUT, marker="o", markersize=4, label="held out")
    finite = [record for record in held_out if record["val_loss"] is not None]
    if finite:
        last = finite[-1]
        words = f"{last['val_loss']:.2f} nats, {last['val_bits_per_byte']:.2f} bits per byte"
        at = (last["tokens"], last["val_loss"])
        axes.annotate(words, at, (0, 14), textcoords="offset points", ha="right", color=HELD_OUT)
    axes.set_title("Loss")
    axes.legend(frameon=False)


def _plot_line(axes: Axes, records: list[dict], name: str, unit: str, color: str, label: str | None = None) -> None:
    marker = "." if len(records) == 1 else None
    axes.plot(*_series(records, name), color=color, linewidth=1, marker=marker, label=label)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)


def _series(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    values = [math.nan if record[name] is None else record[name] for record in records]
    return [record["tokens"] for record in records], values
