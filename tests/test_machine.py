"""The commands about this machine: doctor, cache, page and completion."""

import os
import subprocess

import numpy as np
import pytest

from fedsim import run
from fedsim.__main__ import main
from fedsim.cache import read_array, write_array
from fedsim.cli.doctor import Finding, examine, report
from fedsim.progress import plain_console

OLD = 40 * 24 * 3600  # seconds


@pytest.fixture
def cache(tmp_path):
    """A cache with a file that was read just now, one that was not for 40 days, its lock, and a stranger's file."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("a" * 32 + ".npy", "b" * 32 + ".pixels-0.npy"):
        write_array(folder / name, 2, [np.zeros((2, 3))])
    (folder / ("b" * 32 + ".lock")).touch()
    (folder / "notes.npy").write_text("mine")
    for file in folder.iterdir():
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - OLD))
    assert read_array(folder / ("a" * 32 + ".npy"), lambda file: None) is not None
    return folder


def test_the_cache_is_listed_by_kind(cache, capsys):
    assert main(["cache", "--cache-dir", str(cache)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "│ image features │ 1 │ 184 bytes │ 0 days ago │" in text and "│ pixels │ 1 │ 184 bytes │ 40 days ago │" in text
    )
    assert f"{cache}: 2 files, 368 bytes" in text


def test_what_no_run_has_used_is_pruned_and_nothing_else(cache, capsys):
    assert main(["cache", "prune", "--cache-dir", str(cache)]) == 0
    assert "removed 1 file, 184 bytes" in capsys.readouterr().out
    assert {file.name for file in cache.iterdir()} == {"a" * 32 + ".npy", "notes.npy"}
    assert main(["cache", "prune", "--days", "0", "--cache-dir", str(cache)]) == 0
    assert {file.name for file in cache.iterdir()} == {"notes.npy"}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["cache", "--cache-dir", "nowhere"], "--cache-dir nowhere does not exist; no run has written there"),
        (["cache", "prune", "--days", "-1", "--cache-dir", "."], "--days is a number >= 0, got -1"),
        (["page", "nowhere"], "nowhere is not a finished run of fedsim"),
        (["completion", "fish"], "argument shell: invalid choice: 'fish'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_a_sentence(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2 and sentence in capsys.readouterr().err


def test_a_page_is_written_again_from_the_tables_alone(config, capsys):
    ours = config(rounds=1, page=True)
    run(ours)
    page = ours.folder() / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert main(["page", str(ours.folder())]) == 0 and f"page  {page}" in capsys.readouterr().out
    assert page.read_bytes() == before


@pytest.mark.ray
def test_this_machine_has_what_a_run_needs(tmp_path):
    findings = {finding.name: finding for finding in examine(tmp_path / "cache", None)}
    assert set(findings) >= {"fedsim", "packages", "machine", "GPUs", "cache", "weights", "Ray"}
    assert findings["Ray"].remedy == "" and "a private cluster answers after" in findings["Ray"].text
    assert "tiny embedded" in findings["weights"].text and str(tmp_path / "cache") in findings["cache"].text


def test_what_is_missing_is_marked_with_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    found = {finding.name: finding for finding in examine(tmp_path / "file", "nowhere")}
    assert found["cache"].remedy == "give another folder" and "cannot be written" in found["cache"].text
    assert "--address needs host:port" in found["Ray"].text and "--actors 0" in found["Ray"].remedy
    console = plain_console(record=True, width=200)
    assert report(console, iter([found["cache"], Finding("GPUs", "none")])) == 1
    text = console.export_text()
    assert text.startswith("! cache") and "-> give another folder" in text and "\n  GPUs " in text


def complete(script, *words):
    """What bash offers for the last word of a command line."""
    typed = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_fedsim; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_a_shell_completes_commands_flags_and_names(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "fedsim.bash"
    script.write_text(capsys.readouterr().out)
    assert complete(script, "fedsim", "do") == ["doctor"]
    assert complete(script, "fedsim", "run", "--held") == ["--held-out"]
    assert complete(script, "fedsim", "run", "--method", "fedc") == ["fedclip"]
    assert complete(script, "fedsim", "sweep", "--tri") == ["--trials"]
    assert complete(script, "fedsim", "help", "fedt") == ["fedtpg"]
