"""Laws of the gradients' path in scripts/engine/offload.py: the results of stock DeepSpeed; it keeps and moves what it says."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import expect_success, launch, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from scripts.engine.updates import ROW_ELEMENTS, StagingRing, sum_of_squares

PATH_SCRIPT = """
import gc, json, math, os, sys, threading, time
from dataclasses import replace
from functools import partial
from unittest.mock import patch
import deepspeed, torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch.utils._python_dispatch import TorchDispatchMode
from scripts.config import TrainingConfig
from scripts.engine import offload, updates, watch
from scripts.model.decoder import empty_model, initialise, parameter_groups
from scripts.model.documents import Windows
from scripts.model.losses import next_token

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
take, land, taken_sums = offload.take_gradient, updates.bring_down, []


def of(config, num_micro_batches, rows=2, **changes):
    tokens = rows * config.context_length * num_micro_batches * world_size
    return replace(config, micro_batch_rows=rows, tokens_per_step=tokens, eval_tokens=config.context_length, **changes)


def steps_of(config, num_steps):
    shape = (num_steps, world_size, config.accumulation_steps(world_size), config.micro_batch_rows, config.context_length + 1)
    drawn = torch.randint(257, shape, generator=torch.Generator().manual_seed(1))
    return [list(step.to(device)) for step in drawn[:, rank]]


def light(optimizer, sums, send, weight, group):
    taken_sums[:] = sums
    take(optimizer, sums, send, weight, group)


def through_ring(optimizer, sums, send, weight, group):
    take(optimizer, sums, optimizer._wait_for_offload_copies.args[-1].__self__.send, weight, group)


def engine_of(config, kind, take_gradient=light, scaler=None):
    offload.take_gradient = take_gradient
    model, dictionary = initialise(empty_model(config, device)), TrainingConfig.deepspeed_config(config, world_size)
    if kind == "stock":
        dictionary["data_types"]["grad_accum_dtype"] = "fp32"
    groups = parameter_groups(model, config.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=dictionary)
    if kind != "stock":
        offload.replace_offload_path(engine, config)
    if scaler is not None:
        engine.optimizer.loss_scaler = scaler
    return engine


def take_step(engine, windows, config, factors):
    for factor, each in zip(factors, windows, strict=True):
        engine.backward(factor * next_token(engine, Windows(each), config))
        engine.step()


def trained(config, kind, steps, spoilt=()):
    engine, norms = engine_of(config, kind, through_ring if kind == "ring" else light), []
    for number, windows in enumerate(steps):
        factors = [1.0] * len(windows)
        if number in spoilt and rank == world_size - 1:
            factors[len(windows) // 2] = math.nan
        take_step(engine, windows, config, factors)
        norms.append(float(engine.get_global_grad_norm()))
    gradients = [master.grad for master in engine.optimizer.single_partition_of_fp32_groups]
    found = {{
        "masters": torch.cat([master.flatten() for _, master in sorted(offload.full_masters(engine, engine.module).items())]),
        "gradient": torch.cat(gradients if gradients[0] is not None else taken_sums).double(),
        "norms": norms, "skipped": engine.skipped_steps,
    }}
    engine.destroy()
    found["threads"] = sum(thread.name.startswith("gradients") for thread in threading.enumerate())
    return found


def difference(ours, theirs):
    return {{
        "masters": float((ours["masters"] - theirs["masters"]).abs().max()),
        "norms": max(abs(a / b - 1.0) for a, b in zip(ours["norms"], theirs["norms"], strict=True)),
        "threads": ours["threads"],
    }}


def against_stock(config):
    found = {{}}
    clipped, whole = (("light", "cpu"),), (("light", "cpu"), ("ring", "cpu"), ("light", "gpu"))
    for name, num_micro_batches, max_norm, ways in (("clipped", 1, 0.1, clipped), ("whole", 3, 1e9, whole)):
        same = of(config, num_micro_batches, max_grad_norm=max_norm)
        steps = steps_of(same, 3)
        stock = trained(same, "stock", steps)
        for kind, place in ways:
            ours = trained(replace(same, accumulate_on=place), kind, steps)
            found[f"{{name}} {{kind}} {{place}}"] = difference(ours, stock)
    return found


def drifts(config, places):
    own = 64 // world_size
    small, large = of(config, own, rows=1, max_grad_norm=1e9), of(config, 1, rows=own, max_grad_norm=1e9)
    windows = steps_of(small, 1)
    whole = trained(large, "light", [[torch.cat(windows[0])]])["gradient"]
    found = {{}}
    for place, precision in places:
        summed = trained(replace(small, accumulate_on=place, accumulation_precision=precision), "light", windows)["gradient"]
        found[f"{{place}} {{precision}}"] = float((summed - whole).norm() / whole.norm())
    return found


def plain_steps(config, steps):
    # Masters after the steps by torch's own AdamW and Muon, whose matrices torch would round to 16 bits.
    plain, (b1, b2) = initialise(empty_model(config, device)), (config.beta1, config.beta2)
    groups, is_muon = parameter_groups(plain, config.weight_decay), config.optimizer == "muon"
    matrices = [weight for group in groups for weight in group["params"] if group["is_block"] and is_muon]
    others = [group for group in groups if not (group["is_block"] and is_muon)]
    used = [torch.optim.AdamW(others, config.learning_rate, (b1, b2), config.adam_eps)]
    if is_muon:
        rate = config.muon_learning_rate or config.learning_rate
        used.append(torch.optim.Muon(matrices, rate, config.weight_decay, config.muon_momentum, adjust_lr_fn="match_rms_adamw"))
    for number, step in enumerate(steps):
        plain.zero_grad()
        if is_muon and config.muon_first_momentum is not None:
            share = min(1.0, number / config.muon_momentum_warmup_steps)
            momentum = (1 - share) * config.muon_first_momentum + share * config.muon_momentum
            used[1].param_groups[0]["momentum"] = momentum
        for each in step:
            logits = torch.nn.functional.linear(plain(each[:, :-1]), plain.head)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), each[:, 1:].flatten())
            (loss / len(step)).backward()
        for weight in plain.parameters():
            torch.distributed.all_reduce(weight.grad.div_(world_size))
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_grad_norm)
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for optimizer in used:
                optimizer.step()
    return torch.cat([weight.detach().flatten().cpu() for _, weight in sorted(plain.named_parameters())])


def against_torch(config):
    found = {{}}
    for num_micro_batches, is_tied in ((1, True), (4, False), (8, True)):
        same = of(config, num_micro_batches, max_grad_norm=0.5, tie_embeddings=is_tied, learning_rate=1e-3, adam_eps=1e-6)
        steps = steps_of(same, 3)
        right, first = plain_steps(same, steps), None
        moved = float((right - plain_steps(same, [])).abs().max())
        for place, is_offloaded in (("cpu", True), ("gpu", True), ("gpu", False)):
            ours = trained(replace(same, accumulate_on=place, offload_optimizer=is_offloaded), "light", steps)["masters"]
            first = ours if first is None else first
            name, error = f"{{num_micro_batches}} {{place}} {{is_offloaded}}", float((ours - right).abs().max())
            found[name] = [error, bool(torch.equal(ours, first)), moved]
    return found


def spoilt(config):
    steps = steps_of(config, 3)
    with_it, without = trained(config, "light", steps, (1,)), trained(config, "light", [steps[0], steps[2]])
    return {{
        "skipped": [with_it["skipped"], without["skipped"]],
        "same": bool(torch.equal(with_it["masters"], without["masters"])),
        "norms": [with_it["norms"][2], without["norms"][1]],
    }}


