"""Scores are the benchmarks' own means, and differences those that lmms-eval's t-test gets. Verdicts made by hand."""

from statistics import mean

import pytest

from gasp_fast.downstream.scores import categories, check_against_lmms_eval, judged, paired, score
from gasp_fast.downstream.suites import BENCHMARKS, SUITES, chosen


def answers(key, *verdicts):
    benchmark = BENCHMARKS[key]
    samples = [{"question": number, benchmark.metric: verdict} for number, verdict in enumerate(verdicts)]
    return judged(benchmark, benchmark.tasks[0], samples)


def vsi(**scores):
    """Verdicts of VSI-Bench: a list of scores for each type of question."""
    names = {"object_counting": "MRA:.5:.95:.05", "room_size_estimation": "MRA:.5:.95:.05"}
    return [
        {"question_type": kind, names.get(kind, "accuracy"): one} for kind, values in scores.items() for one in values
    ]


def test_vsi_bench_is_the_mean_of_categories_and_direction_the_mean_of_its_three():
    found = answers(
        "vsibench",
        *vsi(
            object_counting=[0.3, 0.5, 1.0],
            route_planning=[1.0],
            object_rel_direction_easy=[1.0, 1.0],
            object_rel_direction_medium=[0.0],
            object_rel_direction_hard=[0.0, 0.0, 0.0, 1.0],
        ),
    )
    direction = (1 + 0 + 0.25) / 3
    assert score(found) == pytest.approx((0.6 + 1 + direction) / 3)
    expected = {"object_counting": 0.6, "object_rel_direction": direction, "route_planning": 1.0}
    assert categories(found) == pytest.approx(expected)


def test_cv_bench_is_half_2d_and_half_3d_and_2d_is_the_mean_of_two_sources():
    sources = [("ADE20K", True)] * 3 + [("ADE20K", False)] + [("COCO", False)] + [("Omni3D", True), ("Omni3D", False)]
    found = answers("cv_bench", *({"source": source, "is_correct": right} for source, right in sources))
    assert score(found) == pytest.approx(((0.75 + 0) / 2 + 0.5) / 2)
    assert categories(found) == {"ADE20K": 0.75, "COCO": 0.0, "Omni3D": 0.5}


def test_site_is_accuracy_above_chance():
    two, four = {"overall": 1 - 1 / 2, "total": 1 / 2}, {"overall": -1 / 4, "total": 3 / 4}  # right; wrong
    assert score(answers("site_image", two, four)) == pytest.approx((1 / 2 - 1 / 4) / (1 / 2 + 3 / 4))


def test_other_scores_are_the_mean_of_all_questions():
    durations = [("short", 1.0), ("short", 0.0), ("long", 1.0)]
    found = answers("videomme", *({"score": one, "duration": duration} for duration, one in durations))
    assert score(found) == pytest.approx(2 / 3) and categories(found) == {"long": 1.0, "short": 0.5}


@pytest.mark.parametrize("key", ["vsibench", "site_image"])
def test_the_means_of_paired_scores_are_the_scores(key):
    if key == "vsibench":
        ours = answers(key, *vsi(object_counting=[0.3, 0.5, 1.0], route_planning=[1.0], room_size_estimation=[0.1]))
        base = answers(key, *vsi(object_counting=[0.1, 0.5, 0.0], route_planning=[0.0], room_size_estimation=[0.4]))
    else:
        ours = answers(key, {"overall": 0.5, "total": 0.5}, {"overall": 0.75, "total": 0.75})
        base = answers(key, {"overall": -0.5, "total": 0.5}, {"overall": 0.75, "total": 0.75})
    first, second = paired(ours, base)
    assert mean(first) == pytest.approx(score(ours)) and mean(second) == pytest.approx(score(base))
    assert first != pytest.approx([one.score for one in ours])  # weights matter


def test_of_equal_weights_the_scores_are_paired_as_they_are():
    ours, base = (answers("nextqa", *values) for values in ([True, False, True], [False, False, True]))
    assert paired(ours, base) == (pytest.approx([1, 0, 1]), pytest.approx([0, 0, 1]))


def test_a_difference_that_is_the_same_for_each_question_has_no_spread():
    kinds = {"object_counting": 5, "route_planning": 1}
    ours, base = (answers("vsibench", *vsi(**{k: [one] * n for k, n in kinds.items()})) for one in (1.0, 0.0))
    first, second = paired(ours, base)
    assert [a - b for a, b in zip(first, second, strict=True)] == pytest.approx([1.0] * 6)


def test_only_questions_that_both_answered_are_paired():
    ours, base = answers("nextqa", True, False, True), answers("nextqa", False, True)
    assert [len(one) for one in paired(ours, base)] == [2, 2]


def test_a_score_that_is_not_lmms_evals_is_refused():
    found = answers("videomme", {"score": 1.0, "duration": "short"}, {"score": 0.0, "duration": "short"})
    check_against_lmms_eval(BENCHMARKS["videomme"], "videomme", found, {"videomme_perception_score": 50.0})
    with pytest.raises(ValueError, match=r"videomme: lmms-eval's score is 0\.510000, but its verdicts give 0\.500000"):
        check_against_lmms_eval(BENCHMARKS["videomme"], "videomme", found, {"videomme_perception_score": 51.0})


def test_suites_and_benchmarks_are_chosen_once_in_order():
    assert [one.key for one in chosen("general, vsibench,nextqa")] == [*SUITES["general"], "vsibench"]
    assert len(SUITES["paper"]) == 7 and len({task for key in SUITES["easi8"] for task in BENCHMARKS[key].tasks}) == 22
    [task] = chosen("blink_counting")
    assert task.tasks == ("blink_counting",) and task.title == "BLINK: blink_counting" and task.metric == "blink_acc"
    with pytest.raises(ValueError, match="--suite 'vqa' is unknown; suites are spatial"):
        chosen("vsibench,vqa")
