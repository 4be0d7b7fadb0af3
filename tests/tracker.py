"""Live bytes, counted storage by storage: in fake mode for models of any size, and over the real engine on the CPU.

A ledger of births and deaths of untyped storages is kept while the tracker is entered; peaks are read from it afterwards, once
it is known which storages would lie on the host where there is a GPU. A view is free; a storage counts once, from the operation
that makes it to its death. What operations do inside themselves is not seen.
"""

import ctypes
import gc
import linecache
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ds.shards import Labels
from scripts import trainer
from scripts.config import PRECISIONS, TrainingConfig
from scripts.engine import truth_check
from scripts.model.decoder import Decoder, empty_model
from scripts.model.documents import Documents, Windows, windows_of
from scripts.model.huggingface import teacher_config
from scripts.model.losses import next_token
from scripts.prepare_data import prepare
from scripts.run import setup
from scripts.run.evaluate import held_out_loss, sample_record
from scripts.run.state import Progress, Run
from scripts.train_distill import from_labels, from_teacher, label, objective_of

HOUSE = ("/scripts/", "/deepspeed/", "/transformers/", "/benchmarks/")
COPYING = (torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor)
HOST_FILES = ("/ops/adam/cpu_adam.py", "/scripts/run/checkpoint.py", "/scripts/run/storage.py", "/scripts/model/huggingface.py")
HOST_FUNCTIONS, DEVICE_FUNCTIONS = ("sum_of_squares", "host_buffer"), ("empty_model",)
HOST_LINES = ("temp_buffer_bit16 = torch.full", "temp_grad_buffer_for_cpu_offload = torch.zeros", "torch.randn(", "pin_memory=")

# The last of the eight cards that torch's fake guard has: streams that the house keeps for it are no other test's.
HOST, CARD = torch.device("cpu"), torch.device("cuda", 7)
WORST_CARDS = {"bf16": (8, 6), "fp16": (7, 5), "fp32": (7, 5)}
CUDA_STAND_IN = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <utility>

// What autograd asks of CUDA, answered without it: is it built, which stream is current.
struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

constexpr auto CUDA = c10::DeviceType::CUDA;
static auto& guard_in_use = c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)];
static const c10::impl::DeviceGuardImplInterface* guard_before;
static void* hooks_before;

