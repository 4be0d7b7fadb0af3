"""Laws of scripts/run/page.py: all that a run tells is on one page, which a browser shows at any width without a network."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import metrics
from hypothesis import given
from hypothesis import strategies as st

from scripts.config import TrainingConfig
from scripts.run.metrics import Alone, students_table
from scripts.run.page import Point, bars, page, seconds_by_part, thinned

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>&amp;\u2028\"'`${1}"


def train(step: int, **changes) -> dict:
    numbers = {
        "loss": 8.0 / step,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3,
        "seconds": 0.5,
        "tokens_per_second": 4096.0,
    }
    return {"kind": "train", "step": step, "tokens": step * 2048} | numbers | changes


def held_out(step: int, **changes) -> dict:
    numbers = {"val_loss": 6.0 - step / 50, "val_bits_per_byte": 2.5 - step / 100}
    return {"kind": "eval", "step": step, "tokens": step * 2048} | numbers | changes


def event(step: int, name: str, **fields) -> dict:
    return {"kind": "event", "step": step, "event": name} | fields


CONFIG = TrainingConfig(run_dir="runs/a & b", num_steps=120, teacher_dir="there", corpus=(HOSTILE,))
DOCUMENTS = [{"document": 17, "beginning": HOSTILE}]
RECORDS = [
    event(0, "started", ranks=2, rows_per_step=8, planned_tokens_per_second=9876.0),
    event(0, "teacher", val_loss=3.5, val_bits_per_byte=1.5, folder="there", num_parameters=2_360_000),
    held_out(0, val_loss_by_source={HOSTILE: 6.1, "web": 5.9, "</script><b>": 6.0}),
    *(train(step, loss=None if step == 7 else 8.0 / step) for step in range(1, 61)),
    event(7, "skipped", loss=None, documents=DOCUMENTS),
    held_out(60, val_loss_by_source={HOSTILE: 5.1, "web": 4.9}),
    event(60, "sample", text=f"first {HOSTILE}"),
    event(60, "saved", checkpoint="runs/a/checkpoints/step-00000060"),
    event(60, "started", ranks=1, rows_per_step=8, planned_tokens_per_second=5432.1),
    *(train(step) for step in range(61, 121)),
    event(90, "spike", loss=9.0, documents=DOCUMENTS),
    event(100, "save_failed", fault="the disk is full"),
    held_out(120),
    event(120, "sample", text="second"),
    event(120, "saved", checkpoint="runs/a/checkpoints/step-00000120"),
    event(120, "memory", gpu_planned_gib=6.5, gpu_peak_gib=6.25, host_planned_gib=20.5, host_peak_gib=19.75),
]
PAGE = page(CONFIG, RECORDS, students_table(CONFIG, RECORDS, Alone("runs/alone", [held_out(120)])))


def words_of(text: str) -> str:
    """What a person reads of a page, without the curves."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def test_the_page_tells_what_a_person_asks_of_a_run():
    told = words_of(PAGE)
    expected = [
        "runs/a & b", "120 of 120", "3.600", "1.300", "4,096", "60 seconds", "6.50 GiB", "6.25 GiB", "20.50 GiB", "19.75 GiB",
        "planned 5,432 tokens/s measured 4,096 tokens/s",
        "started, ranks: 2", "continued after step 60, ranks: 1", "the disk is full; training goes on",
        "skipped, its gradients are not finite; documents: 17", "the loss jumped to 9.000; documents: 17",
        "2 checkpoints saved", "runs/a/checkpoints/step-00000060", "without teacher", "2.36 M", "runs/alone", "num_ steps 120",
    ]  # fmt: skip
    assert [each for each in expected if each not in told] == [] and "9,876" not in told
    assert told.index("Step 60 first") < told.index("Step 120 second")


