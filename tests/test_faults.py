"""Faults are caused, not mocked: actors stopped, slow or killed in a call, a machine lost in a run, Ctrl-C."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from filelock import FileLock
from ray_start import QUIET, started
from test_bits import descendants, result

from fedsim import Config, run
from fedsim.checkpoint import NAME
from fedsim.cli.background import STATUS
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.errors import Stopped

pytestmark = pytest.mark.ray

ITEMS = range(12)
SQUARES = [item * item for item in ITEMS]
TRIPLES = [3 * item for item in ITEMS]
SOON = 1.0  # seconds a call may run: short for a test, long for a square


class Tripler:
    """Another worker."""

    def __init__(self, device: str) -> None:
        pass

    def square(self, item: int) -> int:
        return 3 * item

    def home(self, item: int) -> tuple[int, int]:
        return os.getppid(), os.getpid()


class Squarer:
    """A worker to which something happens at some items, as often as a file says."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder

    def square(self, item: int) -> int:
        for fault in (self.stop, self.meet, self.die):
            file = self.folder / f"{fault.__name__}-{item}"
            if file.exists() and (left := int(file.read_text())):
                file.write_text(str(left - 1))
                fault()
        return item * item

    def home(self, item: int) -> tuple[int, int]:
        return os.getppid(), os.getpid()  # of its machine's raylet, and its own

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def meet(self) -> None:
        """Says who it is as soon as the test listens, and goes on when the test says so."""
        (self.folder / "here").write_text(str(os.getpid()))
        (self.folder / "go").read_text()


@pytest.fixture
def folder(tmp_path):
    os.mkfifo(tmp_path / "here")
    os.mkfifo(tmp_path / "go")
    return tmp_path


@pytest.fixture(scope="module")
def cluster():
    """A machine of 4 CPUs, as far as Ray knows, that gives up on a hanging process sooner than by default."""
    from ray.cluster_utils import Cluster

    checks = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
    config = {f"health_check_{name}": value for name, value in checks.items()}
    config["kill_worker_timeout_milliseconds"] = 500
    head = {"num_cpus": 4, "_system_config": config} | QUIET
    cluster = started(Cluster, initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def joined(cluster):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def actors_of(node) -> list[int]:
    return [pid for pid, name in descendants(raylet(node)).items() if name.startswith("ray::WorkerActor")]


def lose(cluster, node) -> list[int]:
    """Ends all processes of a machine at once, and returns which of them were actors."""
    actors = actors_of(node)
    for pid in [raylet(node), *descendants(raylet(node))]:
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)
    return actors


def squares(workers) -> list[int]:
    return list(workers.map("square", ITEMS))


def homes(workers, count: int, lost: set[int] = frozenset()) -> dict[int, int]:
    """The raylet above each actor that answers, by process; asks until there are `count` of them."""
    found = {}
    while len(found) < count:
        found |= {pid: home for home, pid in workers.map("home", ITEMS) if pid not in lost}
    return found


def test_a_single_stopped_actor_is_restarted(joined, folder):
    (folder / "stop-5").write_text("1")
    with open_pool(Sizing(actors=1, call_timeout_s=SOON), 2) as pool:
        workers = pool.workers(Squarer, folder)
        assert squares(workers) == SQUARES


def test_a_call_that_outruns_every_actor_stops_the_run(joined, folder):
    (folder / "meet-5").write_text("99")  # and no other process comes
    with (
        open_pool(Sizing(actors=4, call_timeout_s=SOON / 4), 4) as pool,
        pytest.raises(Stopped, match="square of item 5 missed its deadline 4 times, the last of 2 s"),
    ):
        squares(pool.workers(Squarer, folder))


def test_a_pool_closes_over_a_stopped_actor(joined, folder):
    (folder / "meet-11").write_text("1")
    with open_pool(Sizing(actors=2), 2) as pool:
        workers = pool.workers(Squarer, folder)
        answers = workers.map("square", ITEMS)
        assert [next(answers) for _ in ITEMS[:-1]] == SQUARES[:-1]
        os.kill(int((folder / "here").read_text()), signal.SIGSTOP)
    with open_pool(Sizing(actors=1), 1) as pool:
        workers = pool.workers(Squarer, folder)
        assert squares(workers) == SQUARES


def test_a_pool_in_a_placement_group_takes_the_bundles_after_the_first(joined, folder):
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([{"CPU": 0.5}, {"CPU": 1}, {"CPU": 1}])

    @ray.remote(num_cpus=0.5)
    def inside():
        with open_pool(Sizing(grouped=True), 99) as pool:
            workers = pool.workers(Squarer, folder)
            answers = squares(workers)
            return pool.sizes, answers, ray.available_resources()["CPU"], len(homes(workers, 2))

    where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    sizes, answers, free, actors = ray.get(inside.options(scheduling_strategy=where).remote())
    ray.util.remove_placement_group(group)
    assert (sizes, answers, actors) == ("2 actors of 1 CPU in a placement group", SQUARES, 2)
    assert free == 4 - 2.5  # what the group has, and no more


