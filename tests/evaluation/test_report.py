"""Reports, comparisons and pictures are complete and self-contained; errors are one line."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gasp_fast.cli import compare as compare_command
from gasp_fast.cli import evaluate as evaluate_command
from gasp_fast.data.synthetic.scenes import SyntheticConfig, render_scenes
from gasp_fast.evaluation.figures import PALE, draw_figure
from gasp_fast.evaluation.pointing_page import read_pointing
from gasp_fast.evaluation.report import read_report, write_comparison, write_report
from gasp_fast.supervision.head_files import write_heads

KEYS = {"model", "sequences", "frames", "grid", "features", "pck", "pck_moved", "identity", "rho", "temporal"}


def run(command, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*words]))


def evaluated(model: Path, scenes: Path, out: Path, *more: str) -> Path:
    words = ["--sequences", "4", "--frames", "4", "--grid", "5", "--max-gap", "8", "--features", "head,qk"]
    assert run(evaluate_command, "--model", str(model), "--scenes", str(scenes), "--out", str(out), *words, *more) == 0
    return out


@pytest.fixture(scope="module")
def reports(model_folders, library, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("reports")
    return [
        evaluated(model_folders["qwen-gqa"], library, root / "first", "--pictures", "2"),
        evaluated(model_folders["qwen-mha"], library, root / "second", "--pictures", "0"),
    ]


def test_the_report_has_all_documented_keys(reports):
    report = json.loads((reports[0] / "report.json").read_text())
    assert report.keys() >= KEYS
    assert report["pck"].keys() >= {"per_layer", "mean", "peak", "peak_layer"}
    assert report["temporal"].keys() >= {"gaps", "pck", "normalized"}
    assert (
        len(report["pck"]["per_layer"]) == len(report["pck_moved"]["per_layer"]) == len(report["rho"]["per_layer"]) == 4
    )
    assert report["pck"]["peak"] == max(report["pck"]["per_layer"])
    assert report["pck"]["per_layer"][report["pck"]["peak_layer"] - 1] == report["pck"]["peak"]
    assert report["pck"]["mean"] == pytest.approx(np.mean(report["pck"]["per_layer"]))
    assert report["temporal"]["gaps"] == list(range(1, 9))
    assert isinstance(report["identity"], float) and report["features"] == "head" and report["heads"] == "initial"


def test_the_page_contains_all_it_shows_and_forbids_the_network(reports):
    page = (reports[0] / "index.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?(?!data:|report\.json|#)[\w./:]""", text)
    assert "http:" not in page and "https:" not in page
    assert page.count("<svg") == page.count("</svg>") == 2  # a figure for each kind of features
    assert re.findall(r"<text[^>]*>PCK@2 by layer</text>|PCK@2 by layer", page)


def test_figures_are_also_png_files_and_no_partial_files_remain(reports):
    for name in ("figure-head.png", "figure-qk.png"):
        with Image.open(reports[0] / name) as image:
            assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 20
    assert not list(reports[0].glob("**/.*partial*"))


def test_what_the_data_say_cannot_become_html(reports, tmp_path):
    """Names of models and scenes with markup, in the page and in the data of its script."""
    evil = "</script><img src=x onerror=alert(1)>&{{data}}"
    report, pointing = read_report(reports[0]), read_pointing(reports[0])
    for sequence in pointing["sequences"]:
        sequence["scene"] = evil
    page = write_report({**report, "model": evil}, tmp_path, pointing).read_text()
    assert "<img src=x" not in page and "</script><img" not in page
    assert page.count("<script") == page.count("</script>") == 2
    (data,) = re.findall(r'<script type="application/json" id="pointing-data">(.*?)</script>', page)
    assert json.loads(data)["sequences"][0]["scene"] == json.loads(data)["models"][0]["name"] == evil


def test_reports_are_compared_in_one_figure_per_shared_kind(reports, tmp_path, capsys):
    assert run(compare_command, *map(str, reports), "--out", str(tmp_path), "--names", "before,after") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare-head.png",
        "compare-qk.png",
        "compare.json",
        "index.html",
    }
    assert "before" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["reports"].keys() == {"before", "after"}


