"""Client-level differential privacy by a trusted server, which clips each update and adds noise to the sum (DP-FedAvg).

Source: McMahan et al. 2018, arXiv 1710.06963, with the fixed denominator, the expected number of clients; adaptive
clipping as in Andrew et al. 2021, arXiv 1905.03871, Algorithm 1, whose quantile 0.5, step size 0.2, first clip norm 0.1
and count noise cohort / 20 are its defaults. Otherwise not checked against code.

Differs: the first paper weights clients by their rows, up to a limit; here they weigh the same. Cohorts are drawn
without replacement and have a fixed size unless `sampling` is poisson, as in the papers. The count noise is not smaller
than the noise multiplier, or little privacy would be left for the deltas of small cohorts.
"""

from dataclasses import replace
from math import exp, inf
from typing import Literal

import torch

from fedsim.errors import InputError
from fedsim.privacy import Noised, check_mean
from fedsim.privacy._accounting import Accounting
from fedsim.registry import component
from fedsim.search_space import Field, Linear, Log


@component
class CentralDP(Noised):
    """Epsilon is about all that the server publishes, and a client with all its rows.

    The server decodes a client's update, clips all shared tensors together, and divides the noised sum by the number of
    clients in a round. What a rule makes of that, such as a step of FedAdam, needs no more noise. Private tensors stay
    with their clients and are not covered.

    A uniform cohort that is kept secret amplifies privacy. That is claimed where clients store nothing from round to
    round and the fleet is ideal, or with Poisson sampling; else epsilon is that of the client with the most rounds.
    Under Poisson sampling, one client more or less is hidden; with cohorts of a fixed size, other rows in the place of
    a client's; if no cohort is drawn, what a client adds to the sums and to the counts.
    """

    protects = "clients"

    sampling: Literal["fixed", "poisson"] = Field(
        "fixed", description="cohorts of one size, or each client by itself with the probability cohort / clients"
    )
    accountant: Literal["rdp", "pld"] = Field(
        "rdp", description="of Poisson sampling: Renyi divergences, or privacy loss distributions, slower and tighter"
    )
    quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        search=Linear(0.1, 0.9),
        description="share of norms below the clip norm, which adapts to it from `clip` on (default: clip stays)",
    )
    clip_lr: float = Field(0.2, gt=0, le=10, search=Log(0.01, 1.0), description="step size of the adaptive clip norm")
    count_noise: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="standard deviation of the noise on how many norms are below the adaptive clip norm (default: "
        "cohort / 20, or the noise multiplier if that is larger)",
    )

    @property
    def poisson(self):
        return self.sampling == "poisson"

    def check(self, method, server, params):
        super().check(method, server, params)
        check_mean(self, method, server, params)
        if self.quantile is not None and self.clip is None:
            raise InputError(
                "--privacy.quantile adapts the clip norm from --privacy.clip on, which is none; give a number"
            )
        if self.accountant == "pld" and not self.poisson:
            raise InputError(
                "--privacy.accountant pld is for Poisson sampling, and --privacy.sampling is fixed; give poisson, or "
                "leave the accountant out"
            )
        if self.quantile is None and self.count_noise is not None:
            raise InputError(
                f"--privacy.count-noise {self.count_noise:g} has no effect on a clip norm that stays; give "
                "--privacy.quantile, too, or leave it out"
            )

    def init(self):
        return {} if self.quantile is None else {"clip": torch.tensor(self.clip, dtype=torch.float64)}

    def bound(self, memory):
        clip = memory["clip"].item() if memory else self.clip
        return inf if clip is None else clip

    def release(self, total, memory, cohort, rng):
        clip, (noise, count_noise) = self.bound(memory), self._noises(cohort)
        delta = total.delta + noise * clip * rng.standard_normal(len(total.delta)) if noise else total.delta
        if memory:
            # Of indicators minus 1/2, whose sum changes by 1/2 with one client.
            count = (total.clients["weight"] >= 1).sum() - len(total.clients) / 2 + count_noise * rng.standard_normal()
            below = count / cohort + 0.5
            clip *= exp(-self.clip_lr * (below - self.quantile))
            memory = {"clip": torch.tensor(clip, dtype=torch.float64)}
        # Nothing of single clients, which would not be covered.
        return replace(total, delta=delta, weight=float(cohort), clients=total.clients[:0]), memory

    def accounting(self, method, cohort, population, uniform):
        if self.noise is not None:
            self._noises(cohort)  # for its error
        if cohort < population and self.poisson:
            tight = self.accountant == "pld"
            return Accounting("one client more or less", 1.0, "poisson", cohort, population, tight=tight)
        if cohort < population and uniform:
            return Accounting("a client's rows replaced", 2.0, "fixed", cohort, population)
        return Accounting("what a client adds to each sum, or nothing in its place")

    def _noises(self, cohort: int) -> tuple[float, float]:
        """Noise multipliers of the sum and of the count, which together are worth `noise`."""
        noise = self.multiplier
        if self.quantile is None or not noise:
            return noise, 0.0
        count_noise = max(cohort / 20, noise) if self.count_noise is None else self.count_noise
        if 2 * count_noise <= noise:
            raise InputError(
                f"--privacy.count-noise {count_noise:g} leaves no privacy for the deltas; with noise multiplier "
                f"{noise:g} it must be larger than {noise / 2:g}"
            )
        return (noise**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise
