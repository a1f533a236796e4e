"""Tables of results made by hand."""

from gasp_fast.downstream.tables import bias_rows, by_category, label, markdown, overview


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


def test_the_authors_claim_is_beside_the_difference():
    claimed = [{**RESULTS["benchmarks"][0], "claim": "+29.0 %"}, RESULTS["benchmarks"][1]]
    rows = overview({**RESULTS, "benchmarks": claimed})
    assert [row[-1] for row in rows] == ["the authors' claim", "+29.0 %", ""]
    assert "The authors' claim is that of" in markdown({**RESULTS, "benchmarks": claimed})
    assert "claim" not in markdown(RESULTS)


def test_a_model_without_a_base_has_no_difference():
    alone = {key: value for key, value in RESULTS.items() if key != "base"}
    assert overview(alone)[1] == ["VSI-Bench", "5 of 9", "40.0"]
    assert [one[0] for one in by_category(alone, alone["benchmarks"][0])] == ["", "model"]
    assert len(bias_rows(alone)) == 4


def test_a_model_is_named_by_its_run_and_folder():
    assert label("/home/me/runs/full/export") == "full/export" and label("export") == "export"
