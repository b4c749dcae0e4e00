"""The report in a real browser: it draws, answers to pointer and keyboard, prints, and asks nobody for anything."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.attempts import Outcome, write_outcome
from apertus_nemo.record.lock import RunLock
from apertus_nemo.report.gather import gather
from apertus_nemo.report.page import page
from tests.chromium import Chromium, Page, find
from tests.unit.record.example import lock, make
from tests.unit.report.records import HOSTILE, events, lock_with, sealed

pytestmark = [
    pytest.mark.skipif(find() is None and not os.environ.get("CI"), reason="no chromium on this machine"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose record is as hostile as it can be."""
    folder = tmp_path_factory.mktemp("one")
    pinned = lock_with({"config.name": HOSTILE, "overrides": [HOSTILE, "<b onmouseover=alert(4)>"]})
    run = sealed(folder / "<img src=x onerror=alert(3)>", pinned=pinned)
    events(run, 1, range(1, 21))
    (run / "attempts/000/rank-0.log").write_text(f"Traceback (most recent call last):\nError: {HOSTILE}\n")
    return write(folder, run)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    runs = [make(folder / "a").path, make(folder / "b", run_id="2" * 32).path]
    runs.append(make(folder / "c", change=lambda r: replace(r, loss=9.0) if r.step == 7 else r).path)
    return write(folder, *runs)


def write(folder: Path, *runs: Path) -> Path:
    path = folder / "report.html"
    path.write_bytes(page(gather([str(run) for run in runs])))
    return path


