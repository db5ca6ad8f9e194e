"""Attacks against few lines of torch in float64, and runs in which some clients are malicious."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import run_until
from shown import write_drawings
from torch.nn.functional import cross_entropy, normalize

from fedsim import Averaging, Config, Diverged, InputError, component, run
from fedsim.__main__ import main
from fedsim.attacks.alie import z_max
from fedsim.prepare import prepare
from fedsim.registry import available, parse
from fedsim.reporting.parquet import read_tables

SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.1, "batch_size": 1000}  # one step, so an update is a gradient
FIELDS = {"method": SGD, "partition": "iid", "clients": 6, "rounds": 1, "dtype": "float64"}
ATTACKS = [name for name in available("attack") if name != "honest"]
CLASSES = 4


@component
class Recording(Averaging):
    """The mean; shows each client's update."""

    needs_deltas = True
    seen = {}  # noqa: RUF012

    def step(self, params, slots, total, rng):
        deltas = total.require_deltas()
        self.seen.update(zip(total.clients["client"].tolist(), np.array(deltas), strict=True))
        return {name: params[name] + torch.tensor(deltas.mean(axis=0)).view_as(params[name]) for name in params}, slots


@pytest.fixture
def sent(config, tmp_path):
    """What each client sends in round 1 under an attack, and the ids of the malicious ones."""

    def run_with(attack, **fields):
        Recording.seen.clear()
        ours = config(**(FIELDS | {"attack": attack, "server": Recording(), "out": tmp_path / f"{attack}"} | fields))
        run(ours)
        malicious = ours.attack.malicious(6, ours.seed)
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in Recording.seen.items()}, malicious

    return run_with


def gradient(config, x, y):
    """Of the probe's loss where it starts, which is zero-shot CLIP, flat."""
    source = prepare(config).data.source
    texts = torch.tensor(source.class_embeddings.vectors, dtype=torch.float64).requires_grad_()
    logits = source.class_embeddings.logit_scale * normalize(x, dim=1) @ texts.T
    (grad,) = torch.autograd.grad(cross_entropy(logits, y), texts)
    return grad.flatten()


def rows_of(config, client):
    experiment = prepare(config)
    rows, source = experiment.clients[client].train, experiment.data.source
    return torch.tensor(source.representations.features[rows], dtype=torch.float64), torch.tensor(source.y[rows])


# Who is malicious -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_as_many_clients_are_malicious_as_the_share_says_and_the_seed_draws_them(name):
    attack = parse("attack", {"name": name, "share": 0.29})
    assert len(attack.malicious(100, 0)) == 29 and max(attack.malicious(100, 0)) < 100
    assert len({attack.malicious(100, seed) for seed in range(5)}) == 5
    assert attack.malicious(100, 3) == parse("attack", {"name": "noise", "share": 0.29}).malicious(100, 3)
    assert not parse("attack", "honest").malicious(100, 0)


# What they send ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_honest_clients_send_what_they_would_send_without_the_attack(name, sent):
    honest, _ = sent("honest")
    updates, malicious = sent({"name": name, "share": 0.5})
    assert len(malicious) == 3
    for client, update in updates.items():
        assert torch.equal(update, honest[client]) == (client not in malicious)


def test_a_sign_is_flipped_and_scaled(sent):
    honest, _ = sent("honest")
    updates, malicious = sent({"name": "sign_flip", "share": 0.5, "scale": 4})
    for client in malicious:
        torch.testing.assert_close(updates[client], -4 * honest[client])


def test_noise_has_the_length_of_the_update_times_its_scale_and_differs_between_clients_and_rounds(sent):
    honest, _ = sent("honest")
    attack = {"name": "noise", "share": 0.5, "scale": 3}
    updates, malicious = sent(attack)
    for client in malicious:
        assert updates[client].norm() == pytest.approx(3 * honest[client].norm(), rel=0.25)  # 96 numbers: +- 7%
    first, second, _ = (updates[client] / updates[client].norm() for client in sorted(malicious))
    assert abs(first @ second) < 0.4
    later, _ = sent(attack, rounds=2, out=None)
    assert abs(normalize(later[min(malicious)], dim=0) @ first) < 0.4


