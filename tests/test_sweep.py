"""Sweeps, on real Ray and real studies: what is found, what is kept, and what a kill changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState
from PIL import Image
from test_bits import descendants

from fedsim import Config, Fleet, InputError, component, run
from fedsim.checkpoint import HISTORY, entries_of
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.counts import SPLITS, Counts
from fedsim.errors import Stopped
from fedsim.fleets.ideal import Ideal
from fedsim.folder import claim
from fedsim.methods.probe import Probe
from fedsim.prepare import encode_experiment, prepare
from fedsim.registry import name_of
from fedsim.search_space import Field, Log
from fedsim.sweep.command import parse_sweep
from fedsim.sweep.config import Sweep
from fedsim.sweep.prepare import prepare_sweep
from fedsim.sweep.results import REPORTING, TRIALS
from fedsim.sweep.search import search
from fedsim.sweep.space import Space
from fedsim.sweep.study import FILE as STUDY
from fedsim.sweep.study import NAME, Rules, Study
from fedsim.sweep.trial import Trial, config_of, experiments_of

pytestmark = pytest.mark.ray

VAL = SPLITS.index("val")


@component
class Mine(Probe):
    """A method that no file of fedsim's has."""

    pull: float = Field(1.0, gt=0, search=Log(0.1, 10.0))


HERE = os.getpid()  # the tests'; workers are sent this module by value


@component
class Fatal(Fleet):
    """As the ideal one, until it ends its own process: at a round that a file counts down to, and perhaps for ever."""

    file: str = ""
    again: bool = False
    instantaneous: ClassVar[bool] = True

    def costs(self, clients, rng):
        return Ideal().costs(clients, rng)

    def available(self, clients, rng):
        if os.getpid() == HERE:  # which asks too, before anything starts
            return Ideal().available(clients, rng)
        left = int(Path(self.file).read_text())
        Path(self.file).write_text(str(0 if self.again else left - 1))
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return Ideal().available(clients, rng)


@pytest.fixture(scope="module")
def ray(cluster):
    """These tests stand where a sweep's driver actor would."""
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return cluster


