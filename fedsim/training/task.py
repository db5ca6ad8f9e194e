"""What all clients of a run have in common, and the parameters of round 0."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.attacks import Attack
from fedsim.attacks.honest import Honest
from fedsim.clip.model import Clip
from fedsim.clip.sites import Reads
from fedsim.codecs import Codec
from fedsim.codecs.plain import Plain
from fedsim.datasets import Labels
from fedsim.errors import InputError, listing
from fedsim.methods import Backbone, Batch, Method, Scope, masked, trained
from fedsim.methods._batch_norm import BatchNorm
from fedsim.params import Params, flatten
from fedsim.privacy import Privacy, replies
from fedsim.privacy.none import Unprotected
from fedsim.registry import name_of
from fedsim.representations import Encoded
from fedsim.rng import seed_for, torch_rng
from fedsim.servers import ClientUpdate, Reply, Server, Slots
from fedsim.training.client_store import PrivateStore
from fedsim.training.transmit import encoded

FEATURES = Reads()
MAX_BANK_BYTES = 512 << 20


@dataclass(frozen=True)
class Task:
    """What all clients of a run have in common. With a client, a round and parameters, it determines a result.

    Attributes:
        method: the method as the server rule adapts it (`Server.adapt`).
        dtype: that of the parameters: float32 or float64.
        rounds: of the run in all, on which the step size of a round may depend.
        private: where clients store their private state.
        reference: train client by client, on the readable path.
        codec: how parameters and updates travel.
        privacy: what of clients is clipped and noised.
        attack: what malicious clients do.
    """

    method: Method
    server: Server
    seed: int
    dtype: str = "float32"
    rounds: int = 1
    private: PrivateStore | None = None
    reference: bool = False
    codec: Codec = field(default_factory=Plain)
    privacy: Privacy = field(default_factory=Unprotected)
    attack: Attack = field(default_factory=Honest)

    def lr(self, round: int) -> float:
        """The step size of clients that were sent their parameters in this round."""
        return self.method.lr_in(round, self.rounds)

    @property
    def keeps_deltas(self) -> bool:
        """Whether the server has the delta of each client, not only their sum."""
        return self.server.needs_deltas or self.server.unicasts or self.attack.colludes

    def malicious(self, population: int) -> frozenset[int]:
        """Ids of the malicious ones among so many training clients."""
        return self.attack.malicious(population, self.seed)

    def trigger(self, x: Tensor) -> Tensor:
        """Attacked rows as they are shown to a model."""
        return self.attack.trigger(x, torch_rng(self.seed, "trigger"))

    def scope(self, name: str) -> Scope:
        """Who holds the tensor of this name."""
        return self.server.scope(name, self.method.scope(name))

    def select(self, params: Params, *scopes: Scope) -> Params:
        """The tensors of the given scopes."""
        return {name: tensor for name, tensor in params.items() if self.scope(name) in scopes}

    def received(self, params: Params) -> Params:
        """All tensors as a client receives them: those that travel in each round, encoded and decoded."""
        sent = self.select(params, "shared", "server")
        return params | self.codec.decode_down(self.codec.encode_down(sent), sent)

    def evaluated(self, params: Params, slots: Slots) -> Params:
        """All tensors as they are evaluated; see `Server.evaluated`."""
        return params | self.server.evaluated(self.select(params, "shared"), slots)

    def competing(self, data: Labels, trained: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray | None:
        """(M, C) bool, the classes that compete in the loss of each of M clients; None where all do.

        Args:
            trained: (C,) bool, the classes that clients train on.
            rows: the train rows of each client.
        """
        if self.method.label_space == "client":
            masks = np.zeros((len(rows), len(data.classes)), bool)
            for mask, own in zip(masks, rows, strict=True):
                mask[data.y[own]] = True  # not the classes that only its test rows show
            return masks
        if data.class_domain or not trained.all():
            return np.stack([trained & data.competing(own) for own in rows])
        return None

    @property
    def recodes(self) -> bool:
        """Whether the server has other tensors of a client than it has trained."""
        return self.attack.forges or not self.codec.lossless or self.privacy.protects_updates

    def has_private_state(self, params: Params) -> bool:
        """Whether clients have a private state."""
        client_state = self.server.init(self.select(params, "shared"))[1]
        private = bool(self.unicast_like(params) or self.select(params, "private"))
        lost = self.codec.remembers and bool(self.select(params, "shared"))
        return self.method.persist_optimizer or bool(client_state) or private or lost

    def is_personal(self, params: Params) -> bool:
        """Whether each client is evaluated with tensors of its own."""
        private = [name for name in self.select(params, "private") if not self.method.is_auxiliary(name)]
        return bool(self.unicast_like(params) or private)

    def first_bank(self, params: Params, clients: int) -> np.ndarray:
        """(K, P) zeros, one row for each of so many clients, if the rule `unicasts`; else empty.

        Raises:
            InputError: it would be too large. While a checkpoint is written, the driver has up to four times its bytes.
        """
        row = flatten(self.select(params, "shared"))
        if not self.server.unicasts:
            return np.zeros((0, 0), row.dtype)
        if (size := clients * row.nbytes) > MAX_BANK_BYTES:
            raise InputError(
                f"server {name_of(self.server)} stores the shared parameters of every client in memory and in each "
                f"checkpoint: {size / 2**20:,.0f} MiB for {clients:,} clients with {row.size:,} parameters each, more "
                f"than {MAX_BANK_BYTES >> 20} MiB; take fewer clients or a method with fewer parameters"
            )
        return np.zeros((clients, row.size), row.dtype)

    def unicast_like(self, params: Params) -> Params:
        """What `Server.unicast` gives a client, for its names and shapes."""
        if not self.server.unicasts:
            return {}
        common = self.select(params, "shared", "server")
        sent = self.server.unicast(0, {}, common)
        if names := sorted(sent.keys() - common.keys()):
            raise TypeError(f"{name_of(self.server)}: unicast gives {listing(names)}, which clients do not receive")
        if common and not sent:
            raise TypeError(
                f"{name_of(self.server)}: unicast gives nothing; it must give the same names in every call, with an "
                "empty bank too"
            )
        return sent

    def payload(self, params: Params, cohort: int) -> tuple[int, int]:
        """Bytes that a client receives and sends in a round with `cohort` clients."""
        shared = self.select(params, "shared")
        slots, _ = self.server.init(shared)
        sent = self.server.broadcast(slots, shared)
        server, others = self.select(params, "server"), (sent, self.reply(params).message, cohort)
        down = self.codec.encode_down(shared), self.codec.encode_down(server)
        up = encoded(self.codec, shared, torch_rng(self.seed, "codec")), server
        more_down, more_up = self.codec.overhead(cohort)
        return self.server.payload(*down, *others)[0] + more_down, self.server.payload(*up, *others)[1] + more_up

    def reply(self, params: Params) -> Reply:
        """What a client sends besides an update of zeros, for names and shapes."""
        shared = self.select(params, "shared")
        slots, client_state = self.server.init(shared)
        sent = self.server.broadcast(slots, shared)
        update = ClientUpdate(shared, shared, client_state, sent, 1, 1, 0, self.method, self.method.lr)
        return self.server.reply(update)

    def build(self, backbone: Backbone) -> nn.Module:
        """The module of round 0, the same in every process: PyTorch's default initialisation under the run's seed.

        Only the tensors that clients train require gradients.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "init"))
            module = masked(self.method.build(backbone))
        for name, tensor in module.named_parameters():
            tensor.requires_grad_(self.scope(name) in ("shared", "private"))
        return module


