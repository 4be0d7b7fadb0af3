"""Laws of scripts/model/operations.py: plain torch's values and gradients in the variants of CPUs and of GPUs."""

import copy
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import CPU, TINY, fresh, paths, some_ids, take_path
from test_huggingface import assert_same_logits_and_gradients, written
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import list_options
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional
from tracker import fake_mode
from transformers import AutoModelForCausalLM

from scripts.config import COMPILER_OPTIONS, HOST_CHUNK_SCORES, PRECISIONS
from scripts.model import attention, operations
from scripts.model.attention import attend, flash_attends, kv_heads_at_once, padded_width, stacked, unstacked, weights_dtype
from scripts.model.decoder import empty_model, rotary_table
from scripts.model.losses import IGNORED, next_token_loss

ROTARY, ODD_ROTARY = (rotary_table(replace(TINY, head_size=width), 0, 24, CPU) for width in (8, 14))
TABLE, IDS = nn.Embedding(9, 32), torch.arange(48).view(2, 24) % 7
NORM, UP, GATE, DOWN = nn.RMSNorm(32, 1e-5), *(nn.Linear(*shape, bias=False) for shape in ((32, 48), (32, 48), (48, 32)))
HEADS, KV_HEADS, HIDDEN, MLP = (2, 4, 24, 8), (2, 2, 24, 8), (2, 24, 32), (2, 24, 48)
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1))
HEAD_WIDTHS = (2, 64, 100, 192, 194, 224, 226, 256, 258)


class Case(NamedTuple):
    """An operation, the same in plain torch, the shapes that it takes and the modules whose weights it uses."""

    ours: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    modules: tuple[nn.Module, ...]


def plain_rotate(x: torch.Tensor, rotary: torch.Tensor = ROTARY) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    rotated = torch.complex(first, second) * torch.complex(*rotary)
    return torch.cat((rotated.real, rotated.imag), -1)


def plain_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: torch.Tensor = ROTARY) -> torch.Tensor:
    k, v = (each.repeat_interleave(2, 1) for each in (plain_rotate(k, rotary), v))
    scores = plain_rotate(q, rotary) @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


CASES = {
    "embed": Case(lambda x: operations.embed(IDS, TABLE) * x, lambda x: TABLE(IDS) * x, (HIDDEN,), (TABLE,)),
    "normalise": Case(lambda x: operations.normalise(x, NORM), NORM, (HIDDEN,), (NORM,)),
    "normed_products": Case(
        lambda x: torch.cat(operations.normed_products(x, NORM, UP, GATE), -1),
        lambda x: torch.cat((UP(NORM(x)), GATE(NORM(x))), -1),
        (HIDDEN,),
        (NORM, UP, GATE),
    ),
    "gated_product": Case(
        lambda gate, up: operations.gated_product(gate, up, DOWN),
        lambda gate, up: DOWN(functional.silu(gate) * up),
        (MLP, MLP),
        (DOWN,),
    ),
    "product": Case(lambda x: operations.product(x, UP), UP, (HIDDEN,), (UP,)),
    "rotate": Case(lambda x: operations.rotate(x, ROTARY), plain_rotate, (HEADS,), ()),
    "attend": Case(partial(attend, rotary=ROTARY), plain_attend, (HEADS, KV_HEADS, KV_HEADS), ()),
    "attend with heads whose width is no multiple of 8": Case(
        partial(attend, rotary=ODD_ROTARY),
        partial(plain_attend, rotary=ODD_ROTARY),
        ((2, 4, 24, 14), (2, 2, 24, 14), (2, 2, 24, 14)),
        (),
    ),
}


@paths
@pytest.mark.parametrize("chunk_rows", [7, 1024])
@pytest.mark.parametrize("name", CASES)
def test_an_operation_has_plain_torchs_values_and_gradients(monkeypatch, name, chunk_rows, on_host):
    take_path(monkeypatch, on_host)
    monkeypatch.setattr(operations, "HOST_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(attention, "HOST_CHUNK_QUERIES", chunk_rows)
    monkeypatch.setattr(attention, "HOST_CHUNK_SCORES", 2**10 * chunk_rows)
    case, generator, found = CASES[name], torch.Generator().manual_seed(0), []
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in case.shapes]
    wanted = [*inputs, *(weight for module in case.modules for weight in module.parameters())]
    for operation in (case.ours, case.plain):
        output = operation(*inputs)
        from_above = torch.linspace(-1.0, 1.0, output.numel()).view(output.shape)
        found.append([output.detach(), *torch.autograd.grad(output, wanted, from_above)])
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


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


