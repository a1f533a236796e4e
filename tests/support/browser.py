"""The Chromium with which tests open a page; `python -m support.browser` fails where there is none."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-headless-shell", "google-chrome")


def chromium() -> str | None:
    """The path of an installed one, else of playwright's own; None if there is neither."""
    if (found := next(filter(None, map(shutil.which, NAMES)), None)) is not None:
        return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


if __name__ == "__main__":
    sys.exit(chromium() is None)
