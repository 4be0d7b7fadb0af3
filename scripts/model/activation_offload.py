"""Block inputs in host memory between forward and backward. Knows tensors and streams; no layers.

Without CUDA the copies are made within host memory, at once and unpinned: that saves nothing, and the results are the same.
"""

import weakref
from collections import deque
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class _Placeholder(NamedTuple):
    """What autograd keeps in place of a block's input; `x` is None where the input is on the host."""

    layer: int
    x: Tensor | None


class _Copying(NamedTuple):
    """A copy that may be under way: its tensor on the device, and the event that marks its end, None without CUDA."""

    x: Tensor
    done: torch.cuda.Event | None


class HostInputs:
    """The host memory of a model's block inputs, made once by device, shape and dtype and used again in every micro-batch."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.device, torch.Size, torch.dtype], deque[Tensor]] = {}

    def of(self, device: torch.device, shape: torch.Size, dtype: torch.dtype) -> deque[Tensor]:
        """The tensors of this shape and dtype that no forward uses now. Whoever takes some gives them back."""
        return self._free.setdefault((device, shape, dtype), deque())

    def prepare(self, device: torch.device, shape: torch.Size, dtype: torch.dtype, number: int) -> list[Tensor]:
        """Makes `number` tensors ahead of the first forward, and returns them."""
        free = self.of(device, shape, dtype)
        free.extend(host_empty(shape, dtype, device) for _ in range(number - len(free)))
        return list(free)


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Host memory (n,) uint8, page-locked for a GPU, so that copies run beside the GPU's kernels.

    Where no more can be page-locked (WSL2 allows 0.5 to 1 GiB, microsoft/WSL#14078) it is pageable: copies then take longer and
    the host waits for them, and every result is the same. `Tensor.is_pinned` tells.
    """
    if device.type == "cuda":
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as fault:
            if "out of memory" not in str(fault):
                raise
    return torch.empty(num_bytes, dtype=torch.uint8)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the memory in which tensors lie; what several share counts once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def host_empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`host_buffer` as a tensor of a shape and dtype."""
    return host_buffer(shape.numel() * dtype.itemsize, device).view(dtype).view(shape)


class BlockInputOffload:
    """Holds the inputs of all blocks but the last on the host, from each block's forward to its backward, for one forward.

    In the backward each input is fetched while the block after it is still computing. On CUDA a stream of its own copies, to
    and from page-locked memory. The compute stream waits for a copy to the host before the input's memory is used again, and
    the copying stream waits for the compute stream before it fetches into memory of its own. So no `record_stream` is needed,
    which would hold the memory until the GPU has caught up with the host. Host memory comes from `host_inputs` and goes back
    there when this is gone; the copying stream keeps the order of those who use it.
    """

    def __init__(self, x: Tensor, num_blocks: int, host_inputs: HostInputs) -> None:
        self.device, self.num_blocks = x.device, num_blocks
        self.stream = _copying_stream(x.device) if x.device.type == "cuda" else None
        self.offloaded: list[Tensor] = []
        self.leaving: _Copying | None = None
        self.fetched: dict[int, _Copying] = {}
        self._free = host_inputs.of(x.device, x.shape, x.dtype)
        weakref.finalize(self, self._free.extend, self.offloaded)

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which to call each block's `checkpoint`, first block first."""
        return torch.autograd.graph.saved_tensors_hooks(self._offload, self._restore)

    def fetch(self, layer: int) -> None:
        """Starts the copy of a block's input back to the device."""
        host = self.offloaded[layer]
        with torch.cuda.stream(self.stream):
            x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.fetched[layer] = _Copying(x, self._copy(host, x))

    def _offload(self, x: Tensor) -> Tensor | _Placeholder:
        """Starts the copy of the next block's input to the host, and lets go of the input before it."""
        if not x.numel():
            return x
        if self.leaving is not None:
            self._wait_for(self.leaving.done)
            self.leaving = None
        layer = len(self.offloaded)
        if layer == self.num_blocks - 1:
            return _Placeholder(layer, x.detach())
        host = self._free.popleft() if self._free else host_empty(x.shape, x.dtype, self.device)
        self.leaving = _Copying(x.detach(), self._copy(x, host))
        self.offloaded.append(host)
        return _Placeholder(layer, None)

    def _restore(self, kept: Tensor | _Placeholder) -> Tensor:
        """The input of a block whose backward begins; starts to fetch that of the block before it."""
        if isinstance(kept, Tensor):
            return kept
        x = kept.x
        if x is None:
            if kept.layer not in self.fetched:
                self.fetch(kept.layer)
            x, done = self.fetched.pop(kept.layer)
            self._wait_for(done)
        if kept.layer:
            self.fetch(kept.layer - 1)
        return x

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            done.record()
        return done

    def _wait_for(self, done: torch.cuda.Event | None) -> None:
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
