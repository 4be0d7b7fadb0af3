"""Laws of scripts/model/losses.py: the plain formulas in value and gradients, without any model's logits ever being whole."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from tracker import Tracker, named, peak_of

from ds.shards import Labels
from scripts.model import losses
from scripts.model.losses import IGNORED, distillation_loss, label_loss, likeliest, next_token_loss, token_nats

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


class LiveBytes(NamedTuple):
    """The most bytes alive at once beside what was given: in a loss's forward, between the two, and what the backward adds."""

    forward: int
    held: int
    backward: int


def live_bytes(loss: Callable[[], torch.Tensor], *given: torch.Tensor) -> LiveBytes:
    for tensor in given:
        tensor.grad = None
    with Tracker(named("given", given)) as tracker:
        begin = len(tracker.events)
        value = loss()
        middle = len(tracker.events)
        value.backward()
        end = len(tracker.events)
    stretches = ((begin, begin), (begin, middle), (middle, middle), (middle, end))
    before, forward, held, backward = (tracker.peak(False, *stretch).num_bytes for stretch in stretches)
    return LiveBytes(forward - before, held - before, backward - held)


@given(**SIZES, at_once=st.integers(1, 200))
def test_loss_and_gradients_are_those_of_plain_cross_entropy(chunk_rows, at_once, **sizes):
    """Also where the host works on a few of a chunk's logits at a time."""
    hidden, head, targets = drawn(**sizes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(losses, "HOST_CHUNK_LOGITS", at_once)
        ours, theirs = next_token_loss(hidden, head, targets, chunk_rows), plain_loss(hidden, head, targets)
    assert ours.shape == () and ours.dtype == torch.float32
    assert_same(ours, theirs)
    assert_same(gradients(ours, hidden, head), gradients(theirs, hidden, head))


@given(**SIZES)
def test_head_that_is_also_the_embedding_gets_both_gradients(chunk_rows, **sizes):
    _, head, targets = drawn(**sizes)
    ids = targets.clamp(min=0).roll(1, dims=1)
    ours = next_token_loss(torch.tanh(functional.embedding(ids, head)), head, targets, chunk_rows)
    theirs = plain_loss(torch.tanh(functional.embedding(ids, head)), head, targets)
    assert_same(gradients(ours, head), gradients(theirs, head))


@given(**SIZES, factor=st.floats(-100, 100))
def test_gradient_from_above_scales_the_gradients(chunk_rows, factor, **sizes):
    hidden, head, targets = drawn(**sizes)
    once = gradients(next_token_loss(hidden, head, targets, chunk_rows), hidden, head)
    scaled = gradients(next_token_loss(hidden, head, targets, chunk_rows) * factor, hidden, head)
    assert_same(scaled, [gradient * factor for gradient in once], 1e-5)


@given(**SIZES, other_chunk_rows=st.integers(1, 40))
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


@pytest.mark.parametrize("chunk_rows", [64, 1024])
def test_probabilities_that_float16_cannot_hold_are_in_the_gradient_all_the_same(chunk_rows):
    """Half of the ids are about 16 nats less likely than the others: some 1e-9 each. float16 has nothing from 0 to 3e-8."""
    hidden, head, targets = drawn(1, 1024, 32, 64, 0, seed=3, dtype=torch.float16)
    with torch.no_grad():
        head.mul_(0.07)
        hidden[..., 0], head[:32, 0], head[32:, 0] = 4.0, 2.0, -2.0
    exact_hidden, exact_head = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    shares = torch.softmax((exact_hidden @ exact_head.T).detach(), -1)
    assert shares[..., 32:].min() > 1e-11 and shares[..., 32:].max() < 2**-25
    made = gradients(2.0**16 * next_token_loss(hidden, head, targets % 32, chunk_rows), hidden, head)
    true = gradients(2.0**16 * plain_loss(exact_hidden, exact_head, targets % 32), exact_hidden, exact_head)
    common, rare = (slice(32), slice(1, None)), (slice(32, None), slice(1, None))
    for ours, theirs in [(made[0], true[0]), *((made[1][part], true[1][part]) for part in (common, rare))]:
        assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_gradients_of_float16_do_not_overflow_where_many_tokens_are_alike_or_the_temperature_is_high():
    hidden = torch.full((1, 4096, 4), 20.0, dtype=torch.float16, requires_grad=True)
    head = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    assert all(
        part.isfinite().all() for part in gradients(next_token_loss(hidden, head, torch.zeros(1, 4096).long(), 4096), head)
    )
    hidden, head, targets = drawn(1, 8, 16, 40, 0, seed=0, dtype=torch.float16)
    teacher = [each.detach().clone() for each in drawn(1, 8, 16, 40, 0, seed=1, dtype=torch.float16)[:2]]
    for divergence in ("forward", "reverse"):
        settings = dict(weight=0.5, temperature=300.0, divergence=divergence, chunk_rows=4)
        loss = distillation_loss(hidden, head, targets, *teacher, **settings)
        assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, head))


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
    given = named("given", (hidden, head, targets))
    chunk, whole = 4 * chunk_rows * vocabulary, dtype.itemsize * tokens * vocabulary
    made = peak_of(lambda: next_token_loss(hidden, head, targets, chunk_rows).backward(), given)
    assert made.largest_bytes == chunk < whole
    assert peak_of(lambda: token_nats(hidden, head, targets, chunk_rows), given).largest_bytes == chunk
    assert peak_of(lambda: plain_loss(hidden, head, targets), given).largest_bytes == whole


