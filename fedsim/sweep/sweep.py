"""A search over hyperparameters, top to bottom: what is asked, trials side by side, and what the best is worth.

Optuna is the brain and the memory (`study.py`), Ray Tune the hands (`hands.py`). Nothing that either of them
pickles is ever read again: a sweep that was killed goes on from the study and from the checkpoints of its trials.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, ValidationError

from fedsim.checkpoint import NAME as CHECKPOINT
from fedsim.cluster.driver import drive
from fedsim.cluster.nodes import nodes_of
from fedsim.cluster.placement import Sizing, plan
from fedsim.config import Config, Out
from fedsim.datasets import TEST
from fedsim.errors import InputError, Stopped, listing
from fedsim.events import Event, Progress
from fedsim.files import reason, write_text
from fedsim.fleets import Fleet
from fedsim.folder import alone_in, check_folder, read_sealed, write_sealed
from fedsim.formats import number, percent
from fedsim.methods import Method
from fedsim.registry import CHECKED, numbers_are_not_truths, sentence
from fedsim.report import environment, to_yaml, write_table
from fedsim.simulate import DEALT, Experiment, encoded, judged, prepare, sizing_of
from fedsim.sweep.space import Space
from fedsim.sweep.study import OBJECTIVES, PRUNERS, SAMPLERS, Rules, Study
from fedsim.sweep.trial import JUDGED_BY, config_of, trial_folder

if TYPE_CHECKING:
    import optuna

FILE, TRIALS, REPORTING = "sweep.yaml", "trials.parquet", "reporting.parquet"
LOGGERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # and the package that each wants
PRUNED = ("validation",), ("worst_tenth",)  # what a trial can fall behind by; a cost only grows
MANY = 1_000_000  # more than any cluster has room for
FREE_S = 20  # for the driver actor of a sweep that was killed to have ended
TINY = 1 << 20  # bytes: what Ray sets aside for a process whose work is done by others; a bundle of nothing it refuses
JUDGED_OBJECTIVES = ("validation", "worst_tenth")
# Hyperparameters of every method that change what a local step does, but neither its cost nor what is sent; and those
# that change the cost of a round on the client alone.
STEP_FIELDS = "optimizer", "lr", "momentum", "beta1", "beta2", "eps", "weight_decay", "keep_moments"
PASS_FIELDS = "local_epochs", "batch", "label_space"
STAYS = ("trials", "report_seeds")  # may change from one command to the next: they do not decide what is asked


def _split(value: Any) -> Any:
    if isinstance(value, str | int):
        value = [value]
    parts = (part for each in value for part in (each.split(",") if isinstance(each, str) else [each]))
    return tuple(part for part in (part.strip() if isinstance(part, str) else part for part in parts) if part != "")


def _seeds(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) < len(value) or min(value, default=0) < 0:
        raise InputError(f"seeds want different numbers of 0 or more, not {listing(value)}")
    return value


def _different(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or len(set(value)) < len(value):
        what = listing(value) or "none"
        raise InputError(f"objective wants one or more of {listing(OBJECTIVES)}, each once, not {what}")
    return value


def _word(kind: str, known: Any, value: str) -> str:
    if value not in known:
        raise InputError(f"no {kind} {value!r}; there are: {listing(known)}")
    return value


def _words(kind: str, known: Any) -> AfterValidator:
    return AfterValidator(lambda value: tuple(_word(kind, known, one) for one in value))


Seeds = Annotated[tuple[int, ...], BeforeValidator(_split), AfterValidator(_seeds)]
Objectives = Annotated[
    tuple[str, ...], BeforeValidator(_split), _words("objective", OBJECTIVES), AfterValidator(_different)
]
Loggers = Annotated[tuple[str, ...], BeforeValidator(_split), _words("logger", LOGGERS)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Sweep(BaseModel):
    """What is to be searched, and how."""

    model_config = ConfigDict(CHECKED, frozen=True, validate_default=True)
    numbers_are_not_truths = numbers_are_not_truths

    config: InstanceOf[Config] = Field(description="the experiment to start from; its seed takes no part")
    search: Texts = Field((), description="what to search, such as method.lr or method.lr=1e-5:1e-2; see below")
    trials: int = Field(60, ge=1, description="configurations in all")
    objective: Objectives = Field(
        ("validation",), description=f"what to better, of {listing(OBJECTIVES)}; several give a Pareto front"
    )
    sampler: Literal[SAMPLERS] = Field(
        "tpe", description=f"{listing(SAMPLERS)}: Optuna's; nsga2 is for several objectives"
    )
    pruner: Literal[PRUNERS] | None = Field(
        None,
        description=f"{listing(PRUNERS)}: stops trials that fall behind; none given: asha, but for several objectives "
        "or a cost none",
    )
    grace: int = Field(5, ge=1, description="rounds before a trial may be stopped")
    reduction: int = Field(3, ge=2, description="of asha: one of so many trials goes on from each rung")
    tuning_seeds: Seeds = Field((1000,), description="every trial is judged on all of these")
    report_seeds: Seeds = Field((0, 1, 2), description="of the runs of the best and the base config, at the end")
    sweep_seed: int = Field(0, ge=0, description="the sampler's")
    at_once: int | None = Field(None, ge=1, description="trials at a time; none given: as many as there is room for")
    retries: int = Field(2, ge=0, description="how often a trial whose process has failed is begun again")
    loggers: Loggers = Field(("tensorboard",), description=f"of {listing(LOGGERS)}")
    out: Annotated[Out, AfterValidator(lambda value: value and value.absolute())] = Field(
        None, description="folder of the sweep; none given: sweeps/ and a name of its own"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentence(error, "", type(self).model_fields)) from None

    @property
    def rules(self) -> Rules:
        pruner = self.pruner or ("asha" if self.objective in PRUNED else "none")
        return Rules(self.objective, self.sampler, pruner, self.grace, self.reduction, self.sweep_seed)

    def plain(self) -> dict[str, Any]:
        """All that says what this sweep is, as plain values."""
        space = Space.parse(self.search, self.config)
        return {
            "config": {name: value for name, value in self.config.experiment().items() if name != "seed"},
            "search": space.plain(),
            "objective": list(self.objective),
            "sampler": self.sampler,
            "pruner": self.rules.pruner,
            "grace": self.grace,
            "reduction": self.reduction,
            "tuning_seeds": list(self.tuning_seeds),
            "sweep_seed": self.sweep_seed,
            "trials": self.trials,
            "report_seeds": list(self.report_seeds),
        }

    def folder(self) -> Path:
        """`out`, or a folder that this sweep has to itself, however many its trials."""
        if self.out is not None:
            return self.out
        decides = {name: value for name, value in self.plain().items() if name not in STAYS}
        digest = blake2b(yaml.safe_dump(decides).encode(), digest_size=4).hexdigest()
        # As a run of the base config is called, whose folder ends in a digest of its own.
        name = self.config.model_copy(update={"out": None}).folder().name.rpartition("-")[0]
        return Path("sweeps") / f"{name}-{digest}"


@dataclass(frozen=True)
class Prepared:
    """A sweep that has been checked, and what was found while checking.

    Attributes:
        base: the base config's experiment.
        methods: whatever a trial may train, for what they read of images.
    """

    sweep: Sweep
    folder: Path
    space: Space
    base: Experiment
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Found:
    """What came of a sweep.

    Attributes:
        best: fields of the best config, as `best.yaml` has them.
        number: of the trial that had them.
        trials: `trials.parquet`.
        reporting: `reporting.parquet`: by seed the runs of the best and of the base config.
    """

    folder: Path
    best: dict[str, Any]
    number: int
    trials: pd.DataFrame
    reporting: pd.DataFrame


def run_sweep(sweep: Sweep, progress: Progress = lambda event: None) -> Found:
    """Searches; the same sweep in the same folder goes on where it stopped.

    Raises:
        InputError: whatever cannot work, before Ray starts and before anything is written.
    """
    prepared = prepare_sweep(sweep)
    progress(Event("begun", 0, 0))  # nothing is refused any more
    return drive(search, (prepared,), sweep.config.address, progress)


def prepare_sweep(sweep: Sweep) -> Prepared:
    """Checks all that can be checked before anything is started or written."""
    config = sweep.config
    space = Space.parse(sweep.search, config)
    if not sweep.tuning_seeds:
        raise InputError("tuning_seeds wants one seed or more, for a trial to be judged on")
    if both := sorted(set(sweep.tuning_seeds) & set(sweep.report_seeds)):
        raise InputError(
            f"seeds {listing(both)} are among the tuning and the reporting seeds; what is reported wants others"
        )
    if sweep.objective not in PRUNED and sweep.rules.pruner != "none":
        wanted = " or ".join(name for (name,) in PRUNED)
        raise InputError(f"pruner {sweep.pruner} wants {wanted} as the one objective, not {listing(sweep.objective)}")
    searched = {one.path[0] for one in space.dimensions}
    if data := sorted(searched & {"dataset"}):
        raise InputError(f"--search {listing(data)}: all trials of a sweep are on the same data, encoded once")
    fleets = [config_of(config, {"fleet": chosen}).fleet for chosen in _chosen(space, "fleet")]
    if "clock_s" in sweep.objective and any(fleet.timeless for fleet in fleets):
        raise InputError("objective clock_s wants a fleet whose clients take time, such as --fleet lognormal")
    _check_costs(sweep.objective, space, fleets)
    if not config.rounds:
        raise InputError("rounds wants 1 or more, or there is nothing to search for")
    for name in sweep.loggers:
        _check_logger(name)
    folder = sweep.folder().absolute()
    check_folder(folder, "sweep")
    _refuse_another(folder, sweep.plain(), space)
    base = prepare(config.model_copy(update={"out": folder / "base", "seed": sweep.tuning_seeds[0]}))  # never run
    who = judged(config, base.clients)
    if not any(len(base.clients[client].val) for client in who):
        raise InputError(f"none of {len(who)} clients has validation rows, by which a trial is judged")
    if not searched & set(DEALT):
        _try_out(space, base)
    elif not (base.source.split == TEST).any():
        raise InputError(
            f"--search {listing(sorted(searched & set(DEALT)))} deals rows to clients anew in each trial, and these "
            "data have no test rows of their own: what one trial trains on would be what another is tested on"
        )
    return Prepared(sweep, folder, space, base, tuple(_methods(space, config)))


def _check_costs(objectives: tuple[str, ...], space: Space, fleets: list[Fleet]) -> None:
    """Refuses a cost that is the same for all trials: the Pareto front would be one point."""
    idle = {("method", name) for name in STEP_FIELDS}
    for cost in [name for name in objectives if name not in JUDGED_OBJECTIVES]:
        # Where time matters, longer training may miss a deadline, and its update is then not sent.
        more = PASS_FIELDS if cost == "bytes" and all(fleet.timeless for fleet in fleets) else ()
        if {one.path for one in space.dimensions} <= idle | {("method", name) for name in more}:
            searched = listing(one.name for one in space.dimensions)
            raise InputError(
                f"objective {cost} cannot change by what is searched ({searched}); search cohort as well, for example, "
                f"or leave {cost} out"
            )


def _try_out(space: Space, base: Experiment) -> None:
    """What a trial cannot be begun with on these clients is said before all of them are: a cohort, a method, a rule."""
    over = next((one.over for one in space.dimensions if one.path == ("cohort",)), None)
    most = max((value for value in over.extremes if value), default=1) if over else 1
    if most > (trainers := base.clients.trainers):
        raise InputError(f"--search cohort: a cohort of {most} from {trainers} clients; cohort=2:{trainers} would do")
    for method in _chosen(space, "method"):
        for server in _chosen(space, "server"):
            fields = {"method": method, "server": server} | ({"cohort": most} if over else {})
            prepare(config_of(base.config, fields), base, JUDGED_BY)


def _chosen(space: Space, kind: str) -> list[dict[str, str]]:
    """The components of a kind that a trial may have, as fields; that of the base config where none is searched."""
    over = next((one.over for one in space.dimensions if one.path == (kind, "name")), None)
    return [{"name": name} for name in over.values] if over else [{}]


def search(prepared: Prepared, progress: Progress) -> Found:
    """What the driver actor does: trials, then the best and the base config on seeds that no trial has seen."""
    import ray

    try:
        sweep, folder, config = prepared.sweep, prepared.folder, prepared.sweep.config
        room = _Room.of(ray, sweep)
        with alone_in(folder, "sweep", FREE_S):
            about = sweep.plain()
            _refuse_another(folder, about, prepared.space)  # once more: another sweep may just have ended here
            write_sealed(folder / FILE, to_yaml(about))
            base = encoded(prepared.base, sizing_of(config), progress, prepared.methods)
            study = Study(folder, sweep.rules)
            study.describe(about, prepared.space.defaults(config))
            _run_trials(prepared, base, study, room, progress)
            return _conclude(prepared, study, room, progress)
    except OSError as error:  # a disk is full, say
        raise Stopped(f"{reason(error)}; once that is mended, the same command goes on") from None


@dataclass(frozen=True)
class _Room:
    """What each trial has of the cluster, and how many there are at once.

    Attributes:
        sizing: of a trial's pool.
        bundles: of its placement group: its process, then one for each actor.
        at_once: trials at a time.
    """

    sizing: Sizing
    bundles: list[dict[str, float]]
    at_once: int
    spans: bool  # several machines

    @classmethod
    def of(cls, ray, sweep: Sweep) -> "_Room":
        """Raises InputError where not so many trials fit."""
        sizing = sizing_of(sweep.config)
        nodes = nodes_of(ray, sizing)
        # As many workers as the cluster is good for, in all: each trial has one, or as many as it has actors.
        there = plan(replace(sizing, actors=None), MANY, nodes)
        each = max(1, sizing.actors or 0)
        cpus, gpus = (min(getattr(place, name) for place in there) for name in ("num_cpus", "num_gpus"))
        worker = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        room = len(there) // each
        what = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if not room:
            raise InputError(f"--actors {each} for each trial, but the cluster has room for {len(there)} of {what}")
        if sweep.at_once and sweep.at_once > room:
            of = f"{each} actors of {what}" if sizing.actors else what
            raise InputError(f"--at-once {sweep.at_once} trials of {of} each, but the cluster has room for {room}")
        if not sizing.actors:
            bundles, sizing = [worker], replace(sizing, actors=0, gpus_per_actor=gpus)
        else:
            bundles, sizing = [{"CPU": 0, "memory": TINY}, *[worker] * each], replace(sizing, grouped=True)
        return cls(sizing, bundles, sweep.at_once or room, len(nodes) > 1)

    def told(self, trials: int) -> str:
        """Such as `2 at once, of 1 CPU each`."""
        worker = " and ".join(f"{share:g} {unit}" for unit, share in self.bundles[-1].items())
        actors = len(self.bundles) - 1
        of = f"{actors} actor{'s' * (actors > 1)} of {worker}" if actors else worker
        return f"{min(self.at_once, trials)} at once, each with {of}"


def _run_trials(prepared: Prepared, base: Experiment, study: Study, room: _Room, progress: Progress) -> None:
    sweep, folder = prepared.sweep, prepared.folder
    left = sweep.trials - study.ended()
    if left <= 0:
        return
    # Ray's own tables of results are those of the study, once more; and it would print whatever happens.
    quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    os.environ |= quiet
    import ray.tune

    from fedsim.sweep.hands import Asking, Doing, Judging

    if room.spans:
        base = replace(base, source=base.source.carried())
    progress(Event("trials at once", 0, 0, room.told(left)))
    progress(Event("trials", study.ended(), sweep.trials))

    def ended(number: int) -> None:
        _tidy(trial_folder(folder, number))
        progress(_how_far(study, sweep.trials))

    asking = Asking(study, prepared.space.suggest, ended)
    given = {"base": base, "seeds": sweep.tuning_seeds, "folder": folder, "sizing": room.sizing}
    trainable = ray.tune.with_parameters(Doing, **given)  # in the object store, once for each machine
    ray.tune.Tuner(
        ray.tune.with_resources(trainable, ray.tune.PlacementGroupFactory(room.bundles)),
        tune_config=ray.tune.TuneConfig(
            search_alg=asking,
            scheduler=Judging(asking),
            num_samples=left,
            max_concurrent_trials=min(room.at_once, left),
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=sweep.retries),
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # fedsim has its own
            callbacks=[_logger(name, folder) for name in sweep.loggers],
        ),
    ).fit()
    for file in (folder / "tune").glob("*"):  # Tune's own state, which nobody reads
        if file.is_file():
            file.unlink()
    if study.ended() < sweep.trials:
        why = f" ({asking.stuck[0]})" if asking.stuck else ""
        ended = f"{study.ended()} of {sweep.trials} trials have ended{why}"
        raise Stopped(f"{ended}; the same command goes on with the others")


def _tidy(folder: Path) -> None:
    """Leaves of a trial that has ended its counts and its config, and no tensors: of large methods they fill a disk."""
    for file in folder.glob("**/" + CHECKPOINT):
        file.unlink()
    for kept in folder.glob("**/private"):
        rmtree(kept)


def _conclude(prepared: Prepared, study: Study, room: _Room, progress: Progress) -> Found:
    """Writes the tables and the page, with runs of the best and the base config on the reporting seeds."""
    from fedsim.sweep.page import best_trial, pareto, trial_table, write_sweep_page

    sweep, folder, config = prepared.sweep, prepared.folder, prepared.sweep.config
    trials = trial_table(study.optuna)
    write_table(folder / TRIALS, trials)
    facts = {"versions": environment()}
    if not pareto(study.optuna):
        write_sweep_page(study.optuna, None, facts, folder / "sweep.html")
        why = {reason for reason in trials.failed.dropna()}
        raise InputError(
            f"none of {len(trials)} trials has come to its end; {folder / 'sweep.html'} tells why"
            + (f", such as: {sorted(why)[0]}" if why else "")
        )

    def fields(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
        return config_of(config, trial.user_attrs["fields"], seed=min(sweep.report_seeds, default=0)).experiment()

    best = best_trial(study.optuna)
    write_text(folder / "best.yaml", to_yaml(fields(best)))
    if len(sweep.objective) > 1:
        _write_front({trial.number: fields(trial) for trial in pareto(study.optuna)}, folder / "pareto")
    reporting, problem = _reported(prepared, best, room, progress)
    write_table(folder / REPORTING, reporting)
    write_sweep_page(study.optuna, reporting, {"best": fields(best)} | facts, folder / "sweep.html")
    if problem:
        raise problem
    return Found(folder, fields(best), best.number, trials, reporting)


def _reported(
    prepared: Prepared, best: "optuna.trial.FrozenTrial", room: _Room, progress: Progress
) -> tuple[pd.DataFrame, Exception | None]:
    """A row for each run of the best and of the base config that came to its end; and what is said of the others."""
    from fedsim.many import run_all

    config, folder = prepared.sweep.config, prepared.folder / "reporting"
    execution = {"gpus_per_actor": room.bundles[-1].get("GPU")}
    keys: dict[Path, list[tuple[str, int]]] = {}  # by folder, since the best may be the base itself
    runs: dict[Path, Config] = {}
    for seed in prepared.sweep.report_seeds:
        base = config_of(config, {}, seed=seed)
        for which, name, one in (
            ("best", f"{best.number:04d}", config_of(config, best.user_attrs["fields"], seed=seed)),
            ("base", "base", base),
        ):
            out = folder / f"{'base' if one.experiment() == base.experiment() else name}-{seed}"
            keys.setdefault(out, []).append((which, seed))
            runs[out] = one.model_copy(update=execution | {"out": out})
    rows, problem, folders = {}, None, list(runs)
    try:
        for place, report in run_all(list(runs.values()), None, progress) if runs else ():
            spent = report.round_table()
            found = report.summary() | {"bytes": int(spent.bytes_up.sum() + spent.bytes_down.sum())}
            for which, seed in keys[folders[place]]:
                rows[which, seed] = {"which": which, "seed": seed, "round": report.chosen_round} | found
    except (InputError, Stopped) as error:  # of one of them, after all others have ended
        problem = error
    return pd.DataFrame([rows[key] for key in sorted(rows)], columns=None if rows else ["which", "seed"]), problem


def _refuse_another(folder: Path, ours: dict[str, Any], space: Space) -> None:
    """Raises InputError where a folder holds a sweep that another one would not go on with."""
    file = folder / FILE
    if not file.exists():
        return
    theirs = yaml.safe_load(read_sealed(file, f"delete {folder} to start again, or give another --out"))
    if unknown := sorted(set(theirs) ^ set(ours)):
        raise InputError(f"{file} is of another version of fedsim ({listing(unknown)}); give another --out")
    before, now = theirs.pop("config"), ours["config"]
    changes = [
        f"{name} {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    changes += space.changes(theirs.pop("search"))
    changes += [
        f"{name} {value!r} there, {ours[name]!r} here"
        for name, value in theirs.items()
        if name not in STAYS and value != ours[name]
    ]
    if changes:
        raise InputError(f"{folder} holds another sweep ({'; '.join(changes)}); give another --out")


def _methods(space: Space, config: Config) -> Iterator[Method]:
    """Every method of the space, and every one that a parameter's ends make of it."""
    mine = [one for one in space.dimensions if one.path[0] == "method"]
    for chosen in _chosen(space, "method"):
        name = chosen.get("name")
        yield config_of(config, {"method": chosen}).method
        for one in mine:
            if one.path[1] != "name" and name in (None, one.name.partition(".")[0]):
                for value in one.over.extremes:
                    yield config_of(config, {"method": chosen | {one.path[1]: value}}).method


