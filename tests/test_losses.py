"""Laws of scripts/losses.py: plain cross-entropy in value and gradients, without the logits ever being whole."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scripts import losses
from scripts.losses import IGNORED, next_token_loss, token_nats

SIZES = {
    "rows": st.integers(1, 4),
    "positions": st.integers(1, 9),
    "width": st.integers(1, 12),
    "vocabulary": st.integers(2, 40),
    "chunk_rows": st.integers(1, 40),
    "num_ignored": st.integers(0, 8),
    "seed": st.integers(0, 2**32),
}


def drawn(rows: int, positions: int, width: int, vocabulary: int, num_ignored: int, seed: int, dtype=torch.float32):
    """Hidden (B, T, D) and head (V, D) that want gradients, and targets (B, T) of which at most all but one are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, positions, width, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows * positions,), generator=generator)
    targets[torch.randperm(len(targets), generator=generator)[: min(num_ignored, len(targets) - 1)]] = IGNORED
    return hidden, head, targets.view(rows, positions)


def plain_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten())


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_same(ours, theirs, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Sizes(TorchDispatchMode):
    """Records the elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
        return result


@given(**SIZES)
@settings(deadline=None)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(chunk_rows, **sizes):
    hidden, head, targets = drawn(**sizes)
    ours, theirs = next_token_loss(hidden, head, targets, chunk_rows), plain_loss(hidden, head, targets)
    assert ours.shape == () and ours.dtype == torch.float32
    assert_same(ours, theirs)
    assert_same(gradients(ours, hidden, head), gradients(theirs, hidden, head))


@given(**SIZES)
@settings(deadline=None, max_examples=50)
def test_head_that_is_also_the_embedding_gets_both_gradients(chunk_rows, **sizes):
    _, head, targets = drawn(**sizes)
    ids = targets.clamp(min=0).roll(1, dims=1)
    ours = next_token_loss(torch.tanh(functional.embedding(ids, head)), head, targets, chunk_rows)
    theirs = plain_loss(torch.tanh(functional.embedding(ids, head)), head, targets)
    assert_same(gradients(ours, head), gradients(theirs, head))


@given(**SIZES, factor=st.floats(-100, 100))
@settings(deadline=None, max_examples=50)
def test_slope_from_above_scales_the_gradients(chunk_rows, factor, **sizes):
    hidden, head, targets = drawn(**sizes)
    once = gradients(next_token_loss(hidden, head, targets, chunk_rows), hidden, head)
    scaled = gradients(next_token_loss(hidden, head, targets, chunk_rows) * factor, hidden, head)
    assert_same(scaled, [gradient * factor for gradient in once], 1e-5)


@given(**SIZES, other_chunk_rows=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_loss_does_not_depend_on_the_chunks(chunk_rows, other_chunk_rows, **sizes):
    hidden, head, targets = drawn(**sizes)
    one, other = (next_token_loss(hidden, head, targets, rows) for rows in (chunk_rows, other_chunk_rows))
    assert_same(one, other)
    assert_same(gradients(one, hidden, head), gradients(other, hidden, head))


@pytest.mark.parametrize("tokens", [1, 7, 256])
def test_bf16_is_as_near_to_fp32_as_plain_bf16_is(tokens):
    hidden, head, targets = drawn(1, tokens, 64, 300, 0, seed=tokens, dtype=torch.bfloat16)
    exact_hidden, exact_head = (tensor.detach().float().requires_grad_() for tensor in (hidden, head))
    ours, theirs = next_token_loss(hidden, head, targets, 100), plain_loss(exact_hidden, exact_head, targets)
    plain = functional.cross_entropy((hidden @ head.T).float().flatten(0, 1), targets.flatten())
    assert ours.dtype == torch.float32
    assert_same(ours, theirs, 2**-8)
    made, wanted, rough = (
        gradients(ours, hidden, head),
        gradients(theirs, exact_hidden, exact_head),
        gradients(plain, hidden, head),
    )
    for gradient, true, bound in zip(made, wanted, rough, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - true).norm() <= 1.2 * (bound - true).norm() < 0.02 * true.norm()


def test_gradient_of_a_bf16_head_keeps_growing_over_many_chunks():
    hidden = torch.ones(1, 2048, 4, dtype=torch.bfloat16)
    head = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = gradients(next_token_loss(hidden, head, torch.zeros(1, 2048, dtype=torch.int64), 4), head)
    assert gradient.tolist() == [[-0.5] * 4, [0.5] * 4]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradient_that_nobody_wants_is_not_made(wanted):
    hidden, head, targets = drawn(2, 5, 4, 9, 0, seed=0)
    both = gradients(plain_loss(hidden, head, targets), hidden, head)
    hidden, head = (tensor.detach().requires_grad_(needed) for tensor, needed in zip((hidden, head), wanted, strict=True))
    next_token_loss(hidden, head, targets, 3).backward()
    for tensor, needed, gradient in zip((hidden, head), wanted, both, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            assert_same(tensor.grad, gradient)


def test_all_ignored_gives_zero_loss_and_zero_gradients():
    hidden, head, targets = drawn(2, 5, 4, 9, 0, seed=0)
    loss = next_token_loss(hidden, head, torch.full_like(targets, IGNORED), 3)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_whole(dtype):
    tokens, width, vocabulary, chunk_rows = 512, 16, 1024, 32
    hidden, head, targets = drawn(2, tokens // 2, width, vocabulary, 3, seed=0, dtype=dtype)
    with Sizes() as sizes:
        next_token_loss(hidden, head, targets, chunk_rows).backward()
        token_nats(hidden, head, targets, chunk_rows)
    assert max(sizes.seen) == chunk_rows * vocabulary < tokens * vocabulary
    with Sizes() as sizes:
        plain_loss(hidden, head, targets)
    assert max(sizes.seen) == tokens * vocabulary


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what operations make; a storage counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(made):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in given and key not in self.alive:
                self.alive[key] = leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.alive.pop, key)
        self.most = max(self.most, sum(self.alive.values()))
        return made


@pytest.mark.parametrize(("dtype", "chunk_rows"), [(torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 64)])
def test_peak_is_one_chunk_in_float32_and_one_in_the_training_dtype_beside_the_gradients(monkeypatch, dtype, chunk_rows):
    monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)
    tokens, width, vocabulary, size = 256, 256, 2048, dtype.itemsize
    hidden, head, targets = drawn(2, tokens // 2, width, vocabulary, 3, seed=0, dtype=dtype)
    logits, weights, is_split = chunk_rows * vocabulary, vocabulary * width, chunk_rows < tokens
    gradients_bytes = size * tokens * width + (4 if is_split else 0) * weights
    with LiveBytes() as live:
        loss = next_token_loss(hidden, head, targets, chunk_rows)
    forward_bytes = (4 if size == 4 else 4 + size) * logits
    chunk_bytes = max(forward_bytes, size * (logits + min(logits, weights)))
    assert gradients_bytes + chunk_bytes <= live.most <= gradients_bytes + chunk_bytes + 64 * chunk_rows + 16 * tokens
    held = sum(live.alive.values())
    assert held <= size * tokens * width + (4 if is_split else size) * weights + 16 * tokens
    with LiveBytes() as live:
        loss.backward()
    assert live.most <= (size if is_split and size < 4 else 0) * weights + 64
    with LiveBytes() as live:
        token_nats(hidden, head, targets, chunk_rows)
    assert forward_bytes <= live.most <= forward_bytes + 64 * chunk_rows + 16 * tokens


@pytest.mark.parametrize("gap", [1.0, 50.0, 200.0, 1e4])
def test_loss_of_a_prediction_that_is_far_off_is_its_distance(gap):
    hidden, head = torch.tensor([[[gap]]]), torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    for target in range(3):
        targets = torch.tensor([[target]])
        loss, nats = next_token_loss(hidden, head, targets, 4), token_nats(hidden, head, targets, 4)
        assert_same(loss, plain_loss(hidden, head, targets))
        assert_same(nats.sum(), loss.detach())


@pytest.mark.parametrize("wrong", [-1, 9])
def test_target_outside_the_vocabulary_is_an_error(wrong):
    hidden, head, targets = drawn(1, 3, 4, 9, 0, seed=0)
    targets[0, 1] = wrong
    for objective in (next_token_loss, token_nats):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            objective(hidden, head, targets, 2)


@given(**SIZES)
@settings(deadline=None)
def test_mean_of_token_nats_is_the_loss_and_each_is_its_tokens_own(chunk_rows, **sizes):
    hidden, head, targets = drawn(**sizes)
    nats, kept = token_nats(hidden, head, targets, chunk_rows), targets != IGNORED
    assert nats.shape == targets.shape and nats.dtype == torch.float32 and not nats.requires_grad
    assert_same(nats[kept].mean(), next_token_loss(hidden, head, targets, chunk_rows).detach())
    logs = torch.log_softmax(hidden @ head.T, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert_same(nats, torch.where(kept, -logs, 0.0).detach())


@given(**SIZES)
@settings(deadline=None, max_examples=30)
def test_inputs_are_left_as_they_were(chunk_rows, **sizes):
    inputs = drawn(**sizes)
    before = [tensor.detach().clone() for tensor in inputs]
    next_token_loss(*inputs, chunk_rows).backward()
    token_nats(*inputs, chunk_rows)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor.detach(), copy)
