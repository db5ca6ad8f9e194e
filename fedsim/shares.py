"""Shares of a count in exact decimal arithmetic, so that 0.29 of 100 rows is 29 rows."""

from fractions import Fraction


def decimal(share: float) -> Fraction:
    """The number that a share is written as; the float 0.29 itself is a little less."""
    return Fraction(str(share))


def part(count: int, share: float) -> int:
    """`share` of `count`, rounded down."""
    return int(count * decimal(share))
