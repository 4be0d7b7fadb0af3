"""The footprint without a GPU: tracked peaks of ours and of the stock peers, and bytes copied each way per step.

`python tests/benchmarks/footprint_vs_stock.py` prints tables and writes tests/benchmarks/results/footprint_vs_stock.json.
Models of any size are tracked in fake mode, where nothing is computed; a small model goes through the real engines, ours and
stock, one process each, to check what fake mode leaves to formulas. GB are 10^9 bytes. What kernels make inside themselves and
what the allocator rounds up are not counted, for nobody.

The stock peers are transformers' LlamaForCausalLM (sdpa, its own loss, no key/value cache) under DeepSpeed's own ZeRO-2
offload: the bucket of `reduce_bucket_size` elements (5e8 by default) from the first gradient of a backward on, 2P bytes for
ever (P: the largest parameter), and at the boundary for each parameter its norm, its check for NaN and its float32 copy, by
DeepSpeed's own functions. Liger's kernels need a GPU; their storages are emulated as in liger-kernel 0.8.5: RMSNorm and SwiGLU
keep their inputs and write slopes over them, rotation is in place, and the fused loss holds logits of ceil(tokens * D / V)
tokens, rounded up to a power of two.
"""

import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from tracker import Peak, Sides, Tracker, engine_peaks, fake_step_peak, fill_fake, host_tensors, peak_of  # noqa: E402

from scripts.config import ACTIVATION_CHECKPOINTING, TrainingConfig  # noqa: E402
from scripts.engine.distributed import leaving  # noqa: E402
from scripts.memory import allocated_bytes, plan  # noqa: E402

RESULT = Path(__file__).parent / "results" / "footprint_vs_stock.json"
GB, GIB = 1e9, 2**30
SMALL_MICRO_BATCHES, SMALL_BUCKET = 4, 400_000
LIGER_VERSION = "0.8.5"


class Model(NamedTuple):
    """A shape of the goals table, the tokens of its micro-batch, and the goal: GB at the peak and the ratio to `peer`."""

    name: str
    num_layers: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tie_embeddings: bool
    rows: int
    context_length: int
    mode: str
    goal_gb: float
    goal_ratio: float | None
    peer: str | None


class Peer(NamedTuple):
    """A stock way to train: with gradient checkpointing, with Liger's kernels."""

    name: str
    checkpointing: bool
    liger: bool


MODELS = (
    Model("124M, 8k", 12, 768, 2048, 12, 12, 50304, True, 8, 1024, "block", 1.5, 0.2, "stock"),
    Model("1.3B, 8k", 24, 2048, 5504, 16, 16, 50304, True, 4, 2048, "block_offload", 5.5, 0.5, "stock, checkpointing, Liger"),
    Model("3B, 4k", 28, 3072, 8192, 24, 8, 50304, True, 2, 2048, "block_offload", 9.0, None, None),
    Model("6.7B, 4k", 32, 4096, 11008, 32, 32, 32000, False, 2, 2048, "block_offload", 17.5, None, None),
)
SMALL = Model("small", 4, 128, 256, 4, 2, 257, True, 4, 64, "block", math.inf, None, None)
PEERS = (
    Peer("stock", False, False),
    Peer("stock, checkpointing", True, False),
    Peer("stock, checkpointing, Liger", True, True),
)


def main() -> None:
    started, os.environ["CUDA_VISIBLE_DEVICES"] = time.perf_counter(), ""
    rows = [row for shape in MODELS for row in rows_of(shape)]
    show(rows)
    checks = [in_a_process(check) for check in (check_stock, check_ours_cpu, check_ours_gpu)]
    for line in checks:
        print(json.dumps(line))
    found = {"machine": machine(), "seconds": round(time.perf_counter() - started), "units": "GB are 10^9 bytes, GiB 2^30"}
    RESULT.write_text(json.dumps(found | {"notes": __doc__, "rows": rows, "checks": checks}, indent=2) + "\n")


