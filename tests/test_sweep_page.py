"""The table and the page of a search say what its study says, whatever became of its trials."""

import math

import numpy as np
import optuna
import pandas as pd
import pytest
from browser import explore
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from test_page import Page

from fedsim import Config
from fedsim.formats import percent, setting
from fedsim.sweep.page import write_sweep_page
from fedsim.sweep.plots import Scale, best_so_far
from fedsim.sweep.tables import best_trial, importances, pareto, trial_table

LR = FloatDistribution(1e-5, 1e-2, log=True)
SPACE = {
    "method": CategoricalDistribution(("fedclip", "probe")),
    "fedclip.lr": LR,
    "probe.lr": FloatDistribution(1e-4, 1e-1, log=True),
    "fedavgm.beta": FloatDistribution(0.0, 0.99),
    "cohort": IntDistribution(2, 20),
    "mix": CategoricalDistribution((16, "auto", None)),
    "rounds": IntDistribution(1, 50),
}
PRUNED, FAIL = TrialState.PRUNED, TrialState.FAIL


def a_study(*trials, objectives=("validation",), **sweep):
    """A study of finished trials; each is what `a_trial` makes."""
    up = {"validation", "worst_tenth"}
    directions = ["maximize" if name in up else "minimize" for name in objectives]
    study = optuna.create_study(directions=directions, study_name="sweep")
    config = Config(dataset="glyphs", held_out="clipart", server="fedavgm", cohort=4, rounds=9).plain()
    asked = {"config": config, "sampler": "tpe", "grace": 5, "tuning_seeds": [1000], "report_seeds": [0, 1]}
    study.set_user_attr("objectives", list(objectives))
    study.set_user_attr("sweep", asked | sweep)
    for trial in trials:
        study.add_trial(trial)
    return study


def a_trial(*values, state=TrialState.COMPLETE, curve=(), measures=None, failed=None, **params):
    params = {name.replace("__", "."): value for name, value in params.items()}
    attributes = {"measures": measures, "failed": failed, "seconds": 2.0}
    return create_trial(
        state=state,
        values=values or None,
        params=params,
        distributions={name: SPACE[name] for name in params},
        intermediate_values=dict(enumerate(curve)),
        user_attrs={name: value for name, value in attributes.items() if value is not None},
    )


def a_page(study, tmp_path, reporting=None, **about):
    file = tmp_path / "sweep.html"
    write_sweep_page(study, reporting, about, file)
    return Page(file.read_text())


