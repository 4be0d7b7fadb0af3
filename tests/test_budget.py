"""Laws of what to train in a time: shapes and batches by rule, the largest that fits, and rows that are pasted and launched."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import expect_success, launch, pretrain_script, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from scripts import config as config_module
from scripts import memory
from scripts.config import BUDGET_HOURS, PRETRAIN, TrainingConfig
from scripts.plan import budget
from scripts.plan.machine import Room, room_free

CPU = torch.device("cpu")
rows, ranks = st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 8])


@given(st.sampled_from(budget.WIDTHS), rows, ranks)
def test_a_width_gets_its_tokens_in_steps_of_the_cited_size(width, rows, ranks):
    config = budget.scaled(PRETRAIN, width, rows, ranks)
    micro_batch = rows * config.context_length * ranks
    tokens = 20 * config.num_parameters
    flop = 6 * config.num_parameters * tokens
    assert config.accumulation_steps(ranks) == config.tokens_per_step // micro_batch
    assert tokens <= config.num_tokens < tokens + max(config.tokens_per_step, 50 * config.tokens_per_step - tokens + 1)
    cited = 0.2920 * flop**0.3271
    assert config.tokens_per_step == micro_batch or 1 / 1.42 < config.tokens_per_step / cited < 1.42
    assert config.learning_rate == pytest.approx(0.3118 * flop**-0.125, rel=0.05)
    assert math.isclose(config.min_learning_rate, config.learning_rate / 10, rel_tol=0.01)


@given(st.sampled_from(budget.WIDTHS[1:]), rows)
def test_wider_is_larger_and_keeps_the_tokenizer_that_a_person_has(width, rows):
    narrower = budget.WIDTHS[budget.WIDTHS.index(width) - 1]
    assert budget.scaled(PRETRAIN, width, rows, 1).num_parameters > budget.scaled(PRETRAIN, narrower, rows, 1).num_parameters
    own = replace(PRETRAIN, tokenizer_path="tokenizer.json", vocab_size=5000)
    assert budget.scaled(own, width, rows, 1).vocab_size == 5000
    assert budget.scaled(replace(PRETRAIN, vocab_size=257), width, rows, 1).vocab_size == 257


@pytest.fixture(scope="module")
def offered() -> dict[str, budget.Offer | None]:
    return budget.largest_runs(PRETRAIN, 1, CPU, lambda config: config.hidden_size <= 512)


def test_each_offer_is_within_its_time_and_more_time_gives_no_smaller_model(offered):
    assert list(offered) == list(BUDGET_HOURS)
    sizes = [0 if offer is None else offer.config.num_parameters for offer in offered.values()]
    assert sizes == sorted(sizes)
    for name, offer in offered.items():
        assert offer is None or (offer.hours <= BUDGET_HOURS[name] and offer.config.hidden_size <= 512)


def test_where_nothing_fits_nothing_is_offered():
    assert set(budget.largest_runs(PRETRAIN, 1, CPU, lambda _: False).values()) == {None}


def as_pasted(text: str) -> TrainingConfig:
    names = {**vars(config_module)}
    exec(text, names)
    return names["PRETRAIN"]


@given(st.sampled_from(budget.WIDTHS), rows, st.sampled_from(list(BUDGET_HOURS)))
def test_what_is_pasted_is_the_configuration(width, rows, name):
    config = budget.scaled(replace(PRETRAIN, activation_checkpointing="block", sample_stop=("a", 'b"')), width, rows, 1)
    folder = name.replace(" ", "-")
    text = memory.pasted(name, config)
    assert as_pasted(text) == replace(config, run_dir=f"runs/{folder}", data_dir=f"data/{folder}")
    assert max(map(len, text.splitlines())) <= 128


def test_the_table_offers_what_a_launch_does_not_refuse():
    text = memory.offer_table(PRETRAIN, 1, CPU)
    room = room_free(PRETRAIN, CPU)
    for name in BUDGET_HOURS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"{name}  ")]
        if "no model" not in row:
            config = as_pasted(f"# {name}" + text.split(f"# {name}")[1].split("\n)\n")[0] + "\n)\n")
            memory.refuse_too_large(config, 1, 1, room, "cpu")
    assert max(map(len, text.splitlines())) <= 128


@given(st.integers(2, 24), st.integers(8, 128))
def test_a_card_gets_what_fits_it(gpu_gib, host_gib):
    room = Room(gpu_gib * 2**30, host_gib * 2**30, 2**42, "free")

    def fits(config: TrainingConfig) -> bool:
        try:
            memory.refuse_too_large(config, 1, 1, room, "cuda")
        except ValueError:
            return False
        return True

    ways = list(budget.ways(PRETRAIN, 1024, 1, "cuda"))
    assert any(map(fits, ways)) and {way.hidden_size for way in ways} == {1024}


def test_every_preset_of_a_card_is_told_as_planned():
    text = memory.presets_table()
    assert "not measured" in text and max(map(len, text.splitlines())) <= 128
    for name, (card, _) in budget.SOLD_CARDS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert card in row and isinstance(getattr(config_module, name), TrainingConfig)


@pytest.mark.slow
def test_each_offer_trains_a_step_in_tiny_form(offered, tmp_path):
    tiny, kept = tiny_config(tmp_path), ("schedule", "qk_norm", "tie_embeddings", "optimizer", "learning_rate", "init_std")
    configs = []
    for number, offer in enumerate(offer for offer in offered.values() if offer):
        own = {name: getattr(offer.config, name) for name in (*kept, "min_learning_rate", "activation_checkpointing")}
        configs.append(replace(tiny, run_dir=str(tmp_path / f"{number}"), num_steps=1, warmup_steps=0, **own))
    assert configs
    assert expect_success(launch(tmp_path, pretrain_script(configs), ["python"])).count("Finished: 1 steps") == len(configs)
