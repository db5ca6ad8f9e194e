"""The report: tidy tables of counts, the means derived from them, and the round chosen on validation rows."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedsim.clients import Client, new_of
from fedsim.counts import COLUMNS, GROUPS, SPLITS, Counts
from fedsim.datasets import Labelled
from fedsim.files import Damaged, atomic, digest
from fedsim.params import Params
from fedsim.schedule import Turn
from fedsim.shares import part
from fedsim.state import ServerState

# Of the clients that were asked, some dropped out, some were late, and the work of `clients` counted. Bytes down are of
# all that were asked, bytes up of those whose work counted; clock_s are simulated seconds since the start. Local steps
# are of all clients together, and so are flops, the floating-point operations of their training.
COUNTS = ("round", "asked", "clients", "dropped", "late", "bytes_up", "bytes_down")
ROUND_COLUMNS = (*COUNTS, "seconds", "clock_s", "loss", "steps", "flops")
HOLDING_COLUMNS = ("client", "domain", "label", "split", "rows")
LABEL_COLUMNS = ("round", "group", "label", "correct", "predicted", "support")
TABLES = (
    "scores",
    "zero_shot",
    "labels",
    "zero_shot_labels",
    "calibration",
    "zero_shot_calibration",
    "rounds",
    "partition",
)
CALIBRATION_COLUMNS = ("round", "group", "bin", "rows", "correct", "confidence")


@dataclass
class Report:
    """Everything that a run says, as counts.

    Attributes:
        experiment: the fields of the config that decide the result.
        domains, classes: names, by index.
        held_out: names of the held-out domains.
        facts: what else is worth knowing: data, device, versions.
        counts: by round, what was found.
        validation: by round, `summarize`'s; what the chosen round is chosen by.
        zero_shot: the same as counts, of zero-shot CLIP.
        rounds: for each round (12,) float64, as in `ROUND_COLUMNS`.
        holdings: (n, 5) int32: rows of each client by domain, label and split.
        adapter: the tensors of the chosen round, private ones as they were in round 0.
        private: (K,) int64, the round of the file in `private/` that holds what a client kept in the chosen round.
        last: counts of the last round, where it is evaluated only because it is the last; see `conclude`.
        chosen_round: `best_round` so far.
    """

    experiment: dict[str, Any]
    domains: list[str]
    classes: list[str]
    held_out: list[str]
    facts: dict[str, Any]
    counts: dict[int, Counts] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    zero_shot: Counts = field(default_factory=Counts)
    rounds: list[np.ndarray] = field(default_factory=list)
    holdings: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int32))
    adapter: Params = field(default_factory=dict)
    private: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    last: Counts | None = None
    chosen_round: int = 0

    def add_scores(self, round: int, counts: Counts, validation: float | None = None) -> None:
        """What one evaluation found; its mean validation accuracy is computed where it is not given."""
        self.counts[round] = counts
        if validation is None:
            validation = validation_of(self._named(self.parts_of(round)))
        self.validation[round] = validation
        # Of two, and not of all: the cost of a round must not grow with the number of rounds.
        both = {done: self.validation[done] for done in (self.chosen_round, round) if done in self.validation}
        self.chosen_round = best_round(both)

    def judge(self, state: ServerState, counts: Counts) -> None:
        """Adds the evaluation of a state, whose tensors are kept if its round is the best so far."""
        self.add_scores(state.round, counts)
        if self.chosen_round == state.round:
            self.adapter, self.private = state.params, state.private

    def conclude(self, state: ServerState) -> None:
        """Adds the evaluation that the last round has only because it is the last.

        Not before a checkpoint is written: if the run is resumed with more rounds, this evaluation must be as if it
        had never been, and the tensors of the best of the others are needed.
        """
        if self.last:
            self.judge(state, self.last)

    def add_zero_shot(self, counts: Counts) -> None:
        self.zero_shot = counts

    def add_round(
        self, turn: Turn, clients: np.ndarray, payload: tuple[int, int], seconds: float, flops: float = float("nan")
    ) -> None:
        """What one round of training cost, and its mean loss over clients.

        Args:
            clients: (n,) of `updates.CLIENT_STATS`, those whose work counted.
            payload: bytes that a client receives, and that it sends.
            flops: floating-point operations, where somebody has counted them.
        """
        losses = clients["loss"][~np.isnan(clients["loss"])]
        counts = turn.round, turn.asked, len(clients), turn.dropped, turn.late
        sent = len(clients) * payload[1], turn.asked * payload[0]
        loss = losses.mean() if len(losses) else np.nan
        row = *counts, *sent, seconds, turn.clock_s, loss, clients["steps"].sum(), flops
        self.rounds.append(np.array(row, np.float64))

    # What is derived from the counts -----------------------------------------------------------------------

    @property
    def parts(self) -> dict[int, np.ndarray]:
        """By round, (n, 7) int32: round, client, domain, split, correct, total, correct_own."""
        return {round: self.parts_of(round) for round in self.counts}

    def parts_of(self, round: int) -> np.ndarray:
        return _with_round(round, self.counts[round])

    @property
    def scores(self) -> np.ndarray:
        """(n, 7) int32, of all rounds that were evaluated."""
        return np.concatenate([np.empty((0, 7), np.int32), *self.parts.values()])

    @property
    def new_classes(self) -> list[str]:
        """Names of the classes that nobody trains on."""
        return [self.classes[index] for index in new_of(self.classes, self.experiment.get("new_classes", 0.0))]

    @property
    def last_round(self) -> int:
        return next(reversed(self.counts), 0)

    def score_table(self) -> pd.DataFrame:
        """round, client, domain, split, correct, total, correct_own: one row per client, domain and split."""
        return self._named(self.scores)

    def zero_shot_table(self) -> pd.DataFrame:
        """The same for zero-shot CLIP."""
        return self._named(_with_round(0, self.zero_shot))

    def label_table(self) -> pd.DataFrame:
        """round, group, label, correct, predicted, support: one row per round, group of rows (`GROUPS`) and class."""
        return self._by_label(self.counts)

    def zero_shot_label_table(self) -> pd.DataFrame:
        """The same for zero-shot CLIP; round is 0."""
        return self._by_label({0: self.zero_shot})

    def calibration_table(self) -> pd.DataFrame:
        """round, group, bin, rows, correct, confidence: one row per round, group of rows and bin of confidence."""
        return _by_bin(self.counts)

    def zero_shot_calibration_table(self) -> pd.DataFrame:
        """The same for zero-shot CLIP; round is 0."""
        return _by_bin({0: self.zero_shot})

    def round_table(self) -> pd.DataFrame:
        table = pd.DataFrame(np.array(self.rounds).reshape(-1, len(ROUND_COLUMNS)), columns=list(ROUND_COLUMNS))
        return table.astype(dict.fromkeys((*COUNTS, "steps"), np.int64))

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
        one = {round: self.counts[round]}
        return summarize(self._named(self.parts_of(round)), self._by_label(one), _by_bin(one), self.held_out)

    def zero_shot_summary(self) -> dict[str, float]:
        tables = self.zero_shot_label_table(), self.zero_shot_calibration_table()
        return summarize(self.zero_shot_table(), *tables, self.held_out)

    # On disk -----------------------------------------------------------------------------------------------

    def tables(self) -> dict[str, pd.DataFrame]:
        """The Parquet tables of a run, by the names of `TABLES`."""
        tables = (
            self.score_table(),
            self.zero_shot_table(),
            self.label_table(),
            self.zero_shot_label_table(),
            self.calibration_table(),
            self.zero_shot_calibration_table(),
            self.round_table(),
            self.holding_table(),
        )
        return dict(zip(TABLES, tables, strict=True))

    def first_entry(self) -> dict[str, np.ndarray]:
        """What never changes, for the history."""
        return {"zero_shot": self.zero_shot.flat(), "holdings": self.holdings}

    def entry(self, round: int) -> dict[str, np.ndarray]:
        """What one round has added, for the history: its costs, and its counts if it was evaluated."""
        costs = {"costs": self.rounds[round - 1]} if round else {}
        if round not in self.counts:
            return costs
        about = np.array([round, self.validation[round]])
        return costs | {"scores": self.counts[round].flat(), "validation": about}

    def add_entry(self, entry: Mapping[str, np.ndarray]) -> None:
        """The inverse of `first_entry` and `entry`; entries must come in order."""
        if "holdings" in entry:
            self.zero_shot, self.holdings = Counts.from_flat(entry["zero_shot"]), entry["holdings"]
        if "costs" in entry:
            self.rounds.append(entry["costs"])
        if "scores" in entry:
            round, validation = entry["validation"].tolist()
            self.add_scores(int(round), Counts.from_flat(entry["scores"]), validation)

    def about(self) -> dict[str, Any]:
        """All that is no array and does not change, for a checkpoint."""
        return {name: getattr(self, name) for name in ("experiment", "domains", "classes", "held_out", "facts")}

    def _named(self, scores: np.ndarray) -> pd.DataFrame:
        table = pd.DataFrame(scores, columns=["round", *COLUMNS])
        table["domain"] = [self.domains[index] for index in table.domain]
        table["split"] = [SPLITS[index] for index in table.split]
        return table

    def _by_label(self, counts: Mapping[int, Counts]) -> pd.DataFrame:
        table = _tidy({round: of.labels for round, of in counts.items()}, LABEL_COLUMNS)
        return table.assign(label=[self.classes[index] for index in table.label])


def accuracy_per_client(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, client), over all domains and splits of the given rows."""
    counts = scores.groupby(["round", "client"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def accuracy_per_domain(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, domain), over all clients and splits of the given rows."""
    counts = scores.groupby(["round", "domain"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def validation_of(scores: pd.DataFrame) -> float:
    """Clients' accuracy on their own validation rows in one round, mean over clients; nan without such rows."""
    return float(accuracy_per_client(scores[scores.split == "val"]).mean())


def best_round(validation: Mapping[int, float]) -> int:
    """The first round of the best mean validation accuracy over clients, zero-shot not among them.

    Without validation rows, the last round. Test rows never choose.
    """
    trained = {round: mean for round, mean in validation.items() if round and not np.isnan(mean)}
    return max(trained, key=lambda round: trained[round]) if trained else max(validation, default=0)


def choose_round(scores: pd.DataFrame) -> int:
    """`best_round` of a table of scores."""
    rounds = scores.groupby("round")
    return best_round({int(cast(int, round)): validation_of(rows) for round, rows in rounds})


def tail_of(clients: int, share: float = 0.1) -> int:
    """How many of so many clients are the worst-off ones; one at least."""
    return max(1, part(clients, share))


def tail_mean(accuracy: pd.Series, share: float = 0.1) -> float:
    """Mean of the worst-off clients, which the mean over all hides; see `tail_of`."""
    return float(accuracy.sort_values().iloc[: tail_of(len(accuracy), share)].mean())


def macro_f1(labels: pd.DataFrame) -> float:
    """F1 in [0, 1] of some rows, mean over classes with rows or predictions; columns as in `LABEL_COLUMNS`."""
    counts = labels.groupby("label")[["correct", "predicted", "support"]].sum()
    return float((2 * counts.correct / (counts.predicted + counts.support)).mean())


def calibration_error(bins: pd.DataFrame) -> float:
    """How far confidence is from accuracy, mean over rows of their bins; columns as in `CALIBRATION_COLUMNS`.

    Source: the expected calibration error of Guo et al. 2017, arXiv 1706.04599.
    """
    counts = bins.groupby("bin")[["rows", "correct", "confidence"]].sum()
    return float((counts.correct - counts.confidence).abs().sum() / counts.rows.sum()) if len(counts) else float("nan")


def pooled_accuracy(scores: pd.DataFrame) -> float:
    """Accuracy in [0, 1] over all of the given rows, whoever's they are; nan without any."""
    return float(scores.correct.sum() / scores.total.sum()) if scores.total.sum() else float("nan")


def harmonic_mean(*accuracies: float) -> float:
    """0 where one of them is; nan where one is missing."""
    if 0.0 in accuracies:
        return float("nan") if np.isnan(accuracies).any() else 0.0
    return len(accuracies) / sum(1 / accuracy for accuracy in accuracies)


def summarize(
    scores: pd.DataFrame, labels: pd.DataFrame, calibration: pd.DataFrame, held_out: list[str]
) -> dict[str, float]:
    """What one evaluation comes to; nan where it has no such rows.

    All classes that anybody trains on compete for a row, where nothing else is said.

    generalization: test accuracy on held-out domains, mean over domains.
    personalization: clients' accuracy on their own test rows, mean over clients.
    worst_tenth: the same, mean over the worst tenth of the clients.
    validation: clients' accuracy on their own validation rows, mean over clients.
    spread: standard deviation of what personalization is the mean of.
    personalization_own: as personalization, but a client's own classes alone compete for its rows.
    macro_f1, ece: of all clients' own test rows together: see `macro_f1` and `calibration_error`.
    generalization_f1, generalization_ece: of the test rows of all held-out domains together.

    And where there are rows of new classes, under the names of the papers that train on base classes only:

    local: personalization_own.
    base: accuracy on all clients' own test rows together.
    new: accuracy on test rows of new classes, for which these alone compete.
    harmonic_2: harmonic mean of base and new (CoCoOp, Zhou et al. 2022, arXiv 2203.05557).
    harmonic_3: harmonic mean of local, base and new (FedTPG, Qiu et al. 2024, arXiv 2310.06123).
    """
    away = scores.domain.isin(held_out)
    test, new = scores.split == "test", scores.split == "new"
    own = accuracy_per_client(scores[test & ~away])
    among_own = accuracy_per_client(scores[test & ~away].assign(correct=scores.correct_own))
    groups = {group: (labels[labels.group == group], calibration[calibration.group == group]) for group in GROUPS}
    found = {
        "generalization": float(accuracy_per_domain(scores[test & away]).mean()),
        "personalization": float(own.mean()),
        "worst_tenth": tail_mean(own) if len(own) else float("nan"),
        "validation": validation_of(scores),
        "spread": float(own.std(ddof=0)),
        "personalization_own": float(among_own.mean()),
    }
    for group, f1, ece in (("own", "macro_f1", "ece"), ("held_out", "generalization_f1", "generalization_ece")):
        found |= {f1: macro_f1(groups[group][0]), ece: calibration_error(groups[group][1])}
    if not new.any():
        return found
    local = found["personalization_own"]
    base, unseen = (pooled_accuracy(scores[rows]) for rows in (test & ~away, new))
    found |= {"local": local, "base": base, "new": unseen}
    return found | {"harmonic_2": harmonic_mean(base, unseen), "harmonic_3": harmonic_mean(local, base, unseen)}


def holdings(rows: Labelled, clients: Iterable[Client]) -> np.ndarray:
    """(n, 5) int32: client, domain, label, split (train, then `SPLITS`), rows."""
    counted = []
    for client in clients:
        for split, mine in ((0, client.train), (1, client.val), (1 + SPLITS.index(client.split), client.test)):
            cells, counts = np.unique(rows.domain[mine] * len(rows.classes) + rows.y[mine], return_counts=True)
            domain, label = np.divmod(cells, len(rows.classes))
            who, part = (np.full(len(cells), value) for value in (client.id, split))
            counted.append(np.column_stack([who, domain, label, part, counts]).astype(np.int32))
    return np.concatenate([np.empty((0, len(HOLDING_COLUMNS)), np.int32), *counted])


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
        "matplotlib",
    )
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        name: version(name) for name in packages
    }


