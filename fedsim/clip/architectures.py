"""The architectures that open_clip knows, and the embedded one; nothing here needs weights."""

import logging
import warnings
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedsim.clip.folders import LOCAL
from fedsim.clip.hub import hub_or_cache
from fedsim.errors import InputError, first_line

EMBEDDED = "tiny", "embedded"
ASSETS = Path(__file__).parents[1] / "assets" / "tiny"


@lru_cache(maxsize=1)
def import_open_clip() -> Any:
    # Imported where CLIP is loaded: it takes three times as long as torch, and most actors read only features.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    logging.getLogger().setLevel(logging.ERROR)
    open_clip.add_model_config(ASSETS / "tiny.json")
    return open_clip


def tokenizer_of(model: str, context_length: int | None = None) -> Any:
    """open_clip's tokenizer for an architecture.

    Args:
        context_length: tokens of a text (default: the architecture's).

    Raises:
        InputError: it needs a package or a vocabulary that this machine does not have.
    """
    open_clip = import_open_clip()
    text = {} if model.startswith(LOCAL) else (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    try:
        if text and "hf_tokenizer_name" not in text:
            return _shipped(model, context_length, str(text))
        with hub_or_cache() if text else nullcontext():
            return open_clip.get_tokenizer(model, context_length)
    except (ImportError, OSError) as error:
        raise InputError(f"the tokenizer of {model} is not on this machine: {first_line(error)}") from None
    except Exception as error:  # what a folder says of its tokenizer can be wrong in many ways
        raise InputError(f"the tokenizer of {model} cannot be made: {first_line(error)}") from None


@lru_cache(maxsize=4)
def _shipped(model: str, context_length: int | None, text: str) -> Any:
    """A tokenizer with a vocabulary of open_clip's own, which takes 0.1 s to read; `text` is the architecture's."""
    return import_open_clip().get_tokenizer(model, context_length)
