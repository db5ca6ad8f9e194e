"""Devices whose speed and bandwidth are lognormal: most are alike, and a few are far slower.

Source: ours. The defaults are round numbers of a phone's order of magnitude, not measurements.
"""

import numpy as np

from fedsim.fleets import Fleet
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Lognormal(Fleet):
    """A client's downlink and uplink differ from the medians by the same factor, independent of its speed."""

    rows_per_s: float = Field(20.0, gt=0, description="median speed of training, rows per second")
    speed_sigma: float = Field(0.5, ge=0, le=5, description="spread of the logarithm of the speed over clients")
    down_mbps: float = Field(20.0, gt=0, description="median downlink, megabits per second")
    up_mbps: float = Field(5.0, gt=0, description="median uplink, megabits per second")
    bandwidth_sigma: float = Field(0.5, ge=0, le=5, description="spread of the logarithm of the link over clients")
    jitter_sigma: float = Field(0.0, ge=0, le=5, description="spread of the logarithm of a client's time over rounds")
    availability: float = Field(1.0, gt=0, le=1, description="probability that a client is available in a round")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a client does not respond")

    def costs(self, clients, rng):
        speed, link = np.exp(rng.standard_normal((clients, 2)) * (self.speed_sigma, self.bandwidth_sigma)).T
        bytes_down, bytes_up = (link * mbps * 1e6 / 8 for mbps in (self.down_mbps, self.up_mbps))
        return 1 / np.column_stack([speed * self.rows_per_s, bytes_down, bytes_up])

    def available(self, clients, rng):
        return rng.random(clients) < self.availability

    def outcomes(self, clients, rng):
        return np.exp(self.jitter_sigma * rng.standard_normal(clients)), rng.random(clients) >= self.dropout