def scaled(config, skipped, kind="light"):
    # Its masters after steps in which the loss scale doubles or halves, and those of plain torch with a GradScaler.
    steps, scales = steps_of(config, 40), []
    engine = engine_of(config, kind, scaler=DynamicLossScaler(2.0**16, 1, 1, 2, False))
    plain = initialise(empty_model(config, device))
    groups, betas = parameter_groups(plain, config.weight_decay), (config.beta1, config.beta2)
    adam = torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_eps)
    before = {{name: weight.detach().to("cpu", copy=True) for name, weight in plain.named_parameters()}}
    scaler = torch.amp.GradScaler(device.type, growth_interval=1)
    for number, windows in enumerate(steps):
        scales.append(engine.optimizer.loss_scale)
        factor = math.nan if number in skipped else 1.0
        take_step(engine, windows, config, [factor] * len(windows))
        adam.zero_grad()
        for each in windows:
            logits = torch.nn.functional.linear(plain(each[:, :-1]), plain.head)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), each[:, 1:].flatten())
            scaler.scale(factor * loss / len(windows)).backward()
        for weight in plain.parameters():
            torch.distributed.all_reduce(weight.grad.div_(world_size))
        scaler.unscale_(adam)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_grad_norm)
        scaler.step(adam)
        scaler.update()
    ours, theirs = offload.full_masters(engine, engine.module), {{name: w.cpu() for name, w in plain.state_dict().items()}}
    error, update = (sum(float((one[n] - two[n]).abs().sum()) for n in one) for one, two in ((ours, theirs), (theirs, before)))
    changes = [after / before for before, after in zip(scales[:-1], scales[1:], strict=True)]
    found = {{"error": error / update, "doublings": changes.count(2.0), "halvings": changes.count(0.5)}}
    found["skipped"] = engine.skipped_steps
    engine.destroy()
    return found


def overflowing(config):
    # What a real fp16 engine says after 40 steps in a row that overflow, and then one that does not.
    engine, (windows,) = engine_of(config, "light"), steps_of(config, 1)
    for factor in [math.inf] * 40 + [1.0]:
        take_step(engine, windows, config, [factor] * len(windows))
    found = {{"skipped": engine.skipped_steps, "scale": engine.optimizer.loss_scale}}
    found |= {{"norm": float(engine.get_global_grad_norm()), "adam": offload.adam_steps(engine)}}
    engine.destroy()
    return found


def peaks(config):
    # The accelerator's peak before an engine is made, of which half is freed, and after.
    accelerator, large = get_accelerator(), torch.ones(2**26, device=device)
    accelerator.memory_allocated()
    before = accelerator.max_memory_allocated()
    del large
    engine_of(config, "light").destroy()
    return [before, accelerator.max_memory_allocated()]


def storages():
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return {{each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}}


class Uploads(TorchDispatchMode):
    def __init__(self, sources, targets):
        super().__init__()
        self.sources, self.targets, self.num_bytes = sources, targets, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = (each.untyped_storage().data_ptr() for each in args[:2])
            self.num_bytes += args[1].nbytes * (source in self.sources and target in self.targets)
        return func(*args, **(kwargs or {{}}))