def test_fields_that_differ_from_the_defaults_come_first_and_all_others_are_folded():
    shown, folded = PAGE[PAGE.index("<h2>Configuration") : PAGE.index("<h2>Events")].split("<details>")
    named = {
        name: set(re.findall(r"<th>(\w+)</th>", part.replace("<wbr>", "")))
        for name, part in (("shown", shown), ("folded", folded))
    }
    assert named["shown"] == {"run_dir", "num_steps", "teacher_dir", "corpus"}
    assert named["folded"] | named["shown"] == {*TrainingConfig.__dataclass_fields__} and not named["folded"] & named["shown"]


def test_text_of_documents_samples_and_paths_is_data_and_never_markup():
    assert HOSTILE not in PAGE and PAGE.count(html.escape(HOSTILE)) == 1
    assert "<img" not in PAGE and PAGE.count("<script") == PAGE.count("</script>") == 2
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', PAGE)
    names = [curve["name"] for curve in json.loads(data)[0]["curves"]]
    assert {"held out, web", "held out, </script><b>"} <= {*names} and not {"<", ">", "&"} & set(data)


def test_a_section_without_records_is_left_out_and_the_page_of_nothing_is_a_page():
    headings = {title for title in re.findall("<h2>(.*?)</h2>", page(TrainingConfig(), [], []))}
    assert headings == {"Configuration"}
    assert "Where the time of a step goes" not in PAGE and "<h2>Compared with the teacher" in PAGE


def test_time_of_a_step_is_the_mean_of_what_train_lines_tell_and_of_what_is_between_them():
    records = [
        train(1, seconds_by_part={"data": 0.25, "forward": 1.0}),
        train(2, seconds_by_part={"data": 0.75, "forward": 2.0}),
        held_out(2, seconds=3.0),
        event(2, "saved", seconds=1.0),
    ]
    assert seconds_by_part(records) == {"data": 0.5, "forward": 1.5, "evaluation": 1.5, "saving": 0.5}
    assert "Where the time of a step goes" in page(TrainingConfig(), records, [])
    assert [*map(float, re.findall(r"width:([\d.]+)%", bars({"a": 1.0, "<b>": 4.0}, "s", 1)))] == [25.0, 100.0]


values = st.one_of(st.none(), st.floats(-1e6, 1e6))


@given(st.lists(values, max_size=400), st.integers(6, 60))
def test_thinned_curves_keep_their_ends_their_extremes_and_their_gaps_in_order(numbers, most):
    whole = [Point(step * 10, step, value) for step, value in enumerate(numbers)]
    kept = thinned(whole, most)
    assert len(kept) <= max(most, 0) and [*kept] == sorted(set(kept), key=lambda point: point.step) and set(kept) <= set(whole)
    assert kept[:1] == whole[:1] and kept[-1:] == whole[-1:]
    known, left = ([point.value for point in points if point.value is not None] for points in (whole, kept))
    assert not known or (min(known), max(known)) == (min(left), max(left))
    assert len(left) < len(kept) if len(known) < len(whole) else True


def test_a_run_of_a_hundred_thousand_lines_gives_a_small_page():
    records = [train(step) | {"loss": 2.0 + (step * 7919 % 1000) / 1000} for step in range(1, 100_001)]
    records += [event(step, "sample", text="x" * 500) for step in range(0, 100_000, 50)]
    records += [event(step, "spike", loss=9.0, documents=DOCUMENTS * 3) for step in range(0, 100_000, 20)]
    records += [event(step, "saved", checkpoint="runs/pretrain/checkpoints/step-00000001") for step in range(0, 100_000, 20)]
    text = page(TrainingConfig(), records, [])
    assert len(text.encode()) < 2e6
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    values = [value for _, _, value in json.loads(data)[0]["curves"][0]["points"]]
    assert (min(values), max(values)) == (2.0, 2.999)


def test_samples_come_last_and_of_many_events_and_samples_the_newest_are_told():
    assert [*re.findall("<h2>(.*?)</h2>", PAGE)][-3:] == ["Configuration", "Events", "Samples"]
    records = [event(step, "save_failed", fault=f"fault-{step}") for step in range(501)]
    records += [event(step, "sample", text=f"text-{step}") for step in range(201)]
    told = words_of(page(TrainingConfig(), records, []))
    assert "fault-0;" not in told and "fault-1;" in told and told.index("fault-1;") < told.index("fault-500;")
    assert "text-0 " not in told and "text-1 " in told and "text-200" in told
    assert "The last 500 of 501; the others" in told and "The last 200 of 201; the others" in told


