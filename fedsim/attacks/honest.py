"""All clients are honest.

Source: ours.
"""

from fedsim.attacks import Attack
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Honest(Attack):
    """No client is malicious."""

    share: float = Field(0.0, le=0, description="no client is malicious")
