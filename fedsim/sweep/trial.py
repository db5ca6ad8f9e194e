"""A trial: one configuration on all tuning seeds, from one evaluated round to the next. Does not know Ray."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from fedsim.cluster.workers import Pool
from fedsim.config import Config, merged
from fedsim.errors import InputError, Stopped
from fedsim.folder import LOCK, claim
from fedsim.prepare import Experiment, prepare
from fedsim.reporting.metrics import accuracy_per_client, best_round, tail_mean
from fedsim.reporting.report import Report
from fedsim.reporting.tables import TRAINED, round_table, score_table
from fedsim.simulate import rounds

EVALUATED_ON = ("val",)  # trials do not even read test rows
WAIT_S = 60  # for a killed process to release a trial's folder


def config_of(base: Config, fields: Mapping[str, Any], **others: Any) -> Config:
    """The base config with some fields merged into it, and `others` replaced."""
    return Config(**merged(dict(base), dict(fields)) | others)


def trial_folder(sweep: Path, number: int) -> Path:
    return sweep / "trials" / f"{number:04d}"


def experiments_of(
    base: Experiment, fields: Mapping[str, Any], seeds: Sequence[int], folder: Path, number: int
) -> list[Experiment]:
    """A trial's experiment for each tuning seed.

    Args:
        base: encoded for every method that a trial may train.
        fields: merged into its config.
        folder: of the sweep; the trial's is `trials/NNNN` in it.

    Raises:
        InputError: the fields do not fit together.
    """
    trial = trial_folder(folder, number)
    execution = {"actors": 0, "gpus_per_actor": None, "address": None}  # the sweep provides the pool and the cluster
    experiments, previous = [], base
    for seed in seeds:
        out = trial / f"seed-{seed}" if len(seeds) > 1 else trial
        previous = prepare(config_of(base.config, fields, seed=seed, out=out, **execution), previous, EVALUATED_ON)
        experiments.append(previous)
    return experiments


class Trial:
    """The runs of one trial, one per tuning seed, on one pool; resumes from their checkpoints.

    A resumed trial reports its earlier rounds again; callers skip those they have seen.

    Raises:
        Stopped: another process still works on it.
    """

    def __init__(self, experiments: Sequence[Experiment], pool: Pool) -> None:
        self.config = experiments[0].config
        self.round = 0
        self.runs: list[_Run] = []
        try:
            for experiment in experiments:
                self.runs.append(_Run(experiment, _lock(experiment.folder), rounds(experiment, pool)))
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> bool:
        return self.round == self.config.rounds

    def advance(self) -> dict[str, float]:
        """Trains until the next evaluated round.

        Returns:
            `measures` at that round, mean over seeds, and `rounds`, the number of rounds done.

        Raises:
            Diverged: training has diverged.
            InputError: training cannot start, or no client has validation rows.
        """
        self.round = min(self.round + self.config.eval_every, self.config.rounds)
        reports = [run.advance(self.round, self.done) for run in self.runs]
        means = pd.DataFrame([measures(report, self.round) for report in reports]).mean()
        chosen = {"chosen_round": round(means["chosen_round"]), "rounds": self.round}
        return {str(name): mean for name, mean in means.items()} | chosen

    def close(self) -> None:
        """Releases the folders."""
        for run in self.runs:
            run.reports.close()
            run.lock.release()


@dataclass
class _Run:
    """One tuning seed of a trial."""

    experiment: Experiment
    lock: FileLock
    reports: Generator[Report]
    report: Report | None = None

    def advance(self, round: int, last: bool) -> Report:
        """Trains until `round` rounds are done; does nothing when an earlier process has done them."""
        while self.report is None or len(self.report.rounds) < round:
            self.report = next(self.reports)
        if last:
            next(self.reports, None)  # ends the generator, which cleans up
        return self.report


def measures(report: Report, round: int) -> dict[str, float]:
    """What the objectives are made of, after `round` rounds of a run.

    validation: accuracy of clients on their own validation rows, mean over clients, at the best round so far.
    worst_tenth: the same at the same round, mean over the worst tenth of the clients.
    bytes: sent up and down, all clients.
    clock_s: simulated seconds.
    flops: of all clients' training.
    chosen_round: the best round so far.

    Raises:
        InputError: no client has validation rows.
    """
    chosen = best_round({done: mean for done, mean in report.validation.items() if done <= round})
    if isnan(report.validation[chosen]):
        raise InputError("no client has validation rows, on which trials are evaluated")
    scores = score_table([(TRAINED, chosen, report.counts[chosen])], report.domains)
    accuracy = accuracy_per_client(scores[scores.split == "val"])
    costs = round_table(report.rounds[:round])
    return {
        "validation": report.validation[chosen],
        "worst_tenth": tail_mean(accuracy),
        "bytes": float(costs.bytes_up.sum() + costs.bytes_down.sum()),
        "clock_s": float(costs.clock_s.iloc[-1]),
        "flops": float(costs.flops.sum()),
        "chosen_round": chosen,
    }


def _lock(folder: Path) -> FileLock:
    claim(folder, "run")
    try:
        lock = FileLock(folder / LOCK, timeout=WAIT_S)
        lock.acquire()
        return lock
    except Timeout:
        raise Stopped(f"another process is still running in {folder}") from None
