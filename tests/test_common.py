"""Train rows that all clients have, besides their own (`--common`)."""

import numpy as np
import pytest
from test_protocols import FIXED, population

from fedsim import InputError, run
from fedsim.clients import _with_common


@pytest.mark.parametrize("partition", sorted(set(FIXED) - {"bootstrap"}))
def test_every_client_has_the_same_share_of_all_train_rows_besides_its_own(partition):
    plain, ours, again = (population(partition, held_out=("ink",), common=share) for share in (0.0, 0.2, 0.2))
    everything = np.unique(np.concatenate([plain[k].train for k in range(plain.trainers)]))
    assert len(ours.common) == len(everything) // 5 and np.isin(ours.common, everything).all()
    assert plain.common is None and np.array_equal(ours.common, again.common)
    for own, joined in zip(plain, ours, strict=True):
        extra = ours.common if own.id < plain.trainers else []
        assert sorted(set(own.train) | set(extra)) == joined.train.tolist()
        assert np.array_equal(own.val, joined.val) and np.array_equal(own.test, joined.test)
        assert not set(joined.test) & set(ours.common) and not set(joined.val) & set(ours.common)


def test_common_rows_are_few_shot_ones_and_never_rows_that_another_client_is_tested_on():
    few, ours = population(shots=1), population(shots=1, common=0.5)
    drawn = np.concatenate([client.train for client in few])
    assert len(drawn) <= 36 and len(ours.common) == len(drawn) // 2 and np.isin(ours.common, drawn).all()
    both = [([0, 1], [2], [3]), ([2, 3, 4], [5], [0])]  # as a custom partition may have it
    both = [tuple(np.array(part) for part in split) for split in both]
    splits, common = _with_common(both, 1.0 - 1e-9, seed=0)
    assert set(common) < {1, 4} and splits[0][0].tolist() == sorted({0, 1} | set(common))


def test_common_rows_need_clients_of_one_data_set_that_are_drawn_at_once():
    with pytest.raises(InputError, match="assigns the rows of all clients at once; bootstrap draws them client by"):
        population("bootstrap", common=0.5)
    with pytest.raises(InputError, match=r"common 0\.001 of \d+ train rows rounds down to none; give 0\.0"):
        population(common=0.001)


def test_a_run_says_how_many_rows_are_common(config):
    method, held = {"name": "probe", "lr": 0.01}, {}
    for share in (0.0, 0.25):
        report = run(config(common=share, rounds=1, method=method, out=config().out.with_name(str(share))))
        held[share] = report.facts.get("common_rows"), report.tables().rounds.flops.sum()
    assert held[0.0][0] is None and held[0.25][0] == 36  # of 2 domains with 72 train rows each
    assert held[0.25][1] / held[0.0][1] == pytest.approx((2 * 72 + 36) / (2 * 72), rel=0.05)