def test_the_table_has_a_row_a_trial_and_survives_parquet_with_a_choice_of_several_types(tmp_path):
    measures = {"validation": 0.5, "worst_tenth": 0.25, "bytes": 4e6, "clock_s": 0.0, "chosen_round": 3, "rounds": 9}
    study = a_study(
        a_trial(0.5, measures=measures, method="fedclip", fedclip__lr=1e-3, cohort=4, mix=16, rounds=9),
        a_trial(state=PRUNED, curve=(0.2, 0.4), method="probe", probe__lr=1e-2, cohort=5, mix="auto"),
        a_trial(state=FAIL, failed="the loss is not finite", method="probe", probe__lr=1e-1, cohort=6, mix=None),
    )
    table = trial_table(study)
    table.to_parquet(tmp_path / "trials.parquet", index=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trials.parquet"), table)
    assert list(table.columns[:4]) == ["number", "state", "failed", "method"]
    assert list(table.state) == ["complete", "pruned", "fail"]
    assert list(table.failed.fillna("")) == ["", "", "the loss is not finite"]
    assert list(table.mix) == ["16", "auto", "none"]  # not numbers, since not all of them are
    assert list(table["probe.lr"].fillna(0)) == [0, 1e-2, 1e-1] and table["probe.lr"].isna()[0]
    assert list(table.cohort) == [4, 5, 6] and table.cohort.dtype == "Int64"
    assert table["param.rounds"][0] == 9 and table["rounds"][0] == 9  # what was asked for, and what was done
    assert list(table.validation.fillna(0)) == [0.5, 0.4, 0]  # a pruned trial: where it stood
    assert table.bytes[0] == 4e6 and table.bytes[1:].isna().all()


def test_the_table_of_an_empty_study_survives_parquet_as_well(tmp_path):
    table = trial_table(a_study())
    table.to_parquet(tmp_path / "trials.parquet")
    assert len(table) == 0 and {"number", "state", "failed", "validation", "seconds"} <= set(table)


def test_the_page_says_which_searched_methods_read_test_rows_without_labels(tmp_path):
    plain = "Test rows were not used in the search."
    assert plain in a_page(a_study(a_trial(0.5, cohort=2)), tmp_path).words
    skew = {"name": "domain_dirichlet", "scramble_labels": True}
    config = Config(dataset="glyphs", held_out="clipart", method="facmic", partition=skew).plain()
    words = a_page(a_study(a_trial(0.5, cohort=2), config=config), tmp_path).words
    assert "With scrambled labels, the rows of clients have the images of other rows (`scramble_labels`)." in words
    said = "in the search, except by facmic: training reads those of held-out domains without their labels."
    assert said in words and plain not in words


def test_of_equal_trials_the_first_is_the_best_and_pruned_ones_never_are():
    study = a_study(
        a_trial(0.5, cohort=2), a_trial(0.6, cohort=3), a_trial(0.6, cohort=4), a_trial(state=PRUNED, curve=(0.9,))
    )
    assert best_trial(study).number == 1


def test_of_several_objectives_validation_decides_among_those_that_nothing_dominates():
    study = a_study(
        a_trial(9e6, 0.50, cohort=2),
        a_trial(5e6, 0.45, cohort=3),
        a_trial(9e6, 0.45, cohort=4),  # trial 1 sends less, trial 0 is more accurate
        a_trial(20e6, 0.50, cohort=5),
        objectives=("bytes", "validation"),
    )
    assert [trial.number for trial in pareto(study)] == [0, 1]
    assert best_trial(study).number == 0
    cheap = a_study(
        a_trial(5e6, 10.0, measures={"validation": 0.4}),
        a_trial(9e6, 5.0, measures={"validation": 0.5}),
        objectives=("bytes", "clock_s"),
    )
    assert best_trial(cheap).number == 1


def test_without_a_finished_trial_there_is_no_best_one():
    study = a_study(a_trial(state=FAIL), a_trial(state=FAIL), a_trial(state=PRUNED, curve=(0.5,)))
    with pytest.raises(ValueError, match="no trial has finished: 1 pruned, 2 failed"):
        best_trial(study)
    with pytest.raises(ValueError, match="no trial has started"):
        best_trial(a_study())


def test_best_and_base_are_means_and_deviations_over_seeds_and_their_difference_is_by_seed(tmp_path):
    reporting = pd.DataFrame(
        [
            {"config": "best", "seed": 0, "personalization": 0.54, "generalization": np.nan, "bytes": 2e6},
            {"config": "best", "seed": 1, "personalization": 0.60, "generalization": np.nan, "bytes": 4e6},
            {"config": "base", "seed": 1, "personalization": 0.52, "generalization": np.nan, "bytes": 1e6},
            {"config": "base", "seed": 0, "personalization": 0.50, "generalization": np.nan, "bytes": 1e6},
        ]
    )
    rows = a_page(a_study(a_trial(0.5, cohort=4)), tmp_path, reporting).table("On reporting seeds 0, 1")
    # By seed 4 and 8 points: 6 ± 4 / sqrt(2). Of 0.54 and 0.60, 57 ± 6 / sqrt(2); of 0.50 and 0.52, 51 ± 2 / sqrt(2).
    assert rows == [
        ["accuracy", "base", "best", "difference"],
        ["own test rows, mean over clients", "51.0 ± 1.4", "57.0 ± 4.2", "+6.0 ± 2.8"],
        ["megabytes up and down, all clients and rounds", "1", "3", ""],
    ]


def test_one_seed_has_no_deviation_and_best_alone_no_difference(tmp_path):
    reporting = pd.DataFrame([{"config": "best", "seed": 7, "personalization": 0.54}])
    rows = a_page(a_study(a_trial(0.5, cohort=4)), tmp_path, reporting).table("On reporting seed 7,")
    assert rows == [["accuracy", "best"], ["own test rows, mean over clients", "54.0"]]


def test_the_words_say_what_became_of_the_trials_and_what_the_base_had(tmp_path):
    study = a_study(
        a_trial(0.5, measures={"chosen_round": 3, "rounds": 9}, method="fedclip", cohort=4),
        a_trial(0.625, measures={"chosen_round": 7, "rounds": 9}, method="probe", cohort=4),
        a_trial(state=PRUNED, curve=(0.4,), method="probe", cohort=5),
        a_trial(state=FAIL, failed="actor <b>lost</b>", method="probe", cohort=6),
    )
    page = a_page(study, tmp_path, versions={"optuna": "5"})
    words = " ".join(page.words.split())
    assert "Sweep of 4 trials on glyphs, clipart held out" in words
    assert "proposed by TPE, searched for the highest validation accuracy: 2 finished, 1 pruned, 1 failed." in words
    assert "from round 5 on" in words and "evaluated on tuning seed 1000." in words
    assert "The best is trial 1: validation accuracy 62.5% (round 7 of 9)." in words
    assert "The base configuration was trial 0: validation accuracy 50.0%." in words  # fedclip, 4 clients a round
    assert page.table("Failed trials, 1 in all")[1] == ["3", "actor <b>lost</b>"]
    assert page.table("Versions")[1] == ["optuna", "5"]
    assert [row[0] for row in page.table("All trials")[1:]] == ["1", "0", "2", "3"]


def test_a_base_that_failed_and_one_that_won_are_said_to_have(tmp_path):
    failed = a_study(a_trial(state=FAIL, cohort=4), a_trial(0.5, cohort=5))
    assert "The base configuration was trial 0, failed." in a_page(failed, tmp_path).words
    won = a_study(a_trial(0.6, cohort=4), a_trial(0.5, cohort=5))
    assert "That is the base configuration" in a_page(won, tmp_path).words


def test_what_was_searched_has_ranges_and_how_many_trials_had_each(tmp_path):
    study = a_study(
        a_trial(0.5, method="fedclip", fedclip__lr=5e-5, cohort=4),
        a_trial(0.6, method="probe", probe__lr=0.02, cohort=5),
        a_trial(0.4, method="probe", probe__lr=0.03, cohort=6),
    )
    page = a_page(study, tmp_path)
    lr = Config(method="fedclip").method.lr
    assert page.table("What was searched") == [
        ["parameter", "values", "trials", "base", "best trial"],
        ["method", "fedclip, probe", "3", "fedclip", "probe"],
        ["fedclip.lr", "1e-5 to 0.01, log-uniform", "1", setting(lr), "-"],
        ["cohort", "2 to 20", "3", "4", "5"],
        ["probe.lr", "1e-4 to 0.1, log-uniform", "2", "-", "0.02"],
    ]
    assert "passes below the axis" in page.words and "unused" in page.words


def searched(count, objectives=("validation",), seed=0):
    """Trials where fedclip.lr decides, best at 1e-3; a third are probes, one in ten fails, a fourth is pruned."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        probe = number % 3 == 0
        own = {"probe__lr": 10 ** rng.uniform(-4, -1)} if probe else {"fedclip__lr": 10 ** rng.uniform(-5, -2)}
        params = {"method": "probe" if probe else "fedclip"} | own | {"fedavgm__beta": rng.uniform(0, 0.99)}
        params |= {"cohort": int(rng.integers(2, 21)), "mix": (16, "auto", None)[number % 3]}
        accuracy = 0.4 if probe else 0.6 - 0.1 * abs(math.log10(own["fedclip__lr"]) + 3)
        measures = {"validation": accuracy, "worst_tenth": accuracy - 0.1, "bytes": 1e6 * params["cohort"]}
        measures |= {"clock_s": 30.0 * number, "flops": 1e12, "chosen_round": 5, "rounds": 9}
        if number % 10 == 9:
            trials.append(a_trial(state=FAIL, failed="no", **params))
        elif number % 4 == 1 and len(objectives) == 1:
            curve = accuracy - 0.1, accuracy
            trials.append(a_trial(state=PRUNED, curve=curve, measures=measures, **params))
        else:
            curve = (0.3, 0.35, accuracy) if len(objectives) == 1 else ()
            trials.append(a_trial(*(measures[name] for name in objectives), curve=curve, measures=measures, **params))
    return a_study(*trials, objectives=objectives)


SHAPES = {
    "nothing begun": lambda: a_study(),
    "one trial": lambda: a_study(a_trial(0.5, curve=(0.4, 0.5), cohort=4)),
    "two alike": lambda: a_study(a_trial(0.5, cohort=4), a_trial(0.5, cohort=4)),
    "all failed": lambda: a_study(*(a_trial(state=FAIL, failed="no", cohort=n) for n in (2, 3, 4))),
    "all pruned": lambda: a_study(*(a_trial(state=PRUNED, curve=(0.1 * n,), cohort=n) for n in (2, 3, 4))),
    "failed before it had parameters": lambda: a_study(a_trial(state=FAIL), a_trial(0.5, cohort=4)),
    "still going": lambda: a_study(a_trial(0.5, cohort=4), a_trial(state=TrialState.RUNNING, cohort=5)),
    "one parameter": lambda: a_study(*(a_trial(0.1 * n, cohort=n) for n in range(2, 9))),
    "constant objective": lambda: a_study(*(a_trial(0.5, cohort=n) for n in range(2, 9))),
    "constant parameter": lambda: a_study(*(a_trial(0.1 * n, mix="auto") for n in range(2, 9))),
    "least bytes": lambda: a_study(
        *(a_trial(1e6 * n, cohort=n) for n in range(2, 9)),
        a_trial(state=PRUNED, curve=(1e3,), cohort=4),
        objectives=("bytes",),
    ),
    "sixty": lambda: searched(60),
    "two objectives": lambda: searched(60, ("validation", "bytes")),
    "three objectives": lambda: searched(40, ("validation", "worst_tenth", "clock_s")),
    "a cost of nothing": lambda: a_study(
        *(a_trial(0.1 * n, 0.0, cohort=n) for n in range(2, 9)), objectives=("validation", "clock_s")
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_study_has_a_page_that_loads_nothing_and_is_the_same_twice(shape, tmp_path):
    study = SHAPES[shape]()
    page = a_page(study, tmp_path, best={"method": {"name": "probe"}, "data_dir": "/far/away/data"})
    first = (tmp_path / "sweep.html").read_bytes()
    a_page(study, tmp_path, best={"method": {"name": "probe"}, "data_dir": "/far/away/data"})
    assert (tmp_path / "sweep.html").read_bytes() == first
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "data_dir: data" in page.words and b"/far/away" not in first
    assert "mathdefault" not in page.words and "nan" not in page.words
    assert len(page.table("All trials")) == 1 + len(study.trials)


def test_a_study_that_is_read_from_its_file_has_the_same_page(tmp_path):
    study = searched(8)
    a_page(study, tmp_path)
    first = (tmp_path / "sweep.html").read_bytes()
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.copy_study(from_study_name="sweep", from_storage=study._storage, to_storage=storage)
    a_page(optuna.load_study(study_name="sweep", storage=storage), tmp_path)
    assert (tmp_path / "sweep.html").read_bytes() == first


def test_a_page_shows_curves_of_one_objective_and_a_front_of_several(tmp_path):
    one = a_page(SHAPES["sixty"](), tmp_path)
    assert [alt.split(" by ")[0].split(" for ")[0] for alt in one.alts] == [
        "Value",
        "validation accuracy (%) of 54 trials",
        "Importance",
        "validation accuracy (%)",
        "54 trials through method, probe.lr, fedavgm.beta, cohort, mix, fedclip.lr, validation accuracy (%)",
    ]
    two = SHAPES["two objectives"]()
    page = a_page(two, tmp_path)
    front = pareto(two)
    assert any(f"{len(front)} of 54 finished trials are on the Pareto front" in alt for alt in page.alts)
    kinds = [row[1] for row in page.table("All trials")[1:]]
    assert kinds == ["on the front"] * len(front) + ["finished"] * (54 - len(front)) + ["failed"] * 6


def test_trials_are_pointed_at_and_hidden_in_all_plots(tmp_path):
    study = searched(60)
    a_page(study, tmp_path)
    script = """
    const [history] = all(".panel"), slices = all(".panel").find((panel) => panel.textContent.includes("fedclip.lr"));
    const front = (panel, s) => told(panel).series.find((series) => series.s === s);
    const { x, y } = front(history, 1), values = point(history, x[3], y[3]);
    all(".legend input").find((input) => input.value === "finished").click();
    const [finished, pruned] = ["finished", "pruned"].map((kind) => {
      const entries = all(".legend input").filter((input) => input.value === kind);
      return entries.map((input) => all(`.panel .series-${input.dataset.series}`, input.closest("figure")).some(shown));
    });
    return { values, finished, pruned };
    """
    told = explore(tmp_path / "sweep.html", script)
    trial = [trial for trial in study.trials if trial.state == TrialState.COMPLETE][3]
    best = max(other.value for other in study.trials[: trial.number + 1] if other.state == TrialState.COMPLETE)
    expected = {f"finished: {percent(trial.value)}", f"best so far: {percent(best)}"}
    assert told["values"][0] == f"trial {trial.number}" and set(told["values"][1:]) == expected
    # In the history, the slices and the parallel coordinates; the curves have a legend with counts.
    assert told["finished"] == [False] * 3 and told["pruned"] == [True] * 3


def test_a_thousand_trials_are_a_page_of_about_a_megabyte_and_more_are_cut(tmp_path):
    page = a_page(searched(1100), tmp_path)
    assert (tmp_path / "sweep.html").stat().st_size < 1_500_000
    assert len(page.table("1000 of 1100 trials")) == 1001
    assert "one of the best 300 trials" in page.words


def test_what_decides_is_found_to_matter_most():
    shares, top = importances(searched(200))
    share = shares["validation accuracy"]
    assert top == 14  # a tenth of the 140 that finished: 20 of 200 failed, 40 of those that are left were pruned
    assert max(share, key=share.get) == "fedclip.lr" and share["fedclip.lr"] > 0.5
    assert sum(share.values()) == pytest.approx(1)
    shares, _ = importances(searched(200, ("validation", "bytes")))
    assert max(shares["traffic"], key=shares["traffic"].get) == "cohort"


@pytest.mark.parametrize("count", range(4))
def test_nothing_is_said_of_what_mattered_where_fewer_than_four_finished(count, tmp_path):
    study = a_study(*(a_trial(0.1 * n, cohort=n + 2) for n in range(count)), a_trial(state=PRUNED, curve=(0.1,)))
    assert importances(study)[0] == {}
    plural = "trial" if count == 1 else "trials"
    assert f"Importance is not computed: only {count} {plural} finished." in a_page(study, tmp_path).words


def test_nothing_is_said_of_what_mattered_where_all_trials_are_as_good(tmp_path):
    assert importances(SHAPES["constant objective"]())[0] == {}
    assert "too similar" in a_page(SHAPES["constant objective"](), tmp_path).words


def test_a_logarithmic_scale_has_its_middle_at_the_geometric_mean():
    scale = Scale("lr", 1e-4, 1.0, log=True)
    assert [scale.position(value) for value in (1e-4, 1e-2, 1.0)] == pytest.approx([0, 0.5, 1])
    assert scale.ticks()[1] == ["1e-4", "0.001", "0.01", "0.1", "1"]
    assert Scale("beta", 0.0, 0.5).position(0.125) == 0.25
    assert Scale("still", 3, 3).ticks() == ([0.5], ["3"])


def test_choices_that_are_equal_but_of_another_type_have_places_of_their_own():
    scale = Scale("mix", choices=(1, True, "1", None))
    assert [scale.position(value) for value in (1, True, "1", None)] == [0.125, 0.375, 0.625, 0.875]
    assert math.isnan(scale.position(2))


def test_numbers_are_written_short():
    assert [setting(value) for value in (5e-05, 0.00051149, 0.001, 0.02, 1.0, 1e7, 7, True, None, "a", 0.0)] == [
        *("5e-5", "5.11e-4", "0.001", "0.02", "1", "1e7", "7", "True", "none", "a", "0")
    ]


def test_the_best_so_far_of_a_cost_is_the_lowest():
    values = pd.Series([3.0, 4.0, 2.0])
    assert list(best_so_far(values, highest=False)) == [3, 3, 2]
    assert list(best_so_far(values, highest=True)) == [3, 4, 4]
