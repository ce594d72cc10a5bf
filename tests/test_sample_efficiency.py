"""The analysis of the evidence suite: partial results make a partial report, and only like is compared with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import analysis, page
from benchmarks.sample_efficiency import SUITE, gather, keep, keep_pilots, pilot, restore
from deploy.suite_config import SuiteConfig, Trial
from gsa import config as configs
from gsa.errors import UsageError

SUITE_CONFIG = configs.load(SuiteConfig, SUITE)
TASKS = SUITE_CONFIG.tasks
GRID = [m for m in SUITE_CONFIG.methods if m != "prior"]


def trial(task: str, method: str, seed: int, score: float, variant: str = "", **more: Any) -> dict[str, Any]:
    """A result as `gsa suite run` leaves it, whose curve rises straight from 0 to its score."""
    frames, high = 1000, (SUITE_CONFIG.scale[task].returns or (0.0, 1000.0))[1]
    curve = [
        {"frames": f, "score": score * f / frames, "return": high * score * f / frames / 100} for f in (0, 500, frames)
    ]
    return {
        "name": f"{task.replace('/', '-')}--{method}--seed{seed}", "task": task, "method": method, "variant": variant,
        "seed": seed, "score": score, "return": high * score / 100, "frames": frames, "curve": curve, "seconds": 36.0,
        "machine": {"processor": "x"},
        "episodes": [{"frames": f, "guided_share": 1 - f / frames} for f in range(100, 1001, 100)], **more,
    }  # fmt: skip


def grid(scores: dict[str, float], seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    return [trial(t, m, s, score + s) for t in TASKS for m, score in scores.items() for s in seeds]


def test_the_gain_of_twice_the_score_is_one_hundred_per_cent() -> None:
    found = analysis.analyse(grid({"scratch": 20, "gsa": 42}), SUITE_CONFIG)
    gain = found["measures"]["score"]["gsa over scratch"]["gain"]
    assert gain["value"] == pytest.approx(43 / 21 - 1)
    assert gain["low"] < gain["value"] < gain["high"]
    assert found["measures"]["score"]["gsa over scratch"]["better"]["value"] == 1


def test_the_whole_run_is_the_mean_of_its_evaluations_the_final_one_in_place_of_the_last() -> None:
    trials = [t | ({"score": 30} if t["method"] == "gsa" else {}) for t in grid({"scratch": 20, "gsa": 40}, (0,))]
    trials.append(trial(TASKS[0], "prior", 0, 50) | {"curve": []})  # it has no curve, and no place there
    found = analysis.analyse(trials, SUITE_CONFIG)["whole_run"]["score"]
    assert found["runs"]["scratch"] == {TASKS[0]: pytest.approx([0.1])} and "prior" not in found["runs"]
    assert found["runs"]["gsa"][TASKS[0]] == pytest.approx([(0 + 0.2 + 0.3) / 3])
    assert found["gsa over scratch"]["gain"]["value"] == pytest.approx(5 / 3 - 1)


def test_seeds_that_a_method_lacks_are_left_out_of_all() -> None:
    trials = grid({"scratch": 20, "gsa": 40})
    found = analysis.analyse(trials[:-1], SUITE_CONFIG)  # the last task's gsa has no third seed
    assert found["seeds"] == {**{t: [0, 1, 2] for t in TASKS}, TASKS[-1]: [0, 1]}
    runs = found["measures"]["score"]["runs"]
    assert len(runs["scratch"][TASKS[-1]]) == len(runs["gsa"][TASKS[-1]]) == 2


def test_variants_and_methods_of_some_tasks_do_not_enter_the_aggregate() -> None:
    trials = grid({"scratch": 20, "gsa": 40})
    more = [trial(TASKS[0], "gsa", 0, 99, variant="k-10"), trial(TASKS[0], "jsrl", 0, 99)]
    assert (
        analysis.analyse(trials + more, SUITE_CONFIG)["measures"] == analysis.analyse(trials, SUITE_CONFIG)["measures"]
    )


def test_no_interval_from_a_single_seed() -> None:
    found = analysis.analyse(grid({"scratch": 20, "gsa": 40}, (0,)), SUITE_CONFIG)
    assert found["measures"]["score"]["aggregate"]["gsa"]["mean"] == {
        "value": pytest.approx(0.4),
        "low": None,
        "high": None,
    }


def test_frames_to_the_score_that_scratch_ended_with() -> None:
    trials = grid({"scratch": 20, "gsa": 40}, (0,))
    reached = analysis.analyse(trials, SUITE_CONFIG)["frames_to_scratch"][TASKS[0]]["frames"]
    assert reached["scratch"] == 1000
    assert reached["gsa"] == pytest.approx(500)


def test_guided_share_is_counted_in_fifths_of_the_run() -> None:
    shares = analysis.guided_share([trial(TASKS[0], "gsa", 0, 1)])[f"{TASKS[0]} gsa"]
    assert shares == pytest.approx([0.85, 0.65, 0.45, 0.25, 0.05])


def test_distances_are_averaged_over_the_runs_of_a_task() -> None:
    trials = [
        trial(
            TASKS[0], "gsa", seed, 1, shift=[{"from": "expert", "to": "pool", "distance": [d, d, d], "of_the_pools": 1}]
        )
        for seed, d in ((0, 1.0), (1, 3.0))
    ]
    found = analysis.analyse(trials, SUITE_CONFIG)["shift"][TASKS[0]]
    assert found == [{"from": "expert", "to": "pool", "runs": 2, "distance": [2.0, 2.0, 2.0], "of_the_pools": 1.0}]


def test_model_errors_are_averaged_over_the_runs_of_a_method() -> None:
    def rows(recon: float) -> list[dict[str, Any]]:
        models = (("pre-trained", 90.0), ("final", recon))
        return [{"model": m, "on": on, "recon": r, "kl": 2.0} for m, r in models for on in page.PLACES]

    trials = [
        trial(TASKS[0], m, s, 1, model_error=rows(r)) for m, s, r in (("gsa", 0, 10), ("gsa", 1, 20), ("naive", 0, 7))
    ]
    found = analysis.analyse(trials, SUITE_CONFIG)
    of = found["model_error"][TASKS[0]]
    assert (of["gsa"]["runs"], of["naive"]["runs"], of["pre-trained"]["runs"]) == (2, 1, 3)
    assert (of["gsa"]["expert"], of["naive"]["pool"], of["pre-trained"]["met last"]) == ([15, 2], [7, 2], [90, 2])
    text, _ = page.page(
        {"result": found | {"planned": 1}, "commit": "0" * 8, "machine": {"processor": ""}, "goals": {}}, {}, {}
    )
    assert f"| {TASKS[0]} gsa | 2 | 15.0 + 2.0 | 15.0 + 2.0 | 15.0 + 2.0 |" in text


def test_scratch_catches_up_where_its_longer_curve_is_at_what_gsa_ended_with() -> None:
    trials = grid({"scratch": 20, "gsa": 39})
    for method, score in (("scratch", 80), ("gsa", 90)):
        for seed in (1, 0):
            trials.append(trial(TASKS[0], method, seed, score + seed, variant=analysis.LARGER))
    found = analysis.analyse(trials, SUITE_CONFIG)["larger_budget"]
    assert found["final"]["score"]["scratch"][TASKS[0]] == pytest.approx([0.8, 0.81])
    assert found["whole_run"]["score"]["scratch"][TASKS[0]] == pytest.approx([0.4, 0.405])
    assert found["catches_up"]["return"] == pytest.approx(0.395)  # gsa's mean of seeds 0 and 1: 39 and 40
    assert found["catches_up"]["frames"] == pytest.approx(1000 * 0.395 / 0.805)
    lower = [t for t in trials if t["method"] == "gsa" or not t["variant"]]
    lower += [trial(TASKS[0], "scratch", seed, 9, variant=analysis.LARGER) for seed in (0, 1)]
    assert analysis.larger_budget(lower, SUITE_CONFIG)["catches_up"]["frames"] is None


def test_a_variant_stands_beside_the_suites_settings_with_its_seeds() -> None:
    trials = [*grid({"scratch": 20, "gsa": 40}), *(trial(TASKS[0], "gsa", s, 70 + s, variant="k-10") for s in (2, 0))]
    row = analysis.analyse(trials, SUITE_CONFIG)["sensitivity"]["k-10"]
    assert row["score"] == pytest.approx([0.7, 0.72]) and row["default_score"] == pytest.approx([0.4, 0.42])


@pytest.mark.parametrize(("scores", "inside"), [((41, 42), True), ((60, 61), False)])
def test_trials_that_are_run_again_are_held_against_the_interval_of_the_first(
    scores: tuple[int, int], inside: bool
) -> None:
    repeated = [trial(TASKS[0], "gsa", seed, score) for seed, score in zip((2, 0), scores, strict=True)]
    repeated[1]["machine"] = {"processor": "y"}
    trials = grid({"scratch": 20, "gsa": 40})
    found = analysis.analyse(trials, SUITE_CONFIG, repeated)
    rows = {(row["measure"], row["whole_run"]): row for row in found["again"]}
    assert len(rows) == 4 and all(row["seeds"] == [0, 2] and row["inside"] is inside for row in rows.values())
    end, whole = rows["score", False], rows["score", True]
    assert end["again"] == pytest.approx([scores[1] / 100, scores[0] / 100])
    assert end["first"] == pytest.approx([0.4, 0.42])
    assert end["interval"] == pytest.approx([0.4, 0.42])  # of three seeds: from the lowest to the highest
    assert whole["interval"] == pytest.approx([0.2, 0.21])
    assert (end["same_processor"], end["equal"]) == ([2], [])
    assert analysis.goals(found, 24)["run again"]["holds"] is inside
    assert found["measures"] == analysis.analyse(trials, SUITE_CONFIG)["measures"]


def test_a_run_that_is_the_first_one_again_is_said_to_be_equal() -> None:
    first, repeated = grid({"gsa": 40}), grid({"gsa": 40}, (0, 2))
    for prior in (t | {"method": "prior", "curve": []} for t in grid({"gsa": 9})):  # it has no curve
        first.append(prior)
        repeated.append(prior)
    found = analysis.analyse(first, SUITE_CONFIG, [t for t in repeated if t["seed"] != 1])
    assert [row["whole_run"] for row in found["again"] if row["method"] == "prior"] == [False] * 2 * len(TASKS)
    assert all(row["equal"] == row["same_processor"] == [0, 2] for row in found["again"])
    report = {"result": found | {"planned": 1}, "commit": "0" * 8, "goals": {}}
    assert (
        f"{TASKS[0]} gsa: on the same kind of processor both times: 0, 2; equal in every episode: 0, 2."
        in page.page(report, {}, {})[0]
    )


def test_one_seed_has_no_interval_to_be_inside() -> None:
    found = analysis.analyse(grid({"gsa": 40}, (0,)), SUITE_CONFIG, [trial(TASKS[0], "gsa", 0, 40)])["again"]
    assert all(row["interval"] == [None, None] and not row["inside"] for row in found)


def test_goals_hold_only_for_what_is_there() -> None:
    scores = {"scratch": 20, "naive": 22, "rehearsal": 30, "random-rehearsal": 25, "gsa": 45}
    goals = analysis.goals(analysis.analyse(grid(scores), SUITE_CONFIG, grid({"gsa": 45})), 60)
    assert all(goal["holds"] for goal in goals.values())
    goals = analysis.goals(analysis.analyse([], SUITE_CONFIG), 60)
    assert not any(goal["holds"] for goal in goals.values())
    goals = analysis.goals(analysis.analyse(grid(scores | {"naive": 31}), SUITE_CONFIG), 60)
    assert not goals["order"]["holds"] and goals["gain of gsa over scratch"]["holds"]


@pytest.mark.parametrize("scores", [{}, {"scratch": 20}, {"scratch": 20, "gsa": 40}])
def test_a_partial_result_makes_a_page(scores: dict[str, float], tmp_path: Path) -> None:
    extra = [trial(TASKS[0], "gsa", 0, 9, variant=analysis.LARGER), trial(TASKS[0], "gsa", 0, 9, variant="k-10")]
    trials, repeated = grid(scores) + (extra if "gsa" in scores else []), grid(scores, (0,))
    found = analysis.analyse(trials, SUITE_CONFIG, repeated) | {"planned": 96}
    report = {
        "commit": "0" * 40, "machine": {"processor": "x"}, "result": found, "goals": analysis.goals(found, 96)
    }  # fmt: skip
    text, pictures = page.page(json.loads(json.dumps(report, allow_nan=False)), {}, {})
    assert ("not there yet" in text) or not scores
    assert ("No trial" in text) == (not scores)
    for name, draw in pictures.items():
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_kept_trials_are_gone_on_from_in_an_empty_folder(tmp_path: Path) -> None:
    first = SUITE_CONFIG.trials(tmp_path / "here")[:2]
    for t in first:
        result = trial(t.task, t.method, t.seed, 10) | {"name": t.name, "settings": t.settings()}
        path = tmp_path / "here" / "results" / f"{t.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    keep(tmp_path / "kept", tmp_path / "here", gather(tmp_path / "kept", tmp_path / "here", first))
    restore(tmp_path / "kept", tmp_path / "there")
    planned = SUITE_CONFIG.trials(tmp_path / "there")
    assert [r["name"] for r in gather(tmp_path / "none", tmp_path / "there", planned)] == [t.name for t in first]


def test_a_trial_under_other_settings_is_not_taken(tmp_path: Path) -> None:
    planned: list[Trial] = SUITE_CONFIG.trials(tmp_path)[:1]
    result = trial(planned[0].task, "scratch", 0, 10) | {"settings": {**planned[0].settings(), "budget_frames": 7}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{planned[0].name}.json").write_text(json.dumps(result))
    with pytest.raises(UsageError, match="other settings"):
        gather(tmp_path / "none", tmp_path, planned)


def test_a_setting_that_came_later_does_not_make_it_another_trial(tmp_path: Path) -> None:
    planned = SUITE_CONFIG.trials(tmp_path)[0]
    before = json.loads(json.dumps(planned.settings()))
    del before["learn_end"], before["learner"]["compute"]
    assert planned.unlike(before) == []
    assert planned.unlike({**before, "batch": 3})[0].startswith("batch 3 → ")


def test_pilots_are_added_to_those_that_are_kept(tmp_path: Path) -> None:
    suite = configs.load(SuiteConfig, SUITE.with_name("pilots.yaml"))
    planned = suite.trials(tmp_path)[0]
    kept = tmp_path / "pilots.json"
    kept.write_text(json.dumps({"record": "pilots", "pilots": [{"name": "an earlier one"}]}))
    done = trial(TASKS[0], "scratch", 0, 20) | {"name": planned.name, "settings": planned.settings(), "commit": "0"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{planned.name}.json").write_text(json.dumps(done))
    for _ in range(2):
        keep_pilots(kept, tmp_path)
    names = [row["name"] for row in json.loads(kept.read_text())["pilots"]]
    assert names == ["an earlier one", planned.name]
    text, _ = page.page({}, {}, json.loads(json.dumps({"pilots": [pilot(done)]})))
    assert planned.task in text and "at its budget" in text


def test_the_page_has_the_kept_numbers() -> None:
    """docs/results.md is written anew whenever a result is kept."""
    assert page.page(*page.kept())[0] in (page.DOCS / "results.md").read_text()
