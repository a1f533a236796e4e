"""From the command to the tables: tiny data, tiny models of both backbones, the real lmms-eval, and no network.

One model answers "B" to every question, its base "A", so all scores are known beforehand.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gasp_fast.cli import main
from gasp_fast.downstream.answers import LOG

ROOT = Path(__file__).parents[2]
VSI = 6 / 8 - 2 / 8  # four of eight categories have choices, of which B is right; "B" is no number
# The score of "A", of "B", and the number of questions. All-Angles: C is right. TempCompass: "B" is no yes or no.
EXPECTED = {
    "all_angles": (0, 0, 2), "vsibench": (0, VSI, 20), "cv_bench": (0, 1, 6), "videomme": (0, 0, 2),
    "tempcompass": (0, 4 / 6, 6), "nextqa": (0, 0, 2), "mmsi": (0, 0, 2), "mindcube": (0, 1, 2),
    "viewspatial": (1, 0, 2), "site_image": (-(1 / 2 + 1 / 4) / (1 / 2 + 3 / 4), 1, 2), "site_video": (-1, 1, 2),
    "3dsr": (1, 0, 2), "embspatial": (0, 0, 2), "crosspoint": (1 / 2, 0, 2), "blink_correspondence": (1, 0, 6),
    "vsibench_prior": (0, VSI, 20),
}  # fmt: skip


def command(environment, data, answering, family, out):
    words = ["benchmark", "--model", answering(family, "B"), "--base", answering(family, "A"), "--data", data]
    words += ["--out", out, "--environment", environment, "--frames", "4", "--pixels", "12544"]
    suite = ",".join(key for key in EXPECTED)
    return [str(word) for word in [*words, "--suite", suite]]


def kill_after_first_answers(words, out):
    """Start the command and kill it as soon as a task is answered. Returns the files it leaves, with their times."""
    code = "import sys; from gasp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not list((out / "answers" / "base").glob("*.json")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # lmms-eval's process ends with its parent
    return {path: path.stat().st_mtime_ns for path in (out / "answers").glob("*/*.json")}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_next_video"])
def run(request, environment, data, answering, tmp_path_factory):
    """A finished run: its folder, what was printed, and the model. That of Qwen is killed once, and started again."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of lmms-eval's process: more threads are slower for such models
    out = tmp_path_factory.mktemp(request.param) / "out"
    words = command(environment, data, answering, request.param, out)
    answered = kill_after_first_answers(words, out) if request.param == "qwen2_5_vl" else {}
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(words)
    assert code == 0, errors.getvalue()[-2000:]
    return out, printed.getvalue(), answered, request.param


@pytest.mark.slow
def test_scores_and_differences_are_those_computed_by_hand(run):
    content = json.loads((run[0] / "results.json").read_text())
    rows = {row["key"]: row for row in content["benchmarks"]}
    found = {key: (row["base"]["score"], row["model"]["score"], row["questions"]) for key, row in rows.items()}
    assert found.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        assert found[key] == pytest.approx(expected, abs=1e-9), key
        assert rows[key]["difference"]["mean"] == pytest.approx(expected[1] - expected[0]), key
    # Six answers, of which four differ by 1: Student's t of 5 degrees of freedom, 2.5706.
    spread = 2.570582 * (4 / 15) ** 0.5 / 6**0.5
    low, high = (rows["tempcompass"]["difference"][name] for name in ("low", "high"))
    assert (low, high) == pytest.approx((4 / 6 - spread, 4 / 6 + spread), abs=1e-5)
    assert rows["tempcompass"]["model"]["undecided"] == rows["tempcompass"]["base"]["undecided"] == 2
    assert rows["all_angles"]["of"] == 2132 and rows["all_angles"]["model"]["categories"].keys() == {
        "counting", "manipulation",
    }  # fmt: skip
    assert rows["vsibench"]["model"]["categories"]["object_rel_direction"] == 1


@pytest.mark.slow
def test_the_tables_have_every_benchmark_and_say_what_was_seen(run):
    out, printed, _, family = run
    markdown, page = (out / "tables.md").read_text(), (out / "index.html").read_text()
    assert "| VSI-Bench | 20 | 0.0 | 50.0 | +50.0 |" in markdown
    assert "| All-Angles Bench | 2 of 2,132 |" in markdown and "2 of 2,132" in page
    size = "at most 12,544 pixels" if family == "qwen2_5_vl" else "the processor's own size"
    assert (
        f"20 questions; 4 frames, {size}." in markdown and f"vsibench: vsibench_any_part; 4 frames, {size}" in printed
    )
    assert "Answers that no rule could read, which count as wrong: 2 of the base, 2 of the model." in markdown
    assert page.count("<h2>") == 2 + len(EXPECTED) and "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_a_task_that_looks_for_a_network_finds_none(run):
    """NExT-QA's module downloads word lists, which its multiple choice does not need."""
    assert "no network: raw.githubusercontent.com" in (run[0] / "answers" / LOG).read_text()


@pytest.mark.slow
def test_a_killed_run_continues_and_its_answers_stay(run):
    out, printed, answered, family = run
    files = list((out / "answers").glob("*/*.json"))
    assert (0 < len(answered) < len(files)) == (family == "qwen2_5_vl")
    assert printed.count("questions answered") == len(files) - len(answered)
    for path, written in answered.items():
        assert path.stat().st_mtime_ns == written
