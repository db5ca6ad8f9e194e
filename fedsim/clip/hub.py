"""The Hugging Face hub, or its cache on this machine where the hub does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within the block huggingface_hub uses its cache alone, without 45 seconds of retries, if the hub does not answer.

    Only within the block: the hub may answer later in this process, for other repositories.
    """
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