@pytest.mark.parametrize(("dtype", "chunk_rows"), [(torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 64)])
@pytest.mark.parametrize("at_once", [16, 1024])
def test_peak_is_one_chunk_in_float32_and_one_in_the_training_dtype_beside_the_gradients(
    monkeypatch, dtype, chunk_rows, at_once
):
    """In float32 no more than the rows that the host works on at once, where the products are of another dtype."""
    tokens, width, vocabulary, size = 256, 256, 2048, dtype.itemsize
    monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)
    monkeypatch.setattr(losses, "HOST_CHUNK_LOGITS", at_once * vocabulary)
    hidden, head, targets = drawn(2, tokens // 2, width, vocabulary, 3, seed=0, dtype=dtype)
    logits, weights, is_split = chunk_rows * vocabulary, vocabulary * width, chunk_rows < tokens
    gradients_bytes = size * tokens * width + (4 if is_split else 0) * weights
    live = live_bytes(lambda: next_token_loss(hidden, head, targets, chunk_rows), hidden, head, targets)
    forward_bytes = (4 if size == 4 else 4 + size) * logits
    wide = 4 * min(chunk_rows, at_once) * vocabulary if size < 4 else 0
    chunk_bytes = max(size * logits + wide, size * (logits + min(logits, weights)))
    small = 64 * chunk_rows + 16 * tokens
    assert gradients_bytes + chunk_bytes <= live.forward <= gradients_bytes + chunk_bytes + small
    assert live.held <= size * tokens * width + (4 if is_split else size) * weights + 16 * tokens
    assert live.backward <= (size if is_split and size < 4 else 0) * weights + 64
    given = (hidden, head, targets)
    most = peak_of(lambda: token_nats(*given, chunk_rows), named("given", given)).num_bytes
    assert forward_bytes <= most - sum(tensor.nbytes for tensor in given) <= forward_bytes + small


def test_backward_scales_a_16_bit_gradient_of_the_head_without_a_copy_of_it(monkeypatch):
    """torch's own profiler counts also what its kernels cast for themselves."""
    monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)
    hidden, head, targets = drawn(1, 4, 64, 16 * losses.HOST_CHUNK_ROWS, 0, 0, torch.bfloat16)
    loss = next_token_loss(hidden, head, targets, chunk_rows=4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss.backward(gradient=torch.tensor(0.3))
    taken = max(event.cpu_memory_usage for event in profiled.events() or ())
    assert taken < head.numel()
    assert head.grad is not None and head.grad.dtype == torch.bfloat16


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
def test_mean_of_token_nats_is_the_loss_and_each_is_its_tokens_own(chunk_rows, **sizes):
    hidden, head, targets = drawn(**sizes)
    nats, kept = token_nats(hidden, head, targets, chunk_rows), targets != IGNORED
    assert nats.shape == targets.shape and nats.dtype == torch.float32 and not nats.requires_grad
    assert_same(nats[kept].mean(), next_token_loss(hidden, head, targets, chunk_rows).detach())
    logs = torch.log_softmax(hidden @ head.T, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert_same(nats, torch.where(kept, -logs, 0.0).detach())


@given(**SIZES)
def test_inputs_are_left_as_they_were(chunk_rows, **sizes):
    inputs = drawn(**sizes)
    before = [tensor.detach().clone() for tensor in inputs]
    next_token_loss(*inputs, chunk_rows).backward()
    token_nats(*inputs, chunk_rows)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor.detach(), copy)


DIVERGENCES = ("forward", "reverse")
AIMS = {
    "weight": st.floats(0.01, 1.0),
    "temperature": st.sampled_from([0.5, 1.0, 1.7, 2.0, 4.0]),
    "divergence": st.sampled_from(DIVERGENCES),
}


def terms(weight: float, temperature: float, divergence: str, chunk_rows: int) -> dict:
    """What both distillation losses take by keyword."""
    return {"weight": weight, "temperature": temperature, "divergence": divergence, "chunk_rows": chunk_rows}


class Lesson(NamedTuple):
    """What `distillation_loss` reads, in that order; the student first."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor


def lesson(seed: int, factor: float = 0.4, dtype=torch.float32, **sizes) -> Lesson:
    """As `drawn`, with a teacher of another width; `factor` makes both models' logits large."""
    hidden, head, targets = drawn(**sizes, seed=seed, dtype=dtype)
    generator, width = torch.Generator().manual_seed(seed + 1), sizes["width"] % 7 + 1
    shapes = (targets.shape, head.shape[:1])
    teacher_hidden, teacher_head = (torch.randn(*shape, width, generator=generator) for shape in shapes)
    large = (hidden.detach() * factor).requires_grad_()
    return Lesson(large, head, targets, (teacher_hidden * factor).to(dtype), teacher_head.to(dtype))


def logits_of(given: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits of the tokens that count, (N, V) float64 each."""
    kept = given.targets != IGNORED
    student, teacher = given.hidden.double() @ given.head.double().T, teacher_logits(given)
    return student[kept], teacher[kept]


def teacher_logits(given: Lesson) -> torch.Tensor:
    return given.teacher_hidden.double() @ given.teacher_head.double().T


def text_nats(student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(student, targets[targets != IGNORED])


def mean_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float, divergence: str) -> torch.Tensor:
    ours, theirs = torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)
    first, second = (theirs, ours) if divergence == "forward" else (ours, theirs)
    return (first.exp() * (first - second)).sum(-1).mean()


def plain_distillation(given: Lesson, weight: float, temperature: float, divergence: str) -> torch.Tensor:
    """The formula in float64 over whole logits."""
    student, teacher = logits_of(given)
    soft = mean_kl(student, teacher, temperature, divergence)
    return (1 - weight) * text_nats(student, given.targets) + weight * temperature**2 * soft


def exact_labels(given: Lesson, top_k: int, temperature: float) -> Labels[torch.Tensor]:
    """The teacher's, by the formula in float64, kept in float32 where files keep float16."""
    shares = torch.softmax(teacher_logits(given) / temperature, -1)
    best, ids = shares.topk(top_k)
    return Labels(ids, best.log().float(), shares.scatter(-1, ids, 0.0).sum(-1).float())


def plain_label_loss(given: Lesson, labels: Labels, weight: float, temperature: float, divergence: str) -> torch.Tensor:
    """The formula over k + 1 outcomes in float64."""
    student, _ = logits_of(given)
    ids, logs, tail = (part[given.targets != IGNORED] for part in labels)
    shares, ids, found, tail = torch.softmax(student / temperature, -1), ids.long(), logs.double().exp(), tail.double()
    ours = torch.cat((shares.gather(1, ids), shares.scatter(1, ids, 0.0).sum(1, keepdim=True)), 1)
    theirs = torch.cat((found * ((1 - tail) / found.sum(1)).unsqueeze(1), tail.unsqueeze(1)), 1)
    soft = mean_kl(ours.log(), theirs.log(), 1.0, divergence)
    return (1 - weight) * text_nats(student, given.targets) + weight * temperature**2 * soft


def assert_plain(ours: torch.Tensor, plain: torch.Tensor, given: Lesson, temperature: float) -> None:
    """Equal in value and gradients to 1e-6 of the largest number that the formula adds up."""
    logs = [torch.log_softmax(logits.detach() / temperature, -1) for logits in logits_of(given)]
    scale = max(1.0, temperature**2, *(float(-each.min()) for each in logs))
    assert ours.shape == () and ours.dtype == torch.float32
    assert abs(ours.item() - plain.item()) <= 1e-6 * scale
    for made, wanted in zip(*(gradients(loss, given.hidden, given.head) for loss in (ours, plain)), strict=True):
        assert made.dtype == given.hidden.dtype
        assert (made - wanted).abs().max() <= 1e-6 * max(scale, float(wanted.abs().max()))


@given(**SIZES, **AIMS)
def test_distillation_is_the_plain_formula(weight, temperature, divergence, chunk_rows, **sizes):
    given = lesson(**sizes)
    ours = distillation_loss(*given, **terms(weight, temperature, divergence, chunk_rows))
    assert_plain(ours, plain_distillation(given, weight, temperature, divergence), given, temperature)


@given(**SIZES, **AIMS, share=st.floats(0, 1))
def test_label_loss_is_the_plain_formula_over_the_likeliest_and_any_other(
    weight, temperature, divergence, chunk_rows, share, **sizes
):
    given = lesson(**sizes)
    for labels in (
        exact_labels(given, 1 + int(share * (sizes["vocabulary"] - 2)), temperature),
        likeliest(given.teacher_hidden, given.teacher_head, 1, temperature, chunk_rows)[0],
    ):
        ours = label_loss(*given[:3], labels, **terms(weight, temperature, divergence, chunk_rows))
        assert_plain(ours, plain_label_loss(given, labels, weight, temperature, divergence), given, temperature)


@given(**SIZES, temperature=AIMS["temperature"], divergence=AIMS["divergence"])
def test_with_all_ids_but_one_labels_are_the_whole_teacher(temperature, divergence, chunk_rows, **sizes):
    """In float32 as exactly as the formula; with float16 logarithms to their rounding, 2^-11 of each."""
    given, top_k = lesson(**sizes), sizes["vocabulary"] - 1
    whole = plain_distillation(given, 0.7, temperature, divergence)
    exact = label_loss(*given[:3], exact_labels(given, top_k, temperature), **terms(0.7, temperature, divergence, chunk_rows))
    assert_plain(exact, whole, given, temperature)
    labels, _ = likeliest(given.teacher_hidden, given.teacher_head, top_k, temperature, chunk_rows)
    rounded = label_loss(*given[:3], labels, **terms(0.7, temperature, divergence, chunk_rows))
    error = 2 * 2**-11 * float(-labels.logs.float().min()) * temperature**2
    assert abs(rounded.item() - whole.item()) <= error * (1 + whole.item()) + 1e-5


@given(**SIZES, temperature=AIMS["temperature"], divergence=AIMS["divergence"])
def test_more_labels_never_bring_the_divergence_down_nor_above_the_whole_one(temperature, divergence, chunk_rows, **sizes):
    given = lesson(**sizes)
    counts = sorted({1, 1 + sizes["vocabulary"] // 3, sizes["vocabulary"] - 1} - {sizes["vocabulary"]})
    how, more_and_more = terms(1.0, temperature, divergence, chunk_rows), (exact_labels(given, k, temperature) for k in counts)
    nats = [label_loss(*given[:3], labels, **how).item() for labels in more_and_more]
    nats.append(distillation_loss(*given, **how).item())
    assert nats[0] >= -1e-5 and all(less <= more + 1e-5 for less, more in zip(nats, nats[1:], strict=False))


def as_in_transformers(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """DistilBERT's, huggingface/transformers examples/research_projects/distillation/distiller.py (Hinton et al. 2015)."""
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
    return soft * temperature**2


def as_in_trl(student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: int) -> torch.Tensor:
    """huggingface/trl, trainer/gkd_trainer.py, generalized_jsd_loss at its ends (Agarwal et al. 2023, GKD)."""
    ours, theirs = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    first, second = (ours, theirs) if beta == 0 else (theirs, ours)
    return functional.kl_div(first, second, reduction="none", log_target=True).sum() / len(student)


def as_in_liger(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float, beta: int, hard: float
):
    """linkedin/Liger-Kernel, chunked_loss/fused_linear_distillation.py and jsd_loss.py: sums over valid tokens, weighed."""
    ours, theirs = (torch.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    first, second = (ours, theirs) if beta == 0 else (theirs, ours)
    soft = functional.kl_div(first, second, reduction="sum", log_target=True)
    text = functional.nll_loss(torch.log_softmax(student, dim=-1), targets, reduction="sum")
    return hard * text / len(student) + (1 - hard) * soft / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_is_what_others_publish(divergence, temperature):
    """Of them transformers alone multiplies by temperature^2; TRL and Liger-kernel leave it to the weight."""
    given, beta = lesson(rows=3, positions=7, width=6, vocabulary=50, num_ignored=4, seed=5), DIVERGENCES.index(divergence)
    ours = partial(distillation_loss, *given, temperature=temperature, divergence=divergence, chunk_rows=8)
    targets, weight = given.targets[given.targets != IGNORED], 0.6 / (0.6 + 0.4 * temperature**2)
    assert_plain(ours(weight=1.0), temperature**2 * as_in_trl(*logits_of(given), temperature, beta), given, temperature)
    if divergence == "forward":
        assert_plain(ours(weight=1.0), as_in_transformers(*logits_of(given), temperature), given, temperature)
    mixed = as_in_liger(*logits_of(given), targets, temperature, beta, 0.4)
    assert_plain(ours(weight=weight) * (0.4 / (1 - weight)), mixed, given, temperature)


@given(**SIZES, temperature=AIMS["temperature"], divergence=AIMS["divergence"], dtype=st.sampled_from([0, 1]))
def test_student_that_is_its_teacher_learns_nothing(temperature, divergence, dtype, chunk_rows, **sizes):
    given = lesson(**sizes, factor=1.0, dtype=(torch.float32, torch.bfloat16)[dtype])
    twin = given._replace(teacher_hidden=given.hidden.detach(), teacher_head=given.head.detach())
    loss = distillation_loss(*twin, **terms(1.0, temperature, divergence, chunk_rows))
    assert loss.item() == 0 and all(not gradient.any() for gradient in gradients(loss, given.hidden, given.head))


@given(**SIZES, temperature=AIMS["temperature"], divergence=AIMS["divergence"], share=st.floats(0, 1))
def test_student_that_is_its_labels_learns_what_rounding_leaves(temperature, divergence, share, chunk_rows, **sizes):
    """Of float16 logarithms 2^-11 of the least, of float32 ones next to nothing; in the value the square of that."""
    given, top_k = lesson(**sizes), 1 + int(share * (sizes["vocabulary"] - 2))
    twin = given._replace(teacher_hidden=given.hidden.detach(), teacher_head=given.head.detach())
    rounded, _ = likeliest(twin.teacher_hidden, twin.teacher_head, top_k, temperature, chunk_rows)
    least = float(-rounded.logs.float().min())
    noise = 1e-6 * (1 + least)
    for labels, error in ((exact_labels(twin, top_k, temperature), noise), (rounded, noise + 2 * 2**-11 * least)):
        loss = label_loss(*given[:3], labels, **terms(1.0, temperature, divergence, chunk_rows))
        assert abs(loss.item()) <= temperature**2 * (noise + error**2)
        for gradient, other in zip(gradients(loss, given.hidden, given.head), (given.head, given.hidden), strict=True):
            assert gradient.abs().max() <= error * temperature * float(other.detach().abs().max()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_extreme_logits_give_finite_values_and_gradients(temperature, divergence, dtype):
    given = lesson(rows=2, positions=9, width=8, vocabulary=33, num_ignored=3, seed=1, factor=100.0, dtype=dtype)
    labels, lost = likeliest(given.teacher_hidden, given.teacher_head, 5, temperature, 4)
    assert labels.logs.float().min() < -50
    beyond, _ = likeliest(given.teacher_hidden * 10_000, given.teacher_head, 5, temperature, 4)
    assert beyond.logs.min() == torch.finfo(torch.float16).min
    assert all(part.isfinite().all() for part in (*labels, *beyond, lost))
    empty = Labels(labels.ids, labels.logs, torch.zeros_like(labels.tail))
    how = terms(0.5, temperature, divergence, 4)
    whole, plain = distillation_loss(*given, **how), plain_distillation(given, 0.5, temperature, divergence)
    assert abs(whole.item() / plain.item() - 1) < (1e-5 if dtype == torch.float32 else 0.02)
    for loss in (whole, *(label_loss(*given[:3], each, **how) for each in (labels, beyond, empty))):
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(loss, given.hidden, given.head))


@given(**SIZES, temperature=AIMS["temperature"], share=st.floats(0, 1))
def test_likeliest_are_the_best_in_order_with_the_rest_in_the_tail_and_what_that_leaves_out(
    temperature, share, chunk_rows, **sizes
):
    given, top_k = lesson(**sizes), 1 + int(share * (sizes["vocabulary"] - 2))
    labels, lost = likeliest(given.teacher_hidden, given.teacher_head, top_k, temperature, chunk_rows)
    assert labels.ids.shape == labels.logs.shape == (*given.targets.shape, top_k)
    assert labels.ids.dtype == torch.int32 and labels.logs.dtype == torch.float16
    assert labels.tail.shape == lost.shape == given.targets.shape and labels.tail.dtype == lost.dtype == torch.float32
    exact, logs = exact_labels(given, top_k, temperature), torch.log_softmax(teacher_logits(given) / temperature, -1)
    assert_same(logs.gather(-1, labels.ids.long()).float(), exact.logs, 1e-5)
    assert_same(labels.logs.float(), exact.logs, 2**-10)
    torch.testing.assert_close(labels.tail, exact.tail, rtol=1e-4, atol=1e-30)
    whole = (logs.exp() * (logs + math.log(sizes["vocabulary"]))).sum(-1)
    outcomes = torch.cat((exact.logs.double(), exact.tail.double().log().unsqueeze(-1)), -1)
    even = torch.tensor([1.0] * top_k + [sizes["vocabulary"] - top_k]).double() / sizes["vocabulary"]
    assert_same(lost, (whole - (outcomes.exp() * (outcomes - even.log())).sum(-1)).float(), 5e-6)


def soft_losses(given: Lesson, chunk_rows: int) -> list[partial]:
    """Each distillation loss of a lesson, to be called with hidden, head and targets."""
    labels, _ = likeliest(given.teacher_hidden, given.teacher_head, 3, 1.5, chunk_rows)
    mixed = dict(weight=0.3, temperature=1.5, chunk_rows=chunk_rows)
    teacher = {"teacher_hidden": given.teacher_hidden, "teacher_head": given.teacher_head}
    both = (partial(distillation_loss, **teacher), partial(label_loss, labels=labels))
    return [partial(loss, divergence=divergence, **mixed) for loss, divergence in product(both, DIVERGENCES)]


def test_ids_of_labels_may_be_of_any_integer_dtype():
    given = lesson(rows=2, positions=5, width=4, vocabulary=9, num_ignored=2, seed=0)
    labels, _ = likeliest(given.teacher_hidden, given.teacher_head, 3, 1.0, 4)
    kinds = (torch.uint16, torch.int32, torch.uint32, torch.int64)
    cast = [labels._replace(ids=labels.ids.to(kind)) for kind in kinds]
    assert len({label_loss(*given[:3], each, **terms(0.5, 1.0, "forward", 4)).item() for each in cast}) == 1


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_distillation_makes_the_gradients_that_are_wanted_and_changes_no_input(wanted):
    given = lesson(rows=2, positions=5, width=4, vocabulary=9, num_ignored=2, seed=0)
    for loss in soft_losses(given, 3):
        both = gradients(loss(given.hidden, given.head, given.targets), given.hidden, given.head)
        student = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(given[:2], wanted, strict=True)]
        before = [tensor.detach().clone() for tensor in (*given, *loss.keywords.get("labels", ()))]
        value = loss(*student, given.targets)
        if any(wanted):
            value.backward()
        assert value.item() == loss(*(tensor.detach() for tensor in student), given.targets).item()
        for tensor, needed, gradient in zip(student, wanted, both, strict=True):
            assert (tensor.grad is not None) == needed
            assert tensor.grad is None or torch.equal(tensor.grad, gradient)
        after = (*given, *loss.keywords.get("labels", ()))
        assert all(torch.equal(tensor.detach(), copy) for tensor, copy in zip(after, before, strict=True))


def test_all_ignored_teaches_nothing():
    given = lesson(rows=2, positions=5, width=4, vocabulary=9, num_ignored=0, seed=0)
    for loss in soft_losses(given, 3):
        value = loss(given.hidden, given.head, torch.full_like(given.targets, IGNORED))
        assert value.item() == 0 and all(not gradient.any() for gradient in gradients(value, given.hidden, given.head))


def test_teacher_gets_no_gradient_and_nothing_of_it_is_kept_for_the_backward():
    given = lesson(rows=2, positions=5, width=4, vocabulary=9, num_ignored=0, seed=0)
    teacher_hidden, teacher_head = (tensor.clone().requires_grad_() for tensor in given[3:])
    loss = distillation_loss(*given[:3], teacher_hidden, teacher_head, **terms(0.5, 2.0, "forward", 3))
    gone = [weakref.ref(tensor.untyped_storage()) for tensor in (teacher_hidden, teacher_head)]
    loss.backward()
    assert teacher_hidden.grad is None and teacher_head.grad is None and given.head.grad is not None
    loss = distillation_loss(*given[:3], teacher_hidden, teacher_head, **terms(0.5, 2.0, "forward", 3))
    del teacher_hidden, teacher_head
    assert all(reference() is None for reference in gone) and loss.requires_grad


@pytest.mark.parametrize("tokens", [7, 256])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_distillation_is_as_near_to_the_exact_one_as_the_plain_formula_in_bf16_is(divergence, tokens):
    given = lesson(
        rows=1, positions=tokens, width=64, vocabulary=300, num_ignored=0, seed=tokens, factor=0.3, dtype=torch.bfloat16
    )
    ours, exact = distillation_loss(*given, **terms(0.5, 2.0, divergence, 100)), plain_distillation(given, 0.5, 2.0, divergence)
    student, teacher = given.hidden @ given.head.T, given.teacher_hidden @ given.teacher_head.T
    soft = mean_kl(student.float().flatten(0, 1), teacher.float().flatten(0, 1), 2.0, divergence)
    rough = 0.5 * text_nats(student.float().flatten(0, 1), given.targets.flatten()) + 0.5 * 4 * soft
    assert abs(ours.item() / exact.item() - 1) < 2**-8
    made, wanted, plain = (gradients(loss, given.hidden, given.head) for loss in (ours, exact, rough))
    for gradient, true, bound in zip(made, wanted, plain, strict=True):
        assert (gradient.double() - true).norm() <= 1.2 * (bound.double() - true).norm() + 2**-9 * true.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_neither_model_ever_exist_whole(dtype):
    tokens, vocabulary, chunk_rows = 512, 1024, 32
    given = lesson(rows=2, positions=256, width=16, vocabulary=vocabulary, num_ignored=3, seed=0, dtype=dtype)
    for loss in soft_losses(given, chunk_rows):
        made = peak_of(lambda loss=loss: loss(given.hidden, given.head, given.targets).backward(), named("given", given))
        assert made.largest_bytes == 4 * chunk_rows * vocabulary < dtype.itemsize * tokens * vocabulary


@pytest.mark.parametrize(
    ("tokens", "dtype", "chunk_rows"),
    [(128, torch.bfloat16, 32), (512, torch.bfloat16, 32), (128, torch.bfloat16, 128), (128, torch.float32, 32)],
)
def test_peak_of_distillation_is_three_chunks_in_float32_and_of_labels_two_whatever_the_tokens(
    monkeypatch, tokens, dtype, chunk_rows
):
    monkeypatch.setattr(losses, "product_dtype", lambda storage, device: storage)
    width, vocabulary, size = 16, 2048, dtype.itemsize
    given = lesson(rows=2, positions=tokens // 2, width=width, vocabulary=vocabulary, num_ignored=3, seed=0, dtype=dtype)
    logits, is_split = 4 * chunk_rows * vocabulary, chunk_rows < tokens
    made = size * tokens * width + (4 if is_split else 0) * vocabulary * width
    small, ids = 64 * chunk_rows + 16 * tokens, 3 * chunk_rows * 64
    for loss in soft_losses(given, chunk_rows):
        labels = loss.keywords.get("labels", ())
        live = live_bytes(lambda loss=loss: loss(given.hidden, given.head, given.targets), *given, *labels)
        chunks = 3 if loss.func is distillation_loss else 2
        assert made + chunks * logits <= live.forward <= made + chunks * logits + small + ids
        assert live.held <= size * tokens * width + (4 if is_split else size) * vocabulary * width + 16 * tokens
        assert live.backward <= (size if is_split and size < 4 else 0) * vocabulary * width + 64
    teacher = named("given", (given.teacher_hidden, given.teacher_head))
    most = peak_of(lambda: likeliest(given.teacher_hidden, given.teacher_head, 3, 1.5, chunk_rows), teacher).num_bytes
    beside = most - sum(tensor.nbytes for _, tensor in teacher)
    assert 2 * logits + (6 * 3 + 8) * tokens <= beside <= 2 * logits + (6 * 3 + 8) * tokens + small + ids
