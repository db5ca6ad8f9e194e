"""The same report, to the bit, whatever the actors do and whatever kills them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedsim import run
from fedsim.checkpoint import NAME, load_checkpoint
from fedsim.cluster.placement import Node, Placement, Sizing, plan
from fedsim.errors import InputError, Stopped

pytestmark = pytest.mark.ray

FILES = "scores.parquet", "partition.parquet", "adapter.safetensors"


def result(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, from /proc."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            continue
    below, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in below} - below
        below, grown = below | more, bool(more)
    return {child: names[child] for child in below - {pid}}


def workers(name: str = "ray::WorkerActor") -> list[int]:
    return sorted(pid for pid, line in descendants(os.getpid()).items() if line.startswith(name))


@pytest.fixture(scope="module")
def alone(features_dir, tmp_path_factory):
    """The run that the others must equal: in this process, 6 clients in 6 chunks."""
    from fedsim import Config

    folder = tmp_path_factory.mktemp("alone")
    fields = {
        "dataset": "features",
        "data_dir": features_dir,
        "held_out": "ink",
        "rounds": 40,
        "clients": 6,
        "tune_epochs": 2,
    }
    run(Config(**fields, actors=0, out=folder))
    return fields, result(folder)


def test_three_actors_give_the_same_bits_though_two_are_killed(cluster, alone, tmp_path):
    from fedsim import Config

    fields, expected = alone
    killed = []

    def kill_two(event):
        if event.stage == "training" and event.done >= 5 and not killed:
            killed.extend(workers()[:2])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    run(Config(**fields, actors=3, out=tmp_path), kill_two)
    assert len(killed) == 2 and not set(killed) & {*workers()}
    assert result(tmp_path) == expected


def test_a_killed_driver_stops_the_run_and_loses_no_round(cluster, alone, tmp_path):
    from fedsim import Config

    fields, expected = alone

    def kill_driver(event):
        if event.stage == "training" and event.done >= 5:
            for pid in workers("ray::DriverActor"):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(Stopped, match="the driver actor has died; the same command resumes"):
        run(Config(**fields, actors=1, out=tmp_path), kill_driver)
    config = Config(**fields, actors=0, out=tmp_path)
    assert load_checkpoint(tmp_path, config.experiment())[0].round >= 5
    run(config)
    assert result(tmp_path) == expected


def test_a_killed_run_resumes_to_the_same_bits(alone, tmp_path):
    from fedsim import Config

    fields, expected = alone
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "fedsim", "run", *flags, "--actors=0", f"--out={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / NAME).exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    config = Config(**fields, actors=0, out=tmp_path)
    state, _ = load_checkpoint(tmp_path, config.experiment())
    assert state.round < fields["rounds"], "it was killed too late to show anything"
    rounds = []
    run(config, lambda event: rounds.append(event.done) if event.stage == "training" else None)
    assert rounds[0] == state.round + 1
    assert result(tmp_path) == expected


def test_a_finished_run_is_not_run_again(alone, tmp_path):
    from fedsim import Config

    fields, _ = alone
    config = Config(**(fields | {"rounds": 2}), actors=0, out=tmp_path)
    first = run(config)
    events = []
    assert run(config, events.append).tables().trained.scores.equals(first.tables().trained.scores)
    assert [event.text for event in events] == ["already finished; nothing was run"]


def test_a_run_in_this_process_computes_with_its_own_number_of_threads(config):
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # sums of three would be rounded otherwise
    seen = []
    try:
        run(config(rounds=1), lambda event: seen.append((event.stage, torch.get_num_threads())))
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert ("training", 1) in seen and after == 3


def test_actors_are_sized_by_the_cluster():
    one, gpus = [Node("a", 8.0)], [Node("a", 8.0, 2)]
    assert plan(Sizing(), 10, one) == [Placement("a", 1.0, 0.0)] * 8
    assert plan(Sizing(), 3, one) == [Placement("a", 1.0, 0.0)] * 3
    assert plan(Sizing(actors=16), 99, one) == [Placement("a", 0.5, 0.0)] * 16
    assert plan(Sizing(threads_per_actor=4), 99, one) == [Placement("a", 4.0, 0.0)] * 2
    assert plan(Sizing(), 99, [Node("a", 8.0, memory_gb=1.5)]) == [Placement("a", 1.0, 0.0)] * 3
    assert plan(Sizing(), 99, gpus) == [Placement("a", 1.0, 0.5)] * 4
    assert plan(Sizing(), 1, gpus) == [Placement("a", 1.0, 1.0)]
    assert plan(Sizing(actors=5), 99, gpus) == [Placement("a", 1.0, 0.3333)] * 5
    assert plan(Sizing(gpus_per_actor=0), 99, gpus) == [Placement("a", 1.0, 0.0)] * 8


def test_actors_are_spread_over_the_nodes_in_proportion():
    nodes = [Node("a", 4.0), Node("b", 2.0), Node("head", 0.0)]
    small = [place.node for place in plan(Sizing(actors=3), 99, nodes)]
    assert small == ["a", "a", "b"]
    assert len(plan(Sizing(), 99, nodes)) == 6
    over = plan(Sizing(actors=12), 99, nodes)
    assert over == [Placement("a", 0.5, 0.0)] * 8 + [Placement("b", 0.5, 0.0)] * 4


def test_a_gpu_has_as_many_actors_as_fit_in_its_memory_and_no_actor_is_without_one():
    nodes = [Node("a", 8.0, 1, gpu_gb=80.0), Node("b", 8.0, 2, gpu_gb=16.0), Node("c", 64.0)]
    assert plan(Sizing(gpu_gb_per_actor=10), 99, nodes) == [
        *[Placement("a", 1.0, 0.1428)] * 7,  # 72 / 10
        *[Placement("b", 1.0, 1.0)] * 2,
    ]
    assert plan(Sizing(), 99, nodes) == [Placement("a", 1.0, 0.5)] * 2 + [Placement("b", 1.0, 0.5)] * 4


@pytest.mark.parametrize(
    "sizing, nodes, message",
    [
        (Sizing(gpus_per_actor=0.5), [Node("a", 8.0)], "0.5 on a cluster without a GPU"),
        (Sizing(actors=5, gpus_per_actor=0.5), [Node("a", 8.0, 2)], "the cluster's GPUs have room for 4"),
        (Sizing(actors=33), [Node("a", 2.0)], "--actors 33, but 2 CPUs are enough for 32 at most"),
        (Sizing(), [Node("a", 0.0)], "no node of the cluster has room for an actor"),
        (Sizing(gpu_gb_per_actor=40), [Node("a", 8.0, 1, gpu_gb=16.0)], "no node .* has room"),
    ],
)
def test_a_pool_that_cannot_be_placed_is_refused(sizing, nodes, message):
    with pytest.raises(InputError, match=message):
        plan(sizing, 99, nodes)
