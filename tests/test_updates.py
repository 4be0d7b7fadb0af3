"""Laws of scripts/engine/updates.py: Muon is torch's, and 16-bit moments lose nothing on average."""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz

from scripts.config import GRADIENT_CACHE_ELEMENTS, GRADIENT_PIECE_ELEMENTS, NEWTON_SCHULZ_ITERATIONS, PRETRAIN
from scripts.engine import updates
from scripts.engine.updates import NEWTON_SCHULZ, WORDS, Adam, Draws, Matrix

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**16)
SIDES = st.integers(1, 40)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
DRAWS = st.builds(Draws, st.integers(0, 2**32 - 1), st.integers(1, 10**7), st.integers(0, 500))


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(rows=SIDES, columns=SIDES, seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_orthogonalised_matrix_is_that_of_torch(rows, columns, seed, scale):
    update = scale * drawn((rows, columns), seed)
    in_16_bits = newton_schulz(update, NEWTON_SCHULZ, NEWTON_SCHULZ_ITERATIONS, 1e-7)
    with patch.object(Tensor, "bfloat16", Tensor.clone):
        right = newton_schulz(update, NEWTON_SCHULZ, NEWTON_SCHULZ_ITERATIONS, 1e-7)
    assert torch.allclose(updates.orthogonalise(update, torch.float32), right, atol=1e-5)
    error = (updates.orthogonalise(update.bfloat16(), torch.bfloat16) - in_16_bits).float().norm()
    assert error <= 0.1 * right.norm()


def with_values(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    """A matrix (rows, columns) with these singular values."""
    left, right = (torch.linalg.qr(drawn((side, len(values)), seed + side).double()).Q for side in (rows, columns))
    return (left * values.double() @ right.mT).float()


@given(rows=SIDES, columns=SIDES, seed=SEEDS, dtype=DTYPES, kept=st.floats(0.0, 1.0), smallest=st.floats(0.02, 1.0))
def test_singular_values_end_near_one_where_the_gradient_has_rank(rows, columns, seed, dtype, kept, smallest):
    """Also of one row or column, without full rank, and ill-conditioned."""
    rank = max(1, round(kept * min(rows, columns)))
    values = torch.logspace(0, float(torch.tensor(smallest).log10()), rank)
    update = with_values(rows, columns, values, seed)
    found = torch.linalg.svdvals(updates.orthogonalise(update.to(dtype), dtype).float())
    has_rank = values / values.norm() > 2**-8
    assert found.isfinite().all() and found.max() < 1.3
    assert found[: int(has_rank.sum())].min() > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smallest", [1e-3, 1e-8, 0.0])
def test_ill_conditioned_matrices_stay_finite_and_bounded(dtype, smallest):
    values = torch.linspace(1.0, smallest, 30)
    found = torch.linalg.svdvals(updates.orthogonalise(with_values(64, 30, values, 3).bfloat16(), dtype).float())
    assert found.isfinite().all() and found.max() < 1.3 and found[0] > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 5)])
def test_zeros_stay_zeros_and_subnormal_numbers_stay_finite(dtype, shape):
    assert not updates.orthogonalise(torch.zeros(shape, dtype=torch.bfloat16), dtype).any()
    assert updates.orthogonalise(torch.full(shape, 1e-40, dtype=torch.bfloat16), dtype).isfinite().all()


@given(shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=9), world_size=st.integers(1, 12))
def test_each_matrix_is_made_orthogonal_by_one_rank(shapes, world_size):
    starts = torch.tensor([0] + [rows * columns for rows, columns in shapes]).cumsum(0).tolist()
    matrices = [Matrix(a, b, torch.Size(shape)) for a, b, shape in zip(starts[:-1], starts[1:], shapes, strict=True)]
    shares = updates.shared_out(matrices, world_size)
    assert len(shares) == world_size and sorted(sum(shares, [])) == matrices
    assert min(map(len, shares)) >= 1 or len(matrices) < world_size


@given(size=st.integers(1, 300), seed=SEEDS, beta=st.floats(0.0, 0.99))
def test_momentum_and_its_look_ahead_are_those_of_torch(size, seed, beta):
    gradient, momentum = drawn((size,), seed), drawn((size,), seed + 1)
    expected = momentum.lerp(gradient, 1 - beta)
    short, target = momentum.bfloat16(), torch.empty(size, dtype=torch.bfloat16)
    moved = short.float().lerp(gradient, 1 - beta)
    updates.take_momentum(gradient, short, target, beta)
    assert torch.equal(short, moved.bfloat16()) and torch.equal(target, gradient.lerp(moved, beta).bfloat16())
    whole = torch.empty(size)
    updates.take_momentum(gradient, momentum, whole, beta)
    assert torch.equal(momentum, expected) and torch.equal(whole, gradient.lerp(expected, beta))


