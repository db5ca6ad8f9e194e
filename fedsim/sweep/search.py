"""A sweep, top to bottom: trials in parallel, then what the best config is worth. Start reading here.

Optuna proposes trials and stores them (`study.py`); Ray Tune runs them (`ray_tune.py`). Nothing that either of them
pickles is ever read again: an interrupted sweep resumes from the study and from the checkpoints of its trials.
"""

import os
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from fedsim.checkpoint import NAME as CHECKPOINT
from fedsim.cluster.driver import run_in_driver_actor
from fedsim.errors import Stopped
from fedsim.events import Note, Progress, Started, Step
from fedsim.files import reason
from fedsim.folder import exclusive, write_sealed
from fedsim.formats import number, percent
from fedsim.prepare import Experiment, encode_experiment, sizing_of
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.loggers import mlflow_uri
from fedsim.sweep.config import Sweep
from fedsim.sweep.prepare import ACCURACIES, FILE, Prepared, prepare_sweep, refuse_another_sweep
from fedsim.sweep.resources import TrialResources
from fedsim.sweep.results import SweepResult, conclude
from fedsim.sweep.study import Study
from fedsim.sweep.trial import trial_folder

WAIT_S = 20  # for the driver actor of a killed sweep to release the folder


def run_sweep(sweep: Sweep, progress: Progress = lambda event: None) -> SweepResult:
    """Runs a sweep; in the folder of an interrupted one, resumes it.

    Raises:
        InputError: the sweep cannot work; raised before Ray starts and before anything is written.
        Stopped: some trials could not finish for a reason outside of them, such as a full disk.
    """
    prepared = prepare_sweep(sweep)
    progress(Started("sweep"))
    return run_in_driver_actor(search, (prepared,), sweep.config.address, progress)


def search(prepared: Prepared, progress: Progress) -> SweepResult:
    """Runs in the driver actor: trials first, then the best and the base config on seeds that no trial has seen."""
    import ray

    try:
        sweep, folder, config = prepared.sweep, prepared.folder, prepared.sweep.config
        resources = TrialResources.of(ray, sweep)
        with exclusive(folder, "sweep", WAIT_S):
            settings = sweep.plain()
            refuse_another_sweep(folder, settings, prepared.space)  # again: another sweep may just have ended here
            write_sealed(folder / FILE, to_yaml(settings))
            base = encode_experiment(
                prepared.base, sizing_of(config), progress, prepared.methods, all_rows=prepared.partitions
            )
            study = Study(folder, sweep.rules)
            study.describe(settings, prepared.space.defaults(config))
            _run_trials(prepared, base, study, resources, progress)
            return conclude(prepared, study, resources, progress)
    except OSError as error:  # such as a full disk
        raise Stopped(f"{reason(error)}; fix this and rerun the same command to resume") from None


def _run_trials(
    prepared: Prepared, base: Experiment, study: Study, resources: TrialResources, progress: Progress
) -> None:
    sweep, folder = prepared.sweep, prepared.folder
    remaining = sweep.trials - study.ended()
    if remaining <= 0:
        return
    # Ray's own result files repeat the study, and by default it prints every result.
    quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    os.environ |= quiet
    import ray.tune

    from fedsim.sweep.ray_tune import StudyScheduler, StudySearcher, TrialActor

    if resources.several_machines:
        base = replace(base, data=replace(base.encoded, source=base.encoded.source.inline()))
    progress(Note("trials at once", resources.describe(remaining)))
    progress(Step("trials", study.ended(), sweep.trials))

    def on_end(number: int) -> None:
        _delete_tensors(trial_folder(folder, number))
        progress(_progress_of(study, sweep.trials))

    searcher = StudySearcher(study, prepared.space.suggest, on_end)
    arguments = {"base": base, "seeds": sweep.tuning_seeds, "folder": folder, "sizing": resources.sizing}
    trainable = ray.tune.with_parameters(TrialActor, **arguments)  # stored once per machine
    ray.tune.Tuner(
        ray.tune.with_resources(trainable, ray.tune.PlacementGroupFactory(resources.bundles)),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyScheduler(searcher),
            num_samples=remaining,
            max_concurrent_trials=min(resources.at_once, remaining),
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=sweep.retries),
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # fedsim writes its own
            callbacks=[_logger(name, folder) for name in sweep.loggers],
        ),
    ).fit()
    for file in (folder / "tune").glob("*"):  # Tune's own state, which is never read
        if file.is_file():
            file.unlink()
    if study.ended() < sweep.trials:
        cause = f" ({searcher.blocked[0]})" if searcher.blocked else ""
        raise Stopped(
            f"{study.ended()} of {sweep.trials} trials have ended{cause}; the same command resumes with the others"
        )


def _delete_tensors(folder: Path) -> None:
    """Keeps only the counts and the config of an ended trial: with large methods, its tensors would fill a disk."""
    for file in folder.glob("**/" + CHECKPOINT):
        file.unlink()
    for private_states in folder.glob("**/private"):
        rmtree(private_states)


def _progress_of(study: Study, trials: int) -> Step:
    best, note = study.best(), ""
    if best:
        objective, value = study.rules.objectives[0], best.values[0]
        shown = f"{percent(value)}%" if objective in ACCURACIES else number(value)
        note = f"best {objective} {shown} (trial {best.number})"
    return Step("trials", study.ended(), trials, note)


def _name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"


def _logger(name: str, folder: Path) -> Any:
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        return MLflowLoggerCallback(tracking_uri=mlflow_uri(folder), experiment_name=folder.name)
    from ray.air.integrations.wandb import WandbLoggerCallback

    return WandbLoggerCallback(project="fedsim", group=folder.name, dir=str(folder))
