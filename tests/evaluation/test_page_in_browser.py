"""The page of a comparison in headless Chromium, opened from a file.

Pointing at a token changes the heat, answers and truths are those of the predictions on disk, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import chromium

from gasp_fast.evaluation.pointing_page import read_pointing
from gasp_fast.evaluation.predictions import PredictionStore
from gasp_fast.evaluation.report import read_report

SIDE = 7  # tokens of a frame along each axis
EXECUTABLE = chromium()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium; `make browser` says what to install")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        yield running
        running.close()


class Opened:
    """A page, and everything that went wrong in it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._note_request)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#answers canvas[aria-label]")

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(("data:", "file:")):
            self.problems.append(f"request: {request.url}")

    def settle(self) -> None:
        """Wait for the frame after the next: drawing is done in the next."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def choose(self, name: str, value: object) -> None:
        self.page.locator(f"#{name} input[value='{value}']").check(force=True)
        self.settle()

    def layer(self, place: int) -> None:
        self.page.locator("#layer").fill(str(place))
        self.settle()

    def point(self, token: int) -> None:
        """Hover over the middle of a token of the first frame."""
        self.page.locator("#first").scroll_into_view_if_needed()
        box = self.page.locator("#first").bounding_box()
        x, y = (box["width"] * (token % SIDE + 0.5) / SIDE, box["height"] * (token // SIDE + 0.5) / SIDE)
        self.page.mouse.move(box["x"] + x, box["y"] + y)
        self.settle()

    def pixels(self) -> list[str]:
        return self.page.eval_on_selector_all("#answers canvas", "all => all.map(one => one.toDataURL())")

    def labels(self) -> list[str]:
        return self.page.eval_on_selector_all("#answers canvas", "all => all.map(one => one.ariaLabel)")

    def words(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def opened(browser, compared) -> Iterator[Opened]:
    one = Opened(browser, compared / "comparison" / "index.html")
    yield one
    one.context.close()
    assert not one.problems


def test_pointing_choosing_a_layer_and_features_each_change_the_heat(opened):
    seen = []
    for change in (
        lambda: opened.point(8),
        lambda: opened.point(40),
        lambda: opened.layer(0),
        lambda: opened.choose("kind", "qk"),
        lambda: opened.choose("view", "all"),
    ):
        change()
        seen.append(opened.pixels())
    assert len(seen[0]) == 2 * 4  # two models, four later frames
    for before, after in pairwise(seen):
        assert all(a != b for a, b in zip(before, after, strict=True))


def test_answers_and_truths_are_those_of_the_predictions_on_disk(opened, compared):
    """For every point of the evaluation, model, kind of features and layer that is tried: tokens and verdict."""
    (shown, *_), compared_frames = read_pointing(compared / "before")["sequences"], 0
    report = read_report(compared / "before")
    (index,) = [
        one["sequence"]
        for one in report["evaluated"]
        if one["scene"] == shown["scene"] and set(shown["frames"]) <= set(one["frames"])
    ]
    stored = {name: PredictionStore(compared / name, ["head", "qk"]).load(index) for name in ("before", "after")}
    anchors = sorted(set(stored["before"].anchor.tolist()))
    for kind, layer in (("head", 0), ("head", 3), ("qk", 2)):
        opened.choose("kind", kind)
        opened.layer(layer)
        for anchor in anchors[:: len(anchors) // 6]:
            opened.point(anchor)
            labels, captions = opened.labels(), opened.words("#answers figcaption")
            for row, (name, predictions) in enumerate(stored.items()):
                for frame in range(4):  # of the five frames of the sequence, all are shown
                    label, caption = labels[4 * row + frame], captions[4 * row + frame]
                    assert label.startswith(f"{name}, +")
                    matches = np.flatnonzero(
                        (predictions.anchor == anchor) & (predictions.target // SIDE**2 == frame + 1)
                    )
                    if not len(matches):
                        assert "hidden or unknown" in label and "hidden" in caption
                        continue
                    answer = int(predictions.best[kind][layer, matches[0]]) % SIDE**2
                    truth = int(predictions.target[matches[0]]) % SIDE**2
                    assert f"answer row {answer // SIDE + 1}, column {answer % SIDE + 1};" in label
                    assert f"true row {truth // SIDE + 1}, column {truth % SIDE + 1}:" in label
                    dx, dy = answer % SIDE - truth % SIDE, answer // SIDE - truth // SIDE
                    right = (dx**2 + dy**2) ** 0.5 <= 2
                    assert label.endswith(": right" if right else ": wrong")
                    assert ("✓ right" if right else "✗ wrong") in caption
                    compared_frames += 1
    assert compared_frames > 60


def test_the_share_beside_a_model_is_its_pck_of_the_sequence(opened, compared):
    for number, shown in enumerate(read_pointing(compared / "after")["sequences"]):
        opened.choose("sequence", number)
        opened.choose("kind", "head")
        opened.layer(1)
        for name, words in zip(("before", "after"), opened.words("#answers h3 span"), strict=True):
            report = read_report(compared / name)
            (index,) = [
                one["sequence"] for one in report["evaluated"]
                if one["scene"] == shown["scene"] and one["frames"] == shown["frames"]
            ]  # fmt: skip
            correct = PredictionStore(compared / name, ["head"]).load(index).correct("head", 2.0)[1]
            assert words.startswith(f"finds {correct.sum()} of {len(correct)} points of this sequence")


def test_the_keyboard_moves_the_token_and_the_layer(opened):
    opened.point(24)
    opened.page.locator("#first").focus()
    before = opened.pixels()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowDown")
    opened.settle()
    assert "row 5, column 5" in opened.words("#first-caption")[0] and opened.pixels() != before
    layer = int(opened.words("#layer-number")[0])
    opened.page.keyboard.press("PageDown" if layer > 1 else "PageUp")
    opened.settle()
    assert int(opened.words("#layer-number")[0]) == (layer - 1 if layer > 1 else 2)
    for _ in range(20):
        opened.page.keyboard.press("ArrowLeft")
    opened.settle()
    assert "row 5, column 1" in opened.words("#first-caption")[0]  # not beyond the frame


def test_a_click_holds_the_token_until_the_next(opened):
    opened.point(10)
    opened.page.mouse.down()
    opened.page.mouse.up()
    opened.point(30)
    assert "row 2, column 4 (held)" in opened.words("#first-caption")[0]
    opened.page.mouse.down()
    opened.page.mouse.up()
    opened.settle()
    assert "row 5, column 3" in opened.words("#first-caption")[0]


def test_a_touch_points(browser, compared):
    one = Opened(
        browser, compared / "comparison" / "index.html", has_touch=True, viewport={"width": 420, "height": 800}
    )
    one.page.locator("#first").scroll_into_view_if_needed()
    box = one.page.locator("#first").bounding_box()
    one.page.touchscreen.tap(box["x"] + box["width"] * 0.5 / SIDE, box["y"] + box["height"] * 0.5 / SIDE)
    one.settle()
    assert "row 1, column 1" in one.words("#first-caption")[0]
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 420
    one.context.close()
    assert not one.problems


@pytest.mark.parametrize("name", ["comparison", "before"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_readable_at_800_pixels_and_in_the_dark(browser, compared, name, scheme):
    """Nothing is wider than the window, and text contrasts with its background."""
    size = {"width": 800, "height": 700}
    one = Opened(browser, compared / name / "index.html", viewport=size, color_scheme=scheme)
    assert one.page.evaluate("document.documentElement.scrollWidth") == 800
    colours = one.page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    text, background = (np.mean([int(n) for n in re.findall(r"\d+", colour)[:3]]) for colour in colours)
    assert (text > 200 and background < 40) if scheme == "dark" else (text < 60 and background > 240)
    sizes = one.page.eval_on_selector_all(
        ".plot svg", "all => all.map(one => one.getBoundingClientRect().width / one.viewBox.baseVal.width)"
    )
    assert sizes[0] * 10 > 9  # letters of 10 points
    one.context.close()
    assert not one.problems


def test_links_lead_to_the_reports_and_back_to_their_files(opened, compared):
    links = opened.page.eval_on_selector_all("a", "all => all.map(one => one.getAttribute('href'))")
    assert links == ["../before/index.html", "../after/index.html"]
    opened.page.click("text=report: before")
    opened.page.wait_for_selector("h1:has-text('Correspondence evaluation')")
    own = opened.page.eval_on_selector_all("a", "all => all.map(one => one.getAttribute('href'))")
    assert own == ["report.json"]
