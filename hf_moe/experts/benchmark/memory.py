"""Peak memory of a call, from torch's own record of what it allocated and freed."""

from collections.abc import Callable
from typing import Any

import torch


__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time while `function()` ran, beyond what was there before.

    The buffers our kernels keep between calls are given back first, so that they count.

    Args:
        function (`Callable`): What to measure; its result is kept until the end.

    Returns:
        `int`: Bytes on the CPU.

    Example:
        ```python
        peak_bytes(lambda: torch.zeros(1024))  # 4096
        ```
    """
    from hf_moe.experts.kernels.workspace import workspace

    workspace.clear()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    del result
    return peak
