"""The site of the documentation: every link and anchor leads somewhere, and a page loads nothing from other servers."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs.prepared import ROOT

import gasp_fast

SOURCES = ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "docs", "examples")
LOADED = re.compile(
    r"""<(?:script|img|iframe|link [^>]*stylesheet[^>]*)\b[^>]*(?:src|href)=["']?((?:https?:)?//[^"' >]+)"""
)


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_the_readme_every_document_and_every_public_name(site: Path) -> None:
    front = html.unescape(re.sub(r"<[^>]+>", "", (site / "index.html").read_text()))
    assert " ".join((ROOT / "README.md").read_text().split("\n\n")[1].split())[:60] in " ".join(front.split())
    assert f"gasp_fast {gasp_fast.__version__}" in front
    navigation = (site / "index.html").read_text()
    for document in (ROOT / "docs").glob("*.md"):
        assert f'href="{document.stem}.html"' in navigation, f"no line in nav of mkdocs.yml for {document.name}"
    for name in gasp_fast.__all__:
        assert f'href="#gasp_fast.{name}"' in (site / "reference.html").read_text()
    assert "import gasp_fast" in re.sub(r"<[^>]+>", "", (site / "examples" / "plain_loop.py.html").read_text())


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert LOADED.findall(page.read_text()) == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_a_link_or_anchor_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\n[a](docs/loss.md#no-such-heading), [b](docs/none.md), [c](examples/none.py)\n")
    (tmp_path / "docs" / "unlisted.md").write_text("# Not in the navigation\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    warnings = "\n".join(re.findall(r"^WARNING.*", done.stderr, re.MULTILINE))
    for wrong in ("#no-such-heading", "docs/none.md", "examples/none.py"):
        assert wrong in warnings, done.stderr
    assert "unlisted.md" in done.stderr  # its warning is a list
