"""Privacy on clients: noised updates, and gradients clipped row by row, on both engines and against a loop."""

import numpy as np
import pytest
import torch
from conftest import run_until
from test_prompts import a_backbone, made

from fedsim import InputError, run
from fedsim.methods import Backbone, Batch, masked
from fedsim.params import flatten
from fedsim.privacy._accounting import Accounting
from fedsim.registry import available, parse
from fedsim.rng import torch_rng
from fedsim.training.private_steps import PrivateSteps
from fedsim.training.stack import gradients

SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.1, "batch_size": 8, "local_epochs": 2}


@pytest.fixture
def probe(config):
    """Makes the config of a probe on the small features, by cohorts of 4 of 5 clients, in float64."""
    common = {"method": SGD, "partition": "iid", "clients": 5, "cohort": 4, "rounds": 2, "dtype": "float64"}
    return lambda **fields: config(**(common | fields))


def local(**fields):
    return {"name": "local_dp"} | fields


def example(**fields):
    return {"name": "example_dp"} | fields


def assert_close(report, other, atol=1e-9):
    for name, tensor in report.adapter.items():
        torch.testing.assert_close(tensor, other.adapter[name], rtol=0, atol=atol)


# Local ------------------------------------------------------------------------------------------------------------


def test_a_client_clips_its_update_and_adds_noise_to_each_number():
    update = 3 * torch.ones(10_000, dtype=torch.float32)
    privacy = parse("privacy", local(clip=5.0, noise=0.5))
    sent = privacy.protect(update, torch.Generator().manual_seed(0))
    noise = sent - update * 5.0 / 300.0
    assert sent.dtype == torch.float32 and noise.std().item() == pytest.approx(2.5, rel=0.03)
    assert parse("privacy", local(clip=None, noise=0)).protect(update, torch.Generator()) is update
    short = torch.tensor([0.3, 0.4])
    assert torch.allclose(parse("privacy", local(clip=1.0, noise=0)).protect(short, torch.Generator()), short)


def test_without_noise_and_limit_a_local_run_is_the_run_without_privacy(probe, tmp_path):
    plain, private = run(probe(out=tmp_path / "plain")), run(probe(privacy=local(clip=None, noise=0)))
    assert all(torch.equal(tensor, private.adapter[name]) for name, tensor in plain.adapter.items())


@pytest.mark.parametrize("codec", ["plain", {"name": "qsgd", "error_feedback": True}])
def test_noised_updates_have_the_same_bits_in_other_chunks_and_after_an_interruption(codec, probe, tmp_path):
    fields = {"privacy": local(noise=0.1), "codec": codec, "rounds": 3}
    whole = run(probe(**fields))
    run_until(1, probe(**fields, out=tmp_path / "resumed"))
    resumed = run(probe(**fields, out=tmp_path / "resumed"))
    assert all(torch.equal(tensor, resumed.adapter[name]) for name, tensor in whole.adapter.items())
    assert_close(whole, run(probe(**fields, out=tmp_path / "single", chunk=1)))


def test_noise_comes_before_the_codec(probe, tmp_path, monkeypatch):
    """What is encoded is private already, whatever the codec does with it."""
    seen = []
    codec = type(parse("codec", "half"))
    encode = codec.encode
    monkeypatch.setattr(
        codec, "encode", lambda self, update, rng: seen.append(update.std()) or encode(self, update, rng)
    )
    run(probe(privacy=local(clip=0.5, noise=20.0), codec="half", rounds=1))
    assert max(seen).item() == pytest.approx(10.0, rel=0.3)


def test_local_epsilon_is_of_replaced_rows_and_of_the_client_with_the_most_rounds(probe):
    spent = run(probe(privacy=local(noise=5.0), rounds=3)).tables().rounds.epsilon
    assert spent.tolist() == pytest.approx([Accounting("", 2.0).epsilon(5.0, 1e-5, count) for count in (1, 2, 3)])


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"name": "fedavg", "weighting": "rows"}, "server fedavg weights clients by their rows or deltas"),
        ("scaffold", "server scaffold sums messages of clients, to which no noise is added"),
        ("q_fedavg", "server q_fedavg needs the losses of clients"),
        ("fednova", "server fednova weights clients by their rows or deltas"),
    ],
)
def test_what_clients_would_send_without_noise_is_refused(server, words, probe):
    with pytest.raises(InputError, match=words):
        run(probe(server=server, privacy=local(noise=1.0)))
    if server == "scaffold":  # its variates follow from noised gradients
        run(probe(server=server, privacy=example(noise=1.0), rounds=1))


