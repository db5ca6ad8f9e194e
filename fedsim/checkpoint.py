"""A run in two files: the server's state, written again each round, and a history to which each round is appended.

The checkpoint holds the length of the history and a digest of it. Whatever a killed process has appended after that is
overwritten, so the two always agree. Neither is ever pickled.
"""

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load
from torch import Tensor

from fedsim.counts import Counts
from fedsim.errors import InputError
from fedsim.files import Damaged, pack, read_tensors, write_tensors
from fedsim.folder import CHECKPOINT, continued, intact, refuse_another, start_again
from fedsim.params import Params
from fedsim.reporting.report import Report
from fedsim.state import ServerState

NAME, HISTORY = CHECKPOINT, "history.bin"


class Checkpoints:
    """The checkpoints of a run, each in place of the one before.

    What a save writes does not grow with the number of rounds.
    """

    def __init__(self, folder: Path, experiment: dict[str, Any], fixed_rounds: bool = False) -> None:
        """
        Args:
            fixed_rounds: each round depends on how many there are, so that other `rounds` are another experiment.
        """
        self.folder, self.experiment, self.fixed_rounds = folder, experiment, fixed_rounds
        self.saved = -1  # the last round in the history
        self.history = _History(folder / HISTORY)

    def save(self, state: ServerState, report: Report) -> None:
        """Appends to the history what is new in the report since the last save, then writes the state.

        Raises:
            OSError: the disk is full, for example; the last checkpoint is still there, and whole.
        """
        if not self.history.length:
            self.history.append(report.first_entry())
        if state.round > self.saved:
            self.history.append(report.entry(state.round))
            self.saved = state.round
        tensors = {f"params/{name}": tensor for name, tensor in state.params.items()}
        tensors |= _spread("slots", state.slots) | _spread("past", state.past)
        tensors |= {f"privacy/{name}": tensor for name, tensor in state.privacy.items()}
        tensors |= {f"adapter/{name}": tensor for name, tensor in report.adapter.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays |= {"private": state.private, "chosen_private": report.private}
        arrays |= {"bank": state.bank} if len(state.bank) else {}
        ends = {"last": report.last, "tuned": report.tuned}
        arrays |= {name: counts.flat() for name, counts in ends.items() if counts}
        about = {"experiment": self.experiment, "round": state.round, "report": report.about()}
        write_tensors(self.folder / NAME, arrays, about | {"history": self.history.position()})

    def load(self) -> tuple[ServerState, Report] | None:
        """What `save` wrote last, or None if there is no checkpoint.

        With more rounds than before, the evaluations that only the last of the earlier rounds had are left out.

        Raises:
            InputError: a file is damaged or missing, or belongs to another experiment (the message names the fields),
                or has more rounds than the config, or other ones where their number is fixed.
        """
        file, remedy = self.folder / NAME, start_again(self.folder)
        if not file.exists():
            return None
        with intact(file, remedy):
            arrays, about = read_tensors(file)
            try:
                before, round, fields, position = (about[name] for name in ("experiment", "round", "report", "history"))
            except KeyError as error:
                raise Damaged(f"it lacks {error}, as that of another version of fedsim may") from None
        rounds = self.experiment["rounds"]
        refuse_another(self.folder, experiment := continued(before, self.experiment), self.experiment)
        if self.fixed_rounds and before["rounds"] != rounds:
            raise InputError(
                f"{self.folder} holds a run of {before['rounds']} rounds, each of which depends on that number (as "
                "with --method.schedule cosine, --server.average beta or --privacy.epsilon), so it cannot continue "
                f"with --rounds {rounds}; give --rounds {before['rounds']}, or another --out"
            )
        if round > rounds:
            raise InputError(
                f"{self.folder} holds {round} rounds of this experiment, more than --rounds {rounds}; "
                f"give --rounds {round} or more, or another --out"
            )
        with intact(self.history.file, remedy):
            entries = self.history.read(position)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.saved = round
        slots, past = _gathered(_below("slots/", tensors)), _gathered(_below("past/", tensors))
        past = {int(done): params for done, params in past.items()}
        others: dict[str, Any] = {"bank": arrays["bank"]} if "bank" in arrays else {}
        others |= {"privacy": _below("privacy/", tensors)}
        state = ServerState(round, _below("params/", tensors), slots, past, arrays["private"], **others)
        fields["experiment"] = continued(fields["experiment"], experiment)
        report = Report(**fields, adapter=_below("adapter/", tensors), private=arrays["chosen_private"])
        for entry in entries:
            report.add_entry(entry)
        if round == rounds:
            report.last, report.tuned = (
                Counts.from_flat(arrays[name]) if name in arrays else None for name in ("last", "tuned")
            )
        return state, report


def load_checkpoint(folder: Path, experiment: dict[str, Any]) -> tuple[ServerState, Report] | None:
    """`Checkpoints.load`, with the evaluation of the last round in the report.

    The report's adapter is then what clients are sent, also if the server rule evaluates other tensors.
    """
    saved = Checkpoints(folder, experiment).load()
    if saved:
        state, report = saved
        report.conclude(state)
    return saved


class _History:
    """A file of arrays to which entries are appended, each a safetensors file after its length in 8 bytes.

    Attributes:
        length: bytes that count; what stands after them is overwritten.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.length, self.hash = file, 0, blake2b(digest_size=16)

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Flushes to the disk before it returns, since a checkpoint will count on it."""
        content = pack(arrays, {})
        content = len(content).to_bytes(8, "little") + content
        try:
            with os.fdopen(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
                try:
                    file.seek(self.length)
                    left = memoryview(content)
                    while left:
                        left = left[file.write(left) :]
                    file.truncate()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self.length)  # on a full disk the rest would take the room that is left
                    raise
        except OSError as error:
            error.filename = str(self.file)
            raise
        self.length += len(content)
        self.hash.update(content)

    def position(self) -> dict[str, Any]:
        return {"length": self.length, "digest": self.hash.hexdigest()}

    def read(self, position: dict[str, Any]) -> list[dict[str, np.ndarray]]:
        """The entries up to a position, after which the next one is appended.

        Raises:
            Damaged: they are not those of that position.
        """
        with self.file.open("rb") as stream:
            content = stream.read(position["length"])
        self.hash = blake2b(content, digest_size=16)
        self.length = len(content)
        if self.position() != position:
            raise Damaged(f"its first {position['length']} bytes are not those that the checkpoint was written with")
        return list(entries_of(content))


def entries_of(history: bytes) -> Iterator[dict[str, np.ndarray]]:
    """The entries of a history, as `Report.first_entry` and `Report.entry` made them; read-only arrays."""
    start = 0
    while start < len(history):
        end = start + 8 + int.from_bytes(history[start : start + 8], "little")
        yield load(history[start + 8 : end])
        start = end


def _spread(kind: str, groups: dict[Any, Params]) -> dict[str, Tensor]:
    return {f"{kind}/{key}/{name}": tensor for key, params in groups.items() for name, tensor in params.items()}


def _gathered(tensors: dict[str, Tensor]) -> dict[str, Params]:
    groups: dict[str, Params] = {}
    for path, tensor in tensors.items():
        key, _, name = path.partition("/")
        groups.setdefault(key, {})[name] = tensor
    return groups


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
