"""Methods: what is trained on top of the frozen CLIP, and how a client trains it.

A method defines `build(backbone)`, which returns a module that holds exactly what is trained, and optionally `sites`
(where that attaches to CLIP), `loss`, its `closed_form`, `scope` (which tensors travel), and `survey` (sums over all
clients that it needs first). The hyperparameters of local training are fields of every method.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.clip.sites import Reads, Site, reads_of
from fedsim.clip.texts import DEFAULT, Templates, texts_of
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.errors import InputError
from fedsim.methods._local_training import LocalTraining
from fedsim.methods._local_training import Schedule as Schedule  # for subclasses that have another default
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field

# Who trains a tensor, and whether it travels. shared: clients train it, and the server combines the results. private:
# each client trains its own copy, which never leaves it. server: only the server changes it, and sends it to clients.
# frozen: it never changes and never travels, because it follows from the seed. surveyed: the server computes it from
# `Method.survey` before round 1 and sends it once; it never changes after that.
Scope = Literal["shared", "private", "server", "frozen", "surveyed"]


@dataclass(frozen=True)
class Backbone:
    """What a method sees of the frozen CLIP.

    Attributes:
        class_embeddings: (C, D) unit rows, the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter.
        classes: the C class names; in a suite, two data sets may have the same.
        templates: the text of a class, with `{}` in place of its name, or in a suite C of them, one for each class; of
            several, the text features are averaged.
        text_tower, image_tower: None unless the method's sites need them.
        domains: number of domains of the data, held-out ones among them.
        groups: names of the groups of a sensitive attribute; none if the data have none.
    """

    class_embeddings: Tensor
    logit_scale: float
    classes: tuple[str, ...] = ()
    templates: Templates = (DEFAULT,)
    text_tower: TextTower | None = None
    image_tower: ImageTower | None = None
    domains: int = 1
    groups: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """D, the width of the shared embedding space."""
        return self.class_embeddings.shape[1]

    @property
    def texts(self) -> list[str]:
        """The texts of the C classes, for methods that need one text of a class.

        Raises:
            InputError: there are several.
        """
        if len(self.templates) != 1:
            raise InputError(
                "training through the text tower needs one text of a class, and --prompt gives "
                f"{len(self.templates)} templates; give one"
            )
        return texts_of(self.templates, self.classes)[0]

    @property
    def text(self) -> TextTower:
        if self.text_tower is None:
            raise TypeError("a method that trains through the text tower declares it: `text_tokens` among its sites")
        return self.text_tower

    @property
    def image(self) -> ImageTower:
        if self.image_tower is None:
            raise TypeError("a method that trains through the image tower declares it: `image_blocks` among its sites")
        return self.image_tower


class ClientContext(NamedTuple):
    """Whose rows are trained on or evaluated. For a stack of M clients, all tensors have a leading M.

    Attributes:
        domain: () int64, index of the domain of the client's rows; -1 if they are of several.
        counts: (C,) int64, its train rows by class; zeros for held-out domains and new classes, which have none.
        round: in which it was sent its parameters, from 1; in an evaluation, the number of rounds done.
        rounds: their number in total; None unless `Method.fixed_rounds`, since a run may continue with more.
        id: () int64, the client whose parameters are trained or evaluated, also on the rows of others; None in tests of
            a method alone.
    """

    domain: Tensor
    counts: Tensor
    round: int
    rounds: int | None = None
    id: Tensor | None = None

    def part(self, index: int | slice) -> "ClientContext":
        """That of a client of the stack, or of several."""
        ids = None if self.id is None else self.id[index]
        return self._replace(domain=self.domain[index], counts=self.counts[index], id=ids)


class RuleContext(NamedTuple):
    """What the server rule has given a client. For a stack of M clients, `client_state` has a leading M.

    Attributes:
        received: the parameters that the client received and trains, as it received them; those that each client
            received for itself have a leading M, too.
        client_state: the client's memory for the rule.
        sent: what the rule sends besides the parameters.
    """

    received: Params
    client_state: Params
    sent: Params


class Batch(NamedTuple):
    """The input of a local step. For a stack of M clients, every tensor has a leading M.

    Attributes:
        x: (B, ...) the representation that the method reads: features, patch tokens or pixels.
        y: (B,) class indices.
        classes: (C,) bool, the classes that compete; None: all.
        client: whose rows they are; None unless `Method.reads_client`.
        target: (B, ...) as x, unlabelled test rows of the held-out domains; None unless `Method.reads_target`.
        rule: what the server rule has given the client; None unless `Method.reads_rule`.
        group: (B,) indices into `Backbone.groups`; None unless `Method.reads_group`.
    """

    x: Tensor
    y: Tensor
    classes: Tensor | None = None
    client: ClientContext | None = None
    target: Tensor | None = None
    rule: RuleContext | None = None
    group: Tensor | None = None


@component
class Method(LocalTraining, ABC):
    """A method and its hyperparameters. Subclasses are components; their defaults are those of the papers."""

    # Whether the logit of a class depends on which other classes are active; each label space is then evaluated
    # separately.
    joint_classes: ClassVar[bool] = False
    # Whether `loss` and `logits` get the client; each is then evaluated separately.
    reads_client: ClassVar[bool] = False
    # Whether `loss` gets unlabelled rows of the held-out domains, the same that are tested. Reports then say that the
    # method is transductive. A suite, whose data sets have classes of their own, is refused.
    reads_target: ClassVar[bool] = False
    # Whether `loss` gets what the server rule has given the client: for the methods by which rules change a loss.
    reads_rule: ClassVar[bool] = False
    # Whether `loss` gets the group of each row by a sensitive attribute. Data without groups are refused.
    reads_group: ClassVar[bool] = False
    # Whether clients train on more rows than they have: see `expand`. Not together with `reads_group`.
    expands: ClassVar[bool] = False

    label_space: Literal["all", "client"] = Field(
        "all", description="classes that compete in a client's loss: all training classes, or only the client's own"
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the parameters attach to CLIP, which determines what is computed once and what at every step."""
        return ("image_feature",)

    @property
    def reads(self) -> Reads:
        """The representations of images and classes that a client receives."""
        return reads_of(self.sites)

    @property
    def contrasts_rows(self) -> bool:
        """Whether the loss of a batch is not the mean of its rows' losses; privacy of single rows is then refused."""
        return self.min_batch > 1

    @abstractmethod
    def build(self, backbone: Backbone) -> nn.Module:
        """A module (x, classes) -> (B, C) logits whose state_dict holds exactly what is trained, stored or sent.

        x is (B, D) features, (B, T, D) patch tokens, (B, 1 + T, D) of both or (B, 3, H, W) bytes, according to
        `reads.image`. classes is `Batch.classes`; a module may ignore it, since the engine sets the logits of inactive
        classes to -inf.

        It is called in every process under the same seed, so random initial values must come from PyTorch's global
        generator. Only parameters are trained. Persistent buffers have scopes too: shared ones are sent and averaged,
        and a forward pass in training may change them in place (`_batch_norm.py`).

        Raises:
            InputError: the hyperparameters do not fit the backbone.
        """

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of a local step: a scalar, in nats.

        It runs under vmap when clients are stacked, so its control flow must not depend on tensor values. If the method
        trains through the text tower by tokens only, that is the case on GPUs; through other sites in towers, never.
        """
        return cross_entropy(self.logits(module, batch.x, batch.classes, batch.client), batch.y)

    def logits(
        self, module: nn.Module, x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        """(B, C) logits, as they are evaluated; x, classes and client as in `Batch`."""
        return module(x, classes)

    def representation(
        self, module: nn.Module, x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        """(B, R) what the module makes of images, for rules that compare modules; x, classes and client as in `Batch`.

        The default is for methods that learn no feature of an image: their logits, with 0 for the classes that do not
        compete.
        """
        logits = self.logits(module, x, classes, client)
        return logits if classes is None else logits.masked_fill(~classes, 0.0)

    def survey(self, module: nn.Module, batch: Batch) -> Params:
        """What a client contributes to a sum over all clients that train, once, before round 1.

        It is called if a tensor has the scope `surveyed`, for methods that read image features. What it returns is sent
        and counted in its own dtype; it is summed in float64, chunk by chunk.

        Args:
            module: as it is in round 0.
            batch: all train rows of a client, without augmentation; its `classes` are None.

        Returns:
            Tensors with the same names and shapes for every client; of a batch without rows, zeros.
        """
        return {}

    def surveyed(self, module: nn.Module, total: Params) -> Params:
        """The tensors with the scope `surveyed`, computed by the server.

        Args:
            module: as it is in round 0.
            total: the sum of what `survey` returned, in float64. It may be that of few clients: a class may have no
                rows.
        """
        return {}

    def expand(self, module: nn.Module, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows on which a client trains, in place of those that it has; for methods that read image features.

        It is called in every round, if the method has `expands`. Steps, operations and simulated time are those of the
        rows that it returns; a rule that weights clients by rows counts those that the client has.

        Args:
            batch: all train rows of a client; its `classes` are None.
            rng: keyed by seed and client, so that every round draws the same.

        Returns:
            As many rows as `local_rows` says: (n, D) features and (n,) classes.
        """
        return batch.x, batch.y

    def local_rows(self, y: np.ndarray) -> int:
        """The rows on which a client trains that has rows of these classes, (n,)."""
        return len(y)

    def closed_form(self, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """Losses and gradients of M clients without autograd; None (the default): `loss` runs under autograd.

        Args:
            module: from `build`, for its structure and for all tensors that are not in `params`.
            params: tensors of its state_dict, (M, *shape), or (*shape) if all clients have the same values.
            batch: the batches of M clients; every tensor has a leading M.

        Returns:
            (M,) losses in nats, and the gradient of each trained parameter by name, (M, *shape).
        """
        return None

    def scope(self, name: str) -> Scope:
        """The scope of a tensor; a server rule may change it."""
        return "shared"

    def learned(self, names: Collection[str], round: int) -> Collection[str]:
        """Those tensors that clients train in a round; the others keep their values in it, on the server too, but for
        what `proximal` replaces.

        Args:
            names: of the tensors that have the scope shared or private.
            round: in which the clients were sent their parameters, from 1.
        """
        return names

    def is_auxiliary(self, name: str) -> bool:
        """Whether a tensor serves training only: `logits` do not depend on it, and it makes no model personal."""
        return False


def trained(module: nn.Module) -> list[str]:
    """Names of the parameters that a client trains."""
    return [name for name, tensor in module.named_parameters() if tensor.requires_grad]


def masked(module: nn.Module) -> nn.Module:
    """Registers a hook that sets the logits of inactive classes to -inf; returns the same module."""
    module.register_forward_hook(_mask_inactive, with_kwargs=True)
    return module


def _mask_inactive(module: nn.Module, args: tuple, kwargs: dict[str, Tensor | None], logits: Tensor) -> Tensor:
    if len(args) + len(kwargs) < 2:
        raise TypeError("a method's module needs the active classes: call module(batch.x, batch.classes)")
    classes = args[1] if len(args) > 1 else kwargs["classes"]
    return logits if classes is None else logits.masked_fill(~classes, -torch.inf)