def initial_params(task: Task, backbone: Backbone, cohort: int = 1) -> Params:
    """The parameters of round 0; `cohort` is the number of clients in a round."""
    _check_groups(task.method, backbone.groups)
    module = task.build(backbone)
    dtype = getattr(torch, task.dtype)
    if integers := [name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()]:
        counted = any(name.endswith("num_batches_tracked") for name in integers)
        hint = "; fedsim.methods._batch_norm.BatchNorm does not count batches" if counted else ""
        raise InputError(f"{name_of(task.method)} has tensors that cannot be averaged: {listing(integers)}{hint}")
    params = {name: tensor.detach().clone().to(dtype) for name, tensor in module.state_dict().items()}
    if names := [name for name in params if task.method.scope(name) == "server"]:
        raise InputError(
            f"{name_of(task.method)} gives {listing(names)} the scope server, which only a server rule can give, "
            "because it says how the server changes a tensor that clients do not train; use frozen"
        )
    if task.method.min_batch < 2 and any(isinstance(part, BatchNorm) for part in module.modules()):
        raise InputError(f"{name_of(task.method)} has a BatchNorm, and one row has no variance; it needs min_batch = 2")
    if task.method.changes_gradients and task.method.estimator == "spsa":
        raise InputError(
            f"the gradient by which {name_of(task.method)} trains is not that of the values of its loss, from which "
            "--method.estimator spsa would estimate it; take autograd"
        )
    if (task.method.expands or task.select(params, "surveyed")) and task.method.reads.image != "features":
        what = "expands clients' rows" if task.method.expands else "makes a survey"
        raise InputError(f"{name_of(task.method)} {what}, which needs image features, not {task.method.reads.image}")
    if task.select(params, "surveyed") and task.method.reads.towers:
        raise InputError(
            f"{name_of(task.method)} makes a survey, which needs text features, not text {task.method.reads.text}"
        )
    untrained = [name for name in task.select(params, "shared") if name not in trained(module)]
    if untrained and not task.server.averages:
        raise InputError(
            f"server {name_of(task.server)} does not average, as {_of_method(task, untrained)} need, "
            "which clients compute without training them; take a rule that does, such as fedavg or fedprox"
        )
    if task.privacy.protects:
        _check_privacy(task, params, untrained)
        if task.privacy.protects == "rows":
            _check_rows(task, module, backbone)
    if untrained and not task.codec.lossless:
        raise InputError(
            f"codec {name_of(task.codec)} would change {_of_method(task, untrained)}, which clients compute without "
            "training them; take plain"
        )
    if not task.codec.lossless and task.server.start(task.select(params, "shared"), torch_rng(task.seed, "start")):
        raise InputError(
            f"server {name_of(task.server)} gives clients new tensors before they train, and codec "
            f"{name_of(task.codec)} would encode these as if they were learned; take plain, or another rule"
        )
    if task.codec.sums:
        _check_sums(task, params, cohort)
    if (rows := task.server.root_rows) and not task.method.steps(rows):
        raise InputError(
            f"server.root_rows must be {task.method.min_batch} or more with method {name_of(task.method)}, got {rows}: "
            "the server could not take a step"
        )
    task.server.check({n: tensor for n, tensor in params.items() if task.method.scope(n) == "shared"}, cohort)
    return params


