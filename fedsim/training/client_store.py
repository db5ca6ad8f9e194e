"""What clients keep to themselves, in files beside the run: by client, and by the round that wrote it.

Neither the driver nor any actor holds more of it than the clients at work. A file is whole or not there, and is
written over by the same bits alone: a chunk that is done again, or a run that resumes, reads what the first one read.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError
from fedsim.files import Damaged, read_tensors, write_tensors
from fedsim.folder import intact, start_again
from fedsim.params import Params

OURS = re.compile(r"(part-.*-)?client-\d+-round-\d+\.safetensors")  # a process that was killed leaves a part


@dataclass(frozen=True)
class PrivateStore:
    """A folder that every actor sees; safetensors inside, one file per client."""

    folder: Path

    def read(self, client: int, written: int) -> Params:
        """What the client kept in the round `written`; nothing when that is 0.

        Raises:
            InputError: the file is missing or damaged.
        """
        if not written:
            return {}
        file = self._file(client, written)
        if not file.exists():
            raise InputError(f"{file} is not there; every machine of the cluster must see the folder of the run")
        with intact(file, start_again(self.folder.parent)):
            arrays, about = read_tensors(file)
            if about != {"client": client, "round": written}:
                raise Damaged(f"it is of another client or round: {about}")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def write(self, client: int, round: int, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        write_tensors(self._file(client, round), arrays, {"client": client, "round": round})

    def prune(self, kept: Iterable[np.ndarray]) -> None:
        """Deletes the files that none of the (K,) arrays names: by client, the round that wrote it."""
        if not self.folder.exists():
            return
        names = {
            self._file(client, written).name
            for index in kept
            for client, written in enumerate(index.tolist())
            if written
        }
        for file in self.folder.iterdir():
            if OURS.fullmatch(file.name) and file.name not in names:
                file.unlink(missing_ok=True)

    def _file(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client}-round-{round}.safetensors"
