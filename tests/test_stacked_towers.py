"""Clients whose learned tokens pass through the frozen text tower together, against each of them alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_prompts import CLASSES, a_backbone, a_batch, made
from test_stack import SIZES, agree, two_rounds
from test_stack import clients as clients  # a fixture
from torch.func import vmap
from torch.nn.functional import dropout

from fedsim import InputError, available
from fedsim.clip.checkpoints import EMBEDDED, find_weights, width_of
from fedsim.clip.insertions import Insertions
from fedsim.clip.model import Clip
from fedsim.clip.sites import stackable
from fedsim.datasets import TRAIN, Features
from fedsim.encoding import from_features
from fedsim.methods import Batch
from fedsim.methods.promptfl import PromptFL
from fedsim.registry import parse
from fedsim.training import stack
from fedsim.training.stack import gradients, stack_size

# A batching rule that torch does not have would be a warning, and a loop over the clients.
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")
THROUGH_TOKENS = [
    name
    for name in available("method")
    if parse("method", name).reads.text == "embeddings" and stackable(parse("method", name).sites)
]
MASKS = {
    "all": None,
    "the same": [[1, 1, 1, 0, 0]] * 3,
    "as many": [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]],
    "not as many": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
}


@pytest.fixture(scope="module")
def backbone():
    return a_backbone(torch.float64)[1]


@pytest.fixture
def batches(backbone):
    """The numbers of sequences in the calls of the text tower."""
    sizes = []
    block = backbone.text._module.transformer.resblocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


@pytest.mark.parametrize("classes", MASKS)
@pytest.mark.parametrize("name", THROUGH_TOKENS)
def test_gradients_of_clients_in_one_call_are_those_of_each_alone(name, classes, backbone, batches):
    method, module = made(name, backbone)
    method = replace(method, estimator="autograd")
    x, y = a_batch(backbone, name, rows=12)
    x, y = x.view(3, 4, *x.shape[1:]), y.view(3, 4)
    masks = None if MASKS[classes] is None else torch.tensor(MASKS[classes], dtype=torch.bool)
    if masks is not None:
        y = torch.stack([mask.nonzero().flatten()[own % 3] for mask, own in zip(masks, y, strict=True)])
    params = {n: torch.stack([t.detach() + 0.01 * k for k in range(3)]) for n, t in module.state_dict().items()}
    batches.clear()  # of what `build` encodes
    losses, grads = gradients(method, module, params, Batch(x, y, masks))
    assert set(batches) == ({1} if classes == "not as many" else {3})
    for k in range(3):
        module.load_state_dict({n: t[k] for n, t in params.items()})
        module.zero_grad()
        loss = method.loss(module, Batch(x[k], y[k], None if masks is None else masks[k]))
        loss.backward()
        torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-12, atol=0)
        for n, parameter in module.named_parameters():
            torch.testing.assert_close(grads[n][k], parameter.grad, rtol=1e-10, atol=1e-14)


@pytest.fixture(scope="module")
def frozen():
    return Clip(find_weights(*EMBEDDED)).frozen()


@pytest.fixture(scope="module")
def features(frozen):
    """Rows for the clients of test_stack; those with few rows do not have all classes."""
    rng = np.random.default_rng(3)
    width, count = width_of(frozen.weights), sum(SIZES)
    text = rng.standard_normal((len(CLASSES), width))
    names = {"classes": CLASSES, "domains": ("ink",), "split": np.full(count, TRAIN, np.int8)}
    x = rng.standard_normal((count, width)).astype(np.float32)
    scale = {"class_embeddings": (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)}
    y = rng.integers(0, len(CLASSES), count)
    data = from_features(Features(x=x, y=y, domain=np.zeros(count, np.int64), logit_scale=20.0, **names, **scale))
    return replace(data, class_embeddings=replace(data.class_embeddings, templates=("a photo of a {}",)))


SGD = {"optimizer": "sgd", "momentum": 0.9}
ADAM = {"optimizer": "adam", "clip_norm": 0.1, "persist_optimizer": True}
PROX = {"name": "fedprox", "mu": 0.5}


@pytest.mark.parametrize(
    ("name", "fields", "server"),
    [
        ("promptfl", SGD, "fedavg"),
        ("promptfolio", SGD, PROX),
        ("kgcoop", ADAM, "fedavg"),  # encodes the classes of each client
        ("fedpgp", ADAM, PROX),  # trains private tensors
    ],
)
def test_clients_are_trained_together_as_one_by_one(
    name, fields, server, features, clients, frozen, tmp_path, monkeypatch
):
    monkeypatch.setitem(stack.TOWER_BYTES, "cpu", 1 << 30)
    stacks, train = [], stack.train_stack
    monkeypatch.setattr(
        "fedsim.training.trainer.train_stack", lambda *args: stacks.append(len(args[3].sizes)) or train(*args)
    )
    method = parse("method", {"name": name, "batch_size": 12, "length": 2, "lr": 1e-2, "local_epochs": 1, **fields})
    task = {"method": method, "server": parse("server", server), "dtype": "float64", "frozen": frozen}
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-8, 1e-10)
    assert np.abs(single[0][1].delta).sum() > 0
    # A client has 1 of the classes, another 3, another 4; the others have all of them.
    assert sorted(stacks) == ([1] * 6 + [4] * 2 if name == "kgcoop" else [len(SIZES)] * 2)


@pytest.mark.parametrize("deep", [False, True])
def test_clients_with_texts_of_other_lengths_share_the_slots_of_a_sequence(deep, backbone, batches):
    """70 texts of each client, in two sequences, after a start of its own; in one call, also with tokens in blocks."""
    tower, texts = backbone.text, []
    for shift in (0, 3):
        texts.append([f"{'very ' * ((7 * k + shift) % 6)}{chr(97 + k // 12)}{k}" for k in range(70)])
    tokens = [tower.tokenize(each) for each in texts]
    ends = torch.stack([tower.ends(each) - 1 for each in tokens])
    rests = torch.stack([tower.embed(each)[:, 1 : int(ends.max()) + 2] for each in tokens])
    draw = torch.Generator().manual_seed(0)
    starts, inserted = (torch.randn(2, *shape, tower.width, generator=draw).double() for shape in [(3,), (2, 4)])

    def encode(start, rests, ends, tokens):
        return tower.encode_after(start, rests, ends, insertions=Insertions(tokens) if deep else None)

    with torch.no_grad():
        together = vmap(encode)(starts, rests, ends, inserted)
        assert batches == [4]
        for k in range(2):
            alone = encode(starts[k], rests[k], ends[k], inserted[k])
            torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-13)


def test_a_stack_keeps_no_more_than_was_estimated(backbone):
    """By the tensors that autograd keeps, without the frozen weights."""
    method, module = made("promptfl", backbone, length=4)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, or its memory would be used again
        return tensor

    weights = {tensor.untyped_storage().data_ptr() for tensor in backbone.text.weights.values()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.loss(module, Batch(*a_batch(backbone)))
    total = sum(size for place, (size, _) in kept.items() if place not in weights) / 2  # of float64
    assert 0.4 < total / backbone.text.step_bytes(CLASSES) < 1


def test_only_clients_that_differ_in_tokens_of_texts_are_stacked_and_only_on_a_gpu():
    params, gigabyte = {"tokens": torch.zeros(2**20)}, 1 << 30  # with gradient and moments, 16 MB
    for name in available("method"):
        method = parse("method", name)
        sizes = [stack_size(params, method, device, gigabyte // 8) for device in ("cpu", "cuda")]
        assert sizes == [1, 48 if stackable(method.sites) else 1]
        assert stackable(method.sites) or method.reads.towers
    promptfl = parse("method", "promptfl")
    assert stack_size(params, promptfl, "cuda", 7 * gigabyte) == 1
    assert stack_size(params, promptfl, "cuda", 1) == 320


class Picky(PromptFL):
    """Counts on the value of its loss, as vmap cannot."""

    def loss(self, module, batch):
        loss = super().loss(module, batch)
        return loss * 2 if loss.item() > 1 else loss


class Forgetful(PromptFL):
    """Drops out features."""

    def loss(self, module, batch):
        return super().loss(module, batch._replace(x=dropout(batch.x, 0.5)))


@pytest.mark.parametrize("kind", [Picky, Forgetful])
def test_a_method_through_tokens_that_cannot_be_stacked_says_so(kind, backbone):
    method = kind(length=2)
    module = method.build(backbone).double()
    x, y = a_batch(backbone)
    params = dict(module.state_dict())
    with pytest.raises(InputError, match=rf"{kind.__name__} cannot be stacked \(.*\); --engine reference"):
        gradients(method, module, params, Batch(x.view(2, 3, -1), y.view(2, 3)))
    gradients(method, module, params, Batch(x[None], y[None]))  # of a single client
