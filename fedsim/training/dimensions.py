"""Which tensors of a stack have a dimension of clients, for calls under `torch.vmap`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedsim.errors import InputError
from fedsim.methods import Batch, ClientContext, RuleContext
from fedsim.params import Params


def dims_of(module: nn.Module, params: Params) -> dict[str, int | None]:
    """The dimension of the clients of each tensor: 0, or None if all clients have the same."""
    shapes = {name: tensor.dim() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return {name: 0 if tensor.dim() > shapes[name] else None for name, tensor in params.items()}


def dims_of_batch(module: nn.Module, batch: Batch) -> Batch:
    """The same of a batch."""
    clients = batch.client and ClientContext._make(0 if isinstance(each, Tensor) else None for each in batch.client)
    masks, target, group = (None if each is None else 0 for each in (batch.classes, batch.target, batch.group))
    rule = None
    if batch.rule:
        memory, sent = dict.fromkeys(batch.rule.client_state, 0), dict.fromkeys(batch.rule.sent)
        rule = RuleContext._make((dims_of(module, batch.rule.received), memory, sent))
    return Batch._make((0, 0, masks, clients, target, rule, group))


def of_client(params: Params, k: int, dims: dict[str, int | None]) -> Params:
    return {name: tensor if dims[name] is None else tensor[k] for name, tensor in params.items()}


def batch_of_client(batch: Batch, k: int, dims: tuple | None) -> Batch:
    own = batch.classes, batch.target, batch.group
    classes, target, group = (None if tensor is None else tensor[k] for tensor in own)
    rule = batch.rule
    if rule and dims:
        rule = RuleContext._make(of_client(tensors, k, dim) for tensors, dim in zip(rule, dims, strict=True))
    return Batch(batch.x[k], batch.y[k], classes, batch.client and batch.client.part(k), target, rule, group)


@contextmanager
def one_sentence(component: object) -> Iterator[None]:
    """Turns the long errors of torch.func into one sentence that says what cannot be stacked, and why."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(word in str(error) for word in ("vmap", "functorch", "captured Tensor", "to return a Tensor")):
            raise
        reason = str(error).strip().splitlines()[0]
        name = getattr(component, "__qualname__", type(component).__name__)
        raise InputError(f"{name} cannot be stacked ({reason}); --engine reference trains client by client") from None
