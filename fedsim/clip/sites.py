"""Where parameters attach to CLIP, and what of CLIP can therefore be computed once and kept.

A method says where it attaches (`Method.sites`); what its clients read follows from that alone. Whatever lies before
the first place that is trained never changes: it is computed once, in float16 for images, and the towers behind it are
loaded by nobody. A method that attaches to features alone never pays for a tower.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Site = Literal["image_feature", "head", "patch_tokens", "image_blocks", "text_tokens", "text_blocks"]

ImageLevel = Literal["features", "tokens", "pixels"]
TextLevel = Literal["features", "embeddings", "blocks"]
IMAGE_LEVELS: tuple[ImageLevel, ...] = (
    "features",
    "tokens",
    "pixels",
)  # each holds what is left to be computed of the one before
TEXT_LEVELS: tuple[TextLevel, ...] = "features", "embeddings", "blocks"

# What a site wants of an image and of a class; a site that is not named wants the least.
IMAGE_OF: dict[Site, ImageLevel] = {"patch_tokens": "tokens", "image_blocks": "pixels"}
TEXT_OF: dict[Site, TextLevel] = {"text_tokens": "embeddings", "text_blocks": "blocks"}


@dataclass(frozen=True)
class Reads:
    """What a client must be given.

    Attributes:
        image: of an image `features` (D,), projected and not normalised; patch `tokens` (T, D) of the frozen tower,
            projected; or its `pixels` (3, H, W) in bytes, because the image tower itself is trained through.
        text: of a class its text `features` (D,), the class embedding; token `embeddings`, which are trained through
            the frozen text tower; or the same with the tower's `blocks` trained too.
    """

    image: ImageLevel = "features"
    text: TextLevel = "features"

    @property
    def towers(self) -> bool:
        """Whether a client computes with a tower at all."""
        return self.image == "pixels" or self.text != "features"


def reads_of(sites: Iterable[Site]) -> Reads:
    """The most that any of the sites wants."""
    sites = list(sites)
    images: list[ImageLevel] = ["features", *(IMAGE_OF[site] for site in sites if site in IMAGE_OF)]
    texts: list[TextLevel] = ["features", *(TEXT_OF[site] for site in sites if site in TEXT_OF)]
    return Reads(max(images, key=IMAGE_LEVELS.index), max(texts, key=TEXT_LEVELS.index))
