"""Ray as tests start it themselves: a second time where the first fails.

Ray gives the start of a machine 30 s, and one that other tests keep busy may need more. What the first start has left
running ends with this process.
"""

from collections.abc import Callable
from typing import Any

# Options of a `Cluster` that skip processes which no test needs. Each uses CPU time to start, and while it is idle.
QUIET = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


def started(start: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`start(*args, **options)`, such as `ray.init` or a `Cluster`."""
    import ray

    assert not ray.is_initialized()  # or the second start would follow the end of another test's cluster
    try:
        return start(*args, **options)
    except Exception:  # Ray raises a bare one
        ray.shutdown()
        return start(*args, **options)
