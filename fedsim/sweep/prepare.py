"""Everything about a sweep that can be refused before Ray starts and before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import Config
from fedsim.data import check_readable
from fedsim.datasets import TEST
from fedsim.errors import InputError, listing
from fedsim.fleets import Fleet
from fedsim.folder import check_folder, differences, read_sealed, refuse_another_version
from fedsim.methods import Method
from fedsim.prepare import PARTITION_FIELDS, Experiment, evaluated_clients, prepare
from fedsim.reporting.loggers import check_loggers
from fedsim.sweep.config import MAY_CHANGE, PRUNED_BY, Sweep
from fedsim.sweep.space import Space
from fedsim.sweep.trial import EVALUATED_ON, config_of

FILE = "sweep.yaml"
ACCURACIES = ("validation", "worst_tenth")
# Hyperparameters of every method that change a local step, but neither its cost nor what is sent; and those that
# change only what a round costs on the client.
STEP_FIELDS = "optimizer", "lr", "momentum", "beta1", "beta2", "eps", "weight_decay", "persist_optimizer"
PASS_FIELDS = "local_epochs", "batch_size", "label_space"


@dataclass(frozen=True)
class Prepared:
    """A checked sweep.

    Attributes:
        base: experiment of the base config.
        methods: every method that a trial may train; they decide which representations are computed.
        partitions: whether trials partition the rows, so that they may have any of them.
    """

    sweep: Sweep
    folder: Path
    space: Space
    base: Experiment
    methods: tuple[Method, ...]
    partitions: bool = False


def prepare_sweep(sweep: Sweep) -> Prepared:
    """Checks a sweep; starts and writes nothing.

    Raises:
        InputError: the sweep cannot work.
        Stopped: the server of a logger does not answer.
    """
    config = sweep.config
    space = Space.parse(sweep.search, config)
    _check_seeds(sweep)
    if sweep.objective not in PRUNED_BY and sweep.rules.pruner != "none":
        names = " or ".join(name for (name,) in PRUNED_BY)
        raise InputError(f"pruner {sweep.pruner} needs {names} as the only objective, got {listing(sweep.objective)}")
    searched = {dimension.path[0] for dimension in space.dimensions}
    if "dataset" in searched:
        raise InputError("--search dataset: all trials of a sweep share one data set, encoded once")
    fleets = [config_of(config, {"fleet": fields}).fleet for fields in _candidates(space, "fleet")]
    _check_costs(sweep.objective, space, fleets)
    if not config.rounds:
        raise InputError("a sweep needs --rounds 1 or more")
    if config.tune_epochs:
        raise InputError("a sweep does not tune its trials' models after the last round; leave out --tune-epochs")
    check_loggers(sweep.loggers)
    folder = sweep.folder().absolute()
    check_folder(folder, "sweep")
    refuse_another_sweep(folder, sweep.plain(), space)
    base = prepare(config.model_copy(update={"out": folder / "base", "seed": sweep.tuning_seeds[0]}))  # is not run
    evaluated = evaluated_clients(config, base.clients)
    if not any(len(base.clients[client].val) for client in evaluated):
        raise InputError(f"none of {len(evaluated)} clients has validation rows, on which trials are evaluated")
    partitioning = sorted(searched & set(PARTITION_FIELDS))
    if not partitioning:
        _try_candidates(space, base)
    elif not (base.data.source.split == TEST).any():
        raise InputError(
            f"--search {listing(partitioning)} partitions the rows again in each trial, and this data "
            "set has no test split: rows that one trial trains on would be test rows of another"
        )
    else:
        check_readable(base.data, config.cache_dir, None)
    return Prepared(sweep, folder, space, base, tuple(_methods(space, config)), bool(partitioning))


def refuse_another_sweep(folder: Path, settings: dict[str, Any], space: Space) -> None:
    """Raises InputError, naming what differs, when `folder` holds a sweep with other settings.

    Args:
        settings: of the sweep that is about to use the folder, as `Sweep.plain` returns them.
    """
    file = folder / FILE
    if not file.exists():
        return
    before = yaml.safe_load(read_sealed(file, f"delete {folder} to start again, or give another --out"))
    if unknown := sorted(set(before) ^ set(settings)):
        raise InputError(f"{file} is of another version of fedsim ({listing(unknown)}); give another --out")
    old, new = before.pop("config"), settings["config"]
    refuse_another_version(folder, old, new)
    changes = differences(old, new) + space.changes(before.pop("search"))
    fixed = [name for name in before if name not in MAY_CHANGE]
    changes += differences({name: before[name] for name in fixed}, {name: settings[name] for name in fixed})
    if changes:
        raise InputError(f"{folder} holds another sweep ({'; '.join(changes)}); give another --out")


def _check_seeds(sweep: Sweep) -> None:
    if not sweep.tuning_seeds:
        raise InputError("--tuning-seeds needs at least one seed")
    if both := sorted(set(sweep.tuning_seeds) & set(sweep.report_seeds)):
        raise InputError(
            f"seeds {listing(both)} are both tuning and reporting seeds; report on seeds that no trial was chosen by"
        )


def _check_costs(objectives: tuple[str, ...], space: Space, fleets: list[Fleet]) -> None:
    """Refuses a cost that is the same in all trials: the Pareto front would be one point."""
    if "clock_s" in objectives and any(fleet.instantaneous for fleet in fleets):
        raise InputError("objective clock_s needs a fleet whose clients take time, such as --fleet lognormal")
    paths, steps = {dimension.path for dimension in space.dimensions}, {("method", name) for name in STEP_FIELDS}
    for cost in [name for name in objectives if name not in ACCURACIES]:
        # With a clock, longer training may miss a deadline, and its update is then not sent.
        more = PASS_FIELDS if cost == "bytes" and all(fleet.instantaneous for fleet in fleets) else ()
        if paths <= steps | {("method", name) for name in more}:
            searched = listing(dimension.name for dimension in space.dimensions)
            raise InputError(
                f"objective {cost} does not depend on what is searched ({searched}); search cohort as well, for "
                f"example, or remove {cost}"
            )


def _try_candidates(space: Space, base: Experiment) -> None:
    """Refuses a cohort, method or server rule that no trial could use with these clients."""
    cohorts = space.range_of("cohort")
    largest: Any = max((value for value in cohorts.extremes if value), default=1) if cohorts else 1
    if largest > (trainers := base.clients.trainers):
        raise InputError(f"--search cohort: a cohort of {largest} from {trainers} clients; try cohort=2:{trainers}")
    for method in _candidates(space, "method"):
        for server in _candidates(space, "server"):
            fields = {"method": method, "server": server} | ({"cohort": largest} if cohorts else {})
            prepare(config_of(base.config, fields), base, EVALUATED_ON)


def _candidates(space: Space, kind: str) -> list[dict[str, Any]]:
    """The components of a kind that trials choose from, as fields; no field where only the base config's is used."""
    names = space.range_of(kind, "name")
    return [{"name": name} for name in names.extremes] if names else [{}]


def _methods(space: Space, config: Config) -> Iterator[Method]:
    """Every candidate method, and each again with every parameter at the ends of its range."""
    dimensions = [dimension for dimension in space.dimensions if dimension.path[0] == "method"]
    for fields in _candidates(space, "method"):
        name = fields.get("name")
        yield config_of(config, {"method": fields}).method
        for dimension in dimensions:
            if dimension.path[1] != "name" and name in (None, dimension.name.partition(".")[0]):
                for value in dimension.range.extremes:
                    yield config_of(config, {"method": fields | {dimension.path[1]: value}}).method