def footprint(config):
    updates.words_of(updates.Draws(0, 0, 0), 0, 1, device)
    steps, before, num_down, gradients = steps_of(config, 2), storages(), [0], set()

    def landing(sums, slots, stream):
        for landed in land(sums, slots, stream):
            num_down[0] += len(landed.gradient) * sums[0].itemsize
            yield landed

    def counting(optimizer, sums, send, weight, group):
        take(optimizer, sums, partial(counted, send), weight, group)

    def counted(send, source, target, is_first):
        num_down[0] += source.nbytes * (target.untyped_storage().data_ptr() in gradients)
        send(source, target, is_first)

    gc.freeze()
    engine = engine_of(config, "light", counting)
    optimizer = engine.optimizer
    updates.bring_down, is_there = landing, config.accumulate_on == "cpu"
    for master in optimizer.single_partition_of_fp32_groups if is_there else ():
        gradients.add(master.grad.untyped_storage().data_ptr())
    staging = {{buffer.untyped_storage().data_ptr() for buffer in optimizer.param_buffer_of_bit16_for_cpu_offload_groups}}
    weights = {{flat.untyped_storage().data_ptr() for flat in optimizer.bit16_groups_flat}}

    def held():
        return sum(size for place, size in storages().items() if place not in before and size > 64)

    def settled(allowed):  # gloo's threads let go of their tensors late
        limit = time.monotonic() + 60
        while held() > allowed and time.monotonic() < limit:
            time.sleep(0.01)
        return held()

    num_weights, largest = sum(flat.numel() for flat in optimizer.bit16_groups_flat), max(map(int, optimizer.partition_size))
    owned, weight_bytes = num_weights // world_size, config.dtype.itemsize
    sums = owned * weight_bytes if config.accumulate_on == "gpu" else 0
    at_first, between = settled((num_weights + 2 * largest) * weight_bytes + (4 + 4 * is_there) * owned + sums), []
    moments = [2 - offload.is_muon(optimizer, config, group) for group in range(len(optimizer.partition_size))]
    num_moments = sum(number * int(size) for number, size in zip(moments, optimizer.partition_size, strict=True))
    later = at_first + num_moments * (2 if config.optimizer_state_precision == "bf16" else 4)
    take_step(engine, steps[0], config, [1.0] * len(steps[0]))
    num_down[0], uploads = 0, Uploads(staging, weights)
    for each in steps[1]:
        engine.backward(next_token(engine, Windows(each), config))
        between.append(settled(later))
        with uploads:
            engine.step()
    found = {{
        "at_first": at_first, "between": between, "after": settled(later), "down": num_down[0], "up": uploads.num_bytes,
        "weights": num_weights, "largest": largest, "num_parameters": config.num_parameters, "later": later,
    }}
    engine.destroy()
    updates.bring_down = land
    gc.unfreeze()
    return found


if __name__ == "__main__":
    offload.start_quickly()
    offload.keep_to_device(get_accelerator(), device)
    get_accelerator().is_fp16_supported = lambda: True  # float16 on a CPU is slow, not wrong
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    torch.set_num_threads(1)
    fields = json.loads({fields!r})
    fields |= {{name: tuple(fields[name]) for name in ("corpus", "corpus_exclude", "validation_corpus", "sample_stop")}}
    bf16 = TrainingConfig(**fields)
    fp32, bf16_on_gpu = replace(bf16, precision="fp32"), replace(bf16, accumulate_on="gpu", accumulation_precision="bf16")
    muon, short = replace(fp32, optimizer="muon"), {{"optimizer": "muon", "optimizer_state_precision": "bf16"}}
    places = ("cpu", "fp32"), ("gpu", "fp32"), ("gpu", "bf16")
    on_device, often = replace(fp32, offload_optimizer=False, accumulate_on="gpu"), {{*range(2, 40, 5), *range(3, 40, 5)}}
    ways = ((fp32, 0.1, {{*range(3, 24)}}), (fp32, 1e9, often), (on_device, 1e9, often))[: 5 - 2 * world_size]
    report = {{
        "scaled": [scaled(of(kind, 2, max_grad_norm=norm), skipped) for kind, norm, skipped in ways],
        "stock": {{"fp32": against_stock(fp32), "bf16": against_stock(bf16)}},
        "drift": {{"fp32": drifts(fp32, places[:2]), "bf16": drifts(bf16, places[::2])}},
        "spoilt": [spoilt(of(config, 3)) for config in (fp32, bf16_on_gpu, muon, replace(bf16_on_gpu, **short))],
        "torch": {{"adamw": against_torch(fp32), "muon": against_torch(replace(muon, muon_learning_rate=2e-3))}},
        "footprint": [footprint(of(config, 3)) for config in (fp32, bf16, bf16_on_gpu, replace(bf16, **short))],
        "overflowing": overflowing(of(bf16, 2, precision="fp16")) if device.type == "cpu" else None,
        "peaks": peaks(of(fp32, 1)),
        "compiler": "torch._inductor.compile_fx" in sys.modules,
    }}
    with open(f"report-{{rank}}.json", "w") as file:
        json.dump(report, file)
    watch.end(0)
