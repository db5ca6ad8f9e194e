"""The end of a sweep: tables, the page, and what the best config is worth on seeds that no trial has seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim.config import Config
from fedsim.errors import EXPECTED, InputError
from fedsim.events import Progress
from fedsim.files import write_text
from fedsim.reporting.facts import environment, to_yaml
from fedsim.reporting.parquet import write_table
from fedsim.sweep.prepare import Prepared
from fedsim.sweep.resources import TrialResources
from fedsim.sweep.study import Study
from fedsim.sweep.trial import config_of

if TYPE_CHECKING:
    import optuna

TRIALS, REPORTING = "trials.parquet", "reporting.parquet"


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
        best_trial: number of the best trial.
        best_config: its config, as the fields in `best.yaml`.
        trials: `trials.parquet`.
        reporting: `reporting.parquet`: one row per reporting seed and config ("best" or "base").
    """

    folder: Path
    best_trial: int
    best_config: dict[str, Any]
    trials: pd.DataFrame
    reporting: pd.DataFrame


def conclude(prepared: Prepared, study: Study, resources: TrialResources, progress: Progress) -> SweepResult:
    """Writes the tables and the page, with runs of the best and the base config on the reporting seeds.

    Raises:
        InputError: no trial has finished; the table and the page are written, and say why.
    """
    from fedsim.sweep.page import write_sweep_page
    from fedsim.sweep.tables import best_trial, pareto, trial_table

    sweep, folder, config = prepared.sweep, prepared.folder, prepared.sweep.config
    trials = trial_table(study.optuna)
    write_table(folder / TRIALS, trials)
    facts = {"versions": environment()}
    if not pareto(study.optuna):
        write_sweep_page(study.optuna, None, facts, folder / "sweep.html")
        reasons = sorted(set(trials.failed.dropna()))
        raise InputError(
            f"none of {len(trials)} trials has finished; {folder / 'sweep.html'} says why"
            + (f", such as: {reasons[0]}" if reasons else "")
        )

    def fields(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
        return config_of(config, trial.user_attrs["fields"], seed=min(sweep.report_seeds, default=0)).experiment()

    best = best_trial(study.optuna)
    write_text(folder / "best.yaml", to_yaml(fields(best)))
    if len(sweep.objective) > 1:
        _write_front({trial.number: fields(trial) for trial in pareto(study.optuna)}, folder / "pareto")
    reporting, problem = _run_on_reporting_seeds(prepared, best, resources, progress)
    write_table(folder / REPORTING, reporting)
    write_sweep_page(study.optuna, reporting, {"best": fields(best)} | facts, folder / "sweep.html")
    if problem:
        raise problem
    return SweepResult(folder, best.number, fields(best), trials, reporting)


def _run_on_reporting_seeds(
    prepared: Prepared, best: "optuna.trial.FrozenTrial", resources: TrialResources, progress: Progress
) -> tuple[pd.DataFrame, Exception | None]:
    """One row per finished run of the best and of the base config, and the error of one that failed."""
    from fedsim.parallel_runs import run_all

    config, folder = prepared.sweep.config, prepared.folder / "reporting"
    execution = {"gpus_per_actor": resources.bundles[-1].get("GPU")}
    keys: dict[Path, list[tuple[str, int]]] = {}  # by folder: the best config may be the base config itself
    runs: dict[Path, Config] = {}
    for seed in prepared.sweep.report_seeds:
        base = config_of(config, {}, seed=seed)
        for name, prefix, candidate in (
            ("best", f"{best.number:04d}", config_of(config, best.user_attrs["fields"], seed=seed)),
            ("base", "base", base),
        ):
            out = folder / f"{'base' if candidate.experiment() == base.experiment() else prefix}-{seed}"
            keys.setdefault(out, []).append((name, seed))
            runs[out] = candidate.model_copy(update=execution | {"out": out})
    rows, problem, folders = {}, None, list(runs)
    try:
        for index, report in run_all(list(runs.values()), None, progress) if runs else ():
            tables = report.tables()
            costs = tables.rounds
            measures = tables.summary() | {"bytes": int(costs.bytes_up.sum() + costs.bytes_down.sum())}
            for name, seed in keys[folders[index]]:
                rows[name, seed] = {"config": name, "seed": seed, "round": report.chosen_round} | measures
    except EXPECTED as error:  # raised for one run after all others have ended
        problem = error
    return pd.DataFrame([rows[key] for key in sorted(rows)], columns=None if rows else ["config", "seed"]), problem


def _write_front(front: Mapping[int, dict[str, Any]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.yaml"):  # trials of an earlier command that are dominated by now
        if file.stem.isdecimal() and int(file.stem) not in front:
            file.unlink()
    for number, fields in front.items():
        write_text(folder / f"{number:04d}.yaml", to_yaml(fields))
