"""Laws of scripts/engine/truth_check.py, with real DeepSpeed on one and two ranks: true updates pass, faults do not."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import expect_success, launch, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import config as compiling
from torch._inductor.utils import fresh_cache
from torch.nn import functional

from scripts.config import TrainingConfig
from scripts.engine import truth_check
from scripts.model import operations
from scripts.model.decoder import empty_model
from scripts.model.documents import windows_of

CLONES = ("fp32", "bf16", "fp16", "muon", "muon in bf16", "muon in fp16")
BATCH_KEYS = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
BUCKET_KEYS = {"reduce_bucket_size", "allgather_bucket_size"}
TRUTH_SCRIPT = """
import functools, gc, json, os, random, sys, time, weakref
import deepspeed, numpy, torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer
from scripts.config import TrainingConfig
from scripts.engine import offload, truth_check, watch
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.losses import next_token, next_token_loss

offload.start_quickly()
get_accelerator().is_fp16_supported = lambda: True  # float16 on a CPU is slow, not wrong
rank, world_size, engines = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
loss_of, groups_of, drift = next_token, parameter_groups, 0.0


def engine_of(config, model):
    dictionary = TrainingConfig.deepspeed_config(config, world_size)
    groups = groups_of(model, config.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=dictionary)
    offload.replace_offload_path(engine, config)
    engines.extend(weakref.ref(each) for each in (engine, engine.optimizer, engine.optimizer.optimizer))
    return engine


def train_tiny(tiny, model, steps, learning_rate):
    engine, norms = engine_of(tiny, model), []
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    for micro_batches in steps:
        num_skipped = -1
        while num_skipped < engine.skipped_steps:
            num_skipped = engine.skipped_steps
            for windows in micro_batches:
                engine.backward(loss_of(engine, windows, tiny))
                engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    masters = offload.full_masters(engine, model)
    engine.destroy()
    model.head.data.add_(drift)
    return truth_check.Trained(masters, norms)


def check(config):
    try:
        truth_check.refuse_untrue_updates(config, rank, world_size, torch.device("cpu"), train_tiny)
    except ValueError as fault:
        return str(fault)
    return ""


def with_changed(owner, name, value, config):
    kept = vars(owner)[name]
    setattr(owner, name, value)
    try:
        return check(config)
    finally:
        setattr(owner, name, kept)


def is_in_the_middle(optimizer):
    return 0 < optimizer.micro_step_id < optimizer.gradient_accumulation_steps - 1


def nowhere(gradient, target, is_first):
    return None


def without_middle_sums(kept):
    def taken(optimizer, sums, send, weight, group):
        return kept(optimizer, sums, nowhere if is_in_the_middle(optimizer) else send, weight, group)

    return taken


def without_mean_over_ranks(kept):
    def summed(self, *args):
        self.gradient_average = False
        return kept(self, *args)

    return summed


def tied(share):
    def loss(engine, windows, config):
        head = share * engine.module.head + (1.0 - share) * engine.module.head.detach()
        return next_token_loss(engine(windows.inputs), head, windows.targets, config.loss_chunk_rows)

    return loss


def decaying(decay):
    return lambda model, given: [group | {{"weight_decay": decay}} for group in parameter_groups(model, given)]


def unmasked(engine, windows, config):
    return next_token(engine, windows._replace(documents=None), config)


def faults(config):
    here, old = sys.modules[__name__], dict(vars(Optimizer))
    changes = {{"middle micro-batches are lost": (offload, "take_gradient", without_middle_sums(offload.take_gradient))}}
    if config.mask_across_documents:
        changes["documents are not masked"] = (here, "loss_of", unmasked)
    if world_size > 1:
        return changes | {{
            "ranks are not reduced": (Optimizer, "allreduce_bucket", lambda self, bucket, *a, **k: self.flatten(bucket)),
            "the sum over ranks is not divided": (Optimizer, "average_tensor", without_mean_over_ranks(old["average_tensor"])),
            "one rank's weights drift": (here, "drift", float(rank)),
        }}
    undivided = functools.partialmethod(Engine.backward, scale_wrt_gas=False)
    unclipped = lambda self, norm: torch.tensor(self.scale_of_backward)
    return changes | {{
        "the sum over micro-batches is not divided": (Engine, "backward", undivided),
        "a tied head is not counted": (here, "loss_of", tied(0.0)),
        "a tied head is counted twice": (here, "loss_of", tied(2.0)),
        "no gradient is clipped": (offload, "_divisor_of", unclipped),
        "norms decay": (here, "groups_of", decaying(config.weight_decay)),
    }}


