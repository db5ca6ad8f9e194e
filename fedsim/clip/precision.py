"""The precision in which CLIP's towers compute."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The kernels that a GPU has for float32. The others are for half precision only, and their backward passes add in no
# fixed order.
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def autocast(precision: Precision, device: str) -> Iterator[None]:
    """The context of a tower's forward pass: in bf16 and fp16 that of torch.autocast, in fp32 none.

    Weights stay float32. torch chooses what is computed in half precision: matrix products and convolutions, but not
    layer norms.
    """
    if precision == "fp32":
        yield
        return
    kind = torch.device(device).type
    with torch.autocast(kind, HALVES[precision]), sdpa_kernel(ATTENTION) if kind == "cuda" else nullcontext():
        yield


def check_device(precision: Precision, device: str) -> None:
    """Raises InputError if the device does not have this precision. CPUs have all of them, though some are slow."""
    # Where a GPU has no bfloat16, torch would emulate it, more slowly than it computes in float32.
    cuda = torch.device(device).type == "cuda"
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(
            f"--precision bf16 needs a GPU that computes in bfloat16 (NVIDIA's do since Ampere), and "
            f"{torch.cuda.get_device_name()} does not; give --precision fp32, or fp16 where no tower is trained through"
        )
