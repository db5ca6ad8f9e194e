"""The report: tidy tables of counts, the means derived from them, and the round chosen on validation rows."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from fedsim.clients import Client
from fedsim.datasets import Labelled
from fedsim.evaluate import COLUMNS, SPLITS
from fedsim.params import Params
from fedsim.servers import Partial

ROUND_COLUMNS = ("round", "clients", "bytes_up", "bytes_down", "seconds", "loss")
HOLDING_COLUMNS = ("client", "domain", "label", "split", "rows")
_TABLES = ("scores", "rounds", "zero_shot", "holdings")


@dataclass
class Report:
    """Everything that a run says, as counts.

    Attributes:
        experiment: the fields of the config that decide the result.
        domains, classes: names, by index.
        held_out: names of the held-out domains.
        facts: what else is worth knowing: data, device, versions.
        scores: (n, 6) int64: round, client, domain, split, correct, total.
        zero_shot: (n, 6), the same for zero-shot CLIP; round is 0.
        rounds: (r, 6) float64, columns as in `ROUND_COLUMNS`.
        holdings: (n, 5) int64: rows of each client by domain, label and split.
        adapter: the tensors of the chosen round; private ones as `client_3/name`.
    """

    experiment: dict[str, Any]
    domains: list[str]
    classes: list[str]
    held_out: list[str]
    facts: dict[str, Any]
    scores: np.ndarray = field(default_factory=lambda: np.empty((0, 6), np.int64))
    zero_shot: np.ndarray = field(default_factory=lambda: np.empty((0, 6), np.int64))
    rounds: np.ndarray = field(default_factory=lambda: np.empty((0, 6)))
    holdings: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int64))
    adapter: Params = field(default_factory=dict)

    def add_scores(self, round: int, counts: np.ndarray) -> None:
        """Counts of one evaluation, columns as in `evaluate.COLUMNS`."""
        self.scores = np.concatenate([self.scores, _with_round(round, counts)])

    def add_zero_shot(self, counts: np.ndarray) -> None:
        self.zero_shot = _with_round(0, counts)

    def add_round(self, round: int, total: Partial, seconds: float) -> None:
        """What one round of training cost, and its mean loss over clients."""
        losses = [client.loss for client in total.clients]
        loss = np.nanmean(losses) if not np.isnan(losses).all() else np.nan
        up, down = sum(c.bytes_up for c in total.clients), sum(c.bytes_down for c in total.clients)
        row = round, len(total.clients), up, down, seconds, loss
        self.rounds = np.concatenate([self.rounds, [row]])

    # What is derived from the counts -----------------------------------------------------------------------

    @property
    def last_round(self) -> int:
        return int(self.scores[:, 0].max(initial=0))

    @property
    def chosen_round(self) -> int:
        return choose_round(self.score_table())

    def score_table(self) -> pd.DataFrame:
        """round, client, domain, split, correct, total: one row per client, domain and split."""
        return self._named(self.scores)

    def zero_shot_table(self) -> pd.DataFrame:
        """The same for zero-shot CLIP."""
        return self._named(self.zero_shot)

    def round_table(self) -> pd.DataFrame:
        table = pd.DataFrame(self.rounds, columns=list(ROUND_COLUMNS))
        whole = dict.fromkeys(("round", "clients", "bytes_up", "bytes_down"), np.int64)
        return table.astype(whole)

    def holding_table(self) -> pd.DataFrame:
        """client, domain, label, split, rows: who holds what."""
        table = pd.DataFrame(self.holdings, columns=list(HOLDING_COLUMNS))
        table["domain"] = [self.domains[index] for index in table.domain]
        table["label"] = [self.classes[index] for index in table.label]
        table["split"] = [("train", *SPLITS)[index] for index in table.split]
        return table

    def summary(self, round: int | None = None) -> dict[str, float]:
        """`summarize` of one round's scores; the chosen round where none is named."""
        round = self.chosen_round if round is None else round
        return summarize(self.score_table()[lambda t: t["round"] == round], self.held_out)

    def zero_shot_summary(self) -> dict[str, float]:
        return summarize(self.zero_shot_table(), self.held_out)

    # On disk -----------------------------------------------------------------------------------------------

    def tables(self) -> dict[str, pd.DataFrame]:
        """The Parquet tables of a run, by file name."""
        return {
            "scores": self.score_table(),
            "zero_shot": self.zero_shot_table(),
            "rounds": self.round_table(),
            "partition": self.holding_table(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All arrays, for a checkpoint."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in _TABLES}
        return arrays | {f"adapter/{name}": tensor for name, tensor in self.adapter.items()}

    def about(self) -> dict[str, Any]:
        """All that is no array, for a checkpoint."""
        names = "experiment", "domains", "classes", "held_out", "facts"
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> Report:
        """The inverse of `tensors` and `about`."""
        adapter = {n.removeprefix("adapter/"): t for n, t in tensors.items() if n.startswith("adapter/")}
        return cls(**about, **{name: tensors[name].numpy() for name in _TABLES}, adapter=adapter)

    def _named(self, scores: np.ndarray) -> pd.DataFrame:
        table = pd.DataFrame(scores, columns=["round", *COLUMNS])
        table["domain"] = [self.domains[index] for index in table.domain]
        table["split"] = [SPLITS[index] for index in table.split]
        return table


def accuracy_per_client(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, client), over all domains and splits of the given rows."""
    counts = scores.groupby(["round", "client"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def accuracy_per_domain(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, domain), over all clients and splits of the given rows."""
    counts = scores.groupby(["round", "domain"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def choose_round(scores: pd.DataFrame) -> int:
    """The first round of the best mean validation accuracy over clients, zero-shot not among them.

    Without validation rows, the last round. Test rows never choose.
    """
    val = accuracy_per_client(scores[(scores.split == "val") & (scores["round"] > 0)])
    if val.empty:
        return int(scores["round"].max()) if len(scores) else 0
    return int(val.groupby("round").mean().idxmax())


def tail_mean(accuracy: pd.Series, share: float = 0.1) -> float:
    """Mean of the worst-off clients, which the mean over all hides; at least one client is the tail."""
    return float(accuracy.sort_values().iloc[: max(1, int(share * len(accuracy)))].mean())


def summarize(scores: pd.DataFrame, held_out: list[str]) -> dict[str, float]:
    """What one evaluation comes to; nan where it has no such rows.

    generalization: test accuracy on held-out domains, mean over domains.
    personalization: clients' accuracy on their own test rows, mean over clients.
    worst_tenth: the same, mean over the worst tenth of the clients.
    validation: clients' accuracy on their own validation rows, mean over clients.
    """
    away = scores.domain.isin(held_out)
    test, val = scores.split == "test", scores.split == "val"
    own = accuracy_per_client(scores[test & ~away])
    return {
        "generalization": float(accuracy_per_domain(scores[test & away]).mean()),
        "personalization": float(own.mean()),
        "worst_tenth": tail_mean(own) if len(own) else float("nan"),
        "validation": float(accuracy_per_client(scores[val]).mean()),
    }


def holdings(rows: Labelled, clients: list[Client]) -> np.ndarray:
    """(n, 5) int64: client, domain, label, split (train, val, test), rows."""
    counted = []
    for client in clients:
        for split, mine in enumerate((client.train, client.val, client.test)):
            pairs = np.stack([rows.domain[mine], rows.y[mine]], axis=1)
            cells, counts = np.unique(pairs, axis=0, return_counts=True)
            counted += [(client.id, *cell, split, n) for cell, n in zip(cells, counts, strict=True)]
    return np.array(counted, np.int64).reshape(-1, len(HOLDING_COLUMNS))


def environment() -> dict[str, str]:
    """Versions of what a run's bits depend on."""
    packages = (
        "fedsim",
        "ray",
        "torch",
        "torchvision",
        "open_clip_torch",
        "timm",
        "numpy",
        "pyarrow",
        "pandas",
    )
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        name: version(name) for name in packages
    }


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    part = file.with_name(f"part-{file.name}")
    part.write_text(text)
    part.replace(file)


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Writes the Parquet tables; returns their paths."""
    files = []
    for name, table in report.tables().items():
        file = folder / f"{name}.parquet"
        part = file.with_name(f"part-{file.name}")
        table.to_parquet(part, index=False)
        part.replace(file)
        files.append(file)
    return files


def to_yaml(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(fields)), sort_keys=False)


def _with_round(round: int, counts: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(len(counts), round, np.int64), counts])