def refusals(config):
    return {{name: with_changed(*change, config) for name, change in faults(config).items()}}


def losses(config):
    torch.manual_seed(7)
    engine, found = engine_of(config, initialise(empty_model(config, torch.device("cpu")))), []
    for window in torch.randint(257, (12, 2, 33)):
        loss = next_token_loss(engine(window[:, :-1]), engine.module.head, window[:, 1:], config.loss_chunk_rows)
        engine.backward(loss)
        engine.step()
        found.append(loss.item().hex())
    engine.destroy()
    return found


def states():
    return str([random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist(), torch.get_num_threads()])


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    report = {{}}
    for name, fields in json.loads({described!r}).items():
        fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
        config = TrainingConfig(**fields)
        started = time.process_time()
        without, before = losses(config), states()
        trained = time.process_time()
        found, unchanged = [check(config), check(config)], states() == before
        checked = time.process_time()
        gc.collect()
        alive = sum(engine() is not None for engine in engines)
        report[name] = {{
            "refusals": found, "unchanged": unchanged, "alive": alive, "seconds": [trained - started, checked - trained],
            "without": without, "with": losses(config), "faults": refusals(config),
        }}
    with open(f"report-{{rank}}.json", "w") as file:
        json.dump(report, file)
    watch.end(0)
"""


WRONG = r": the (?:difference of (?:gradient norm \d|the update of .+)|number of weights .+) is (\S+), above (\S+);"
NAMED = {
    "the sum over micro-batches is not divided": "gradient norm",
    "no gradient is clipped": "the update of",
    "norms decay": "the update of model.layers.0.input_layernorm.weight",
    "the sum over ranks is not divided": "gradient norm",
    "one rank's weights drift": "weights unlike their masters",
}


@pytest.fixture(
    scope="module", params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2)], ids=["1 rank", "2 ranks"]
)
def num_ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def reports(num_ranks, tmp_path_factory) -> list[dict]:
    """What each rank found: honest checks, faults put into DeepSpeed, and trainings without and with a check before them."""
    folder = tmp_path_factory.mktemp(f"truth{num_ranks}")
    return check_truth(
        folder,
        num_ranks,
        {
            "fp32": tiny_config(folder, precision="fp32", tokens_per_step=64 * num_ranks * 4, mask_across_documents=True),
            "bf16": tiny_config(folder, precision="bf16", tokens_per_step=64 * num_ranks, qk_norm=True),
            "fp16": tiny_config(folder, precision="fp16", tokens_per_step=64 * num_ranks * 4, mask_across_documents=True),
            "muon": tiny_config(
                folder, precision="fp32", tokens_per_step=64 * num_ranks * 4, optimizer="muon", optimizer_state_precision="bf16"
            ),
            "muon in fp16": tiny_config(folder, precision="fp16", tokens_per_step=64 * num_ranks * 4, optimizer="muon"),
            "muon in bf16": tiny_config(
                folder, precision="bf16", tokens_per_step=64 * num_ranks, optimizer="muon", optimizer_state_precision="bf16"
            ),
        },
    )


def check_truth(folder: Path, ranks: int, configs: dict[str, TrainingConfig]) -> list[dict]:
    described = json.dumps({name: vars(config) for name, config in configs.items()})
    env = {"RANK": "{index}", "LOCAL_RANK": "{index}", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": "{port}", "OMP_NUM_THREADS": "1"}
    expect_success(launch(folder, TRUTH_SCRIPT.format(described=described), [sys.executable], ranks, env))
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("precision", CLONES)
def test_deepspeeds_updates_are_those_of_plain_torch(reports, precision):
    assert [report[precision]["refusals"] for report in reports] == [["", ""]] * len(reports)


@pytest.mark.parametrize("precision", CLONES)
def test_every_fault_of_deepspeed_is_refused_in_one_line_by_every_rank(reports, precision):
    for report in reports:
        assert len(report[precision]["faults"]) == (6 if len(reports) == 1 else 4) + (precision in ("fp32", "fp16"))
        for fault, refusal in report[precision]["faults"].items():
            assert refusal.startswith("DeepSpeed's updates are not those of plain torch: "), fault
            assert "\n" not in refusal and "pip install --force-reinstall deepspeed==" in refusal
    assert reports[0][precision]["faults"] == reports[-1][precision]["faults"]


@pytest.mark.parametrize("precision", CLONES)
def test_refusal_names_what_is_wrong_and_by_how_much(reports, precision):
    faults = reports[0][precision]["faults"]
    for refusal in faults.values():
        found = re.search(WRONG, refusal)
        assert found and float(found[1]) > float(found[2]), refusal
    named = {fault: words for fault, words in NAMED.items() if fault in faults}
    assert len(named) == (3 if len(reports) == 1 else 2)
    for fault, words in named.items():
        assert words in faults[fault]


@pytest.mark.parametrize("precision", CLONES)
def test_check_leaves_no_trace(reports, precision):
    for report in reports:
        assert report[precision]["unchanged"]
        assert report[precision]["alive"] == 0
        assert len(report[precision]["without"]) == 12
        assert report[precision]["without"] == report[precision]["with"]


@pytest.mark.parametrize("precision", CLONES)
def test_check_costs_no_more_than_some_steps(reports, precision):
    """Processor time, against that of twelve steps of a tiny model and its engine's beginning."""
    for report in reports:
        training, two_checks = report[precision]["seconds"]
        assert two_checks < 20 * training