@given(size=st.integers(1, 300), seed=SEEDS, rate=st.floats(1e-6, 0.1), decay=st.floats(0.0, 1.0))
def test_masters_decay_and_go_down(size, seed, rate, decay):
    master, direction = drawn((size,), seed), drawn((size,), seed + 1)
    right = master.double() * (1 - rate * decay) - rate * 0.5 * direction.double()
    updates.descend(master, direction, rate=rate, scale=0.5, decay=decay)
    assert torch.allclose(master.double(), right, atol=1e-6)


def test_the_mean_of_ten_thousand_roundings_is_the_number():
    """Within four standard errors, for numbers of every size and sign, over steps and over elements."""
    numbers = torch.cat([drawn((500,), 0), 1e-30 * drawn((100,), 1), 1e30 * drawn((100,), 2), torch.tensor([0.0, 1.0, -3.5])])
    total, squares = torch.zeros(2, len(numbers), dtype=torch.float64)
    for step in range(10_000):
        words = updates.words_of(Draws(7, step, 3), 40 * WORDS, len(numbers), CPU)
        rounded = torch.empty(len(numbers), dtype=torch.bfloat16)
        updates.round_at_random(numbers.clone(), words.bitwise_right_shift(16).bitwise_and_(WORDS - 1), rounded)
        error = rounded.double() - numbers.double()
        total += error
        squares += error.square()
    mean, deviation = total / 10_000, (squares / 10_000).sqrt()
    assert (mean.abs() <= 4 * deviation / 100 + 1e-45).double().mean() > 0.995
    assert (mean.abs() / deviation.clamp(min=1e-45)).max() < 0.06


@given(draws=DRAWS, seed=SEEDS, number=st.integers(0, 2**20))
def test_over_many_elements_rounding_is_as_even(draws, seed, number):
    values = 1.0 + torch.rand(WORDS, generator=torch.Generator().manual_seed(seed))
    words, errors = updates.words_of(draws, number * WORDS, WORDS, CPU), []
    for half in (words.bitwise_right_shift(16).bitwise_and_(WORDS - 1), words.bitwise_and(WORDS - 1)):
        assert half.min() >= 0 and half.max() < WORDS
        rounded = torch.empty(WORDS, dtype=torch.bfloat16)
        updates.round_at_random(values.clone(), half, rounded)
        errors.append((rounded.double() - values.double()).mean())
    assert max(map(abs, errors)) < 4 * 2**-8 / 256


@given(draws=DRAWS, first=st.integers(0, 2**40), sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5))
def test_a_word_depends_on_its_element_and_not_on_the_slice(draws, first, sizes):
    first -= first % WORDS
    whole = updates.words_of(draws, first, WORDS, CPU)
    later = updates.words_of(draws, first + WORDS, WORDS, CPU)
    for size in sizes:
        start = size * 7 % (WORDS - 500)
        assert torch.equal(updates.words_of(draws, first + start, size, CPU), whole[start : start + size])
    both = updates.words_of(draws, first + WORDS - sizes[0], sizes[0] + 9, CPU)
    assert torch.equal(both, torch.cat((whole[WORDS - sizes[0] :], later[:9])))
    for other in (
        draws._replace(step=draws.step + 1),
        draws._replace(seed=draws.seed ^ 1),
        draws._replace(group=draws.group + 1),
    ):
        assert (updates.words_of(other, first, WORDS, CPU) == whole).double().mean() < 0.01
    assert (later == whole).double().mean() < 0.01