def centre(page: Page, curve: str, *, share: float = 0.5) -> tuple[float, float]:
    """A point of a curve's plot, in the window; the plot is scrolled into it."""
    box = page.value(
        f"(() => {{ const plot = document.querySelector('[data-curve={curve}] .nsewdrag'); "
        "plot.scrollIntoView({block: 'center'}); const b = plot.getBoundingClientRect(); "
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    return box[0] + box[2] * share, box[1] + box[3] / 2


def until(page: Page, expression: str) -> Any:
    """The value of an expression, once it is true; the last one after five seconds."""
    return page.value(
        f"(async () => {{ for (let i = 0; i < 100; i++) {{ const found = {expression}; if (found) return found; "
        f"await new Promise(done => setTimeout(done, 50)); }} return {expression}; }})()"
    )


def shown(page: Page, curve: str = "loss") -> list[float]:
    found: list[float] = page.value(f"document.querySelector('[data-curve={curve}]')._fullLayout.xaxis.range")
    return found


def name_of_focus(page: Page) -> str:
    found: str = page.value(
        "(() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.closest('label')"
        "?.textContent.trim() || e.textContent.trim(); })()"
    )
    return found


def test_nothing_leaves_and_nothing_of_a_record_runs(browser: Chromium, one: Path) -> None:
    """With a server on this machine that would hear a request, and hostile texts in every place."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        heard: list[bytes] = []
        threading.Thread(target=lambda: heard.append(server.accept()[0].recv(9)), daemon=True).start()
        page = browser.open(one)
        assert page.value("document.querySelectorAll('.main-svg').length") >= 8
        assert page.value("document.querySelectorAll('script').length") == 3
        assert page.value("document.querySelectorAll('img, b[onmouseover]').length") == 0
        assert "alert(1)" in page.value("document.querySelector('h1').textContent")
        assert page.messages == []
        assert page.requests == [one.resolve().as_uri()]
        # The page's policy refuses what a script in it, or injected into it, would ask for.
        asked = page.value(f"fetch('http://127.0.0.1:{port}/').then(() => 'answered', error => error.constructor.name)")
        assert asked == "TypeError"
        page.value(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
            "document.body.append(s); const i = new Image(); "
            f"i.src = 'http://127.0.0.1:{port}/x.png'; document.body.append(i); }})()"
        )
        assert page.value("window.ran === undefined")
        refusals = [m["params"]["entry"]["text"] for m in page.messages if m["method"] == "Log.entryAdded"]
        assert len(refusals) >= 3
        assert all("Content Security Policy" in text for text in refusals)
        assert heard == []


def test_hovering_shows_the_value(browser: Chromium, one: Path) -> None:
    page = browser.open(one)
    page.mouse("mouseMoved", *centre(page, "loss"))
    legend = until(
        page, "[...document.querySelectorAll('[data-curve=loss] .hoverlayer text')].map(e => e.textContent).join(' ')"
    )
    step = int(re.search(r"step (\d+)", legend)[1])  # type: ignore[index]
    assert 9 <= step <= 12
    assert f"{5 / step:.6g}" in legend
    assert until(page, f"document.getElementById('at').textContent === '{step}'")
    cells = page.value("[...document.querySelectorAll('.readout td')].map(e => e.textContent)")
    assert cells[0] == str(float(f"{5 / step:.9g}"))
    assert cells[3] == f"{100.0 + step:.1f}"
    assert page.messages == []


def test_dragging_zooms_all_curves_and_a_double_click_shows_all(browser: Chromium, three: Path) -> None:
    page = browser.open(three)
    before = shown(page)
    x, y = centre(page, "loss", share=0.3)
    page.mouse("mouseMoved", x, y)
    page.mouse("mousePressed", x, y, pressed=True)
    for part in (40, 90, 150):
        page.mouse("mouseMoved", x + part, y, pressed=True)
    page.mouse("mouseReleased", x + 150, y)
    assert until(page, f"document.querySelector('[data-curve=grad_norm]')._fullLayout.xaxis.range[0] > {before[0] + 2}")
    assert shown(page) == shown(page, "grad_norm") == shown(page, "learning_rate")
    assert shown(page)[1] < before[1] - 2
    for clicks in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            page.mouse(kind, x, y, clicks=clicks)
    assert until(page, f"document.querySelector('.chart')._fullLayout.xaxis.range[0] === {before[0]}")
    assert shown(page) == shown(page, "grad_norm") == before
    assert page.messages == []


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that was killed after step 10 and went on, with a stage from step 16 and two checkpoints."""
    folder = tmp_path_factory.mktemp("marked")
    tree = json.loads(lock().to_bytes())
    for stage, (begin, end) in zip(tree["stages"], ((0, 120), (120, 240)), strict=True):
        stage |= {"from_sample": begin, "to_sample": end}
    tree["stages"][1]["data"]["stage"] = HOSTILE
    run = sealed(folder / "run", pinned=RunLock(tree), finished=False)
    events(run, 0, range(1, 11))
    events(run, 1, range(11, 21))
    write_outcome(run, 0, Outcome("killed", HOSTILE, 3, step=10))
    return write(folder, run)


def marks_drawn(page: Page) -> dict[str, list[int]]:
    """Kind -> steps, of every chart."""
    found = page.value(
        "[...document.querySelectorAll('.chart')].map(c => Object.fromEntries(c._fullData"
        ".filter(t => t.yaxis === 'y2' && t.visible === true)"
        ".map(t => [t.name, [...new Set([...t.x].filter(x => x !== null))]])))"
    )
    assert all(one == found[0] for one in found)
    return dict(found[0])


def test_checkpoints_attempts_and_stages_are_marked(browser: Chromium, marked: Path) -> None:
    page = browser.open(marked)
    drawn = {"attempt": [11], "stage": [16], "checkpoint": [10, 20]}
    assert marks_drawn(page) == drawn
    lines = "[...document.querySelectorAll('.xy2 .js-line')].map(e => e.getBoundingClientRect().height)"
    heights = page.value(lines)
    assert len(heights) == 8  # of four charts, an attempt and a stage each
    assert min(heights) > 100
    key = page.value("[...document.querySelectorAll('.key li')].map(e => e.textContent.trim())")
    assert key == ["an attempt begins", "a stage begins", "a checkpoint"]
    assert page.value("document.querySelector('.marked').textContent.trim()") == (
        "Marked: another attempt begins with step 11; another stage begins with step 16; "
        "checkpoints after steps 10, 20."
    )

    def at(name: str) -> tuple[str, str]:
        page.value(
            f"[...document.querySelectorAll('button')].find(e => e.getAttribute('aria-label') === '{name}').focus()"
        )
        page.key("Enter")
        step, said = page.value("['at', 'marked'].map(id => document.getElementById(id).textContent)")
        return str(step), str(said)

    # From the keyboard: mark after mark, with what a record says of it as it stands, and never as markup.
    assert at("Earlier mark")[0] == "16"
    step, said = at("Earlier mark")
    assert (step, said) == ("11", " · attempt 1 begins; the one before: killed")
    legend = "[...document.querySelectorAll('[data-curve=loss] .hoverlayer text')].map(e => e.textContent).join(' ')"
    assert until(page, f"{legend}.includes('attempt 1 begins with step 11')")
    assert at("Earlier mark") == ("10", " · checkpoint")
    assert at("Earlier mark")[0] == "10"  # there is none before
    assert at("Later mark")[0] == "11"
    step, said = at("Later mark")
    assert (step, said[:19]) == ("16", " · stage 2 begins: ")
    assert "alert(1)" in said
    assert page.value("document.querySelectorAll('#marked *').length") == 0
    # With the pointer.
    page.mouse("mouseMoved", *centre(page, "loss", share=0.775))
    assert until(page, f"{legend}.includes('stage 2 begins with step 16')")
    # In the dark, on paper, and out of sight.
    colour = "document.querySelector('.chart')._fullData.find(t => t.name === 'attempt').line.color"
    light = page.value(colour)
    page.dark(True)
    assert until(page, f"{colour} !== '{light}'")
    page.value("dispatchEvent(new Event('beforeprint'))")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.value(colour) == light
    assert marks_drawn(page) == drawn
    assert page.value("getComputedStyle(document.querySelector('.key')).display") == "flex"
    page.value("dispatchEvent(new Event('afterprint'))")
    page.call("Emulation.setEmulatedMedia", media="screen")
    page.value("document.querySelector('[data-do=marks]').focus()")
    page.key(" ")
    assert page.value("document.querySelector('[data-do=marks]').getAttribute('aria-pressed')") == "false"
    assert marks_drawn(page) == {}
    assert page.messages == []


def test_marks_of_a_run_that_is_not_shown_are_not(browser: Chromium, marked: Path, three: Path, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, marked.parent / "run", make(tmp_path / "b", run_id="2" * 32).path))
    assert marks_drawn(page)["A"]
    page.value("document.querySelector('button[data-run=A]').click()")
    assert marks_drawn(page) == {}
    page = browser.open(three)  # without a mark there is nothing to switch
    assert page.value("document.querySelectorAll('.key, .marked, [data-do=marks]').length") == 0
    assert page.messages == []


