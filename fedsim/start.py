"""Where a run starts: in round 0, or in the round of its checkpoint."""

from dataclasses import replace
from typing import Any

import numpy as np

from fedsim.checkpoint import Checkpoints
from fedsim.clip.texts import describe
from fedsim.errors import InputError, counted
from fedsim.fleets import Device
from fedsim.ledger import Ledger
from fedsim.methods import Backbone
from fedsim.params import Params
from fedsim.prepare import Experiment, evaluated_clients, reads_of
from fedsim.reporting.facts import environment
from fedsim.reporting.report import Report, holdings
from fedsim.rng import numpy_rng
from fedsim.state import ServerState
from fedsim.training.contexts import ClientContexts
from fedsim.training.flops import flops_of
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, backbone_of


def start(experiment: Experiment, task: Task, checkpoints: Checkpoints) -> tuple[ServerState, Report]:
    """The state and the report of the last checkpoint, or those of round 0.

    Raises:
        InputError: the checkpoint was written with other images or weights, or the method or the rule refuses to start.
    """
    saved = checkpoints.load()
    if not saved:
        return _round_zero(experiment, task)
    source = experiment.encoded.source
    if saved[1].facts["features"] != source.representations.key or saved[1].classes != list(source.class_labels):
        raise InputError(
            f"the images, the class names or the weights behind {experiment.folder} have changed; give another --out"
        )
    return saved


def _round_zero(experiment: Experiment, task: Task) -> tuple[ServerState, Report]:
    config, data, clients = experiment.config, experiment.encoded, experiment.clients
    clip = data.clip() if task.method.reads.towers else None
    backbone = backbone_of(data.source, reads=task.method.reads, clip=clip)
    params = initial_params(task, backbone, config.cohort or clients.trainers)
    slots, _ = task.server.init(task.select(params, "shared"))
    writers = clients.trainers if task.has_private_state(params) else 0
    bank = task.first_bank(params, clients.trainers)
    state = ServerState(0, params, slots, private=np.zeros(writers, np.int64), bank=bank, privacy=task.privacy.init())
    facts = _facts(experiment, task, backbone, params)
    names = config.experiment(), list(data.source.domains), list(data.source.class_labels), list(config.held_out)
    adapter = task.evaluated(params, slots)
    report = Report(*names, facts, list(data.source.class_domain), adapter=adapter, private=state.private)
    evaluated = evaluated_clients(config, clients)
    report.devices = _devices(experiment, task, params, evaluated)
    shown = [*evaluated, *range(clients.trainers, len(clients))]
    report.holdings = holdings(data.source, (clients[client] for client in shown))
    return state, report


def _devices(experiment: Experiment, task: Task, params: Params, ids: list[int]) -> np.ndarray:
    """(n, 7) int64, the columns of `Tables.clients`, of the clients of these ids."""
    config, count = experiment.config, experiment.clients.trainers
    kinds = [(k, d.rank or 0, d.blocks or 0, task.on(d).local_epochs) for k, d in enumerate(config.fleet.devices)]
    device = np.array(kinds, np.int64)[config.fleet.by_class(range(len(kinds)), count, task.seed)[ids]]
    sent = [each[ids] for each in task.payloads(params, config.cohort or count, count)]
    return np.column_stack([ids, device, *sent])


def _task_on(experiment: Experiment, task: Task, device: Device) -> Task:
    """The task with a model of a device's rank, which is what a client with it computes."""
    method: Any = experiment.config.method
    if not (device.rank and hasattr(method, "rank")):
        return task
    return replace(task, method=task.server.adapt(replace(method, rank=device.rank)))


def _facts(experiment: Experiment, task: Task, backbone: Backbone, params: Params) -> dict[str, Any]:
    """What the page says of the data, the model and the software."""
    config, source, skipped = experiment.config, experiment.source, experiment.data.skipped
    client = experiment.clients[0]
    sample = numpy_rng(task.seed, "flops").permutation(client.train)[: task.method.batch_size]
    masks = task.competing(source, experiment.clients.trained_classes(source), [client.train])
    classes = None if masks is None else masks[0]
    # Rounds may alternate, of methods that know which it is.
    rounds = range(1, 3 if task.method.reads_client else 2)
    contexts = [ClientContexts(source, "cpu").of(task, round, [client]) for round in rounds]

    def flops(task: Task, device: Device | None = None) -> list[float]:
        """Those of `flops_of`, the means over the rounds."""
        parts = [context and context.part(0) for context in contexts]
        counts = [flops_of(task, backbone, source, sample, classes, part, device) for part in parts]
        return np.mean(counts, axis=0).tolist()

    per_step, per_row = flops(task)
    facts = {
        "images": f"{source.rows_per_client} a client, made on demand" if source.rows_per_client else len(source),
        "width": experiment.data.width,
        "logit_scale": source.class_embeddings.logit_scale,
        "skipped": skipped,
        "features": source.representations.key,
        "reads": reads_of(task.method),
        "augment": source.representations.views - 1,
        "unseen_test": source.unseen_test,
        "label_space": task.method.label_space,
        "personal": task.is_personal(params),
        "trained_parameters": sum(tensor.numel() for tensor in task.select(params, "shared", "private").values()),
        "flops_per_step": per_step,
        "flops_per_row": per_row,
        "versions": environment(),
    }
    if any(map(any, devices := config.fleet.devices)):
        classes_of = config.fleet.by_class(range(len(devices)), experiment.clients.trainers, task.seed)
        counts = np.bincount(classes_of, minlength=len(devices)).tolist()
        facts["devices"] = "; ".join(f"{counted(n, 'client')} with {d}" for n, d in zip(counts, devices, strict=True))
        facts["flops_of_devices"] = [flops(_task_on(experiment, task, d), d) for d in devices]
    if task.method.reads_target:
        count = sum(map(len, experiment.clients.held_out))
        facts["transductive"] = f"training reads {count} test rows of held-out domains, without labels"
    if about := task.codec.about:
        down, up = task.codec.overhead(experiment.config.cohort or experiment.clients.trainers)
        facts["codec"] = f"{about}; {up:,} bytes up and {down:,} down per client and round, besides parameters"
    if malicious := task.malicious(experiment.clients.trainers):
        facts["malicious"] = sorted(malicious)
    if experiment.clients.common is not None:
        facts["common_rows"] = len(experiment.clients.common)
    if source.groups:
        facts["groups"] = list(source.groups)
    if tasks := experiment.clients.class_tasks:
        facts["class_tasks"] = [[source.class_labels[label] for label in task] for task in tasks.classes]
    if experiment.clients.images is not None:
        facts["scrambled"] = "clients' rows have the images of other rows, in training and in tests"
    if words := Ledger(experiment.config, task, params, experiment.clients.trainers, ()).words:
        facts["privacy"] = words
    if task.server.evaluated_as:
        facts["evaluated"] = task.server.evaluated_as
    if experiment.data.weights:  # of ready-made features, the texts are not known
        facts["class_texts"] = describe(source.class_embeddings.templates)
    if assumptions := experiment.data.assumptions():
        facts["data_notes"] = "; ".join(assumptions)
    return facts