@pytest.mark.parametrize("text", ["", " \n", None])
def test_a_sample_without_text_is_said_to_have_none(text):
    told = page(TrainingConfig(), [event(3, "sample", text=text)], [])
    assert "Step 3 (no text)" in words_of(told) and "<pre" not in told


@needs_chromium
def test_a_long_sample_is_folded(tmp_path):
    measured = "document.title = [...document.querySelectorAll('pre')].map(each => each.clientHeight)"
    text = page(TrainingConfig(), [event(1, "sample", text="short"), event(2, "sample", text="long\n" * 999)], [])
    shown = chromium(tmp_path, text.replace("</body>", f"<script>{measured}</script></body>"))
    short, long = map(int, re.findall(r"<title>(\d+),(\d+)</title>", shown.stdout)[0])
    assert 0 < short < 60 < long < 450


UNSEEN = ["\0", "\a", "\x1b", "\r", "\x7f", "\x9b", "\u202e", "\u2066"]


@pytest.mark.parametrize("character", UNSEEN)
def test_what_turns_or_hides_the_words_around_it_is_shown_as_an_escape(character):
    name = f"run{character}end"
    by_source = {"val_loss_by_source": {name: 1.0, "other": 2.0}}
    records = [
        held_out(0, **by_source),
        event(1, "sample", text=f"a\n\tä שלום 👩‍💻 {name}"),
        event(1, "saved", checkpoint=name),
    ]
    text = page(TrainingConfig(), records, [])
    escaped = f"run{character.encode('unicode_escape').decode()}end"
    assert character not in text and words_of(text).count(escaped) == 2
    assert f"a\n\tä שלום 👩‍💻 {escaped}</pre>" in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    assert f"held out, {escaped}" in [curve["name"] for curve in json.loads(data)[0]["curves"]]


def test_half_a_character_is_no_hindrance_to_writing_the_page():
    assert b">a\\udcffb<" in page(TrainingConfig(), [event(1, "sample", text="a\udcffb")], []).encode()


class Seen(NamedTuple):
    """What a browser makes of a page: what a script in it found, and its console."""

    found: dict
    console: list[str]


