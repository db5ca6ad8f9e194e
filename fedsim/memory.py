"""Memory of fedsim's processes: freed memory is kept, and garbage is collected less often."""

import ctypes
import gc

GC_THRESHOLD = 20_000  # new objects, after which Python looks for cyclic garbage among them


def keep_freed_memory() -> None:
    """Has the C library keep up to 1 GiB of freed memory; the kernel would otherwise map large tensors at every step.

    Measured: a quarter of the time of a client with 525,312 parameters, and a third of the time of encoding with the
    embedded CLIP, whose peak memory grows by 15 percent. Only glibc has the call.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX: never use mmap; M_MMAP_THRESHOLD cannot exceed 32 MiB
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def collect_seldom() -> None:
    """Has Python look for cyclic garbage after 20,000 new objects, instead of 700 (2,000 since Python 3.13).

    For commands and actors, not for the processes of users: the modules alone are hundreds of thousands of objects,
    none of them garbage. Measured with Python 3.11: saves a tenth of the CPU time of a run of one round in one process,
    a twentieth of one on an actor, at the same peak memory.
    """
    gc.set_threshold(GC_THRESHOLD)
