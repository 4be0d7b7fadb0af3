"""Laws of scripts/model/decoder.py: causality, what the backward keeps, weights from a seed alone, groups of parameters."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from scripts.config import TrainingConfig
from scripts.model import losses, operations
from scripts.model.decoder import Decoder, empty_model, initialise, parameter_groups
from scripts.model.losses import next_token_loss

CPU = torch.device("cpu")
TINY = TrainingConfig(
    vocab_size=300, context_length=24, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
    tokens_per_step=24, micro_batch_rows=1, eval_tokens=24, precision="fp32", init_std=0.2, logits_init_std=2.0,
)  # fmt: skip
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
        monkeypatch.setattr(operations, "on_host", lambda x: False)
        monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)


def some_ids(config: TrainingConfig, rows: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, positions), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return functional.linear(model(ids), model.head)


def loss_of(decoder: Decoder, rows: int) -> torch.Tensor:
    ids = some_ids(decoder.config, rows, 25)
    return next_token_loss(decoder(ids[:, :-1]), decoder.head, ids[:, 1:], 7)


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return fresh(TINY)


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


@paths
@pytest.mark.parametrize(("qk_norm", "head_size"), [(False, 8), (True, 8), (False, 14), (True, 14)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_kept_for_the_backward_are_those_of_the_formula(monkeypatch, mode, precision, qk_norm, head_size, on_host):
    take_path(monkeypatch, on_host)
    changes = {"activation_checkpointing": mode, "precision": precision, "qk_norm": qk_norm, "head_size": head_size}
    config = replace(TINY, num_layers=3, **changes)
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
    block = bytes_of_block(config, on_host)
    inputs = {"none": config.num_layers * block, "block": config.num_layers * bytes_of_input(config)}
    last_norm = bytes_of_input(config) + 4
    rotary, ids = positions * config.head_width * 4, rows * positions * 8
    # The inputs of block_offload have hooks of their own, so that these see nothing of them.
    assert sum(kept.values()) == rows * positions * (inputs.get(mode, 0) + last_norm) + (mode == "none") * rotary + ids
    assert hidden.requires_grad


def bytes_of_input(config: TrainingConfig) -> int:
    return config.hidden_size * config.dtype.itemsize


def bytes_of_block(config: TrainingConfig, on_host: bool) -> int:
    """The formula of `Block`, a token."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_width
    padded = width if on_host else -(-width // 8) * 8
    read = kv_heads if on_host or config.precision == "bf16" else heads
    numbers = 2 * config.hidden_size + (2 * heads + 2 * read) * padded + 2 * config.mlp_size
    numbers += heads * width * (padded > width)
    sums = 0 if on_host else 4 * heads
    if config.qk_norm:
        return (numbers + (heads + kv_heads) * width) * config.dtype.itemsize + 4 * (heads + kv_heads) + sums
    return numbers * config.dtype.itemsize + sums


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_through_a_graph_that_was_kept_adds_the_same_gradients(mode):
    decoder = fresh(replace(TINY, activation_checkpointing=mode, num_layers=3))
    loss = decoder(some_ids(TINY, 2, 24)).square().mean()
    weights = list(decoder.model.parameters())
    once, again = torch.autograd.grad(loss, weights, retain_graph=True), torch.autograd.grad(loss, weights)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


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
def test_every_parameter_is_in_one_group_matrices_decay_and_norms_do_not(config):
    model = empty_model(config, CPU)
    groups = parameter_groups(model, 0.25)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    for group in groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] == 0.25 else {1})
    assert max(len(group["params"]) for group in groups[:-1]) == 7 and groups[-1]["weight_decay"] == 0.0


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