def _how_far(study: Study, trials: int) -> Event:
    best = study.best()
    note = ""
    if best:
        goal = study.rules.objectives[0]
        value = f"{percent(best.values[0])}%" if goal in ("validation", "worst_tenth") else number(best.values[0])
        note = f"best {goal} {value} (trial {best.number})"
    return Event("trials", study.ended(), trials, note)


def _check_logger(name: str) -> None:
    if find_spec(LOGGERS[name]) is None:
        raise InputError(f"logger {name} wants the package {LOGGERS[name]}, which is not installed")
    if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.api.api_key:
            raise InputError("logger wandb wants an account (`wandb login`), or WANDB_MODE=offline")


def _name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"


def _logger(name: str, folder: Path) -> Any:
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()
    if name == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        where = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        return MLflowLoggerCallback(tracking_uri=where, experiment_name=folder.name)
    from ray.air.integrations.wandb import WandbLoggerCallback

    return WandbLoggerCallback(project="fedsim", group=folder.name, dir=str(folder))


def _write_front(front: Mapping[int, dict[str, Any]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.yaml"):  # of a front that has since been beaten
        if int(file.stem) not in front:
            file.unlink()
    for trial, fields in front.items():
        write_text(folder / f"{trial:04d}.yaml", to_yaml(fields))
