"""Decodes image files for CLIP's preprocessing.

A picture keeps the mode of its file (palette, 1 bit, CMYK, ...): open_clip's preprocessing, which FedCLIP's authors
use, first resizes and then converts to RGB. As there, only the first frame is used, transparency is dropped and the
orientation in EXIF data is ignored.

Differs: 16-bit integers and floats are scaled to 8 bits by their range; open_clip clips them, to white or black.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

VERSION = 2  # of the decoding, part of every cache key
DARKEST = 16  # of 255: an image whose pixels are all darker is empty, or has another range of values


def decode(file: Path | bytes, small: bool = False) -> Image.Image:
    """The first frame of an image file, in the mode of the file or, where that has more than 8 bits, as RGB.

    Args:
        file: a path, or the bytes of the file.
        small: decode JPEG at an eighth of its size, which reads all bytes but computes few pixels.

    Raises:
        ValueError: the file cannot be used. The message is the same each time.
    """
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            if small:
                image.draft(None, (1, 1))
            image.load()
            picture = _eight_bits(image)
            _check_visible(picture)
            return picture
    except UnidentifiedImageError:  # its message may hold a memory address
        empty = not (len(file) if isinstance(file, bytes) else file.stat().st_size)
        raise ValueError("the file is empty" if empty else "no known image format") from None
    except Image.DecompressionBombError:
        limit = f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        raise ValueError(f"more than {limit} pixels, Pillow's limit against files that fill the memory") from None
    except OSError as error:  # an error of the disk, or Pillow's error for damaged files
        raise ValueError(error.strerror or str(error)) from None
    except Exception as error:  # decoders raise whatever the bad bytes lead to: struct.error, IndexError, ...
        raise ValueError(str(error) or type(error).__name__) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    full = 65535 if image.mode.startswith("I") else 1 if high <= 1 else 255
    # NaN fails these comparisons too.
    if not (low >= 0 and DARKEST / 255 * full <= high <= full):
        raise ValueError(
            f"its values are from {low:g} to {high:g} and their range is not known (0 to {full} would make the picture "
            "black, white or cut off); save it with 8 bits"
        )
    return Image.fromarray((values * (255 / full) + 0.5).astype(np.uint8)).convert("RGB")


def _check_visible(picture: Image.Image) -> None:
    """Refuses black drawings on a transparent background, which are all black without transparency."""
    if not picture.has_transparency_data:
        return
    whole = picture.convert("RGBA")
    bands: Any = whole.getextrema()  # (lowest, highest) of each
    low, high = bands[3]
    # Resizing weights colours by alpha, but only if alpha is a channel, not an entry of a palette.
    visible = whole.convert("RGBa") if "A" in picture.getbands() else picture.convert("RGB")
    colours: Any = visible.getextrema()
    if low < high and all(first == last or last == 0 for first, last in colours[:3]):
        raise ValueError("its pixels differ only in transparency, which CLIP does not see; put it on a background")
