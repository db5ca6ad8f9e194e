"""Prompts of other clients as frozen experts: the gate, who is sent which prompts, and what travels."""

import numpy as np
import pytest
import torch
from conftest import run_until
from PIL import Image
from test_bits import result
from test_prompts import CLASSES, a_backbone, a_batch, cosines

from fedsim import Config, InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.methods import Batch, trained
from fedsim.registry import parse
from fedsim.training.client_store import PrivateStore
from fedsim.training.stack import gradients
from fedsim.training.task import Task

METHOD = {"name": "promptfl", "length": 2, "local_epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def backbone():
    return a_backbone(torch.float64)[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of two colours: 2 domains x 2 classes x 8."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for domain in ("fine", "coarse"):
        for label, colour in ("red", 0), ("blue", 2):
            (folder / domain / label).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 90, (48, 48, 3), np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(folder / domain / label / f"{number}.png")
    return folder


@pytest.fixture
def small(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.simulate.write_page", lambda tables, file: file.touch())
    quick = {"dataset": "folder", "data_dir": pictures, "partition": "iid", "rounds": 2, "actors": 0, "method": METHOD}
    quick["page"] = False
    return lambda name, **fields: Config(**(quick | {"server": "pfedmoap"} | fields), out=tmp_path / name)


def built(backbone, experts=(), **fields):
    """The module in float64 with these experts; and the method."""
    torch.manual_seed(0)
    rule = parse("server", {"name": "pfedmoap", "experts": 3, "heads": 2, "width": 128, **fields})
    task = Task(rule.adapt(parse("method", METHOD)), rule, seed=1)
    module = task.build(backbone).double()
    for row, tokens in enumerate(experts):
        module.experts[row] = tokens
    return module, task


def some_prompts(count, like):
    draw = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(like.shape, generator=draw, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("active", [None, [0, 2, 3]])
def test_logits_are_those_of_the_gate_written_out_in_full(active, backbone):
    module, _ = built(backbone, lam=0.3, scaling=5.0)
    module.experts[1:] = torch.stack(some_prompts(2, module.tokens))  # the first is not there
    x, _ = a_batch(backbone)
    classes = None if active is None else torch.tensor([c in active for c in range(len(CLASSES))])
    with torch.no_grad():
        prompts = [module.tokens, module.experts[1], module.experts[2]]
        texts = [module.texts(tokens, classes) for tokens in prompts]
        image = (x / x.norm(dim=1, keepdim=True))[:, ::2]  # 128 of 256 numbers
        expected = 0.3 * cosines(x, texts[0], module.scale)
        for b, c in np.ndindex(*expected.shape):
            entries = torch.stack([text[c, ::2] for text in texts])
            query, keys, values = module.query(image[b]), module.key(entries), module.value(entries)
            mean = []
            for head in (slice(0, 64), slice(64, 128)):
                weights = (5.0 * keys[:, head] @ query[head]).softmax(dim=0)
                mean.append(weights @ values[:, head])
            expected[b, c] += module.scale * image[b] @ module.out(torch.cat(mean))
        for _ in range(2):  # the second time with the texts of the first
            found = module(x, classes)
            torch.testing.assert_close(found[:, classes if active else slice(None)], expected, rtol=1e-10, atol=1e-10)
        module.experts[1] = prompts[2]
        assert not torch.allclose(module(x, classes), found)


def test_a_client_without_experts_has_the_logits_and_gradients_of_promptfl(backbone):
    module, task = built(backbone)
    torch.manual_seed(0)
    plain = Task(parse("method", METHOD), parse("server", "fedavg"), seed=1).build(backbone).double()
    x, y = a_batch(backbone)
    assert torch.equal(module(x, None), plain(x, None)) and torch.equal(module.tokens, plain.tokens)
    params = {name: dict(module.named_parameters())[name][None] for name in trained(module)}
    loss, grads = gradients(task.method, module, params, Batch(x[None], y[None]))
    same, alone = gradients(parse("method", METHOD), plain, {"tokens": plain.tokens[None]}, Batch(x[None], y[None]))
    assert torch.equal(loss, same) and torch.equal(grads["tokens"], alone["tokens"])
    assert all(not grad.any() for name, grad in grads.items() if name != "tokens")


def test_a_client_is_sent_the_prompts_nearest_to_its_own_and_none_before_it_has_one():
    rule = parse("server", {"name": "pfedmoap", "experts": 2})
    params = {"experts": torch.zeros(2, 1, 2), "tokens": torch.zeros(1, 2)}
    bank = {k: np.array(prompt, np.float32) for k, prompt in {1: (0, 0), 4: (0, 3), 6: (2, 0), 9: (0, -2)}.items()}

    def sent(client, bank):
        experts = rule.unicast(client, bank, params)
        assert experts.keys() == {"experts"}
        return experts["experts"].tolist()

    assert sent(1, bank) == [[[2, 0]], [[0, -2]]]  # both at distance 2: the lower id first
    assert sent(4, bank) == [[[0, 0]], [[2, 0]]]
    assert sent(3, bank) == [[[0, 0]], [[0, 0]]]
    assert sent(6, {6: bank[6], 9: bank[9]}) == [[[0, -2]], [[0, 0]]]
    assert not params["experts"].any()


def test_one_client_alone_trains_as_with_promptfl_and_others_do_not(small):
    def prompt(name, server, clients):
        server = {"name": server, "weighting": "rows"}
        ours = small(f"{name}-{clients}", server=server, clients=clients)
        run(ours)
        return load_checkpoint(ours.folder(), ours.experiment())[0].params["tokens"]

    assert torch.equal(prompt("mixed", "pfedmoap", 1), prompt("plain", "fedavg", 1))
    assert not torch.equal(prompt("mixed", "pfedmoap", 3), prompt("plain", "fedavg", 3))


def test_a_client_stores_its_prompt_its_gate_and_its_experts_and_prompts_are_what_travels(small):
    one, ours = (small(f"{count} rounds", clients=3, rounds=count, dtype="float64") for count in (1, 2))
    bank = (run(one), load_checkpoint(one.folder(), one.experiment())[0].bank)[1]
    report = run(ours)
    width, size = 128, 2 * 128
    rounds = report.tables().rounds
    assert rounds.bytes_down.tolist() == [3 * 8 * 10 * size] * 2 and rounds.bytes_up.tolist() == [3 * 8 * size] * 2
    store, state = PrivateStore(ours.folder() / "private"), load_checkpoint(ours.folder(), ours.experiment())[0]
    for client in range(3):
        stored = store.read(client, 2)
        gate = {f"{layer}.{part}" for layer in ("query", "key", "value", "out") for part in ("weight", "bias")}
        assert stored.keys() == {"tokens", "experts", *gate}
        assert sum(stored[name].numel() for name in gate) == 4 * (width**2 + width) == 66_048
        others = {tuple(row) for k, row in enumerate(bank.tolist()) if k != client}
        assert {tuple(row) for row in stored["experts"].flatten(1).tolist()} == others | {(0.0,) * size}
        np.testing.assert_allclose(state.bank[client], stored["tokens"].flatten(), rtol=1e-12, atol=1e-15)


def test_clients_of_a_chunk_train_as_one_by_one_and_after_a_resume(small):
    fields = {"clients": 3, "cohort": 2, "rounds": 3, "server": {"name": "pfedmoap", "experts": 2}, "tune_epochs": 1}
    whole, ours, single = (
        small(name, **fields, engine="reference" if name == "single" else "stacked")
        for name in ("whole", "resumed", "single")
    )
    expected = run(whole)
    run_until(2, ours)
    run(ours)
    assert result(ours.folder()) == result(whole.folder())
    torch.testing.assert_close(run(single).adapter["tokens"], expected.adapter["tokens"], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(small):
    with pytest.raises(InputError, match="server pfedmoap needs the prompt of method promptfl, not probe"):
        run(small("probe", method="probe"))
    with pytest.raises(
        InputError, match=r"--server.width must be a divisor of the 256 numbers .*--server.heads 8; got 96"
    ):
        run(small("width", clients=3, server={"name": "pfedmoap", "width": 96}))