def _check_groups(method: Method, groups: Sequence[str]) -> None:
    """Refuses data without groups."""
    if method.reads_group and len(groups) < 2:
        raise InputError(
            f"method {_name(method)} needs rows of two or more groups (a sensitive attribute), and the data set has "
            f"{f'only {groups[0]!r}' if groups else 'none'}; give --dataset.group COLUMN of data set huggingface, or "
            "--dataset.domain-groups true"
        )


def _check_sums(task: Task, params: Params, cohort: int) -> None:
    """Refuses what needs more than the sum of the updates, and a sum that does not fit."""
    codec, server = f"codec {name_of(task.codec)}", f"server {name_of(task.server)}"
    if task.server.needs_deltas or task.server.unicasts or task.server.buffer is not None:
        raise InputError(f"{server} needs the update of each client, and with {codec} only their sum is known")
    answers = replies(task.method, task.server, task.select(params, "shared"))
    if any(each.message for each in answers):
        raise InputError(f"{server} has clients send messages besides their updates, which {codec} does not sum")
    if any(each.weight != 1 for each in answers):
        raise InputError(
            f"{server} weights the updates of clients, and {codec} sums them as they are; take equal weights"
        )
    if task.attack.colludes:
        raise InputError(f"attack {name_of(task.attack)} needs the update of each client, and {codec} sums them")
    if task.privacy.protects == "clients" and not task.privacy.protects_updates:
        raise InputError(
            f"privacy {name_of(task.privacy)} clips what the server decodes, and {codec} gives it the sum alone"
        )
    task.codec.check(cohort)


