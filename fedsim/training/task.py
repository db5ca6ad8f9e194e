"""What all clients of a run have in common."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
from fedsim.fleets import Device, Fleet
from fedsim.fleets.ideal import Ideal
from fedsim.methods import Backbone, Method, Scope, masked
from fedsim.params import Params, flatten, payload_bytes
from fedsim.privacy import Privacy
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
        fleet: the clients' devices.
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
    fleet: Fleet = field(default_factory=Ideal)

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

    def device(self, client: int, clients: int) -> Device:
        """The device of one of K clients; one without limits for the server's own rows (`root.ROOT`)."""
        if client < 0:
            return Device()
        classes = self.fleet.classes(clients, self.seed)
        return self.fleet.devices[0 if classes is None else classes[client]]

    def on(self, device: Device) -> Method:
        """The method with the local epochs of a device."""
        return self.method if device.epochs is None else _with_epochs(self.method, device.epochs)

    def held(self, shared: Params, device: Device, round: int = 0, client: int = 0) -> Params:
        """`Server.held` of a client, without the tensors of which it has all."""
        if not any(getattr(device, name) for name in self.server.heeds):
            return {}
        held = self.server.held(shared, device, torch_rng(self.seed, "held", round, client))
        return {name: mask.to(shared[name].device) for name, mask in held.items() if not mask.all()}

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

    def payloads(self, params: Params, cohort: int, clients: int) -> tuple[np.ndarray, np.ndarray]:
        """(K,) int64 each, the bytes that each of K clients receives and sends in a round, by its device."""
        shared, devices = self.select(params, "shared"), self.fleet.devices
        parts = [payload_bytes(self._part(shared, device)) or 1 for device in devices]
        mean = self.fleet.by_class(parts, clients, self.seed).mean() if len(devices) > 1 else 0
        counts = [cohort * float(mean / part) if part != mean else cohort for part in parts] if mean else [cohort]
        down, up = zip(*map(partial(self.payload, params), counts, devices), strict=True)
        return self.fleet.by_class(down, clients, self.seed), self.fleet.by_class(up, clients, self.seed)

    def _part(self, shared: Params, device: Device) -> Params:
        """What a client has of the shared tensors; of tensors of which it does not have all, (n,) entries."""
        held = self.held(shared, device)
        return shared | {name: shared[name][mask.expand(shared[name].shape)] for name, mask in held.items()}

    def payload(self, params: Params, cohort: float, device: Device | None = None) -> tuple[int, int]:
        """Bytes that a client with this device receives and sends in a round; cohort as in `Server.payload`."""
        shared = self.select(params, "shared")
        slots, _ = self.server.init(shared)
        sent = self.server.broadcast(slots, shared)
        shared = self._part(shared, device or Device())
        server, others = self.select(params, "server"), (sent, self.reply(params).message, cohort)
        down = self.codec.encode_down(shared), self.codec.encode_down(server)
        up = encoded(self.codec, shared, torch_rng(self.seed, "codec")), server
        more_down, more_up = self.codec.overhead(round(cohort))
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


def _with_epochs(method: Method, epochs: int) -> Method:
    inner = getattr(method, "inner", None)  # of one that a server rule adapts
    held = {"inner": _with_epochs(inner, epochs)} if isinstance(inner, Method) else {}
    return replace(method, local_epochs=epochs, **held)


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