@pytest.mark.parametrize("server", ["median", "fedadam", "ditto"])
def test_robust_and_personal_rules_get_noised_updates(server, probe):
    report = run(probe(server=server, privacy=local(noise=0.1), rounds=1))
    assert report.rounds


def test_a_server_that_trains_on_copies_of_clients_rows_is_refused(probe):
    server = {"name": "fltrust", "root_rows": 10}
    for privacy in (local(noise=1.0), example(noise=1.0)):
        with pytest.raises(
            InputError, match=f"fltrust trains on copies of clients' rows, which privacy {privacy['name']}"
        ):
            run(probe(server=server, privacy=privacy))


@pytest.mark.parametrize("privacy", [local(clip=0.1, noise=0.5), example(noise=0.5)])
def test_updates_that_clients_protect_are_summed_securely(privacy, probe, tmp_path):
    plain = run(probe(privacy=privacy, out=tmp_path / "plain"))
    codec = {"name": "secure_aggregation", "bits": 53, "fraction": 40}
    assert_close(run(probe(privacy=privacy, codec=codec)), plain)


def test_a_client_that_forges_its_update_does_not_clip_it(probe, tmp_path):
    attack = {"name": "sign_flip", "share": 0.5, "scale": 100.0}
    one = {"clients": 2, "cohort": None, "rounds": 1, "attack": attack}
    private, plain = (
        flatten(run(probe(**one, privacy=privacy, out=tmp_path / privacy["name"])).adapter)
        for privacy in (local(clip=1e-3, noise=0), {"name": "none"})
    )
    start = flatten(run(probe(**one | {"rounds": 0}, out=tmp_path / "start")).adapter)
    assert np.linalg.norm(private - start) == pytest.approx(np.linalg.norm(plain - start), rel=0.05)


# Rows -------------------------------------------------------------------------------------------------------------


def a_stack(method, rows=5, clients=3, width=6, classes=4):
    """A module, the parameters of some clients, and a batch of each."""
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(classes, width, dtype=torch.float64), dim=1)
    module = masked(method.build(Backbone(embeddings, 5.0, tuple("abcd")))).double()
    params = {n: t.detach() + 0.1 * torch.randn(clients, *t.shape).double() for n, t in module.named_parameters()}
    x, y = torch.randn(clients, rows, width).double(), torch.randint(classes, (clients, rows))
    return module, params, Batch(x, y)


def rngs(clients):
    return [torch_rng(0, "privacy", 1, client) for client in range(clients)]


@pytest.mark.parametrize("name", ["probe", "fedclip", "clip_adapter"])
def test_gradients_are_those_of_a_loop_over_clients_and_rows(name):
    fields = {"objective": "cross_entropy"} if name == "fedclip" else {}
    method = parse("method", {"name": name} | fields)
    module, params, batch = a_stack(method)
    clip, noise = 0.5, 2.0
    losses, grads = PrivateSteps(clip, noise, rngs(3)).gradients(method, module, params, batch)
    shortened = 0
    for k in range(3):
        own = {name: tensor[k].clone().requires_grad_() for name, tensor in params.items()}
        total, values = 0.0, []
        for x, y in zip(batch.x[k], batch.y[k], strict=True):
            logits = torch.func.functional_call(module, own, (x[None], None))
            value = torch.nn.functional.cross_entropy(logits, y[None])
            row = torch.cat([g.flatten() for g in torch.autograd.grad(value, [own[n] for n in sorted(own)])])
            total, values = total + row / max(1.0, row.norm().item() / clip), [*values, value.item()]
            shortened += row.norm() > clip
        normal = torch.randn(len(total), generator=rngs(3)[k], dtype=torch.float64)
        expected = (total + noise * clip * normal) / 5
        np.testing.assert_allclose(flatten({n: g[k] for n, g in grads.items()}), expected.numpy(), atol=1e-12)
        assert losses[k].item() == pytest.approx(np.mean(values))
    assert shortened


def test_without_limit_and_noise_the_gradients_of_rows_have_the_batchs_mean():
    method = parse("method", "probe")
    module, params, batch = a_stack(method)
    losses, grads = PrivateSteps(None, 0.0, rngs(3)).gradients(method, module, params, batch)
    expected_losses, expected = gradients(method, module, params, batch)
    torch.testing.assert_close(losses, expected_losses)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12)


