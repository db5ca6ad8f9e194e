"""From a file to a picture that CLIP's preprocessing takes as it takes its own.

A picture keeps the mode of its file (palette, 1 bit, CMYK, ...): open_clip's preprocessing, and with it FedCLIP's
authors, resize first and convert to RGB after. As there, the first of several frames counts, transparency is dropped
and the orientation in EXIF data is not applied.

Differs: integers of 16 bits and floats become 8 bits by their range; open_clip clips them, to white or black.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

VERSION = 2  # of what is made of a file: a part of every cache key
DARKEST = 16  # of 255: what no pixel exceeds is no picture, or one of another range


def decode(file: Path | bytes, small: bool = False) -> Image.Image:
    """The first frame of an image file, in the mode of the file or, where that has more than 8 bits, as RGB.

    Args:
        file: a path, or the bytes of the file.
        small: JPEG at an eighth of its size, which reads all bytes and makes few pixels.

    Raises:
        ValueError: the file cannot be used. The message says why, in the same words each time.
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
    except OSError as error:  # of the disk, or Pillow's word for damage
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
    """Refuses drawings in black on transparency, which are black on black without it."""
    if not picture.has_transparency_data:
        return
    whole = picture.convert("RGBA")
    bands: Any = whole.getextrema()  # (lowest, highest) of each
    low, high = bands[3]
    # Resizing weights colours by alpha, but only where alpha is a channel and not an entry of a palette.
    seen = whole.convert("RGBa") if "A" in picture.getbands() else picture.convert("RGB")
    colours: Any = seen.getextrema()
    if low < high and all(first == last or last == 0 for first, last in colours[:3]):
        raise ValueError("its pixels differ only in transparency, which CLIP does not see; put it on a background")
