"""A trial: one configuration on all tuning seeds, from evaluated round to evaluated round. Knows nothing of Ray."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from fedsim.cluster.pool import Pool
from fedsim.config import Config, merged
from fedsim.counts import COLUMNS, SPLITS
from fedsim.errors import InputError, Stopped
from fedsim.folder import LOCK, claim
from fedsim.report import Report, accuracy_per_client, best_round, tail_mean
from fedsim.simulate import Experiment, prepare, rounds

JUDGED_BY = ("val",)  # test rows of a trial are not even read
FREE_S = 60  # for the process that had a trial's folder to have ended, after it was killed


def config_of(base: Config, fields: Mapping[str, Any], **others: Any) -> Config:
    """The base config with some fields laid over it, and others in their place."""
    return Config(**merged(dict(base), dict(fields)) | others)


def trial_folder(sweep: Path, number: int) -> Path:
    return sweep / "trials" / f"{number:04d}"


def experiments_of(
    base: Experiment, fields: Mapping[str, Any], seeds: Sequence[int], folder: Path, number: int
) -> list[Experiment]:
    """A trial's experiment on each tuning seed.

    Args:
        base: encoded for all methods that a trial may have.
        fields: laid over its config.
        folder: of the sweep; `trials/NNNN` below it is the trial's.

    Raises:
        InputError: they do not go together.
    """
    here = trial_folder(folder, number)
    elsewhere = {"actors": 0, "gpus_per_actor": None, "address": None}  # its pool is given, and its cluster joined
    found, like = [], base
    for seed in seeds:
        out = here / f"seed-{seed}" if len(seeds) > 1 else here
        like = prepare(config_of(base.config, fields, seed=seed, out=out, **elsewhere), like, JUDGED_BY)
        found.append(like)
    return found


class Trial:
    """Runs side by side on one pool; one that was killed goes on from their checkpoints.

    It then tells of every round once more: whoever listens knows what has been told.

    Raises:
        Stopped: another process is still at work on it.
    """

    def __init__(self, experiments: Sequence[Experiment], pool: Pool) -> None:
        self.config = experiments[0].config
        self.round = 0
        self.runs: list[_Run] = []
        try:
            for experiment in experiments:
                self.runs.append(_Run(experiment, _held(experiment.folder), rounds(experiment, pool)))
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> bool:
        return self.round == self.config.rounds

    def advance(self) -> dict[str, float]:
        """Trains until the next evaluated round; `measures` of it, mean over seeds, and how many rounds these are of.

        Raises:
            InputError: training has diverged, or cannot begin, or there is nothing to judge it by.
        """
        self.round = min(self.round + self.config.evaluate_every, self.config.rounds)
        for run in self.runs:
            run.advance(self.round, self.done)
        found = pd.DataFrame([measures(run.report, self.round) for run in self.runs]).mean().to_dict()
        return found | {"chosen_round": round(found["chosen_round"]), "rounds": self.round}

    def close(self) -> None:
        """Lets go of the folders."""
        for run in self.runs:
            run.reports.close()
            run.lock.release()


@dataclass
class _Run:
    """One tuning seed of a trial."""

    experiment: Experiment
    lock: FileLock
    reports: Iterator[Report]
    report: Report | None = None

    def advance(self, round: int, last: bool) -> None:
        """Trains until so many rounds are done; no more where an earlier process has done them."""
        while self.report is None or len(self.report.rounds) < round:
            self.report = next(self.reports)
        if last:
            next(self.reports, None)  # which ends it, and tidies up


def measures(report: Report, round: int) -> dict[str, float]:
    """What a run has come to by some evaluated round.

    validation: clients' accuracy on their own validation rows, mean over clients, at the best round so far.
    worst_tenth: the same at the same round, mean over the worst tenth of the clients.
    bytes: up and down, of all clients.
    clock_s: simulated seconds.
    flops: of all clients' training.
    chosen_round: the best round so far.

    Raises:
        InputError: there are no validation rows.
    """
    chosen = best_round({done: mean for done, mean in report.validation.items() if done <= round})
    if isnan(report.validation[chosen]):
        raise InputError("no client has validation rows, by which a trial is judged")
    scores = pd.DataFrame(report.parts_of(chosen), columns=["round", *COLUMNS])
    accuracy = accuracy_per_client(scores[scores.split == SPLITS.index("val")])
    spent = report.round_table()[:round]
    return {
        "validation": report.validation[chosen],
        "worst_tenth": tail_mean(accuracy),
        "bytes": float(spent.bytes_up.sum() + spent.bytes_down.sum()),
        "clock_s": float(spent.clock_s.iloc[-1]),
        "flops": float(spent.flops.sum()),
        "chosen_round": chosen,
    }


def _held(folder: Path) -> FileLock:
    claim(folder, "run")
    try:
        lock = FileLock(folder / LOCK, timeout=FREE_S)
        lock.acquire()
        return lock
    except Timeout:
        raise Stopped(f"another process is still at work in {folder}") from None
