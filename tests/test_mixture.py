"""Laws of a corpus that is read by weight, from its documents to what is logged, on real data and a real model."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ended_watch, tiny_config, tiny_mixture

from ds.loader import micro_batches, rows_read, spread_windows, step_windows
from scripts.config import TrainingConfig
from scripts.engine.distributed import Ranks
from scripts.model.decoder import empty_model, initialise
from scripts.prepare_data import Data, open_data, prepare
from scripts.run.evaluate import HeldOut, bad_step_records, evaluate, held_out_fields, held_out_loss, mean_of
from scripts.run.metrics import repeat_records, scalars
from scripts.run.state import Progress, Run, Step, data_grid, data_order, order_record, windows_on_device
from scripts.run.teacher import labels_identity

CPU, ALONE = torch.device("cpu"), Ranks(rank=0, local_rank=0, world_size=1, local_size=1, num_launchers=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> TrainingConfig:
    config = tiny_mixture(tiny_config(tmp_path_factory.mktemp("mixed"), precision="fp32"))
    prepare(config)
    return config


@pytest.fixture(scope="module")
def model(mixed):
    return initialise(empty_model(mixed, CPU))


def run_of(config: TrainingConfig, data: Data) -> Run:
    """A run as far as what it reads is concerned."""
    return Run(config, ALONE, CPU, None, data, 0, Progress(), ended_watch(), None, None)


def own_text(config: TrainingConfig, source: int, data: Data) -> str:
    """The training documents of a source, each ended, as its tokens are."""
    grid, start = data_grid(config, data), data_grid(config, data).first_tokens[source]
    return data.decode(data.train.read(start, start + data.sources[source].num_tokens).tolist()) if grid.counts[source] else ""


def test_each_source_gives_windows_of_its_own_documents_alone(mixed):
    data = open_data(mixed)
    texts = [own_text(mixed, source, data) for source in range(3)]
    numbers = [
        [int(word) for word, then in zip(text.split(), text.split()[1:], strict=False) if then == "says:"] for text in texts
    ]
    assert numbers[0] == [2] and {str(number)[0] for number in numbers[1]} == {"1"} and len(numbers[2]) > 9
    order = data_order(mixed, data)
    for step in range(4):
        for batch in micro_batches(data.train, order, step=step, rank=0, world_size=1, micro_batch_rows=2):
            sources = np.searchsorted(np.cumsum(order.grid.counts), batch.windows, side="right")
            assert all(data.decode(row) in texts[source] for source, row in zip(sources, batch.ids.tolist(), strict=True))


def test_weights_change_neither_the_data_nor_the_windows_and_one_entry_is_no_mixture(mixed):
    data, other = open_data(mixed), replace(mixed, corpus_weights=(1, 1, 8))
    assert open_data(other).fingerprint == data.fingerprint and data_grid(other, data) == data_grid(mixed, data)
    by_size = replace(mixed, corpus_weights=None)
    assert data_grid(by_size, data).counts == ((data.train.num_tokens - 1) // 32,)
    assert order_record(by_size, data).keys() == {"rows_per_step", "num_windows", "seed"}
    single = replace(by_size, corpus=mixed.corpus[2:], data_dir=f"{mixed.data_dir}-single")
    weighed = replace(single, corpus_weights=(3.0,))
    assert data_order(weighed, prepare(weighed)) == data_order(single, prepare(single))


def refusal(config: TrainingConfig) -> str:
    with pytest.raises(ValueError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_entry_without_a_window_is_named_before_and_after_the_data_is_there(mixed, tmp_path):
    (tmp_path / "short\nname.txt").write_text("too short")
    corpus = (*mixed.corpus[:2], f"{tmp_path}/short*")
    config = replace(mixed, corpus=corpus, data_dir=str(tmp_path / "data"), validation_fraction=0.0, eval_every_steps=None)
    for _ in range(2):
        words = f"one training window of {corpus[2]!r}: 10 tokens are fewer than context_length + 1 = 33"
        assert words in refusal(config) and "out of corpus_weights" in refusal(config)
        prepare(replace(config, corpus_weights=None))
    repeated = replace(mixed, corpus=(*mixed.corpus[:2], mixed.corpus[0]), data_dir=str(tmp_path / "twice"))
    words = refusal(repeated)
    assert f"one training window of {mixed.corpus[0]!r}: 0 tokens" in words and "an earlier entry holds" in words


def test_data_from_before_there_were_sources_is_refused_only_with_weights(mixed, tmp_path):
    config = replace(mixed, data_dir=str(tmp_path / "data"))
    prepare(config)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sources"]
    for split in ("train", "validation"):
        for shard in manifest[split]["shards"]:
            del shard["source"]
    path.write_text(json.dumps(manifest))
    assert "name another data_dir, or set corpus_weights=None" in refusal(config)
    old = open_data(replace(config, corpus_weights=None))
    assert old.sources == () == old.held_out_sources


def nats_of(config: TrainingConfig, data: Data, model, windows: list[int]) -> HeldOut:
    ids = [data.validation.read(start, start + config.context_length + 1) for start in windows if data.validation]
    batches = [windows_on_device(np.stack(ids), config, data, torch.device("cpu"))]
    return evaluate(model, batches, torch.tensor(data.token_num_bytes()), 7)


def test_held_out_loss_of_each_source_is_that_of_its_own_windows(mixed, model):
    data, length = open_data(mixed), mixed.context_length
    _, second, third = (source.num_tokens for source in data.held_out_sources)
    num_tokens = data.manifest["validation"]["num_tokens"]
    assert data.held_out_sources[0].num_tokens == 0 and second + third == num_tokens
    starts = [spread_windows((second - 1) // length, 4) * length, second + spread_windows((third - 1) // length, 4) * length]
    expected = [nats_of(mixed, data, model, each.tolist()) for each in starts]
    found = held_out_loss(mixed, ALONE, data, model)
    assert [*found.by_source] == list(mixed.corpus[1:])
    for ours, theirs in zip(found.by_source.values(), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert found.whole == pytest.approx(mean_of((0.3, 0.2), expected), rel=1e-6)
    nats, bits = found.whole
    assert nats == pytest.approx(0.6 * expected[0].nats_per_token + 0.4 * expected[1].nats_per_token)
    num_bytes = [each.nats_per_token / math.log(2) / each.bits_per_byte for each in expected]
    assert bits == pytest.approx(nats / math.log(2) / (0.6 * num_bytes[0] + 0.4 * num_bytes[1]))
    by_size = held_out_loss(replace(mixed, corpus_weights=None), ALONE, data, model)
    assert by_size.by_source == found.by_source
    spread = spread_windows((num_tokens - 1) // length, mixed.eval_tokens // length) * length
    assert by_size.whole == pytest.approx(nats_of(mixed, data, model, spread.tolist()), rel=1e-6)


def test_entries_of_a_validation_corpus_are_sources_and_weights_do_not_weigh_them(mixed, model, tmp_path):
    files = [f"{Path(mixed.corpus[2]).parent}/{number}*.txt" for number in (3, 5, 6)]
    config = replace(
        mixed, corpus=mixed.corpus[:2], validation_corpus=tuple(files), data_dir=str(tmp_path), corpus_weights=(1, 2)
    )
    data = prepare(config)
    assert [source.name for source in data.held_out_sources] == files
    found = held_out_loss(config, ALONE, data, model)
    assert [*found.by_source] == files
    assert found.whole == held_out_loss(replace(config, corpus_weights=None), ALONE, data, model).whole
    fields = held_out_fields(found)
    names = {f"{name}/{file}" for name in ("val_loss", "val_bits_per_byte") for file in files}
    assert scalars({"kind": "eval", "step": 3, **fields}).keys() == {"val_loss", "val_bits_per_byte"} | names


def test_labels_are_those_of_before_without_a_mixture_and_outlive_other_weights(mixed):
    student = replace(mixed, corpus_weights=None, mask_across_documents=False, teacher_dir="teacher", teacher_top_k=8)
    inputs = ["ab" * 32, 8, student.distill_temperature, 32, "fp32"]
    by_size = labels_identity(student, "ab" * 32)
    assert by_size == hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    one, two = (labels_identity(replace(student, corpus_weights=weights), "ab" * 32) for weights in ((1, 1, 1), (1, 2, 3)))
    assert one == two != by_size


def test_an_event_tells_each_beginning_of_an_epoch_once_and_of_all_sources_of_the_step(mixed):
    config = replace(mixed, corpus_weights=(0.5, 0.45, 0.05), num_steps=400)
    run = run_of(config, open_data(mixed))
    order, begun = data_order(config, run.data), {name: 0 for name in config.corpus}
    for step in range(config.num_steps):
        records = list(repeat_records(run, step))
        assert len(records) <= 1
        for each in records[0]["sources"] if records else []:
            assert each["epoch_before"] == begun[each["name"]] < each["epoch"]
            begun[each["name"]] = each["epoch"]
        rows = rows_read(step + 1, order)
        assert [*begun.values()] == [max(n - 1, 0) // count for n, count in zip(rows, order.grid.counts, strict=True)]
    assert begun[config.corpus[0]] > 9 and begun[config.corpus[1]] > 1
    assert list(repeat_records(run_of(replace(config, corpus_weights=None), run.data), 399)) == []


def test_documents_of_a_skipped_step_are_those_that_its_windows_hold(mixed):
    run = run_of(mixed, open_data(mixed))
    order, ends = data_order(mixed, run.data), np.flatnonzero(run.data.train.read(0, run.data.train.num_tokens) == 256)
    losses, nothing = np.zeros((1, 8)), np.zeros(4, np.int64)
    losses[0, 3] = math.nan
    for step in range(200):
        taken = Step(
            math.nan, losses, nothing, nothing, crossing_share=0.0, is_skipped=True, is_stop_requested=False, seconds_by_part={}
        )
        (record,) = bad_step_records(run, step, taken, Progress())
        held = set()
        for window in step_windows(step, order)[6:8].tolist():
            source = int(np.searchsorted(np.cumsum(order.grid.counts), window, side="right"))
            before = sum(each.num_tokens for each in run.data.sources[:source])
            start = before + 32 * (window - sum(order.grid.counts[:source]))
            held |= {int(np.searchsorted(ends, token)) for token in range(start, start + 33)}
        assert [document["document"] for document in record["documents"]] == sorted(held)
