"""Differential privacy against few lines of numpy, published values of epsilon, and runs that must coincide."""

from itertools import islice
from math import exp, inf, log, sqrt
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import run_until
from scipy.stats import norm

from fedsim import Averaging, Diverged, InputError, component, run
from fedsim.privacy._accounting import ORDERS, Accounting, _divergences
from fedsim.registry import available, parse
from fedsim.schedule import schedule
from fedsim.training.transmit import clipping
from fedsim.updates import CLIENT_STATS, RoundSum


@pytest.fixture
def probe(config):
    """Makes the config of a probe on the small features, by cohorts of 4 of 6 clients."""

    def make(**fields):
        quick = {"method": "probe", "partition": "iid", "clients": 6, "cohort": 4}
        return config(**(quick | fields))

    return make


SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.1}


def central(**fields):
    return {"name": "central_dp"} | fields


def same_bits(report, other) -> bool:
    return all(torch.equal(tensor, other.adapter[name]) for name, tensor in report.adapter.items())


# Epsilon ------------------------------------------------------------------------------------------------------


def test_epsilon_of_one_gaussian_release_is_where_its_exact_delta_is_reached():
    """Balle and Wang 2018, Theorem 8, with k releases as one with noise / sqrt(k)."""
    for noise, releases, sensitivity in ((2.0, 1, 1.0), (5.0, 10, 1.0), (5.0, 10, 2.0)):
        epsilon = Accounting("", sensitivity).epsilon(noise, 1e-5, releases)
        ratio = sensitivity * sqrt(releases) / noise
        delta = norm.cdf(ratio / 2 - epsilon / ratio) - exp(epsilon) * norm.cdf(-ratio / 2 - epsilon / ratio)
        assert delta == pytest.approx(1e-5, rel=1e-6)


def test_epsilon_of_60_epochs_on_mnist_is_the_published_one():
    """Batches of 256 of 60,000 rows, noise 1.1: about 3.0 by the first conversion of Renyi divergences, which is less
    tight than today's (Mironov 2017, arXiv 1702.07476, Proposition 3)."""
    ours, steps = Accounting("", 1.0, "poisson", 256, 60_000), 60 * 60_000 // 256
    divergences = np.array(_divergences("poisson", 256, 60_000, 1.1))
    first = min(steps * value + log(1e5) / (order - 1) for order, value in zip(ORDERS, divergences, strict=True))
    assert first == pytest.approx(3.0, abs=0.05)
    assert 2.5 < ours.epsilon(1.1, 1e-5, steps) < first


def test_privacy_loss_distributions_give_the_epsilon_of_the_two_densities_and_less_than_divergences():
    q, noise, delta = 0.1, 1.5, 1e-4
    accountings = [Accounting("", 1.0, "poisson", 10, 100, tight=tight) for tight in (True, False)]
    x = np.linspace(-30, 30, 400_001)
    without = norm.pdf(x, scale=noise)
    with_client = (1 - q) * without + q * norm.pdf(x, 1, noise)
    limit = exp(accountings[0].epsilon(noise, delta, 1))
    pairs = (with_client, without), (without, with_client)
    reference = max(np.maximum(p - limit * q, 0).sum() * (x[1] - x[0]) for p, q in pairs)
    assert reference == pytest.approx(delta, rel=1e-2)
    tight, loose = (accounting.epsilon(noise, delta, 20) for accounting in accountings)
    assert log(limit) < tight < loose


def test_the_divergence_of_order_2_of_a_poisson_sampled_gaussian_has_a_closed_form():
    q, noise = 0.1, 1.5
    value = _divergences("poisson", 10, 100, noise)[ORDERS.index(2)]
    assert value == pytest.approx(log(1 + q**2 * (exp(1 / noise**2) - 1)), rel=1e-9)


def test_a_cohort_without_replacement_hides_replaced_rows_whose_update_may_point_the_other_way():
    """Theorem 27 of Wang et al. 2018 at order 2, for the sensitivity 2 of a difference of clipped deltas."""
    q, noise = 0.1, 3.0
    value = _divergences("fixed", 10, 100, noise / 2)[ORDERS.index(2)]
    growth = exp(4 / noise**2)
    assert value == pytest.approx(log(1 + q**2 * min(4 * (growth - 1), 2 * growth)), rel=1e-9)
    fixed = parse("privacy", central(noise=noise)).accounting(None, 10, 100, True)
    poisson = parse("privacy", central(noise=noise, sampling="poisson")).accounting(None, 10, 100, True)
    assert (fixed.sensitivity, fixed.sampling) == (2.0, "fixed") and (poisson.sensitivity, poisson.sampling) == (
        1.0,
        "poisson",
    )
    assert fixed.epsilon(noise, 1e-5, 50) > poisson.epsilon(noise, 1e-5, 50)


