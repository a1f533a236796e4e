"""The preview of a point cloud in headless Chromium, opened from a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.browser import chromium

from gasp_fast.evaluation.page import cloud_part, write_page
from gasp_fast.g2vlm.cloud import Cloud, preview_data

EXECUTABLE = chromium()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium; `make browser` says what to install")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 230), "white": (240, 240, 240)}
COUNT = """colour => {
  const canvas = document.getElementById("cloud");
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = {count: 0, x: 0, y: 0};
  for (let i = 0; i < data.length; i += 4) {
    if (colour.every((one, c) => data[i + c] === one) && data[i + 3] === 255) {
      found.count++; found.x += (i / 4) % canvas.width; found.y += Math.floor(i / 4 / canvas.width);
    }
  }
  return {count: found.count, x: found.x / found.count / canvas.width, y: found.y / found.count / canvas.height};
}"""


def walls() -> Cloud:
    """Red to the left, green to the right, both at z = 2; blue above at z = 3; white behind red."""
    side = np.linspace(-0.4, 0.4, 90)
    x, y = (one.ravel() for one in np.meshgrid(side, side))
    middles = (-1, 0, 2), (1, 0, 2), (0, -1, 3), (-1, 0, 2.05)
    points = [np.stack([x + dx, y + dy, np.full_like(x, z)], -1) for dx, dy, z in middles]
    colours = np.repeat(np.array(list(COLOURS.values()), np.uint8), len(x), axis=0)
    return Cloud(np.concatenate(points).astype(np.float32), colours)


@pytest.fixture
def opened(tmp_path) -> Iterator[Any]:
    """A page of the cloud, for a reader who prefers no motion."""
    from playwright.sync_api import sync_playwright

    data = preview_data(walls(), np.eye(3)[None], np.zeros((1, 3)))
    path = write_page(tmp_path / "page.html", "Points", [cloud_part("Walls.", data)])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        page = browser.new_context(reduced_motion="reduce", viewport={"width": 1000, "height": 800}).new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith("file:") else problems.append(one.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert not problems


def settle(page: Any) -> None:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def places(page: Any) -> dict[str, Any]:
    settle(page)
    return {name: page.evaluate(COUNT, colour) for name, colour in COLOURS.items()}


def test_the_cloud_is_seen_as_by_the_first_camera_and_turns_by_dragging_keys_and_itself(opened):
    first = places(opened)
    assert all(first[name]["count"] > 1000 for name in ("red", "green", "blue"))
    assert first["white"]["count"] < first["red"]["count"] / 4  # mostly hidden
    assert first["red"]["x"] < 0.4 < 0.6 < first["green"]["x"] and first["blue"]["y"] < first["red"]["y"] - 0.1
    assert places(opened) == first  # a reader who prefers no motion sees none

    opened.locator("#cloud").focus()
    opened.keyboard.press("+")
    assert places(opened)["red"]["x"] < first["red"]["x"] - 0.02  # larger
    opened.keyboard.press("-")
    assert places(opened) == first

    box = opened.locator("#cloud").bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] / 2 + 150 * np.pi, box["y"] + box["height"] / 2, steps=5)  # half a turn
    opened.mouse.up()
    behind = places(opened)
    assert behind["green"]["x"] < 0.4 < 0.6 < behind["white"]["x"]
    assert behind["red"]["count"] < behind["white"]["count"] / 4

    opened.keyboard.press(" ")
    opened.wait_for_timeout(300)
    assert abs(places(opened)["white"]["x"] - behind["white"]["x"]) > 1e-3
    opened.keyboard.press(" ")
    settle(opened)
    assert places(opened) == places(opened)
