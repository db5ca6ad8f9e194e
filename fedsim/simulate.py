"""One experiment, from its config to its report: prepare, encode, train round by round, write."""

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from fedsim.checkpoint import Checkpoints
from fedsim.class_tasks import last_rounds
from fedsim.cluster.driver import run_in_driver_actor
from fedsim.cluster.pool import open_pool
from fedsim.cluster.workers import Pool
from fedsim.config import Config
from fedsim.errors import Stopped
from fedsim.events import Note, Progress, Started, Step
from fedsim.federation import Federation
from fedsim.files import reason, remove_parts, write_tensors
from fedsim.folder import CONFIG, exclusive, write_sealed
from fedsim.formats import number, percent
from fedsim.ledger import Ledger
from fedsim.prepare import ADAPTER, FILES, PAGE, RESULTS, Experiment, encode_experiment, prepare, sizing_of
from fedsim.progress import callback
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.loggers import Loggers, round_values
from fedsim.reporting.page import write_page
from fedsim.reporting.parquet import write_tables
from fedsim.reporting.report import Report
from fedsim.reporting.tables import COLUMNS
from fedsim.start import start
from fedsim.state import ServerState
from fedsim.training.client_store import PrivateStore
from fedsim.training.task import Task
from fedsim.training.worker import ClientWorker

FINISHED = Note("run", "already finished; nothing was run")


def run(config: Config, progress: Progress | None = None) -> Report:
    """Runs one experiment. The number of actors, crashes and interruptions never change its results.

    Running the same config in the same folder again resumes an interrupted run, or returns the report of a finished
    one. A finished run continues with a larger `rounds`, to the same bits as a run with that many from the start;
    one whose step sizes depend on the number of rounds (`schedule` cosine) does not continue. In the same way, a
    finished run without `tune_epochs` continues with it.

    Args:
        progress: called with each event; by default, a Jupyter notebook shows bars.

    Raises:
        InputError: the config cannot work. Raised before Ray starts wherever that can be checked.
        Diverged: training produced NaN or infinite values.
        Stopped: the run ended for an external reason, such as a full disk or a logger that does not start.
    """
    experiment = prepare(config)
    with Loggers(config, experiment.folder, callback(progress)) as loggers:
        if experiment.done:
            loggers.progress(FINISHED)
            return _log_finished(experiment.done, experiment, loggers.progress)
        loggers.progress(Started("run"))
        if config.actors == 0:
            return simulate(experiment, loggers.progress)
        return run_in_driver_actor(simulate, (experiment,), config.address, loggers.progress)


def simulate(experiment: Experiment, progress: Progress) -> Report:
    """Encodes the data, trains, and writes the report: in the driver actor, a task of `run_all`, or this process."""
    config, folder, sizing = experiment.config, experiment.folder, sizing_of(experiment.config)
    try:
        with exclusive(folder, "run"):
            experiment = encode_experiment(experiment, sizing, progress)
            with open_pool(sizing, len(experiment.clients)) as pool:
                progress(Note("workers", pool.sizes))
                for report in _with_values(rounds(experiment, pool), config, progress):
                    if report.rounds:
                        progress(Step("training", len(report.rounds), config.rounds, _note(report)))
            _write(report, folder, config.page)
            return report
    except OSError as error:  # such as a full disk, here or in an actor
        raise Stopped(f"{reason(error)}; fix this and rerun the same command to resume") from None


