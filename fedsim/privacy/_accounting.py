"""Epsilon of Gaussian noise that is added again and again, and the noise for an epsilon; by dp-accounting.

Without sampling, k releases with noise s are one with s / sqrt(k), whose epsilon is exact (Balle and Wang 2018, arXiv
1805.06530). With sampling, Renyi divergences are added up (Mironov et al. 2019, arXiv 1908.10530, for Poisson sampling;
Wang et al. 2018, arXiv 1808.00087, Theorem 27, for a fixed number without replacement) and converted at the best order.
For Poisson sampling, privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049) give a smaller epsilon.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, inf, log10
from typing import Any, Literal

import numpy as np

from fedsim.errors import InputError

PACKAGE = "dp-accounting"
# Large orders matter for small epsilons, orders near 1 for large ones. Theorem 27 takes a time that grows with an
# order's square.
ORDERS = (1.25, 1.5, 1.75, *range(2, 33), 40, 48, 64, 96, 128)
DIGITS = 4  # of a noise that is solved: rounded up, so that it is the same with other versions of the package


@dataclass(frozen=True)
class Accounting:
    """What a release of a mechanism is, to those that account for it.

    Attributes:
        neighbors: which data sets are to be told apart, in words.
        sensitivity: by how much a release of neighbors can differ, in clip norms.
        sampling: who takes part in a round: everyone that is counted, or a secret cohort of `cohort` out of
            `population`, of fixed size or with this expectation.
        per_round: releases in a round.
        tight: with Poisson sampling, by privacy loss distributions and not by Renyi divergences.
    """

    neighbors: str
    sensitivity: float = 1.0
    sampling: Literal["none", "fixed", "poisson"] = "none"
    cohort: int = 1
    population: int = 1
    per_round: int = 1
    tight: bool = False

    def epsilon(self, noise: float, delta: float, releases: int) -> float:
        """Epsilon after so many releases.

        Args:
            noise: standard deviation, in clip norms.
        """
        if not releases:
            return 0.0
        if not noise:
            return inf
        noise /= self.sensitivity
        with np.errstate(divide="ignore"):  # the package's logarithm of 0, where epsilon is 0
            unsampled = float(_package().get_epsilon_gaussian(noise / releases**0.5, delta))
        if self.sampling == "none":
            return unsampled
        if self.tight:
            losses = _losses(self.cohort / self.population, noise).self_compose(releases)
            return max(0.0, float(losses.get_epsilon_for_delta(delta)))
        divergences = np.array(_divergences(self.sampling, self.cohort, self.population, noise))
        from dp_accounting.rdp import compute_epsilon

        sampled = float(compute_epsilon(ORDERS, (divergences * releases).tolist(), delta)[0])
        return max(0.0, min(sampled, unsampled))  # for large cohorts, the bound with sampling is the looser one

    def noise(self, epsilon: float, delta: float, releases: int) -> float:
        """The smallest noise, rounded up to `DIGITS` digits, with which epsilon is not larger after so many releases.

        Raises:
            InputError: it is above a million.
        """
        if not releases:
            return 0.0
        low, high = 0.0, 1.0
        while self.epsilon(high, delta, releases) > epsilon:
            low, high = high, high * 2
            if high > 2**20:
                raise InputError(
                    f"--privacy.epsilon {epsilon:g} at --privacy.delta {delta:g} needs a noise multiplier above a "
                    f"million after {releases:,} releases; give a larger epsilon, or fewer rounds"
                )
        while high - low > 0.5 * _digit(high):
            middle = (low + high) / 2
            low, high = (middle, high) if self.epsilon(middle, delta, releases) > epsilon else (low, middle)
        return round(ceil(high / _digit(high)) * _digit(high), 12)

    @property
    def words(self) -> str:
        """Such as `neighbors replace a client; cohorts of 10 of 100 clients, sampled without replacement`."""
        cohorts = f"{self.cohort} of {self.population} clients"
        how = {
            "none": "no amplification by sampling",
            "fixed": f"cohorts of {cohorts}, sampled without replacement",
            "poisson": f"Poisson-sampled cohorts of {cohorts} on average",
        }
        return f"{self.neighbors}; {how[self.sampling]}"


def _digit(value: float) -> float:
    """One unit of the last of `DIGITS` digits."""
    return 10.0 ** (floor(log10(value)) + 1 - DIGITS)


@lru_cache(maxsize=256)
def _divergences(sampling: str, cohort: int, population: int, noise: float) -> tuple[float, ...]:
    """The Renyi divergence of a release, for each of `ORDERS`."""
    package = _package()
    from dp_accounting.rdp import RdpAccountant

    gaussian, relation = package.GaussianDpEvent(noise), package.NeighboringRelation
    if sampling == "poisson":
        event = package.PoissonSampledDpEvent(cohort / population, gaussian)
        accountant = RdpAccountant(ORDERS, relation.ADD_OR_REMOVE_ONE)
    else:
        event = package.SampledWithoutReplacementDpEvent(population, cohort, gaussian)
        accountant = RdpAccountant(ORDERS, relation.REPLACE_ONE)
    accountant.compose(event)
    return tuple(accountant._rdp.tolist())  # which the package has no name for


@lru_cache(maxsize=16)
def _losses(share: float, noise: float) -> Any:
    """The privacy loss distribution of a release of which a share of the clients is part, one client more or less."""
    _package()
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(noise, sampling_prob=share)


@lru_cache(maxsize=1)
def _package() -> Any:
    """dp_accounting, imported late: it takes a second.

    Raises:
        InputError: it is not installed.
    """
    try:
        import dp_accounting
    except ImportError:
        raise InputError(
            f"--privacy needs the package {PACKAGE}, which is not installed: pip install {PACKAGE}, or uv sync --extra "
            "privacy"
        ) from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # orders for which a series does not converge are left out
    return dp_accounting