"""


def follow_gradients(folder: Path, ranks: int, hidden_gpus: dict[str, str]) -> list[dict]:
    """Each rank's report of the script above."""
    config = tiny_config(folder, context_length=8, tokens_per_step=16, loss_chunk_rows=64)
    env = {"RANK": "{index}", "LOCAL_RANK": "{index}", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": "{port}", "OMP_NUM_THREADS": "1"} | hidden_gpus
    expect_success(launch(folder, PATH_SCRIPT.format(fields=json.dumps(vars(config))), [sys.executable], ranks, env))
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(
    scope="module", params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2)], ids=["1 rank", "2 ranks"]
)
def num_ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def reports(num_ranks, tmp_path_factory) -> list[dict]:
    return follow_gradients(tmp_path_factory.mktemp(f"path{num_ranks}"), num_ranks, {"CUDA_VISIBLE_DEVICES": ""})


def assert_stock(reports: list[dict]) -> None:
    """Without clipping bitwise; a clip factor may differ in its last bit, because the norms are summed in another order."""
    for report in reports:
        for precision, found in report["stock"].items():
            for name, difference in found.items():
                assert difference["norms"] < 1e-6, (precision, name)
                assert difference["masters"] <= (0.0 if name.startswith("whole") else 1e-6), (precision, name, difference)
                assert difference["threads"] == 0


def test_updates_are_those_of_stock_deepspeed_in_every_place(reports):
    assert_stock(reports)


def test_updates_of_either_optimizer_are_those_of_torch_wherever_gradients_and_state_lie(reports):
    for report in reports:
        for optimizer, found in report["torch"].items():
            for name, (error, is_first, moved) in found.items():
                assert error < 2e-6 < 1e-3 < moved, (optimizer, name, error)
                assert is_first or name.endswith("False"), (optimizer, name)


def test_torchs_compiler_is_never_loaded(reports):
    assert not any(report["compiler"] for report in reports)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_updates_are_those_of_stock_deepspeed_on_a_gpu(tmp_path):
    reports = follow_gradients(tmp_path, 1, {"CUDA_VISIBLE_DEVICES": "0"})
    assert_stock(reports)
    for report in reports:
        for optimizer, found in report["torch"].items():
            assert max(error for error, *_ in found.values()) < 1e-5, optimizer


def test_a_peak_from_before_the_engine_is_not_forgotten(reports):
    for report in reports:
        before, after = report["peaks"]
        assert after >= before > 2**28


def test_sixty_four_micro_batches_sum_to_one_large_batch(reports):
    for report in reports:
        print(f"drift against one large batch, relative: {report['drift']}")
        assert max(report["drift"]["fp32"].values()) < 1e-6
        assert report["drift"]["bf16"]["cpu fp32"] < report["drift"]["bf16"]["gpu bf16"] < 0.2


def test_nan_in_a_middle_micro_batch_of_one_rank_skips_that_step_alone_on_all(reports):
    for report in reports:
        for found in report["spoilt"]:
            assert found["skipped"] == [1, 0]
            assert found["same"]
            assert found["norms"][0] == found["norms"][1]


def test_gradients_are_divided_by_the_scale_of_their_backward_whenever_the_scale_changes(reports):
    """Plain torch with a GradScaler, which divides before it changes the scale, makes the same updates."""
    for report in reports:
        print(f"loss scale: {report['scaled']}")
        assert len(report["scaled"]) == (3 if len(reports) == 1 else 1)
        for found in report["scaled"]:
            assert found["error"] < 1e-4
            assert found["doublings"] >= 7 and found["halvings"] >= 7 and found["skipped"] >= 13
        assert any(found["doublings"] >= 10 and found["halvings"] >= 10 for found in report["scaled"])


def test_forty_overflows_in_a_row_raise_nothing_and_the_next_step_is_taken(reports):
    for report in reports:
        found = report["overflowing"]
        assert found["skipped"] == 40 and found["scale"] == 1.0 and found["adam"] == 1
        assert 0 < found["norm"] < 100


PLACES = (("cpu", 4), ("cpu", 2), ("gpu", 2), ("cpu", 2))


