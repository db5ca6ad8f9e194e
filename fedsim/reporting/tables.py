"""A run as tidy tables: all that its page, its Parquet files and comparisons are made from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd

from fedsim.class_tasks import last_rounds
from fedsim.clients import new_of
from fedsim.counts import COLUMNS as SCORES
from fedsim.counts import GROUPS, SPLITS, Counts
from fedsim.reporting.metrics import (
    balanced_accuracy,
    best_round,
    continual,
    fairness,
    group_name,
    harmonic_mean,
    of_last_task,
    parts_by_rows,
    summarize,
    task_accuracies,
    validation_of,
)

# Column `model`: zero-shot CLIP (round 0); what the run trains; and what clients made of that after the last round.
ZERO_SHOT, TRAINED, TUNED = "zero_shot", "trained", "tuned"
EVALUATIONS = ("scores", "labels", "calibration")
TAIL = ("head", "medium", "tail")  # of the classes; see `parts_by_rows`
INTEGERS = ("round", "asked", "clients", "dropped", "late", "bytes_up", "bytes_down", "steps")
# Clients that were asked either drop out, miss the deadline, or count. Bytes down are of all that were asked, bytes up
# of those that count; those of a survey, in round 1, are of all clients that train. clock_s are simulated seconds since
# the start. Steps and flops, the floating-point operations of training, are of all clients together. epsilon is that of
# all rounds so far; nan without privacy. Of `clients`, device is the class of a client's device, from 0; rank and
# blocks are 0 where the fleet does not say them.
COLUMNS = {
    "scores": ("model", "round", *SCORES),
    "labels": ("model", "round", "group", "label", "correct", "predicted", "support"),
    "calibration": ("model", "round", "group", "bin", "rows", "correct", "confidence"),
    "rounds": (*INTEGERS[:-1], "seconds", "clock_s", "loss", "steps", "flops", "epsilon"),
    "partition": ("client", "domain", "label", "split", "rows"),
    "clients": ("client", "device", "rank", "blocks", "epochs", "bytes_down", "bytes_up"),
}
Evaluation = tuple[str, int, Counts]  # model, round


@dataclass(frozen=True)
class Tables:
    """A run, as `COLUMNS` has it, and what it is of.

    Attributes:
        experiment: the fields of the config that decide the result.
        domains, classes: names, by index.
        held_out: names of the held-out domains.
        facts: about the data, the device and the versions of packages.
        scores: one row per model, round, client, domain and split.
        labels: one row per model, round, group of rows (`GROUPS`) and class.
        calibration: one row per model, round, group of rows and bin of confidence.
        rounds: costs and training loss, one row per round.
        partition: how many rows each client has, by domain, label and split.
        clients: of each client that trains and is evaluated, its device and the bytes that it receives and sends.
        class_domain: of a suite, the index of the data set that each class belongs to.
    """

    experiment: dict[str, Any]
    domains: list[str]
    classes: list[str]
    held_out: list[str]
    facts: dict[str, Any]
    scores: pd.DataFrame
    labels: pd.DataFrame
    calibration: pd.DataFrame
    rounds: pd.DataFrame
    partition: pd.DataFrame
    clients: pd.DataFrame
    class_domain: list[int] = field(default_factory=list)

    def of(self, model: str, round: int | None = None) -> "Tables":
        """The same with the evaluations of one model alone, and of one round where it is given."""
        tables = {name: getattr(self, name) for name in EVALUATIONS}
        tables = {name: table[table.model == model] for name, table in tables.items()}
        if round is not None:
            tables = {name: table[table["round"] == round] for name, table in tables.items()}
        return replace(self, **tables)

    @cached_property
    def zero_shot(self) -> "Tables":
        return self.of(ZERO_SHOT)

    @cached_property
    def trained(self) -> "Tables":
        return self.of(TRAINED)

    @cached_property
    def chosen(self) -> "Tables":
        """The trained model at the chosen round."""
        return self.of(TRAINED, self.chosen_round)

    @cached_property
    def chosen_round(self) -> int:
        """`best_round` of the trained model."""
        rounds = self.trained.scores.groupby("round")
        validation = {int(cast(int, round)): validation_of(rows) for round, rows in rounds}
        return best_round(of_last_task(validation, self.experiment))

    @cached_property
    def last_round(self) -> int:
        """The last round that was evaluated."""
        return int(self.trained.scores["round"].max()) if len(self.trained.scores) else 0

    @property
    def new_classes(self) -> list[str]:
        """Names of the classes that no client trains on."""
        share = self.experiment.get("new_classes", 0.0)
        return [self.classes[index] for index in new_of(self.classes, share, self.class_domain)]

    @cached_property
    def by_task(self) -> pd.DataFrame:
        """`task_accuracies` of the trained model; empty unless classes arrive in tasks."""
        tasks = self.facts.get("class_tasks", [])
        ends = last_rounds(len(tasks), self.experiment["rounds"]) if tasks else []
        return task_accuracies(self.trained.labels, tasks, [round for round in ends if round <= self.last_round])

    @cached_property
    def tuned(self) -> "Tables | None":
        """The tuned models, if the run has any."""
        return self.of(TUNED) if (self.scores.model == TUNED).any() else None

    def summary(self, model: str = TRAINED, round: int | None = None) -> dict[str, float]:
        """`summarize` of zero-shot CLIP, of tuned models, or of the trained model in a round (default: the chosen).

        Where rows have groups, also `fairness`. Of the trained model at the chosen round, also `continual` if classes
        arrive in tasks.

        For tuned models, `dual` as well, unless clients had models of their own before: the harmonic mean of `pooled`
        of the last round's model and `personalization` of the tuned models.

        Source: the benchmark of that name in FLIP (0-ml/flip, commit 17fc171, flcore/servers/server_fedavg.py), with
        the clients' models before aggregation.

        Differs: FLIP weighs clients by train rows, and takes the models before the aggregation of the same round.

        With a long tail also `head`, `medium` and `tail`: balanced accuracy on the own test rows of all clients
        together, over the classes of each part.
        """
        if model == TRAINED and round is None:
            round = self.chosen_round
        if (model, round) not in self._summaries:
            self._summaries[model, round] = self._summary(model, round)
        return dict(self._summaries[model, round])

    @cached_property
    def _summaries(self) -> dict[tuple[str, int | None], dict[str, float]]:
        """Those that have been asked for; a page asks for each several times."""
        return {}

    def _summary(self, model: str, round: int | None) -> dict[str, float]:
        tables = self.of(model, round)
        means = summarize(tables.scores, tables.labels, tables.calibration, self.held_out, bool(self.class_domain))
        if groups := self.facts.get("groups"):
            means |= fairness(tables.labels, groups)
        if model == TRAINED and round == self.chosen_round and len(self.by_task):
            means |= continual(self.by_task)
        if model == TUNED and not self.facts.get("personal"):
            means["dual"] = harmonic_mean(self.summary(TRAINED, self.last_round)["pooled"], means["personalization"])
        own = tables.labels[tables.labels.group == "own"]
        parts = own.label.map(self.parts_of_classes)
        return means | {part: balanced_accuracy(own[parts == part]) for part in TAIL if self.parts_of_classes}

    @cached_property
    def parts_of_classes(self) -> dict[str, str]:
        """`parts_by_rows` of the train rows of all clients."""
        train = self.partition[self.partition.split == "train"]
        return parts_by_rows(train.groupby("label")["rows"].sum())


def score_table(evaluations: Iterable[Evaluation], domains: Sequence[str]) -> pd.DataFrame:
    """`Tables.scores` of some evaluations."""
    parts = [np.empty((0, 1 + len(SCORES)), np.int32)]
    models: list[str] = []
    for model, round, counts in evaluations:
        parts.append(np.column_stack([np.full(len(counts.scores), round, np.int32), counts.scores]))
        models += [model] * len(counts.scores)
    table = pd.DataFrame(np.concatenate(parts), columns=["round", *SCORES])
    table["domain"] = [domains[index] for index in table.domain]
    table["split"] = [SPLITS[index] for index in table.split]
    table.insert(0, "model", models)
    return table


def label_table(evaluations: Iterable[Evaluation], classes: Sequence[str], groups: Sequence[str] = ()) -> pd.DataFrame:
    """`Tables.labels` of some evaluations, without classes that have neither rows nor predictions.

    Args:
        groups: as `Labels.groups`.
    """
    names = [*GROUPS, *map(group_name, groups)]
    table = _tidy([(model, round, counts.labels) for model, round, counts in evaluations], COLUMNS["labels"], names)
    table["label"] = [classes[index] for index in table.label]
    return table


def calibration_table(evaluations: Iterable[Evaluation]) -> pd.DataFrame:
    """`Tables.calibration` of some evaluations, without empty bins."""
    bins = [
        (model, round, np.dstack([counts.bins[..., ::-1], counts.confidence])) for model, round, counts in evaluations
    ]
    return _tidy(bins, COLUMNS["calibration"], GROUPS)


def round_table(rounds: Sequence[np.ndarray]) -> pd.DataFrame:
    """`Tables.rounds`, from a row of float64 for each round."""
    columns = list(COLUMNS["rounds"])
    table = pd.DataFrame(np.array(rounds).reshape(-1, len(columns)), columns=columns)
    return table.astype(dict.fromkeys(INTEGERS, np.int64))


def partition_table(holdings: np.ndarray, domains: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """`Tables.partition`, from what `holdings` returns."""
    table = pd.DataFrame(holdings, columns=list(COLUMNS["partition"]))
    table["domain"] = [domains[index] for index in table.domain]
    table["label"] = [classes[index] for index in table.label]
    table["split"] = [("train", *SPLITS)[index] for index in table.split]
    return table


def _tidy(
    evaluations: Iterable[tuple[str, int, np.ndarray]], columns: Sequence[str], groups: Sequence[str]
) -> pd.DataFrame:
    """A row for each group and index that has counts.

    Args:
        evaluations: model, round, and (groups, n, k) counts.
        columns: of the model, the round, the group, the index in [0, n), and the k counts.
        groups: their names.
    """
    parts: list[np.ndarray] = [np.zeros((0, len(columns) - 1))]
    models: list[str] = []
    for model, round, counts in evaluations:
        group, index = np.nonzero(counts.any(axis=-1))
        parts.append(np.column_stack([np.full(len(group), round), group, index, counts[group, index]]))
        models += [model] * len(group)
    table = pd.DataFrame(np.concatenate(parts), columns=list(columns[1:]))
    table = table.astype({name: np.int64 for name in columns[1:] if name != "confidence"})
    table.insert(0, "model", models)
    return table.assign(group=[groups[int(index)] for index in table.group])
