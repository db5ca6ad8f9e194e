"""Robust server rules against a few lines of numpy in float64, and how far a minority of clients can move them."""

import numpy as np
import pytest
import torch

from fedsim import InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.updates import CLIENT_STATS, RoundSum

RNG = torch.Generator()
RULES = ("geometric_median", "norm_bound", "centered_clipping", "bulyan")


def draw(clients=11, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((clients, width)).astype(np.float32)


def a_round(each, weights=None, steps=None):
    """A round in which the clients sent these deltas."""
    each = np.asarray(each, np.float32)
    stats = np.zeros(len(each), CLIENT_STATS)
    stats["steps"] = 1 if steps is None else steps
    stats["weight"] = 1.0 if weights is None else weights
    return RoundSum(np.zeros(0), stats["weight"].sum(), stats, deltas=each, population=len(each))


def steps_of(rule, *totals, like=None):
    """The step that the rule takes in each of these rounds."""
    server = parse("server", rule)
    params = like or {"w": torch.zeros(totals[0].deltas.shape[1], dtype=torch.float64)}
    slots, taken = server.init(params)[0], []
    for total in totals:
        before = flatten(params)
        params, slots = server.step(params, slots, total, RNG)
        taken.append(flatten(params) - before)
    return taken


def step_of(rule, each, **fields):
    return steps_of(rule, a_round(each, **fields))[0]


def mean_of(each):
    return np.asarray(each, np.float64).mean(axis=0)


def lengths(vectors):
    return np.sqrt((vectors**2).sum(axis=-1))


# Against numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [1e-5, 2.0])  # 2 is further than some are
def test_a_geometric_median_takes_weiszfelds_iterations_from_zero(nu):
    each, alphas = draw().astype(np.float64), np.arange(1.0, 12.0)
    median = np.zeros(5)
    for _ in range(3):
        betas = [alpha / max(nu, lengths(delta - median)) for alpha, delta in zip(alphas, each, strict=True)]
        median = sum(beta * delta for beta, delta in zip(betas, each, strict=True)) / sum(betas)
    rule = {"name": "geometric_median", "iterations": 3, "nu": nu}
    np.testing.assert_allclose(step_of(rule, each, weights=alphas), median, rtol=1e-12)


def test_many_iterations_end_where_the_sum_of_distances_is_least():
    each = draw().astype(np.float64)
    median = step_of({"name": "geometric_median", "iterations": 500}, each)
    pulls = (each - median) / lengths(each - median)[:, None]
    assert lengths(pulls.sum(axis=0)) < 1e-9


def test_a_norm_bound_is_the_weighted_mean_of_clipped_deltas():
    each, weights = draw().astype(np.float64), np.arange(1.0, 12.0)
    each[0] = 0.0
    clipped = [delta / max(1, lengths(delta) / 1.5) for delta in each]
    assert (lengths(each) > 1.5).any() and (lengths(each) < 1.5).any()
    found = step_of({"name": "norm_bound", "bound": 1.5}, each, weights=weights)
    np.testing.assert_allclose(found, weights @ clipped / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("iterations", [1, 3])
def test_centered_clipping_starts_from_the_step_of_the_last_round(iterations):
    rule = {"name": "centered_clipping", "radius": 1.5, "iterations": iterations}
    sent = [1 + draw(seed=seed) for seed in range(3)]
    v = np.zeros(5)
    for each, found in zip(sent, steps_of(rule, *map(a_round, sent)), strict=True):
        for _ in range(iterations):
            gaps = each.astype(np.float64) - v
            v = v + mean_of([gap * min(1, 1.5 / lengths(gap)) for gap in gaps])
        np.testing.assert_allclose(found, v, rtol=1e-11)


@pytest.mark.parametrize("clients, f", [(11, 2), (12, 2), (7, 1), (9, 0)])
def test_bulyan_averages_the_values_nearest_to_the_median_of_those_that_krum_chooses(clients, f):
    for seed in range(10):
        each = draw(clients, seed=seed).astype(np.float64)
        scores = [sum(np.sort(((each - delta) ** 2).sum(axis=1))[1 : clients - f - 1]) for delta in each]
        chosen = each[np.argsort(scores)[: clients - 2 * f]]
        expected = []
        for values in chosen.T:
            nearest = sorted(values, key=lambda value: abs(value - np.median(values)))
            expected.append(np.mean(nearest[: clients - 4 * f]))
        np.testing.assert_allclose(step_of({"name": "bulyan", "f": f}, each), expected, rtol=1e-11)


def test_bulyan_leaves_out_a_client_that_is_far_in_one_parameter_alone():
    """Krum may choose it, since it is near in all others; the trimmed mean does not."""
    each = np.zeros((7, 3))
    each[:, 0] = [-3, -2, -1, 0, 1, 2, 3]
    each[3, 1] = 1.5
    assert step_of("bulyan", each)[1] == 0.0 and step_of({"name": "krum", "m": 5}, each)[1] > 0.2


# Degenerate cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_equal_deltas_are_the_result(name):
    one = draw(1)[0] / 10
    np.testing.assert_allclose(step_of(name, [one] * 7), one, rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "geometric_median", "nu": 1e6},
        {"name": "norm_bound", "bound": 1e6},
        {"name": "centered_clipping", "radius": 1e6},
        {"name": "centered_clipping", "radius": 1e6, "iterations": 3},
        {"name": "bulyan", "f": 0},
    ],
    ids=str,
)
def test_without_a_limit_rules_are_the_mean(rule):
    first, second = draw(seed=1), draw(seed=2)
    found = steps_of(rule, a_round(first), a_round(second))
    np.testing.assert_allclose(found, [mean_of(first), mean_of(second)], rtol=0, atol=1e-12)
    plain = {"norm_bound": "bound", "centered_clipping": "radius"}.get(rule["name"])
    if plain:
        assert not np.allclose(step_of(rule | {plain: 0.1}, first), mean_of(first))


