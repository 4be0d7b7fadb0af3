"""Laws of scripts/model.py: transformers' own numbers, causality, a cache that changes nothing, weights from a seed alone."""

import gc
import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from scripts import losses, model
from scripts.checkpoint import described_config, load_weights
from scripts.config import TrainingConfig
from scripts.losses import next_token_loss
from scripts.model import (
    Block,
    Decoder,
    architecture_fields,
    continue_ids,
    empty_model,
    initialise,
    new_cache,
    parameter_groups,
    tensor_shapes,
    transformers_config,
)

CPU = torch.device("cpu")
TINY = TrainingConfig(
    vocab_size=300, context_length=24, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
    tokens_per_step=24, micro_batch_rows=1, eval_tokens=24, precision="fp32", init_std=0.2, logits_init_std=2.0,
)  # fmt: skip
LLAMA = transformers_config(replace(TINY, qk_norm=False), 256)
MODES = ("none", "block", "block_offload")
paths = pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])


@st.composite
def configs(draw) -> TrainingConfig:
    kv_heads, head_size = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8, 16]))
    heads, context, qk_norm = kv_heads * draw(st.integers(1, 3)), draw(st.integers(2, 33)), draw(st.booleans())
    return TrainingConfig(
        hidden_size=draw(st.integers(4, 64)) if qk_norm else heads * draw(st.integers(1, 8)),
        num_heads=heads, num_kv_heads=kv_heads, head_size=head_size,
        mlp_size=draw(st.integers(1, 80)), num_layers=draw(st.integers(1, 3)), vocab_size=draw(st.integers(257, 400)),
        qk_norm=qk_norm, tie_embeddings=draw(st.booleans()), rope_theta=draw(st.sampled_from([1e2, 1e4, 1e6])),
        rope_scaling=draw(st.sampled_from([None, (8.0, 1.0, 4.0, 16), (32.0, 1.0, 3.0, 9)])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])), context_length=context, tokens_per_step=context,
        micro_batch_rows=1, seed=draw(st.integers(0, 2**32 - 1)), precision="fp32", init_std=0.2, logits_init_std=2.0,
    )  # fmt: skip


def fresh(config: TrainingConfig) -> Decoder:
    """Weights of a seed, norms too: a norm whose weight is 1 would hide that it is not used."""
    model = initialise(empty_model(config, CPU))
    generator = torch.Generator().manual_seed(config.seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    return model


def take_path(monkeypatch: pytest.MonkeyPatch, on_host: bool) -> None:
    """Chooses what is computed and kept on a GPU also for tensors of the CPU."""
    if not on_host:
        monkeypatch.setattr(model, "_on_host", lambda x: False)
        monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)


def some_ids(config: TrainingConfig, rows: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return functional.linear(model(ids), model.head)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5, measured on the scale of the logits."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return fresh(TINY)


@given(config=configs(), rows=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=20)
def test_exported_model_gives_the_same_logits_in_transformers(tmp_path_factory, config, rows, data):
    folder, model = tmp_path_factory.mktemp("ours"), fresh(config)
    theirs = AutoModelForCausalLM.from_pretrained(written(model, folder))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert theirs.dtype == torch.float32
    assert sum(weight.numel() for weight in theirs.parameters()) == config.num_parameters
    assert_same_logits_and_gradients(model, theirs, some_ids(config, rows, data.draw(st.integers(1, config.context_length))))


@given(config=configs(), rows=st.integers(1, 3), sharded=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=20)
def test_transformers_own_folder_gives_the_same_logits_here(tmp_path_factory, config, rows, sharded, data):
    folder, described = tmp_path_factory.mktemp("theirs"), transformers_config(config, 256)
    torch.manual_seed(config.seed)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**described, "initializer_range": 0.2})).eval()
    theirs.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    assert not sharded or config.num_parameters < 10_000 or len(list(folder.glob("*.safetensors"))) > 1
    found = described_config(folder)
    for name in (*architecture_fields(described), "context_length", "precision"):
        assert getattr(found, name) == getattr(config, name), name
    model = empty_model(found, CPU)
    load_weights(model, folder)
    assert_same_logits_and_gradients(model, theirs, some_ids(config, rows, data.draw(st.integers(1, config.context_length))))