@pytest.fixture
def compiled() -> Iterator[None]:
    operations.compile_kernels(True)
    yield
    operations.compile_kernels(False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_kernels_have_the_values_and_gradients_of_written_ones(monkeypatch, compiled, precision):
    """In float32 at shapes that the compiler treats as kinds of their own too: one row of one position."""
    take_path(monkeypatch, False)
    decoder = fresh(replace(TINY, precision=precision, init_std=0.05))
    tolerance = {"fp32": 1e-6, "bf16": 0.01, "fp16": 0.002}[precision]
    for rows, positions in ((3, 24), (1, 1))[: 1 + (precision == "fp32")]:
        ids, found = some_ids(TINY, rows, positions + 1), []
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == ids[0, -1], IGNORED) if rows > 1 else ids[:, 1:]
        for is_compiled in (False, True):
            operations.compile_kernels(is_compiled)
            num_compiled = counters["stats"]["unique_graphs"]
            loss = next_token_loss(decoder(ids[:, :-1]), decoder.head, targets, 50)
            found.append([loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))])
            assert is_compiled == (counters["stats"]["unique_graphs"] > num_compiled)
        for ours, exact in zip(found[1], found[0], strict=True):
            assert ours.dtype == exact.dtype and (ours - exact).norm() <= tolerance * exact.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loss_is_compiled_for_more_shapes_than_torch_allows_by_itself_also_in_another_thread(compiled):
    """As CUDA's backward is one. Each thread has torch's own settings; beyond eight shapes they would raise."""
    hidden, head = torch.randn(1, 12, 8), torch.randn(9, 8).requires_grad_()

    def lose() -> list[float]:
        return [next_token_loss(hidden[:, :rows], head, torch.ones(1, rows).long(), 12).item() for rows in range(2, 11)]

    assert COMPILER_OPTIONS.keys() <= {*list_options()}
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lose).result()
    operations.compile_kernels(False)
    assert found == pytest.approx(lose())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_kernel_is_one_pass_that_makes_nothing_but_its_result(monkeypatch, compiled):
    take_path(monkeypatch, False)
    gate, up, x = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in (MLP, MLP, HIDDEN))
    down, head, targets = copy.deepcopy(DOWN).bfloat16(), torch.randn(500, 32).bfloat16(), torch.arange(48).view(2, 24)
    outputs = {
        "rotate": lambda: operations.rotate(torch.randn(HEADS).bfloat16(), ROTARY),
        "gated_product": lambda: operations.gated_product(gate, up, down).sum().backward(),
        "next_token_loss": lambda: next_token_loss(x, head, targets, 48),
    }
    for name, output in outputs.items():
        with fresh_cache():
            _, codes = run_and_get_code(output)
        made = [re.findall(r"= empty_strided_cpu\(\((.*?)\), \(.*?\), torch\.(\w+)\)", code) for code in codes]
        if name == "next_token_loss":
            assert made[0] and all("500" not in shape for shape, _ in made[0])
        else:
            assert [len(each) for each in made] == [code.count("async_compile.cpp") for code in codes] == [1] * len(codes)
            assert len(codes) == (2 if name == "gated_product" else 1) and all(kind == "bfloat16" for ((_, kind),) in made)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_no_head_width_leaves_a_card_to_the_kernel_that_computes_every_score(capability):
    """On every card that runs the dtype, with gradients and without, one of the other two takes the heads, as the rule says."""
    dtypes = [dtype for dtype in PRECISIONS.values() if capability >= (8, 0) or dtype != torch.bfloat16]
    with fake_mode("cuda", capability) as card:
        for dtype, width, kv_heads, trains in product(dtypes, HEAD_WIDTHS, (2, 4), (False, True)):
            shapes = (4, 16, width), (kv_heads, 16, width), (kv_heads, 16, width)
            q, k, v = (torch.empty(1, *shape, dtype=dtype, device=card.device).requires_grad_(trains) for shape in shapes)
            output = attend(q, k, v, torch.empty(2, 16, width // 2, device=card.device))
            assert card.kernels.pop() == ("flash" if flash_attends(capability, dtype, width, trains) else "efficient")
            assert not card.kernels and output.shape == q.shape and output.dtype == dtype and output.device == q.device


def test_what_stands_in_for_cudas_fused_norm_makes_tensors_like_the_operations_own():
    """Else the proofs on cards that are not there would be about another norm."""
    with fake_mode("cuda", (8, 0)) as card:
        x, gain = (torch.empty(*shape, 32, dtype=torch.bfloat16, device=card.device) for shape in ((2, 5), ()))
        stand_in: Any = torch.ops.aten._fused_rms_norm
        made = [operation(x, [32], gain, 1e-5) for operation in (stand_in, stand_in.operation)]
        ours, theirs = ([(each.shape, each.stride(), each.dtype, each.device) for each in results] for results in made)
    assert ours == theirs


@given(capability=st.sampled_from(CAPABILITIES), dtype=st.sampled_from(list(PRECISIONS.values())), data=st.data())
def test_a_card_that_is_not_known_is_the_worst_of_those_that_have_the_dtype(capability, dtype, data):
    width, trains = data.draw(st.integers(1, 300)), data.draw(st.booleans())
    if capability >= (8, 0) or dtype != torch.bfloat16:
        assert flash_attends(None, dtype, width, trains) <= flash_attends(capability, dtype, width, trains)
    worst = (7, 5) if dtype == torch.float16 else (8, 6)
    assert flash_attends(None, dtype, width, trains) == flash_attends(worst, dtype, width, trains)
    assert flash_attends(capability, dtype, padded_width(width), trains) == flash_attends(capability, dtype, width, trains)


def test_flash_attention_is_there_from_ampere_on_in_16_bits_up_to_256_and_on_small_cards_not_for_gradients_from_193_to_224():
    def widths(capability: tuple[int, int], dtype: torch.dtype, trains: bool) -> set[int]:
        return {width for width in range(1, 400) if flash_attends(capability, dtype, width, trains)}

    refused = set(range(193, 225))
    for half, trains in product((torch.float16, torch.bfloat16), (False, True)):
        assert widths((7, 5), half, trains) == set()
        for capability in CAPABILITIES[1:]:
            is_small = capability in ((8, 6), (8, 9), (12, 1))
            assert widths(capability, half, trains) == set(range(1, 257)) - (refused if is_small and trains else set())
    assert all(widths(capability, torch.float32, False) == set() for capability in CAPABILITIES)


@given(st.tuples(*[st.integers(1, 3)] * 4), st.sampled_from([4, 6]), st.booleans())
def test_heads_stacked_by_the_kv_head_that_they_read_come_back_as_they_were(sizes, width, is_by_position):
    rows, groups, repeats, length = sizes
    heads = torch.randn(rows, length, groups * repeats, width).transpose(1, 2)
    heads = heads if is_by_position else heads.contiguous()
    by_group = stacked(heads, groups)
    assert by_group.shape == (rows * groups, length * repeats, width)
    for kv_head in range(rows * groups):
        own = heads[kv_head // groups, kv_head % groups * repeats :][:repeats]
        assert torch.equal(by_group[kv_head].unflatten(0, (length, repeats)).transpose(0, 1), own)
    back = unstacked(by_group, rows, length, torch.float32)
    assert torch.equal(back, heads) and back.transpose(1, 2).is_contiguous()
    assert back.untyped_storage().data_ptr() != heads.untyped_storage().data_ptr()


@given(st.integers(1, 2**20), st.integers(1, 2**12), st.integers(1, 2**17), st.integers(1, 2**9))
def test_a_block_has_as_many_kv_heads_as_stay_in_the_cache_and_at_least_one(num_kv_heads, num_queries, num_seen, width):
    found = kv_heads_at_once(num_kv_heads, num_queries, num_seen, width)
    a_head = num_queries * max(num_seen, width)
    assert 1 <= found <= num_kv_heads
    assert found == 1 or found * a_head <= HOST_CHUNK_SCORES
    assert found == num_kv_heads or (found + 1) * a_head > HOST_CHUNK_SCORES


def test_no_weight_of_attention_vanishes_in_half_precision_on_a_cpu(monkeypatch):
    for has_16_bit_products, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda found=has_16_bit_products: found)
        assert weights_dtype(torch.bfloat16) == wanted
        assert weights_dtype(torch.float16) == weights_dtype(torch.float32) == torch.float32
    queries, keys, values = torch.zeros(3, 1, 1, 1024, 2, dtype=torch.float16)
    queries[..., 0], keys[..., 1:, 0], values[..., 1:, :] = 4.0, -6.5, 2.0**15
    still = torch.stack((torch.ones(1024, 1), torch.zeros(1024, 1)))
    likelihood = torch.exp(queries[0, 0, 0].double() @ keys[0, 0, -1].double() / 2**0.5)
    assert likelihood < 2.0**-25, "a weight that half precision does not have"
    wanted = 2.0**15 * 1023 * likelihood / (1 + 1023 * likelihood)
    torch.testing.assert_close(attend(queries, keys, values, still)[0, 0, -1].double(), wanted.expand(2), rtol=1e-2, atol=0.0)


@given(num_rows=st.integers(0, 99), rows_at_once=st.integers(1, 40))
def test_slices_of_rows_cover_each_row_once_in_order(num_rows, rows_at_once):
    slices = operations.row_slices(num_rows, rows_at_once)
    assert [row for rows in slices for row in range(num_rows)[rows]] == list(range(num_rows))
    assert all(rows.stop - rows.start == rows_at_once for rows in slices)
