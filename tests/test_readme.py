"""What the documentation shows is run: its commands at a small size, each `prepare`d as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from shown import MOST, PACS, PROJECT, commands_in, smaller, write_drawings

from fedsim.__main__ import main
from fedsim.cli.flags import parse_run
from fedsim.config import EXPERIMENTS
from fedsim.prepare import prepare
from fedsim.sweep.command import EPILOG, parse_sweep
from fedsim.sweep.prepare import prepare_sweep
from fedsim.sweep.search import search

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = [f"docs/{file.name}" for file in sorted((PROJECT / "docs").glob("*.md"))]
TEXTS = {
    name: (PROJECT / name).read_text(encoding="utf-8")
    for name in ("README.md", "benchmarks/README.md", "tune/README.md", "cluster.yaml", "cluster.local.yaml", *PAGES)
}
BENCHMARKS = sorted((PROJECT / "benchmarks").glob("[!_]*.py"))
STUDIES = sorted((PROJECT / "tune").glob("*.yaml"))
UV = ["uv", "run"]


def shown(*start: str) -> list[list[str]]:
    """Every command of the documentation that begins so, without its beginning; each once."""
    words = [*UV, "fedsim", *start]
    commands = [command for name in TEXTS for command in commands_in(TEXTS[name])]
    found = [command[len(words) :] for command in commands if command[: len(words)] == words]
    return [command for place, command in enumerate(found) if command not in found[:place]]


@pytest.fixture(scope="module")
def swaps(tmp_path_factory) -> dict[str, str]:
    """Words that only a reader can fill in, and weights that have to be downloaded, by what stands for them here."""
    pictures = write_drawings(tmp_path_factory.mktemp("pacs") / "images", PACS)
    return {"DIR": str(pictures), "ViT-B-32": "tiny", "openai": "embedded"}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> list[str]:
    """Flags for a few of the embedded drawings, in place of all."""
    folder = write_drawings(tmp_path_factory.mktemp("drawings") / "images", ("clipart", "ink", "noto"))
    return ["--dataset", "folder", "--data-dir", str(folder)]


def reads_more_than_features(config) -> bool:
    reads = config.server.adapt(config.method).reads
    return bool(reads.towers or reads.image != "features" or config.augment)


@pytest.mark.parametrize("flags", shown("run"), ids=" ".join)
def test_a_run_is_accepted_as_it_stands_and_runs_at_a_small_size(flags, swaps, drawings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    parse_run(flags)
    config, _ = parse_run([swaps.get(word, word) for word in flags])
    prepare(config)
    small = smaller(flags, MOST, swaps)
    if config.data_dir is None and reads_more_than_features(config):
        small += drawings
    assert main(["run", *small, "--rounds", "1", "--actors", "0", "--out", "run"]) == 0, capsys.readouterr().err
    assert "zero-shot CLIP" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


@pytest.fixture
def address(cluster, machine):
    """The address of a cluster that this process has joined, so that all sweeps share its idle processes."""
    return machine.address


def small_sweep(flags, address, swaps):
    """A sweep of one trial and one round, after the same command has been accepted as it stands."""
    swaps = swaps | {f"tune/{study.name}": str(study) for study in STUDIES}
    parse_sweep([str(PROJECT / word) if word.startswith("tune/") else word for word in flags])
    prepare_sweep(parse_sweep([swaps.get(word, word) for word in flags])[0])
    few = ["--trials", "1", "--rounds", "1", "--report-seeds", "0", "--at-once", "1", "--out", "sweep"]
    return [*smaller(flags, MOST, swaps), *few, "--address", address]


FIRST, *OTHERS = shown("sweep")


@pytest.mark.ray
def test_a_sweep_says_what_it_has_found(address, swaps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    small = small_sweep(FIRST, address, swaps)
    assert main(["sweep", *small]) == 0, capsys.readouterr().err
    assert "1 trial: 1 complete" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "sweep.html").exists()


@pytest.mark.ray
@pytest.mark.parametrize("flags", OTHERS, ids=" ".join)
def test_a_sweep_is_accepted_as_it_stands_and_runs_at_a_small_size(flags, address, swaps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, _ = parse_sweep(small_sweep(flags, address, swaps))
    # In this process: a driver actor for each would only load all modules once more.
    result = search(prepare_sweep(sweep), lambda event: None)
    assert result.trials.state.tolist() == ["complete"]
    assert (tmp_path / "sweep" / "sweep.html").exists()


def test_the_readme_of_the_studies_has_a_row_and_a_command_for_each():
    text = TEXTS["tune/README.md"]
    for study in STUDIES:
        assert f"| `{study.name}` |" in text and ["--config", f"tune/{study.name}"] in shown("sweep")


def test_two_runs_are_compared(config, tmp_path, monkeypatch, capsys):
    from fedsim import run

    monkeypatch.chdir(tmp_path)
    (folders,) = shown("compare")
    for seed, folder in enumerate(folders):
        run(config(seed=seed, rounds=1, out=Path(folder)))
    assert main(["compare", *folders]) == 0
    assert "page  compare.html" in capsys.readouterr().out


def test_the_commands_of_the_cache_run():
    for words in shown("cache"):
        assert main(["cache", *words]) == 0


def test_every_other_command_is_one_that_another_test_runs():
    scripts = {f"benchmarks/{script.name}" for script in BENCHMARKS}  # tests/test_benchmarks.py
    clusters = (PROJECT / "tests" / "test_cluster.py").read_text(encoding="utf-8")
    gate = "pip install -q uv && uv run "  # .ci/run
    for name, text in TEXTS.items():
        for command in commands_in(text.replace("\n#", "\n")):
            words = [word for word in command if word not in ("--group", "aws")]
            line = " ".join(words)
            if words[:3] == [*UV, "fedsim"]:
                assert words[3] in ("run", "sweep", "compare", "doctor", "cache"), f"{name}: {line}"
            elif words[:3] == [*UV, "ray"]:
                upto = 5 if words[3] == "job" else 4
                assert " ".join(words[:upto]) in clusters, f"{name}: {line}"
                parse_all(words)
            elif words[2:4] == [
                "python",
                "benchmarks/_measure.py",
            ]:  # what runs a command, as tests/test_benchmarks.py does
                assert words[4:6] == ["fedsim", "run"] and parse_run(words[6:]), f"{name}: {line}"
            elif words[0] == "export":
                assert line in clusters, f"{name}: {line}"
            elif words[:3] == ["uv", "sync", "--extra"]:
                assert f"\n{words[3]} = [" in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
            else:
                assert scripts & {*words} or line.startswith(gate), f"{name}: {line}"


def parse_all(words: list[str]) -> None:
    """Parses the `fedsim run` that is written for another machine."""
    for word in words:
        if "fedsim run" in word:
            parse_run(shlex.split(word.partition("fedsim run")[2]))


def test_the_readme_has_two_commands_that_do_all_the_set_up():
    assert re.findall(r"^    (pip install -q uv && uv run .*)$", README, flags=re.MULTILINE) == [
        "pip install -q uv && uv run fedsim run",
        "pip install -q uv && uv run pytest",
    ]


def test_every_protocol_is_an_embedded_config():
    rows = re.findall(
        r"^\| `(\w+)` \|",
        TEXTS["docs/protocols.md"].partition("| `--config` |")[2].partition("\n\n")[0],
        flags=re.MULTILINE,
    )
    assert sorted(rows) == sorted(
        {file.stem for file in EXPERIMENTS.glob("*.yaml")} - {"glyphs", "glyphs_concepts", "paper"}
    )


def test_every_form_of_search_that_the_help_shows_is_understood():
    forms = re.findall(r"^  (\S+(?: \S+)?)  +", EPILOG, flags=re.MULTILINE)
    assert len(forms) == 6
    for form in forms:
        prepare_sweep(parse_sweep(["--partition", "bootstrap", "--clients", "200", "--search", *form.split()])[0])