@paths
@pytest.mark.parametrize("qk_norm", [False, True])
def test_positions_beyond_one_chunk_of_the_host_kernels_give_transformers_logits_and_gradients(
    tmp_path, monkeypatch, qk_norm, on_host
):
    config = replace(TINY, qk_norm=qk_norm, context_length=700, tokens_per_step=700, eval_tokens=700)
    decoder = fresh(config)
    theirs = AutoModelForCausalLM.from_pretrained(written(decoder, tmp_path))
    take_path(monkeypatch, on_host)
    assert_same_logits_and_gradients(decoder, theirs, some_ids(config, 3, 700))


@paths
@pytest.mark.parametrize("tied", [False, True])
def test_bf16_gradients_are_near_those_of_fp32(monkeypatch, tied, on_host):
    take_path(monkeypatch, on_host)
    narrow = fresh(replace(TINY, precision="bf16", tie_embeddings=tied, init_std=0.05))
    wide, ids = empty_model(replace(narrow.config, precision="fp32"), CPU), some_ids(TINY, 8, 25)
    wide.load_state_dict(narrow.state_dict())
    for decoder in (narrow, wide):
        next_token_loss(decoder(ids[:, :-1]), decoder.head, ids[:, 1:], 50).backward()
    for (name, weight), exact in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert weight.grad is not None and exact.grad is not None and weight.grad.dtype == torch.bfloat16
        assert (weight.grad - exact.grad).norm() < 0.03 * exact.grad.norm(), name


def written(model: Decoder, folder: Path) -> Path:
    save_file(
        {name: weight.detach() for name, weight in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(transformers_config(model.config, 256)))
    return folder


def assert_same_logits_and_gradients(model: Decoder, theirs, ids: torch.Tensor) -> None:
    """Training and inference may take different kernels, so both are compared."""
    assert_same(logits_of(model, ids), theirs(ids).logits.detach())
    slope = torch.randn((*ids.shape, model.config.vocab_size), generator=torch.Generator().manual_seed(0))
    logits = functional.linear(model(ids), model.head)
    assert_same(logits.detach(), theirs(ids).logits.detach())
    (logits * slope).sum().backward()
    (theirs(ids).logits * slope).sum().backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in model.named_parameters():
        assert (weight.grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-4, name


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("width", "layers", "vocab_size"), [(64, 2, 257), (128, 12, 4096), (512, 2, 4096), (2048, 1, 1000)])
def test_initial_loss_is_that_of_the_uniform_distribution(width, layers, vocab_size, tied, qk_norm):
    config = TrainingConfig(
        hidden_size=width, num_layers=layers, num_heads=4, num_kv_heads=2, vocab_size=vocab_size, mlp_size=width,
        tie_embeddings=tied, qk_norm=qk_norm, precision="fp32",
    )  # fmt: skip
    model, ids = initialise(empty_model(config, CPU)), some_ids(config, 2, 65)
    with torch.no_grad():
        loss = next_token_loss(model(ids[:, :-1]), model.head, ids[:, 1:], 1024).item()
    assert loss == pytest.approx(math.log(vocab_size), rel=0.02)


@given(data=st.data(), changed=st.integers(0, 23), training=st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_future_token_moves_a_past_logit_and_every_present_one_moves(tiny, data, changed, training):
    ids = some_ids(TINY, 2, 24, data.draw(st.integers(0, 99)))
    other = ids.clone()
    other[0, changed:] = (other[0, changed:] + data.draw(st.integers(1, 299))) % 300
    with torch.set_grad_enabled(training):
        before, after = (functional.linear(tiny(each), tiny.head).detach() for each in (ids, other))
    assert torch.equal(before[0, :changed], after[0, :changed])
    assert torch.equal(before[1], after[1])
    assert (before[0, changed:] != after[0, changed:]).any(-1).all()


def test_every_past_token_moves_the_last_logits(tiny):
    ids = some_ids(TINY, 1, 24)
    for position in range(24):
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % 300
        assert not torch.equal(logits_of(tiny, ids)[0, -1], logits_of(tiny, other)[0, -1])


@paths
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_gives_bitwise_the_same_loss_and_gradients(monkeypatch, precision, qk_norm, on_host):
    take_path(monkeypatch, on_host)
    found = []
    for mode in MODES:
        config = replace(TINY, activation_checkpointing=mode, qk_norm=qk_norm, precision=precision, num_layers=3)
        decoder = fresh(config)
        loss = loss_of(decoder, 3)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in decoder.parameters())])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def loss_of(decoder: Decoder, rows: int) -> torch.Tensor:
    ids = some_ids(decoder.config, rows, 25)
    return next_token_loss(decoder(ids[:, :-1]), decoder.head, ids[:, 1:], 7)


