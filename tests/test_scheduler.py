"""Laws of what runs beside the host: in every order that streams and events allow, the results are those of everything at once.

The orders are drawn by tests/scheduler.py from a seed, under the code of scripts/engine/offload.py, scripts/engine/updates.py
and scripts/model/activation_offload.py, with DeepSpeed's engine and, at last, the whole decoder. Each wait of these modules is
taken out of their source once: then a seed must be found whose result is another.
"""

import ast
import gc
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import chain
from random import Random
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import cpuinfo
import deepspeed
import pytest
import torch
import torch._dynamo  # else the first checkpoint does it, and keeps what lies on the stack
from deepspeed.comm import comm
from deepspeed.utils import groups
from scheduler import CARD, Card, Pool
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from scripts import config as settings
from scripts.config import TrainingConfig
from scripts.engine import offload, updates
from scripts.model import activation_offload, decoder
from scripts.model.activation_offload import host_buffer
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.documents import Windows
from scripts.model.losses import next_token

HOST = torch.device("cpu")
# A part runs so many cases, drawn by their number: sizes, precision, what is skipped, whether memory can be page-locked. Seed s
# is an order of case s modulo that number. The ordinary run takes the first seeds; the slow one goes on to more than 1,000.
NUM_CASES = {"ring": 60, "activations": 30, "steps": 14, "decoder": 7}
NUM_SEEDS = {"ring": 60, "activations": 30, "steps": 20, "decoder": 2}
NUM_SLOW_SEEDS = {"ring": 560, "activations": 330, "steps": 70, "decoder": 10}
MOST_SEEDS_FOR_A_WAIT = 120
MODULES = {"offload": offload, "updates": updates, "activation_offload": activation_offload}
WAITING = {"wait_event", "wait_stream", "synchronize", "result", "shutdown", "record", "record_event", "query", "wait"}
WAITING |= {"drain", "release", "close", "_wait_for"}
# Every wait of the modules, every mark that is waited for and every call that waits, and the part that misses it.
WAITS = {
    "updates StagingRing.send: result": "ring",
    "updates StagingRing.send: release": "ring",
    "updates StagingRing.release: wait_event": "ring",
    "updates StagingRing.drain: result": "ring",
    "updates StagingRing.close: shutdown": "ring",
    "updates StagingRing._copy: wait_stream": "ring",
    "updates StagingRing._copy: record": "ring",
    "updates add_to: synchronize": "ring",
    "offload replace_offload_path: drain": "steps",
    "offload replace_offload_path: release": "steps",
    "offload _reduce_ipg_grads: release": "steps",
    "offload GroupUpdates.update: record_event": "steps",
    "offload GroupUpdates.update: synchronize": "steps",
    "offload GroupUpdates._begin: synchronize": "steps",
    "offload GroupUpdates._begin: record_event": "steps",
    "offload GroupUpdates._finish: synchronize": "steps",
    "updates bring_down: synchronize": "steps",
    "updates _copy_down: record_event": "steps",
    "offload _destroy: close": "steps",
    "activation_offload BlockInputOffload._offload: _wait_for": "activations",
    "activation_offload BlockInputOffload._restore: _wait_for": "activations",
    "activation_offload BlockInputOffload._copy: wait_stream": "activations",
    "activation_offload BlockInputOffload._copy: record": "activations",
    "activation_offload BlockInputOffload._wait_for: wait_event": "activations",
}
ON_SO_MANY_RANKS = {"offload replace_offload_path: release": (1,), "offload _reduce_ipg_grads: release": (2,)}


class Change(NamedTuple):
    """Words of a module's source, what to write in their place, and the part that misses them."""

    module: str
    words: str
    others: str
    part: str


# What keeps an order without a wait.
ORDERS = {
    "sums come down through two slots": Change("updates", "slots[number % 2]", "slots[(number + 1) % 2]", "steps"),
    "a gradient stays until it is copied": Change("updates", "self._held.append(Sent(source, copied))", "pass", "ring"),
    "weights have two halves of the staging": Change("offload", "halves[group % 2]", "halves[0]", "steps"),
    "an input stays until it is copied": Change(
        "activation_offload", "_Copying(x.detach(), self", "_Copying(host, self", "activations"
    ),
    "all forwards share a copying stream": Change("activation_offload", "@cache\n", "", "activations"),
}
MISSING = WAITS | {order: change.part for order, change in ORDERS.items()}