def test_a_row_cannot_change_the_sum_of_gradients_by_more_than_twice_the_clip_norm():
    method = parse("method", "probe")
    module, params, batch = a_stack(method)
    steps = PrivateSteps(0.1, 0.0, rngs(3))
    x = batch.x.clone()
    x[:, 0] *= -1000
    before, after = (steps.gradients(method, module, params, batch._replace(x=each))[1] for each in (batch.x, x))
    for k in range(3):
        change = flatten({name: 5 * (after[name][k] - before[name][k]) for name in before})
        assert np.linalg.norm(change) <= 0.2 * (1 + 1e-12)


@pytest.mark.parametrize("fields", [{"server": "scaffold"}, {"server": "ditto", "method": SGD | {"optimizer": "adam"}}])
def test_both_engines_and_other_chunks_train_the_same(fields, probe, tmp_path):
    fields = {"privacy": example(clip=0.1, noise=1.0)} | fields
    whole = run(probe(**fields))
    for others in ({"engine": "reference"}, {"chunk": 1}):
        assert_close(whole, run(probe(**fields, **others, out=tmp_path / str(others))))
    run_until(1, probe(**fields, out=tmp_path / "resumed"))
    resumed = run(probe(**fields, out=tmp_path / "resumed"))
    assert all(torch.equal(tensor, resumed.adapter[name]) for name, tensor in whole.adapter.items())


@pytest.fixture(scope="module")
def backbone():
    return a_backbone(torch.float64)[1]


@pytest.mark.parametrize("fields", [{"name": "promptfl"}, {"name": "lora", "objective": "cross_entropy"}])
def test_rows_pass_a_text_tower_alone_or_with_one_encoding_of_their_texts(fields, backbone):
    method, module = made(**fields, backbone=backbone)
    params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    x, y = torch.randn(4, backbone.width, dtype=torch.float64), torch.arange(4)
    losses, grads = PrivateSteps(0.01, 1.0, rngs(1)).gradients(
        method, module, {n: t.detach()[None] for n, t in params.items()}, Batch(x[None], y[None])
    )
    loss, expected = PrivateSteps(0.01, 1.0, rngs(1)).alone(method, module, params, Batch(x, y))
    torch.testing.assert_close(losses[0], loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad[0], expected[name], rtol=0, atol=1e-12)


def test_a_local_epoch_is_one_release_of_each_row(probe):
    spent = run(probe(privacy=example(noise=3.0))).tables().rounds.epsilon
    assert spent.tolist() == pytest.approx([Accounting("").epsilon(3.0, 1e-5, 2 * count) for count in (1, 2)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "fedclip"}, "method fedclip contrasts the rows of a batch"),
        ({"method": "fedtpg"}, "fedtpg"),
        ({"method": SGD | {"label_space": "client"}}, "only the classes of a client's rows compete"),
        ({"method": "ggeur"}, "ggeur"),
        ({"server": "q_fedavg"}, "does not cover the losses of clients, which server q_fedavg needs"),
    ],
)
def test_what_depends_on_other_rows_is_refused_in_one_sentence(fields, words, probe):
    with pytest.raises(InputError, match=words) as raised:
        run(probe(**({"privacy": example(noise=1.0)} | fields)))
    assert "\n" not in str(raised.value)


def test_of_methods_that_can_contrast_rows_the_cross_entropy_is_not_refused(probe):
    run(probe(method={"name": "fedclip", "objective": "cross_entropy"}, privacy=example(noise=1.0), rounds=1))
    privacy, server, params = parse("privacy", example(noise=1.0)), parse("server", "ditto"), {"w": torch.ones(1)}
    for name in ("fedclip", "lora", "finetune", "feddlp"):
        method = server.adapt(parse("method", {"name": name, "objective": "cross_entropy"}))
        privacy.check(method, server, params)
        with pytest.raises(InputError, match="contrasts the rows of a batch"):
            privacy.check(server.adapt(parse("method", name)), server, params)


@pytest.mark.parametrize("name", available("method"))
def test_every_method_on_features_is_refused_or_has_gradients_of_rows(name, probe):
    method = parse("method", name)
    if method.reads.towers or method.reads.image != "features":
        return
    fields = {"objective": "cross_entropy"} if hasattr(method, "objective") else {}
    try:
        run(probe(method={"name": name, "local_epochs": 1} | fields, rounds=1, privacy=example(noise=1.0)))
    except InputError as error:
        assert "\n" not in str(error)
