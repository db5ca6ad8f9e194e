"""Runs side by side are the runs that they are alone, whatever happens to one of them."""

import os
import signal
import subprocess
import sys
from functools import partial
from threading import Event, Thread

import numpy as np
import pytest
from conftest import run_until
from test_bits import descendants, result
from test_rows_in_use import drawings as drawings  # fixtures
from test_rows_in_use import encoded_images, in_use, same_counts
from test_rows_in_use import few as few
from test_rows_in_use import weights as weights

from fedsim import run, run_all
from fedsim.checkpoint import NAME
from fedsim.errors import Diverged, InputError
from fedsim.folder import CONFIG

pytestmark = pytest.mark.ray


@pytest.fixture
def pair(config, tmp_path):
    """Makes a config that is run alone, and the same one to be run among others."""
    return lambda name, **fields: [config(**fields, out=tmp_path / where / name) for where in ("alone", "many")]


def test_finished_runs_come_back_at_once_and_no_cluster_is_started(config, tmp_path):
    configs = [config(seed=seed, out=tmp_path / str(seed)) for seed in range(2)]
    for one in configs:
        run(one)
    reports = run_all(configs)
    assert next(reports)[0] == 0
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    assert [place for place, _ in reports] == [1]


def test_runs_side_by_side_give_the_bits_that_each_gives_alone(cluster, pair, tmp_path):
    # Of clients of two kinds, on the same data; one that keeps something; one that was interrupted; one that is done.
    pairs = [
        pair("averaged"),
        pair("iid", partition="iid", clients=5, cohort=2, method="probe"),
        pair("kept", server="local_only"),
        pair("interrupted", seed=1),
        pair("done", seed=2),
    ]
    for alone, _ in pairs:
        run(alone)
    many = [config for _, config in pairs]
    run_until(2, many[3])
    run(many[4])
    events = []
    reports = dict(run_all(many, progress=events.append))
    assert sorted(reports) == [0, 1, 2, 3, 4]
    assert [(event.done, event.total) for event in events if event.stage == "runs"] == [(k, 5) for k in range(1, 6)]
    for place, (alone, config) in enumerate(pairs):
        assert result(config.folder()) == result(alone.folder())
        assert reports[place].experiment["seed"] == alone.seed
        assert reports[place].summary() == run(alone).summary()


def test_the_rows_of_all_runs_are_encoded_once_and_each_is_that_of_run(cluster, few, tmp_path):
    # The architecture of the small model is known in this process alone.
    few = partial(few, backbone=None, pretrained=None)
    configs = [few(partition_seed=seed, out=tmp_path / f"many-{seed}") for seed in (0, 1)]
    (_, first), (_, second) = map(in_use, configs)
    events = []
    reports = dict(run_all(configs, progress=events.append))
    assert encoded_images(events) == len(np.union1d(first, second)) > len(first)
    for seed, report in reports.items():
        alone = run(few(partition_seed=seed, out=tmp_path / f"alone-{seed}"))
        same_counts(report, alone)
        assert report.facts["features"] == alone.facts["features"]
    assert len(run(few(partition_seed=1, out=tmp_path / "many-1", rounds=3)).rounds) == 3
    assert (tmp_path / "many-1" / CONFIG).exists()


def test_a_run_that_fails_is_named_when_all_others_have_ended(cluster, config, tmp_path):
    far = {"name": "fedclip", "lr": 1e30, "optimizer": "sgd"}
    configs = [config(method=far, out=tmp_path / "far"), *(config(seed=k, out=tmp_path / str(k)) for k in range(2))]
    ended = []
    with pytest.raises(Diverged, match=rf"{tmp_path}/far: training diverged: in round \d"):
        ended += [place for place, _ in run_all(configs, at_once=1)]
    with pytest.raises(Diverged, match=r"2 of 4 runs failed; \S+/far: training diverged: .*; and other"):
        ended += [place for place, _ in run_all([config(method=far, seed=9, out=tmp_path / "other"), *configs][::-1])]
    assert (tmp_path / "0" / "scores.parquet").exists() and (tmp_path / "1" / "scores.parquet").exists()


def test_bad_input_of_any_run_is_told_before_one_starts(config, tmp_path):
    good = config(out=tmp_path / "good")
    with pytest.raises(InputError, match="no domain 'wood' to hold out"):
        run_all([good, config(held_out=("wood",), out=tmp_path / "bad")])
    with pytest.raises(InputError, match=r"runs 0 and 2 share the folder \S+/good; each needs its own out"):
        run_all([good, config(seed=1), config(seed=2, out=tmp_path / "good")])
    with pytest.raises(InputError, match="at_once must be 1 or more, got 0"):
        run_all([good], at_once=0)
    assert not os.listdir(tmp_path)


def test_a_run_whose_process_is_killed_is_gone_on_with_in_another(cluster, pair):
    alone, ours = pair("killed", rounds=60)
    run(alone)
    over, killed = Event(), []

    def kill():
        while not (ours.folder() / NAME).exists() and not over.wait(0.005):
            pass
        for pid, title in descendants(os.getpid()).items():
            if title.startswith("ray::_simulate"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = Thread(target=kill)
    killer.start()
    try:
        [(place, _)] = run_all([ours])
    finally:
        over.set()
        killer.join()
    assert place == 0 and killed
    assert result(ours.folder()) == result(alone.folder())


def test_who_stops_asking_ends_the_others_and_leaves_their_folders(cluster, config, tmp_path):
    short, long = config(out=tmp_path / "short"), config(rounds=100_000, out=tmp_path / "long")
    reports = run_all([short, long])
    assert next(reports)[0] == 0
    reports.close()
    from filelock import FileLock

    with FileLock(tmp_path / "long" / ".lock", timeout=0):
        assert not (tmp_path / "long" / "scores.parquet").exists()


CARELESS = """
import sys
from fedsim import Config, run_all
configs = [Config(dataset="features", data_dir=sys.argv[1], rounds=rounds, out=f"{sys.argv[2]}/{rounds}", clients=4,
                  partition="iid") for rounds in (1, 5000)]
reports = run_all(configs)
for place, report in reports:
    raise RuntimeError("the caller fails")
"""


def test_a_caller_that_fails_ends_at_once_with_its_own_error(features_dir, tmp_path):
    # The name keeps the generator alive until the interpreter exits, after Ray has ended.
    command = [sys.executable, "-c", CARELESS, str(features_dir), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("RuntimeError: the caller fails"), ended.stderr