class Code(NamedTuple):
    """The modules under proof, executed anew from their sources."""

    offload: ModuleType
    updates: ModuleType
    activation_offload: ModuleType


class Waits(ast.NodeTransformer):
    """Names the waits of a module's source, and takes one of them out: what it was asked of is still evaluated."""

    def __init__(self, module: str, left_out: str | None = None) -> None:
        self.module, self.left_out, self.path, self.found = module, left_out, [], []

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._within(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if not isinstance(function, ast.Attribute) or function.attr not in WAITING:
            return self.generic_visit(node)
        function.value = self.visit(function.value)
        node.args = [self.visit(each) for each in node.args]
        if not self._is_left_out(function.attr):
            return node
        return node.args[0] if function.attr == "record_event" else ast.Tuple([function.value, *node.args], ast.Load())

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        is_left_out = node.attr in WAITING and self._is_left_out(node.attr)
        return ast.parse("lambda *_: None", mode="eval").body if is_left_out else self.generic_visit(node)

    def _within(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        self.path.append(node.name)
        self.generic_visit(node)
        self.path.pop()
        return node

    def _is_left_out(self, name: str) -> bool:
        self.found.append(f"{self.module} {'.'.join(self.path)}: {name}")
        return self.found[-1] == self.left_out


def waits_of(module: str) -> list[str]:
    waits = Waits(module)
    waits.visit(ast.parse(inspect.getsource(MODULES[module])))
    return waits.found


@cache
def compiled(module: str, left_out: str | None) -> Any:
    source, change = inspect.getsource(MODULES[module]), ORDERS.get(left_out or "")
    if change is not None and change.module == module:
        assert source.count(change.words) == 1
        source = source.replace(change.words, change.others)
    tree = Waits(module, left_out).visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), str(MODULES[module].__file__), "exec")


def code_without(left_out: str | None) -> Code:
    """All modules, without the wait or the order of this name. Products are in float32, as on a processor without others."""
    code = Code(*(ModuleType(MODULES[name].__name__) for name in Code._fields))
    for module, name in zip(code, Code._fields, strict=True):
        exec(compiled(name, left_out), vars(module))
    known = {
        name: value for name, value in vars(code.updates).items() if vars(code.offload).get(name) is vars(updates).get(name)
    }
    vars(code.offload).update(known, updates=code.updates, product_dtype=lambda storage, device: torch.float32)
    return code


class Plain:
    """The host alone, without a card: what the modules do there, with copies made at once."""

    device, most_bytes, pools = HOST, 0, ()

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def adopt(self, tensor: Tensor) -> None:
        pass

    def finish(self) -> None:
        pass

    def standing_in(self) -> Any:
        return nullcontext()


class Outcome(NamedTuple):
    """What is the same in every order: all numbers, the most memory that tensors of the card took, and the threads left."""

    numbers: bytes
    most_bytes: int
    num_threads: int


Place = Card | Plain
Part = Callable[[Place, Code, int], list[Tensor]]


def numbers_of(tensors: list[Tensor]) -> bytes:
    return b"".join(each.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for each in tensors)


def outcome(part: Part, place: Place, case: int, left_out: str | None = None) -> Outcome:
    """What a part of the program makes of a case."""
    code = code_without(left_out)
    if isinstance(place, Card):
        vars(code.updates)["ThreadPoolExecutor"] = partial(Pool, place)
    gc.disable()
    try:
        numbers = numbers_of(part(place, code, case))
    finally:
        gc.enable()
    return Outcome(numbers, place.most_bytes, sum(not pool.is_closed for pool in place.pools))