@paths
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_kept_for_the_backward_are_those_of_the_formula(monkeypatch, mode, precision, qk_norm, on_host):
    take_path(monkeypatch, on_host)
    config = replace(TINY, activation_checkpointing=mode, precision=precision, qk_norm=qk_norm, num_layers=3)
    decoder, rows, positions = fresh(config), 3, 24
    own = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder(some_ids(config, rows, positions))
    inputs = {"none": config.num_layers * bytes_of_block(config), "block": config.num_layers * bytes_of_input(config)}
    last_norm = bytes_of_input(config) + 4
    rotary, ids = positions * config.head_width * 4, rows * positions * 8
    # The inputs of block_offload have hooks of their own, so that these see nothing of them.
    assert sum(kept.values()) == rows * positions * (inputs.get(mode, 0) + last_norm) + (mode == "none") * rotary + ids
    assert hidden.requires_grad


def bytes_of_input(config: TrainingConfig) -> int:
    return config.hidden_size * config.dtype.itemsize


def bytes_of_block(config: TrainingConfig) -> int:
    """The formula of `Block`, a token."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
    numbers = 2 * config.hidden_size + (2 * heads + 2 * kv_heads) * width + 2 * config.mlp_size
    if config.qk_norm:
        return (numbers + (heads + kv_heads) * width) * config.dtype.itemsize + 4 * (2 * heads + kv_heads)
    return numbers * config.dtype.itemsize + 4 * heads


def blocks_of(decoder: Decoder) -> list[Block]:
    return [block for block in decoder.model.layers if isinstance(block, Block)]


class Inputs:
    """Watches the storages of the blocks' inputs: those that a forward made, and those that come back."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref] = []
        self.back: dict[int, weakref.ref] = {}
        self.parkings: list[Any] = []
        self.most_back = 0
        watch = self

        class Watched(model._Parking):
            def __init__(self, device: torch.device, num_blocks: int) -> None:
                super().__init__(device, num_blocks)
                watch.parkings.append(weakref.ref(self))

            def _send_for(self, layer: int) -> None:
                super()._send_for(layer)
                watch.back[layer] = weakref.ref(self.arriving[layer][0].untyped_storage())
                watch.most_back = max(watch.most_back, watch.num_back())

        monkeypatch.setattr(model, "_Parking", Watched)
        for block in blocks_of(decoder):
            block.register_forward_pre_hook(lambda block, inputs: self.made.append(weakref.ref(inputs[0].untyped_storage())))

    def alive(self) -> list[bool]:
        return [storage() is not None for storage in self.made]

    def num_back(self) -> int:
        return sum(storage() is not None for storage in self.back.values())


@paths
def test_offloaded_inputs_leave_the_device_and_come_back_one_block_ahead(monkeypatch, on_host):
    take_path(monkeypatch, on_host)
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=5))
    inputs, at_gradient = Inputs(decoder, monkeypatch), {}
    for layer, block in enumerate(blocks_of(decoder)):
        weight = block.mlp.down_proj.weight
        weight.register_post_accumulate_grad_hook(lambda _, layer=layer: at_gradient.update({layer: sorted(inputs.back)}))
    loss = loss_of(decoder, 3)
    assert inputs.alive() == [False] * 4 + [True]
    assert [host.shape for host in inputs.parkings[0]().parked] == [(3, 24, 32)] * 4
    assert inputs.num_back() == 0
    loss.backward()
    assert at_gradient == {layer: list(range(max(0, layer - 1), 4)) for layer in range(5)}
    assert inputs.most_back == 2
    del loss
    assert inputs.num_back() == 0 and inputs.parkings[0]() is None and not any(inputs.alive())


