"""Texts as tokens, refused where open_clip would change them silently."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsim.errors import InputError, shortened


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """n texts -> (n, context) int64, by an open_clip tokenizer.

    Raises:
        InputError: a text is longer than the model's context, and open_clip would truncate it silently.
    """
    # Only CLIP's own tokenizer tells the length of a text. Others truncate silently too; `tokenize_distinct` refuses
    # texts that are equal up to there.
    for text in texts if hasattr(tokenizer, "encode") else ():
        if (length := len(tokenizer.encode(text)) + 2) > tokenizer.context_length:
            raise InputError(
                f"{shortened(text)!r} has {length} tokens; the model takes {tokenizer.context_length}, "
                "including start and end"
            )
    return tokenizer(list(texts))


def tokenize_distinct(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The same of texts of classes that compete with each other.

    Raises:
        InputError: two texts have the same tokens, for example because they differ only in case, so their classes would
            be the same.
    """
    tokens = tokenize(tokenizer, texts)
    first: dict[tuple[int, ...], str] = {}
    for text, row in zip(texts, tokens.tolist(), strict=True):
        if (other := first.setdefault(tuple(row), text)) is not text:
            raise InputError(
                f"{shortened(other)!r} and {shortened(text)!r} have the same tokens, so the model cannot distinguish "
                "their classes; rename one"
            )
    return tokens