@pytest.mark.parametrize(
    "accounting", [Accounting(""), Accounting("", 2.0, "fixed", 5, 50), Accounting("", 1.0, "poisson", 5, 50)]
)
def test_the_noise_for_an_epsilon_is_the_smallest_of_its_digits(accounting):
    noise = accounting.noise(4.0, 1e-5, 30)
    assert accounting.epsilon(noise, 1e-5, 30) <= 4.0 < accounting.epsilon(noise * 0.998, 1e-5, 30)
    assert accounting.epsilon(0.0, 1e-5, 1) == inf and accounting.epsilon(0.0, 1e-5, 0) == 0


def test_a_cohort_of_nearly_all_clients_is_no_worse_than_all():
    everyone = Accounting("", 2.0).epsilon(5.0, 1e-5, 20)
    assert Accounting("", 2.0, "fixed", 99, 100).epsilon(5.0, 1e-5, 20) <= everyone


# Clipping and noise -------------------------------------------------------------------------------------------


def a_sum(weights, width=1):
    stats = np.zeros(len(weights), CLIENT_STATS)
    stats["weight"] = weights
    return RoundSum(np.zeros(width), float(sum(weights)), stats)


def test_noise_has_its_standard_deviation_and_the_sum_is_divided_by_the_fixed_cohort():
    privacy = parse("privacy", central(clip=0.5, noise=3.0))
    total, memory = privacy.release(a_sum([1.0, 0.2], 100_000), {}, 8, np.random.default_rng(0))
    assert total.delta.std() == pytest.approx(1.5, rel=0.01) and abs(total.delta.mean()) < 0.03
    assert total.weight == 8 and not len(total.clients) and memory == {} and total.delta.dtype == np.float64


@component
class Watching(Averaging):
    """Records the norm of each round's mean delta."""

    seen: ClassVar[list[float]] = []

    def step(self, params, slots, total, rng):
        self.seen.append(float(np.linalg.norm(total.delta / total.weight)))
        return super().step(params, slots, total, rng)


@pytest.fixture
def watching():
    Watching.seen.clear()
    return Watching()


def test_no_client_moves_the_mean_by_more_than_the_clip_norm_over_the_cohort(probe, watching, tmp_path):
    for clip, lr in ((0.01, 1e-6), (0.01, 10.0), (None, 10.0)):
        method, out = {"name": "probe", "optimizer": "sgd", "lr": lr}, tmp_path / f"{clip}-{lr}"
        alone = {"clients": 1, "cohort": None, "rounds": 1, "out": out}
        run(probe(method=method, server=watching, privacy=central(clip=clip, noise=0), **alone))
    small, clipped, large = watching.seen
    assert small < 0.01 < large and clipped == pytest.approx(0.01, rel=1e-12)


def test_all_shared_tensors_are_clipped_together():
    zeros = {"a": torch.zeros(2), "b": torch.zeros(2)}
    trained = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    assert clipping(zeros, trained, 1.0) == pytest.approx(0.2) and clipping(zeros, trained, 10.0) == 1.0
    assert clipping(zeros, zeros, 1.0) == 1.0


def test_the_clip_norm_follows_the_quantile_of_norms():
    """Andrew et al. 2021, Algorithm 1: by hand without noise, and to the median of given norms with it."""
    privacy = parse("privacy", central(clip=2.0, noise=0, quantile=0.5))
    _, memory = privacy.release(a_sum([1.0, 1.0, 1.0, 0.3]), privacy.init(), 4, np.random.default_rng(0))
    assert memory["clip"].item() == pytest.approx(2.0 * exp(-0.2 * (0.75 - 0.5)))
    privacy = parse("privacy", central(clip=0.1, noise=1.0, quantile=0.5))
    norms, memory, rng = np.linspace(1, 3, 100), privacy.init(), np.random.default_rng(0)
    for _ in range(100):
        bound = privacy.bound(memory)
        _, memory = privacy.release(a_sum(np.minimum(1, bound / norms)), memory, 100, rng)
    assert memory["clip"].item() == pytest.approx(2.0, rel=0.1)


