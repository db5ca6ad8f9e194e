"""The report of a run while it goes on: counts of each evaluated round, costs of each round, the best tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from fedsim.clients import Client
from fedsim.counts import SPLITS, Counts
from fedsim.datasets import Labels
from fedsim.params import Params
from fedsim.reporting.accuracies import accuracies
from fedsim.reporting.metrics import best_round, of_last_task, validation_of
from fedsim.reporting.tables import (
    COLUMNS,
    TRAINED,
    TUNED,
    ZERO_SHOT,
    Tables,
    calibration_table,
    label_table,
    partition_table,
    round_table,
    score_table,
)
from fedsim.schedule import PlannedRound
from fedsim.state import ServerState


@dataclass(repr=False)
class Report:
    """The results of a run, as counts.

    Attributes:
        experiment: the fields of the config that decide the result.
        domains, classes: names, by index.
        held_out: names of the held-out domains.
        facts: about the data, the device and the versions of packages.
        class_domain: of a suite, the index of the data set that each class belongs to.
        counts: by evaluated round.
        validation: by evaluated round, the mean accuracy that the chosen round has the highest of.
        zero_shot: counts of zero-shot CLIP.
        rounds: for each round (13,) float64, the columns of `Tables.rounds`.
        holdings: (n, 5) int32, what `holdings` returns.
        devices: (n, 7) int64, the columns of `Tables.clients`.
        adapter: the tensors of the chosen round, private ones as they were in round 0.
        private: (K,) int64, by client the round of its file in `private/` at the chosen round.
        last: counts of the last round, if it is evaluated only because it is the last; see `conclude`.
        tuned: counts of the models that clients have tuned after the last round.
        chosen_round: `best_round` so far.
    """

    experiment: dict[str, Any]
    domains: list[str]
    classes: list[str]
    held_out: list[str]
    facts: dict[str, Any]
    class_domain: list[int] = field(default_factory=list)
    counts: dict[int, Counts] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    zero_shot: Counts = field(default_factory=Counts)
    rounds: list[np.ndarray] = field(default_factory=list)
    holdings: np.ndarray = field(default_factory=lambda: np.empty((0, len(COLUMNS["partition"])), np.int32))
    devices: np.ndarray = field(default_factory=lambda: np.empty((0, len(COLUMNS["clients"])), np.int64))
    adapter: Params = field(default_factory=dict)
    private: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last: Counts | None = None
    tuned: Counts | None = None
    chosen_round: int = 0

    def tables(self) -> Tables:
        """The counts and costs so far, as the Parquet files and the page of the run have them."""
        evaluations = [(TRAINED, round, counts) for round, counts in self.counts.items()]
        evaluations.insert(0, (ZERO_SHOT, 0, self.zero_shot))
        if self.tuned:
            evaluations.append((TUNED, len(self.rounds), self.tuned))
        return Tables(
            **self.about(),
            scores=score_table(evaluations, self.domains),
            labels=label_table(evaluations, self.classes, self.facts.get("groups", ())),
            calibration=calibration_table(evaluations),
            rounds=round_table(self.rounds),
            partition=partition_table(self.holdings, self.domains, self.classes),
            clients=pd.DataFrame(self.devices, columns=list(COLUMNS["clients"])),
        )

    def summary(self, model: str = TRAINED, round: int | None = None) -> dict[str, float]:
        """`Tables.summary`: means of the trained model at the chosen round, unless another is given."""
        return self.tables().summary(model, round)

    def __repr__(self) -> str:
        method, server = self.experiment["method"]["name"], self.experiment["server"]["name"]
        return f"<Report of {method} with {server}: round {self.chosen_round} of {self.last_round}>"

    def _repr_html_(self) -> str:
        """The accuracies, as a notebook shows them."""
        made = accuracies(self.tables()).items()
        return "".join(f"<p>{escape(title)}</p>{rows.to_html(border=0)}" for title, rows in made)

    @property
    def last_round(self) -> int:
        """The last round that was evaluated."""
        return next(reversed(self.counts), 0)

    @property
    def complete(self) -> bool:
        """Whether all rounds are done, and models tuned if they are to be."""
        tuned = self.tuned is not None or not self.experiment["tune_epochs"]
        return len(self.rounds) == self.experiment["rounds"] and tuned

    # While the run goes on ---------------------------------------------------------------------------------

    def add_zero_shot(self, counts: Counts) -> None:
        self.zero_shot = counts

    def add_scores(self, round: int, counts: Counts, validation: float | None = None) -> None:
        """Adds an evaluation.

        Args:
            validation: its mean validation accuracy (default: computed from the counts).
        """
        self.counts[round] = counts
        if validation is None:
            validation = validation_of(score_table([(TRAINED, round, counts)], self.domains))
        self.validation[round] = validation
        # Only two are compared, so that the cost of a round does not grow with the number of rounds.
        both = {done: self.validation[done] for done in (self.chosen_round, round) if done in self.validation}
        self.chosen_round = best_round(of_last_task(both, self.experiment))

    def add_evaluation(self, state: ServerState, counts: Counts) -> None:
        """Adds the evaluation of a state, and keeps its tensors if its round is the best so far.

        Args:
            state: with the parameters that are evaluated.
        """
        self.add_scores(state.round, counts)
        if self.chosen_round == state.round:
            self.adapter, self.private = state.params, state.private

    def conclude(self, state: ServerState) -> None:
        """Adds the evaluation that the last round has only because it is the last.

        Call it after the checkpoint is written: a run that is resumed with more rounds must not know this evaluation,
        and needs the tensors of the best of the others.

        Args:
            state: as in `add_evaluation`.
        """
        if self.last:
            self.add_evaluation(state, self.last)

    def add_round(
        self,
        planned: PlannedRound,
        clients: np.ndarray,
        sent: tuple[int, int],
        seconds: float,
        flops: float = float("nan"),
        epsilon: float = float("nan"),
    ) -> None:
        """Adds the costs of a round of training, and its mean loss over clients that are not malicious.

        Args:
            clients: (n,) of `updates.CLIENT_STATS`, of the clients that count.
            sent: bytes that all clients receive, and that they send.
            flops: floating-point operations; nan if they were not counted.
            epsilon: of all rounds so far; nan without privacy.
        """
        honest = ~np.isin(clients["client"], self.facts.get("malicious", []))
        losses = clients["loss"][honest & ~np.isnan(clients["loss"])]
        counts = planned.round, planned.asked, len(clients), planned.dropped, planned.late
        down, up = sent
        loss = losses.mean() if len(losses) else np.nan
        row = *counts, up, down, seconds, planned.clock_s, loss, clients["steps"].sum(), flops, epsilon
        self.rounds.append(np.array(row, np.float64))

    # In a checkpoint ---------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """The fields that are no arrays and do not change."""
        return {
            name: getattr(self, name)
            for name in ("experiment", "domains", "classes", "held_out", "facts", "class_domain")
        }

    def first_entry(self) -> dict[str, np.ndarray]:
        """The arrays that never change, for the history."""
        return {"zero_shot": self.zero_shot.flat(), "holdings": self.holdings, "devices": self.devices}

    def entry(self, round: int) -> dict[str, np.ndarray]:
        """The arrays that a round has added, for the history: its costs, and its counts if it was evaluated."""
        costs = {"costs": self.rounds[round - 1]} if round else {}
        if round not in self.counts:
            return costs
        validation = np.array([round, self.validation[round]])
        return costs | {"scores": self.counts[round].flat(), "validation": validation}

    def add_entry(self, entry: Mapping[str, np.ndarray]) -> None:
        """The inverse of `first_entry` and `entry`; entries must come in order."""
        if "holdings" in entry:
            self.zero_shot, self.holdings = Counts.from_flat(entry["zero_shot"]), entry["holdings"]
            self.devices = entry["devices"]
        if "costs" in entry:
            self.rounds.append(entry["costs"])
        if "scores" in entry:
            round, validation = entry["validation"].tolist()
            self.add_scores(int(round), Counts.from_flat(entry["scores"]), validation)


def holdings(rows: Labels, clients: Iterable[Client]) -> np.ndarray:
    """(n, 5) int32: client, domain, label, split (train, then `SPLITS`), rows."""
    parts = [np.empty((0, len(COLUMNS["partition"])), np.int32)]
    for client in clients:
        splits = (0, client.train), (1, client.val), (1 + SPLITS.index(client.split), client.test)
        for split, index in splits:
            cells, counts = np.unique(rows.domain[index] * len(rows.classes) + rows.y[index], return_counts=True)
            domain, label = np.divmod(cells, len(rows.classes))
            table = np.column_stack([np.full_like(cells, client.id), domain, label, np.full_like(cells, split), counts])
            parts.append(table.astype(np.int32))
    return np.concatenate(parts)
