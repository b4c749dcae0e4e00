"""The HTML: parsed by html.parser and held against the data; hostile records; size; what may run in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.attempts import Outcome, write_outcome
from apertus_nemo.report.gather import gather
from apertus_nemo.report.page import MARK, page
from tests.unit.record.example import make
from tests.unit.report.records import HOSTILE, events, lock_with, sealed

VOID = {"meta", "link", "input", "line", "br", "img"}


class Parsed(HTMLParser):
    """Elements with their text, and whether every one is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif not self._open or self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def parsed(*records: Path, **options: Any) -> Parsed:
    return Parsed(page(gather([str(record) for record in records], **options)).decode())


def test_what_stands_in_it(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    events(folder, 1, range(11, 21))
    found = parsed(folder)
    for text in (
        "Whole: finished at step 20",
        "Not checked",
        "the data and packages themselves: a record holds their digests",
        "20 of 25 steps",
        "as written",
        "Recipe",
        "trainer.devices=4",
        "for 10 s",
        f"sha256:{'d' * 64}",
    ):
        assert text in found.text, text
    assert found.text.index("Whole:") < found.text.index("Loss")  # the verdict comes first
    data = json.loads(found.scripts[0][1])
    assert data["runs"][0]["curves"]["loss"]["values"] == [5.0 / number for number in range(1, 21)]


def test_a_changed_record_says_how_much_before_it_says_where(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    (folder / "checkpoints/step-000000010/manifest.json").unlink()
    (folder / "observed.json").unlink()
    found = parsed(folder)
    findings = gather([str(folder)])["runs"][0]["verification"]["findings_in_all"]
    assert findings >= 2
    assert f"Changed in {findings} places The record is not as it was written. " in found.text
    assert "not whole: see the verdict" in found.text


def test_why_a_run_ended_stands_beside_its_verdict(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run", finished=False)
    line = "rank 1 was killed by signal 9; see attempts/001/rank-1.log"
    write_outcome(folder, 1, Outcome("killed", line, 3, rank=1, signal=9, step=20))
    found = parsed(folder)
    assert found.text.index(f"last attempt killed : {line}") < found.text.index("Loss")
    assert f"killed {line}" in found.text[found.text.index("Because") :]
    assert "last attempt" not in parsed(sealed(tmp_path / "whole")).text


def test_it_loads_nothing_and_runs_its_own_scripts_alone(tmp_path: Path) -> None:
    html = page(gather([str(sealed(tmp_path / "run"))]))
    assert html.startswith(MARK)
    found = Parsed(html.decode())
    for tag, attributes in found.elements:
        assert tag not in {"iframe", "object", "embed", "img", "form", "base"}
        assert attributes.get("src") is None
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    code = [text for attributes, text in found.scripts if "type" not in attributes]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert "connect-src" not in policy  # so it is 'none'


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    pinned = lock_with({"config.name": HOSTILE, "overrides": [HOSTILE], "image": {"unknown": HOSTILE}})
    folder = sealed(tmp_path / "<script>alert(3)</script>", pinned=pinned)
    (folder / "attempts/001/rank-0.log").write_text(f"Traceback (most recent call last):\nError: {HOSTILE}\n")
    (folder / "\u202e<b>x").write_text("")
    other = sealed(tmp_path / "b")
    for records in ([folder], [folder, other]):
        html = page(gather([str(record) for record in records])).decode()
        found = Parsed(html)
        assert len(found.scripts) == 3
        assert not any(tag in {"img", "b"} and not attributes for tag, attributes in found.elements if tag == "img")
        assert "alert(1)" in found.text
        assert "{{7*7}}" in found.text
        without = html.replace(found.scripts[1][1], "")
        assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]", without)


def test_names_and_notes_of_everything_that_can_be_reached(tmp_path: Path) -> None:
    found = parsed(make(tmp_path / "a").path, make(tmp_path / "b").path)
    for tag, attributes in found.elements:
        if attributes.get("tabindex") is not None or attributes.get("role") in {"img", "region", "group"}:
            assert attributes.get("aria-label"), (tag, attributes)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        assert (attributes.get("href") or "#").removeprefix("#") in {*ids, "", "data:,"}


def test_a_long_run_has_a_page_of_bounded_size_that_says_so(tmp_path: Path) -> None:
    short = len(page(gather([str(sealed(tmp_path / "short"))])))
    folder = sealed(tmp_path / "long", steps=30_000, saved=())
    events(folder, 1, range(1, 30_001))
    html = page(gather([str(folder)], check=False))
    assert len(html) - short < 4 * 2000 * 32
    found = Parsed(html.decode())
    assert "drawn are the smallest and the largest value of every 32 steps" in found.text
    fine = parsed(folder, check=False, steps=(29_000, 29_100))
    assert json.loads(fine.scripts[0][1])["runs"][0]["curves"]["loss"]["steps"] == list(range(29_000, 29_101))


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    folder = str(sealed(tmp_path / "run"))
    assert page(gather([folder])) == page(gather([folder]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(scheme: str) -> None:
    """Contrast as WCAG 2 defines it: 4.5 for text, 3 for lines."""
    css = (Path(__file__).parents[3] / "apertus_nemo" / "report" / "page.css").read_text()
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split("@media", 1)[0]))
    dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split("@media", 2)[1]))
    colours = light if scheme == "light" else {**light, **dark}
    assert set(light) == set(dark)

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        a, b = sorted((luminance(one), luminance(other)))
        return (b + 0.05) / (a + 0.05)

    for text in ("ink", "quiet", "accent", "good", "bad", "warn"):
        for back in ("page", "card"):
            assert contrast(text, back) >= 4.5, (text, back)
    for mood in ("good", "bad", "warn"):
        assert contrast(mood, f"{mood}-back") >= 4.5, mood
    for number in range(8):
        assert contrast(f"s{number}", "card") >= 3, number