def _check_privacy(task: Task, params: Params, untrained: list[str]) -> None:
    """Refuses what clients would send besides tensors that they train, and what the mechanism refuses."""
    privacy, method = f"privacy {name_of(task.privacy)}", name_of(task.method)
    if task.select(params, "surveyed"):
        raise InputError(f"{privacy} does not cover the survey of {method}, whose sums over clients' rows are exact")
    if untrained:
        raise InputError(
            f"{privacy} would add noise to {_of_method(task, untrained)}, which clients compute without training them; "
            "take another method"
        )
    task.privacy.check(task.method, task.server, task.select(params, "shared"))


def _check_rows(task: Task, module: nn.Module, backbone: Backbone) -> None:
    """Refuses a method that reads features and whose loss of a batch is not the mean of its rows' losses.

    It is tried on three random rows. Of other methods, only what they declare is known; see `ExampleDP.check`.
    """
    if task.method.reads.image != "features" or task.method.reads_rule:
        return
    x = torch.randn(3, backbone.width, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0]).clamp_max(len(backbone.class_embeddings) - 1)
    with torch.no_grad():
        module.eval()  # without dropout
        whole = task.method.loss(module, Batch(x, y))
        rows = torch.stack([task.method.loss(module, Batch(x[k : k + 1], y[k : k + 1])) for k in range(3)])
        module.train()
    if not torch.allclose(whole, rows.mean(), rtol=1e-3):
        raise InputError(
            f"privacy {name_of(task.privacy)} clips the gradients of single rows, but the loss of method "
            f"{name_of(task.method)} is not the mean of its rows' losses; take another method or objective"
        )


def _of_method(task: Task, names: list[str]) -> str:
    """Tensors of a method, in words that its user knows."""
    return f"{listing(name.removeprefix('shared.') for name in names)} of {_name(task.method)}"


def _name(method: Method) -> str:
    """The name of a method, also as a server rule adapts it."""
    while isinstance(inner := getattr(method, "inner", None), Method):
        method = inner
    return name_of(method)


def local_rows(method: Method, labels: Labels, rows: np.ndarray) -> int:
    """The rows on which a client with these train rows trains in a local epoch."""
    return method.local_rows(labels.y[rows]) if method.expands else len(rows)


def backbone_of(
    data: Encoded, device: str = "cpu", dtype: str = "float32", reads: Reads = FEATURES, clip: Clip | None = None
) -> Backbone:
    """What a method sees of the frozen CLIP: the embeddings of the classes, and the towers that it reads."""
    text = data.class_embeddings
    vectors = torch.tensor(text.vectors, dtype=getattr(torch, dtype), device=device)
    of_data = {"domains": len(data.domains), "groups": data.groups}
    backbone = Backbone(vectors, text.logit_scale, data.classes, text.templates, **of_data)
    return with_towers(backbone, reads, clip)


def with_towers(backbone: Backbone, reads: Reads, clip: Clip | None) -> Backbone:
    """The backbone with the towers that a method reads."""
    text = clip.text_tower(reads.text == "blocks") if clip and reads.text != "features" else None
    image = clip.image_tower() if clip and reads.image == "pixels" else None
    return replace(backbone, text_tower=text, image_tower=image)