def test_leaving_a_client_out_moves_the_noised_sum_and_count_as_far_as_accounted_for():
    """A client with updates of zero would move the count twice as far, since these are shorter than any clip norm."""
    privacy = parse("privacy", central(clip=1.0, noise=2.0, quantile=0.5))
    accounting, (noise, count_noise) = privacy.accounting(None, 10, 10, True), privacy._noises(10)
    assert accounting.neighbors == "what a client adds to each sum, or nothing in its place"
    for weight in (1.0, 0.3):
        totals = a_sum([1.0] * 9 + [weight]), a_sum([1.0] * 9)
        clips = [privacy.release(total, privacy.init(), 10, np.random.default_rng(0))[1]["clip"] for total in totals]
        count = abs(log(clips[0] / clips[1])) * 10 / 0.2
        assert sqrt(noise**-2 + (count / count_noise) ** 2) == pytest.approx(accounting.sensitivity / 2.0)


def test_the_noises_of_sum_and_count_are_together_worth_the_noise_multiplier():
    for cohort, count_noise in ((4, None), (400, None), (100, 3.0)):
        privacy = parse("privacy", central(noise=2.0, quantile=0.5, count_noise=count_noise))
        delta, count = privacy._noises(cohort)
        assert delta**-2 + (2 * count) ** -2 == pytest.approx(2.0**-2)
    with pytest.raises(InputError, match=r"count-noise 1 leaves no privacy for the deltas; .* larger than 1"):
        parse("privacy", central(noise=2.0, quantile=0.5, count_noise=1.0)).accounting(None, 4, 8, True)


# Runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", available("server"))
def test_every_rule_is_refused_or_without_noise_and_limit_what_it_is_without_privacy(server, probe, tmp_path):
    """Not told of single clients, a rule that is let through needs the mean alone."""
    method = {"name": "probe", "local_epochs": 1}
    ours = probe(method=method, server=server, privacy=central(clip=None, noise=0), rounds=1)
    try:
        private = run(ours)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert same_bits(
        private, run(ours.model_copy(update={"privacy": parse("privacy", "none"), "out": tmp_path / "plain"}))
    )
    rule = parse("server", server)
    assert not (rule.needs_deltas or rule.needs_loss or rule.root_rows)


@pytest.mark.parametrize("privacy", [central(noise=0.1), central(noise=0.1, quantile=0.3, sampling="poisson")])
def test_a_private_run_gives_the_same_bits_in_other_chunks_and_after_an_interruption(privacy, probe, tmp_path):
    whole = run(probe(privacy=privacy, rounds=4, dtype="float64"))
    run_until(2, probe(privacy=privacy, rounds=4, dtype="float64", out=tmp_path / "resumed"))
    resumed = run(probe(privacy=privacy, rounds=4, dtype="float64", out=tmp_path / "resumed"))
    assert same_bits(whole, resumed)
    assert np.array_equal(np.array(whole.rounds)[:, -1], np.array(resumed.rounds)[:, -1])
    for others in ({"chunk": 1}, {"engine": "reference"}):
        other = run(probe(privacy=privacy, rounds=4, dtype="float64", out=tmp_path / str(others), **others))
        for name, tensor in whole.adapter.items():
            torch.testing.assert_close(tensor, other.adapter[name], rtol=0, atol=1e-9)


def test_epsilon_is_in_the_rounds_and_in_the_remarks_and_reaches_what_was_asked_for(probe):
    from fedsim.reporting.remarks import remarks

    tables = run(probe(privacy=central(epsilon=4.0, delta=1e-4), rounds=3)).tables()
    spent = tables.rounds.epsilon.tolist()
    assert 0 < spent[0] < spent[1] < spent[2] <= 4.0 and spent[2] > 3.99
    (sentence,) = (text for text in remarks(tables) if text.startswith("Privacy"))
    assert "epsilon 4 after 3 rounds (central_dp: norms up to 1, noise multiplier" in sentence
    assert "delta 1e-4; a client's rows replaced; cohorts of 4 of 6 clients" in sentence


def test_rounds_without_privacy_have_no_epsilon(probe):
    assert run(probe(rounds=1)).tables().rounds.epsilon.isna().all()