def test_offloaded_inputs_are_released_when_no_backward_comes(monkeypatch):
    decoder = fresh(replace(TINY, activation_checkpointing="block_offload", num_layers=3))
    inputs = Inputs(decoder, monkeypatch)
    gc.disable()
    try:
        loss_of(decoder, 2)
        assert not any(inputs.alive()) and inputs.parkings[0]() is None
        failing = blocks_of(decoder)[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            loss_of(decoder, 2)
    finally:
        gc.enable()
    gc.collect()
    assert not any(inputs.alive()) and inputs.parkings[1]() is None
    failing.remove()
    with torch.no_grad():
        loss_of(decoder, 2)
    assert len(inputs.parkings) == 2


def fail(*_) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_through_a_graph_that_was_kept_adds_the_same_gradients(mode):
    decoder = fresh(replace(TINY, activation_checkpointing=mode, num_layers=3))
    loss = decoder(some_ids(TINY, 2, 24)).square().mean()
    weights = list(decoder.model.parameters())
    once, again = torch.autograd.grad(loss, weights, retain_graph=True), torch.autograd.grad(loss, weights)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@given(borders=st.sets(st.integers(1, 23)), qk_norm=st.booleans(), rows=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
@torch.no_grad()
def test_cached_decoding_in_any_pieces_equals_the_full_forward(borders, qk_norm, rows):
    config = replace(TINY, qk_norm=qk_norm)
    model, ids = fresh(config), some_ids(config, rows, 24)
    cache = new_cache(model, rows, 24)
    pieces = [model(ids[:, start:stop], cache, start) for start, stop in pairwise([0, *sorted(borders), 24])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-5)


def continued(model: Decoder, ids: torch.Tensor, num_tokens: int, temperature=1.0, top_k=300, seed=0) -> list[int]:
    return list(continue_ids(model, ids, num_tokens, temperature, top_k, seed))


def naive_greedy(model: Decoder, ids: torch.Tensor, num_tokens: int) -> Iterator[int]:
    """Without a cache, each token from a full forward; beyond the context the older half is dropped."""
    context, limit = ids.tolist()[-TINY.context_length :], TINY.context_length
    for _ in range(num_tokens):
        if len(context) > limit:
            context = context[-(limit // 2 + 1) :]
        context.append(int(logits_of(model, torch.tensor([context]))[0, -1].argmax()))
        yield context[-1]


@given(prompt_length=st.integers(1, 40), num_tokens=st.integers(1, 60), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=15)
def test_temperature_zero_takes_the_likeliest_id_also_beyond_the_context(tiny, prompt_length, num_tokens, seed):
    prompt = some_ids(TINY, 1, prompt_length, seed)[0]
    # A context no longer than the prompt and its continuation cuts nothing, so the naive loop may use the whole limit.
    assert continued(tiny, prompt, num_tokens, temperature=0.0) == list(naive_greedy(tiny, prompt, num_tokens))


@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=6)
def test_one_seed_gives_one_continuation_and_another_seed_another(tiny, seed, other):
    prompt = some_ids(TINY, 1, 5)[0]
    once = continued(tiny, prompt, 30, seed=seed)
    torch.manual_seed(other)
    assert continued(tiny, prompt, 30, seed=seed) == once
    assert (continued(tiny, prompt, 30, seed=other) == once) == (seed == other)


def test_top_k_of_one_is_greedy_and_no_sample_lies_outside_the_top_k(tiny):
    prompt = some_ids(TINY, 1, 5)[0]
    assert continued(tiny, prompt, 15, top_k=1) == continued(tiny, prompt, 15, temperature=0.0)
    best = set(logits_of(tiny, prompt[None])[0, -1].topk(3).indices.tolist())
    assert {continued(tiny, prompt, 1, temperature=9.0, top_k=3, seed=seed)[0] for seed in range(60)} == best


def test_samples_follow_the_softmax_at_the_temperature(tiny):
    prompt, num_samples = some_ids(TINY, 1, 1)[0], 600
    chances = torch.softmax(logits_of(tiny, prompt[None])[0, -1] / 3.0, 0)
    drawn = torch.tensor([continued(tiny, prompt, 1, temperature=3.0, seed=seed)[0] for seed in range(num_samples)])
    shares = torch.bincount(drawn, minlength=300) / num_samples
    assert ((shares - chances).abs() < 4 * (chances / num_samples) ** 0.5 + 4 / num_samples).all()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes, weights left out; `of_vocabulary` of logits."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.own = {weight.data_ptr() for weight in decoder.parameters()}
        self.of_all = self.of_vocabulary = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() not in self.own:
            self.of_all = max(self.of_all, result.numel())
            if 300 in result.shape:
                self.of_vocabulary = max(self.of_vocabulary, result.numel())
        return result


def test_sampling_never_makes_logits_of_more_than_one_position(tiny):
    with Largest(tiny) as largest:
        continued(tiny, some_ids(TINY, 1, 20)[0], 10)
    assert largest.of_vocabulary == 300


@paths
def test_long_prompt_needs_memory_in_proportion_to_its_length(monkeypatch, on_host):
    take_path(monkeypatch, on_host)
    config = replace(TINY, context_length=2000, tokens_per_step=2000, eval_tokens=2000)
    decoder, sizes = fresh(config), []
    for length in (900, 1800):
        with Largest(decoder) as largest:
            continued(decoder, some_ids(config, 1, length)[0], 3)
        sizes.append(largest.of_all)
    assert sizes[1] <= 2.01 * sizes[0] < 1800 * 1800 / 4


@pytest.mark.parametrize("tied", [False, True])
def test_weights_depend_on_the_seed_alone(tied):
    config = replace(TINY, tie_embeddings=tied)
    once = initialise(empty_model(config, CPU)).state_dict()
    torch.manual_seed(1)
    again = initialise(empty_model(replace(config, learning_rate=0.5, num_steps=77), CPU)).state_dict()
    rounded = initialise(empty_model(replace(config, precision="bf16"), CPU)).state_dict()
    other = initialise(empty_model(replace(config, seed=1), CPU)).state_dict()
    for name, weight in once.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight.bfloat16(), rounded[name])
        assert weight.dim() == 1 or not torch.equal(weight, other[name])


@given(config=configs())
@settings(deadline=None, max_examples=20)
def test_every_parameter_is_in_one_group_matrices_decay_and_norms_do_not(config):
    model = empty_model(config, CPU)
    groups = parameter_groups(model, 0.25)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    for group in groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] == 0.25 else {1})
    assert max(len(group["params"]) for group in groups[:-1]) == 7 and groups[-1]["weight_decay"] == 0.0