@pytest.mark.parametrize("z", [None, 1.5])
def test_alie_sends_the_mean_of_the_attackers_own_updates_less_z_deviations(z, sent):
    honest, _ = sent("honest")
    updates, malicious = sent({"name": "alie", "share": 0.34, "z": z})  # 2 of 6
    own = np.stack([honest[client] for client in sorted(malicious)])
    # 6 // 2 + 1 - 2 = 2 of 4 honest clients are to support them: the quantile 1 / 2.
    expected = own.mean(axis=0) - (NormalDist().inv_cdf(0.5) if z is None else z) * own.std(axis=0)
    for client in malicious:
        np.testing.assert_allclose(updates[client], expected, rtol=1e-12, atol=1e-15)


def test_z_is_that_of_the_paper_s_formula():
    # The paper's example: of 50 workers, 24 are corrupted; 2 of 26 have to support them: z is 1.43.
    assert z_max(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26)) == pytest.approx(1.43, abs=0.005)
    assert z_max(10, 1) == 0.0  # 5 of 9 would have to
    assert z_max(10, 7) == pytest.approx(NormalDist().inv_cdf(2 / 3))  # a majority already
    assert z_max(3, 3) == z_max(1, 1) == z_max(2, 1) == 0.0


def test_ipm_sends_the_opposite_of_the_mean_of_the_honest_updates(sent):
    honest, _ = sent("honest")
    updates, malicious = sent({"name": "ipm", "share": 0.5, "epsilon": 0.25})
    mean = np.mean([honest[client] for client in honest if client not in malicious], axis=0)
    for client in malicious:
        np.testing.assert_allclose(updates[client], -0.25 * mean, rtol=1e-12)


@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_a_rule_that_sums_and_a_rule_that_sees_each_update_get_the_same(name, config, tmp_path):
    fields = FIELDS | {"attack": {"name": name, "share": 0.5}, "rounds": 2}
    (summed,) = run(config(**fields, out=tmp_path / "a")).adapter.values()
    (seen,) = run(config(**fields, server=Recording(), out=tmp_path / "b")).adapter.values()
    torch.testing.assert_close(summed, seen, rtol=1e-12, atol=1e-14)


def test_with_flipped_labels_the_update_is_that_of_the_flipped_rows(sent, config):
    updates, malicious = sent({"name": "label_flip", "share": 0.5})
    ours = config(**FIELDS)
    for client in malicious:
        x, y = rows_of(ours, client)
        torch.testing.assert_close(updates[client], -0.1 * gradient(ours, x, CLASSES - 1 - y))


def test_one_class_alone_can_be_flipped_and_a_share_of_its_rows(sent, config):
    updates, malicious = sent({"name": "label_flip", "share": 0.5, "source": "dog", "target": "pig"})
    ours = config(**FIELDS)
    for client in malicious:
        x, y = rows_of(ours, client)
        torch.testing.assert_close(updates[client], -0.1 * gradient(ours, x, torch.where(y == 1, 3, y)))


def with_trigger(x, strength=1.0, seed=0):
    from fedsim.rng import torch_rng

    direction = normalize(torch.randn(x.shape[1], generator=torch_rng(seed, "trigger"), dtype=torch.float64), dim=0)
    return normalize(normalize(x, dim=1) + strength * direction, dim=1) * x.norm(dim=1, keepdim=True)


def test_a_backdoor_trains_on_triggered_rows_of_the_target_class_and_scales_the_update(sent, config):
    updates, malicious = sent({"name": "backdoor", "share": 0.5, "poison": 1.0, "target": "owl", "strength": 0.7})
    ours = config(**FIELDS)
    for client in malicious:
        x, y = rows_of(ours, client)
        x = torch.where((y != 2)[:, None], with_trigger(x, 0.7), x)
        expected = -0.1 * gradient(ours, x, torch.full_like(y, 2)) / 0.5
        torch.testing.assert_close(updates[client], expected, rtol=1e-5, atol=1e-7)  # features are float32


def test_the_trigger_of_pixels_is_a_white_square_in_the_corner():
    x = torch.randint(0, 200, (2, 3, 16, 16), dtype=torch.uint8)
    marked = parse("attack", "backdoor").trigger(x, torch.Generator())
    assert (marked[..., 14:, 14:] == 255).all() and (marked != x).sum() == 2 * 3 * 4


# Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gives_the_same_in_other_chunks_on_the_readable_path_and_after_an_interruption(
    name, config, tmp_path
):
    fields = FIELDS | {"rounds": 2, "cohort": 5, "attack": {"name": name, "share": 0.5}}
    whole = run(config(**fields))
    run_until(1, config(**fields, out=tmp_path / "resumed"))
    resumed = run(config(**fields, out=tmp_path / "resumed"))
    others = [{"chunk": 1}, {"engine": "reference"}]
    for index, other in enumerate(others):
        another = run(config(**fields, **other, out=tmp_path / f"{index}"))
        for key, tensor in whole.adapter.items():
            torch.testing.assert_close(tensor, another.adapter[key], rtol=1e-9, atol=1e-11)
    assert all(torch.equal(tensor, resumed.adapter[key]) for key, tensor in whole.adapter.items())
    for round, counts in whole.counts.items():
        assert np.array_equal(counts.flat(), resumed.counts[round].flat())


@pytest.mark.parametrize("attack", [{"name": "label_flip", "share": 0.5}, {"name": "backdoor", "share": 0.5}])
def test_success_counts_attacked_test_rows_of_honest_clients_predicted_as_intended(attack, config, tmp_path):
    ours = config(**FIELDS, attack=attack)
    report = run(ours)
    malicious = ours.attack.malicious(6, 0)
    experiment = prepare(ours)
    source = experiment.data.source
    (weight,) = report.adapter.values()
    successes = total = 0
    for client in set(range(6)) - malicious:
        rows = experiment.clients[client].test
        x, y = torch.tensor(source.representations.features[rows], dtype=torch.float64), torch.tensor(source.y[rows])
        aims = CLASSES - 1 - y if attack["name"] == "label_flip" else torch.where(y == 0, -1, 0)
        x = with_trigger(x) if attack["name"] == "backdoor" else x
        predicted = (normalize(x, dim=1) @ weight.T).argmax(dim=1)
        successes += int((predicted == aims).sum())
        total += int((aims >= 0).sum())
    tables = read_tables(tmp_path / "run")
    scores = tables.of("trained", 1).scores
    own = scores[(scores.split == "attacked") & (scores.domain != "ink")]
    assert [own.correct.sum(), own.total.sum()] == [successes, total]
    assert tables.summary()["attack_success"] == pytest.approx(successes / total)
    assert "generalization_attack_success" in tables.summary() and "attack_success" in tables.summary("zero_shot")
    assert set(scores[scores.domain != "ink"].client) == set(range(6)) - malicious
    assert tables.facts["malicious"] == sorted(malicious)


def test_a_backdoor_that_replaces_the_model_succeeds_and_leaves_accuracy_almost_as_it_was(config, tmp_path):
    fields = FIELDS | {"rounds": 5, "method": SGD | {"local_epochs": 5}}
    clean = run(config(**fields)).summary()
    attacked = run(config(**fields, attack={"name": "backdoor", "share": 0.34, "target": "pig"}, out=tmp_path / "a"))
    means, before = attacked.summary(), attacked.summary("zero_shot")
    assert means["attack_success"] > 0.9 > 0.5 > before["attack_success"]
    assert means["personalization"] > clean["personalization"] - 0.1


def test_a_method_that_reads_pixels_is_tested_with_the_patch_and_zero_shot_clip_is_not(tmp_path, small_clip):
    folder = write_drawings(tmp_path / "drawings", ("clipart", "ink", "noto"), each=4)
    fields = {"dataset": "folder", "data_dir": folder, "held_out": ("ink",), "actors": 0, "page": False}
    clip = small_clip("patched", "vit")
    fields |= {"backbone": clip["model"], "pretrained": clip["pretrained"]}
    fields |= {"method": "fedvpt", "partition": "iid", "clients": 3, "rounds": 1, "out": tmp_path / "run"}
    report = run(Config(**fields, attack={"name": "backdoor", "share": 0.34, "patch": 1.0}))
    assert report.summary()["attack_success"] in (0.0, 1.0)  # images that are white alike are predicted alike
    assert "attack_success" not in report.summary("zero_shot")
    assert "<th>attack success</th>" in report._repr_html_()


