"""Laws of scripts/model/activation_offload.py: inputs leave the device, come back one block ahead, and are released."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_decoder import TINY, fresh, loss_of, paths, take_path

from scripts.model import decoder as decoder_module
from scripts.model.activation_offload import BlockInputOffload, HostInputs, host_buffer, storage_bytes
from scripts.model.decoder import Block, Decoder


def blocks_of(decoder: Decoder) -> list[Block]:
    return [block for block in decoder.model.layers if isinstance(block, Block)]


class Inputs:
    """Watches the storages of the blocks' inputs: those that a forward made, and those that are fetched."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref] = []
        self.fetched: dict[int, weakref.ref] = {}
        self.offloads: list[weakref.ref] = []
        self.most_fetched = 0
        watch = self

        class Watched(BlockInputOffload):
            def __init__(self, x: torch.Tensor, num_blocks: int, host_inputs: HostInputs) -> None:
                super().__init__(x, num_blocks, host_inputs)
                watch.offloads.append(weakref.ref(self))

            def fetch(self, layer: int) -> None:
                super().fetch(layer)
                watch.fetched[layer] = weakref.ref(self.fetched[layer].x.untyped_storage())
                watch.most_fetched = max(watch.most_fetched, watch.num_fetched())

        monkeypatch.setattr(decoder_module, "BlockInputOffload", Watched)
        for block in blocks_of(decoder):
            block.register_forward_pre_hook(lambda block, inputs: self.made.append(weakref.ref(inputs[0].untyped_storage())))

    def alive(self) -> list[bool]:
        return [storage() is not None for storage in self.made]

    def num_fetched(self) -> int:
        return sum(storage() is not None for storage in self.fetched.values())

    def shapes_on_host(self) -> list[tuple[int, ...]]:
        offload = self.offloads[0]()
        return [] if offload is None else [tuple(host.shape) for host in offload.offloaded]


@paths
def test_offloaded_inputs_leave_the_device_and_come_back_one_block_ahead(monkeypatch, on_host):
    take_path(monkeypatch, on_host)
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=5))
    inputs, at_gradient = Inputs(decoder, monkeypatch), {}
    for layer, block in enumerate(blocks_of(decoder)):
        weight = block.mlp.down_proj.weight
        weight.register_post_accumulate_grad_hook(lambda _, layer=layer: at_gradient.update({layer: sorted(inputs.fetched)}))
    loss = loss_of(decoder, 3)
    assert inputs.alive() == [False] * 4 + [True]
    assert inputs.shapes_on_host() == [(3, 24, 32)] * 4
    assert inputs.num_fetched() == 0
    loss.backward()
    assert at_gradient == {layer: list(range(max(0, layer - 1), 4)) for layer in range(5)}
    assert inputs.most_fetched == 2
    del loss
    assert inputs.num_fetched() == 0 and inputs.offloads[0]() is None and not any(inputs.alive())


def test_offloaded_inputs_are_released_when_no_backward_comes(monkeypatch):
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=3))
    inputs = Inputs(decoder, monkeypatch)
    gc.disable()
    try:
        loss_of(decoder, 2)
        assert not any(inputs.alive()) and inputs.offloads[0]() is None
        failing = blocks_of(decoder)[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            loss_of(decoder, 2)
    finally:
        gc.enable()
    gc.collect()
    assert not any(inputs.alive()) and inputs.offloads[1]() is None
    failing.remove()
    with torch.no_grad():
        loss_of(decoder, 2)
    assert len(inputs.offloads) == 2


def fail(*_) -> None:
    raise RuntimeError("on purpose")


def places(decoder: Decoder, rows: int) -> list[int]:
    """Where the free host memory for block inputs of this many rows lies, in the order in which a forward takes it."""
    x = torch.empty(rows, 24, 32)
    return [host.data_ptr() for host in decoder.host_inputs.of(x.device, x.shape, x.dtype)]


def test_host_memory_of_the_inputs_is_made_once_and_used_in_every_micro_batch():
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=4))
    made = decoder.host_inputs.prepare(torch.device("cpu"), torch.Size((3, 24, 32)), torch.float32, 3)
    for step in range(4):
        assert places(decoder, 3) == [host.data_ptr() for host in made]
        loss = loss_of(decoder, 3)
        assert places(decoder, 3) == []
        loss.backward()
        if step == 1:
            loss_of(decoder, 2).backward()
        del loss
    assert len(places(decoder, 2)) == 3


def test_forward_that_is_still_waiting_for_its_backward_keeps_its_inputs():
    """Two forwards, then their backwards: the gradients are those of each alone."""
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=4))
    weight, alone = blocks_of(decoder)[0].mlp.down_proj.weight, []
    for rows in (2, 3):
        alone += torch.autograd.grad(loss_of(decoder, rows), weight)
    first, second = loss_of(decoder, 2), loss_of(decoder, 3)
    for number, loss in ((1, second), (0, first)):
        assert torch.equal(torch.autograd.grad(loss, weight)[0], alone[number])
    del first, second
    assert len(places(decoder, 3)) == 3
    first, second = loss_of(decoder, 3), loss_of(decoder, 3)
    assert torch.equal(torch.autograd.grad(first, weight)[0], alone[1])
    del first, second
    assert len(set(places(decoder, 3))) == 6


def test_bytes_of_tensors_in_the_same_memory_count_once():
    memory, other = torch.empty(10), torch.empty(3, dtype=torch.bfloat16)
    assert storage_bytes([memory[:4], memory[4:], other]) == 40 + 6 and storage_bytes([]) == 0


def test_host_memory_that_cannot_be_page_locked_is_pageable(monkeypatch):
    """This machine has no GPU, so that torch refuses to lock; what it says where there is no more to lock is told by hand."""
    cuda, empty = torch.device("cuda", 0), torch.empty
    assert not host_buffer(100, torch.device("cpu")).is_pinned()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            host_buffer(100, cuda)

    def refusing(*sizes, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    assert host_buffer(100, cuda).shape == (100,)