def rows_of(shape: Model) -> Iterator[dict]:
    """A row for each way to train one model, ours first; over its peak `our_ratio` has ours in the goal's mode, as the plan has
    it where that is more than what is tracked, and `weights_ratio` the bytes of the weights alone, which all of them hold.

    The plan counts too what storages do not show: gradients being copied to the host, kernels' own work, cuBLAS's workspace.
    """
    peaks = {f"tightfit, {mode}": ours(shape, mode) for mode in ACTIVATION_CHECKPOINTING}
    peaks |= {peer.name: stock(shape, peer) for peer in PEERS}
    planned = {f"tightfit, {mode}": allocated_bytes(plan(config_of(shape, mode), 1)) for mode in ACTIVATION_CHECKPOINTING}
    mine = max(*peaks[f"tightfit, {shape.mode}"][:2], planned[f"tightfit, {shape.mode}"])
    for name, (step, init, host) in peaks.items():
        goal = name == f"tightfit, {shape.mode}"
        reached = {"goal_gb": shape.goal_gb, "goal_reached": mine / GB <= shape.goal_gb} if goal else {}
        if name == shape.peer and shape.goal_ratio is not None:
            reached = {"goal_ratio": shape.goal_ratio, "goal_reached": mine / max(step, init) <= shape.goal_ratio}
        yield {
            "model": shape.name,
            "contender": name,
            "num_parameters": config_of(shape, "none").num_parameters,
            "step_gb": round(step / GB, 3),
            "initialisation_gb": round(init / GB, 3),
            "peak_gb": round(max(step, init) / GB, 3),
            "host_gib": round(host / GIB, 2),
            **({"planned_gb": round(planned[name] / GB, 3)} if name in planned else {}),
            "our_ratio": round(mine / max(step, init), 3),
            "weights_ratio": round(2 * config_of(shape, "none").num_parameters / max(step, init), 3),
        } | reached


def config_of(shape: Model, mode: str, **changes: Any) -> TrainingConfig:
    """Our configuration of a shape, its own sizes and no more than one micro-batch a step."""
    fields: dict = dict(
        vocab_size=shape.vocab_size, context_length=shape.context_length, hidden_size=shape.hidden_size,
        num_layers=shape.num_layers, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, mlp_size=shape.mlp_size,
        tie_embeddings=shape.tie_embeddings, micro_batch_rows=shape.rows, tokens_per_step=shape.rows * shape.context_length,
        activation_checkpointing=mode, eval_tokens=shape.context_length, precision="bf16", qk_norm=False,
        optimizer="adamw", optimizer_state_precision="fp32",
    )  # fmt: skip
    return TrainingConfig(**(fields | changes))


def ours(shape: Model, mode: str) -> tuple[int, int, int]:
    """Bytes: the tracked peak of a step; at initialisation, 2N and the largest group once more; on the host, 16N and staging.

    Staging: two slots of the largest group for the way up. The checks below find these formulas on the real engine. With
    "block_offload" the blocks' inputs, all but one, are on the host too.
    """
    config = config_of(shape, mode)
    largest_group = max(config.block_parameters, config.vocab_size * config.hidden_size)
    step, weights = fake_step_peak(config).num_bytes, 2 * config.num_parameters
    inputs = (config.num_layers - 1) * 2 * config.tokens_per_step * config.hidden_size * (mode == "block_offload")
    return step, weights + 2 * largest_group, 16 * config.num_parameters + 2 * 2 * largest_group + inputs


def stock(shape: Model, peer: Peer) -> tuple[int, int, int]:
    """Bytes: the tracked peak of a step; at initialisation, 4N with one group and 2P; on the host, 18N and 2P, one micro-batch.

    Several micro-batches a step add 2N on the host, and time; on the GPU nothing.
    """
    config = config_of(shape, "none")
    largest, num_parameters = config.vocab_size * config.hidden_size, config.num_parameters
    return stock_step_peak(shape, peer, 500_000_000).num_bytes, 4 * num_parameters, 18 * num_parameters + 2 * largest


def stock_step_peak(shape: Model, peer: Peer, bucket_elements: int) -> Peak:
    """Device-side storages of a stock step of one micro-batch, in fake mode."""
    with torch.device("meta"):
        module = llama(shape).bfloat16()
    if peer.checkpointing:
        module.activation_checkpointing_enable()
    with FakeTensorMode(), as_on_a_gpu(peer.liger):
        module = fill_fake(module)
        largest = max(weight.numel() for weight in module.parameters())
        held = [("2P for ever", torch.empty(largest, dtype=torch.bfloat16))]
        ids = torch.zeros(shape.rows, shape.context_length, dtype=torch.int64)
        weights = [("weights", weight) for weight in module.parameters()]
        loss_of = with_liger(module) if peer.liger else lambda ids: module(input_ids=ids, labels=ids).loss
        return peak_of(lambda: stock_micro_batch(module, loss_of, ids, bucket_elements), [*weights, *held, ("ids", ids)])


def stock_micro_batch(module: nn.Module, loss_of: Callable[[Tensor], Tensor], ids: Tensor, bucket_elements: int) -> None:
    """Forward, and a backward whose gradients go through DeepSpeed's bucket at the boundary of a step."""
    bucket, waiting = [], []

    def take(weight: Tensor) -> None:
        if not bucket:
            bucket.append(torch.empty(bucket_elements, dtype=torch.bfloat16))
        if sum(waiting) + weight.numel() > bucket_elements:
            empty_bucket(bucket[0], waiting)
        waiting.append(weight.numel())
        weight.grad = None

    for weight in module.parameters():
        weight.register_post_accumulate_grad_hook(take)
    loss_of(ids).backward()
    empty_bucket(bucket[0], waiting)


