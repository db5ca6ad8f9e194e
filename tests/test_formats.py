"""One number is shown in one way, wherever it stands."""

from math import nan

import pytest

from fedsim.formats import difference, in_unit, number, percent, setting, spread


@pytest.mark.parametrize(
    ("accuracy", "shown"),
    [
        (0.4885, "48.9"),  # 48.85, which no float is
        (977 / 2000, "48.9"),
        ((0.488 + 0.489) / 2, "48.9"),  # 0.48849999999999993
        (0.0005, "0.1"),
        (0.00049, "0.0"),
        (15 / 48, "31.3"),  # 31.25 exactly
        (0.48849, "48.8"),
        (0.0, "0.0"),
        (1.0, "100.0"),
        (nan, "-"),
    ],
)
def test_an_accuracy_is_rounded_as_by_hand(accuracy, shown):
    assert percent(accuracy) == shown


def test_every_accuracy_of_small_counts_is_the_nearest_tenth_of_a_percent_halves_up():
    for total in range(1, 130):
        for correct in range(total + 1):
            assert percent(correct / total) == f"{(2000 * correct + total) // (2 * total) / 10:.1f}"


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (0.49549, 0.49251, "-0.2"),  # 49.5 and 49.3; the exact values differ by 0.298 points
        (0.4954, 0.4934, "-0.2"),
        (0.48849, 0.4885, "+0.1"),  # 48.8 and 48.9; the exact values differ by 0.001 points
        (0.5, 0.5, "+0.0"),
        (0.5, 0.49999, "+0.0"),
        (nan, 0.5, "-"),
    ],
)
def test_a_difference_is_that_of_the_two_values_shown(before, after, shown):
    assert difference(before, after) == shown


def test_a_deviation_is_left_out_where_there_is_one_value():
    assert (spread("49.0", 0.0125), spread("49.0", nan)) == ("49.0 ± 1.3", "49.0")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (131584, "131,584"),
        (19.774139404296875, "19.77"),
        (0.0069008910877850676, "0.0069"),
        (12345.678, "12,346"),
        (999.999, "1000"),
        (43.1, "43.1"),
        (4.2, "4.2"),
        (100.0, "100"),
        (0.0, "0"),
        (512, "512"),
        (5e-5, "5e-05"),
        (-1.25, "-1.25"),
        (nan, "-"),
    ],
)
def test_a_measured_number_has_no_more_digits_than_it_is_worth(value, shown):
    assert number(value) == shown


def test_an_axis_in_percent_has_the_decimals_of_a_table():
    assert (in_unit(48.85, "accuracy (%)"), in_unit(48.85, "training loss (nats)")) == ("48.9", "48.85")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0069008910877850676, "0.006901"), (5e-5, "5e-5"), (0.9995, "0.9995"), (16, "16")]
)
def test_a_hyperparameter_keeps_four_digits(value, shown):
    assert setting(value) == shown