def test_another_ray_on_the_cluster_is_said_in_one_sentence(cluster, features_dir, tmp_path):
    there = f"Ray {ray_version()} on Python {platform.python_version()}"
    argv = ["run", "--dataset=features", f"--data-dir={features_dir}", f"--address={cluster.address}"]
    program = (
        "import sys, ray; ray.__version__ = '2.0.1'; from fedsim.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *argv, f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == (
        f"fedsim: the cluster at {cluster.address} runs {there}, this process Ray 2.0.1 on Python "
        f"{platform.python_version()}; Ray needs the same on both\n"
    )
    assert not (tmp_path / "run").exists()


def ray_version() -> str:
    import ray

    return ray.__version__


def test_actors_share_the_gpus_of_a_cluster(joined, folder):
    node = joined.add_node(num_cpus=2, num_gpus=1)  # a logical one
    with open_pool(Sizing(gpus_per_actor=0.5), 4) as pool:
        assert squares(pool.workers(Squarer, folder)) == SQUARES
        assert pool.sizes == "2 actors of 0.5 GPU on 1 node"
    joined.remove_node(node)


def test_a_folder_on_a_disk_that_all_machines_have_is_seen_by_all(joined, tmp_path):
    node = joined.add_node(num_cpus=1)  # tests/test_cluster.py has machines that do not share a disk
    with open_pool(Sizing(actors=1), 1) as pool:
        assert pool.spans_nodes
        pool.check_shared_folder(tmp_path)
    joined.remove_node(node)


def test_an_actor_of_a_lost_machine_comes_back_on_another(joined, folder):
    node = joined.add_node(num_cpus=4)
    with open_pool(Sizing(actors=2), 2) as pool:
        workers = pool.workers(Squarer, folder)
        assert pool.sizes == "2 actors of 1 CPU on 2 nodes"
        before = homes(workers, 2)
        lost = {pid for pid, home in before.items() if home == raylet(node)}
        assert len(lost) == 1
        lose(joined, node)
        after = homes(workers, 2, lost)
        assert set(before) - lost < set(after)
        assert set(after.values()) == {raylet(joined.head_node)}


def test_a_machine_lost_in_a_run_changes_nothing(cluster, features_dir, tmp_path):
    fields = {"dataset": "features", "data_dir": features_dir, "held_out": "ink", "rounds": 100, "clients": 6}
    run(Config(**fields, actors=0, out=tmp_path / "alone"))
    node = cluster.add_node(num_cpus=4)
    lost = []

    def lose_node(event):
        if event.stage == "training" and event.done >= 5 and not lost and actors_of(node):
            lost.extend(lose(cluster, node))

    run(Config(**fields, actors=2, address=cluster.address, out=tmp_path / "run"), lose_node)
    assert lost
    assert result(tmp_path / "run") == result(tmp_path / "alone")


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    # A terminal and SLURM signal every process, Ray's too; Docker the first one alone.
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGTERM, False, 143)],
)
def test_a_signal_ends_a_run_and_leaves_nothing_behind(number, to_all, code, features_dir, tmp_path):
    flags = ["--dataset=features", f"--data-dir={features_dir}", "--held-out=ink", "--rounds=100000", "--clients=6"]
    command = [sys.executable, "-m", "fedsim", "run", *flags, "--actors=1", f"--out={tmp_path}"]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell ignores Ctrl-C in what it starts in the background, and so would all below these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / NAME).exists() and process.poll() is None:
        time.sleep(0.01)
    started = list(descendants(process.pid))
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    which = "" if number == signal.SIGINT else f" by {number.name}"
    assert (
        stderr.decode().strip()
        == f"fedsim: interrupted{which}; the same command resumes after the last completed round"
    )
    assert len(started) > 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not list(Path("/tmp").glob(f"fedsim-*/r/session_*_{process.pid}"))
    assert json.loads((tmp_path / STATUS).read_text())["ended"]["code"] == code
    with FileLock(tmp_path / ".lock", timeout=0):
        assert (tmp_path / NAME).exists()


# Two pools of two actors for all that follow, since each actor takes a while to import torch. They have all CPUs until
# the module ends, so tests that open other pools come before.


@pytest.fixture(scope="module")
def two_actors(joined):
    with open_pool(Sizing(actors=2), 2) as pool:
        yield pool