def test_a_poisson_cohort_is_each_client_by_itself(probe):
    ours = probe(privacy=central(noise=1.0, sampling="poisson"), clients=100, cohort=5)
    rounds = schedule(ours, 100, lambda ids, round: np.ones(len(ids), np.int64), 0, 0)
    cohorts = list(islice(rounds, 400))
    sizes = np.array([len(planned.trained) for planned in cohorts])
    assert sizes.mean() == pytest.approx(5, abs=0.35) and sizes.var() == pytest.approx(4.75, rel=0.25)
    assert [planned.asked for planned in cohorts] == sizes.tolist()


def test_an_empty_poisson_cohort_still_releases_noise(probe, watching):
    ours = probe(server=watching, privacy=central(noise=1.0, sampling="poisson"), cohort=1, rounds=8)
    clients = run(ours).tables().rounds.clients.to_numpy()
    assert (clients == 0).any() and len(watching.seen) == 8
    # Of 96 numbers with standard deviation 1; a delta is no longer than 1.
    assert np.array(watching.seen)[clients == 0] == pytest.approx(96**0.5, rel=0.3)


def test_the_server_clips_what_it_has_decoded(probe, watching):
    """Error feedback and quantization may make an update longer than the clip norm."""
    privacy, codec = central(clip=0.001, noise=0), {"name": "sign", "error_feedback": True}
    run(probe(server=watching, privacy=privacy, codec=codec, clients=1, cohort=None, rounds=2))
    assert watching.seen == pytest.approx([0.001, 0.001], rel=1e-12)


def test_a_fleet_that_drops_clients_is_accounted_for_by_the_client_with_the_most_rounds(probe):
    ours = probe(privacy=central(noise=1.0), fleet={"name": "lognormal", "dropout": 0.3}, rounds=6)
    spent = run(ours).tables().rounds.epsilon.to_numpy()
    rounds = schedule(ours, 6, lambda ids, round: np.ones(len(ids), np.int64), 0, 0)
    counts, expected = np.zeros(6, int), []
    for planned in islice(rounds, 6):
        counts[[client for client, _ in planned.trained]] += 1
        expected.append(Accounting("").epsilon(1.0, 1e-5, int(counts.max())))
    assert spent == pytest.approx(expected)


def test_an_update_that_is_not_finite_is_not_hidden_by_clipping(probe):
    method = {"name": "probe", "optimizer": "sgd", "lr": 1e38, "weight_decay": 1e10}
    with pytest.raises(Diverged):
        run(probe(privacy=central(noise=0), method=method))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"privacy": central()}, "needs --privacy.epsilon, for which the noise is solved, or --privacy.noise; neither"),
        ({"privacy": central(noise=1, epsilon=1)}, "or --privacy.noise; both given"),
        ({"privacy": central(noise=1, clip=None)}, "adds noise in proportion to --privacy.clip, and there is none"),
        (
            {"privacy": central(noise=0, clip=None, quantile=0.5)},
            "quantile adapts the clip norm from --privacy.clip on",
        ),
        ({"privacy": central(noise=1, count_noise=2.0)}, "count-noise 2 has no effect on a clip norm that stays"),
        (
            {"privacy": central(noise=1, accountant="pld")},
            "pld is for Poisson sampling, and .* is fixed",
        ),
        ({"privacy": central(noise=1, sampling="poisson"), "cohort": None}, "needs a --cohort smaller than 6"),
        ({"server": {"name": "fedavg", "weighting": "rows"}}, "server fedavg weights clients, or sums messages"),
        ({"server": "median"}, "server median needs the delta of each client"),
        ({"server": "scaffold", "method": SGD}, "server scaffold weights clients, or sums messages of theirs"),
        ({"server": "q_fedavg"}, "server q_fedavg needs the losses of clients"),
        ({"server": "local_only"}, "protects shared tensors, and .* has none to send"),
        ({"method": "ncm"}, "does not cover the survey of ncm"),
        (
            {"privacy": central(noise=1, sampling="poisson"), "fleet": "lognormal", "over_selection": 0.5},
            "over_selection 0.5, but with Poisson sampling",
        ),
    ],
)
def test_what_would_guarantee_nothing_is_refused_in_one_sentence(fields, words, probe):
    with pytest.raises(InputError, match=words) as raised:
        run(probe(**({"privacy": central(noise=1.0)} | fields)))
    assert "\n" not in str(raised.value)


def test_a_run_whose_noise_is_solved_does_not_continue_with_more_rounds(probe):
    ours = probe(privacy=central(epsilon=8.0), rounds=1)
    run(ours)
    with pytest.raises(InputError, match=r"or --privacy\.epsilon"):
        run(ours.model_copy(update={"rounds": 2}))
