"""What to train in a time: shapes of models by width, the training that suits each, and the largest that gets through."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch

from scripts import config as settings
from scripts.config import ACTIVATION_CHECKPOINTING, TrainingConfig
from scripts.plan.machine import Rates, hours, measure_rates, tokens_per_second

# Tokens for each parameter of a model that makes the most of its FLOP: Hoffmann et al. 2022.
TOKENS_A_PARAMETER = 20
WIDTHS = (128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120)
# For models up to a width: ids, positions, and the standard deviation of their first matrices.
SIZES = (
    (192, 2048, 256, 0.04),
    (384, 8192, 512, 0.03),
    (896, 16384, 1024, 0.02),
    (2560, 32768, 2048, 0.02),
    (9999, 32768, 4096, 0.02),
)
MOST_ROWS, MOST_MICRO_BATCH_TOKENS = 32, {"cpu": 2**12, "cuda": 2**15}
BYTES_A_TOKEN, LONGEST_WARMUP_STEPS = 4, 1000
# A card that is sold for each preset. Dense 16-bit products with float32 sums, twice the rate of its float32 units at boost
# clock (NVIDIA's data sheets); two channels of host memory, and 0.8 of PCIe 4.0 x8 or x16.
SOLD_CARDS = {
    "GPU_4GB": ("RTX 3050 Laptop", Rates(12.2e12, 40e9, 12.6e9)),
    "GPU_6GB": ("RTX 3060 Laptop", Rates(23.0e12, 40e9, 12.6e9)),
    "GPU_8GB": ("RTX 4060", Rates(30.2e12, 40e9, 12.6e9)),
    "GPU_12GB": ("RTX 3060", Rates(25.5e12, 40e9, 25.2e9)),
    "GPU_16GB": ("RTX 4060 Ti", Rates(44.1e12, 40e9, 12.6e9)),
    "GPU_24GB": ("RTX 4090", Rates(165.2e12, 40e9, 25.2e9)),
}
Changes = dict[str, Any]
Fits = Callable[[TrainingConfig], bool]


class Offer(NamedTuple):
    """A run for a machine: its configuration, and what to expect of it."""

    config: TrainingConfig
    tokens_per_second: float
    hours: float


def scaled(base: TrainingConfig, width: int, rows: int, world_size: int) -> TrainingConfig:
    """A model of a width, and the training that suits it: TOKENS_A_PARAMETER, and the batch and learning rate of DeepSeek LLM
    (Bi et al. 2024, arXiv 2401.02954), 0.2920 C**0.3271 tokens and 0.3118 C**-0.1250 at C FLOP. `rows` is the micro-batch.
    """
    vocab_size, length, std = next(size[1:] for size in SIZES if width <= size[0])
    heads, own_tokenizer = width // (64 if width < 1024 else 128), base.tokenizer_path is not None or base.vocab_size == 257
    shape: Changes = {"hidden_size": width, "num_layers": round(min(width / 64, 16 + width / 192)), "num_heads": heads}
    shape |= {"num_kv_heads": max(n for n in range(1, heads // 3 + 2) if heads % n == 0), "head_size": None}
    shape |= {"mlp_size": math.ceil(width * 8 / 3 / 64) * 64, "qk_norm": True, "init_std": std, "context_length": length}
    shape |= {"rope_theta": 10_000.0 if length < 4096 else 500_000.0, "rope_scaling": None, "muon_learning_rate": None}
    shape |= {"vocab_size": base.vocab_size if own_tokenizer else vocab_size, "tie_embeddings": width > SIZES[0][0]}
    micro_batch = rows * length * world_size
    batch: Changes = {
        "micro_batch_rows": rows,
        "tokens_per_step": micro_batch,
        "eval_tokens": max(base.eval_tokens, 64 * length),
    }
    batch |= {"first_tokens_per_step": None, "batch_warmup_steps": None, "teacher_dir": None, "init_from": None}
    model = replace(base, **shape, **batch, teacher_top_k=None)
    tokens = TOKENS_A_PARAMETER * model.num_parameters
    flop = 6 * model.num_parameters * tokens
    step_tokens = micro_batch * 2 ** max(0, round(math.log2(0.2920 * flop**0.3271 / micro_batch)))
    num_steps, rate = max(50, -(-tokens // step_tokens)), float(f"{0.3118 * flop**-0.1250:.1e}")
    steps: Changes = {"num_steps": num_steps, "warmup_steps": min(LONGEST_WARMUP_STEPS, num_steps // 12), "learning_rate": rate}
    often = max(1, num_steps // 20)
    steps |= {
        "min_learning_rate": float(f"{rate / 10:.1e}"),
        "schedule": "cosine",
        "decay_steps": None,
        "tokens_per_step": step_tokens,
    }
    return replace(model, **steps, eval_every_steps=often, sample_every_steps=often, save_every_steps=often)


def largest_runs(base: TrainingConfig, world_size: int, device: torch.device, fits: Fits) -> dict[str, Offer | None]:
    """For each of BUDGET_HOURS the largest model that `fits` and has seen TOKENS_A_PARAMETER by then at the measured rates of
    this machine; None where even the smallest does not.
    """

    @cache
    def best_of(width: int) -> Offer | None:
        """The fastest of all ways to fit a width."""
        rates = measure_rates(scaled(base, width, 4, world_size), device)
        fitting = [config for config in ways(base, width, world_size, device.type) if fits(config)]
        offers = [_offer(config, world_size, device.type, rates) for config in fitting]
        return max(offers, key=lambda offer: offer.tokens_per_second, default=None)

    def is_too_large(width: int, budget: float) -> bool:
        offer = best_of(width)
        return offer is None or offer.hours > budget

    found = {}
    for name, budget in settings.BUDGET_HOURS.items():
        number = bisect_left(WIDTHS, True, key=lambda width, limit=budget: is_too_large(width, limit))
        found[name] = best_of(WIDTHS[number - 1]) if number else None
    return found


def ways(base: TrainingConfig, width: int, world_size: int, device_type: str) -> Iterator[TrainingConfig]:
    """All ways to train a model of a width that differ in what they take of the card."""
    on_gpu, rows = device_type == "cuda", [2**n for n in range(MOST_ROWS.bit_length())]
    modes = ACTIVATION_CHECKPOINTING if on_gpu else ("none", "block")
    places = ((True, "cpu"), (True, "gpu"), (False, "gpu")) if on_gpu else ((base.offload_optimizer, base.accumulate_on),)
    for mode, (offload, sums), number in product(modes, places, rows):
        own = {"activation_checkpointing": mode, "offload_optimizer": offload, "accumulate_on": sums}
        config = scaled(replace(base, **own, accumulation_precision="fp32"), width, number, world_size)
        if number * config.context_length <= MOST_MICRO_BATCH_TOKENS[device_type]:
            yield config


def _offer(config: TrainingConfig, world_size: int, device_type: str, rates: Rates) -> Offer:
    per_second = tokens_per_second(config, world_size, world_size, device_type, rates)
    return Offer(config, per_second, hours(config, per_second, 0))