static void*& kind_of(const at::CUDAHooksInterface& hooks) {
  return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

extern "C" void begin() {
  static const Hooks hooks;
  static const c10::impl::FakeGuardImpl<CUDA> guard;
  guard_before = guard_in_use.exchange(&guard);
  hooks_before = std::exchange(kind_of(at::detail::getCUDAHooks()), kind_of(hooks));
}

extern "C" void end() {
  guard_in_use.store(guard_before);
  kind_of(at::detail::getCUDAHooks()) = hooks_before;
}
"""


class Peak(NamedTuple):
    """The most bytes alive at once, what made them by place (largest first), and the size of the largest storage of all."""

    num_bytes: int
    places: dict[str, int]
    largest_bytes: int


class Storage(NamedTuple):
    """One storage: its size, the place in the sources that made it, whether that place works on the host, and its device."""

    num_bytes: int
    place: str
    on_host: bool
    device_type: str


class Sides(NamedTuple):
    """The peaks on the device and on the host in one stretch of time, and the bytes copied from each to the other in it."""

    device: Peak
    host: Peak
    num_bytes_down: int
    num_bytes_up: int


class Moment(NamedTuple):
    """How many events and copies the ledger held."""

    num_events: int
    num_copies: int


class Copy(NamedTuple):
    """Numbers of the storages that one operation read and wrote into another, and the bytes of what it read."""

    source: int
    target: int
    num_bytes: int


class Tracker(TorchDispatchMode):
    """The ledger: `storages` in order of birth, `events` +n / -n for the birth and death of storage n (counted from 1), and
    `copies`, what was copied or added from one storage into another.
    """

    def __init__(self, existing: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self.events: list[int] = []
        self.copies: list[Copy] = []
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self._host: set[int] = set()
        for place, tensor in existing:
            self._meet(tensor, place, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._meet(leaf, None, False)
        if func in COPYING and isinstance(args[1], Tensor):
            source, target = self._meet(args[1], None, False), self._meet(args[0], None, False)
            self.copies.append(Copy(source, target, args[1].numel() * args[1].element_size()))
        return made

    def now(self) -> Moment:
        """A moment, for `sides` to begin or end at."""
        return Moment(len(self.events), len(self.copies))

    def sides(self, begin: Moment, end: Moment) -> Sides:
        """What happened on both sides between two moments, by what is known of the storages now."""
        return Sides(
            self.peak(False, begin.num_events, end.num_events),
            self.peak(True, begin.num_events, end.num_events),
            self._copied_bytes(True, begin, end),
            self._copied_bytes(False, begin, end),
        )

    def claim_host(self, tensors: Iterable[Tensor]) -> None:
        """Says that these would lie in host memory where there is a GPU, from their birth on."""
        for tensor in tensors:
            self._host.add(self._meet(tensor, None, True))

    def peak(self, on_host: bool, begin: int, end: int) -> Peak:
        """The peak of one side between two numbers of events."""
        moment = self._moment_of_peak(on_host, begin, end)
        places: dict[str, int] = {}
        for storage in self._alive_at(moment, on_host):
            places[storage.place] = places.get(storage.place, 0) + storage.num_bytes
        ordered = dict(sorted(places.items(), key=lambda item: -item[1]))
        present = self._alive_at(begin, on_host) + [
            self.storages[event - 1] for event in self.events[begin:end] if event > 0 and self._is_host(event) == on_host
        ]
        return Peak(sum(places.values()), ordered, max((storage.num_bytes for storage in present), default=0))

    def _copied_bytes(self, to_host: bool, begin: Moment, end: Moment) -> int:
        copies = self.copies[begin.num_copies : end.num_copies]
        sides = [(self._is_host(copy.source), self._is_host(copy.target), copy.num_bytes) for copy in copies]
        return sum(num_bytes for source, target, num_bytes in sides if source != target and target == to_host)

    def _moment_of_peak(self, on_host: bool, begin: int, end: int) -> int:
        live, most, moment = 0, -1, begin
        for index, event in enumerate([0, *self.events[:end]]):
            if event and self._is_host(abs(event)) == on_host:
                live += self.storages[abs(event) - 1].num_bytes * (1 if event > 0 else -1)
            if index >= begin and live > most:
                most, moment = live, index
        return moment

    def _alive_at(self, moment: int, on_host: bool) -> list[Storage]:
        numbers = set()
        for event in self.events[:moment]:
            (numbers.add if event > 0 else numbers.discard)(abs(event))
        return [self.storages[number - 1] for number in numbers if self._is_host(number) == on_host]

    def _is_host(self, number: int) -> bool:
        return number in self._host or self.storages[number - 1].on_host

    def _meet(self, tensor: Tensor, place: str | None, claimed: bool) -> int:
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None:
            return known[0]
        made, on_host = (place, claimed) if place is not None else _birthplace()
        self.storages.append(Storage(storage.nbytes(), made, on_host or claimed, tensor.device.type))
        number = len(self.storages)
        self._alive[storage._cdata] = number, weakref.ref(storage, lambda _, key=storage._cdata: self._bury(key))
        self.events.append(number)
        return number

    def _bury(self, key: int) -> None:
        self.events.append(-self._alive.pop(key)[0])


def _birthplace() -> tuple[str, bool]:
    """The innermost line of the house or of DeepSpeed that is running, and whether it makes tensors for the host."""
    frame, place, on_host = sys._getframe(2), None, False
    while frame is not None:
        code = frame.f_code
        if _is_house(code.co_filename):
            if place is None:
                place = f"{code.co_filename.rpartition('/')[2]}:{code.co_name}:{frame.f_lineno}"
                on_host = any(line in linecache.getline(code.co_filename, frame.f_lineno) for line in HOST_LINES)
            if code.co_name in DEVICE_FUNCTIONS:
                break
            on_host = on_host or code.co_name in HOST_FUNCTIONS or code.co_filename.endswith(HOST_FILES)
        frame = frame.f_back
    return place or "elsewhere", on_host


@cache
def _is_house(path: str) -> bool:
    return any(part in path for part in HOUSE)


def peak_of(work: Callable[[], Any], existing: Iterable[tuple[str, Tensor]]) -> Peak:
    """The peak of `work()`, with `existing` (place, tensor) counted from the start; all storages count."""
    with Tracker(existing) as tracker:
        work()
    return tracker.peak(False, 0, len(tracker.events))


class Alone(NamedTuple):
    """A model on one rank as objectives call it, in the place of DeepSpeed's engine."""

    module: Decoder

    def __call__(self, ids: Tensor, documents: Documents | None = None) -> Tensor:
        return self.module(ids, documents=documents)


def fake_step_peak(config: TrainingConfig, device_type: str = "cuda", lengths: tuple[int, ...] = (1,)) -> Peak:
    """Device-side storages of one micro-batch on one rank, whatever the size of the model: nothing is computed."""
    with fake_mode(device_type, WORST_CARDS[config.precision]) as place:
        step = fake_step(config, place.device, lengths)
        return peak_of(step.work, step.held)


def fake_teacher_peak(config: TrainingConfig, device_type: str = "cuda") -> Peak:
    """Device-side storages while the teacher alone labels a micro-batch; its labels outlast it."""
    with fake_mode(device_type, WORST_CARDS[config.precision]) as place:
        labelling = fake_labelling(config, place.device)
        return peak_of(labelling.work, labelling.held)


class Fake(NamedTuple):
    """Work on fake tensors, and those that exist before it, as `peak_of` wants them."""

    work: Callable[[], Any]
    held: list[tuple[str, Tensor]]


class FakeDevice(NamedTuple):
    """A device of fake tensors, and the names of the kernels of attention that it has been asked for."""

    device: torch.device
    kernels: list[str]


def fake_step(config: TrainingConfig, device: torch.device, lengths: tuple[int, ...] = (1,)) -> Fake:
    """One micro-batch in `fake_mode`: forward, loss and backward; of documents of these lengths, if they are masked.

    Each gradient is dropped as soon as it is whole, as scripts/engine/offload.py takes it. Weights, a teacher's and, where they
    are kept on the GPU, the sums of gradients are held; gradients that are being copied are not.
    """
    decoder, teacher = fake_model(config, device), _fake_teacher(config, device)
    windows, labels = _fake_windows(config, device, lengths), _fake_labels(config, device)
    for weight in decoder.parameters():
        weight.register_post_accumulate_grad_hook(drop_gradient)
    held = [*named("weights", decoder.parameters()), *_sums_of_gradients(config, decoder), *_tensors_of(windows)]
    if config.teacher_dir is None:
        return Fake(lambda: next_token(Alone(decoder), windows, config).backward(), held)
    if labels is not None:
        return Fake(lambda: from_labels(Alone(decoder), windows, labels, config).backward(), [*held, *named("labels", labels)])
    held += named("teacher", teacher.parameters())
    return Fake(lambda: from_teacher(Alone(decoder), windows, teacher, config).backward(), held)


def fake_labelling(config: TrainingConfig, device: torch.device, lengths: tuple[int, ...] = (1,)) -> Fake:
    """The labelling of one micro-batch by the teacher alone, in `fake_mode`."""
    teacher, windows = _fake_teacher(config, device), _fake_windows(config, device, lengths)
    return Fake(lambda: label(teacher, windows, config), [*named("teacher", teacher.parameters()), *_tensors_of(windows)])


def named(place: str, tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors as `peak_of` wants those that exist before its work."""
    return [(place, tensor) for tensor in tensors]


def fake_model(config: TrainingConfig, device: torch.device) -> Decoder:
    """A decoder of fake weights; to be called in `fake_mode`."""
    with unset_fake_temporarily():
        shapes = empty_model(config, torch.device("meta"))
    return fill_fake(shapes, device)


def _fake_teacher(config: TrainingConfig, device: torch.device) -> Any:
    shape = teacher_config(config)
    return nn.Module() if shape is None else fake_model(shape, device).requires_grad_(False)


def _fake_windows(config: TrainingConfig, device: torch.device, lengths: tuple[int, ...]) -> Windows:
    """Windows whose rows are cut into pieces of documents of these lengths, again and again, the last of a row shorter."""
    rows, positions = config.micro_batch_rows, config.context_length
    borders = None
    if config.mask_across_documents:
        cuts = np.cumsum([0, *islice(cycle(lengths), positions)])
        starts = np.arange(0, rows * positions, positions)[:, None] + cuts[cuts < positions]
        borders = np.append(starts, rows * positions).astype(np.int32)
    with unset_fake_temporarily():
        windows = windows_of(np.zeros((rows, positions + 1), np.int64), borders, HOST)
    return tree_map_only(Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype, device=device), windows)


def _tensors_of(windows: Windows) -> list[tuple[str, Tensor]]:
    return named("ids", (leaf for leaf in tree_leaves(windows) if isinstance(leaf, Tensor)))


def _fake_labels(config: TrainingConfig, device: torch.device) -> Labels[Tensor] | None:
    if config.teacher_top_k is None:
        return None
    shape = (config.micro_batch_rows, config.context_length, config.teacher_top_k)
    ids, logs = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int32, torch.float16))
    return Labels(ids, logs, torch.zeros(shape[:2], device=device))


def fill_fake(module: nn.Module, device: torch.device = HOST) -> Any:
    """The module with its meta tensors made into fake ones; to be called in fake mode. Shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for kept in cast(tuple[dict[str, Any], ...], (part._parameters, part._buffers)):
            for name, tensor in kept.items():
                if tensor is not None:
                    made[id(tensor)] = made[id(tensor)] if id(tensor) in made else _fresh(tensor, device)
                    kept[name] = made[id(tensor)]
    return module


def _fresh(tensor: Tensor, device: torch.device) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def engine_peaks(config: TrainingConfig) -> dict[str, Sides]:
    """The real engine on one rank: each phase's peaks by side, and what stands "after" it.

    Phases: initialisation, two steps, evaluation, sample, save, load. The truth check, which has a tiny model of its own, is
    left out. Runs in a process of its own under `leaving()`, for it makes the process group; `config.run_dir` must be fresh.
    """
    marks: dict[str, tuple[Moment, Moment]] = {}
    with Tracker([]) as tracker:
        for phase, work in _phases(config):
            begin = tracker.now()
            tracker.claim_host(host_tensors(work()))
            marks[phase] = begin, tracker.now()
            marks[f"after {phase}"] = marks[phase][1], marks[phase][1]
    return {phase: tracker.sides(*mark) for phase, mark in marks.items()}


def host_tensors(optimizer: Any) -> Iterator[Tensor]:
    """What a DeepSpeed optimizer with CPU offload keeps in host memory."""
    for master in optimizer.single_partition_of_fp32_groups:
        yield from (master, *(state for state in optimizer.optimizer.state[master].values() if isinstance(state, Tensor)))
        if master.grad is not None:
            yield master.grad
    yield from optimizer.param_buffer_of_bit16_for_cpu_offload_groups
    yield optimizer.temp_grad_buffer_for_cpu_offload
    yield from optimizer.accumulated_grads_in_cpu.values()


def _phases(config: TrainingConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    runs: list[Run] = []
    objective = next_token if config.teacher_dir is None else objective_of(config)

    def begin() -> Any:
        truth_check.refuse_untrue_updates = lambda *_: None
        run = trainer.set_up(config, prepare, label)
        assert run is not None
        runs.append(run)
        return run.engine.optimizer

    def of_run(work: Callable[[Run], Any]) -> Callable[[], Any]:
        return lambda: (work(runs[-1]), runs[-1].engine.optimizer)[1]

    def leave(run: Run) -> None:
        setup.release_lock(run.lock)
        run.watch.close(clean=True)

    yield "initialisation", begin
    yield "step", of_run(lambda run: trainer.run_step(run, objective, 0))
    yield "second step", of_run(lambda run: trainer.run_step(run, objective, 1))
    yield "evaluation", of_run(lambda run: held_out_loss(run.config, run.ranks, run.data, run.engine.module))
    yield "sample", of_run(lambda run: sample_record(run, 2))
    yield "save", of_run(lambda run: trainer.verify_last_save(run, 2, trainer.save(run, 2, Progress(), print), print))
    leave(runs[0])
    runs.pop().engine.destroy()
    gc.collect()
    yield "load", begin
    leave(runs[0])


def drop_gradient(weight: Tensor) -> None:
    """What happens to a whole gradient on one rank: it leaves for the host at once."""
    weight.grad = None


@contextmanager
def fake_mode(device_type: str, capability: tuple[int, ...]) -> Iterator[FakeDevice]:
    """Inside it tensors hold no numbers, and no operation computes any: on the host, or on a card of this compute capability.

    What a torch without CUDA, or without a card, cannot do itself is done in its place. CUDA_STAND_IN lets autograd run;
    `AttentionOfCard` and `FusedRmsNorm` are kernels; streams and events do nothing, and no memory is page-locked.
    """
    attention = AttentionOfCard(capability)
    stood_in = {
        (functional, "scaled_dot_product_attention"): attention,
        (torch.ops.aten, "_flash_attention_forward"): FlashOnEnd(torch.ops.aten._flash_attention_forward, attention),
        (torch.ops.aten, "_fused_rms_norm"): FusedRmsNorm(torch.ops.aten._fused_rms_norm),
        (torch.cuda, "get_device_capability"): lambda device=None: capability,
        (torch.cuda, "Stream"): _Stream, (torch.cuda, "Event"): _Stream, (torch.cuda, "current_stream"): _Stream,
        (torch.cuda, "stream"): nullcontext,
    }  # fmt: skip
    with ExitStack() as left:
        if device_type == "cuda":
            for (owner, name), function in stood_in.items():
                left.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, function)
            library = _cuda_stand_in()
            library.begin()
            left.callback(library.end)
            left.enter_context(torch.autograd.set_multithreading_enabled(False))
        left.enter_context(FakeTensorMode())
        yield FakeDevice(CARD if device_type == "cuda" else HOST, attention.kernels)


class AttentionOfCard:
    """In the place of torch's attention: calls the kernel that torch takes on a card of this compute capability.

    The choice is that of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11 to 2.13) in its own order: cuDNN's
    is out in deterministic mode; then flash, memory-efficient, and what computes every score at once, "math". `kernels` are
    those taken.
    """

    def __init__(self, capability: tuple[int, ...]) -> None:
        self.sm = 10 * capability[0] + capability[1]
        self.kernels: list[str] = []

    def has_flash(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether flash attention takes these heads."""
        has_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
        return self._has_flash(q.dtype, q.shape[-1], has_gradient)

    def __call__(self, q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
        has_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
        if attn_mask is None and self._has_flash(q.dtype, q.shape[-1], has_gradient):
            self.kernels.append("flash")
            q, k, v = (functional.pad(each, (0, -each.shape[-1] % 8)) if each.shape[-1] % 8 else each for each in (q, k, v))
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if attn_mask is None and q.shape[1] == k.shape[1] and self._has_efficient(q.dtype, q.shape[-1]):
            self.kernels.append("efficient")
            options = (None, has_gradient, 0.0, is_causal)
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, *options, scale=scale)[0]
        self.kernels.append("math")
        options = (attn_mask, 0.0, is_causal, None)
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, *options, scale=scale, enable_gqa=enable_gqa)[0]

    def _has_flash(self, dtype: torch.dtype, width: int, has_gradient: bool) -> bool:
        if width > 256 or not 80 <= self.sm <= 121 or dtype not in (torch.float16, torch.bfloat16):
            return False
        return not (has_gradient and (86 <= self.sm <= 89 or self.sm in (120, 121)) and 192 < width <= 224)

    def _has_efficient(self, dtype: torch.dtype, width: int) -> bool:
        alignment = 4 if self.sm >= 80 else 1
        if self.sm >= 80 or dtype != torch.float32:
            alignment = max(alignment, 16 // dtype.itemsize)
        return self.sm <= 121 and width % alignment == 0 and (dtype != torch.bfloat16 or self.sm >= 80)


class FlashOnEnd:
    """In the place of `operation`, torch's own flash attention of documents on end: asks of its inputs what the kernel asks."""

    def __init__(self, operation: Any, attention: AttentionOfCard) -> None:
        self.operation, self.attention = operation, attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> tuple[Tensor, ...]:
        assert self.attention.has_flash(q, k, v) and q.shape[-1] % 8 == 0 and q.shape[1] % k.shape[1] == 0
        assert all(each.dim() == 3 and each.stride(-1) == 1 and len(each) == len(q) for each in (q, k, v))
        assert all(each.dtype == torch.int32 and each.is_contiguous() and each.device == q.device for each in lengths[:2])
        assert all(isinstance(longest, int) for longest in lengths[2:4])
        self.attention.kernels.append("flash on end")
        return self.operation(q, k, v, *lengths, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operation, name)


class FusedRmsNorm:
    """In the place of `operation`, torch's own: makes what CUDA's kernel makes, where torch makes more without CUDA."""

    def __init__(self, operation: Any) -> None:
        self.operation = operation

    def __call__(self, x: Tensor, normalized_shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty(*x.shape[: -len(normalized_shape)], 1, dtype=torch.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operation, name)


class _Stream:
    """A stream or an event of a card that is not there."""

    def __init__(self, *_: Any) -> None:
        self.wait_stream = self.wait_event = self.record = lambda *_: None


@cache
def _cuda_stand_in() -> ctypes.CDLL:
    """CUDA_STAND_IN, compiled once and kept where torch keeps what it compiles."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), "cuda_stand_in")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.cpp"
    if not source.exists() or source.read_text() != CUDA_STAND_IN:
        own = folder / f"{os.getpid()}.cpp"
        own.write_text(CUDA_STAND_IN)
        own.replace(source)
    path = cpp_extension.load(
        "cuda_stand_in", str(source), extra_cflags=["-O0"], build_directory=str(folder), with_cuda=False, is_python_module=False
    )
    return ctypes.CDLL(str(path))


def _sums_of_gradients(config: TrainingConfig, decoder: Decoder) -> list[tuple[str, Tensor]]:
    if config.accumulate_on == "cpu":
        return []
    dtype = PRECISIONS[config.accumulation_precision]
    return [("sums of gradients", torch.empty_like(weight, dtype=dtype)) for weight in decoder.parameters()]