def test_compared_models_share_axes_and_differ_by_colour_and_marker(reports):
    first, second = map(read_report, reports)
    figure = draw_figure({"a": first, "b": second}, "head")
    by_layer, rho, by_gap, relative = figure.axes
    lines = {line.get_label().split(" (")[0]: line for line in by_layer.lines}
    assert lines["a"].get_color() != lines["b"].get_color() and lines["a"].get_marker() != lines["b"].get_marker()
    assert lines["a"].get_ydata().tolist() == first["by_features"]["head"]["pck"]["per_layer"]
    assert by_layer.get_ylim() == by_gap.get_ylim() == (0, 1)
    assert any(list(line.get_ydata()) == [round(first["identity"], 6)] * 2 for line in by_layer.lines)
    assert len(by_layer.collections) == 2  # a shaded deviation for each model
    assert relative.get_ylim()[0] == 0 and rho.get_ylim()[1] == 1
    assert len(figure.legends) == 1 and not any(axis.get_legend() for axis in figure.axes)


def test_a_flat_relative_curve_of_a_model_that_finds_nothing_is_pale_beside_its_pck(reports):
    """Relative to gap 1 it would look best; beside it is its PCK by gap."""
    metrics = read_report(reports[0])["by_features"]["head"]
    gaps = metrics["temporal"]["gaps"]
    flat = {"pck": [0.1] * len(gaps), "pck_std": [0.0] * len(gaps), "normalized": [1.0] * len(gaps)}
    falling = {"pck": [0.9, *[0.5] * (len(gaps) - 1)], "normalized": [1.0, *[0.5 / 0.9] * (len(gaps) - 1)]}
    reports = {}
    for name, values in (("untrained", flat), ("trained", {**flat, **falling})):
        temporal = {**metrics["temporal"], **values, "identity": [0.6] * len(gaps)}
        report = read_report_like(metrics | {"temporal": temporal})
        reports[name] = report
    by_gap, relative = draw_figure(reports, "head").axes[2:]
    assert [line.get_alpha() for line in relative.lines[:2]] == [PALE, 1.0]
    assert by_gap.lines[0].get_ydata().tolist() == flat["pck"] and by_gap.lines[0].get_alpha() == 1.0


def read_report_like(metrics: dict[str, Any]) -> dict[str, Any]:
    return {"sequences": 4, "settings": {"radius": 2.0}, "by_features": {"head": metrics}}


def test_a_report_of_a_run_links_to_it_and_a_comparison_shows_its_curves(reports, tmp_path):
    """Relative links to files that exist; training curves of the runs that reports name."""
    record = {"lm": 1.0, "corr": 2.0, "depth": None, "grad_norm": 1.0, "tokens_per_s": 1.0, "lr": 1e-3}
    outs = []
    for name in ("a & b", "c"):
        folder = tmp_path / "runs" / name
        (folder / "report").mkdir(parents=True)
        lines = [json.dumps({"step": step, "pck_per_layer": [0.5], **record}) for step in range(1, 5)]
        (folder / "log.jsonl").write_text("\n".join(lines))
        outs.append(folder)
        related = [("log", folder / "log.jsonl"), ("training curves", folder / "training.png")]  # without the picture
        page = write_report({**read_report(reports[0]), "run": ".."}, folder / "report", None, related).read_text()
        assert re.findall(r'<a href="([^"]*)"', page) == ["../log.jsonl", "report.json"]
    assert run(compare_command, *map(str, outs), "--names", "a,b", "--out", str(tmp_path / "out")) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    links = re.findall(r'<a href="([^"]*)"', page)
    assert links == ["../runs/a%20%26%20b/report/index.html", "../runs/c/report/index.html"]
    assert "Learning rate" in page and page.count("<svg") == 3 and (tmp_path / "out" / "training.png").is_file()


def compared_names(out: Path) -> list[str]:
    return list(json.loads((out / "compare.json").read_text())["reports"])


def test_reports_are_named_after_their_models(reports, tmp_path):
    assert run(compare_command, *map(str, reports), "--out", str(tmp_path)) == 0
    assert compared_names(tmp_path) == ["qwen-gqa", "qwen-mha"]


def test_two_reports_of_one_model_are_named_after_their_folders(reports, tmp_path):
    again = shutil.copytree(reports[0], tmp_path / "again")
    assert run(compare_command, str(reports[0]), str(again / "report.json"), "--out", str(tmp_path / "out")) == 0
    assert compared_names(tmp_path / "out") == ["first", "again"]


