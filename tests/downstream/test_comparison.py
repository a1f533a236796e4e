"""Several results side by side: changes, means, PCK of the runs, and the Pareto front."""

import json

import pytest

from gasp_fast.cli import main
from gasp_fast.downstream.comparison import find_results, pareto_front, read_models


def results(folder, vsi, blink, base=0.3, pck=None, **changed):
    """A run with results: the scores of two categories of VSI-Bench, and of BLINK."""
    rows = []
    for key, title, found in (("vsibench", "VSI-Bench", vsi), ("blink", "BLINK", blink)):
        row = {
            "key": key,
            "title": title,
            "questions": 10,
            "of": 10,
            "frames": 32,
            "pixels": 1,
            "notes": [],
            "tasks": [],
        }
        row["model"] = {"score": found[0], "categories": {str(n): one for n, one in enumerate(found)}}
        if base is not None:
            row["difference"] = {"mean": found[0] - base, "low": 0, "high": 0, "p": 1, "questions": 10}
        rows.append({**row, **changed})
    (folder / "benchmarks").mkdir(parents=True)
    content = {"model": "m", "lmms_eval": "0.7.3", "limit": None, "benchmarks": rows, "left_out": []}
    (folder / "benchmarks" / "results.json").write_text(json.dumps(content))
    if pck is not None:
        (folder / "report").mkdir()
        features = {"head": {"pck": {"per_layer": [pck], "peak": pck}}}
        report = {"model": "m", "features": "head", "by_features": features}
        (folder / "report" / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def runs(tmp_path):
    results(tmp_path / "all", [0.4, 0.6], [0.7], pck=0.6)
    results(tmp_path / "low", [0.2, 0.4], [0.5], pck=0.7)
    results(tmp_path / "worse", [0.2, 0.4], [0.4], pck=0.7)  # as near as "low"
    results(tmp_path / "unmeasured", [0.9, 0.9], [0.9], base=None)
    return tmp_path


def test_means_are_of_categories_changes_of_scores_and_pck_of_the_run(runs):
    models = {one.name: one for one in read_models(find_results([runs]))}
    assert list(models) == ["all", "low", "unmeasured", "worse"]
    one = models["all"]
    assert one.means == pytest.approx({"VSI-Bench": 0.5, "BLINK": 0.7}) and one.mean == pytest.approx(0.6)
    assert one.changes == pytest.approx({"VSI-Bench": 0.1, "BLINK": 0.4}) and one.pck == 0.6
    assert models["unmeasured"].changes == {} and models["unmeasured"].pck is None


def test_a_model_is_on_the_front_unless_another_is_better(runs):
    assert pareto_front(read_models(find_results([runs]))) == ["all", "low"]


def test_the_command_writes_page_figures_and_numbers(runs, capsys):
    assert (
        main(
            ["compare-benchmarks", *map(str, (runs / "all", runs / "low")), "--names", "a,b", "--out", str(runs / "o")]
        )
        == 0
    )
    printed, page = capsys.readouterr().out, (runs / "o" / "index.html").read_text()
    lines = [line.split() for line in printed.splitlines()]
    for line in (["a", "b"], ["BLINK", "+40.0", "+20.0"], ["PCK", "0.600", "0.700"], ["BLINK", "70.0", "50.0"]):
        assert line in lines  # a row for each benchmark: there are too many for columns
    assert page.count("<svg") == 2 and "−" not in page.split("<svg")[0]
    assert "<td>a</td><td>+10.0</td><td>+40.0</td>" in page
    assert "<td>b</td><td>0.700</td><td>30.0</td><td>50.0</td><td>40.0</td><td>yes</td>" in page
    assert json.loads((runs / "o" / "comparison.json").read_text())["pareto_front"] == ["a", "b"]
    assert (runs / "o" / "gap.png").is_file() and (runs / "o" / "pareto.png").is_file()


def test_results_that_were_not_measured_alike_are_refused(runs, tmp_path):
    other = results(tmp_path / "other", [0.2, 0.4], [0.5], frames=8)
    with pytest.raises(ValueError, match="VSI-Bench has frames = 8, but 32 in "):
        read_models(find_results([runs / "all", other]))
    with pytest.raises(ValueError, match="--names: give 2 different names"):
        read_models(find_results([runs / "all", runs / "low"]), ["one"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"empty: no results\.json here"):
        find_results([tmp_path / "empty"])
