"""The state of torch that a program may have changed around a call, as torch has it by default."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_torch() -> Generator[None]:
    """Run with torch's own defaults, and put back what the caller has.

    That is: the default device (also of `with torch.device(…)`), the default dtype, autocast and
    the inference mode. Gradients are off.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as state:
        if torch.get_default_device().type != "cpu":
            state.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            state.enter_context(torch.inference_mode(False))
        state.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                state.enter_context(torch.autocast(device, enabled=False))
        if dtype != torch.float32:  # of the whole process: other threads see it too
            torch.set_default_dtype(torch.float32)
            state.callback(torch.set_default_dtype, dtype)
        yield
