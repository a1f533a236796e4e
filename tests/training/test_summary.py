"""Progress during a run, and the summary after it: table, picture, and where its results belong."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gasp_fast.cli import main as gasp_fast
from gasp_fast.drawing import save_figure
from gasp_fast.run_folder import CONFIG, FIGURE, LOG, checkpoint_folders, result_folder
from gasp_fast.training import log
from gasp_fast.training.curves import RunLog, draw_curves
from gasp_fast.training.gasp import COUNTS, terms
from gasp_fast.training.log import Meter, Progress
from gasp_fast.training.summary import as_table, summarise


@pytest.fixture(autouse=True)
def figure_of_a_run():
    """Is drawn here."""


def record(step, lm=None, corr=None, depth=None, pck=()):
    layers = len(pck)
    return {
        "step": step, "loss": 1.0, "lm": lm, "corr": corr, "depth": depth, "corr_per_layer": [corr] * layers,
        "depth_per_layer": [depth] * layers, "pck_per_layer": list(pck), "lr": 1e-3, "grad_norm": 1.5,
        "tokens_per_s": 1000.0, "mfu": 0.1, "peak_memory": 1, "data_wait": 0.25, "device_wait": None, "skipped": {},
        "useful_share": 0.97,
    }  # fmt: skip


GEOMETRIC = [
    record(n, lm=None if n % 3 else 5 / n, corr=8 / n, depth=1 / n, pck=[n / 40, n / 40 + 0.1]) for n in range(1, 31)
]


def words(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_table_compares_the_first_tenth_with_the_last():
    rows = {" ".join(row[:-2]): row[-2:] for row in words(as_table(GEOMETRIC))[1:]}
    corr = [8 / n for n in range(1, 31)]
    assert rows["correspondence loss"] == [f"{np.mean(corr[:3]):.3f}", f"{np.mean(corr[-3:]):.3f}"]
    assert rows["language loss"] == [f"{5 / 3:.3f}", f"{5 / 30:.3f}"]  # steps without an answer are left out
    assert rows["PCK@2, head 2 of 2"] == ["0.150", "0.825"]
    assert rows["PCK@2, mean of layers"] == ["0.100", "0.775"]
    assert rows["waiting for data"] == ["25.0%", "25.0%"] and "host waiting for the GPU" not in rows


def test_a_run_without_geometry_has_neither_its_rows_nor_its_panels():
    plain = [record(n, lm=5 / n) for n in range(1, 5)]
    assert [row[0] for row in words(as_table(plain))] == ["over", "language", "tokens", "waiting"]
    without, with_heads = (
        [axis.get_title() for axis in draw_curves({"run": RunLog(records, [])}).axes] for records in (plain, GEOMETRIC)
    )
    assert without == ["Language loss", "Learning rate", "Norm of the gradient, before clipping", ""]
    assert {"Correspondence loss", "Depth loss", "PCK@2 on training batches"} <= set(with_heads)


def test_curves_of_several_runs_lie_over_each_other_and_share_a_legend():
    """Losses, learning rate and PCK on held-out scenes, each run in its own colour."""
    evaluations = [{"step": n, "held_out": {"pck": 0.1, "peak": n / 30, "moved": 0.2, "rho": None}} for n in (10, 20)]
    slower = [{**one, "corr": 2 * one["corr"], "lr": 5e-4} for one in GEOMETRIC[:20]]
    figure = draw_curves({"a": RunLog(GEOMETRIC, evaluations), "b": RunLog(slower, []), "c": RunLog(GEOMETRIC[:1], [])})
    panels = {axis.get_title(): axis for axis in figure.axes}
    colours = [line.get_color() for line in figure.legends[0].get_lines()]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"] and len(set(colours)) == 3
    rates = {line.get_color(): line.get_ydata().tolist() for line in panels["Learning rate"].lines}
    assert [rates[colour] for colour in colours] == [[1e-3] * 30, [5e-4] * 20, [1e-3]]
    raw = {line.get_color(): line.get_ydata()[:3].tolist() for line in panels["Correspondence loss"].lines[::2]}
    assert raw[colours[1]] == [16.0, 8.0, 16 / 3]
    held_out = panels["On held-out scenes"].lines
    assert held_out[0].get_ydata().tolist() == [10 / 30, 20 / 30] and held_out[0].get_color() == colours[0]


@pytest.mark.parametrize("records", [GEOMETRIC[:1], [record(1, lm=None, corr=None, depth=None, pck=[None, None])]])
def test_a_run_of_one_step_or_without_matches_is_summarised_too(tmp_path, records):
    (tmp_path / LOG).write_text("".join(json.dumps(one) + "\n" for one in records))
    console = Console(file=io.StringIO(), width=200)
    summarise(tmp_path, console, True, "gasp-fast export {model}")
    assert (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert f"gasp-fast export {tmp_path}" in console.file.getvalue()


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    whole = [json.dumps(one) for one in GEOMETRIC[:4]]
    odd = [{**GEOMETRIC[4], "lm": "x"}, {**GEOMETRIC[5], "pck_per_layer": 3}, {"step": None}, [], 3]
    damaged = [*map(json.dumps, odd), whole[3][:40], "[" * 20_000, "\x00"]
    (tmp_path / LOG).write_bytes("\n".join([*whole[:2], *damaged, *whole[2:]]).encode() + b"\n\xff\xfe\n")
    console = Console(file=io.StringIO(), width=200)
    summarise(tmp_path, console, True, "gasp-fast export {model}")
    assert "over 4 steps" in console.file.getvalue()
    log.LogFile(tmp_path, 3).write(GEOMETRIC[3])
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [line for line in lines if line in whole] == whole  # unchanged


def test_without_a_terminal_a_line_is_printed_every_half_minute(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=40)
    bar = Progress(30, 0, True, console)
    for step, one in enumerate(GEOMETRIC, 1):
        bar.update(step, one)
        clock[0] += 7.0
    bar.stop()
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1/30", "6/30", "11/30", "16/30", "21/30", "26/30", "30/30"]
    assert "corr 8.00" in lines[0] and "1.0k tok/s" in lines[0] and lines[0].endswith("waits for data 25%")


def test_a_line_of_progress_fits_80_columns_and_what_is_unusual_follows():
    """On a GPU, far into a long run of several processes; the terminal may be no wider."""
    usual = {
        **record(123456, 12.345, 12.345, 0.123, [0.987]),
        "tokens_per_s": 123456.0,
        "data_wait": 0.01,
        "mfu": 0.456,
    }
    for speed, one in (("123.5k tok/s", usual), ("mfu 46%", {**usual, "device_wait": 0.5})):
        console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
        bar = Progress(300_000, 0, True, console)
        bar.update(123_456, one)
        bar.stop()
        shown = re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue()).replace("\r", "\n").splitlines()
        line = next(line for line in reversed(shown) if "123456/300000" in line)
        assert line.rstrip().endswith(speed) and len(line.rstrip()) <= 80
    unusual = {**usual, "useful_share": 0.6, "data_wait": 0.3, "skipped": {"video": 2}}
    assert log.in_words(unusual).endswith("tok/s waits for data 30% useful 60% skipped 2 videos")


def test_without_progress_nothing_is_printed():
    console = Console(file=io.StringIO())
    bar = Progress(30, 0, False, console)
    bar.update(1, GEOMETRIC[0])
    bar.stop()
    assert console.file.getvalue() == ""


def test_results_of_a_run_are_written_into_its_folder(tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".checkpoint-11.partial"):
        (run / name).mkdir(parents=True)
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-9", "checkpoint-10"]
    for other in (run, "Qwen/Qwen2.5-VL-7B-Instruct"):
        with pytest.raises(ValueError, match=r"no run of gasp_fast\.train"):
            result_folder(other, "report")
    (run / CONFIG).touch()
    (run / LOG).touch()
    assert result_folder(run, "report") == result_folder(run / "checkpoint-9", "report") == run / "report"
    assert gasp_fast(["evaluate", "--model", str(tmp_path), "--scenes", str(tmp_path)]) == 1
    assert "no run of gasp_fast.train that could hold the report; give --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize("count", [10, 17, 18], ids=["without sums of the host", "without cosines", "of this version"])
def test_sums_that_are_not_logged_yet_pass_to_any_number_of_processes(count):
    """Of one layer. Earlier versions had no cosine, at place 10; it is undefined in a line with such steps."""
    saved = [[float(n) for n in range(count + 1)], [10.0 * n for n in range(count + 1)]]  # two processes; seconds last
    found = []
    for rank, world_size in ((0, 2), (1, 2), (0, 1), (0, 3), (1, 3)):
        meter = Meter(COUNTS, terms(1), torch.device("cpu"))
        meter.restore(saved, rank, world_size)
        found.append(meter.state()[0][:-1])
    both = [11.0 * n for n in range(count)]
    expected = [saved[0][:-1], saved[1][:-1], both, both, [0.0] * count]
    if count < 18:
        added = [pytest.approx(math.nan, nan_ok=True)] * 4 + [0.0]
        expected = [
            [*sums[:10], cosine, *sums[10:], *[0.0] * (17 - count)]
            for sums, cosine in zip(expected, added, strict=True)
        ]
    assert found == expected


def test_a_picture_that_is_not_finished_replaces_nothing(tmp_path, monkeypatch):
    figure = draw_curves({"run": RunLog(GEOMETRIC, [])})
    path = save_figure(figure, tmp_path / "training.png")
    before = path.read_bytes()

    def dies(self, target, **options):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", dies)
    with pytest.raises(KeyboardInterrupt):
        save_figure(figure, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_command_draws_several_runs_into_one_file(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOG).write_text("".join(json.dumps(one) + "\n" for one in GEOMETRIC))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    for name, start in (("c.png", b"\x89PNG"), ("new/c.svg", b"<?xml")):
        assert gasp_fast(["curves", *runs, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert gasp_fast(["curves", *runs, "--out", str(tmp_path / "c.txt")]) == 1
    assert "ending is one of .png, .svg, .pdf" in capsys.readouterr().err
    assert gasp_fast(["curves", str(tmp_path), "--out", str(tmp_path / "d.png")]) == 1
    assert "log.jsonl has no steps" in capsys.readouterr().err
    assert gasp_fast(["curves", runs[0], runs[0], "--out", str(tmp_path / "d.png")]) == 1
    assert "name them with --names" in capsys.readouterr().err
