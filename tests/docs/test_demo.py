"""The demo runs all its steps, and fails if training does not raise PCK."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.slow
def test_a_demo_whose_training_has_no_effect_fails_after_all_steps(tmp_path):
    words = ["--out", str(tmp_path / "demo"), "--scenes", "12", "--steps", "2", "--sequences", "4"]
    done = subprocess.run(
        [sys.executable, str(DEMO), *words], cwd=DEMO.parents[1], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 1 and "training failed" in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    noise = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]
    assert not noise, noise
    out = tmp_path / "demo"
    page = (out / "index.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 1  # the tracks
    assert page.count("<svg") == 3 and 'id="pointing-data"' in page  # two kinds of features, the training curves
    assert len(page) < 5_000_000
    for link in re.findall(r'<a href="([^"]+)">', page):
        assert (out / link).is_file(), link
    assert page.count('<a href="reports/') == 3
    for name in ("before", "language only", "GASP"):
        assert f"<td>{name}</td>" in page
    for folder in ("language-only", "GASP"):
        assert (out / "runs" / folder / "checkpoint-2").is_dir() and (out / "runs" / folder / "log.jsonl").read_text()
    assert (out / "export" / "model.safetensors").is_file()
    table = done.stdout.split("=== 6/6")[1]
    assert "moved" in table and "same" in table and "gap 8" in table
