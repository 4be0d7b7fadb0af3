"""Block inputs in host memory between forward and backward. Knows tensors and streams; no layers.

Without CUDA the copies are made within host memory, at once and unpinned: that saves nothing, and the results are the same.
"""

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


class BlockInputOffload:
    """Holds the inputs of all blocks but the last on the host, from each block's forward to its backward, for one forward.

    In the backward each input is fetched while the block after it is still computing. On CUDA a stream of its own copies, to
    and from pinned memory. The compute stream waits for a copy to the host before the input's memory is used again, and the
    copying stream waits for the compute stream before it fetches into memory of its own. So no `record_stream` is needed, which
    would hold the memory until the GPU has caught up with the host.
    """

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        self.device, self.num_blocks = device, num_blocks
        self.stream = _copying_stream(device) if device.type == "cuda" else None
        self.offloaded: list[Tensor] = []
        self.leaving: _Copying | None = None
        self.fetched: dict[int, _Copying] = {}

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
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
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
