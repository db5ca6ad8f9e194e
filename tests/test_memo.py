"""Class texts that an evaluation needs several times are encoded once, and never those of other parameters."""

from math import inf

import numpy as np
import pytest
import torch
from test_finetune import CLASSES, other, whole
from test_prompts import made
from test_stacked_towers import features as features  # fixtures
from test_stacked_towers import frozen as frozen
from torch.func import vmap

from fedsim import available
from fedsim.clients import Population
from fedsim.clip import memo
from fedsim.clip.memo import Memo
from fedsim.methods import _tuned_towers
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.training import predict
from fedsim.training.evaluator import EvaluationRows
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, backbone_of
from fedsim.training.trainer import Chunk
from fedsim.training.worker import ClientWorker

THROUGH_TEXTS = [name for name in available("method") if parse("method", name).reads.text != "features"]
SPACES = torch.tensor([True] * len(CLASSES)), torch.tensor([True, True, False, True])


@pytest.fixture
def tiny(tmp_path_factory):
    backbone, pixels, _ = whole(*other("vit", tmp_path_factory.getbasetemp()))
    return backbone, pixels


@pytest.fixture
def passes(tiny):
    """The number of sequences in each call of the text tower."""
    with count(tiny[0].text._module.transformer) as calls:
        yield calls


class count:
    def __init__(self, transformer):
        self.block, self.calls = transformer.resblocks[0], []

    def __enter__(self):
        self.handle = self.block.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()


def images(method, pixels, width):
    if method.reads.image == "pixels":
        return pixels
    shape = (4, 9, width) if "tokens" in method.reads.image else (4, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def moved(module, step):
    for parameter in module.parameters():
        parameter.add_(step * torch.arange(parameter.numel()).view(parameter.shape).sin())


def predictions(method, module, x):
    """Of four clients, in two chunks, with two rows in a forward pass."""
    entries = [((k, "test", rows), SPACES, None) for k, rows in enumerate(np.arange(4)[None].repeat(4, 0))]

    def model(*args):
        return method.logits(module, *args)

    chunks = [
        predict.predict(model, x.__getitem__, method.reads.image, method.joint_classes, part, "cpu")
        for part in (entries[:2], entries[2:])
    ]
    return [[array.tolist() for array in entry] for chunk in chunks for entry in chunk]


@pytest.mark.parametrize("name", THROUGH_TEXTS)
def test_an_evaluation_encodes_the_texts_of_each_label_space_once(name, tiny, passes, monkeypatch):
    monkeypatch.setattr(predict, "BLOCK", dict.fromkeys(predict.BLOCK, 2))
    monkeypatch.setattr(_tuned_towers, "MAX_COMPARED", inf)  # for `finetune`
    method, module = made(name, tiny[0])
    module.eval()
    x = images(method, tiny[1], tiny[0].width)
    passes.clear()  # of what `build` encodes
    method.logits(module, x[:2])
    once = passes.copy()
    method.logits(module, x)
    if not once or passes != 2 * once:
        pytest.skip("texts are constant, or each image has its own")
    found = []
    for _ in range(2):
        moved(module, 0.1)
        passes.clear()
        found.append(predictions(method, module, x))
        assert len(passes) == len(once) * (2 if method.joint_classes else 1)
    passes.clear()
    assert predictions(method, module, x) == found[1]
    assert not passes
    # As without a memory, to the bit.
    monkeypatch.setattr(Memo, "__call__", lambda _, compute, *tensors: compute())
    assert predictions(method, module, x) == found[1] != found[0]
    assert len(passes) > 2 * len(once)


@pytest.mark.parametrize("name", ["promptfl", "lora"])
def test_no_chunk_gets_the_texts_of_another_round_or_task(name, features, frozen):
    """Nor of what was trained in between; and each result is that of a worker that has seen nothing else."""
    method, server = (parse(kind, each) for kind, each in (("method", name), ("server", "fedavg")))
    tasks = [Task(method, server, seed=seed, reference=True) for seed in (0, 1)]
    params = flatten(initial_params(tasks[0], backbone_of(features, reads=method.reads, clip=frozen.open("cpu"))))
    clients = Population([(part, part, part) for part in np.split(np.arange(40), 4)], [])
    chunks = [[(0, 0), (1, 0)], [(2, 0), (3, 0)]]
    wave = np.sin(np.arange(len(params), dtype=np.float32))
    sent = params, params + np.float32(0.05) * wave

    def evaluate(worker, task, round):
        evaluated = task, round, sent[round], (), EvaluationRows(("val", "test"))
        return [worker.evaluate(*evaluated, chunk).flat().tolist() for chunk in chunks]

    alone = [evaluate(ClientWorker(features, clients, frozen), tasks[0], round) for round in (0, 1)]
    assert alone[0] != alone[1]
    worker, encoded = ClientWorker(features, clients, frozen), []
    with count(worker.models.clip("float32").model.transformer) as passes:
        for task in tasks:
            for round in (0, 1, 0):
                passes.clear()
                assert evaluate(worker, task, round) == alone[round]
                encoded.append(len(passes))
                worker.train(task, 1, {0: sent[1]}, np.empty(0, np.float32), Chunk(0, [(0, 0)]))
    assert encoded == [1, 1, 0] * 2  # the texts of round 0 are still there


def test_what_a_caller_does_to_a_result_stays_with_the_caller():
    memo, one = Memo(), torch.ones(2)
    with torch.no_grad():
        memo(lambda: one + 1, one).zero_()
        assert memo(lambda: one + 1, one).tolist() == [2.0, 2.0]


def test_the_same_values_in_another_shape_are_others():
    memo, one = Memo(), torch.ones(2, 3)
    with torch.no_grad():
        assert [memo(lambda each=each: each + 1, each).shape for each in (one, one.T)] == [(2, 3), (3, 2)]


def test_a_step_with_gradients_or_of_a_stack_computes_what_it_needs():
    memo, one = Memo(), torch.ones(2, requires_grad=True)
    for _ in range(2):
        assert torch.autograd.grad(memo(lambda: 3 * one, one).sum(), one)[0].tolist() == [3.0, 3.0]
    with torch.no_grad():
        assert vmap(lambda row: memo(lambda: 3 * row, row))(torch.eye(2)).tolist() == [[3.0, 0.0], [0.0, 3.0]]
    assert not memo.results


def test_it_forgets_what_was_not_used_for_longest(monkeypatch):
    monkeypatch.setattr(memo, "RESULTS", 2)
    results, computed = Memo(), []

    @torch.no_grad()
    def double(value):
        tensor = torch.tensor([value])
        return results(lambda: computed.append(value) or 2 * tensor, tensor).item()

    assert [double(value) for value in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0)] == [2.0, 4.0, 2.0, 6.0, 2.0, 4.0]
    assert computed == [1.0, 2.0, 3.0, 2.0]
