"""Terminals close, processes are killed, and another process watches: real processes, in sessions of their own."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from filelock import FileLock
from test_bits import result

from fedsim import run
from fedsim.__main__ import main
from fedsim.checkpoint import NAME as CHECKPOINT
from fedsim.cli.background import LOCK, STATUS, StatusFile
from fedsim.errors import InputError
from fedsim.events import Step

pytestmark = pytest.mark.ray

FEDSIM = [sys.executable, "-m", "fedsim"]


def fedsim(*argv, code=0):
    """What a command of its own says."""
    done = subprocess.run([*FEDSIM, *map(str, argv)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def detach(*argv, code=0):
    """Starts a run in the background, from this process."""
    assert main(["run", *map(str, argv), "--detach"]) == code


def status(folder: Path) -> dict:
    return json.loads((folder / STATUS).read_text())


def rounds_done(folder: Path) -> int:
    return max((event["done"] for event in status(folder)["steps"] if event["stage"] == "training"), default=0)


@pytest.fixture
def flags(features_dir):
    return ["--dataset", "features", "--data-dir", features_dir, "--held-out", "ink"]


def test_a_terminal_that_closes_does_not_end_a_detached_run(flags, config, tmp_path):
    run(config(rounds=80, clients=6, tune_epochs=2, out=tmp_path / "here"))
    there = tmp_path / "there"
    size = "--rounds", 80, "--clients", 6, "--tune-epochs", 2
    argv = map(str, [*FEDSIM, "run", *flags, *size, "--actors", 1, "--out", there, "--detach"])
    # A shell of its own session and process group, as a terminal has; it stays until its terminal is closed.
    shell = subprocess.Popen(
        ["bash", "-c", f"{shlex.join(argv)} && echo said; read"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = [line.strip() for line in iter(shell.stdout.readline, "said\n")]
    os.killpg(shell.pid, signal.SIGHUP)
    assert shell.wait(timeout=60) == -signal.SIGHUP
    assert f"fedsim watch {there}" in lines
    assert status(there)["ended"] is None
    assert "zero-shot CLIP" in fedsim("watch", there)  # to its end
    assert rounds_done(there) == 80
    assert result(there) == result(tmp_path / "here")  # with one actor there, with none here
    assert "fedclip, fedavg" in fedsim("watch", there)  # and afterwards


def test_a_detached_run_is_stopped_from_elsewhere_and_goes_on_with_the_same_command(flags, tmp_path, capsys):
    there = tmp_path / "there"
    command = [*flags, "--rounds", 100_000, "--actors", 0, "--out", there]
    detach(*command)
    capsys.readouterr()
    detach(*command, code=2)
    said = "".join(capsys.readouterr())
    assert "another process is running" in said and "->" not in said
    fedsim("stop", there)
    assert "interrupted; the same command resumes" in fedsim("watch", there, code=130)
    assert "no run is active in" in fedsim("stop", there, code=2)
    before = rounds_done(there)
    detach(*command)
    while rounds_done(there) <= before:
        time.sleep(0.05)
    fedsim("stop", there)


def test_a_process_that_dies_without_a_word_is_told_from_one_that_runs(flags, tmp_path):
    there = tmp_path / "there"
    detach(*flags, "--rounds", 100_000, "--actors", 0, "--out", there)
    os.kill(status(there)["pid"], signal.SIGKILL)
    assert "has died; the same command resumes after the last completed round" in fedsim("watch", there, code=1)


def test_an_attached_run_can_be_watched_too_and_says_why_it_failed(config, tmp_path, capsys):
    here = config(rounds=2, out=tmp_path / "run")
    with pytest.raises(InputError), StatusFile(here.out, lambda event: None) as status_file:
        run(here, status_file.progress)
        raise InputError("it is over")
    assert main(["watch", str(here.out)]) == 2
    assert capsys.readouterr().err == "fedsim: it is over\n"


def test_a_status_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", flushed.append)
    (tmp_path / "out").mkdir()
    with StatusFile(tmp_path / "out", lambda event: None) as status_file:
        status_file.progress(Step("training", 1, 2))
    assert json.loads((tmp_path / "out" / STATUS).read_text())["steps"]
    assert not flushed


def test_a_refused_command_leaves_what_an_earlier_run_has_said_and_nothing_in_other_folders(flags, tmp_path, capsys):
    there = tmp_path / "run"
    argv = ["run", *map(str, flags), "--rounds", "1", "--actors", "0", "--out", str(there)]
    assert main(argv) == 0
    assert main([*argv, "--seed", "5"]) == 2
    capsys.readouterr()
    assert main(["watch", str(there)]) == 0
    assert "zero-shot CLIP" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    assert main([*argv[:-1], str(tmp_path / "mine"), "--cohort", "99"]) == 2
    assert main(["watch", str(tmp_path / "mine")]) == main(["stop", str(tmp_path / "mine")]) == 2
    assert not list((tmp_path / "mine").iterdir())


def test_a_run_that_a_script_has_put_in_the_background_can_be_stopped(flags, tmp_path):
    there = tmp_path / "run"
    words = map(str, [*FEDSIM, "run", *flags, "--rounds", 100_000, "--actors", 0, "--out", there])
    script = subprocess.Popen(["bash", "-c", f"{shlex.join(words)} & wait"], stdout=subprocess.DEVNULL)
    while not (there / STATUS).exists() or not rounds_done(there):
        time.sleep(0.05)
    fedsim("stop", there)
    script.wait(timeout=60)
    assert status(there)["ended"]["code"] == 130


NOTE = {"stage": "workers", "text": "2 actors"}


def held(folder: Path, **changes) -> FileLock:
    """A folder of a run that this process does, with other values in its status."""
    process = psutil.Process()
    about = {"pid": process.pid, "started": process.create_time() - psutil.boot_time(), "host": socket.gethostname()}
    (folder / STATUS).write_text(
        json.dumps(about | {"began": 0.0, "steps": [], "notes": [NOTE], "ended": None} | changes)
    )
    lock = FileLock(folder / LOCK)
    lock.acquire()
    return lock


def test_stop_leaves_a_process_alone_that_has_the_pid_of_an_earlier_one(tmp_path, capsys):
    bystander = subprocess.Popen(["sleep", "60"])
    with held(tmp_path, pid=bystander.pid):
        assert main(["stop", str(tmp_path)]) == 2
    assert bystander.poll() is None
    assert capsys.readouterr().err == (
        f"fedsim: process {bystander.pid} did not write {tmp_path / STATUS}; it is left alone\n"
    )
    bystander.kill()
    bystander.wait()
    with held(tmp_path, pid=bystander.pid):
        assert main(["stop", str(tmp_path)]) == 2
    assert f"names process {bystander.pid}, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_watching_is_told_that_the_run_continues(number, code, tmp_path):
    with held(tmp_path):
        watcher = subprocess.Popen(
            [*FEDSIM, "watch", tmp_path], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert "workers: 2 actors" in watcher.stdout.readline()
        watcher.send_signal(number)
        _, message = watcher.communicate(timeout=300)
    assert watcher.returncode == code
    which = "" if number == signal.SIGINT else " by SIGTERM"
    assert message == f"fedsim: interrupted{which}; the run or sweep itself continues\n"


FIELDS = '"pid": 12, "started": 1, "host": "h", "began": 1, "notes": []'
SHAPES = {
    "[]": "",
    "{}": "pid: Field required",
    "{": "Invalid JSON",
    '{"pid": -1}': "pid: Input should be greater than or equal to 2",
    '{"pid": "12"}': "pid: Input should be a valid integer",
    f'{{{FIELDS}, "steps": 3, "ended": null}}': "steps: Input should be",
    f'{{{FIELDS}, "steps": [{{}}], "ended": null}}': "steps.0.stage",
    f'{{{FIELDS}, "steps": [], "ended": []}}': "ended: Input should be",
    f'{{{FIELDS}, "steps": [], "ended": {{"code": 0}}}}': "ended.message",
}


@pytest.mark.parametrize("command", ["watch", "stop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_status_of_another_shape_is_refused_in_one_sentence(command, shape, tmp_path, capsys):
    (tmp_path / STATUS).write_text(shape)
    assert main([command, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fedsim: {tmp_path / STATUS} is not the status of a run ({SHAPES[shape]}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_one_sentence_and_its_own_exit_code(number, code, flags, tmp_path):
    there = tmp_path / "run"
    command = [*FEDSIM, "run", *map(str, flags), "--rounds", "100000", "--actors", "0", "--out", str(there)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (there / STATUS).exists() or not rounds_done(there):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code
    which = "" if number == signal.SIGINT else f" by {number.name}"
    assert said == f"fedsim: interrupted{which}; the same command resumes after the last completed round\n"
    assert status(there)["ended"] == {"code": code, "message": said.removeprefix("fedsim: ").strip()}
    assert (there / CHECKPOINT).exists()


def test_ctrl_c_while_torch_is_imported_is_one_sentence(flags, tmp_path):
    command = [*FEDSIM, "run", *map(str, flags), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (
        130,
        "fedsim: interrupted; the same command resumes after the last completed round\n",
    )


def test_a_reader_that_goes_ends_no_run(flags, tmp_path):
    there = tmp_path / "run"
    words = map(str, [*FEDSIM, "run", *flags, "--rounds", 3, "--actors", 0, "--out", there])
    script = f"set -o pipefail; {shlex.join(words)} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert (there / "report.html").exists()
    assert status(there)["ended"]["code"] == 0


def test_a_full_disk_behind_standard_output_is_said_once_the_run_is_complete(flags, tmp_path):
    there = tmp_path / "run"
    command = [*FEDSIM, "run", *map(str, flags), "--rounds", "3", "--actors", "0", "--out", str(there)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == (
        "fedsim: standard output: No space left on device; the work is complete, its output is not\n"
    )
    assert (there / "report.html").exists()


def test_names_are_printed_as_they_are_though_they_look_like_markup_or_emoji(features_dir, tmp_path, capsys):
    names = {"ink": "[/q]", "cat": "[/c]:smile:"}
    for file in ("features", "classes"):
        rows = pd.read_parquet(features_dir / f"{file}.parquet")
        texts = [column for column in rows if isinstance(rows[column][0], str)]
        rows.assign(**{text: rows[text].replace(names) for text in texts}).to_parquet(tmp_path / f"{file}.parquet")
    there = tmp_path / "r[bold]:smile:"
    flags = ["--dataset", "features", "--data-dir", tmp_path, "--held-out", "[/q]", "--rounds", 1, "--actors", 0]
    said = fedsim("run", *flags, "--out", there)
    assert "[/q]" in said and there.name in said
    for shown, words in {"[/q]": ["watch"], there.name: ["compare", "--out", str(tmp_path)]}.items():
        assert main([*words, str(there)]) == 0
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", ["watch", "stop"])
def test_a_folder_without_a_run_is_refused_and_those_below_it_are_named(command, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / STATUS).write_text("{}")
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"fedsim: no command of fedsim has run in {tmp_path}; its subfolders with runs: {tmp_path / 'a'}\n"
    )


def test_what_a_detached_run_would_be_refused_for_is_said_at_once_and_leaves_nothing(flags, tmp_path, capsys):
    detach(*flags, "--cohort", 99, "--out", tmp_path / "run", code=2)
    said = "".join(capsys.readouterr())
    assert "cohort of 99 from 2 clients; it can be at most 2" in said
    assert "->" not in said
    assert not (tmp_path / "run").exists()