@st.composite
def runs(draw) -> tuple[TrainingConfig, int]:
    """Configurations of every kind, each with a number of ranks over which its batch divides."""
    ranks, accumulation, rows = draw(st.integers(1, 80)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    context, kv_heads, schedule = draw(st.integers(1, 4096)), draw(st.integers(1, 3)), draw(st.sampled_from(["cosine", "wsd"]))
    heads, head_size = kv_heads * draw(st.integers(1, 4)), draw(st.sampled_from([None, 2, 64]))
    drawn = {
        name: draw(st.floats(low, high, exclude_min=True))
        for name, low, high in (
            ("adam_eps", 0, 1), ("max_grad_norm", 0, 1e9), ("rope_theta", 0, 1e9), ("norm_eps", 0, 1),
            ("weight_decay", -1e-9, 9), ("learning_rate", 0, 1), ("init_std", 0, 1),
        )
    }  # fmt: skip
    names = ("qk_norm", "tie_embeddings")
    share = draw(st.sampled_from([None, 0.5, 1 / (1000 * ranks * accumulation * rows)]))
    weights = None if share is None else (share, 1 - share)
    return TrainingConfig(
        **(drawn | {"weight_decay": abs(drawn["weight_decay"]), "min_learning_rate": 0.0}),
        corpus=("one", "other"), corpus_weights=weights,
        **{name: draw(st.booleans()) for name in names},
        context_length=context, micro_batch_rows=rows, tokens_per_step=ranks * accumulation * rows * context,
        num_heads=heads, num_kv_heads=kv_heads, hidden_size=heads * 2 * draw(st.integers(1, 64)), head_size=head_size,
        num_layers=draw(st.integers(1, 99)), mlp_size=draw(st.integers(1, 9999)), vocab_size=draw(st.integers(258, 2**17)),
        tokenizer_path=draw(st.sampled_from([None, "tokenizer.json"])), eval_tokens=context, schedule=schedule,
        decay_steps=9 if schedule == "wsd" else None, beta1=draw(st.floats(0, 0.999)), beta2=draw(st.floats(0, 0.999)),
        optimizer=draw(st.sampled_from(["adamw", "muon"])), optimizer_state_precision=draw(st.sampled_from(["bf16", "fp32"])),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])), init_from=draw(st.sampled_from([None, "other"])),
        activation_checkpointing=draw(st.sampled_from(["none", "block", "block_offload"])), **draw(
            st.sampled_from([{}, {"accumulate_on": "gpu"}, {"accumulate_on": "gpu", "offload_optimizer": False}])
        ),
    ), ranks  # fmt: skip


