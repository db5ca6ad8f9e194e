"""Completion of commands, flags and names of components in a shell."""

from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Mapping, Sequence

import shtab

from fedsim.registry import FOLDERS, KINDS, available

SHELLS = "bash", "zsh", "tcsh"
DIRECTORIES = "data-dir", "out", "cache-dir"
WORDS = {
    "list": list(FOLDERS.values()),
    "help": [name for kind in KINDS for name in available(kind)],
    "cache": ["list", "prune"],
    "completion": SHELLS,
}


def completion(shell: str, parsers: Mapping[str, Sequence[ArgumentParser]]) -> str:
    """A script that completes the words after `fedsim`; it holds the names of this version.

    Args:
        shell: one of `SHELLS`.
        parsers: of the commands that take the fields of an experiment, whose flags are those of all their parsers.
    """
    parser = ArgumentParser(prog="fedsim")
    commands = parser.add_subparsers()
    for name, parents in parsers.items():
        command = commands.add_parser(name, help=name, parents=parents, conflict_handler="resolve", add_help=False)
        for action in command._actions:
            _complete(action)
    for name in ("compare", "page", "watch", "stop"):
        _complete(_plain(commands, name).add_argument("out", nargs="*"))
    for name, words in WORDS.items():
        _plain(commands, name).add_argument("word", nargs="?", choices=words)
    doctor = _plain(commands, "doctor")
    for command in (doctor, commands.choices["cache"]):
        _complete(command.add_argument("--cache-dir", help=SUPPRESS))
    doctor.add_argument("--address")
    commands.choices["cache"].add_argument("--days")
    return shtab.complete(parser, shell)


def _plain(commands, name: str) -> ArgumentParser:
    return commands.add_parser(name, help=name, add_help=False)  # without a help, shtab leaves it out


def _complete(action: Action) -> None:
    """Says what follows a flag: a component, a file or a folder."""
    flag = action.option_strings[0].removeprefix("--") if action.option_strings else action.dest
    if flag in KINDS:
        action.choices = available(flag)
    elif flag in DIRECTORIES:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif flag in ("config", "pretrained"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    if not action.help:
        action.help = flag