LOOK = """<script>
function move(kind, x) {
  const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent(kind, {clientX: box.left + 58 + x * (box.width - 68), bubbles: true}));
}
const curve = () => document.querySelector("svg path[d]").getAttribute("d");
const labels = () => [...document.querySelectorAll("svg")].map(svg => [...svg.querySelectorAll("text")].at(-1).textContent);
const told = () => [...document.querySelectorAll(".told")].map(each => each.textContent);
const found = {width: innerWidth, title: document.title, empty: told(), before: curve(), labels: labels()};
move("pointermove", 0.5);
found.hovered = told();
move("pointerdown", 0.5); move("pointermove", 0.75);
found.band = +document.querySelector("svg rect[fill-opacity]").getAttribute("width");
move("pointerup", 0.75);
found.zoomed = curve();
found.zoomedLabels = labels();
document.querySelector("svg").dispatchEvent(new MouseEvent("dblclick", {bubbles: true}));
found.reset = curve();
const zoomed = (start, end) => {
  move("pointerdown", start); move("pointermove", end); move("pointerup", end);
  const seen = [...document.querySelectorAll("svg")].map(svg => {
    const area = {bottom: svg.clientHeight - 24, left: 58, right: svg.clientWidth - 10};
    return [...svg.querySelectorAll("path[d]")].map(path => heightsWithin(path.getAttribute("d"), area));
  });
  document.querySelector("svg").dispatchEvent(new MouseEvent("dblclick", {bubbles: true}));
  return seen;
};
/* The heights of a path where it enters, bends and leaves the area, as shares: 0 at the bottom, 1 at the top. */
function heightsWithin(d, {bottom, left, right}) {
  const points = d.slice(1).split(/[LM]/).map(each => each.split(" ").map(Number)), found = [];
  points.forEach(([x, y], number) => {
    const [nextX, nextY] = points[number + 1] ?? [x, y];
    if (x >= left && x <= right) found.push(y);
    for (const edge of [left, right]) if (x < edge && edge < nextX) found.push(y + (nextY - y) * (edge - x) / (nextX - x));
  });
  return found.map(y => (bottom - y) / (bottom - 8));
}
found.whole = zoomed(-0.1, -0.1);
found.above = [...document.querySelectorAll("svg")].map(svg => svg.textContent.match(/↑.*?up to [0-9.]+/)?.[0] ?? null);
found.spike = (move("pointermove", 0.5), told()[0]);
found.narrow = zoomed(0.6, 0.65);
const all = [...document.querySelectorAll("body *")].filter(each => !each.closest("pre, svg"));
found.wide = [document.documentElement.scrollWidth, ...all.map(each => Math.ceil(each.getBoundingClientRect().right))];
document.querySelectorAll("details").forEach(each => each.open = true);
/* What stands at the end of each line of a field's name but the last. */
found.broken = [...document.querySelectorAll(".fields th")].flatMap(each => {
  const letters = document.createTreeWalker(each, NodeFilter.SHOW_TEXT), ends = [], rule = document.createRange();
  let last = null;
  while (letters.nextNode()) for (let at = 0; at < letters.currentNode.length; at++) {
    rule.setStart(letters.currentNode, at); rule.setEnd(letters.currentNode, at + 1);
    const {top} = rule.getBoundingClientRect(), letter = letters.currentNode.data[at];
    if (last && top > last.top + 5) ends.push(last.letter);
    last = {top, letter};
  }
  return ends;
});
found.scrolled = all.concat(...document.querySelectorAll("pre")).filter(each => each.scrollWidth > each.clientWidth + 1 &&
  getComputedStyle(each).display !== "inline").map(each => each.outerHTML.slice(0, 200));
found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
found.captions = [...document.querySelectorAll("figcaption")].map(each => each.textContent);
found.ground = getComputedStyle(document.body).backgroundColor;
found.text = getComputedStyle(document.body).color;
const output = parent.document.body.appendChild(parent.document.createElement("output"));
output.textContent = `FOUND${JSON.stringify(found)}END`;
</script>"""


def browsed(folder: Path, text: str, width: int, *options: str) -> Seen:
    """The page in a frame of this width, for a window of Chromium is never narrower than 500 pixels."""
    inner = html.escape(text.replace("</body>", f"{LOOK}</body>"))
    shown = chromium(folder, f'<iframe style="width:{width}px;height:900px" srcdoc="{inner}"></iframe>', *options)
    (found,) = re.findall(r"<output>FOUND(.*?)END</output>", shown.stdout, re.DOTALL) or [shown.stderr]
    return Seen(json.loads(html.unescape(found)), console_of(shown))


