"""The format of numbers in the terminal, on pages and in the alternative text of plots.

Numbers are rounded to the nearest, halves away from zero, as readers do by hand: 0.4885 is 48.9 percent everywhere.
"""

from decimal import ROUND_HALF_UP, Decimal
from math import isnan
from typing import Any


def percent(accuracy: float) -> str:
    """An accuracy in [0, 1] as percent with one decimal; nan as a dash."""
    return "-" if isnan(accuracy) else f"{_rounded(accuracy)}"


def difference(before: float, after: float) -> str:
    """Signed difference in percentage points between two accuracies as `percent` rounds them, so that columns add up.

    The difference of the exact values can differ from it by 0.1.
    """
    return "-" if isnan(before) or isnan(after) else f"{_rounded(after) - _rounded(before):+.1f}"


def spread(mean: str, deviation: float) -> str:
    """`mean ± deviation` of accuracies in percent; only the mean if the deviation is nan, as for a single value."""
    return mean if isnan(deviation) else f"{mean} ± {percent(deviation)}"


def number(value: float) -> str:
    """A measured number: thousands separators, at most two decimals from 10 on, three digits below; nan as a dash."""
    if isnan(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def in_unit(value: float, label: str) -> str:
    """A number on an axis or in a column, by its label: `accuracy (%)` is formatted like `percent`."""
    return percent(value / 100) if label.endswith("(%)") else number(value)


def setting(value: Any) -> str:
    """The value of a hyperparameter: four digits, three below 0.001, without trailing zeros."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{float(f'{value:.3g}'):e}"
    digits, e, power = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if e else text


def _rounded(accuracy: float) -> Decimal:
    # A float may be slightly above or below a half; accuracies of different counts differ within ten decimals.
    percents = Decimal(f"{100 * accuracy:.10f}").quantize(Decimal("0.1"), ROUND_HALF_UP)
    return percents if percents else abs(percents)  # no "-0.0"
