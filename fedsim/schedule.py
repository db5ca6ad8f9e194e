"""Which clients are asked in each round, and whose updates count. Computed before training.

Simulated time depends on rows, bytes and keyed random numbers, never on results of training. So a schedule is a pure
function of the config: it is replayed on resume, and only clients whose updates count are trained.

Sources: a deadline and over-selection, Bonawitz et al. 2019, arXiv 1902.01046; asynchrony, Nguyen et al. 2022,
arXiv 2106.06639 (FedBuff).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count, islice
from math import ceil, inf

import numpy as np

from fedsim.clients import sample_cohort
from fedsim.config import Config
from fedsim.errors import InputError
from fedsim.methods import Method
from fedsim.registry import available, find, name_of
from fedsim.rng import numpy_rng
from fedsim.servers import Server
from fedsim.shares import decimal

MAX_MISSES = 10_000  # clients in a row that may miss the deadline before the run is refused

Bytes = np.ndarray | int
RowsOf = Callable[[Sequence[int], int], np.ndarray]  # of clients, in a round
Seconds = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class PlannedRound:
    """One step of the server: a round, or a full buffer.

    Attributes:
        round: 1, 2, ...
        trained: (client, version) of those whose work counts, ascending by version, then client; the version is the
            number of rounds that were done when the client was sent its parameters. Empty: no step is taken.
        clock_s: simulated seconds from the start to the end of this round.
        asked: clients that were sent parameters in this round.
        bytes_down: what they were sent, without a survey.
        dropped: clients that turned out in this round not to respond.
        late: stragglers, whose updates came too late to count.
        needed: versions of the parameters from which clients still train updates that will count.
    """

    round: int
    trained: list[tuple[int, int]]
    clock_s: float
    asked: int
    bytes_down: int
    dropped: int
    late: int
    needed: frozenset[int]


def check(config: Config, population: int) -> None:
    """Refuses a config that cannot be scheduled, or whose fields would have no effect.

    Raises:
        InputError: a deadline, over-selection or an asynchronous rule does not go with the rest of the config.
    """
    server, fleet = name_of(config.server), name_of(config.fleet)
    _check_devices(config, server)
    asynchronous = config.server.buffer is not None
    if config.fleet.instantaneous:
        for name, given in (
            ("deadline_s", config.deadline_s is not None),
            ("over_selection", config.over_selection > 0),
            (f"server {server}", asynchronous),
        ):
            if given:
                raise InputError(f"{name} needs a fleet whose clients take time, such as lognormal, not {fleet}")
    if config.server.unicasts and type(config.server).evaluated is not Server.evaluated:
        raise InputError(
            f"server {server} unicasts, so clients are evaluated with what they have trained, and it cannot define "
            "what is evaluated"
        )
    if config.privacy.poisson and config.cohort is None:
        raise InputError(f"Poisson sampling of clients needs a --cohort smaller than {population}, and all take part")
    for name, given in (
        (f"server {server}, whose rounds are asynchronous", asynchronous),
        (f"server {server}, which has rows of all classes", config.server.root_rows > 0),
        (f"privacy {name_of(config.privacy)}, which counts all rows", bool(config.privacy.protects)),
        (f"attack {name_of(config.attack)}, whose classes may arrive later", config.attack.targeted),
    ):
        if given and config.tasks > 1:
            raise InputError(f"tasks does not go with {name}")
    if asynchronous:
        if config.server.unicasts:
            raise InputError(f"server {server} unicasts, which needs synchronous rounds, so it cannot have a buffer")
        if config.cohort is not None:
            raise InputError(f"cohort {config.cohort}, but server {server} has none: its concurrency says who trains")
        if config.over_selection:
            raise InputError(f"over_selection {config.over_selection:g}, but server {server} has no cohort to exceed")
        if (config.server.buffer or 0) > population:
            raise InputError(
                f"server.buffer of {config.server.buffer} from {population} clients; each can have one update in it"
            )
    elif config.over_selection:
        if config.privacy.poisson:
            raise InputError(
                f"over_selection {config.over_selection:g}, but with Poisson sampling a round waits for all clients "
                "that were drawn; leave it out"
            )
        if config.cohort is None:
            raise InputError(f"over_selection {config.over_selection:g} needs a cohort smaller than {population}")
        if _asked(config, population) > population:
            raise InputError(
                f"over_selection {config.over_selection:g} of a cohort of {config.cohort} asks "
                f"{_asked(config, population)} of {population} clients; at most all of them can be asked"
            )


def _check_devices(config: Config, server: str) -> None:
    """Refuses classes of devices that the rest of the config does not heed."""
    fleet = config.fleet
    if fleet.shares and not any(map(any, fleet.devices)):
        raise InputError("fleet.shares has no effect without fleet.ranks, fleet.blocks or fleet.epochs")
    if any(map(any, fleet.devices)) and config.privacy.protects:
        raise InputError(
            f"privacy {name_of(config.privacy)} is accounted for equal clients; leave out fleet.ranks, fleet.blocks "
            "and fleet.epochs"
        )
    for field, limit in (("ranks", "rank"), ("blocks", "blocks")):
        if not getattr(fleet, field):
            continue
        if limit not in config.server.heeds:
            rules = " or ".join(name for name in available("server") if limit in find("server", name).heeds)
            raise InputError(
                f"fleet.{field} needs a server rule whose clients have unequal models: {rules}, not {server}"
            )
        if config.server.unicasts or config.server.needs_deltas:
            whole = "stores each client's model" if config.server.unicasts else "needs the delta of each client"
            raise InputError(
                f"server {server} {whole}, but with fleet.{field} clients have parts of the model; leave fleet.{field} "
                "out"
            )
        if config.tune_epochs:
            raise InputError(
                f"tune_epochs evaluates what clients have trained, and with fleet.{field} these are parts of the "
                "model; leave it out"
            )
        if config.method.estimator == "spsa":
            raise InputError(
                f"method.estimator spsa perturbs whole models, and with fleet.{field} clients have parts of them; take "
                "autograd"
            )
        if config.attack.forges or config.attack.colludes:
            raise InputError(
                f"attack {name_of(config.attack)} forges whole updates, and with fleet.{field} clients send parts"
            )
        if not config.codec.lossless:
            raise InputError(
                f"codec {name_of(config.codec)} encodes whole updates, and with fleet.{field} clients send parts of "
                "them; take plain"
            )


def check_trained(
    config: Config, method: Method, population: int, rows_of: RowsOf, bytes_down: Bytes, bytes_up: Bytes
) -> None:
    """Refuses a run in which no client trains, since its report would be that of untrained parameters.

    Args:
        method: as the server rule has it trained.
        population, rows_of, bytes_down, bytes_up: as of `schedule`.

    Raises:
        InputError: in no round is an update received, or no client takes a local step.
    """
    if not config.rounds:
        return
    asked, dropped, late, received, counted = 0, 0, 0, 0, 0
    for planned in islice(schedule(config, population, rows_of, bytes_down, bytes_up), config.rounds):
        # One by one: the first client is nearly always enough, and rows may have to be drawn.
        enough = config.codec.enough(len(planned.trained), planned.asked)
        if enough and any(method.steps(int(rows_of([client], planned.round)[0])) for client, _ in planned.trained):
            return
        received += len(planned.trained)
        counted += len(planned.trained) * enough
        asked, dropped, late = asked + planned.asked, dropped + planned.dropped, late + planned.late
    if received and not counted:
        raise InputError(
            f"no round of {config.rounds} has as many responses as codec {name_of(config.codec)} needs: {received} of "
            f"{asked} clients asked respond in time; set a lower --codec.threshold or --over-selection, or another "
            "fleet"
        )
    if received:
        raise InputError(
            f"no client takes a local step in {config.rounds} rounds: each has fewer train rows than the "
            f"{method.min_batch} that a step of method {name_of(config.method)} needs"
        )
    if not asked:
        raise InputError(f"no client is available in {config.rounds} rounds; set a higher --fleet.availability")
    raise InputError(
        f"no update is received in {config.rounds} rounds: of {asked} clients asked {dropped} drop out and {late} miss "
        f"the deadline (deadline_s: {config.deadline_s}); set a longer --deadline-s or another fleet"
    )


def schedule(
    config: Config,
    population: int,
    rows_of: RowsOf,
    bytes_down: Bytes,
    bytes_up: Bytes,
    survey_bytes: tuple[int, int] = (0, 0),
) -> Iterator[PlannedRound]:
    """All rounds of a run, without end.

    A client is found to have dropped out when its answer would have been due, or at the deadline if that is earlier.
    A survey comes before round 1 and waits for the slowest link of all clients, whether available in that round or not.

    Args:
        population: number of training clients; their ids are below it.
        rows_of: train rows of the clients of these ids in a round.
        bytes_down, bytes_up: what a client receives and sends; (K,), or a number for all.
        survey_bytes: the same of the survey, once.

    Raises:
        InputError: under an asynchronous rule, no client responds within the deadline.
    """
    costs = config.fleet.costs(population, numpy_rng(config.seed, "fleet"))
    classes = config.fleet.classes(population, config.seed)
    all_epochs = np.array([device.epochs or config.method.local_epochs for device in config.fleet.devices])
    received, sent = (np.broadcast_to(np.asarray(each), population) for each in (bytes_down, bytes_up))

    def seconds(clients: np.ndarray, round: int) -> np.ndarray:
        """(n,) float64, what the work of these clients takes without jitter."""
        if config.fleet.instantaneous:
            return np.zeros(len(clients))  # without drawing the clients' rows
        rows = rows_of(clients.tolist(), round) * all_epochs[0 if classes is None else classes[clients]]
        row, down, up = costs[clients].T
        return rows * row + received[clients] * down + sent[clients] * up

    if config.server.buffer is not None:
        rounds = _buffers(config, population, seconds, received)
    else:
        rounds = _rounds(config, population, seconds, received, rows_of)
    if not any(survey_bytes):
        return rounds
    survey_s = float((costs[:, 1:] @ np.array(survey_bytes, np.float64)).max())
    return (replace(planned, clock_s=survey_s + planned.clock_s) for planned in rounds)


def _rounds(
    config: Config, population: int, seconds: Seconds, received: np.ndarray, rows_of: RowsOf
) -> Iterator[PlannedRound]:
    """Synchronous rounds: ask a cohort, then wait for enough answers, for all, or for the deadline.

    Where classes arrive in tasks, clients without a row of the current one are not asked.
    """
    clock, enough = 0.0, config.cohort or population
    for round in count(1):
        available = np.flatnonzero(config.fleet.available(population, numpy_rng(config.seed, "availability", round)))
        if config.tasks > 1:
            available = available[rows_of(available.tolist(), round) > 0]
        if config.privacy.poisson and config.cohort is not None:
            drawn = numpy_rng(config.seed, "cohort", round).random(population) < config.cohort / population
            asked, enough = available[drawn[available]], population
        else:
            size = min(_asked(config, population), len(available))
            asked = available[sample_cohort(len(available), size, config.seed, round)]
        # For all clients, so that a client's outcome does not depend on which others are asked.
        jitter, answers = config.fleet.outcomes(population, numpy_rng(config.seed, "luck", round))
        jitter, answers = jitter[asked], answers[asked]
        due = seconds(asked, round) * jitter
        deadline = inf if config.deadline_s is None else config.deadline_s
        in_time = np.flatnonzero(answers & (due <= deadline))
        counted = in_time[np.argsort(due[in_time], kind="stable")[:enough]]  # ties: the lower id
        if len(counted) == enough:
            clock += float(due[counted[-1]])
        else:
            clock += float(np.minimum(due, deadline).max(initial=0.0))
        trained = [(client, round - 1) for client in np.sort(asked[counted]).tolist()]
        dropped = int((~answers).sum())
        late = len(asked) - len(trained) - dropped
        bytes_down = int(received[asked].sum())
        yield PlannedRound(round, trained, clock, len(asked), bytes_down, dropped, late, needed=frozenset())


def _buffers(config: Config, population: int, seconds: Seconds, received: np.ndarray) -> Iterator[PlannedRound]:
    """Asynchronous rounds: whenever a client answers, ask another; a round ends when the buffer is full."""
    size, concurrency = config.server.buffer, config.server.concurrency
    assert size and concurrency, "an asynchronous rule has a buffer and a concurrency"
    clock, misses = 0.0, 0
    deadline = inf if config.deadline_s is None else config.deadline_s
    free = np.ones(population, bool)  # neither training nor in the buffer
    working: list[tuple[float, int, int, str]] = []  # a heap of (end, client, version, outcome): ties to the lower id
    buffer: list[tuple[int, int]] = []  # of (version, client)
    for round in count(1):
        available = config.fleet.available(population, numpy_rng(config.seed, "availability", round))
        choice, draws = numpy_rng(config.seed, "cohort", round), numpy_rng(config.seed, "luck", round)
        candidates = np.flatnonzero(free & available).tolist()
        asked = bytes_down = dropped = late = 0
        while len(buffer) < size:
            room = concurrency - len(working)
            clients = np.sort([_take(candidates, choice) for _ in range(min(room, len(candidates)))]).astype(np.int64)
            if len(clients):
                jitter, answers = config.fleet.outcomes(len(clients), draws)
                due = seconds(clients, round) * jitter
                outcomes = np.where(~answers, "dropped", np.where(due <= deadline, "answered", "late")).tolist()
                ends = (clock + np.minimum(due, deadline)).tolist()
                for end, client, outcome in zip(ends, clients.tolist(), outcomes, strict=True):
                    heappush(working, (end, client, round - 1, outcome))
                free[clients] = False
                asked += len(clients)
                bytes_down += int(received[clients].sum())
            if not working:
                break  # no client is available in this round
            clock, client, version, outcome = heappop(working)
            if outcome == "answered":
                buffer.append((version, client))
                misses = 0
                continue
            free[client] = True
            candidates += [client] * bool(available[client])
            dropped, late, misses = dropped + (outcome == "dropped"), late + (outcome == "late"), misses + 1
            if misses == MAX_MISSES:
                raise InputError(
                    f"of {MAX_MISSES} clients asked in a row none answered (deadline_s: {config.deadline_s}); try a "
                    "longer deadline_s, or another fleet"
                )
        trained = []
        if len(buffer) == size:
            trained = [(client, version) for version, client in sorted(buffer)]
            free[[client for _, client in buffer]] = True
            buffer = []
        needed = {version for version, _ in buffer} | {v for _, _, v, outcome in working if outcome == "answered"}
        yield PlannedRound(round, trained, clock, asked, bytes_down, dropped, late, frozenset(needed))


def _take(pool: list[int], rng: np.random.Generator) -> int:
    """Removes a random client from the pool, in constant time."""
    index = rng.integers(len(pool))
    pool[index], pool[-1] = pool[-1], pool[index]
    return pool.pop()


def _asked(config: Config, population: int) -> int:
    """Clients to ask in a round."""
    return population if config.cohort is None else ceil(config.cohort * (1 + decimal(config.over_selection)))