def empty_bucket(bucket: Tensor, waiting: list[int]) -> None:
    """What DeepSpeed does on the device with each gradient of a full bucket, by its own functions."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import get_norm_dtype

    for num_elements in waiting:
        grad = bucket.narrow(0, 0, num_elements)
        grad.to(get_norm_dtype()).norm(2)
        DeepSpeedZeroOptimizer._has_inf_or_nan(grad)
        grad.to(torch.float32)
    waiting.clear()


def llama(shape: Model) -> Any:
    """transformers' Llama of a shape, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    described = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, intermediate_size=shape.mlp_size,
        max_position_embeddings=shape.context_length, tie_word_embeddings=shape.tie_embeddings, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(described).train()


def with_liger(module: Any) -> Callable[[Tensor], Tensor]:
    """The loss of `ids` with Liger's storages in the place of the model's own norms, SwiGLU and loss."""
    from transformers.models.llama import modeling_llama

    for part in module.modules():
        if isinstance(part, modeling_llama.LlamaRMSNorm):
            part.forward = partial(_liger_norm, part)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(part, modeling_llama.LlamaMLP):
            part.forward = partial(_liger_mlp, part)
    return lambda ids: _LigerLoss.apply(module.model(input_ids=ids).last_hidden_state.flatten(0, 1), module.lm_head.weight)


def _liger_norm(norm: Any, x: Tensor) -> Tensor:
    return _LigerNorm.apply(x, norm.weight)  # pyright: ignore[reportReturnType]


