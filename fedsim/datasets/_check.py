"""Finds images that cannot be decoded, before hours are spent on the others.

Source: ours.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

from PIL import ImageFile

from fedsim.datasets import Images
from fedsim.datasets._pictures import decode


def unreadable(images: Images, threads: int | None = None) -> list[tuple[int, str]]:
    """Decodes every image, JPEG at an eighth of its size: all bytes are still read, few pixels made.

    Args:
        threads: number of decoding threads, which Pillow lets run in parallel (default: one per CPU).

    Returns:
        (index, reason) of each corrupt, truncated or missing file, in order.

    Raises:
        RuntimeError: Pillow is set to accept truncated files, so none would be found.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("ImageFile.LOAD_TRUNCATED_IMAGES is on; truncated images would look whole")
    # In blocks: a future for each of 0.6 million images would take more memory than the images' names.
    blocks = [range(start, min(start + 64, len(images))) for start in range(0, len(images), 64)]
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # for example about EXIF data: a file is readable or it is not
        faults = pool.map(lambda block: [(row, _fault(images.files[row])) for row in block], blocks)
        return [(row, fault) for block in faults for row, fault in block if fault]


def _fault(file) -> str | None:
    try:
        decode(file, small=True)
    except ValueError as error:
        return str(error)
