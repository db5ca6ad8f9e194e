"""What keeps a run of many clients small: who is judged, how often, what is kept where, and a disk that is full."""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_until

from fedsim import run
from fedsim.checkpoint import load_checkpoint
from fedsim.errors import InputError, Stopped
from fedsim.training.client_store import PrivateStore
from fedsim.training.trainer import Trainer

SLOW = {"name": "lognormal", "availability": 0.8, "dropout": 0.1}


def tables(folder: Path) -> dict[str, bytes]:
    names = "scores.parquet", "partition.parquet", "adapter.safetensors"
    return {name: (folder / name).read_bytes() for name in names}


def test_evaluation_every_other_round_says_what_every_round_said(config, tmp_path):
    often, seldom = (run(config(clients=4, rounds=5, eval_every=k, page=k == 2, out=tmp_path / str(k))) for k in (1, 2))
    assert list(often.counts) == [0, 1, 2, 3, 4, 5] and list(seldom.counts) == [0, 2, 4, 5]
    assert all(np.array_equal(counts.flat(), often.counts[round].flat()) for round, counts in seldom.counts.items())
    assert seldom.chosen_round in seldom.counts
    assert "report.html" in os.listdir(tmp_path / "2")


def test_some_clients_may_be_judged_in_place_of_all(config, tmp_path):
    everyone = run(config(clients=6, partition="iid", out=tmp_path / "all"))
    some = run(config(clients=6, partition="iid", eval_clients=2, out=tmp_path / "some"))
    judged = set(some.tables().trained.scores.client) - {6}  # 6 is the held-out domain
    assert len(judged) == 2
    assert set(some.tables().partition.client) == judged | {6}
    theirs = everyone.tables().scores[lambda table: table.client.isin([*judged, 6])]
    assert some.tables().scores.equals(theirs.reset_index(drop=True))  # the same parameters


def test_what_clients_keep_is_in_files_that_a_killed_round_leaves_whole(config, tmp_path, monkeypatch):
    fields = {"server": "local_only", "clients": 4, "partition": "iid", "cohort": 2, "rounds": 6}
    whole = config(**fields, out=tmp_path / "whole")
    run(whole)

    class Killed(Exception):
        pass

    write, left = PrivateStore.write, iter(range(5, -1, -1))

    def kill(self, *args):
        if not next(left, 1):
            raise Killed  # of the two clients of round 3, one has written
        write(self, *args)

    ours = config(**fields, out=tmp_path / "killed")
    monkeypatch.setattr(PrivateStore, "write", kill)
    with pytest.raises(Killed):
        run(ours)
    state, report = load_checkpoint(ours.folder(), ours.experiment())
    folder = ours.folder() / "private"
    kept = {(k, r) for index in (state.private, report.private) for k, r in enumerate(index) if r}
    there = {file.name for file in folder.iterdir()}
    assert state.round == 2 and len(there - {f"client-{k}-round-{r}.safetensors" for k, r in kept}) == 1
    (folder / "client-0-round-99.safetensors").write_bytes(b"of a round that was never done")
    run(ours)
    assert tables(ours.folder()) == tables(whole.folder())
    mine, theirs = ({f.name: f.read_bytes() for f in (c.folder() / "private").iterdir()} for c in (ours, whole))
    assert mine == theirs and mine


def test_a_private_file_that_is_gone_is_one_sentence(tmp_path):
    store = PrivateStore(tmp_path)
    store.write(3, 7, {"w": torch.ones(2)})
    assert store.read(3, 7)["w"].tolist() == [1.0, 1.0] and store.read(3, 0) == {}
    store.prune([np.array([0, 0, 0, 7])])
    assert store.read(3, 7)["w"].tolist() == [1.0, 1.0]
    store.prune([np.array([0, 0, 0, 8])])
    with pytest.raises(InputError, match=r"client-3-round-7\.safetensors is missing: it was deleted"):
        store.read(3, 7)


@pytest.mark.parametrize("server", ["fedavg", {"name": "fedbuff", "buffer": 3, "concurrency": 4}])
def test_simulated_time_is_the_same_to_the_bit_after_a_kill(server, config, tmp_path):
    fields = {"clients": 6, "partition": "iid", "rounds": 5, "fleet": SLOW, "server": server}
    if server == "fedavg":
        fields |= {"cohort": 3, "over_selection": 0.5, "deadline_s": 60.0}
    whole = config(**fields, page=True, out=tmp_path / "whole")
    report = run(whole)
    clock = report.tables().rounds.clock_s
    assert (clock.diff().dropna() >= 0).all() and clock.iloc[-1] > 0
    assert "simulated seconds" in (whole.folder() / "report.html").read_text()

    ours = config(**fields, out=tmp_path / "killed")
    run_until(2, ours)
    run(ours)
    seconds = [pd.read_parquet(c.folder() / "rounds.parquet").drop(columns="seconds") for c in (whole, ours)]
    assert seconds[0].equals(seconds[1])
    assert tables(whole.folder()) == tables(ours.folder())


def test_a_buffer_of_stale_updates_is_trained_from_what_each_client_was_sent(config, monkeypatch):
    sent_by_version, mixed = {}, []
    train = Trainer.train

    def watch(self, task, round, sent, *others):
        for version, vector in sent.items():
            assert np.array_equal(sent_by_version.setdefault(version, vector.copy()), vector)  # the same ever after
        mixed.append(len(sent))
        return train(self, task, round, sent, *others)

    monkeypatch.setattr(Trainer, "train", watch)
    server = {"name": "fedbuff", "buffer": 2, "concurrency": 6}
    run(config(clients=6, partition="iid", rounds=6, fleet=SLOW, server=server))
    assert max(mixed) > 1  # parameters of several rounds in one buffer
    vectors = list(sent_by_version.values())
    assert len(vectors) > 3 and not any(np.array_equal(a, b) for a, b in pairwise(vectors))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of 300 kB cannot be mounted here: that takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays_whole(config, small_disk, tmp_path):
    whole = config(rounds=8, out=tmp_path / "whole")
    run(whole)
    ours = config(rounds=8, out=small_disk / "run")
    ballast = small_disk / "ballast"

    def fill(event):
        if event.stage == "training" and event.done == 3:
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1024)):
                        pass
                except OSError:
                    pass

    with pytest.raises(
        Stopped, match=rf"^no space left in {ours.folder()}; fix this and rerun the same command to resume"
    ):
        run(ours, fill)
    assert load_checkpoint(ours.folder(), ours.experiment())[0].round == 3
    assert not list(ours.folder().glob("**/part-*"))
    ballast.unlink()
    run(ours)
    assert tables(ours.folder()) == tables(whole.folder())