def test_names_that_do_not_fit_the_reports_are_refused(reports, tmp_path):
    words = [*map(str, reports), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="1 names for 2 reports"):
        run(compare_command, *words, "--names", "only-one")
    with pytest.raises(ValueError, match="two reports have the same name"):
        run(compare_command, *words, "--names", "same,same")


def test_a_comparison_of_different_evaluation_sets_warns(reports, tmp_path):
    first, second = map(read_report, reports)
    second = {**second, "frames": 6}
    warnings = write_comparison({"a": first, "b": second}, tmp_path).warnings
    assert len(warnings) == 1 and "different frames" in warnings[0]
    only_qk = {**second, "by_features": {"hidden": second["by_features"]["qk"]}}
    with pytest.raises(ValueError, match="share no kind of features"):
        write_comparison({"a": first, "b": only_qk}, tmp_path)


def test_reports_are_compared_by_the_features_that_all_have(reports, tmp_path, capsys):
    """An untrained model has no heads."""
    before = read_report(reports[0])
    del before["by_features"]["head"]
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "report.json").write_text(json.dumps({**before, "features": "qk"}))
    words = [str(tmp_path / "before"), str(reports[1]), "--names", "before,full", "--out", str(tmp_path / "out")]
    assert run(compare_command, *words) == 0
    line = "compared by qk, left out: head, which only full measured"
    assert line in capsys.readouterr().out.splitlines() and line in (tmp_path / "out" / "index.html").read_text()
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compared["kinds"] == ["qk"] and {one["features"] for one in compared["differences"]} == {"qk"}
    assert [path.name for path in (tmp_path / "out").glob("compare-*.png")] == ["compare-qk.png"]


def test_a_folder_or_file_without_a_report_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"no report\.json here"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not a report of gasp-fast evaluate"):
        read_report(tmp_path)


@pytest.mark.parametrize("text", ["[" * 50_000, "1" * 5000, "[]", '{"model": 3}', "\x00"])
def test_a_damaged_report_is_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "report.json")) as caught:
        run(compare_command, str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out"))
    assert one_line(caught.value) and len(str(caught.value)) < 600


def test_a_report_without_the_numbers_of_a_figure_is_not_compared(reports, tmp_path):
    report = read_report(reports[0])
    report["by_features"]["qk"]["rho"]["per_layer"][1] = "x"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"not a report of gasp-fast evaluate \(rho.per_layer is damaged\)"):
        run(compare_command, str(reports[1]), str(tmp_path), "--out", str(tmp_path / "out"))


def test_models_with_other_token_grids_are_compared_with_a_warning(model_folders, tmp_path):
    """LLaVA crops frames to a square and has other tokens."""
    wide = tmp_path / "wide"
    list(render_scenes(wide, 2, config=SyntheticConfig(frames=10, width=144, height=96), workers=1))
    outs = [evaluated(model_folders[name], wide, tmp_path / name) for name in ("qwen-gqa", "llava")]
    assert run(compare_command, *map(str, outs), "--out", str(tmp_path / "out")) == 0
    assert "different token grids" in (tmp_path / "out" / "index.html").read_text()


def test_a_comparison_has_paired_differences_from_its_first_report(reports, tmp_path, capsys):
    assert run(compare_command, *map(str, reports), "--out", str(tmp_path)) == 0
    differences = json.loads((tmp_path / "compare.json").read_text())["differences"]
    first, second = map(read_report, reports)
    found = {(one["features"], one["metric"]): one for one in differences}
    assert found.keys() == {(kind, metric) for kind in ("head", "qk") for metric in ("best_layer", "mean", "moved")}
    for kind in ("head", "qk"):
        for metric, key in (("best_layer", "peak"), ("mean", "mean")):
            one = found[kind, metric]
            expected = second["by_features"][kind]["pck"][key] - first["by_features"][kind]["pck"][key]
            assert one["difference"] == pytest.approx(expected) and one["low"] <= expected <= one["high"]
            assert (one["first"], one["second"], one["sequences"]) == ("qwen-gqa", "qwen-mha", 4)
    printed, page = capsys.readouterr().out, (tmp_path / "index.html").read_text()
    assert "95 % interval" in printed and "Differences on the same sequences" in page