def _liger_mlp(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_LigerSwiglu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


@contextmanager
def as_on_a_gpu(use_liger: bool) -> Iterator[None]:
    """Inside it transformers' Llama makes no mask, as with real ids in one piece, and rotates in place where Liger does.

    Fake ids cannot be looked at, and transformers would take them for several packed sequences.
    """
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    own = masking_utils.find_packed_sequence_indices, modeling_llama.apply_rotary_pos_emb
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if use_liger:
        modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: _LigerRotation.apply(q, k)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, modeling_llama.apply_rotary_pos_emb = own


class _LigerNorm(torch.autograd.Function):
    """RMSNorm: keeps x and a float32 a row; the slope by x is written over the slope by the result."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return slope, torch.empty_like(ctx.saved_tensors[1])


class _LigerSwiglu(torch.autograd.Function):
    """silu(gate) * up: keeps both, and their slopes are written over them."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors


class _LigerRotation(torch.autograd.Function):
    """Rotary positions in place, both ways."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    @staticmethod
    def backward(ctx, *slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(slope.transpose(1, 2).contiguous().transpose(1, 2) for slope in slopes)


class _LigerLoss(torch.autograd.Function):
    """The fused head and loss: both gradients in the weights' dtype from the forward on, and one chunk of logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor) -> Tensor:
        num_tokens, width = hidden.shape
        grads = torch.zeros_like(hidden), torch.zeros_like(head)
        losses = hidden.new_zeros(num_tokens, dtype=torch.float32)
        share = math.ceil(num_tokens / math.ceil(len(head) / width))
        logits = hidden.new_empty(min(num_tokens, 2 ** math.ceil(math.log2(share))), len(head))
        del logits
        ctx.grads = grads
        return losses.sum()

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None
        return grads


def in_a_process(work: Callable[[], dict]) -> dict:
    """The result of `work()` in a process of its own, which makes a process group."""
    context = multiprocessing.get_context("spawn")
    ours_end, theirs = context.Pipe()
    process = context.Process(target=answer, args=(work, theirs))
    process.start()
    theirs.close()
    result = ours_end.recv()
    process.join()
    return result


def answer(work: Callable[[], dict], pipe: Any) -> None:
    """The other end of `in_a_process`."""
    with leaving():
        pipe.send(work())


def check_ours_cpu() -> dict:
    """Our real engine against the formulas, with gradients that wait on the host."""
    return check_ours("cpu")


def check_ours_gpu() -> dict:
    """Our real engine against the formulas, with gradients that wait on the device in float32."""
    return check_ours("gpu")


def check_ours(accumulate_on: str) -> dict:
    """Down a step: 2N for each micro-batch, or 4N once; up 2N. Host 16N and two slots of the largest group. At initialisation
    2N and that group, or 2N and the float32 sums.
    """
    with tempfile.TemporaryDirectory() as name:
        config = small_config(Path(name), accumulate_on)
        phases = engine_peaks(config)
    num_parameters = config.num_parameters
    largest_group = max(config.block_parameters, config.vocab_size * config.hidden_size)
    down, beside_weights = 2 * num_parameters * SMALL_MICRO_BATCHES, 2 * largest_group
    if accumulate_on == "gpu":
        down = beside_weights = 4 * num_parameters
    return {
        "engine": f'tightfit, accumulate_on="{accumulate_on}"',
        "num_parameters": num_parameters,
        "micro_batches": SMALL_MICRO_BATCHES,
        "bytes_down": compared(down, phases["second step"].num_bytes_down),
        "bytes_up": compared(2 * num_parameters, phases["second step"].num_bytes_up),
        "initialisation_bytes": compared(2 * num_parameters + beside_weights, phases["initialisation"].device.num_bytes),
        "host_bytes": compared(16 * num_parameters + 4 * largest_group, phases["second step"].host.num_bytes),
        "host_places": phases["second step"].host.places,
    }


def compared(formula: int, counted: int) -> dict:
    """A formula's bytes beside those that were counted."""
    return {"formula": formula, "counted": counted, "ratio": round(formula / counted, 4)}


def small_config(folder: Path, accumulate_on: str) -> TrainingConfig:
    """A model that a CPU trains in seconds, on a corpus of its own."""
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(f"line {number} of a text that is trained on\n" * 40)
    tokens = SMALL.rows * SMALL.context_length * SMALL_MICRO_BATCHES
    return config_of(
        SMALL, "block", run_dir=str(folder / "run"), data_dir=str(folder / "data"), corpus=(str(folder / "corpus"),),
        corpus_exclude=(), tokens_per_step=tokens, accumulate_on=accumulate_on, sample_tokens=4,
    )  # fmt: skip


def check_stock() -> dict:
    """The stock engine on a small model: bytes copied by formula, and the tracked step against the one in fake mode."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    one, several = track_stock(1), track_stock(SMALL_MICRO_BATCHES)
    num_parameters = config_of(SMALL, "none").num_parameters
    fake = stock_step_peak(SMALL, PEERS[0], SMALL_BUCKET).num_bytes
    return {
        "engine": "stock",
        "num_parameters": num_parameters,
        "micro_batches": SMALL_MICRO_BATCHES,
        "bytes_down": compared(2 * num_parameters * (SMALL_MICRO_BATCHES + 2), several["step"].num_bytes_down),
        "bytes_up": compared(2 * num_parameters * SMALL_MICRO_BATCHES, several["step"].num_bytes_up),
        "step_bytes": compared(fake, one["step"].device.num_bytes),
        "initialisation_bytes": compared(4 * num_parameters, one["initialisation"].device.num_bytes),
        "host_bytes": compared(18 * num_parameters, one["step"].host.num_bytes),
    }


def track_stock(micro_batches: int) -> dict[str, Sides]:
    """Initialisation and the second step of the stock engine on one rank."""
    import deepspeed

    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": SMALL.rows,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": SMALL_BUCKET,
        },
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }  # fmt: skip
    marks, ids = {}, torch.zeros(SMALL.rows, SMALL.context_length, dtype=torch.int64)
    with Tracker([]) as tracker:
        module = llama(SMALL).bfloat16()
        gc.collect()
        begin = tracker.now()
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        marks["initialisation"] = begin, tracker.now()
        for _ in range(2):
            begin = tracker.now()
            for _ in range(micro_batches):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
            marks["step"] = begin, tracker.now()
        tracker.claim_host(host_tensors(engine.optimizer))
    engine.destroy()
    return {phase: tracker.sides(*mark) for phase, mark in marks.items()}


def show(rows: list[dict]) -> None:
    """The goals table."""
    print(f"{'model':10}{'contender':30}{'step GB':>9}{'init GB':>9}{'peak GB':>9}", end="")
    print(f"{'plan GB':>9}{'host GiB':>10}{'ours/it':>9}  goal")
    for row in rows:
        goal = f"<= {row['goal_gb']} GB" if "goal_gb" in row else f"<= {row['goal_ratio']}x" if "goal_ratio" in row else ""
        verdict = "" if not goal else "reached" if row["goal_reached"] else "missed"
        print(f"{row['model']:10}{row['contender']:30}{row['step_gb']:>9.2f}{row['initialisation_gb']:>9.2f}", end="")
        planned = f"{row['planned_gb']:.2f}" if "planned_gb" in row else ""
        print(
            f"{row['peak_gb']:>9.2f}{planned:>9}{row['host_gib']:>10.1f}{row['our_ratio']:>8.2f}x  {goal} {verdict}", flush=True
        )


def machine() -> dict:
    """What the numbers depend on; the processor is hardly among them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "liger-kernel": LIGER_VERSION,
    }


if __name__ == "__main__":
    main()