def test_everything_is_reached_and_done_from_the_keyboard(browser: Chromium, three: Path) -> None:
    page = browser.open(three)
    names, rings = [], []
    for _ in range(60):
        page.key("Tab")
        if page.value("document.activeElement === document.body"):
            break
        names.append(name_of_focus(page))
        rings.append(page.value("getComputedStyle(document.activeElement).outlineStyle"))
    assert names[0] == "To the verdict"
    for name in (
        "Curves",
        "Show run A",
        "Show run C",
        "Zoom in",
        "Zoom out",
        "Earlier steps",
        "Later steps",
        "All steps",
        "Logarithmic",
        "Step",
        "What ran",
        "Attempts",
        "Checkpoints",
    ):
        assert name in names, (name, names)
    assert set(rings) == {"solid"}  # the focus is seen, wherever it is

    def press(name: str, key: str) -> None:
        label = "e.getAttribute('aria-label') || e.textContent"
        page.value(f"[...document.querySelectorAll('button')].find(e => ({label}) === '{name}').focus()")
        page.key(key)

    before = shown(page)
    press("Zoom in", "Enter")
    assert shown(page)[1] - shown(page)[0] < 0.7 * (before[1] - before[0])
    press("Earlier steps", " ")
    press("All steps", "Enter")
    assert shown(page) == before
    press("Logarithmic", " ")
    assert page.value("document.querySelector('[data-curve=loss]')._fullLayout.yaxis.type") == "log"
    assert page.value("document.querySelector('[data-do=log]').getAttribute('aria-pressed')") == "true"
    press("Show run B", " ")
    assert page.value("document.querySelector('button[data-run=B]').getAttribute('aria-pressed')") == "false"
    assert page.value("[...document.querySelectorAll('.chart')].map(c => c.data[1].visible)") == [False] * 3
    assert page.value("[...document.querySelectorAll('.readout th[scope=row]')].map(e => e.textContent)") == ["A", "C"]
    page.value("document.getElementById('step').focus()")
    page.key("Home")
    for _ in range(6):
        page.key("ArrowRight")
    assert page.value("document.getElementById('at').textContent") == "7"
    rows = page.value("[...document.querySelectorAll('.readout tbody tr')].map(r => r.cells[1].textContent)")
    assert [float(row) for row in rows] == pytest.approx([5 / 7, 9.0], rel=1e-8)
    page.value("document.querySelector('details:not([open]) summary').focus()")
    page.key("Enter")
    assert page.value("document.activeElement.parentElement.open") is True
    assert page.messages == []