def as_earlier(report: dict[str, Any]) -> dict[str, Any]:
    """The same report as the first version wrote it."""
    new = ("most_frequent", "delta_avg", "per_sequence", "pck_groups")
    report = {name: value for name, value in report.items() if name not in (*new, "token_grids", "evaluated")}
    report["settings"] = {k: v for k, v in report["settings"].items() if k in ("max_gap", "keep", "held_out", "seed")}
    report["by_features"] = {
        kind: {name: value for name, value in metrics.items() if name not in new}
        for kind, metrics in report["by_features"].items()
    }
    for metrics in report["by_features"].values():
        for name in ("pck", "pck_moved"):
            metrics[name] = {k: v for k, v in metrics[name].items() if k not in ("chance", "constant")}
    return report


def test_reports_of_the_first_version_are_compared_without_what_they_lack(reports, tmp_path, capsys):
    earlier = as_earlier(read_report(reports[0]))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "report.json").write_text(json.dumps(earlier))
    words = [str(tmp_path / "earlier"), str(reports[0]), "--names", "earlier,now", "--out", str(tmp_path / "out")]
    assert run(compare_command, *words) == 0
    printed = capsys.readouterr().out
    assert "–" in printed and "not strictly comparable" not in printed
    assert "Without features to point at: earlier; run gasp-fast" in (tmp_path / "out" / "index.html").read_text()
    assert printed.replace("\n", " ").count("a report of an earlier version does not name its sequences") == 1


def test_reports_with_other_radii_are_not_compared(model_folders, library, reports, tmp_path):
    other = evaluated(model_folders["qwen-gqa"], library, tmp_path / "other", "--pictures", "0", "--radius", "1.5")
    page = (other / "index.html").read_text()
    assert "PCK@1.5" in page and "PCK@2" not in page
    with pytest.raises(ValueError, match=r"different radii \(a: 2, b: 1.5\)") as caught:
        run(compare_command, str(reports[0]), str(other), "--names", "a,b", "--out", str(tmp_path / "out"))
    assert one_line(caught.value) and not (tmp_path / "out").exists()


def test_the_page_shows_the_token_grid_and_every_head_group(reports):
    page = (reports[0] / "index.html").read_text()
    assert "Tokens of a frame: 7 × 7 (rows × columns)." in page
    groups = read_report(reports[0])["by_features"]["qk"]["pck_groups"]
    table = page[page.index("by head group") :]
    for layer, row in enumerate(groups["per_layer"]):
        cells = "".join(f"<td>{value:.3f}</td>" for value in (groups["mean_per_layer"][layer], *row))
        assert len(row) == 2 and f"{cells}</tr>" in table


def test_both_directions_have_their_own_row_and_figure(model_folders, library, tmp_path, capsys):
    options = ("--direction", "both", "--confidence", "attention")
    out = evaluated(model_folders["llava"], library, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("head ", "head-causal", "qk ", "qk-causal"))
    figures = {path.name for path in out.glob("figure-*.png")}
    assert figures == {"figure-head.png", "figure-head-causal.png", "figure-qk.png", "figure-qk-causal.png"}
    assert "the probability that attention gives to the prediction" in (out / "index.html").read_text()
    assert all(set(one["features"]) == {"head", "qk"} for one in read_pointing(out)["sequences"])


def test_a_causal_evaluation_has_nothing_to_point_at_and_says_so(model_folders, library, tmp_path, capsys):
    out = evaluated(model_folders["llava"], library, tmp_path / "out", "--direction", "causal")
    assert "it shows the forward direction; take --direction both" in " ".join(capsys.readouterr().out.split())
    assert read_pointing(out) is None and read_report(out, whole=True)["features"] == "head-causal"
    assert run(compare_command, str(out), str(out), "--names", "a,b", "--out", str(tmp_path / "compared")) == 0
    assert "Without features to point at: a, b" in (tmp_path / "compared" / "index.html").read_text()


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


def test_a_folder_without_a_supported_model_is_a_one_line_error(library, tmp_path):
    (tmp_path / "model").mkdir()
    words = ["--scenes", str(library), "--out", str(tmp_path / "out"), "--frames", "4"]
    with pytest.raises(OSError, match="holds no model, adapter or run") as missing:
        run(evaluate_command, "--model", str(tmp_path / "model"), *words)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"'bert'; supported types are .*qwen2_5_vl") as unsupported:
        run(evaluate_command, "--model", str(tmp_path / "model"), *words)
    assert one_line(missing.value) and one_line(unsupported.value)


