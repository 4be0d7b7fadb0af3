"""A run's records as one page of HTML: curves to hover and zoom, and what else a person asks of a run. Opens no file.

What comes from a corpus, a model or a path is data: it is escaped, also in the JSON that the page's own script draws.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import NamedTuple

from scripts import report
from scripts.config import TrainingConfig
from scripts.memory import duration

(MOST_POINTS, MOST_SAMPLES, MOST_EVENTS) = (1500, 200, 500)
NUM_COLORS = 8
# Control characters, halves of a character, and what turns the direction of the words around it.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Point(NamedTuple):
    """Where a curve is after `step` steps; None where it is not finite."""

    tokens: int
    step: int
    value: float | None


class Curve(NamedTuple):
    """A line of a chart; of evaluations, each has a dot."""

    name: str
    color: str
    points: list[Point]
    dots: bool = False


class Chart(NamedTuple):
    """Curves on one scale, in one unit."""

    title: str
    unit: str
    curves: list[Curve]


def page(config: TrainingConfig, records: list[dict], models: list[report.Row]) -> str:
    """The page of all `records` of a run, and a table of the `models` with which a student is compared."""
    drawn = charts(records)
    sections = {
        "Curves": f'{HINT}<div id="charts"></div>' if drawn else "",
        "Memory: plan and measurement": _memory([each for each in records if each.get("event") == "memory"][-1:]),
        "Speed: plan and measurement": _speed(records),
        "Where the time of a step goes": bars(seconds_by_part(records), "s", 3),
        "Compared with the teacher": _comparison(models),
        "Configuration": _configuration(config),
        "Events": _events(config, records),
        "Samples": _samples([each for each in records if each.get("event") == "sample"]),
    }
    whole = "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in sections.items() if body)
    title = escape(report.printable(config.run_dir))
    tiles, data = _tiles(config, records), _data(drawn)
    text = PAGE.format(title=title, style=STYLE, tiles=tiles, sections=whole, data=data, script=SCRIPT)
    return UNSEEN.sub(lambda found: report.printable(found[0]), text)


def charts(records: list[dict]) -> list[Chart]:
    """All curves that the records give, thinned. Losses are nats per token; x is tokens."""
    train, held_out = ([each for each in records if each["kind"] == kind] for kind in ("train", "eval"))
    teacher = next((each for each in records if each.get("event") == "teacher"), {})
    label = "training objective" if teacher else "training"
    loss = [Curve(label, "train", points(train, "loss")), *_held_out(held_out, teacher, "val_loss")]
    found = [
        Chart("Loss", "nats per token", loss),
        Chart("Held out", "bits per byte", _held_out(held_out, teacher, "val_bits_per_byte")),
        Chart("Learning rate", "", [Curve("learning rate", "rate", points(train, "learning_rate"))]),
        Chart("Gradient norm", "before clipping", [Curve("gradient norm", "norm", points(train, "grad_norm"))]),
        Chart("Speed", "tokens/s", [Curve("tokens/s", "speed", points(train, "tokens_per_second"))]),
    ]
    drawn = [chart._replace(curves=[each for each in chart.curves if _is_drawn(each)]) for chart in found]
    return [chart for chart in drawn if chart.curves]


def points(records: Sequence[dict], name: str) -> list[Point]:
    """The thinned curve of a number that records hold."""
    values = [each.get(name) for each in records]
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    return thinned([Point(each["tokens"], each["step"], at) for each, at in zip(records, finite, strict=True)], MOST_POINTS)


def thinned(whole: list[Point], most: int) -> list[Point]:
    """At most `most` points of a curve, or all of fewer: the first, the last, and of each piece the least, the greatest and a
    gap, if it has one. `most` is at least 6.
    """
    if len(whole) <= most:
        return whole
    inner = whole[1:-1]
    size, kept = math.ceil(len(inner) / ((most - 2) // 3)), [0]
    for start in range(0, len(inner), size):
        values = [point.value for point in inner[start : start + size]]
        known = [value for value in values if value is not None]
        chosen = {*([min(known), max(known)] if known else []), *([None] if len(known) < len(values) else [])}
        kept += sorted(start + 1 + values.index(value) for value in chosen)
    return [whole[at] for at in [*kept, len(whole) - 1]]


def seconds_by_part(records: list[dict]) -> dict[str, float]:
    """Mean seconds that a step spends in each part, and what evaluations and saves come to for each step, as far as told."""
    train = [each for each in records if each["kind"] == "train"]
    told = [each["seconds_by_part"] for each in train if each.get("seconds_by_part")]
    names = dict.fromkeys(name for each in told for name in each)
    parts = {name: math.fsum(each.get(name, 0) for each in told) / len(told) for name in names}
    for name, kinds in {"evaluation": ("eval", "sample"), "saving": ("saved", "save_failed")}.items():
        seconds = [each["seconds"] for each in records if each.get("event", each["kind"]) in kinds and "seconds" in each]
        if seconds and train:
            parts[name] = parts.get(name, 0) + math.fsum(seconds) / train[-1]["step"]
    return parts


def bars(numbers: dict[str, float], unit: str, decimals: int) -> str:
    """A table with a bar for each number; nothing for none."""
    longest = max(numbers.values(), default=0) or 1
    rows = (
        f'<tr><th>{escape(name)}</th><td class="n">{number:,.{decimals}f} {unit}</td>'
        f'<td class="w"><div class="bar" style="width:{max(0, number) / longest:.1%}"></div></td></tr>'
        for name, number in numbers.items()
    )
    return f'<table class="bars">{"".join(rows)}</table>' if numbers else ""


def _held_out(held_out: list[dict], teacher: dict, name: str) -> list[Curve]:
    curves = [Curve("held out", "held", points(held_out, name), dots=True)]
    if teacher.get(name) is not None and held_out:
        level = [Point(each["tokens"], each["step"], teacher[name]) for each in (held_out[0], held_out[-1])]
        curves.append(Curve("held out, the teacher", "teacher", level))
    by_source = [each.get(f"{name}_by_source", {}) for each in held_out]
    names = list(dict.fromkeys(source for each in by_source for source in each))
    for number, (source, short) in enumerate(zip(names, report.short_names(names), strict=True)):
        rows = [each | {source: found.get(source)} for each, found in zip(held_out, by_source, strict=True)]
        curves.append(Curve(f"held out, {report.printable(short)}", f"source{number}", points(rows, source), dots=True))
    return curves[: NUM_COLORS + 2]


def _is_drawn(curve: Curve) -> bool:
    return any(point.value is not None for point in curve.points)


def _data(drawn: list[Chart]) -> str:
    """JSON that no text in it can end or begin anything else with."""
    described = [chart._asdict() | {"curves": [curve._asdict() for curve in chart.curves]} for chart in drawn]
    text = json.dumps(described, separators=(",", ":"), default=str)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="data">{text}</script>'


def _tiles(config: TrainingConfig, records: list[dict]) -> str:
    train, held_out = ([each for each in records if each["kind"] == kind] for kind in ("train", "eval"))
    last, evaluated = (train or [{}])[-1], (held_out or [{}])[-1]
    seconds = report.training_seconds(records)
    tiles = {
        "steps": f"{last.get('step', 0):,} of {config.num_steps:,}",
        "tokens": _short(last.get("tokens", 0)),
        "parameters": _short(config.num_parameters),
        "training loss, last": _number(last.get("loss")),
        "held out, nats per token": _number(evaluated.get("val_loss")),
        "held out, bits per byte": _number(evaluated.get("val_bits_per_byte")),
        "tokens/s, mean": f"{last['tokens'] / seconds:,.0f}" if seconds else "–",
        "training took": duration(seconds / 3600),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{words}</dd></div>" for name, words in tiles.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _short(number: float) -> str:
    unit, size = next(((unit, 10**power) for power, unit in ((9, " G"), (6, " M"), (3, " k")) if number >= 10**power), ("", 1))
    return f"{number / size:,.4g}{unit}"


def _memory(events: list[dict]) -> str:
    kinds = {"card": "gpu", "host": "host"}
    of = {"planned": "planned_gib", "measured": "peak_gib"}
    numbers = {
        f"{kind}, {words}": event[f"{name}_{field}"]
        for event in events
        for kind, name in kinds.items()
        for words, field in of.items()
        if f"{name}_{field}" in event
    }
    return bars(numbers, "GiB", 2)


def _speed(records: list[dict]) -> str:
    """Of the last launch: what was expected of it at its start, and the median of its train lines."""
    launch = records[max((at for at, each in enumerate(records) if each.get("event") == "started"), default=0) :]
    planned = [each["planned_tokens_per_second"] for each in launch[:1] if each.get("planned_tokens_per_second")]
    measured = [each["tokens_per_second"] for each in launch if each["kind"] == "train"]
    return bars({"planned": planned[0], "measured": statistics.median(measured)}, "tokens/s", 0) if planned and measured else ""


def _comparison(models: list[report.Row]) -> str:
    """A column for each model: the narrowest screen has room for three."""
    cells = {
        "": [each.name for each in models],
        "parameters": [_short(each.num_parameters) for each in models],
        "nats per token": [_number(each.record.get("val_loss")) for each in models],
        "bits per byte": [_number(each.record.get("val_bits_per_byte")) for each in models],
        "at step": [f"{each.record['step']:,}" if each.record.get("kind") == "eval" else "–" for each in models],
        "where": [each.where for each in models],
    }
    lines = (f"<tr><th>{name}</th>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for name, row in cells.items())
    return f'<table class="models">{"".join(lines)}</table>' if models else ""


def _samples(samples: list[dict]) -> str:
    words = f"<p>The last {MOST_SAMPLES} of {len(samples):,}; the others are in metrics.jsonl.</p>"
    told = ((each["step"], escape(each.get("text") or "")) for each in samples[-MOST_SAMPLES:])
    texts = (f"<h3>Step {step:,}</h3>{f'<pre>{text}</pre>' if text.strip() else '<p>(no text)</p>'}" for step, text in told)
    return "".join([words if len(samples) > MOST_SAMPLES else "", *texts])


def _events(config: TrainingConfig, records: list[dict]) -> str:
    events = [each for each in records if each["kind"] == "event" and each["event"] not in ("sample", "memory")]
    saves = [each for each in events if each["event"] == "saved"]
    others = [each for each in events if each["event"] == "started" or (each["event"] != "saved" and report.is_told(each))]
    cells = ((each["step"], escape(_event_words(config, each))) for each in others[-MOST_EVENTS:])
    rows = [f"<tr><td>{step:,}</td><td>{words}</td></tr>" for step, words in cells]
    left = (
        f"<p>The last {len(rows)} of {len(others):,}; the others are in metrics.jsonl.</p>" if len(others) > len(rows) else ""
    )
    table = f'<table class="events"><tr><th>step</th><th>event</th></tr>{"".join(rows)}</table>' if rows else ""
    if not saves:
        return left + table
    listed = "".join(f"<li>{escape(str(each.get('checkpoint')))}</li>" for each in saves[-MOST_EVENTS:])
    return f"{left}{table}<details><summary>{len(saves):,} checkpoints saved</summary><ul>{listed}</ul></details>"


def _event_words(config: TrainingConfig, record: dict) -> str:
    if record["event"] == "started":
        begun = f"continued after step {record['step']:,}" if record["step"] else "started"
        return f"{begun}, ranks: {record.get('ranks')}, rows a step: {record.get('rows_per_step')}"
    return report.line_of(record, config.num_steps, config.teacher_top_k).partition(": ")[2]


def _configuration(config: TrainingConfig) -> str:
    rows: dict[bool, list[str]] = {True: [], False: []}
    for field in fields(TrainingConfig):
        value = getattr(config, field.name)
        name = field.name.replace("_", "_<wbr>")
        rows[value != field.default].append(f"<tr><th>{name}</th><td>{escape(repr(value))}</td></tr>")
    changed = f'<table class="fields">{"".join(rows[True])}</table>' if rows[True] else "<p>All fields have their defaults.</p>"
    others = f'<table class="fields">{"".join(rows[False])}</table>'
    return f"{changed}<details><summary>{len(rows[False])} fields with their defaults</summary>{others}</details>"


HINT = """<p class="hint">Hover for the numbers of a step. Drag over a curve to zoom, double click for all of it.
<noscript>The curves need JavaScript.</noscript></p>"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{title}</title>
<style>{style}</style></head>
<body><main><h1>{title}</h1><dl class="tiles">{tiles}</dl>{sections}</main>{data}<script>{script}</script></body></html>
"""

STYLE = """
:root { --ground: #fff; --panel: #f6f7f9; --text: #1d2329; --quiet: #5d6873; --rule: #dde2e7; --train: #8b99a7; --held: #c2410c;
  --teacher: #475569; --rate: #1d4ed8; --norm: #4d7c0f; --speed: #0f766e; --source0: #0891b2; --source1: #7c3aed;
  --source2: #65a30d; --source3: #db2777; --source4: #a16207; --source5: #be123c; --source6: #92400e; --source7: #166534; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --panel: #1d232a; --text: #e6e9ec; --quiet: #9aa6b2;
  --rule: #333c46; --train: #75828f; --held: #fb923c; --teacher: #cbd5e1; --rate: #7aa2ff; --norm: #a3d65c; --speed: #4fd1c5;
  --source0: #22d3ee; --source1: #c4b5fd; --source2: #bef264; --source3: #f9a8d4; --source4: #fde047; --source5: #fda4af;
  --source6: #fdba74; --source7: #86efac; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 1.5rem; margin: .4em 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.8em 0 .5em; padding-bottom: .2em; border-bottom: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 1em 0 .2em; color: var(--quiet); font-weight: 600; }
.hint, figcaption, dt { color: var(--quiet); font-size: .87rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px; margin: 0; }
.tiles div, pre { background: var(--panel); border-radius: 6px; padding: 8px 12px; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 18px 28px; }
figure { margin: 0; min-width: 0; } figure:first-child { grid-column: 1 / -1; }
figcaption b { color: var(--text); font-size: .95rem; }
figcaption span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
figcaption span span { display: inline; }
svg { display: block; width: 100%; touch-action: pan-y; cursor: crosshair; user-select: none; }
svg text { fill: var(--quiet); font-size: 11px; }
svg .above { paint-order: stroke; stroke: var(--ground); stroke-width: 4px; }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 12px; vertical-align: middle; }
.told { min-height: 1.5em; font-size: .87rem; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; margin: .3em 0; max-height: 24em; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; } td { overflow-wrap: anywhere; }
.bars th, .events td:first-child, .n { white-space: nowrap; width: 1px; font-variant-numeric: tabular-nums; }
.n { text-align: right; }
.bar { background: var(--rate); height: 12px; margin-top: 5px; border-radius: 2px; min-width: 1px; }
.models { table-layout: fixed; }
.fields th { width: 30%; font: .82rem/1.7 ui-monospace, monospace; }
.fields td { font: .82rem/1.7 ui-monospace, monospace; }
details { margin: .6em 0; } summary { cursor: pointer; color: var(--quiet); }
"""

SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent), drawings = [], NS = "http://www.w3.org/2000/svg";
const every = charts.flatMap(chart => chart.curves.flatMap(curve => curve.points.map(point => point[0])));
const span = list => list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
const whole = span(every);
if (whole[0] === whole[1]) whole[1] += 1;
let range = whole;
/* Values above so many times a curve's median leave the chart at its top, where they are no greater share of all. */
const TIMES_MEDIAN = 5, WILD_SHARE = 0.25;
const SIZES = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]];
const short = value => {
  const size = SIZES.find(([least]) => Math.abs(value) >= least);
  if (size) return +(value / size[0]).toPrecision(4) + size[1];
  return value && Math.abs(value) < 1e-3 ? value.toExponential(2).replace(".00e", "e") : String(+value.toPrecision(4));
};
const make = (name, attributes, parent) => {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return parent.appendChild(element);
};
const html = (name, words, parent) => Object.assign(parent.appendChild(document.createElement(name)), {textContent: words});
const ticks = (low, high, count) => {
  const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
  const gap = size * [1, 2, 5, 10].find(times => times * size >= rough), list = [];
  for (let at = Math.ceil(low / gap); at * gap <= high + gap * 1e-9; at++) list.push(at * gap);
  return list;
};
const nearest = (points, tokens) => {
  let low = 0, high = points.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < tokens) low = middle; else high = middle; }
  return tokens - points[low][0] < points[high][0] - tokens ? points[low] : points[high];
};
const shown = points => points.flatMap(([tokens, , value], number) => {
  const [later, , next] = points[number + 1] ?? [tokens, 0, null];
  if (value === null) return [];
  const crossed = next === null ? [] : range.filter(edge => tokens < edge && edge < later);
  const between = crossed.map(edge => value + (next - value) * (edge - tokens) / (later - tokens));
  return tokens >= range[0] && tokens <= range[1] ? [value, ...between] : between;
});
function heights(chart) {
  const curves = chart.curves.map(curve => shown(curve.points).sort((a, b) => a - b)).filter(values => values.length);
  const most = TIMES_MEDIAN * span(curves.map(values => values[values.length >> 1]))[1], seen = curves.flat();
  const wild = most > 0 ? seen.filter(value => value > most) : [], few = wild.length <= WILD_SHARE * seen.length ? wild : [];
  const [low, high] = seen.length ? span(seen.filter(value => !few.includes(value))) : [0, 1];
  const rest = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 ? Math.max(0, low - rest) : low - rest, high + rest, few.length ? span(few)[1] : null];
}
function draw(drawing) {
  const {chart, svg} = drawing, width = svg.clientWidth, height = 240, left = 58, right = width - 10, bottom = height - 24;
  const [low, high, wildest] = heights(chart);
  drawing.x = tokens => left + (tokens - range[0]) / (range[1] - range[0]) * (right - left);
  drawing.tokens = x => range[0] + (Math.min(right, Math.max(left, x)) - left) / (right - left) * (range[1] - range[0]);
  const y = value => bottom - (value - low) / (high - low) * (bottom - 8);
  svg.replaceChildren();
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const value of ticks(low, high, 7)) {
    make("line", {x1: left, x2: right, y1: y(value), y2: y(value), stroke: "var(--rule)"}, svg);
    make("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, svg).textContent = short(value);
  }
  make("text", {x: left - 12, y: height - 6, "text-anchor": "end"}, svg).textContent = "tokens";
  for (const tokens of ticks(range[0], range[1], Math.max(2, width / 130)))
    make("text", {x: drawing.x(tokens), y: height - 6, "text-anchor": "middle"}, svg).textContent = short(tokens);
  const clip = make("clipPath", {id: "clip" + drawings.indexOf(drawing)}, svg);
  make("rect", {x: left - 4, y: 0, width: right - left + 8, height: bottom + 4}, clip);
  const inner = make("g", {"clip-path": `url(#${clip.id})`, fill: "none", "stroke-width": 1.5}, svg);
  for (const {color, points, dots} of chart.curves) {
    let pen = "M", path = "";
    for (const [tokens, , value] of points) {
      if (value === null) { pen = "M"; continue; }
      path += `${pen}${drawing.x(tokens).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      if (dots || points.length === 1)
        make("circle", {cx: drawing.x(tokens), cy: y(value), r: 3, fill: `var(--${color})`}, inner);
    }
    make("path", {d: path, stroke: `var(--${color})`, "stroke-dasharray": color === "teacher" ? "5 4" : "none"}, inner);
  }
  if (wildest !== null)
    make("text", {x: right, y: 18, "text-anchor": "end", class: "above"}, svg).textContent =
      `↑ some values are above, up to ${short(wildest)}`;
  drawing.band = make("rect", {y: 0, height: bottom, width: 0, fill: "var(--rate)", "fill-opacity": 0.18}, svg);
  drawing.line = make("line", {y1: 0, y2: bottom, stroke: "var(--quiet)", visibility: "hidden"}, svg);
}
function tell(tokens) {
  const seen = list => list.filter(point => point[0] >= range[0] && point[0] <= range[1]);
  for (const {chart, line, told, x} of drawings) {
    const found = chart.curves.map(curve => nearest(seen(curve.points).length ? seen(curve.points) : curve.points, tokens));
    const at = found.reduce((best, each) => Math.abs(each[0] - tokens) < Math.abs(best[0] - tokens) ? each : best);
    const words = found.map((point, number) => `${chart.curves[number].name} ${point[2] === null ? "not finite" :
      short(point[2])}${point[1] === at[1] || chart.curves[number].color === "teacher" ? "" : ` (step ${point[1]})`}`);
    told.textContent = `step ${at[1]}, ${short(at[0])} tokens: ${words.join(", ")}`;
    for (const [name, value] of [["x1", x(at[0])], ["x2", x(at[0])], ["visibility", "visible"]]) line.setAttribute(name, value);
  }
}
function hush() {
  for (const {line, told} of drawings) { line.setAttribute("visibility", "hidden"); told.textContent = ""; }
}
const zoom = to => { range = to; drawings.forEach(draw); hush(); };
function listen(drawing) {
  const {svg} = drawing, at = event => event.clientX - svg.getBoundingClientRect().left;
  let from = null;
  svg.addEventListener("pointerdown", event => { from = at(event); });
  svg.addEventListener("pointermove", event => {
    tell(drawing.tokens(at(event)));
    if (from === null) return;
    drawing.band.setAttribute("x", Math.min(from, at(event)));
    drawing.band.setAttribute("width", Math.abs(at(event) - from));
  });
  svg.addEventListener("pointerup", event => {
    const ends = from === null ? [] : [from, at(event)].sort((a, b) => a - b);
    from = null;
    if (ends.length && ends[1] - ends[0] > 8) zoom(ends.map(drawing.tokens));
  });
  svg.addEventListener("pointerleave", () => { from = null; drawing.band.setAttribute("width", 0); hush(); });
  svg.addEventListener("dblclick", () => zoom(whole));
}
for (const chart of charts) {
  const figure = document.getElementById("charts").appendChild(document.createElement("figure"));
  const caption = figure.appendChild(document.createElement("figcaption"));
  html("b", chart.title, caption);
  if (chart.unit) html("span", `, ${chart.unit}`, caption);
  for (const {name, color} of chart.curves.length > 1 ? chart.curves : []) {
    const entry = html("span", "", caption);
    Object.assign(html("i", "", entry), {className: "key"}).style.background = `var(--${color})`;
    html("span", name, entry);
  }
  const svg = make("svg", {role: "img", "aria-label": `${chart.title} against tokens`}, figure);
  const drawing = {chart, svg, told: Object.assign(html("div", "", figure), {className: "told"})};
  drawings.push(drawing);
  listen(drawing);
}
drawings.forEach(draw);
addEventListener("resize", () => drawings.forEach(draw));
"""
