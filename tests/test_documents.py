"""Laws of scripts/model/documents.py: a document in a window is computed as if it stood alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import CPU, MODES, TINY, fresh, paths, some_ids, take_path
from tracker import Alone

from scripts.config import TrainingConfig
from scripts.model import attention
from scripts.model.decoder import Decoder, empty_model
from scripts.model.documents import Windows, documents_of, windows_of
from scripts.model.huggingface import transformers_config
from scripts.model.losses import next_token, next_token_loss
from scripts.model.sampling import Sampling, continue_ids

ROWS, POSITIONS = 3, 24
# Begins before the window and ends behind it; a single token at either end and in the middle; a whole row.
CUTS = np.array([0, 1, 9, 10, 11, 23, 24, 29, 41, 48, 72], dtype=np.int32)
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@st.composite
def cuts(draw) -> np.ndarray:
    """Where pieces begin in ROWS rows; each row begins one."""
    rows = range(0, ROWS * POSITIONS + 1, POSITIONS)
    return np.array(sorted({*rows, *draw(st.sets(st.integers(0, ROWS * POSITIONS - 1)))}), dtype=np.int32)


def cut_windows(borders: np.ndarray = CUTS, device: torch.device = CPU, positions: int = POSITIONS, seed: int = 0) -> Windows:
    rows = int(borders[-1]) // positions
    return windows_of(some_ids(TINY, rows, positions + 1, seed).numpy(), borders, device)


def loss_of(decoder: Decoder, windows: Windows) -> torch.Tensor:
    return next_token(Alone(decoder), windows, decoder.config)


def loss_alone(decoder: Decoder, windows: Windows, borders: np.ndarray) -> torch.Tensor:
    """The same mean, of each piece of a document run by itself on the targets that it has in its window."""
    ids, targets = (each.flatten().split(np.diff(borders).tolist()) for each in (windows.inputs, windows.targets))
    each = (
        next_token_loss(decoder(own[None]), decoder.head, wanted[None], 1000) * len(own)
        for own, wanted in zip(ids, targets, strict=True)
    )
    return sum(each, torch.zeros((), device=windows.ids.device)) / windows.inputs.numel()


def loss_and_gradients(decoder: Decoder, loss: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]


def assert_each_document_is_as_if_alone(decoder: Decoder, windows: Windows, borders: np.ndarray, tolerance: float) -> None:
    together = loss_and_gradients(decoder, loss_of(decoder, windows))
    alone = loss_and_gradients(decoder, loss_alone(decoder, windows, borders))
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.fixture(scope="module")
def decoders() -> list[Decoder]:
    shapes = [dict(qk_norm=False, num_kv_heads=4), dict(qk_norm=True, num_kv_heads=2), dict(head_size=14, num_kv_heads=1)]
    return [fresh(replace(TINY, **shape)) for shape in shapes]


@paths
@given(borders=cuts(), number=st.integers(0, 2), seed=st.integers(0, 99))
def test_loss_and_gradients_of_windows_are_those_of_their_documents_alone(decoders, borders, number, seed, on_host):
    with pytest.MonkeyPatch.context() as patch:
        take_path(patch, on_host)
        windows = cut_windows(borders, seed=seed)
        assert_each_document_is_as_if_alone(decoders[number], windows, borders, 1e-5)


@pytest.mark.parametrize("borders", [CUTS, np.arange(0, 73, 4), np.array([0, 3, 24, 48, 71, 72])], ids=str)
@pytest.mark.parametrize("positions_at_once", [1, 5, 23])
def test_documents_over_several_blocks_of_scores_are_as_if_alone(monkeypatch, decoders, borders, positions_at_once):
    monkeypatch.setattr(attention, "HOST_CHUNK_QUERIES", positions_at_once)
    monkeypatch.setattr(attention, "HOST_CHUNK_SCORES", 512)
    for decoder in decoders:
        assert_each_document_is_as_if_alone(decoder, cut_windows(borders.astype(np.int32)), borders, 1e-5)


@paths
def test_long_documents_give_the_loss_and_gradients_that_they_give_alone(monkeypatch, decoders, on_host):
    """Beyond one block of torch's kernels, where it takes other ones."""
    take_path(monkeypatch, on_host)
    borders = np.array([0, 1, 500, 700, 1100, 1400], dtype=np.int32)
    assert_each_document_is_as_if_alone(decoders[1], cut_windows(borders, positions=700), borders, 1e-5)


