"""What two actors compute is, to the bit, what one process does; whatever the run, even if one of them is killed.

All of these runs share the two actors, since each takes a while to import torch; they aggregate in this process, as a
driver actor would. Runs with a driver actor are in test_bits.py.
"""

import os
import signal
from contextlib import nullcontext
from threading import Timer

import pandas as pd
import pytest
import torch
from test_bits import result, workers
from test_features import features as features  # fixtures
from test_features import file_of, quiet
from test_features import images as images
from test_features import weights as weights
from test_scale import SLOW
from test_towers import pictures as pictures
from test_towers import small as small

from fedsim import run
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.encoding import encode
from fedsim.prepare import prepare
from fedsim.simulate import simulate

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_actors(cluster):
    with open_pool(Sizing(actors=2), 2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def shared(two_actors, monkeypatch):
    """Lets whatever opens a pool of two actors have these; they are there to the end."""

    def pool_of(sizing, jobs):
        return nullcontext(two_actors) if sizing.actors == 2 else open_pool(sizing, jobs)

    for module in ("simulate", "encoding"):
        monkeypatch.setattr(f"fedsim.{module}.open_pool", pool_of)


def on_actors(config, progress=quiet):
    return simulate(prepare(config), progress)


class Killer:
    """Kills one of the actors while it works: soon after the first round has been reported."""

    def __init__(self, delay_s):
        self.killed, self.timer = [], Timer(delay_s, self.kill)

    def __call__(self, event):
        if event.stage == "training" and event.done == 1:
            self.timer.start()

    def kill(self):
        self.killed.append(workers()[0])
        os.kill(self.killed[0], signal.SIGKILL)

    @property
    def succeeded(self):
        self.timer.join()
        return bool(self.killed) and self.killed[0] not in workers()


def test_both_towers_and_private_tensors_and_optimizers_in_files_survive_a_killed_actor(small, tmp_path):
    method = {"name": "lora", "towers": "both", "modules": "all", "batch_size": 8, "persist_optimizer": True}
    server = {"name": "fedper", "prefix": "down"}
    fields = {"method": method, "server": server, "partition": "iid", "clients": 2, "rounds": 3}
    here = run(small(**fields, out=tmp_path / "here"))
    killer = Killer(0.1)
    there = on_actors(small(**fields, out=tmp_path / "there", actors=2), killer)
    assert killer.succeeded
    assert here.tables().scores.equals(there.tables().scores)
    assert all(torch.equal(here.adapter[name], there.adapter[name]) for name in here.adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"server": "fedavg", "cohort": 3, "over_selection": 0.5, "deadline_s": 60.0},
        {"server": {"name": "fedbuff", "buffer": 3, "concurrency": 4}},
    ],
    ids=["a deadline", "a buffer"],
)
def test_simulated_time_is_the_same(fields, config, tmp_path):
    fields = {"clients": 6, "partition": "iid", "rounds": 5, "fleet": SLOW} | fields
    ways = [config(**fields, actors=actors, out=tmp_path / str(actors)) for actors in (0, 2)]
    run(ways[0])
    on_actors(ways[1])
    alone, two = (pd.read_parquet(way.folder() / "rounds.parquet").drop(columns="seconds") for way in ways)
    assert alone.equals(two) and alone.clock_s.iloc[-1] > 0
    assert result(ways[0].folder()) == result(ways[1].folder())


def test_a_cohort_from_a_hundred_thousand_clients_learns_and_is_the_same(config, tmp_path):
    fields = {
        "dataset": {"name": "synthetic", "width": 32},
        "partition": "natural",
        "clients": 100_000,
        "cohort": 20,
        "eval_clients": 30,
        "held_out": ("domain 2",),
        "data_dir": None,
        "method": {"name": "probe", "lr": 0.03},
        "rounds": 8,
    }
    report = run(config(**fields, out=tmp_path / "alone"))
    assert report.summary()["personalization"] > report.summary("zero_shot")["personalization"]
    assert len(report.tables().trained.scores.client.unique()) == 31
    on_actors(config(**fields, actors=2, out=tmp_path / "two"))
    assert result(tmp_path / "two") == result(tmp_path / "alone")


def test_encoding_writes_the_same_file(images, weights, features, tmp_path):
    theirs = encode(images, weights, ("a picture of a {}",), tmp_path, Sizing(actors=2), quiet)
    assert file_of(theirs).read_bytes() == file_of(features).read_bytes()
