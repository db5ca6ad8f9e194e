"""Features generated on demand, for any number of clients.

Source: ours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from fedsim.datasets import UNASSIGNED, Dataset, Features
from fedsim.errors import InputError
from fedsim.registry import component
from fedsim.rng import seed_for

BLOCKS = 2**40  # clients that could be made
NUMBERS = 2**26  # in one matrix: half a gigabyte while it is generated


@component
class Synthetic(Dataset):
    """Generates features: the class embedding, a shift of the domain, and noise.

    Needs the partition natural and --clients N.
    """

    rows: int = Field(100, ge=2, le=2**20, description="rows per client, all splits together")
    width: int = Field(512, ge=2, le=2**16, description="D, numbers of a feature")
    classes: int = Field(7, ge=2, le=2**16, description="number of classes")
    domains: int = Field(4, ge=1, le=2**16, description="number of visual domains; clients have them in turn")
    noise: float = Field(
        0.5, ge=0, le=1e6, description="standard deviation of each number; a class embedding has length 1"
    )
    shift: float = Field(0.5, ge=0, le=1e6, description="standard deviation of a domain's shift toward each class")
    seed: int = Field(0, ge=0, description="draws the features")

    def load(self, root):
        if root is not None:
            raise InputError(f"data set synthetic is made on demand and takes no --data-dir, but {root} was given")
        self._check_size()
        rng = np.random.default_rng(seed_for(self.seed, "prototypes"))
        text = rng.standard_normal((self.classes, self.width))
        text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
        shift = (self.shift * rng.standard_normal((self.domains, self.classes)) @ text).astype(np.float32)

        def generated(name: str) -> Any:  # used like an array
            return _Generated(self, name, text, shift)

        return Features(
            x=generated("x"),
            y=generated("y"),
            domain=generated("domain"),
            classes=tuple(f"class {k}" for k in range(self.classes)),
            domains=tuple(f"domain {k}" for k in range(self.domains)),
            split=np.full(1, UNASSIGNED, np.int8),
            rows_per_client=self.rows,
            class_embeddings=text,
            logit_scale=100.0,
        )

    def _check_size(self) -> None:
        """Each field has a limit; two of them together make a matrix, which has to fit into memory as well."""
        for name, other in (("rows", "width"), ("classes", "width"), ("domains", "classes"), ("domains", "width")):
            first, second = getattr(self, name), getattr(self, other)
            if first * second > NUMBERS:
                raise InputError(
                    f"--dataset.{name} {first} times --dataset.{other} {second} is {first * second:,} numbers; at most "
                    f"{NUMBERS:,} are made at a time"
                )


@dataclass(frozen=True)
class _Generated:
    """Can be indexed with rows like an array. Block b, the rows of client b, is generated from (seed, b).

    Attributes:
        name: x, y or domain.
        text: (C, D) unit rows.
        shift: (domains, D), added to every feature of a domain.
    """

    data: Synthetic
    name: str
    text: np.ndarray
    shift: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        rows = BLOCKS * self.data.rows
        return (rows, self.data.width) if self.name == "x" else (rows,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        block, index = np.divmod(rows, self.data.rows)
        if self.name == "domain":
            return block % self.data.domains
        kind = (np.float32, self.shape[1:]) if self.name == "x" else (np.int64, ())
        values = np.empty((len(rows), *kind[1]), kind[0])
        for each in np.unique(block):  # generated once each, in any order of its rows
            in_block = block == each
            values[in_block] = self._block(int(each))[index[in_block]]
        return values

    def _block(self, block: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64(seed_for(self.data.seed, "rows", block)))
        y = rng.integers(self.data.classes, size=self.data.rows)
        if self.name == "y":
            return y
        x = rng.standard_normal((self.data.rows, self.data.width), np.float32)
        x *= np.float32(self.data.noise)
        x += self.text[y]
        return x + self.shift[block % self.data.domains]
