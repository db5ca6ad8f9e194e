"""Prompts of domains, each the mean over the clients of its domain (PLAN).

Source: the server of method `plan`, as in the authors' code, GongShuai8210/PLAN, commit f02cdd8: `communication` in
methods/PLAN.py, where each domain is one client.
"""

import torch

from fedsim.methods.plan import PLAN
from fedsim.registry import component
from fedsim.servers._domains import PerDomain
from fedsim.servers._needs import required


@component
class DomainMeans(PerDomain):
    """For method `plan`. Aggregators become the mean over all clients of a round, a prompt that over its domain's."""

    def adapt(self, method):
        return required(self, method, PLAN, "prompts of method plan")

    def init(self, params):
        return {"trained": {"domains": torch.zeros(len(params["text_prompts"]))}}, {}

    def step(self, params, slots, total, rng):
        names = "text_prompts", "visual_prompts"
        params, trained = self.by_domain(params, total, slots["trained"]["domains"], names)
        return params, {"trained": {"domains": trained}}