def in_pieces_of(num_elements: int) -> Any:
    """Gradients go to the host in pieces of this many elements, and are added up there by thirds of them."""
    return patch.multiple(settings, GRADIENT_PIECE_ELEMENTS=num_elements, GRADIENT_CACHE_ELEMENTS=-(-num_elements // 3))


def card_of(seed: int, case: int) -> Card:
    """In one case of five no memory can be page-locked."""
    return Card(seed, can_lock=case % 5 != 4)


def device_of(place: Place) -> torch.device:
    return CARD if isinstance(place, Card) else HOST


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_the_ring(place: Place, code: Code, case: int) -> list[Tensor]:
    """Gradients of some sizes go through a ring of some size, some larger than it, and after each step the host uses its memory
    for something else. Either each is made anew and dropped, or all stay where they are, as sums do.
    """
    draw, dtype = Random(case), torch.bfloat16
    sizes = [draw.choice((1, 8, 30, 75)) for _ in range(4)]
    room, stays, is_released = 2 * draw.randint(8, 60), draw.random() < 0.3, draw.random() < 0.5
    with in_pieces_of(draw.choice((10, 20, 1000))), place.standing_in():
        memory = code.activation_offload.host_buffer(room * dtype.itemsize, device_of(place)).view(dtype)
        ring = code.updates.StagingRing(memory, None if stays else draw.choice((0, 20, 80)), device_of(place))
        weights = [place.put(drawn(size, size).to(dtype)) for size in sizes]
        sums, arrived, kept = [torch.zeros_like(each) for each in weights], torch.zeros(max(sizes)), []
        for step in range(2):
            for micro_batch in range(2):
                for weight, total in zip(weights, sums, strict=True):
                    gradient = (weight * (step + 1)).sin() + micro_batch
                    if stays:
                        gradient = total.copy_(gradient)
                    ring.send(gradient, arrived[: len(weight)], micro_batch == 0)
                    del gradient
                if stays:
                    ring.drain()
                if is_released:
                    ring.release(0)
            ring.drain()
            kept.append(arrived.clone())
            memory.fill_(step)
        ring.close()
        place.finish()
    return kept


def block(weight: Tensor, x: Tensor) -> Tensor:
    return x + torch.tanh(x @ weight)


def through_blocks(place: Place, code: Code, case: int) -> list[Tensor]:
    """Updates of a stack of blocks whose inputs are offloaded: forwards and backwards in turn, several forwards before their
    backwards, forwards without one, and forwards that end after some blocks.
    """
    draw, host_inputs = Random(case), code.activation_offload.HostInputs()
    num_blocks, width, found = draw.randint(1, 5), draw.choice((3, 8)), []

    def forward(rows: int, last: int) -> Tensor:
        x = first.unsqueeze(0) * place.put(drawn(rows, rows, 1))
        offloaded = code.activation_offload.BlockInputOffload(x, num_blocks, host_inputs)
        for weight in weights[:last]:
            with offloaded.hooks():
                x = checkpoint(partial(block, weight), x, use_reentrant=False, preserve_rng_state=False)
            x = x * 0.9
        return x.square().mean()

    with place.standing_in():
        first = place.put(drawn(0, width)).requires_grad_()
        weights = [place.put(drawn(number, width, width) / 3).requires_grad_() for number in range(num_blocks)]
        for _ in range(3):
            if draw.random() < 0.6:
                forward(2, draw.randrange(num_blocks))
            totals = [forward(draw.choice((2, 2, 5)), num_blocks) for _ in range(draw.randint(1, 2))]
            draw.shuffle(totals)
            if draw.random() < 0.3:
                totals.pop()
            while totals:
                total = totals.pop()
                total.backward()
                found.append(total.detach())
                del total
            with torch.no_grad():
                for each in (first, *weights):
                    if each.grad is not None:
                        each -= 0.1 * each.grad
                        each.grad = None
        place.finish()
    return [*found, first, *weights]


class Stack(nn.Module):
    """Weights of several sizes; the loss is the mean square of the last output."""

    shapes = ((6, 7), (7, 9), (9, 4), (4, 12), (12, 3))

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(0.4 * drawn(rows, rows, columns) for rows, columns in self.shapes)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x.float().square().mean()


class SmallBuckets(TrainingConfig):
    """The run of a `Stack`: one of its weights is larger than a bucket, the others fit, two at a time or alone."""

    bucket_elements = 60  # pyright: ignore[reportIncompatibleVariableOverride, reportAssignmentType]


class Trained(NamedTuple):
    """DeepSpeed's engine, its configuration, and its weights and masters as they were at first."""

    engine: Any
    config: TrainingConfig
    weights: list[Tensor]
    masters: list[Tensor]


ADAMW, SHORT_ADAMW, MUON, SHORT_MUON = (
    {"optimizer": optimizer, "optimizer_state_precision": precision}
    for optimizer in ("adamw", "muon")
    for precision in ("fp32", "bf16")
)
ON_THE_CARD = {"accumulate_on": "gpu", "accumulation_precision": "fp32"}
KINDS = (
    {"precision": "bf16", "tokens_per_step": 2} | ADAMW,
    {"precision": "fp32", "tokens_per_step": 1} | ADAMW,
    {"precision": "bf16", "tokens_per_step": 2} | SHORT_MUON,
    {"precision": "bf16", "tokens_per_step": 2} | ADAMW | ON_THE_CARD,
    {"precision": "fp32", "tokens_per_step": 3} | SHORT_ADAMW | ON_THE_CARD,
    {"precision": "bf16", "tokens_per_step": 2} | SHORT_MUON | ON_THE_CARD | {"accumulation_precision": "bf16"},
    {"precision": "fp32", "tokens_per_step": 1} | MUON,
)
SHAPES: dict = dict(
    vocab_size=257, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, mlp_size=12, context_length=4, micro_batch_rows=2,
    loss_chunk_rows=5, activation_checkpointing="block_offload", eval_tokens=4, qk_norm=False,
)  # fmt: skip


@cache
def stack_engine(num_ranks: int, kind: int) -> Trained:
    changes: dict = KINDS[kind] | {"tokens_per_step": KINDS[kind]["tokens_per_step"] * num_ranks}
    config = SmallBuckets(context_length=1, micro_batch_rows=1, eval_tokens=1, max_grad_norm=0.1, **changes)
    model = Stack().to(config.dtype)
    weights = list(model.parameters())
    groups = (weights[:1], weights[1:3], weights[3:4], weights[4:])
    parts = [{"params": group, "is_block": number in (1, 2)} for number, group in enumerate(groups)]
    return trained(model, parts, config, num_ranks)


@cache
def decoder_engine(num_ranks: int, kind: int) -> Trained:
    changes: dict = KINDS[kind] | {"tokens_per_step": 8 * KINDS[kind]["tokens_per_step"] * num_ranks}
    config = TrainingConfig(**SHAPES, **changes)
    model = initialise(empty_model(config, HOST))
    return trained(model, parameter_groups(model, config.weight_decay), config, num_ranks)


def trained(model: nn.Module, parts: list[dict], config: TrainingConfig, num_ranks: int) -> Trained:
    dictionary = TrainingConfig.deepspeed_config(config, num_ranks)
    engine: Any = deepspeed.initialize(model=model, model_parameters=parts, config=dictionary)[0]  # pyright: ignore
    optimizer = engine.optimizer
    masters = [each.detach().clone() for each in optimizer.single_partition_of_fp32_groups]
    return Trained(engine, config, [each.clone() for each in optimizer.bit16_groups_flat], masters)


@torch.no_grad()
def begin_again(run: Trained) -> None:
    """Weights, masters, gradients, moments and counts as they were before the first step."""
    optimizer = run.engine.optimizer
    for flat, weights in zip(optimizer.bit16_groups_flat, run.weights, strict=True):
        flat.copy_(weights)
    for master, first in zip(optimizer.single_partition_of_fp32_groups, run.masters, strict=True):
        master.copy_(first)
        if master.grad is not None:
            master.grad.zero_()
        state = optimizer.optimizer.state.get(master, {})
        for name in state:
            state[name] = 0 if name == "step" else state[name].zero_()
    run.engine.skipped_steps = 0


def take_steps(place: Place, code: Code, run: Trained, case: int, loss_of: Callable) -> list[Tensor]:
    """Steps of DeepSpeed's engine; in some a gradient is not finite, and they are skipped."""
    draw, engine, optimizer = Random(case), run.engine, run.engine.optimizer
    begin_again(run)
    for flat in optimizer.bit16_groups_flat:
        place.adopt(flat)
    num_micro_batches, norms, found = engine.gradient_accumulation_steps(), [], []
    with place.standing_in():
        engine.device = device_of(place)
        code.offload.replace_offload_path(engine, run.config)
        for _ in range(3):
            spoilt = draw.choice((None, None, draw.randrange(num_micro_batches)))
            for micro_batch in range(num_micro_batches):
                loss = loss_of(draw.randrange(4)) * (math.nan if micro_batch == spoilt else 1.0)
                engine.backward(loss)
                found.append(loss.detach())
                del loss
                engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        with patch.object(type(optimizer), "destroy"):
            optimizer.destroy()
        place.finish()
    masters = optimizer.single_partition_of_fp32_groups
    states = [optimizer.optimizer.state.get(each, {}) for each in masters]
    moments = [moment.float() for state in states for _, moment in sorted(state.items()) if isinstance(moment, Tensor)]
    gradients = [each.grad for each in masters if each.grad is not None]
    counts = torch.tensor([*norms, engine.skipped_steps], dtype=torch.float64)
    return [*found, *optimizer.bit16_groups_flat, *masters, *gradients, *moments, counts]


def through_steps(num_ranks: int, place: Place, code: Code, case: int) -> list[Tensor]:
    run = stack_engine(num_ranks, case % len(KINDS))
    xs = [place.put(drawn(number, 3, 6).to(run.config.dtype)) for number in range(4)]
    with in_pieces_of(Random(case).choice((10, 25, 1000))):
        return take_steps(place, code, run, case, lambda number: run.engine(xs[number]))


def norm_gradients(gradient: Tensor, x: Tensor, shape: list[int], scale: Tensor, gain: Tensor, _: list[bool]) -> list[Tensor]:
    """In the place of a kernel that torch has for cards alone."""
    rows, inner = x.float() * scale, gradient.float() * gain
    along = (inner * rows).mean(-1, keepdim=True)
    return [((inner - rows * along) * scale).to(x.dtype), (gradient.float() * rows).flatten(0, -2).sum(0).to(gain.dtype)]


def through_the_decoder(num_ranks: int, place: Place, code: Code, case: int) -> list[Tensor]:
    """The whole: the decoder's block inputs, its gradients and its weights, all at the same time."""
    run = decoder_engine(num_ranks, case % len(KINDS))
    run.engine.module.host_inputs = code.activation_offload.HostInputs()
    windows = list(map(place.put, torch.randint(257, (4, 2, 5), generator=torch.Generator().manual_seed(case))))
    offloading = patch.object(decoder, "BlockInputOffload", code.activation_offload.BlockInputOffload)
    norming = patch.object(torch.ops.aten, "_fused_rms_norm_backward", norm_gradients)
    with offloading, norming, in_pieces_of(Random(case).choice((150, 1000, 10000))):
        return take_steps(place, code, run, case, lambda number: next_token(run.engine, Windows(windows[number]), run.config))


def parts(num_ranks: int) -> dict[str, Part]:
    return {
        "ring": through_the_ring, "activations": through_blocks, "steps": partial(through_steps, num_ranks),
        "decoder": partial(through_the_decoder, num_ranks),
    }  # fmt: skip


@contextmanager
def world_of(num_ranks: int) -> Iterator[int]:
    """A process group whose other ranks say nothing: DeepSpeed on rank 0 takes the path of several ranks."""
    torch.distributed.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    known = [(module, dict(vars(module))) for module in (comm, groups)]
    try:
        yield num_ranks
    finally:
        for cached in (stack_engine, decoder_engine, together):
            cached.cache_clear()
        torch.distributed.destroy_process_group()
        for module, names in known:
            vars(module).update(names)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def world(request) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patched, world_of(request.param) as num_ranks:
        patched.setenv("LOCAL_RANK", "0")
        patched.setattr(cpuinfo, "get_cpu_info", cpuinfo.get_cpu_info)
        offload.start_quickly()
        logging.disable(logging.WARNING)
        yield num_ranks
        logging.disable(logging.NOTSET)


@cache
def together(name: str, num_ranks: int, case: int) -> Outcome:
    """The outcome where everything runs at once."""
    return outcome(parts(num_ranks)[name], Card(None), case)


def differs(name: str, num_ranks: int, seed: int, left_out: str | None = None) -> bool:
    """Whether the order of this seed gives another outcome than everything at once."""
    case = seed % NUM_CASES[name]
    found = outcome(parts(num_ranks)[name], card_of(seed, case), case, left_out)
    return found != together(name, num_ranks, case)


def find_seed(left_out: str, name: str, num_ranks: int) -> int | None:
    """A seed whose outcome is another without this wait or order."""
    return next((seed for seed in range(MOST_SEEDS_FOR_A_WAIT) if differs(name, num_ranks, seed, left_out)), None)


def seeds_of(name: str) -> list:
    """Those of the ordinary run, and as many at a time of the slow one."""
    first, last = NUM_SEEDS[name], NUM_SLOW_SEEDS[name]
    slow = [pytest.param(range(begin, begin + 50), marks=pytest.mark.slow) for begin in range(first, last, 50)]
    return [range(first), *slow]


def without(*names: str) -> list[str]:
    return [left_out for left_out, name in MISSING.items() if name in names]


@pytest.mark.parametrize("seeds", seeds_of("ring"), ids=str)
def test_ring_adds_up_the_same_in_every_order(seeds):
    assert [seed for seed in seeds if differs("ring", 1, seed)] == []


@pytest.mark.parametrize("seeds", seeds_of("activations"), ids=str)
def test_blocks_whose_inputs_are_offloaded_learn_the_same_in_every_order(seeds):
    assert [seed for seed in seeds if differs("activations", 1, seed)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("seeds", seeds_of("steps"), ids=str)
def test_steps_of_deepspeed_are_the_same_in_every_order(world, seeds):
    assert [seed for seed in seeds if differs("steps", world, seed)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("seeds", seeds_of("decoder"), ids=str)
def test_steps_of_the_decoder_are_the_same_in_every_order(world, seeds):
    assert [seed for seed in seeds if differs("decoder", world, seed)] == []


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_everything_at_once_is_what_the_host_makes_without_a_card(world):
    for name in ("ring", "activations", "steps"):
        for case in range(2 * len(KINDS)):
            assert together(name, world, case).numbers == outcome(parts(world)[name], Plain(), case).numbers, (name, case)


def test_seed_says_all_and_seeds_differ():
    orders = []
    for seed in (*range(10), *range(10)):
        card = Card(seed)
        outcome(through_the_ring, card, 0)
        orders.append(tuple(card.order))
    assert orders[:10] == orders[10:]
    assert len(set(orders)) == 10


def seen_by_the_host(seed: int, *, stream_waits: bool, host_waits: bool) -> float:
    """What lies in page-locked memory, full of zeros, after a copy of a kernel's result, 2, was issued."""
    card = Card(seed)
    with card.standing_in():
        stream, done, host = torch.cuda.Stream(CARD), torch.cuda.Event(), host_buffer(8, CARD).view(torch.float32).fill_(0)
        source = 2 * card.put(torch.ones(2))
        if stream_waits:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(source, non_blocking=True)
            done.record()
        if host_waits:
            done.synchronize()
        return host.nan_to_num(-1)[0].item()


def seen_by_the_card(seed: int, *, host_waits: bool) -> float:
    """What a copy brings to the card from page-locked memory that held 1, and 2 since the copy was issued."""
    card = Card(seed)
    with card.standing_in():
        target, host = card.put(torch.zeros(2)), host_buffer(8, CARD).view(torch.float32).fill_(1)
        target.copy_(host, non_blocking=True)
        if host_waits:
            torch.cuda.current_stream().synchronize()
        host.fill_(2)
        return target[0].item()


def seen_after_the_tensor(seed: int, *, stream_waits: bool) -> float:
    """What a copy makes of a tensor that is gone: of 2, in memory that others have got since."""
    card = Card(seed)
    with card.standing_in():
        stream, done, host = torch.cuda.Stream(CARD), torch.cuda.Event(), host_buffer(8, CARD).view(torch.float32)
        source = card.put(torch.full((2,), 2.0))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(source, non_blocking=True)
            done.record()
        if stream_waits:
            torch.cuda.current_stream().wait_event(done)
        del source
        card.put(torch.zeros(2))
        stream.synchronize()
        return host.nan_to_num(-1)[0].item()


@pytest.mark.parametrize(
    ("seen", "every"),
    [
        (partial(seen_by_the_host, stream_waits=False, host_waits=False), {0.0, -1.0, 2.0}),
        (partial(seen_by_the_host, stream_waits=True, host_waits=False), {0.0, -1.0, 2.0}),
        (partial(seen_by_the_host, stream_waits=False, host_waits=True), {-1.0, 2.0}),
        (partial(seen_by_the_host, stream_waits=True, host_waits=True), {2.0}),
        (partial(seen_by_the_card, host_waits=False), {1.0, 2.0}),
        (partial(seen_by_the_card, host_waits=True), {1.0}),
        (partial(seen_after_the_tensor, stream_waits=False), {-1.0, 0.0, 2.0}),
        (partial(seen_after_the_tensor, stream_waits=True), {2.0}),
    ],
)
def test_copy_takes_place_at_every_moment_that_streams_and_events_allow_and_at_no_other(seen, every):
    assert {seen(seed) for seed in range(150)} == every


def test_every_wait_of_the_modules_is_listed():
    assert sorted(chain.from_iterable(map(waits_of, MODULES))) == sorted(WAITS)


@pytest.mark.parametrize("left_out", without("ring", "activations"))
def test_ring_and_activations_need_each_wait(left_out):
    assert find_seed(left_out, MISSING[left_out], 1) is not None


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("left_out", without("steps"))
def test_steps_need_each_wait(world, left_out):
    is_taken = world in ON_SO_MANY_RANKS.get(left_out, (1, 2))
    assert not is_taken or find_seed(left_out, "steps", world) is not None