@pytest.mark.parametrize("name", RULES)
def test_clients_without_a_step_change_nothing(name):
    each = 1 + draw(9)
    each[[0, 8]] = 0.0
    steps = [0, *[2] * 7, 0]
    alone, found = step_of(name, each[1:8]), step_of(name, each, steps=steps)
    # In a mean they count as zeros, as in fedavg; rules that compare clients leave them out.
    np.testing.assert_allclose(found, alone * (7 / 9 if name == "norm_bound" else 1), rtol=1e-12)
    assert (step_of(name, each, steps=[0] * 9) == 0).all()


# A minority ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("iterations", [1, 4, 50])
def test_a_minority_moves_a_geometric_median_no_further_than_its_bound(iterations, sign):
    each, share = draw(), 4 / 11
    each[7:] = sign * 1e6
    longest = lengths(each[:7].astype(np.float64)).max()
    found = step_of({"name": "geometric_median", "iterations": iterations}, each)
    assert lengths(found) <= 2 * longest * (1 - share) / (1 - 2 * share)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_minority_adds_no_more_to_a_bounded_mean_than_its_share_of_the_bound(sign):
    each, weights = draw(), np.arange(1.0, 12.0)
    attacked = each.copy()
    each[9:], attacked[9:] = 0.0, sign * 1e6
    rule = {"name": "norm_bound", "bound": 0.5}
    added = step_of(rule, attacked, weights=weights) - step_of(rule, each, weights=weights)
    assert lengths(added) == pytest.approx(0.5 * (10 + 11) / 66, rel=1e-9)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_minority_moves_a_clipped_center_by_twice_its_share_of_the_radii_at_most(iterations):
    each = draw()
    attacked = each.copy()
    attacked[8:] = 1e6
    rule = {"name": "centered_clipping", "radius": 0.5, "iterations": iterations}
    moved = lengths(step_of(rule, attacked) - step_of(rule, each))
    assert 0.1 < moved <= 2 * 3 / 11 * 0.5 * iterations


@pytest.mark.parametrize("sent", [1e6, -1e6, (1e6, -1e6, 0.0, 1e6, 1.0)], ids=str)
def test_f_clients_do_not_move_bulyan_out_of_the_range_of_the_others(sent):
    each = draw()
    each[3:5] = sent
    honest = np.delete(each, [3, 4], axis=0)
    found = step_of({"name": "bulyan", "f": 2}, each)
    assert (honest.min(axis=0) <= found).all() and (found <= honest.max(axis=0)).all()


# Size and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_more_parameters_than_a_block_has_are_those_of_one_array(name):
    """A repeated parameter scales all distances: by 2 if there are four of each."""
    few, times = draw(7, 20_000), 4
    rule, scaled = {"name": name}, {"norm_bound": {"bound": 5.0}, "centered_clipping": {"radius": 5.0}}
    wide = rule | {key: value * times**0.5 for key, value in scaled.get(name, {}).items()}
    like = {"b": torch.zeros(30_000, dtype=torch.float64), "a": torch.zeros(50_000, dtype=torch.float64)}
    found = steps_of(wide, a_round(np.tile(few, times)), like=like)[0]
    np.testing.assert_allclose(found, np.tile(step_of(rule | scaled.get(name, {}), few), times), rtol=1e-9)


def test_bulyan_says_how_many_clients_it_needs_and_changes_nothing_with_fewer_responses(config):
    with pytest.raises(InputError, match="bulyan with f 1 needs at least 7 clients per round, not 6"):
        run(config(server="bulyan", clients=8, cohort=6, rounds=1))
    assert (step_of("bulyan", 1 + draw(6)) == 0).all() and (step_of("bulyan", 1 + draw(7)) != 0).all()


# In a run ---------------------------------------------------------------------------------------------------------


def test_in_a_run_a_large_bound_is_fedavg_and_a_small_one_is_kept(config, tmp_path):
    fields = {"method": "fedclip", "clients": 4, "dtype": "float64", "rounds": 2, "partition": "iid"}

    def of(server, **more):
        return flatten(
            run(config(server=server, out=tmp_path / str(len(list(tmp_path.iterdir()))), **fields | more)).adapter
        )

    np.testing.assert_allclose(of({"name": "norm_bound", "bound": 1e6}), of("fedavg"), rtol=0, atol=1e-12)
    none, first = of("fedavg", rounds=0), of({"name": "norm_bound", "bound": 1e-3}, rounds=1)
    assert 1e-4 < lengths(first - none) <= 1e-3 + 1e-9


def test_in_a_run_centered_clipping_resumes_with_its_center_and_chunks_do_not_matter(config, tmp_path):
    rule = {"name": "centered_clipping", "radius": 0.01}
    fields = {"server": rule, "method": "fedclip", "clients": 5, "partition": "iid"}
    whole = run(config(**fields, rounds=4, chunk=2, out=tmp_path / "whole"))
    ours = config(**fields, rounds=2, out=tmp_path / "parts")
    run(ours)
    center = load_checkpoint(ours.folder(), ours.experiment())[0].slots["center"]
    assert 0 < lengths(flatten(center)) <= 0.02 + 1e-9
    parts = run(config(**fields, rounds=4, out=tmp_path / "parts"))
    assert (flatten(whole.adapter) == flatten(parts.adapter)).all()