@pytest.fixture(scope="module")
def mistaken(features_dir, tmp_path_factory) -> Path:
    """The small features, each class with the prototype of another one: what is not trained is wrong."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "features.parquet").write_bytes((features_dir / "features.parquet").read_bytes())
    classes = pd.read_parquet(features_dir / "classes.parquet")
    classes.assign(prototype=np.roll(classes.prototype, 1)).to_parquet(folder / "classes.parquet")
    return folder


@pytest.fixture(scope="module")
def base(mistaken):
    """Makes a base config whose step is far too small: one linear layer on the small features."""

    def make(**fields):
        quick = {"dataset": "features", "data_dir": mistaken, "held_out": ("ink",), "clients": 6, "rounds": 4}
        return Config(**quick | {"method": {"name": "probe", "lr": 1e-6}} | fields)

    return make


def sweep_of(config, out, **fields):
    quick = {"search": ("method.lr=1e-6:1",), "trials": 4, "at_once": 1, "report_seeds": (), "loggers": ()}
    return Sweep(config=config, out=out, **quick | fields)


def swept(sweep, progress=lambda event: None):
    return search(prepare_sweep(sweep), progress)


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder / STUDY}")


def counts_in(folder: Path) -> dict[int | str, bytes]:
    """Counts by round, and of zero-shot CLIP, as they were written."""
    first, *others = entries_of((folder / HISTORY).read_bytes())
    rounds = {int(entry["validation"][0]): entry["scores"] for entry in others if "scores" in entry}
    return {name: counts.tobytes() for name, counts in rounds.items()} | {"zero_shot": first["zero_shot"].tobytes()}


def flat(counts: bytes) -> Counts:
    return Counts.from_flat(np.frombuffer(counts, np.int32))


def trials_of(folder: Path) -> list[tuple]:
    """All that a study knows of its trials but when and for how long."""
    return [
        (trial.number, trial.state, trial.params, trial.values, trial.intermediate_values, trial.user_attrs["measures"])
        for trial in study_of(folder).trials
    ]


@pytest.fixture(scope="module")
def done(ray, base, tmp_path_factory):
    """A sweep over a learning rate, that prunes; with the actors that were there when each of its trials had ended."""
    folder = tmp_path_factory.mktemp("sweep") / "done"
    actors = []

    def look(event):
        if event.stage == "trials" and event.done:
            names = descendants(os.getpid())
            actors.append({pid for pid, name in names.items() if name.startswith("ray::WorkerActor")})

    sweep = sweep_of(
        base(actors=1), folder, trials=8, grace=1, tuning_seeds=(1000, 1001), report_seeds=(0, 1), loggers="tensorboard"
    )
    return swept(sweep, look), folder, actors, sweep


def test_a_search_finds_a_better_step_than_the_base_config_has(done):
    found, folder, _, _ = done
    assert found.trials.validation[0] == found.trials.validation.min()  # the base config is tried first
    assert found.trials["probe.lr"][0] == 1e-6
    assert found.trials.validation[found.best_trial] == found.trials.validation.max()
    assert found.best_config["method"]["lr"] > 1e-4
    mean = pd.read_parquet(folder / REPORTING).groupby("config").personalization.mean()
    assert mean["best"] > mean["base"]


def test_what_is_written_is_what_was_found(done):
    found, folder, _, _ = done
    assert pd.read_parquet(folder / TRIALS).equals(found.trials)
    config = Config(**yaml.safe_load((folder / "best.yaml").read_text()))
    assert config.method.lr == found.trials["probe.lr"][found.best_trial]
    assert f"trial {found.best_trial}" in (folder / "sweep.html").read_text()
    assert list((folder / "tune" / "0000").glob("events.out.tfevents*"))


def test_trials_that_fall_behind_are_stopped(done):
    found, _, _, _ = done
    pruned = found.trials[found.trials.state == "pruned"]
    assert len(pruned) and (pruned.rounds < 4).all()
    assert (found.trials[found.trials.state == "complete"].rounds == 4).all()


def test_a_trial_is_a_run_on_each_tuning_seed_without_its_test_rows(done, tmp_path):
    found, folder, _, sweep = done
    accuracy = []
    for seed in sweep.tuning_seeds:
        there = folder / "trials" / f"{found.best_trial:04d}" / f"seed-{seed}"
        fields = yaml.safe_load((there / "config.yaml").read_text())
        assert fields["seed"] == seed
        alone = run(Config(**fields | {"out": tmp_path / str(seed), "actors": 0}))
        accuracy.append(alone.summary()["validation"])
        for round in range(5):
            mine = flat(counts_in(there)[round])
            theirs = alone.counts[round].scores
            assert np.array_equal(mine.scores[:, :5], theirs[theirs[:, 2] == VAL][:, :5])
            assert not mine.labels.any()  # which are of test rows
        assert set(flat(counts_in(there)["zero_shot"]).scores[:, 2]) == {VAL}
    assert found.trials.validation[found.best_trial] == np.mean(accuracy)


def test_reporting_is_on_seeds_that_no_trial_was_judged_on(done):
    _, folder, _, sweep = done
    reporting = pd.read_parquet(folder / REPORTING)
    assert sorted(zip(reporting.config, reporting.seed, strict=True)) == [
        ("base", 0),
        ("base", 1),
        ("best", 0),
        ("best", 1),
    ]
    seeds = [yaml.safe_load(file.read_text())["seed"] for file in (folder / "trials").rglob("config.yaml")]
    assert set(seeds) == set(sweep.tuning_seeds) and not set(seeds) & set(reporting.seed)


def test_a_method_of_ones_own_is_searched_around_its_own_values(base):
    mine = base(method=Mine(lr=0.5, pull=2.0))
    space = Space.parse(("method.lr=1e-3:1", "method.pull"), mine)
    assert space.defaults(mine) == {"test_sweep.Mine.lr": 0.5, "test_sweep.Mine.pull": 2.0}
    tried = config_of(mine, {"method": {"lr": 0.25}})
    assert (type(tried.method), tried.method.lr, tried.method.pull) == (Mine, 0.25, 2.0)
    with pytest.raises(InputError, match=r"method\.pull must be > 0, got -1"):
        config_of(mine, {"method": {"pull": -1}})


def test_trials_take_over_the_processes_of_those_before(done):
    found, _, actors, _ = done
    assert len(actors) == len(found.trials) == 8
    assert len(actors[0]) == 1 and all(here == actors[0] for here in actors)


def test_the_same_sweep_again_asks_for_no_trial(done):
    _, folder, _, sweep = done
    before = trials_of(folder)
    asked = []
    swept(sweep, asked.append)
    assert trials_of(folder) == before and "trials" not in [event.stage for event in asked]


@pytest.mark.parametrize(
    "fields, config, expected",
    [
        ({"search": ("method.lr=1e-6:2",)}, {}, "probe.lr was searched over 1e-06:1.0:log, and now is over 1e-06:2"),
        (
            {"search": ("method.lr=1e-6:1", "method.batch_size=8,16")},
            {},
            "probe.batch_size was not searched, and now is",
        ),
        ({"objective": "worst_tenth"}, {}, r"objective \['validation'\] there, \['worst_tenth'\] here"),
        ({"tuning_seeds": 7}, {}, r"tuning_seeds \[1000, 1001\] there, \[7\] here"),
        ({"pruner": "none"}, {}, "pruner 'asha' there, 'none' here"),
        ({}, {"rounds": 5}, r"\(rounds 4 there, 5 here\)"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused_by_what_differs(done, base, fields, config, expected):
    _, folder, _, _ = done
    same = {"grace": 1, "tuning_seeds": (1000, 1001), "report_seeds": (0, 1)}
    with pytest.raises(InputError, match=rf"holds another sweep .*{expected}"):
        prepare_sweep(sweep_of(base(actors=1, **config), folder, **same | fields))
    prepare_sweep(sweep_of(base(actors=0), folder, **same, trials=99, retries=0))  # no other search


SAME = {"search": ("method.lr=1e-6:1", "server.weighting=uniform,rows"), "trials": 6, "grace": 2, "reduction": 2}


@pytest.fixture(scope="module")
def whole(ray, base, tmp_path_factory):
    """A sweep that is not interrupted."""
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    swept(sweep_of(base(rounds=8), folder, **SAME))
    return folder


def test_a_killed_trial_goes_on_and_comes_to_the_same_bits(whole, base, tmp_path):
    (tmp_path / "countdown").write_text("10")  # rounds: the eight of the first trial, and two of the second
    fleet = Fatal(file=str(tmp_path / "countdown"))
    swept(sweep_of(base(rounds=8, fleet=fleet), tmp_path / "killed", **SAME))
    assert int((tmp_path / "countdown").read_text()) < 0
    assert trials_of(tmp_path / "killed") == trials_of(whole)
    attempts = [trial.user_attrs["attempts"] for trial in study_of(tmp_path / "killed").trials]
    assert attempts == [1, 2, 1, 1, 1, 1]
    ours, theirs = (
        {file.parent.relative_to(folder): counts_in(file.parent) for file in folder.glob(f"trials/*/{HISTORY}")}
        for folder in (tmp_path / "killed", whole)
    )
    assert ours == theirs


def test_a_trial_that_fails_says_why_and_the_others_go_on(ray, base, tmp_path):
    method = {"name": "probe", "optimizer": "sgd", "weight_decay": 1e3}
    how = {"search": ("method.lr=1e-6,1e38",), "sampler": "random", "sweep_seed": 1, "report_seeds": 7}
    found = swept(sweep_of(base(method=method | {"lr": 1e-6}), tmp_path / "out", **how))
    diverged = found.trials["probe.lr"] == 1e38
    assert 0 < diverged.sum() < 4
    assert list(found.trials.state == "fail") == list(diverged)
    assert found.trials.failed[diverged].str.startswith("training diverged: in round").all()
    trials = study_of(tmp_path / "out").trials
    assert [trial.user_attrs["attempts"] for trial in trials] == [1, 1, 1, 1]  # it would diverge again
    # To Optuna it is pruned, or its sampler would not learn to stay away.
    assert [trial.state == TrialState.PRUNED for trial in trials] == list(diverged)
    assert not list((tmp_path / "out" / "trials").glob("*/checkpoint.safetensors"))  # of trials that have ended
    # The best is the base config itself, and is run once.
    best, base = (found.reporting[found.reporting.config == which].iloc[0] for which in ("best", "base"))
    assert best.drop("config").equals(base.drop("config"))
    assert [folder.name for folder in (tmp_path / "out" / "reporting").iterdir()] == ["base-7"]


def test_a_disk_that_cannot_be_written_fails_no_trial_and_the_same_command_goes_on(ray, base, tmp_path):
    swept(sweep_of(base(), tmp_path / "out", trials=1))
    sweep = sweep_of(base(), tmp_path / "out", trials=2, retries=0)
    in_the_way = tmp_path / "out" / "trials" / "0001" / HISTORY
    claim(in_the_way.parent, "run")
    in_the_way.mkdir()
    with pytest.raises(Stopped, match=rf"1 of 2 trials have ended \({in_the_way}: Is a directory\); the same command"):
        swept(sweep)
    in_the_way.rmdir()
    assert list(swept(sweep).trials.state) == ["complete"] * 2


def test_a_sweep_that_waited_for_another_one_in_its_folder_does_not_go_on_with_that(ray, base, tmp_path):
    later = prepare_sweep(sweep_of(base(), tmp_path / "out", search=("method.lr=1e-2:1",)))
    swept(sweep_of(base(), tmp_path / "out", trials=1))
    with pytest.raises(InputError, match="holds another sweep"):
        search(later, print)
    assert len(study_of(tmp_path / "out").trials) == 1


def test_a_trial_that_kills_every_process_is_given_up(ray, base, tmp_path):
    (tmp_path / "countdown").write_text("0")
    fleet = Fatal(file=str(tmp_path / "countdown"), again=True)
    sweep = sweep_of(base(fleet=fleet), tmp_path / "out", trials=1, retries=1)
    with pytest.raises(InputError, match=r"none of 1 trials has finished; .*its process failed 2 times: it was"):
        swept(sweep)
    assert list(pd.read_parquet(tmp_path / "out" / TRIALS).state) == ["fail"]
    assert "its process failed 2 times" in (tmp_path / "out" / "sweep.html").read_text()


def test_several_objectives_give_a_front_and_the_best_of_it_by_validation(ray, base, tmp_path):
    space = ("method.lr=1e-6:1", "cohort=1:6")
    found = swept(sweep_of(base(), tmp_path / "out", search=space, objective="validation,bytes", trials=6, at_once=2))
    assert list(found.trials.state) == ["complete"] * 6
    numbers = {int(file.stem) for file in (tmp_path / "out" / "pareto").iterdir()}
    points = list(zip(found.trials.validation, found.trials.bytes, strict=True))
    beaten = {
        k
        for k, (high, low) in enumerate(points)
        if any(a >= high and b <= low and (a, b) != (high, low) for a, b in points)
    }
    assert numbers == set(range(6)) - beaten
    assert found.trials.validation[found.best_trial] == found.trials.validation.max()
    # A probe of 24 x 4 float32, down and up, to each of the cohort in each of 4 rounds.
    assert list(found.trials.bytes) == list(found.trials.cohort * 4 * 2 * 24 * 4 * 4)


def test_more_trials_at_once_than_fit_are_refused_before_anything_is_written(ray, base, tmp_path):
    sweep = sweep_of(base(), tmp_path / "out", at_once=3)
    with pytest.raises(InputError, match="--at-once 3 trials of 1 CPU each, but the cluster has room for 2"):
        swept(sweep)
    with pytest.raises(InputError, match=r"--at-once 2 trials of 2 actors of 1 CPU each, .* room for 1"):
        swept(sweep_of(base(actors=2), tmp_path / "out", at_once=2))
    with pytest.raises(InputError, match="--actors 3 for each trial, but the cluster has room for 2 of 1 CPU"):
        swept(sweep_of(base(actors=3), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_methods_with_and_without_clip_s_towers_are_tried_side_by_side(ray, tmp_path):
    rng = np.random.default_rng(0)
    for domain in ("ink", "oil"):
        for label in ("cat", "dog"):
            (tmp_path / "pictures" / domain / label).mkdir(parents=True)
            for k in range(10):
                pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / domain / label / f"{k}.png")
    fields = {"dataset": "folder", "data_dir": tmp_path / "pictures", "clients": 2, "partition": "iid", "rounds": 1}
    config = Config(**fields, method="probe", actors=0)
    space = ("method=probe,promptfl",)
    found = swept(sweep_of(config, tmp_path / "out", search=space, sampler="random", sweep_seed=1))
    assert set(found.trials.method) == {"probe", "promptfl"}
    assert list(found.trials.state) == ["complete"] * 4


BAD = {
    "seeds that are both": (
        {"tuning_seeds": (1, 2), "report_seeds": (2, 3)},
        {},
        "seeds 2 are both tuning and",
    ),
    "no seeds": ({"tuning_seeds": ()}, {}, "--tuning-seeds needs at least one seed"),
    "a seed twice": ({"tuning_seeds": "1,1"}, {}, "seeds must be distinct integers >= 0, got 1, 1"),
    "an objective": ({"objective": "test"}, {}, "no objective 'test'; available: validation, worst_tenth, bytes"),
    "one twice": ({"objective": "bytes,bytes"}, {}, "each once, got bytes, bytes"),
    "a clock that stands": ({"objective": ("validation", "clock_s")}, {}, "clock_s needs a fleet whose clients take"),
    "a pruner of two": (
        {"objective": "validation,bytes", "pruner": "asha"},
        {},
        "pruner asha needs validation or worst_tenth as the only objective, got validation, bytes",
    ),
    "a pruner of a cost": (
        {"objective": "bytes", "pruner": "median"},
        {},
        "pruner median needs validation or worst_tenth as the only objective, got bytes",
    ),
    "traffic that is the same": (
        {"objective": "validation,bytes", "search": ("method.lr", "method.batch_size")},
        {},
        r"objective bytes does not depend on what is searched \(probe.batch_size, probe.lr\); search cohort as well",
    ),
    "compute that is the same": (
        {"objective": "validation,flops", "search": ("method.lr",)},
        {},
        "objective flops does not depend on what is searched",
    ),
    "a logger": ({"loggers": "tensorbord"}, {}, "no logger 'tensorbord'; available: tensorboard, mlflow, wandb"),
    "trials": ({"trials": 0}, {}, "trials must be >= 1, got 0"),
    "a field": ({"trails": 3}, {}, "no field 'trails' in Sweep; available: config, search, trials"),
    "a space": ({"search": ("method.lr=1:2:3",)}, {}, "a range is LOW:HIGH"),
    "other data": ({"search": ("skip_unreadable=true,false",)}, {}, "all trials of a sweep use the same data"),
    "who judges": ({"search": ("eval_clients=1:3",)}, {}, "it changes how trials are evaluated"),
    "another deal": ({"search": ("clients=3:6",)}, {}, "this data set has no test split"),
    "too large a cohort": ({"search": ("cohort",)}, {}, "a cohort of 100 from 6 clients"),
    "a rule of many": (
        {"search": ("server=fedavg,krum",)},
        {"cohort": 4},
        "krum with f 1 needs at least 5 clients per round",
    ),
    "no rounds": ({}, {"rounds": 0}, "a sweep needs --rounds 1 or more"),
    "the base config": ({}, {"cohort": 40}, "cohort of 40 from 6 clients"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sweep_is_one_sentence_and_writes_nothing(case, base, tmp_path):
    fields, config, expected = BAD[case]
    with pytest.raises(InputError, match=expected):
        prepare_sweep(sweep_of(base(**config), tmp_path / "out", **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_sweep_on_the_command_line_is_refused_without_ray(mistaken, tmp_path):
    code = (
        "import sys; from fedsim.__main__ import main; code = main(); assert 'ray' not in sys.modules; sys.exit(code)"
    )
    flags = ["--dataset=features", f"--data-dir={mistaken}", "--search", "method.lr", "server=krum,fedavg"]
    command = [sys.executable, "-c", code, "sweep", *flags, "--tuning-seeds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("fedsim: seeds 0 are both") and not list(tmp_path.iterdir())


def test_flags_describe_the_base_config_and_the_sweep_around_it(mistaken):
    ours = ["--search", "method.lr", "server=fedavg,fedavgm", "--tuning_seeds", "7,8", "--report-seeds", "--loggers"]
    theirs = ["--dataset=features", f"--data-dir={mistaken}", "--method", "probe", "--rounds", "9", "--out", "here"]
    sweep, _ = parse_sweep([*ours, "--at-once=3", *theirs])
    assert (sweep.search, sweep.at_once) == (("method.lr", "server=fedavg,fedavgm"), 3)
    assert (sweep.tuning_seeds, sweep.report_seeds, sweep.loggers) == ((7, 8), (), ())
    assert (name_of(sweep.config.method), sweep.config.rounds, sweep.config.out) == ("probe", 9, None)
    assert sweep.folder() == Path("here").absolute()
    default = parse_sweep(theirs[:-2])[0]
    assert default.folder().parts[0] == "sweeps" and default.folder().name.startswith("features-probe-fedavg-")
    assert default.folder() == parse_sweep([*theirs[:-2], "--trials=9", "--actors=1"])[0].folder()
    assert default.folder() != parse_sweep([*theirs[:-2], "--grace=9"])[0].folder()
    with pytest.raises(InputError, match="no flag --seed: a sweep has --tuning-seeds, and --report-seeds to report on"):
        parse_sweep(["--seed", "3"])


def test_a_file_describes_a_sweep_which_flags_override_and_whose_own_file_repeats_it(mistaken, tmp_path):
    study = tmp_path / "study.yaml"
    fields = {"config": {"method": {"name": "probe", "lr": 0.5}, "rounds": 9}, "search": ["method.lr"], "trials": 7}
    study.write_text(yaml.safe_dump(fields))
    data = ["--dataset=features", f"--data-dir={mistaken}", "--held-out=ink"]
    sweep, origin = parse_sweep(["--config", str(study), *data, "--rounds=5", "--grace=2"])
    assert (sweep.search, sweep.trials, sweep.grace, origin) == (("method.lr",), 7, 2, f"config {study}")
    assert (sweep.config.method.lr, sweep.config.rounds) == (0.5, 5)
    assert parse_sweep(["--config", str(study), "--trials=3"])[0].trials == 3
    again = tmp_path / "sweep.yaml"
    again.write_text(yaml.safe_dump(sweep.plain()))
    assert parse_sweep(["--config", str(again)])[0].plain() == sweep.plain()


def test_a_config_of_a_run_is_the_base_of_a_sweep(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("method: probe\nrounds: 9\nout: runs/mine\n")
    sweep, _ = parse_sweep(["--config", str(file)])
    assert (name_of(sweep.config.method), sweep.config.rounds, sweep.out) == ("probe", 9, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "search: [method.lr]\nrounds: 9\n",
            "describes a sweep, which has no field 'rounds'; available: config",
        ),
        ("config: [1]\n", r"config expects a mapping of fields to values, got \[1\]"),
        ("config: {roundz: 9}\n", "no field 'roundz'"),
        ("search: [method.lr]\ntrials: many\n", "trials must be an integer, got 'many'"),
    ],
)
def test_a_bad_file_of_a_sweep_is_one_sentence(text, expected, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        parse_sweep(["--config", str(tmp_path / "study.yaml")])


def test_a_logger_that_is_not_installed_is_named(base, tmp_path):
    from importlib.util import find_spec

    if find_spec("wandb"):
        pytest.skip("it is")
    with pytest.raises(InputError, match="logger wandb needs the package wandb, which is not installed"):
        prepare_sweep(sweep_of(base(), tmp_path / "out", loggers="wandb"))


def test_a_folder_of_a_run_is_no_place_for_a_sweep(base, tmp_path):
    run(base(out=tmp_path / "run", actors=0, rounds=1))
    with pytest.raises(InputError, match=r"holds a run, not a sweep; give another --out"):
        prepare_sweep(sweep_of(base(), tmp_path / "run"))


def test_clients_without_validation_rows_are_no_judges(tmp_path):
    domains = "ink", "oil"
    rows = [
        {"feature": [k + 1.0, 1.0], "label": "cat" if k % 2 else "dog", "domain": d} for d in domains for k in range(4)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "features.parquet")
    pd.DataFrame({"class": ["cat", "dog"], "prototype": [[1.0, 0.0], [0.0, 1.0]]}).to_parquet(
        tmp_path / "classes.parquet"
    )
    config = Config(dataset="features", data_dir=tmp_path, partition="iid", clients=1, train_share=0.9, held_out="oil")
    with pytest.raises(InputError, match="none of 1 clients has validation rows, on which trials are evaluated"):
        prepare_sweep(sweep_of(config, tmp_path / "out"))


def test_a_trial_whose_partition_leaves_no_validation_rows_is_refused(base, tmp_path):
    experiment = encode_experiment(prepare(base(out=tmp_path / "base")), Sizing(actors=0), lambda event: None)
    with open_pool(Sizing(actors=0), 1) as pool:
        trial = Trial(experiments_of(experiment, {"train_share": 0.99}, (1,), tmp_path, 0), pool)
        with pytest.raises(InputError, match="no client has validation rows, on which trials are evaluated"):
            trial.advance()


def test_a_killed_sweep_goes_on_to_what_it_would_have_been(machine, whole, base, mistaken, tmp_path):
    killed = sweep_of(base(rounds=8), tmp_path / "killed", **SAME)
    flags = ["--dataset=features", f"--data-dir={mistaken}", "--held-out=ink", "--clients=6", "--rounds=8"]
    flags += ["--method=probe", "--method.lr=1e-6", f"--address={machine.address}", f"--out={killed.out}"]
    flags += ["--trials=5", "--grace=2", "--reduction=2", "--at-once=1", "--report-seeds", "--loggers", "--search"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim", "sweep", *flags, *killed.search],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    begun = killed.out / "trials" / "0002" / HISTORY
    while not begun.exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    states = [trial.state for trial in study_of(killed.out).trials]
    assert 3 <= len(states) <= 5 and TrialState.RUNNING in states
    swept(killed)  # with one trial more: that may grow
    assert trials_of(killed.out) == trials_of(whole)


# The study itself, which knows nothing of Ray ---------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 100, 0.2, 0.5])
def test_a_damaged_study_is_one_sentence(place, tmp_path):
    follow(Study(tmp_path, Rules()), 2)
    file = tmp_path / STUDY
    data = file.read_bytes()
    start = place if isinstance(place, int) else int(place * len(data)) // 4096 * 4096
    file.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    with pytest.raises(InputError, match=rf"{file} is damaged \(.*\); delete {tmp_path} to start again"):
        Study(tmp_path, Rules())


def ask(trial) -> dict:
    return {"method": {"lr": trial.suggest_float("probe.lr", 1e-5, 1, log=True)}}


def accuracy(fields: dict, round: int) -> dict[str, float]:
    return {"validation": round / 100 - abs(np.log10(fields["method"]["lr"]) + 2) / 10}


def follow(study: Study, trials: int, steps: int = -1) -> None:
    """Trials of 10 rounds, until so many have ended, or so many rounds are done."""
    while study.ended() < trials:
        asked = study.ask(ask)
        for round in range(1, 11):
            if steps == 0:
                return
            steps -= 1
            measures = accuracy(asked.fields, round)
            if round == 10:
                study.finish(asked.number, round, measures)
            elif study.report(asked.number, round, measures):
                break


@pytest.mark.parametrize("sampler, pruner", [("tpe", "asha"), ("random", "median"), ("nsga2", "asha")])
def test_a_study_opened_again_asks_what_it_would_have_asked(sampler, pruner, tmp_path):
    rules = Rules(sampler=sampler, pruner=pruner, grace=2)
    for name, steps in (("whole", -1), ("left", 60)):
        (tmp_path / name).mkdir()
        study = Study(tmp_path / name, rules)
        study.describe({}, {"probe.lr": 0.5})
        follow(study, 14, steps)
    follow(Study(tmp_path / "left", rules), 14)
    assert trials_of(tmp_path / "left") == trials_of(tmp_path / "whole")
    first, *others = study_of(tmp_path / "whole").trials
    assert first.params == {"probe.lr": 0.5}
    assert {TrialState.PRUNED, TrialState.COMPLETE} == {trial.state for trial in others}


class Killed(Exception):
    pass


@pytest.mark.parametrize("pruner", ["asha", "median"])
@pytest.mark.parametrize("validation", [0.1, 0.95])
def test_what_the_pruner_said_before_a_kill_holds_after_it(pruner, validation, tmp_path, monkeypatch):
    def said(study, rounds):
        number = study.ask(suggest).number
        return [study.report(number, round, {"validation": validation}) for round in rounds]

    study = Study(tmp_path, Rules(pruner=pruner, grace=2))
    for _ in range(6):
        number = study.ask(suggest).number
        for round in range(1, 5):
            study.report(number, round, {"validation": 0.8})
        study.finish(number, 6, {"validation": 0.8})

    def killed(*args, **about):
        raise Killed

    monkeypatch.setattr(study, "_end", killed)
    rounds = range(1, 3)
    if validation == 0.1:
        with pytest.raises(Killed):
            said(study, rounds)
    else:
        assert not any(said(study, rounds))
    again = Study(tmp_path, Rules(pruner=pruner, grace=2))
    *before, last = said(again, rounds)
    assert not any(before) and last == (validation == 0.1)
    assert again.optuna.trials[6].state == (TrialState.PRUNED if last else TrialState.RUNNING)


def suggest(trial):
    return {"method": {"lr": trial.suggest_float("probe.lr", 1e-6, 1, log=True)}}


def test_a_study_in_a_folder_of_an_odd_name_is_in_that_folder(tmp_path):
    folder = tmp_path / "50% #1?mode=memory"
    folder.mkdir()
    follow(Study(folder, Rules()), 1)
    assert [file.name for file in folder.iterdir()] == [STUDY] and Study(folder, Rules()).ended() == 1