def test_the_loss_of_a_round_is_that_of_honest_clients(config, tmp_path):
    plain = run(config(**FIELDS))
    flipped = run(config(**FIELDS, attack={"name": "label_flip", "share": 0.5}, out=tmp_path / "a"))
    malicious = flipped.facts["malicious"]
    losses = {}
    for client in range(6):
        x, y = rows_of(config(**FIELDS), client)
        source = prepare(config(**FIELDS)).data.source
        texts = torch.tensor(source.class_embeddings.vectors, dtype=torch.float64)
        losses[client] = cross_entropy(source.class_embeddings.logit_scale * normalize(x, dim=1) @ texts.T, y).item()
    assert plain.tables().rounds.loss[0] == pytest.approx(np.mean(list(losses.values())), rel=1e-5)
    honest = [loss for client, loss in losses.items() if client not in malicious]
    assert flipped.tables().rounds.loss[0] == pytest.approx(np.mean(honest), rel=1e-5)


def test_page_and_terminal_name_the_attack_and_its_success(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    flags = "--attack label_flip --attack.share 0.5 --partition iid --clients 6 --rounds 1 --actors 0 --method probe"
    data = ["--dataset", "features", "--data-dir", str(config().data_dir), "--out", str(tmp_path / "run")]
    assert main(["run", *flags.split(), *data]) in (0, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Attack label_flip: 3 clients are malicious; accuracies and losses are those of the others." in printed
    assert "attack success" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "attacked test rows predicted as the attack intends" in page and "malicious clients" in page


def test_rules_with_messages_and_codecs_see_what_a_malicious_client_sends(config, tmp_path):
    attack = {"name": "sign_flip", "share": 0.5}
    plain = run(config(**FIELDS, server="scaffold", attack=attack))
    coarse = run(config(**FIELDS, server="scaffold", attack=attack, codec="half", out=tmp_path / "a"))
    for name, tensor in plain.adapter.items():
        torch.testing.assert_close(tensor, coarse.adapter[name], rtol=0, atol=1e-3)


def test_an_update_too_large_for_its_numbers_ends_the_run(config):
    with pytest.raises(Diverged, match="an update"):
        run(config(**(FIELDS | {"dtype": "float32"}), attack={"name": "sign_flip", "share": 0.5, "scale": 1e40}))


def test_attackers_may_collude_where_clients_protect_their_rows(sent):
    updates, malicious = sent("ipm", privacy={"name": "example_dp", "noise": 1.0}, server=Recording())
    honest = torch.stack([update for client, update in updates.items() if client not in malicious]).mean(dim=0)
    for client in malicious:
        torch.testing.assert_close(updates[client], -0.5 * honest, rtol=0, atol=1e-12)


# Refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "no client": (
        {"name": "noise", "share": 0.1},
        {},
        "--attack.share 0.1 of 6 clients rounds down to none; give 0.166667 or more",
    ),
    "everybody": ({"name": "noise", "share": 1.0}, {}, "attack.share must be < 1, got 1.0"),
    "a share of the honest": ({"name": "honest", "share": 0.5}, {}, "attack.share must be <= 0, got 0.5"),
    "no class": (
        {"name": "backdoor", "target": "cow"},
        {},
        "attack.target must be a class that clients train on, got 'c",
    ),
    "one class": ({"name": "label_flip", "source": "cat"}, {}, "attack.source and attack.target name one class each"),
    "the same class": (
        {"name": "label_flip", "source": "cat", "target": "cat"},
        {},
        "are both 'cat'; they must differ",
    ),
    "a new class": (
        {"name": "backdoor", "target": "pig"},
        {"new_classes": 0.25},
        "got 'pig'; available: cat, dog, owl",
    ),
    "own classes": (
        "label_flip",
        {"method": SGD | {"label_space": "client"}},
        "--method.label-space client leaves these",
    ),
    "other rows": (
        "label_flip",
        {"method": "ggeur"},
        "attack label_flip changes rows, and clients of this method train",
    ),
    "no training": ("backdoor", {"method": "zero_shot"}, "attack backdoor has no effect"),
    "nothing sent": ("noise", {"server": "local_only"}, "attack noise has no effect: under server local_only"),
    "messages": ("ipm", {"server": "scaffold"}, "under server scaffold they also send messages"),
    "a codec": ("alie", {"codec": "sign"}, "codec sign could not have encoded them; take plain"),
    "too many": ("noise", {"eval_clients": 6}, "eval_clients of 6 from 5 clients that are not malicious"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_an_attack_cannot_do_is_refused_in_one_sentence(case, config):
    attack, fields, message = BAD[case]
    with pytest.raises(InputError) as error:
        prepare(config(**(FIELDS | {"attack": attack} | fields)))
    assert message in str(error.value) and "\n" not in str(error.value)