def chromium(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess:
    (folder / "page.html").write_text(text)
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    shown = (f"--user-data-dir={folder / 'profile'}", "--window-size=1600,900", "--enable-logging=stderr", "--v=0", *options)
    command = [str(CHROMIUM), *quiet, *shown, "--dump-dom", (folder / "page.html").as_uri()]
    return subprocess.run(command, text=True, capture_output=True, timeout=300)


def console_of(shown: subprocess.CompletedProcess) -> list[str]:
    return [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module", params=[400, 1400])
def seen(request, tmp_path_factory) -> Seen:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return browsed(tmp_path_factory.mktemp("page"), PAGE, request.param)


def test_a_browser_has_nothing_to_complain_of_and_asks_nothing_of_a_network(seen):
    assert seen.console == [] and seen.found["requests"] == [] and seen.found["title"] == "runs/a & b"


def test_each_curve_stands_under_its_name_and_unit(seen):
    names = [re.split(r"[,(]", caption)[0] for caption in seen.found["captions"]]
    assert len(names) == 5 and names[1:] == ["Held out", "Learning rate", "Gradient norm", "Speed"]
    assert seen.found["captions"][0].startswith("Loss, nats per tokentraining objectiveheld out")


def test_hovering_tells_the_numbers_of_the_nearest_step_in_every_chart(seen):
    loss, _, rate, norm, speed = seen.found["hovered"]
    assert set(seen.found["empty"]) == {""}
    assert loss.startswith("step 60, 122.9 k tokens: training objective 0.1333, held out 4.8, held out, the teacher 3.5")
    assert rate.endswith("learning rate 0.001") and norm.endswith("gradient norm 1") and speed.endswith("tokens/s 4.096 k")


def test_dragging_zooms_every_chart_and_a_double_click_shows_all_again(seen):
    found = seen.found
    assert found["band"] > 50 and found["zoomed"] != found["before"] == found["reset"]
    assert all(before != after for before, after in zip(found["labels"], found["zoomedLabels"], strict=True))


def test_curves_that_only_cross_a_narrow_range_are_within_their_charts(seen):
    of_charts = seen.found["narrow"]
    assert len(of_charts) == 5 and all(heights for curves in of_charts[:2] for heights in curves[:2])
    every = [height for curves in of_charts for heights in curves for height in heights]
    assert -0.001 <= min(every) <= max(every) <= 1.001


def test_names_of_fields_break_after_underscores_alone(seen):
    assert {*seen.found["broken"]} == ({"_"} if seen.found["width"] == 400 else set())


def test_nothing_is_wider_than_the_window_or_scrolls_sideways(seen):
    assert seen.found["width"] in (400, 1400) and max(seen.found["wide"]) <= seen.found["width"]
    assert seen.found["scrolled"] == []


@needs_chromium
def test_a_few_wild_values_leave_the_chart_at_its_top_and_are_told_of(tmp_path):
    losses = [900.0 if step == 61 else 4 + step / 121 for step in range(1, 122)]
    records = [train(step, loss=loss, grad_norm=1.0 if step < 70 else 90.0) for step, loss in enumerate(losses, 1)]
    found = browsed(tmp_path, page(CONFIG, records, []), 1400).found
    assert found["above"] == ["↑ some values are above, up to 900", None, None, None]
    (loss,), _, (norm,), _ = found["whole"]
    assert sorted(loss)[0] < 0.1 and 0.9 < sorted(loss)[-2] < 1 < sorted(loss)[-1] and max(norm) < 1
    assert found["spike"].startswith("step 61, 124.9 k tokens: training 900")


@needs_chromium
def test_a_browser_in_the_dark_gets_light_words_on_dark_ground(tmp_path):
    seen = browsed(tmp_path, PAGE, 400, "--blink-settings=preferredColorScheme=0")
    ground, text = (sum(map(int, re.findall(r"\d+", seen.found[name])[:3])) / 765 for name in ("ground", "text"))
    assert ground < 0.2 < 0.8 < text and seen.console == []


@needs_chromium
def test_a_page_that_asked_something_of_a_network_would_be_seen(tmp_path):
    text = PAGE.replace("</main>", '<img src="https://example.org/a.png"></main>')
    assert len(browsed(tmp_path, text, 400).console) == 1


@needs_chromium
def test_a_browser_shows_the_page_of_a_run_that_has_done_nothing(tmp_path):
    shown = chromium(tmp_path, page(TrainingConfig(), [], []))
    assert console_of(shown) == [] and "</html>" in shown.stdout


def test_a_finished_run_has_the_page_of_all_its_records(finished_runs):
    config = finished_runs[1, "labels"]
    text = (Path(config.run_dir) / "report.html").read_text()
    assert text == page(config, metrics(config), students_table(config, metrics(config), None))
    assert "8 of 8" in words_of(text) and replace(config, run_dir="x") != config