@pytest.fixture(scope="module")
def hasty(joined):
    """Two actors with a short call timeout."""
    with open_pool(Sizing(actors=2, call_timeout_s=SOON), 2) as pool:
        yield pool


@pytest.fixture(params=["in this process", "on two actors"])
def pool(request):
    if request.param == "on two actors":
        yield request.getfixturevalue("two_actors")
    else:
        with open_pool(Sizing(actors=0), 2) as here:
            yield here


def test_the_calls_of_a_stopped_actor_are_done_by_another(hasty, folder):
    (folder / "stop-5").write_text("1")
    workers = hasty.workers(Squarer, folder)
    assert squares(workers) == SQUARES
    assert (folder / "stop-5").read_text() == "0"
    assert squares(workers) == SQUARES  # without the one that is stopped, or is being restarted


def test_the_first_answer_counts_and_that_of_a_slow_actor_is_dropped(hasty, folder):
    (folder / "meet-5").write_text("1")
    workers = hasty.workers(Squarer, folder)
    meeting = Thread(target=(folder / "here").read_text)
    meeting.start()
    answers = workers.map("square", ITEMS)
    assert [next(answers) for _ in ITEMS[:6]] == SQUARES[:6]
    meeting.join()
    # In vain, and then for ever, where it has been restarted by now.
    Thread(target=(folder / "go").write_text, args=["on"], daemon=True).start()
    assert list(answers) == SQUARES[6:]
    assert squares(workers) == SQUARES


def test_a_call_whose_actor_is_killed_is_done_again(two_actors, folder):
    (folder / "meet-5").write_text("1")
    workers = two_actors.workers(Squarer, folder)
    kill = Thread(target=lambda: os.kill(int((folder / "here").read_text()), signal.SIGKILL))
    kill.start()
    assert squares(workers) == SQUARES
    kill.join()
    assert (folder / "meet-5").read_text() == "0"


def test_each_call_is_answered_by_the_workers_that_it_names_in_any_order(pool, folder):
    squarers, triplers = pool.workers(Squarer, folder), pool.workers(Tripler)
    for _ in range(2):
        assert squares(squarers) == SQUARES
        assert squares(triplers) == TRIPLES
    assert pool.workers(Tripler) is triplers  # what a worker has loaded is used again
    assert pool.workers(Squarer, folder) is not triplers


def test_actors_stay_the_same_processes_whatever_workers_they_run_even_after_one_was_killed(two_actors, folder):
    squarers, triplers = two_actors.workers(Squarer, folder), two_actors.workers(Tripler)
    before = homes(squarers, 2)
    assert squares(triplers) == TRIPLES
    assert homes(triplers, 2) == before
    lost = min(before)
    os.kill(lost, signal.SIGKILL)  # the one that takes its place knows neither of them
    assert squares(triplers) == TRIPLES
    assert len(homes(triplers, 2, {lost})) == 2
    assert squares(squarers) == SQUARES


class Unready:
    """What cannot be sent at first: a disk is full, say."""

    refusals = 1

    def __reduce__(self):
        if self.refusals:
            self.refusals -= 1
            raise OSError("no room")
        return str, ("sent",)


def test_workers_that_could_not_be_sent_are_sent_again_and_never_answered_for_by_others(two_actors, folder):
    refused = Unready()
    squarers = two_actors.workers(Squarer, folder)
    assert squares(squarers) == SQUARES
    with pytest.raises(OSError, match="no room"):
        squares(two_actors.workers(Tripler, refused))
    with pytest.raises(TypeError):  # it came: a second argument is one too many for this worker
        squares(two_actors.workers(Tripler, refused))
    assert squares(squarers) == SQUARES


class Refusing(Tripler):
    def __init__(self, refused: Unready, device: str) -> None:
        refused.__reduce__()


def test_workers_that_could_not_be_made_are_made_again_in_this_process(folder):
    made = partial(Refusing, Unready())
    with open_pool(Sizing(actors=0), 2) as pool:
        squarers = pool.workers(Squarer, folder)
        assert squares(squarers) == SQUARES
        with pytest.raises(OSError, match="no room"):
            squares(pool.workers(made))
        assert squares(pool.workers(made)) == TRIPLES
        assert squares(squarers) == SQUARES


def test_a_pool_gives_results_in_order_past_deaths_and_stops_at_a_deadly_item(two_actors, folder):
    (folder / "die-3").write_text("2")
    workers = two_actors.workers(Squarer, folder)
    assert squares(workers) == SQUARES
    assert (folder / "die-3").read_text() == "0"
    (folder / "die-7").write_text("99")
    with pytest.raises(Stopped, match="square of item 7 ended 4 actors"):
        squares(workers)
