"""Features made on demand: any number of clients, of which none takes memory before its turn.

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
NUMBERS = 2**26  # of one matrix: half a gigabyte while it is made


@component
class Synthetic(Dataset):
    """A feature is its class's prototype, leaned toward what its domain shows most, and noise.

    Needs the partition natural, and --clients N.
    """

    rows: int = Field(100, ge=2, le=2**20, description="rows of a client, of all splits together")
    width: int = Field(512, ge=2, le=2**16, description="D, numbers of a feature")
    classes: int = Field(7, ge=2, le=2**16, description="number of classes")
    domains: int = Field(4, ge=1, le=2**16, description="number of visual domains, taking turns over clients")
    noise: float = Field(0.5, ge=0, le=1e6, description="deviation of each number; a prototype has length 1")
    shift: float = Field(0.5, ge=0, le=1e6, description="deviation of how far a domain leans toward each class")
    seed: int = Field(0, ge=0, description="draws the features")

    def load(self, root):
        if root is not None:
            raise InputError(f"data set synthetic is made on demand and takes no --data-dir, but {root} was given")
        self._check_size()
        rng = np.random.default_rng(seed_for(self.seed, "prototypes"))
        text = rng.standard_normal((self.classes, self.width))
        text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
        shift = (self.shift * rng.standard_normal((self.domains, self.classes)) @ text).astype(np.float32)

        def made(of: str) -> Any:  # what stands for an array
            return _Made(self, of, text, shift)

        return Features(
            x=made("x"),
            y=made("y"),
            domain=made("domain"),
            classes=tuple(f"class {k}" for k in range(self.classes)),
            domains=tuple(f"domain {k}" for k in range(self.domains)),
            split=np.full(1, UNASSIGNED, np.int8),
            rows_per_client=self.rows,
            class_embeddings=text,
            logit_scale=100.0,
        )

    def _check_size(self) -> None:
        """Each field has a limit; two of them together make a matrix, which has to fit into memory as well."""
        for one, other in (("rows", "width"), ("classes", "width"), ("domains", "classes"), ("domains", "width")):
            first, second = getattr(self, one), getattr(self, other)
            if first * second > NUMBERS:
                raise InputError(
                    f"--dataset.{one} {first} times --dataset.{other} {second} is {first * second:,} numbers; at most "
                    f"{NUMBERS:,} are made at a time"
                )


@dataclass(frozen=True)
class _Made:
    """What an array would be to who asks it for rows; block b of `rows` rows is made from (seed, b).

    Attributes:
        of: which of the three it is: x, y or domain.
        text: (C, D) unit rows.
        shift: (domains, D), added to every feature of a domain.
    """

    like: Synthetic
    of: str
    text: np.ndarray
    shift: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        rows = BLOCKS * self.like.rows
        return (rows, self.like.width) if self.of == "x" else (rows,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        block, place = np.divmod(rows, self.like.rows)
        if self.of == "domain":
            return block % self.like.domains
        kind = (np.float32, self.shape[1:]) if self.of == "x" else (np.int64, ())
        made = np.empty((len(rows), *kind[1]), kind[0])
        for one in np.unique(block):  # once each, in whatever order its rows are asked for
            mine = block == one
            made[mine] = self._block(int(one))[place[mine]]
        return made

    def _block(self, block: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64(seed_for(self.like.seed, "rows", block)))
        y = rng.integers(self.like.classes, size=self.like.rows)
        if self.of == "y":
            return y
        x = rng.standard_normal((self.like.rows, self.like.width), np.float32)
        x *= np.float32(self.like.noise)
        x += self.text[y]
        return x + self.shift[block % self.like.domains]