@given(config=configs())
@settings(deadline=None, max_examples=20)
def test_tensor_shapes_are_those_of_the_model_and_its_description_leads_back_to_it(config):
    model = empty_model(config, CPU)
    assert dict(tensor_shapes(config)) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    fields = architecture_fields(transformers_config(config, 256))
    assert replace(config, **fields) == config and {*fields} >= {"num_heads", "norm_eps", "rope_theta", "tie_embeddings"}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": "mistral"},
        {"model_type": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"use_sliding_window": True},
    ],
    ids=str,
)
def test_architecture_that_is_not_computed_exactly_is_refused(change):
    architecture_fields(LLAMA)
    with pytest.raises(ValueError, match="^[^\n]+ not supported; [^\n]+$"):
        architecture_fields(LLAMA | change)


def test_one_batch_is_learned_by_heart():
    model = initialise(empty_model(replace(TINY, init_std=0.02, logits_init_std=0.3), CPU))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    ids, loss = some_ids(TINY, 4, 25), torch.tensor(math.inf)
    for _ in range(60):
        optimizer.zero_grad()
        loss = next_token_loss(model(ids[:, :-1]), model.head, ids[:, 1:], 1024)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_reading_a_folder_changes_nothing_in_it(tmp_path, tiny):
    written(tiny, tmp_path)
    before = {path: path.read_bytes() for path in Path(tmp_path).iterdir()}
    load_weights(empty_model(TINY, CPU), tmp_path)
    assert before == {path: path.read_bytes() for path in Path(tmp_path).iterdir()}
