"""The rendezvous of torchrun, and NCCL's communicator as torch.distributed has it. Only where there are GPUs."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from datetime import timedelta
from typing import Any

from ...errors import EXIT_BAD_INPUT

CAPSULE = b"ncclComm_t"
"""the name that TensorRT's Python binding expects of the capsule"""

FAILED = "failed"


def _leave() -> None:
    """End this process without waiting for its GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_BAD_INPUT)


class TorchMeeting:
    """Ranks that torchrun started, through the store of torch.distributed's default group."""

    def __init__(self, device: Any, timeout_s: float) -> None:
        import torch
        from torch import distributed

        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", timeout=timedelta(seconds=timeout_s), device_id=device)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._device = device
        self._store: Any = distributed.distributed_c10d._get_default_store()

    def share(self, topic: str, text: str) -> None:
        """See `Meeting.share`."""
        self._store.set(f"gqa_export/{topic}/{self.rank}", text)
        if topic == FAILED:
            atexit.register(_leave)  # a kernel of NCCL that waits for the others would keep this process for ever

    def look(self, topic: str, rank: int) -> str | None:
        """See `Meeting.look`."""
        key = f"gqa_export/{topic}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def communicator(self) -> Any:
        """The capsule of the default group's ncclComm_t, which exists from its first collective on."""
        from torch import distributed

        distributed.barrier(device_ids=[self._device.index])
        backend: Any = distributed.group.WORLD._get_backend(self._device)  # type: ignore[union-attr]
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(backend._comm_ptr(), CAPSULE, None)
