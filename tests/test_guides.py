"""What guides say in sentences, in tables of files and in Python is as they say, and their links lead somewhere.

Blocks of commands run in test_readme.py and test_benchmarks.py; those of clusters are only parsed there, since they
need several machines, and run in test_cluster.py where these can be made. The Python of `docs/extending.md` and of the
README runs in test_extending.py and test_examples.py.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pandas as pd
import pytest
from markdown.extensions.toc import slugify
from shown import PROJECT

from fedsim.__main__ import USAGE, main
from fedsim.cli.flags import parse_run
from fedsim.errors import InputError
from fedsim.registry import FOLDERS, KINDS, available, find
from fedsim.sweep.command import parse_sweep

GUIDES = [
    "README.md",
    "CONTRIBUTING.md",
    "tune/README.md",
    *(f"docs/{file.name}" for file in PROJECT.glob("docs/*.md")),
]
GUIDES.sort()
TEXTS = {
    name: (PROJECT / name).read_text(encoding="utf-8") for name in [*GUIDES, "CHANGELOG.md", "benchmarks/README.md"]
}
BLOCKS = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# Words for what only a reader knows, and the two examples, which are not in the registry.
SWAPS = {"N": "3", "A,B": "cat,dog", "bias": "fedclip", "nesterov": "fedavg"}


def in_sentences(text: str) -> Iterator[str]:
    """All that is in backticks, outside of blocks."""
    for paragraph in re.split(r"\n\s*\n", BLOCKS.sub("", text)):
        if not paragraph.startswith("    "):
            yield from (" ".join(words.split()) for words in re.findall(r"`([^`]+)`", paragraph))


def is_taken(words: list[str]) -> bool:
    """Whether `fedsim run` or `fedsim sweep` takes these flags, with any component that has fields of these names."""
    fields = {(kind, name.replace("-", "_")) for kind, name in re.findall(r"--(\w+)\.([\w-]+)", " ".join(words))}
    with_components = [words]
    for kind in {kind for kind, _ in fields if f"--{kind}" not in words}:
        own = {name for of, name in fields if of == kind}
        names = [name for name in available(kind) if own <= find(kind, name).__pydantic_fields__.keys()]
        with_components = [[f"--{kind}", name, *flags] for flags in with_components for name in names]
    for flags in with_components:
        for parse in (parse_run, parse_sweep):
            try:
                parse(flags)
                return True
            except InputError:
                continue
    return False


@pytest.mark.parametrize("guide", GUIDES)
def test_the_command_line_takes_flags_and_values_in_a_sentence(guide):
    shown = {words for words in in_sentences(TEXTS[guide]) if words.startswith("--") and " " in words}
    for words in sorted(shown):
        assert is_taken([SWAPS.get(word, word) for word in shlex.split(words)]), words


@pytest.mark.parametrize("guide", TEXTS)
def test_commands_in_a_sentence_exist(guide):
    names = {"NAME", *SWAPS, *(name for kind in KINDS for name in available(kind))}
    for command in in_sentences(TEXTS[guide]):
        program, *words = command.removeprefix("uv run ").split()
        if program == "fedsim" and words and words[0].isalpha():
            assert f"fedsim {words[0]} " in USAGE and (words[0] != "help" or {*words[1:]} <= names), command
        elif program == "python" and words:
            assert (PROJECT / words[0]).is_file(), command


@pytest.mark.parametrize("guide", TEXTS)
def test_links_lead_to_files_and_headings(guide):
    """Without a network; pages that the site generates are checked when it is built."""
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCKS.sub("", TEXTS[guide])):
        path, _, heading = link.partition("#")
        file = (PROJECT / guide).parent / path if path else PROJECT / guide
        if "://" in link:
            assert link.startswith("https://"), link
        elif path.partition("/")[0] not in FOLDERS.values():
            assert file.exists(), link
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            assert not heading or heading in [slugify(title, "-") for title in titles], link


def python_of(text: str) -> list[str]:
    return [code for language, code in BLOCKS.findall(text) if language == "python"]


@pytest.mark.parametrize(
    "guide", [name for name in GUIDES if python_of(TEXTS[name]) and name not in ("README.md", "docs/extending.md")]
)
def test_the_python_of_a_guide_runs(guide, config, tmp_path, monkeypatch, capsys):
    from fedsim import run

    monkeypatch.chdir(tmp_path)
    run(config(rounds=1, out=Path("runs") / "A"))
    for code in python_of(TEXTS[guide]):
        exec(compile(code, guide, "exec"), {})
        assert capsys.readouterr().out


def test_the_python_of_the_embedded_model_s_card_runs(monkeypatch):
    (code,) = python_of((PROJECT / "fedsim" / "assets" / "tiny" / "CARD.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(PROJECT)
    names = {"open_clip": open_clip}
    exec(compile(code, "CARD.md", "exec"), names)
    assert names["model"].encode_text(names["tokenizer"](["a cat"])).shape == (1, 256)


def table_after(words: str) -> list[str]:
    """The names in the first column of the first table of docs/files.md after these words."""
    table = TEXTS["docs/files.md"].partition(words)[2].partition("| --- |")[2].partition("\n\n")[0]
    return [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row[: row.find(" | ")])]


def test_every_file_and_column_of_a_run_is_described(features_dir, tmp_path):
    out = tmp_path / "run"
    what = ["--dataset", "features", "--data-dir", str(features_dir), "--held-out", "ink", "--server", "ditto"]
    assert main(["run", *what, "--rounds", "1", "--actors", "0", "--loggers", "tensorboard", "--out", str(out)]) == 0
    names = {f"{file.name}/" if file.is_dir() else file.name for file in out.iterdir()}
    assert {*table_after("# Results and files")} - names == {"mlflow.db", "wandb/", "run.log"}
    assert names <= {*table_after("# Results and files")}
    for file in out.glob("*.parquet"):
        assert table_after(f"\n`{file.name}`, a row for each") == list(pd.read_parquet(file).columns), file.name
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    assert sorted(table_after("## status.json")) == sorted(status)