def test_every_control_has_a_name(browser: Chromium, three: Path) -> None:
    """By the browser's own accessibility tree."""
    page = browser.open(three)
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "link", "slider", "image", "region", "heading", "DisclosureTriangle"):
        assert found.get(role), (role, sorted(found))
        assert all(found[role]), (role, found[role])
    assert sum("Loss by step. A: 5 at step 1 to 0.25 at step 20; B: " in name for name in found["image"]) == 1
    assert page.value("document.documentElement.lang") == "en"


def test_dark_light_and_paper(browser: Chromium, three: Path) -> None:
    page = browser.open(three)
    back = "getComputedStyle(document.body).backgroundColor"
    line = "document.querySelector('.chart').data[0].line.color"
    light = (page.value(back), page.value(line))
    page.dark(True)
    assert until(page, f"{line} !== '{light[1]}'")
    dark = (page.value(back), page.value(line))
    assert (light[0], dark[0]) == ("rgb(247, 247, 245)", "rgb(18, 20, 23)")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert (page.value(back), page.value(line)) == dark  # as before
    assert page.value("document.querySelectorAll('details:not([open])').length") > 0
    # What is drawn for paper, looked at while the page believes that it is one.
    page.value("dispatchEvent(new Event('beforeprint'))")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.value(line) == light[1]
    assert page.value("document.querySelectorAll('details:not([open])').length") == 0
    assert page.value("getComputedStyle(document.querySelector('.tools')).display") == "none"
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    boxes = "[...document.querySelectorAll('.chart')].map(c => [c, c.querySelector('.main-svg')])"
    for side in ("Width", "Height"):  # of a drawing, in its figure
        inside = f"{boxes}.map(([c, s]) => s.getAttribute('{side.lower()}') <= c.client{side} + 1)"
        assert page.value(inside) == [True] * 3, side
    assert page.messages == []


def test_the_values_shown_first_are_of_the_last_step_that_all_runs_have(browser: Chromium, tmp_path: Path) -> None:
    runs = [make(tmp_path / "a").path, make(tmp_path / "b", steps=10, states=(0, 10)).path]
    page = browser.open(write(tmp_path, *runs))
    assert page.value("document.getElementById('at').textContent") == "10"
    assert "–" not in page.value("[...document.querySelectorAll('.readout tr')].map(r => r.cells[1].textContent)")


def test_a_narrow_window_does_not_scroll_sideways(browser: Chromium, one: Path, three: Path) -> None:
    for path in (one, three):
        page = browser.open(path, width=360, height=700)
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        boxes = page.value(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, svg, .chart'))"
            ".map(e => e.getBoundingClientRect().right)"
        )
        assert max(boxes) <= 360


def test_a_run_of_one_step_and_one_of_none(browser: Chromium, tmp_path: Path) -> None:
    for steps in (1, 0):
        run = sealed(tmp_path / str(steps), steps=steps, saved=(), finished=False)
        path = write(tmp_path / str(steps), run)
        page = browser.open(path)
        assert page.messages == []
        assert page.value("document.querySelectorAll('.chart').length") == (3 if steps else 0)
        assert "Whole so far" in page.value("document.querySelector('.verdict h3').textContent")