def test_too_short_scenes_are_a_one_line_error(model_folders, library, tmp_path):
    words = ["--model", str(model_folders["qwen-gqa"]), "--out", str(tmp_path), "--scenes", str(library)]
    with pytest.raises(ValueError, match="longest scene has 16 frames, but frames = 20; lower frames to 16") as error:
        run(evaluate_command, *words, "--frames", "20")
    assert one_line(error.value)
    with pytest.raises(ValueError, match="max_gap = 5: 8 frames need gaps up to 7") as error:
        run(evaluate_command, *words, "--frames", "8", "--max-gap", "5")
    assert one_line(error.value)


def test_scenes_without_a_valid_track_are_a_one_line_error(model_folders, tmp_path):
    (scene,) = render_scenes(tmp_path / "scenes", 1, config=SyntheticConfig(frames=6, width=112, height=112), workers=1)
    for path in (scene / "depth").glob("*.png"):  # no pixel has a known depth
        Image.fromarray(np.zeros((112, 112), np.uint16)).save(path)
    words = ["--scenes", str(tmp_path / "scenes"), "--out", str(tmp_path / "out"), "--frames", "4", "--sequences", "2"]
    with pytest.raises(
        ValueError, match="in none of 2 sequences a query point is visible in a second frame; check the scenes"
    ) as error:
        run(evaluate_command, "--model", str(model_folders["qwen-gqa"]), *words)
    assert one_line(error.value)


def test_what_cannot_be_read_is_named_in_the_output_and_on_the_page(model_folders, library, tmp_path, capsys):
    scenes = shutil.copytree(library, tmp_path / "scenes")
    first, second, _ = sorted(path for path in scenes.iterdir() if path.is_dir())
    (first / "meta.json").write_text("{")
    for path in (second / "depth").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    out = evaluated(model_folders["qwen-gqa"], scenes, tmp_path / "out", "--pictures", "3")
    printed, page = capsys.readouterr().out, (out / "index.html").read_text()
    for text in (printed, page):
        assert "unreadable scenes: 1, unreadable sequences: 2" in text
        assert f"scene {first.name} cannot be used" in text and f"of scene {second.name} cannot be read" in text
    assert {one["scene"] for one in read_pointing(out)["sequences"]}.isdisjoint({first.name, second.name})
    again = evaluated(model_folders["qwen-gqa"], library, tmp_path / "sound", "--pictures", "0")
    reports = {"a": read_report(again), "b": read_report(out)}
    warnings = write_comparison(reports, tmp_path / "compared").warnings
    assert any("different unreadable sequences" in warning for warning in warnings)


def test_reports_on_other_scenes_of_the_same_names_are_not_paired(reports, tmp_path):
    first = read_report(reports[0], whole=True)
    other = {**first, "scene_digests": dict.fromkeys(first["scene_digests"], "0" * 20)}
    warnings = write_comparison({"a": first, "b": other}, tmp_path).warnings
    assert any("different scene contents" in warning for warning in warnings)
    assert any("other frames, poses or cameras" in warning for warning in warnings)
    assert not write_comparison({"a": first, "b": dict(first)}, tmp_path).warnings


def test_a_page_with_a_layer_of_nan_has_the_other_layers_to_point_at(model_folders, models, library, tmp_path, capsys):
    folder = shutil.copytree(model_folders["qwen-gqa"], tmp_path / "model")
    tensors = {name: value.clone() for name, value in models["qwen-gqa"].heads.state_dict().items()}
    tensors["by_layer.3.first.weight"][:] = torch.nan
    write_heads(folder / "heads.safetensors", tensors, "fp32")
    out = evaluated(folder, library, tmp_path / "out", "--pictures", "2")
    assert "head: the features of layers 4 are NaN or infinite" in capsys.readouterr().out
    for sequence in read_pointing(out)["sequences"]:
        assert {kind: list(layers) for kind, layers in sequence["features"].items()} == {
            "head": ["1", "2", "3"],
            "qk": ["1", "2", "3", "4"],
        }
    assert read_report(out)["pck"]["per_layer"][3] is None


def test_unknown_features_are_refused(model_folders, library, tmp_path):
    words = ["--model", str(model_folders["qwen-gqa"]), "--scenes", str(library), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="features = 'values' is unknown; choose among head, qk, hidden"):
        run(evaluate_command, *words, "--features", "values", "--frames", "4")
