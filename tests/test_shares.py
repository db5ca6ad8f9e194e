"""Shares are the decimals that they are written as."""

import numpy as np
import pytest

from fedsim.clients import new_of
from fedsim.config import Config
from fedsim.datasets import UNASSIGNED, Labels
from fedsim.partitions import cut, sizes
from fedsim.registry import find
from fedsim.reporting.metrics import tail_of
from fedsim.schedule import schedule
from fedsim.shares import part


def cut_counts(rows: int, share: float) -> tuple[int, ...]:
    nothing = np.zeros(rows, np.int64)
    whole = Labels(y=nothing, domain=nothing, classes=("a",), domains=("d",), split=np.full(rows, UNASSIGNED, np.int8))
    return tuple(map(len, cut(whole, np.arange(rows), share, np.random.default_rng(0))))


@pytest.mark.parametrize(
    ("rows", "share", "counts"),
    [
        (1000, 0.8, (800, 100, 100)),
        (10, 0.8, (8, 1, 1)),
        (100, 0.29, (29, 35, 35)),  # 35.5 each, rounded down, as FedCLIP's code does
        (10, 0.7, (7, 1, 1)),
        (10, 0.6, (6, 2, 2)),
        (20, 0.9, (18, 1, 1)),
        (3, 0.6, (1, 0, 0)),
    ],
)
def test_a_share_that_is_a_whole_number_of_rows_is_that_number(rows, share, counts):
    assert cut_counts(rows, share) == counts


def test_where_all_three_shares_are_whole_no_row_is_lost():
    for percent in range(2, 100, 2):
        assert sum(cut_counts(100, percent / 100)) == 100 == sum(sizes(100, percent / 100))


def test_exact_arithmetic_is_what_floats_had_for_the_default_shares():
    rows = np.arange(100_000)
    assert [part(n, 0.6) for n in rows.tolist()] == (rows * 0.6).astype(int).tolist()
    assert [part(n, 0.1) for n in rows.tolist()] == (rows * 0.1).astype(int).tolist()


def test_new_classes_the_trimmed_mean_and_the_worst_tenth_round_down():
    assert len(new_of([f"{k:03}" for k in range(100)], 0.29)) == 29  # 28.999999999999996 in floats
    assert find("server", "trimmed_mean")(share=0.29).cut(100) == 29
    assert [tail_of(clients) for clients in (1, 9, 10, 19, 20, 30)] == [1, 1, 1, 1, 2, 3]


def test_over_selection_asks_for_the_decimal_number_of_clients():
    for cohort, more, asked in ((100, 0.1, 110), (10, 0.3, 13), (7, 0.1, 8), (50, 0.14, 57)):
        config = Config(fleet="lognormal", cohort=cohort, over_selection=more)
        planned = next(schedule(config, 200, lambda ids, round: np.ones(len(ids)), 0, 0))
        assert planned.asked == asked
