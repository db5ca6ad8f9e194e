"""What a worker holds on its device: the data, the frozen CLIP, and the modules of the tasks that it works on."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clip.model import Clip, Frozen
from fedsim.methods import Backbone
from fedsim.params import Params, moved
from fedsim.representations import Encoded
from fedsim.training.client_store import PrivateState
from fedsim.training.contexts import ClientContexts
from fedsim.training.inputs import Inputs
from fedsim.training.task import Task, backbone_of

RESIDENT_BYTES = 1 << 30  # the features that a worker holds on its GPU take at most this


class Models:
    """The modules of tasks, what they read of rows of the data and of clients, and what clients stored for them."""

    def __init__(self, data: Encoded, frozen: Frozen | None = None, device: str = "cpu") -> None:
        """
        Args:
            frozen: CLIP, for methods that train through its towers.
            device: cpu or cuda.
        """
        self.data, self.frozen, self.device = data, frozen, device
        self.contexts = ClientContexts(data, device)
        self.clip = lru_cache(maxsize=1)(self._clip)
        self.module = lru_cache(maxsize=4)(self._module)
        self.tower_bytes = lru_cache(maxsize=4)(self._tower_bytes)
        self.resident = lru_cache(maxsize=1)(self._resident)

    def inputs(
        self, task: Task, rows: np.ndarray, views: np.ndarray | None = None, attacked: np.ndarray | None = None
    ) -> Inputs:
        """What the method reads of some rows, (n,), and perhaps their augmented views, (n,).

        Args:
            attacked: (n,) bool, the rows that are shown with the trigger of the attack.
        """
        name, dtype = task.method.reads.image, getattr(torch, task.dtype)
        held = self.resident() if name == "features" and views is None else None
        trigger = task.trigger if task.attack.triggers else None
        return Inputs(self.data.representations, name, rows, views, self.device, dtype, held, attacked, trigger)

    def groups(self, task: Task, rows: np.ndarray) -> Tensor | None:
        """(n,) the groups of some rows; None if the method does not read them."""
        if not task.method.reads_group:
            return None
        assert self.data.group is not None, "refused before a run starts"
        return torch.from_numpy(self.data.group[rows]).to(self.device)

    def private(self, task: Task, client: int, written: int) -> PrivateState:
        """What a client stored in the round `written`; nothing if that is 0."""
        if not written:
            return PrivateState()
        assert task.private is not None
        return PrivateState.from_tensors(moved(task.private.read(client, written), self.device))

    def _module(self, task: Task) -> tuple[nn.Module, Params]:
        """The module of a task on the device, and its tensors on the CPU, for names and shapes: values change."""
        module = task.build(self.backbone(task)).to(self.device, getattr(torch, task.dtype))
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.contiguous()  # the fused optimizers walk raw memory
        like = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        return module, like

    def parameters(self, task: Task) -> list[str]:
        """Names of the parameters that clients train, in some round at least."""
        names = [name for name, _ in self.module(task)[0].named_parameters()]
        return [name for name in names if task.scope(name) in ("shared", "private")]

    def learning(self, task: Task, round: int) -> nn.Module:
        """The module of a task; of its parameters, those that clients train in a round require gradients."""
        module, names = self.module(task)[0], self.parameters(task)
        learned = task.method.learned(names, round)
        for name in names:
            module.get_parameter(name).requires_grad_(name in learned)
        return module

    def backbone(self, task: Task) -> Backbone:
        """What the method sees of the frozen CLIP."""
        reads = task.method.reads
        clip = self.clip(task.dtype) if reads.towers else None
        return backbone_of(self.data, self.device, task.dtype, reads, clip)

    def _tower_bytes(self, task: Task) -> int:
        """An estimate of what the text tower keeps for the backward pass of a client's step; 0 without it."""
        backbone = self.backbone(task)
        return backbone.text_tower.step_bytes(backbone.classes) if backbone.text_tower else 0

    def _clip(self, dtype: str) -> Clip:
        assert self.frozen is not None
        clip = self.frozen.open(self.device)
        clip.model.to(getattr(torch, dtype))
        return clip

    def _resident(self) -> Tensor | None:
        """All features on a GPU if they fit, so that rows are not copied there in every round."""
        x = self.data.representations.features
        if self.device == "cpu" or self.data.rows_per_client or x.nbytes > RESIDENT_BYTES:
            return None
        return torch.tensor(x, device=self.device)