@given(runs())
def test_tiny_clone_is_valid_and_has_the_runs_own_deepspeed_dict(run):
    config, ranks = run
    tiny = truth_check.tiny_clone(config, ranks)
    own, small = (TrainingConfig.deepspeed_config(each, ranks) for each in (config, tiny))
    assert {key for key in own if own[key] != small[key]} <= BATCH_KEYS | {"zero_optimization"}
    zero, small_zero = own["zero_optimization"], small["zero_optimization"]
    assert {key for key in zero if zero[key] != small_zero[key]} <= BUCKET_KEYS
    assert own.keys() == small.keys() and zero.keys() == small_zero.keys()
    assert tiny.accumulation_steps(ranks) == min(max(3, config.accumulation_steps(ranks)), 8)
    assert tiny.tie_embeddings and tiny.num_parameters < 30000
    assert (tiny.qk_norm, tiny.activation_checkpointing) == (config.qk_norm, config.activation_checkpointing)


@given(st.integers(1, 40), st.integers(1, 20))
def test_each_micro_batch_of_a_rank_has_tokens_of_its_own_and_ranks_differ(ranks, accumulation):
    tiny = truth_check.tiny_clone(TrainingConfig(tokens_per_step=1024 * ranks * accumulation), ranks)
    windows = truth_check.tiny_windows(tiny, ranks)
    assert windows.shape == (3, ranks, tiny.accumulation_steps(ranks), tiny.micro_batch_rows, tiny.context_length + 1)
    assert windows.min() >= 0 and windows.max() < tiny.vocab_size
    for step in windows:
        for micro_batches in step:
            tokens = [set(micro_batch.flatten().tolist()) for micro_batch in micro_batches]
            assert len(set.union(*tokens)) == sum(map(len, tokens))
        assert all(not torch.equal(step[0], other) for other in step[1:])
    for ours, theirs in zip(windows[0][0], windows[0][1 % ranks], strict=True):
        assert ranks == 1 or not set(ours.flatten().tolist()) & set(theirs.flatten().tolist())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_plain_loss_and_its_gradients_are_the_models_own(precision, qk_norm, is_masked):
    changes = {"qk_norm": qk_norm, "mask_across_documents": is_masked}
    config = TrainingConfig(precision=precision, rope_theta=100.0, norm_eps=1e-3, **changes)
    tiny = truth_check.tiny_clone(config, 1)
    drawn = truth_check.draw_weights(empty_model(tiny, torch.device("cpu")))
    plain, model = truth_check.plain_copy(drawn), drawn.float()
    windows = truth_check.tiny_windows(tiny, 1)[1, 0, 0]
    truth_check.plain_loss(plain, windows, tiny).backward()
    documents = windows_of(windows.numpy(), truth_check.tiny_borders(tiny), torch.device("cpu")).documents
    assert (documents is not None) == is_masked
    logits = functional.linear(model(windows[:, :-1], documents=documents), model.head)
    functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    for (name, right), (_, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(other.grad.double(), right.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adam_with_unbounded_updates_is_compared_after_one():
    bounded = truth_check.tiny_clone(TrainingConfig(beta1=0.9, beta2=0.98), 1)
    assert len(truth_check.tiny_windows(bounded, 1)) == 3
    assert len(truth_check.tiny_windows(replace(bounded, beta1=0.99, beta2=0.5), 1)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_of_torch_that_fails_is_refused_in_one_line_with_what_to_change(tmp_path, monkeypatch):
    config, device = tiny_config(tmp_path, compile_kernels="always"), torch.device("cpu")
    no_compiler, refused = (
        compiling.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match="^torch.compile "),
    )
    with fresh_cache(), no_compiler, refused as refusal:
        truth_check.refuse_failing_compiler(config, device)
    assert 'set compile_kernels="never"' in str(refusal.value) and "\n" not in str(refusal.value)
    monkeypatch.setattr(operations, "COMPILER_OPTIONS", {"unknown to this torch": True})
    with pytest.raises(ValueError, match='^torch.compile fails here: .*unknown to this torch.*; set compile_kernels="never"'):
        truth_check.refuse_failing_compiler(config, device)
    for place in ("gpu", "never"):
        truth_check.refuse_failing_compiler(replace(config, compile_kernels=place), device)
