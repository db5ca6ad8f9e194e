"""Terminals close, processes are killed, and somebody else looks: real processes, in sessions of their own."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bits import result

from fedsim import run
from fedsim.__main__ import main
from fedsim.errors import InputError
from fedsim.watch import STATUS, Telling

FEDSIM = [sys.executable, "-m", "fedsim"]


def fedsim(*argv, code=0):
    """What a command of its own says."""
    done = subprocess.run([*FEDSIM, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def status(folder: Path) -> dict:
    return json.loads((folder / STATUS).read_text())


def rounds_done(folder: Path) -> int:
    return max((event["done"] for event in status(folder)["events"] if event["stage"] == "training"), default=0)


@pytest.fixture
def flags(features_dir):
    return ["--dataset", "features", "--data-dir", features_dir, "--held-out", "ink"]


def test_a_terminal_that_closes_does_not_end_a_detached_run(flags, config, tmp_path):
    run(config(rounds=80, out=tmp_path / "here"))
    there = tmp_path / "there"
    argv = map(str, [*FEDSIM, "run", *flags, "--rounds", 80, "--actors", 1, "--out", there, "--detach"])
    # A shell of its own session and process group, as a terminal has; it stays until its terminal is closed.
    shell = subprocess.Popen(
        ["bash", "-c", f"{shlex.join(argv)} && echo said; read"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    told = [line.strip() for line in iter(shell.stdout.readline, "said\n")]
    os.killpg(shell.pid, signal.SIGHUP)
    assert shell.wait(timeout=10) == -signal.SIGHUP
    assert f"fedsim watch {there}" in told
    assert status(there)["ended"] is None
    assert "zero-shot CLIP" in fedsim("watch", there)  # to its end
    assert rounds_done(there) == 80
    assert result(there) == result(tmp_path / "here")
    assert "fedclip, fedavg" in fedsim("watch", there)  # and afterwards


def test_a_detached_run_is_stopped_from_elsewhere_and_goes_on_with_the_same_command(flags, tmp_path):
    there = tmp_path / "there"
    command = ["run", *flags, "--rounds", 100_000, "--actors", 0, "--out", there, "--detach"]
    fedsim(*command)
    assert "another process is running" in fedsim(*command, code=2)
    fedsim("stop", there)
    assert "interrupted; the same command goes on" in fedsim("watch", there, code=130)
    assert "nobody runs in" in fedsim("stop", there, code=2)
    before = rounds_done(there)
    fedsim(*command)
    while rounds_done(there) <= before:
        time.sleep(0.05)
    fedsim("stop", there)


def test_a_process_that_dies_without_a_word_is_told_from_one_that_runs(flags, tmp_path):
    there = tmp_path / "there"
    fedsim("run", *flags, "--rounds", 100_000, "--actors", 0, "--out", there, "--detach")
    os.kill(status(there)["pid"], signal.SIGKILL)
    assert "is gone; the same command goes on from the last round" in fedsim("watch", there, code=1)


def test_an_attached_run_can_be_watched_too_and_says_why_it_failed(config, tmp_path, capsys):
    here = config(rounds=2, out=tmp_path / "run")
    with pytest.raises(InputError), Telling(here.out, lambda event: None) as telling:
        run(here, telling.progress)
        raise InputError("it is over")
    assert main(["watch", str(here.out)]) == 2
    assert capsys.readouterr().err == "fedsim: it is over\n"


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
    script.wait(timeout=10)
    assert status(there)["ended"]["code"] == 130


@pytest.mark.parametrize("command", ["watch", "stop"])
def test_a_folder_without_a_run_is_refused_and_those_below_it_are_named(command, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / STATUS).write_text("{}")
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"fedsim: no command of fedsim has run in {tmp_path}; below it are {tmp_path / 'a'}\n"
    )


def test_what_a_detached_run_would_be_refused_for_is_said_at_once_and_leaves_nothing(flags, tmp_path):
    said = fedsim("run", *flags, "--cohort", 99, "--out", tmp_path / "run", "--detach", code=2)
    assert "a cohort of 99 from 2 clients" in said
    assert not (tmp_path / "run").exists()
