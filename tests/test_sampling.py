"""Laws of scripts/model/sampling.py: a cache that changes nothing, one seed one continuation, transformers' way of drawing, no
stop text in what is shown, little memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import TINY, fresh, logits_of, paths, some_ids, take_path
from tracker import Tracker, named
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from scripts.model import attention
from scripts.model.decoder import Decoder
from scripts.model.sampling import Sampling, before_stop, candidates, continue_ids, new_cache, penalized


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return fresh(TINY)


@given(borders=st.sets(st.integers(1, 23)), qk_norm=st.booleans(), rows=st.integers(1, 3))
@torch.no_grad()
def test_cached_decoding_in_any_pieces_equals_the_full_forward(borders, qk_norm, rows):
    config = replace(TINY, qk_norm=qk_norm)
    model, ids = fresh(config), some_ids(config, rows, 24)
    cache = new_cache(model, rows, 24)
    pieces = [model(ids[:, start:stop], cache, start) for start, stop in pairwise([0, *sorted(borders), 24])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-4, atol=1e-5)


PLAIN = Sampling(temperature=1.0, top_k=300, top_p=1.0, repetition_penalty=1.0)


def continued(model: Decoder, ids: torch.Tensor, num_tokens: int, seed=0, **changes) -> list[int]:
    return list(continue_ids(model, ids, num_tokens, sampling=PLAIN._replace(**changes), seed=seed))


def naive_greedy(model: Decoder, ids: torch.Tensor, num_tokens: int) -> Iterator[int]:
    """Without a cache, each token from a full forward; beyond the context the older half is dropped."""
    context, limit = ids.tolist()[-TINY.context_length :], TINY.context_length
    for _ in range(num_tokens):
        if len(context) > limit:
            context = context[-(limit // 2 + 1) :]
        context.append(int(logits_of(model, torch.tensor([context]))[0, -1].argmax()))
        yield context[-1]


@given(prompt_length=st.integers(1, 40), num_tokens=st.integers(1, 60), seed=st.integers(0, 9))
@settings(max_examples=15)
def test_temperature_zero_takes_the_likeliest_id_also_beyond_the_context(tiny, prompt_length, num_tokens, seed):
    prompt = some_ids(TINY, 1, prompt_length, seed)[0]
    # A context no longer than the prompt and its continuation cuts nothing, so the naive loop may use the whole limit.
    assert continued(tiny, prompt, num_tokens, temperature=0.0) == list(naive_greedy(tiny, prompt, num_tokens))


@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
@settings(max_examples=6)
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


def test_it_ends_where_a_logit_is_not_finite(tiny):
    broken = fresh(TINY)
    with torch.no_grad():
        broken.head[7] = torch.nan
    assert continued(broken, some_ids(TINY, 1, 5)[0], 9) == []


@given(seed=st.integers(0, 999), penalty=st.floats(0.1, 9.0), length=st.integers(1, 90))
def test_repetition_penalty_is_that_of_transformers(seed, penalty, length):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, generator=generator) * 4
    text = torch.randint(60, (length,), generator=generator)
    seen = torch.zeros(60, dtype=torch.bool).index_fill(0, text, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(text[None], logits[None].clone())[0]  # pyright: ignore
    torch.testing.assert_close(penalized(logits, seen, penalty), theirs, rtol=0, atol=0)


@given(
    seed=st.integers(0, 999), temperature=st.floats(0.05, 5.0), top_k=st.integers(1, 400), top_p=st.floats(0.01, 1.0)
)  # fmt: skip
@settings(max_examples=100)
def test_temperature_top_k_and_top_p_leave_the_probabilities_of_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = logits[None]
    for process in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        theirs = process(torch.tensor([[0]]), theirs)  # pyright: ignore
    kept = candidates(logits, Sampling(temperature, top_k, top_p, 1.0))
    ours = torch.zeros(300).index_copy(0, kept.ids, kept.probabilities)
    torch.testing.assert_close(ours, torch.softmax(theirs[0], 0), rtol=1e-5, atol=1e-7)


def test_no_sample_lies_outside_the_nucleus_and_each_of_it_is_drawn(tiny):
    prompt = some_ids(TINY, 1, 5)[0]
    nucleus = candidates(logits_of(tiny, prompt[None])[0, -1], PLAIN._replace(temperature=2.0, top_p=0.2)).ids
    drawn = {continued(tiny, prompt, 1, temperature=2.0, top_p=0.2, seed=seed)[0] for seed in range(40 * len(nucleus))}
    assert 1 < len(nucleus) < 300 and drawn == set(nucleus.tolist())


def test_what_stands_in_prompt_or_text_is_never_repeated_under_a_large_penalty(tiny):
    """Also what has left the context. Logits below zero become lower than any other, those above come down to zero."""
    prompt = some_ids(TINY, 1, 9)[0]
    text = continued(tiny, prompt, 120, temperature=0.0, repetition_penalty=1e6)
    assert len({*text, *prompt.tolist()}) == len(text) + len({*prompt.tolist()})


@pytest.mark.parametrize(("temperature", "top_k"), [(-0.1, 1), (1.0, 0)])
def test_a_negative_temperature_and_a_top_k_below_one_are_refused(tiny, temperature, top_k):
    with pytest.raises(ValueError, match=f"^temperature={temperature} and top_k={top_k}: at least 0 and 1 work$"):
        continued(tiny, some_ids(TINY, 1, 5)[0], 3, temperature=temperature, top_k=top_k)


@pytest.mark.parametrize(("top_p", "penalty"), [(0.0, 1.0), (1.1, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_a_top_p_that_is_no_share_and_a_penalty_that_divides_by_nothing_are_refused(tiny, top_p, penalty):
    with pytest.raises(ValueError, match=f"^top_p={top_p} and repetition_penalty={penalty}: above 0 works"):
        continued(tiny, some_ids(TINY, 1, 5)[0], 3, top_p=top_p, repetition_penalty=penalty)


FEW_BYTES = st.binary(max_size=30).map(lambda text: bytes(b"abc"[byte % 3] for byte in text))
STOPS = st.lists(FEW_BYTES.filter(bool).map(lambda stop: stop[:5]), max_size=3)


@st.composite
def cut_texts(draw) -> list[bytes]:
    """A text of three letters in pieces, also empty ones."""
    text = draw(FEW_BYTES)
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:stop] for start, stop in pairwise([0, *borders, len(text)])]


@given(pieces=cut_texts(), stops=STOPS)
@settings(max_examples=100)
def test_text_ends_before_the_first_stop_text_wherever_it_is_cut(pieces, stops):
    whole, shown = b"".join(pieces), b"".join(before_stop(pieces, stops))
    assert whole.startswith(shown) and not any(stop in shown for stop in stops)
    assert shown == whole or any(whole[len(shown) :].startswith(stop) for stop in stops)
    assert shown == b"".join(before_stop([whole[at : at + 1] for at in range(len(whole))], stops))


@given(pieces=cut_texts(), stops=STOPS)
@settings(max_examples=100)
def test_only_what_may_begin_a_stop_text_is_held_back(pieces, stops):
    shown = b""
    for number, piece in enumerate(before_stop(iter(pieces), stops)):
        shown += piece
        read = b"".join(pieces[: number + 1])
        held = read[len(shown) :]
        assert held == b"" or any(stop.startswith(held) or held.startswith(stop) for stop in stops)


def test_nothing_is_sampled_after_a_stop_text_is_complete():
    pieces = iter([b"one ", b"st", b"op", b" two"])
    assert b"".join(before_stop(pieces, [b"stop"])) == b"one " and next(pieces) == b" two"


def largest_made_bytes(decoder: Decoder, work: Callable[[], object]) -> int:
    """The largest storage that the work makes, the decoder's weights left out."""
    with Tracker(named("weights", decoder.parameters())) as tracker:
        num_weights = len(tracker.storages)
        work()
    return max(storage.num_bytes for storage in tracker.storages[num_weights:])