def rounds(experiment: Experiment, pool: Pool) -> Generator[Report]:
    """Yields the report of an encoded experiment after each round, once that round is in a checkpoint.

    The first report is that of round 0, or of the last checkpoint. The same object is yielded each time, updated.
    """
    config, folder = experiment.config, experiment.folder
    store = PrivateStore(folder / "private")
    how = store, config.engine == "reference", config.codec, experiment.privacy, config.attack, config.fleet
    task = Task(experiment.method, config.server, config.seed, config.dtype, config.rounds, *how)
    checkpoints = Checkpoints(folder, experiment.identity(), config.fixed_rounds)
    state, report = start(experiment, task, checkpoints)
    if len(state.private):
        pool.check_shared_folder(folder)
    remove_parts(folder, FILES)
    # Written only now: the method or the rule may still refuse, and the folder would be marked as taken.
    write_sealed(folder / CONFIG, to_yaml(config.plain()))
    if not report.complete:
        for name in RESULTS:  # those of fewer rounds would be mistaken for this run's
            (folder / name).unlink(missing_ok=True)
    workers = pool.workers(ClientWorker, experiment.source, experiment.clients, experiment.encoded.frozen)
    federation = Federation(experiment, task, workers, state.params)
    if not report.counts:
        report.add_zero_shot(federation.zero_shot())
        report.add_scores(0, federation.evaluate(state))
        checkpoints.save(state, report)
    _end(federation, state, report, checkpoints)  # an earlier run may have been interrupted in it
    store.prune([state.private, report.private])
    report.conclude(federation.reported(state))
    yield report
    ledger = Ledger(config, task, state.params, experiment.clients.trainers, federation.schedule(0))
    ends = last_rounds(config.tasks, config.rounds) if config.tasks > 1 else ()
    for planned in federation.schedule(state.round):
        began = time.perf_counter()
        state, stats = federation.train(state, planned)
        rows = federation.local_rows(stats["client"].tolist(), planned.round) if task.method.expands else stats["rows"]
        sent, flops = federation.bytes_of(planned, stats["client"]), _flops(report, stats, rows, federation)
        spent = ledger.epsilon(planned.round)
        report.add_round(planned, stats, sent, time.perf_counter() - began, flops, spent)
        if planned.round % config.eval_every == 0 or planned.round in ends:
            report.add_evaluation(federation.reported(state), federation.evaluate(state))
        checkpoints.save(state, report)
        _end(federation, state, report, checkpoints)
        # The files of the last round stay: the run may be resumed with more rounds.
        store.prune([state.private, report.private])
        report.conclude(federation.reported(state))
        yield report


def _end(federation: Federation, state: ServerState, report: Report, checkpoints: Checkpoints) -> None:
    """What only the last round has: its evaluation, if `eval_every` leaves it out, and models that clients tune."""
    config = federation.experiment.config
    if state.round < config.rounds:
        return
    if not (state.round in report.counts or report.last):
        report.last = federation.evaluate(state)
        checkpoints.save(state, report)
    if not report.complete:
        report.tuned = federation.tune(state)
        checkpoints.save(state, report)


def _with_values(reports: Iterator[Report], config: Config, progress: Progress) -> Iterator[Report]:
    """The same reports; with loggers, the values of their rounds become events, those before a resumed one as well."""
    reported = 0
    for report in reports:
        for event in round_values(report, reported) if config.loggers else ():
            progress(event)
        reported = len(report.rounds) + 1
        yield report


def _log_finished(report: Report, experiment: Experiment, progress: Progress) -> Report:
    """Logs the rounds of a finished run that its loggers lack."""
    if experiment.config.loggers:
        with exclusive(experiment.folder, "run"):
            for event in round_values(report, 0):
                progress(event)
    return report


def _flops(report: Report, stats: np.ndarray, rows: np.ndarray, federation: Federation) -> float:
    """Floating-point operations of a round's training, of clients with these `CLIENT_STATS` and rows, (n,) each."""
    total, classes, task = 0.0, federation.classes[stats["client"]], federation.task
    of_method = [report.facts[name] for name in ("flops_per_step", "flops_per_row")]
    costs = report.facts.get("flops_of_devices", [of_method])
    for index, (device, (per_step, per_row)) in enumerate(zip(task.fleet.devices, costs, strict=True)):
        steps = stats["steps"] * (classes == index)
        passed = (rows * task.on(device).local_epochs * (steps > 0)).sum()
        total += float(steps.sum() * per_step + passed * per_row)
    return total


def _note(report: Report) -> str:
    loss = float(report.rounds[-1][COLUMNS["rounds"].index("loss")])
    validation = percent(report.validation[report.last_round])
    return f"loss {number(loss)}  validation {validation}%  best round {report.chosen_round}"


def _write(report: Report, folder: Path, page: bool) -> None:
    tables = report.tables()
    write_tables(tables, folder)
    about = {"round": report.chosen_round, "method": report.experiment["method"]}
    about |= {"evaluated": as_evaluated} if (as_evaluated := report.facts.get("evaluated")) else {}
    write_tensors(folder / ADAPTER, {name: tensor.numpy() for name, tensor in report.adapter.items()}, about)
    if page:
        write_page(tables, folder / PAGE)
