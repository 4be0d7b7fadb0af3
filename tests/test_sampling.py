"""Laws of scripts/model/sampling.py: a cache that changes nothing, one seed one continuation, little memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import TINY, fresh, logits_of, paths, some_ids, take_path
from tracker import Tracker, named

from scripts.model.decoder import Decoder
from scripts.model.sampling import continue_ids, new_cache


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


def continued(model: Decoder, ids: torch.Tensor, num_tokens: int, temperature=1.0, top_k=300, seed=0) -> list[int]:
    return list(continue_ids(model, ids, num_tokens, temperature=temperature, top_k=top_k, seed=seed))


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


@pytest.mark.parametrize(("temperature", "top_k"), [(-0.1, 1), (1.0, 0)])
def test_a_negative_temperature_and_a_top_k_below_one_are_refused(tiny, temperature, top_k):
    with pytest.raises(ValueError, match=f"^temperature={temperature} and top_k={top_k}: at least 0 and 1 work$"):
        continued(tiny, some_ids(TINY, 1, 5)[0], 3, temperature=temperature, top_k=top_k)


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
    take_path(monkeypatch, on_host)
    config = replace(TINY, context_length=2000, tokens_per_step=2000, eval_tokens=2000)
    decoder = fresh(config)
    prompts = [some_ids(config, 1, length)[0] for length in (900, 1800)]
    half, whole = (largest_made_bytes(decoder, lambda prompt=prompt: continued(decoder, prompt, 3)) for prompt in prompts)
    assert whole <= 2.01 * half < 1800 * 1800 / 4