def test_sampling_never_makes_logits_of_more_than_one_position():
    decoder = fresh(replace(TINY, vocab_size=5000))
    prompt = some_ids(TINY, 1, 20)[0]
    assert largest_made_bytes(decoder, lambda: continued(decoder, prompt, 10)) == 4 * 5000


@paths
def test_long_prompt_needs_memory_in_proportion_to_its_length(monkeypatch, on_host):
    """On the host with few scores at once, and as shipped, where those of so small a model are most of it up to some length."""
    take_path(monkeypatch, on_host)
    shipped = (attention.HOST_CHUNK_QUERIES, attention.HOST_CHUNK_SCORES)
    config = replace(TINY, context_length=6200, tokens_per_step=6200, eval_tokens=6200)
    decoder = fresh(config)
    for longest, (queries_at_once, scores_at_once) in ((1800, (16, 1)), (6000, shipped)):
        monkeypatch.setattr(attention, "HOST_CHUNK_QUERIES", queries_at_once)
        monkeypatch.setattr(attention, "HOST_CHUNK_SCORES", scores_at_once)
        prompts = [some_ids(config, 1, length)[0] for length in (longest // 2, longest)]
        half, whole = (largest_made_bytes(decoder, lambda prompt=prompt: continued(decoder, prompt, 3)) for prompt in prompts)
        assert whole <= 2.01 * half < longest * longest / 4