def write_tables(report: Report, folder: Path) -> None:
    for name, table in report.tables().items():
        write_table(folder / f"{name}.parquet", table)


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Writes Parquet with a digest of the values in its metadata; whole or not at all."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    about = {**arrow.schema.metadata, b"fedsim": _digest(arrow).encode()}
    with atomic(file) as stream:
        pq.write_table(arrow.replace_schema_metadata(about), stream)


def read_table(file: Path) -> pd.DataFrame:
    """What `write_table` wrote.

    Raises:
        Damaged: a value is not as it was written, or the file is another one.
        OSError: there is no such file, for example.
    """
    try:
        arrow = pq.read_table(pa.BufferReader(file.read_bytes()))
        stated = (arrow.schema.metadata or {}).get(b"fedsim", b"")
        if stated == _digest(arrow).encode():
            # Without pandas' own metadata, which the digest does not cover.
            return arrow.replace_schema_metadata(None).to_pandas()
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise Damaged(str(error).splitlines()[0]) from None
    raise Damaged("its values are not those that its digest was taken of" if stated else "it has no digest")


def _digest(table: pa.Table) -> str:
    parts: list[str | np.ndarray] = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        parts.append(f"{name} {column.type}")
        if not pa.types.is_primitive(column.type):
            coded = column.combine_chunks().dictionary_encode()
            parts.append(json.dumps(coded.dictionary.to_pylist()))
            column = coded.indices
        parts.append(column.to_numpy(zero_copy_only=False))
    return digest(*parts)


def to_yaml(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(fields)), sort_keys=False)


def _with_round(round: int, counts: Counts) -> np.ndarray:
    return np.column_stack([np.full(len(counts.scores), round), counts.scores]).astype(np.int32)


def _by_bin(counts: Mapping[int, Counts]) -> pd.DataFrame:
    found = {round: np.dstack([of.bins[..., ::-1], of.confidence]) for round, of in counts.items()}
    return _tidy(found, CALIBRATION_COLUMNS)


def _tidy(found: Mapping[int, np.ndarray], columns: tuple[str, ...]) -> pd.DataFrame:
    """(groups, n, k) counts by round, as a table of those that are not all 0: round, group, place in n, k counts."""
    parts: list[np.ndarray] = [np.zeros((0, len(columns)))]
    for round, counts in found.items():
        group, place = np.nonzero(counts.any(axis=-1))
        parts.append(np.column_stack([np.full(len(group), round), group, place, counts[group, place]]))
    table = pd.DataFrame(np.concatenate(parts), columns=list(columns))
    table = table.astype({name: np.int64 for name in columns if name != "confidence"})
    return table.assign(group=[GROUPS[index] for index in table.group])
