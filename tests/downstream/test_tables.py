"""Tables of results made by hand."""

from io import StringIO

from rich.console import Console

from gasp_fast.downstream.paper import SCORES, published
from gasp_fast.downstream.suites import BENCHMARKS
from gasp_fast.downstream.tables import ABOUT_PAPER, bias_rows, by_category, label, markdown, overview, terminal_table


def row(key, title, **scores):
    found = {role: {"score": one[0], "categories": {"counting": one[1]}} for role, one in scores.items()}
    difference = {"mean": scores["model"][0] - scores["base"][0], "low": -0.01, "high": None, "p": 0.1, "questions": 5}
    about = {"questions": 5, "of": 9, "frames": None, "pixels": 784, "notes": ["As it is."], "tasks": [key]}
    return {"key": key, "title": title, "difference": {**difference, "high": 0.2}, **about, **found}


RESULTS = {
    "model": "/home/me/runs/full/export", "base": "/models/base", "lmms_eval": "0.7.3", "limit": 5,
    "left_out": ["blink: no data"],
    "benchmarks": [
        row("vsibench", "VSI-Bench", base=(0.301, 0.2), model=(0.4, 0.5)),
        row("vsibench_prior", "VSI-Bench with sizes", base=(0.35, 0.6), model=(0.4, 0.45)),
    ],
}  # fmt: skip


def test_numbers_are_percent_with_the_difference_and_its_interval():
    assert overview(RESULTS)[1] == ["VSI-Bench", "5 of 9", "30.1", "40.0", "+9.9", "-1.0 to +20.0"]
    assert by_category(RESULTS, RESULTS["benchmarks"][0]) == [
        ["", "score", "counting"], ["base", "30.1", "20.0"], ["model", "40.0", "50.0"], ["difference", "+9.9", "+30.0"],
    ]  # fmt: skip


def test_the_probe_of_bias_shows_each_model_with_and_without_the_prior():
    assert bias_rows(RESULTS) == [
        ["", "score", "counting"],
        ["base, without", "30.1", "20.0"], ["base, with sizes", "35.0", "60.0"], ["base, change", "+4.9", "+40.0"],
        ["model, without", "40.0", "50.0"], ["model, with sizes", "40.0", "45.0"], ["model, change", "+0.0", "-5.0"],
    ]  # fmt: skip
    assert bias_rows({**RESULTS, "benchmarks": RESULTS["benchmarks"][:1]}) == []


def test_a_table_says_what_is_missing_what_was_seen_and_that_a_trial_is_none():
    text = markdown(RESULTS)
    assert text.startswith("# Benchmarks: full/export\n\nblink: no data\n") and "Base: models/base." in text
    assert "Only the first 5 questions of each task: a trial, not a result." in text
    assert "5 of 9 questions; at most 784 pixels. As it is." in text


def test_what_is_known_of_the_paper_is_beside_the_difference():
    paper = {"": [60.6, 63.2], "counting": [33.8, 41.6]}
    known = {**RESULTS, "benchmarks": [{**RESULTS["benchmarks"][0], "paper": paper}, RESULTS["benchmarks"][1]]}
    assert [row[-1] for row in overview(known)] == ["paper (base)", "63.2 (60.6)", ""]
    assert by_category(known, known["benchmarks"][0])[-1] == ["paper (base)", "63.2 (60.6)", "41.6 (33.8)"]
    assert ABOUT_PAPER in markdown(known) and "paper" not in markdown(RESULTS)


def test_scores_of_the_paper_are_found_by_model_benchmark_and_part_of_the_category():
    names = ["counting", "camera_pose_estimation"]
    assert published("qwen2_5_vl", "all_angles", names) == {"camera_pose_estimation": [34.1, 52.8]}
    assert published("qwen2_5_vl", "nextqa", ["nextqa_mc_test"]) == {"": [76.6, 74.7]}
    assert published("llava_next_video", "blink", ["blink_multi_view_reasoning", "blink_counting"]) == {
        "blink_multi_view_reasoning": [42.1, 57.1]
    }
    assert published("llava_next_video", "vsibench", ["object_counting"])["object_counting"] == [23.5, 52.5]
    assert published("qwen2_5_vl", "cv_bench", ["3D"]) == published("qwen3_vl", "vsibench", ["object_counting"]) == {}
    assert {benchmark for known in SCORES.values() for benchmark in known} <= set(BENCHMARKS)


def test_a_terminal_of_80_columns_shows_every_number_in_its_row():
    whole = row("all_angles", "All-Angles Bench", base=(0.0, 0.0), model=(1.0, 1.0))
    known = {**whole, "questions": 1980, "of": 2132, "paper": {"": [34.1, 52.8]}}
    printed = StringIO()
    Console(file=printed, width=80).print(terminal_table({**RESULTS, "benchmarks": [known]}))
    lines = [line.split() for line in printed.getvalue().splitlines()]
    numbers = ["1,980", "of", "2,132", "0.0", "100.0", "+100.0", "-1.0", "to", "+20.0", "52.8", "(34.1)"]
    assert ["All-Angles", *numbers] in lines and ["Bench"] in lines


def test_a_model_without_a_base_has_no_difference():
    alone = {key: value for key, value in RESULTS.items() if key != "base"}
    assert overview(alone)[1] == ["VSI-Bench", "5 of 9", "40.0"]
    assert [one[0] for one in by_category(alone, alone["benchmarks"][0])] == ["", "model"]
    assert len(bias_rows(alone)) == 4


def test_a_model_is_named_by_its_run_and_folder():
    assert label("/home/me/runs/full/export") == "full/export" and label("export") == "export"
