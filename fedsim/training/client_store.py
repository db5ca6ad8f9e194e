"""The private state of clients, in files of the run's folder: one per client, named after the round that wrote it.

Neither the driver nor an actor holds more of it than that of the clients in training. A file is whole or absent, and is
only ever replaced by the same bits: a chunk that is repeated, or a run that resumes, reads what the first attempt read.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError
from fedsim.files import Damaged, read_tensors, write_tensors
from fedsim.folder import intact, start_again
from fedsim.params import Params

FILE_NAME = re.compile(r"(part-.*-)?client-\d+-round-\d+\.safetensors")  # a process that is killed may leave a part
OPTIMIZER, RULE, LOST = "optimizer/", "rule/", "lost/"  # prefixes of names in a file
Stored = list[tuple[int, int]]  # ids of clients, each with the round that last wrote its private state, or 0


@dataclass(frozen=True)
class PrivateState:
    """What a client keeps from round to round and does not send.

    Attributes:
        params: its private parameters.
        optimizer: the state of its optimizer, if the method keeps it.
        rule: its memory for the server rule.
        lost: what encoding has discarded of its updates and is still to be sent.
    """

    params: Params = field(default_factory=dict)
    optimizer: Params = field(default_factory=dict)
    rule: Params = field(default_factory=dict)
    lost: Params = field(default_factory=dict)

    @classmethod
    def from_tensors(cls, tensors: Params) -> "PrivateState":
        """The inverse of `tensors`."""
        prefixes = OPTIMIZER, RULE, LOST
        others = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in prefixes
        )
        params = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
        return cls(params, *others)

    def tensors(self) -> Params:
        """All of it, by names that tell the four apart."""
        others = {OPTIMIZER: self.optimizer, RULE: self.rule, LOST: self.lost}
        return self.params | {
            prefix + name: tensor for prefix, tensors in others.items() for name, tensor in tensors.items()
        }


@dataclass(frozen=True)
class PrivateStore:
    """A folder that every actor sees, with one safetensors file per client and round."""

    folder: Path

    def read(self, client: int, written: int) -> Params:
        """The tensors that the client stored in the round `written`; none if that is 0.

        Raises:
            InputError: the file is missing or damaged.
        """
        if not written:
            return {}
        file = self._file(client, written)
        if not file.exists():
            raise InputError(f"{file} is missing: it was deleted, or this machine does not see the folder of the run")
        with intact(file, start_again(self.folder.parent)):
            arrays, about = read_tensors(file)
            if about != {"client": client, "round": written}:
                raise Damaged(f"it belongs to another client or round: {about}")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def write(self, client: int, round: int, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_tensors(self._file(client, round), arrays, {"client": client, "round": round})

    def prune(self, kept: Iterable[np.ndarray]) -> None:
        """Deletes the files that no array of `kept` names; each is (K,), by client the round that wrote its file."""
        if not self.folder.exists():
            return
        names = {
            self._file(client, written).name
            for index in kept
            for client, written in enumerate(index.tolist())
            if written
        }
        for file in self.folder.iterdir():
            if FILE_NAME.fullmatch(file.name) and file.name not in names:
                file.unlink(missing_ok=True)

    def _file(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client}-round-{round}.safetensors"