def test_nothing_is_held_but_weights_their_state_the_staging_and_the_sums(reports):
    ranks = len(reports)
    for report in reports:
        for (place, weight_bytes), found in zip(PLACES, report["footprint"], strict=True):
            owned = found["weights"] // ranks
            state, staging = (4 if place == "gpu" else 8) * owned, 2 * found["largest"] * weight_bytes
            sums = owned * weight_bytes if place == "gpu" else 0
            assert found["at_first"] == found["weights"] * weight_bytes + state + staging + sums
            assert {*found["between"], found["after"]} == {found["later"]}
        of_adam, of_muon = (report["footprint"][number] for number in (1, 3))
        adam, muon = (found["later"] - found["at_first"] for found in (of_adam, of_muon))
        assert adam == 8 * of_adam["weights"] // ranks and adam / 4 < muon < adam / 2


def test_bytes_that_move_in_a_step_are_those_of_the_formula(reports):
    ranks = len(reports)
    for (place, weight_bytes), *founds in zip(PLACES, *(report["footprint"] for report in reports), strict=True):
        down = founds[0]["weights"] if place == "gpu" else 3 * founds[0]["num_parameters"]
        assert sum(found["down"] for found in founds) == down * weight_bytes
        assert all(found["up"] == found["weights"] // ranks * weight_bytes for found in founds)


@given(
    capacity=st.integers(1, 40), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=12), firsts=st.integers(0, 2**12),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_ring_adds_up_everything_in_the_order_in_which_it_was_sent(capacity, sizes, firsts, seed):
    generator = torch.Generator().manual_seed(seed)
    ring = StagingRing(torch.zeros(2 * capacity, dtype=torch.bfloat16), 2 * capacity, torch.device("cpu"))
    arrived, expected = torch.zeros(90), torch.zeros(90)
    for number, size in enumerate(sizes):
        source, is_first = torch.randn(size, generator=generator).bfloat16(), bool(firsts >> number & 1)
        ring.send(source, arrived[:size], is_first)
        expected[:size] = source.float() + (0 if is_first else expected[:size])
        source.zero_()
    ring.drain()
    assert torch.equal(arrived, expected)
    ring.close()


class Gated(torch.Tensor):
    """Numbers on the host that take nothing in before `gate` is set."""

    gate = threading.Event()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            cls.gate.wait()
        return super().__torch_function__(func, types, args, kwargs or {})


def test_sender_waits_for_room_in_the_ring():
    ring, sent = StagingRing(torch.zeros(8), 8, torch.device("cpu")), threading.Event()
    target = torch.zeros(12)
    ring.send(torch.ones(8), target[:8].as_subclass(Gated), True)

    def send_more() -> None:
        ring.send(torch.ones(4), target[8:], True)
        sent.set()

    sender = threading.Thread(target=send_more)
    sender.start()
    assert not sent.wait(0.2) and not target.any()
    Gated.gate.set()
    sender.join()
    ring.drain()
    assert target.all()
    ring.close()


def test_fault_in_the_thread_is_raised_at_the_next_drain_and_the_rest_arrives():
    ring, target = StagingRing(torch.zeros(8), 8, torch.device("cpu")), torch.zeros(2)
    ring.send(torch.ones(2), torch.zeros(2, dtype=torch.int64), False)
    ring.send(torch.ones(2), target, True)
    with pytest.raises(RuntimeError, match="can't be cast"):
        ring.drain()
    ring.drain()
    assert target.all()
    ring.close()


@given(size=st.integers(0, 3 * ROW_ELEMENTS), scale=st.sampled_from([1e-12, 1.0, 1e12]), seed=st.integers(0, 2**16))
def test_sum_of_squares_is_that_of_float64(size, scale, seed):
    vector = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    assert float(sum_of_squares(vector)) == pytest.approx(float(vector.double().square().sum()), rel=1e-6)


@given(size=st.integers(1, 3 * ROW_ELEMENTS), place=st.integers(0, 2**20), bad=st.sampled_from([float("nan"), float("inf")]))
def test_one_number_that_is_not_finite_makes_the_sum_of_squares_not_finite(size, place, bad):
    vector = torch.zeros(size)
    vector[place % size] = bad
    assert not sum_of_squares(vector).isfinite()