@paths
@given(borders=cuts(), changed=st.integers(0, ROWS * POSITIONS - 1), number=st.integers(0, 2))
def test_no_activation_of_a_document_depends_on_another(decoders, borders, changed, number, on_host):
    decoder, ids = decoders[number], some_ids(TINY, ROWS, POSITIONS + 1)
    other = ids.clone()
    row, position = divmod(changed, POSITIONS)
    other[row, position] = (other[row, position] + 1) % TINY.vocab_size
    with pytest.MonkeyPatch.context() as patch:
        take_path(patch, on_host)
        before, after = (
            decoder(windows.inputs, documents=windows.documents).detach().flatten(0, 1)
            for windows in (windows_of(each.numpy(), borders, CPU) for each in (ids, other))
        )
    stop = borders[np.searchsorted(borders, changed, side="right")]
    assert torch.equal(before[:changed], after[:changed]) and torch.equal(before[stop:], after[stop:])
    assert (before[changed:stop] != after[changed:stop]).any(-1).all()


def test_with_one_document_a_row_there_is_nothing_to_mask(decoders):
    ids = some_ids(TINY, ROWS, POSITIONS + 1).numpy()
    for borders in (None, np.arange(0, ROWS * POSITIONS + 1, POSITIONS, dtype=np.int32)):
        windows = windows_of(ids, borders, CPU)
        assert windows.documents is None and np.array_equal(windows.ids.numpy(), ids)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@paths
def test_gradients_in_16_bits_are_near_those_of_the_documents_alone_in_fp32(monkeypatch, precision, on_host):
    narrow = fresh(replace(TINY, precision=precision, init_std=0.05))
    wide = empty_model(replace(narrow.config, precision="fp32"), CPU)
    wide.load_state_dict(narrow.state_dict())
    exact = loss_and_gradients(wide, loss_alone(wide, cut_windows(), CUTS))
    take_path(monkeypatch, on_host)
    for ours, theirs in zip(loss_and_gradients(narrow, loss_of(narrow, cut_windows())), exact, strict=True):
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


@paths
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_gives_bitwise_the_same_loss_and_gradients(monkeypatch, precision, on_host):
    take_path(monkeypatch, on_host)
    found = []
    for mode in MODES:
        decoder = fresh(replace(TINY, activation_checkpointing=mode, qk_norm=True, precision=precision, num_layers=3))
        found.append(loss_and_gradients(decoder, loss_of(decoder, cut_windows())))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@given(borders=cuts())
def test_each_token_stands_at_one_place_behind_those_of_its_piece_and_a_quarter_at_most_fills_up(borders):
    documents = documents_of(borders, CPU)
    assert torch.equal(documents.order[documents.places], torch.arange(ROWS * POSITIONS, dtype=torch.int32))
    assert not documents.is_filling[documents.places].any()
    lengths, pieces = np.diff(borders), np.repeat(np.arange(len(borders) - 1), np.diff(borders))
    assert sum(group.num_pieces for group in documents.groups) == len(lengths) and documents.longest == lengths.max()
    for group in documents.groups:
        for first in range(group.places.start, group.places.stop, group.length):
            own = documents.order[first : first + group.length].numpy()
            piece = int(pieces[own[0]])
            assert (pieces[own] == piece).all() and group.length <= 1.25 * lengths[piece]
            assert own[: lengths[piece]].tolist() == list(range(borders[piece], borders[piece + 1]))
            assert documents.positions[own[: lengths[piece]]].tolist() == list(range(lengths[piece]))
    assert documents.groups[-1].places.stop == len(documents.order) == len(documents.is_filling)


def test_generation_and_export_know_no_documents():
    masked = replace(TINY, mask_across_documents=True)
    assert transformers_config(masked, 256) == transformers_config(TINY, 256)
    texts = [
        list(continue_ids(fresh(config), torch.arange(20), 30, sampling=Sampling(0.9, 9, 1.0, 1.0), seed=0))
        for config in (masked, TINY)
    ]
    assert texts[0] == texts[1]


@ON_A_GPU
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "head_size", "num_kv_heads"), [("bf16", 64, 2), ("bf16", 18, 1), ("fp32", 64, 4)])
@pytest.mark.parametrize("num_cuts", [3, 200])
def test_on_a_card_documents_are_as_if_alone(precision, head_size, num_kv_heads, num_cuts):
    """Long ones on end and short ones in groups, with flash attention and without."""
    card, positions = torch.device("cuda"), 1024
    config: TrainingConfig = replace(
        TINY, precision=precision, head_size=head_size, num_kv_heads=num_kv_heads, qk_norm=True, init_std=0.05,
        context_length=positions, tokens_per_step=positions, eval_tokens=positions,
    )  # fmt: skip
    inner = np.random.default_rng(0).choice(np.arange(1, 2 * positions), num_cuts, replace=False)
    borders = np.array(sorted({0, positions, 2 * positions, *inner.tolist()}), dtype=np.int32)
    decoder = fresh(config).to(card)
    tolerance = 1e-4 if precision == "fp32" else 0.03
    assert_each_document_is_as_if_alone(decoder, cut_windows(borders, card, positions), borders, tolerance)
