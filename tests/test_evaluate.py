"""Laws of scripts/run/evaluate.py: the numbers of an independent computation, whatever the batches."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from ds import shards
from ds import tokenizer as bpe
from ds.encoder import encode, plain_encoder
from scripts.config import TrainingConfig
from scripts.model.decoder import empty_model, initialise
from scripts.model.documents import Windows
from scripts.model.huggingface import transformers_config
from scripts.model.sampling import Sampling, continue_ids
from scripts.prepare_data import Data
from scripts.run.evaluate import evaluate, is_spike, sample_text

CONTEXT = 8
TEXT = bpe.train([b"one two three four five " * 9], 262)
DOCUMENTS = [b"", b"one two three", "four \u00e9 five two".encode(), b"\xff three one one two five four three two one"]
NUM_BYTES = torch.tensor([len(piece) for piece in bpe.token_bytes(TEXT)])


@pytest.fixture(scope="module")
def model():
    config = TrainingConfig(
        vocab_size=262, context_length=CONTEXT, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48,
        tokens_per_step=CONTEXT, micro_batch_rows=1, precision="fp32", init_std=0.3, logits_init_std=3.0,
    )  # fmt: skip
    return initialise(empty_model(config, torch.device("cpu")))


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """The stream of all documents, each ended, as windows (N, T + 1)."""
    end = bpe.end_of_text_id(TEXT)
    ids = [number for document in DOCUMENTS for number in (*encode(plain_encoder(TEXT), document).tolist(), end)]
    stream = torch.tensor(ids)
    num_windows = (len(stream) - 1) // CONTEXT
    assert num_windows > 4 and NUM_BYTES[stream[0]] != NUM_BYTES[stream[num_windows * CONTEXT]]
    return torch.stack([stream[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(num_windows)])


def test_nats_and_bits_are_those_that_transformers_gives(model, windows):
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**transformers_config(model.config, 261))).eval()
    theirs.load_state_dict(model.state_dict() | {"lm_head.weight": model.head.detach()})
    with torch.no_grad():
        logs = theirs(windows[:, :-1]).logits.double().log_softmax(-1)
    nats = -logs.gather(-1, windows[:, 1:, None]).sum().item()
    text = bpe.decode(TEXT, windows[:, 1:].flatten().numpy())
    found = evaluate(model, [Windows(windows)], NUM_BYTES, 5)
    assert found.nats_per_token == pytest.approx(nats / windows[:, 1:].numel(), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


@given(data=st.data(), chunk_rows=st.integers(1, 50))
def test_result_does_not_depend_on_how_windows_are_cut_into_batches(model, windows, data, chunk_rows):
    borders = data.draw(st.sets(st.integers(1, len(windows) - 1)))
    batches = [Windows(windows[start:stop]) for start, stop in pairwise([0, *sorted(borders), len(windows)])]
    assert evaluate(model, batches, NUM_BYTES, chunk_rows) == pytest.approx(
        evaluate(model, [Windows(windows)], NUM_BYTES, 9), rel=1e-6
    )


def test_uniform_model_over_raw_bytes_costs_log2_of_the_vocabulary_a_byte():
    model = empty_model(
        TrainingConfig(vocab_size=257, hidden_size=8, num_heads=2, num_kv_heads=1, num_layers=1, precision="fp32"),
        torch.device("cpu"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = evaluate(model, [Windows(torch.arange(20).view(2, 10))], torch.tensor([1] * 256 + [0]), 4)
    assert found == pytest.approx((math.log(257), math.log2(257)), rel=1e-6)


def test_evaluation_leaves_no_gradient_and_no_graph(model, windows):
    evaluate(model, [Windows(windows)], NUM_BYTES, 9)
    assert all(parameter.grad is None for parameter in model.parameters())


@given(st.lists(st.floats(0.1, 20.0), min_size=0, max_size=40), st.floats(0.1, 100.0))
def test_a_spike_is_sigmas_above_the_mean_of_half_a_window_or_more(before, loss):
    config = TrainingConfig(spike_window_steps=16, spike_sigmas=6.0)
    window = before[-15:]
    expected = len(window) >= 8 and loss > np.mean(window) + 6 * np.std(window, ddof=1)
    assert is_spike(loss, tuple(before), config) == bool(expected)


def test_a_sample_is_drawn_as_the_configuration_says_and_ends_before_its_stop_text(model):
    data = Data({}, shards.TokenStream((), ""), None, TEXT, "")
    config = replace(
        model.config, sample_prompt="one", sample_tokens=40, sample_temperature=3.0, sample_top_k=200, sample_top_p=0.8,
        sample_repetition_penalty=1.4,
    )  # fmt: skip
    ids = continue_ids(model, torch.tensor(data.encode("one")), 40, sampling=Sampling(3.0, 200, 0.8, 1.4), seed=3)
    whole = sample_text(config, model, data, 3)
    assert whole == "one" + data.decode(list(ids))
    changes = {"sample_temperature": 0.5, "sample_top_k": 3, "sample_top_p": 0.1, "sample_repetition_penalty": 9.0}
    assert all(sample_text(replace(config, **{name: value}), model, data, 3) != whole for name, value in changes.items())
    stop = next(each for each in whole[10:] if each.isascii())
    assert sample_text(replace(config, sample_stop=(stop,)), model, data, 3) == "one" + whole[3:].split(stop)[0]
