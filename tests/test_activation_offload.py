"""Laws of scripts/model/activation_offload.py: inputs leave the device, come back one block ahead, and are released."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from test_decoder import TINY, fresh, loss_of, paths, take_path

from scripts.model import decoder as decoder_module
from scripts.model.activation_offload import BlockInputOffload
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
            def __init__(self, device: torch.device, num_blocks: int) -> None:
                super().__init__(device, num_blocks)
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
