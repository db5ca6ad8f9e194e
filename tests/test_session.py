"""A private Ray is closed to other users and leaves nothing behind; one that is there already is used."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_watch import FEDSIM, rounds_done, status

from fedsim.cluster import session
from fedsim.cluster.private_folder import BELOW, LOCK, PATH_BYTES, PREFIX, private_folder
from fedsim.errors import InputError

pytestmark = pytest.mark.ray

OWNER = """
import sys, time
from fedsim.cluster.private_folder import private_folder
with private_folder(print) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def short(monkeypatch):
    """A TMPDIR of the test's own, short enough for Ray, that other users may enter."""
    folder = Path("/tmp") / f"t{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield folder
    shutil.rmtree(folder)


def folder_of(events=None):
    return private_folder((events if events is not None else []).append)


def test_the_folder_of_a_private_cluster_is_its_users_alone_and_is_gone_afterwards(short):
    with folder_of() as folder:
        assert folder.parent == short
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "r").mkdir(mode=0o777)
    assert not list(short.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_can_neither_list_nor_create_anything_in_the_folder(short):
    with folder_of() as folder:
        ray = folder / "r"
        ray.mkdir()
        ray.chmod(0o777)  # as Ray does
        for attempt in (["ls", ray], ["ls", folder], ["touch", ray / "gcs_server_port_1"], ["touch", folder / "x"]):
            done = subprocess.run(attempt, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
            assert "Permission denied" in done.stderr
        assert subprocess.run(["ls", short], user=65534, group=65534, extra_groups=[]).returncode == 0


def test_folders_of_killed_processes_are_swept_and_no_others(short):
    owners = [subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    dead, alive = (Path(owner.stdout.readline().strip()) for owner in owners)
    owners[0].kill()
    owners[0].wait()
    others = [short / f"{PREFIX}{name}" for name in ("without-lock", "for-all", "link")]
    for folder in others[:2]:
        folder.mkdir(mode=0o700)
    (others[1] / LOCK).touch()
    others[1].chmod(0o755)
    others[2].symlink_to(dead)
    with folder_of():
        assert not dead.exists()
        assert alive.exists() and all(other.is_symlink() or other.exists() for other in others)
    owners[1].terminate()
    owners[1].wait()


MOST = PATH_BYTES - len(BELOW)


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("/tmp/" + "x" * 90, f"is longer than the {MOST} bytes that the paths of its sockets leave"),
        ("/tmp/ü", "has blanks or letters that are not ASCII"),
        ("/tmp/a b", "has blanks or letters that are not ASCII"),
        ("/nowhere", "No such file or directory"),
    ],
)
def test_a_tmpdir_that_ray_cannot_use_is_said_and_another_folder_taken(root, problem, monkeypatch):
    monkeypatch.setenv("TMPDIR", root)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    events = []
    with folder_of(events) as folder:
        assert folder.parent == Path("/tmp")
    assert [event.text for event in events] == [f"its files are below /tmp, since TMPDIR {root} {problem}"]


def test_a_port_behind_which_is_no_ray_is_said_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(session, "JOIN_S", 10)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(InputError, match=f"cannot join a cluster at {address}: .*; if it asks for a token"),
            session.session(address),
        ):
            pass


def test_auto_without_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(session, "JOIN_S", 10)
    with pytest.raises(InputError, match="cannot join a cluster at auto"), session.session("auto"):
        pass


def fedsim_of(flags, there, **options):
    argv = [*FEDSIM, "run", *flags, "--rounds=100000", "--actors=1", f"--out={there}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, start_new_session=True, **streams, **options)


@pytest.fixture
def flags(features_dir):
    return ["--dataset=features", f"--data-dir={features_dir}", "--held-out=ink"]


def test_a_cluster_whose_head_dies_ends_the_run_in_one_sentence(flags, short, tmp_path):
    there = tmp_path / "run"
    process = fedsim_of(flags, there, env=os.environ | {"RAY_ADDRESS": "elsewhere:6379"})
    while not (there / "status.json").exists() or not rounds_done(there):
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if one.name() == "gcs_server").kill()
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Ray: a private cluster; RAY_ADDRESS=elsewhere:6379 is used only with --address auto" in " ".join(
        printed.split()
    )
    assert said.startswith("fedsim: Ray's head at ") and said.endswith(
        "; the same command resumes after the last completed round\n"
    )
    assert said.count("\n") == 1
    assert status(there)["ended"] == {"code": 1, "message": said.removeprefix("fedsim: ").strip()}
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not list(short.iterdir())


def test_a_driver_actor_that_the_memory_monitor_ends_is_said_in_one_sentence(flags, tmp_path):
    process = fedsim_of(flags, tmp_path / "run", env=os.environ | {"RAY_memory_usage_threshold": "0.02"})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert said.count("\n") == 1 and "memory" in said


def test_ray_that_cannot_start_names_what_is_scarce_and_is_no_bad_input(flags, tmp_path):
    command = ["bash", "-c", 'ulimit -n 24; exec "$@"', "-", *FEDSIM, "run", *flags, f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("fedsim: Ray did not start, twice (")
    assert "`ulimit -n` of 24" in done.stderr and done.stderr.count("\n") == 1


JOINED = """
import sys
import ray
from fedsim import Config, InputError, run
from fedsim.cluster.session import session
from ray_start import started
started(ray.init, "local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
fields = {"dataset": "features", "data_dir": sys.argv[1], "held_out": "ink", "rounds": 1}
here = ray.get_runtime_context().gcs_address
for address in (None, "auto", here):
    with session(address) as joined:
        assert joined.get_runtime_context().gcs_address == here
    assert ray.is_initialized()
run(Config(**fields, out=f"{sys.argv[2]}/run"))
try:
    run(Config(**fields, address="other:1", out=f"{sys.argv[2]}/other"))
except InputError as error:
    assert f"this process has joined the cluster at {here} already, not other:1" in str(error), error
else:
    raise AssertionError("it ran on another cluster than the one that it was given")
assert ray.is_initialized() and len(ray.nodes()) == 1
"""


def test_a_cluster_that_this_process_has_joined_is_used_and_still_joined_afterwards(features_dir, tmp_path):
    command = [sys.executable, "-c", JOINED, str(features_dir), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