def adam_steps(num_steps: int, cuts: list[int], beta2: float = 0.99) -> list[Tensor]:
    """Masters and moments after steps in 16 bits, of which each slice between `cuts` is updated alone."""
    first, size = 3 * WORDS - 200, 1000
    master, moments = drawn((size,), 0), [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(1, num_steps + 1):
        gradient, numbers = drawn((size,), step), Adam(step, 1e-3, 0.9, beta2, 1e-8, 0.1)
        for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
            kept, draws = [moment[start:stop] for moment in moments], Draws(1, step, 2)
            part = (master[start:stop], gradient[start:stop], kept, numbers)
            updates.adam_in_16_bits(*part, draws=draws, first=first + start)
    return [master, *moments]


def test_adamw_in_16_bits_is_the_same_however_its_vector_is_shared_out():
    for cuts in ([200], [64, 512, 768]):
        for ours, whole in zip(adam_steps(5, cuts), adam_steps(5, []), strict=True):
            assert torch.allclose(ours.float(), whole.float(), rtol=1e-2, atol=1e-5)
            assert (ours != whole).double().mean() < 0.02
    assert all(torch.equal(*pair) for pair in zip(adam_steps(5, [200]), adam_steps(5, [200]), strict=True))


def test_the_second_part_of_a_long_vector_is_rounded_as_if_it_were_alone():
    size, numbers, draws = GRADIENT_CACHE_ELEMENTS + 500, Adam(1, 1e-3, 0.9, 0.99, 1e-8, 0.1), Draws(1, 1, 2)
    gradient = drawn((500,), 0).repeat(-(-size // 500))[:size]
    whole, alone = ([torch.zeros(num, dtype=torch.bfloat16) for _ in range(2)] for num in (size, 500))
    updates.adam_in_16_bits(torch.zeros(size), gradient, whole, numbers, draws=draws, first=0)
    last = gradient[GRADIENT_CACHE_ELEMENTS:].clone()
    updates.adam_in_16_bits(torch.zeros(500), last, alone, numbers, draws=draws, first=GRADIENT_CACHE_ELEMENTS)
    for ours, theirs in zip(whole, alone, strict=True):
        assert (ours[GRADIENT_CACHE_ELEMENTS:] != theirs).double().mean() < 0.02


def test_adamw_in_16_bits_stays_near_torchs_adamw():
    weight = drawn((1000,), 0).requires_grad_()
    adam = torch.optim.AdamW([weight], 1e-3, (0.9, 0.99), 1e-8, 0.1)
    for step in range(1, 51):
        weight.grad = drawn((1000,), step)
        adam.step()
    master, *_ = adam_steps(50, [])
    moved = (weight - drawn((1000,), 0)).norm()
    assert (master - weight).norm() < 0.01 * moved


def second_moment(num_steps: int, is_random: bool) -> float:
    """The mean second moment of gradients of size 1 after steps at beta2 = 0.999, kept in 16 bits."""
    square = torch.zeros(64, dtype=torch.bfloat16)
    for step in range(num_steps):
        moved = square.float().mul_(0.999).add_(0.001)
        if is_random:
            updates.round_at_random(moved, updates.words_of(Draws(0, step, 0), 0, 64, CPU).bitwise_and_(WORDS - 1), square)
        else:
            square.copy_(moved)
    return float(square.float().mean())


def test_moments_do_not_stall_where_rounding_to_nearest_does():
    assert second_moment(10_000, is_random=True) == pytest.approx(1.0, abs=0.02)
    assert second_moment(10_000, is_random=False) < 0.7


@given(first=st.floats(0, 0.99), last=st.floats(0, 0.99), num_steps=st.integers(1, 50))
def test_the_momentum_goes_in_a_line_from_the_first_update_on_and_then_stays(first, last, num_steps):
    config = replace(PRETRAIN, muon_momentum=last, muon_first_momentum=first, muon_momentum_warmup_steps=num_steps)
    momenta = [updates.momentum_at(update, config) for update in range(num_steps + 3)]
    assert momenta[0] == first
    assert momenta[num_steps:] == [last] * 3
    rises = [after - before for before, after in pairwise(momenta[: num_steps + 1])]
    assert rises == pytest.approx([(last - first) / num_steps] * num_steps, abs=1e-12)


def test_without_a_first_momentum_it_is_the_same_in_every_update():
    config = replace(PRETRAIN, muon_first_momentum=None, muon_momentum_warmup_steps=None)
    assert {updates.momentum_at(update, config) for update in range(300)} == {config.muon_momentum}


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4), dtype=DTYPES)
def test_sums_land_whole_and_in_order(sizes, dtype):
    sums = [drawn((size,), size).to(dtype) for size in sizes]
    landed = list(updates.bring_down(sums, [], None))
    assert [each.group for each in landed] == list(range(len(sums)))
    assert all(torch.equal(each.gradient, total.float()) for each, total in zip(landed, sums, strict=True))


def test_a_long_sum_lands_in_pieces():
    pieces = list(updates.bring_down([torch.arange(GRADIENT_PIECE_ELEMENTS + 3, dtype=torch.float32)], [], None))
    assert [(each.start, len(each.gradient)) for each in pieces] == [(0, GRADIENT_PIECE_ELEMENTS), (GRADIENT_PIECE_ELEMENTS, 3)]
