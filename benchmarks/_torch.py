"""What the rows of PyTorch libraries share: threads, and bytes by the profiler's account."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from . import _harness


def start() -> Any:
    """PyTorch, told to use the cores that JAX uses and to keep its log, and torchopt's warnings, to itself."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    import torch

    torch.set_num_threads(_harness.cores())
    return torch


def memory(function: Callable[[], Any]) -> dict[str, int | None]:
    """Bytes of one call: the most that PyTorch held at once beyond what it held before."""
    torch = start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"temp": None, "output": None, "generated_code": None, "total": peak, "peak": peak}


class Eager:
    """A row's function of no arguments that are not its own: called with the group's, it runs ``compute``.

    Args:
        compute: ``() -> (value, gradient)`` as arrays of NumPy.
    """

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute

    def __call__(self, *_: Any) -> Any:
        return self.compute()

    def memory(self) -> dict[str, int | None]:
        return memory(self.compute)
