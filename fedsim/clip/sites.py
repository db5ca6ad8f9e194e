"""Where parameters attach to CLIP, and what can therefore be computed once per image and class.

A method names its sites (`Method.sites`), and what its clients read follows from them. Everything before the first
trained layer is constant: it is computed once, in float16 for images, and a tower that is not needed is never loaded.
A method that attaches to features only never pays for a tower.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Site = Literal[
    "image_feature",
    "head",
    "patch_tokens",
    "pixels",
    "visual_tokens",
    "image_adapters",
    "image_blocks",
    "text_tokens",
    "conditional_tokens",
    "text_adapters",
    "text_blocks",
]

ImageRead = Literal["features", "tokens", "all_tokens", "pixels"]
TextRead = Literal["features", "embeddings", "blocks"]
# In order: from each, those before it can be computed.
IMAGE_READS: tuple[ImageRead, ...] = "features", "tokens", "all_tokens", "pixels"
TEXT_READS: tuple[TextRead, ...] = "features", "embeddings", "blocks"

# What a site needs of an image and of a class; the first of the above for sites that are not named here.
IMAGE_OF: dict[Site, ImageRead] = {
    "patch_tokens": "tokens",
    "pixels": "pixels",
    "visual_tokens": "pixels",
    "image_adapters": "pixels",
    "image_blocks": "pixels",
}
TEXT_OF: dict[Site, TextRead] = {
    "text_tokens": "embeddings",
    "conditional_tokens": "embeddings",
    "text_adapters": "embeddings",
    "text_blocks": "blocks",
}

# Sites in front of which the towers are frozen, or in which clients differ only by tokens at the input of a text. With
# conditional tokens, which depend on the image or the class, a single client already has many times as many tokens.
STACKABLE: frozenset[Site] = frozenset(("image_feature", "head", "patch_tokens", "text_tokens"))


@dataclass(frozen=True)
class Reads:
    """What a method reads.

    Attributes:
        image: of an image, its `features` (D,), projected and not normalized; the patch `tokens` (T, D) of the frozen
            tower, projected; `all_tokens` (1 + T, D), the features and then the patch tokens; or its `pixels`
            (3, H, W) as bytes, if gradients pass through the image tower.
        text: of a class, its text `features` (D,), the class embedding; token `embeddings`, if gradients pass through
            the frozen text tower; or `blocks`, if layers of the text tower are trained too.
    """

    image: ImageRead = "features"
    text: TextRead = "features"

    @property
    def representations(self) -> tuple[str, ...]:
        """The representations of an image of which `image` consists."""
        return ("features", "tokens") if self.image == "all_tokens" else (self.image,)

    @property
    def towers(self) -> bool:
        """Whether clients compute with a tower."""
        return self.image == "pixels" or self.text != "features"


def stackable(sites: Iterable[Site]) -> bool:
    """Whether clients can share the calls of a tower, because only the tokens of texts differ between them."""
    return STACKABLE.issuperset(sites)


def reads_of(sites: Iterable[Site]) -> Reads:
    """What is enough for all of the sites."""
    sites = list(sites)
    images: list[ImageRead] = ["features", *(IMAGE_OF[site] for site in sites if site in IMAGE_OF)]
    if {"image_feature", "patch_tokens"}.issubset(sites):
        images.append("all_tokens")
    texts: list[TextRead] = ["features", *(TEXT_OF[site] for site in sites if site in TEXT_OF)]
    return Reads(max(images, key=IMAGE_READS.index), max(texts, key=TEXT_READS.index))
