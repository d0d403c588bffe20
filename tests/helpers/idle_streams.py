"""Engines that leave asynchronous scheduling on."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

pytest.importorskip("vllm")
from vllm.platforms.cpu import CpuPlatform


class Idle:
    """A CUDA stream or event on a machine without CUDA: everything has already happened."""

    def __init__(self, *args, **kwargs) -> None:
        self.device = torch.device("cpu")

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@contextmanager
def idle_streams():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Stream", "Event", "current_stream"):
            patch.setattr(torch.cuda, name, Idle)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        settle = CpuPlatform.check_and_update_config.__func__

        def asynchronous(cls, config) -> None:
            settle(cls, config)
            config.scheduler_config.async_scheduling = True

        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(asynchronous))
        yield
