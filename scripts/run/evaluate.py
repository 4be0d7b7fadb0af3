"""Evaluates the model of a run: held-out loss, samples, loss spikes, and the documents behind a bad step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds import tokenizer as bpe
from ds.loader import Grid, documents_between, grid_of, held_out_batches, rank_windows, window_starts
from scripts.config import NAMED_DOCUMENT_TOKENS, NUM_NAMED_DOCUMENTS, TrainingConfig
from scripts.engine.distributed import Ranks, device_of, gather
from scripts.model.documents import Windows
from scripts.model.losses import token_nats
from scripts.model.sampling import before_stop, continue_ids, sampling_of, stop_bytes
from scripts.report import printable
from scripts.run.metrics import finite
from scripts.run.state import Progress, Run, Step, data_grid, data_order, step_batches, step_share, windows_on_device

LOSS_SCALE = "the loss scale"


class HeldOut(NamedTuple):
    """`nats_per_token` over held-out tokens; `bits_per_byte`: the same nats in bits, over the bytes of the text."""

    nats_per_token: float
    bits_per_byte: float


class HeldOutBySource(NamedTuple):
    """The held-out loss as `whole`, and that of each source by its name; there are none where only one has a window."""

    whole: HeldOut
    by_source: dict[str, HeldOut]


@torch.no_grad()
def evaluate(model, batches: Iterable[Windows], token_num_bytes: Tensor, chunk_rows: int) -> HeldOut:
    """Means over all ranks' `batches` of windows of T + 1 tokens. Every rank must call this.

    `token_num_bytes` (V,) is each id's length in bytes; that of an end of text is 0, and its nats count all the same. So bits
    per byte is the length of the text as the model would compress it, in bits, over its length in bytes.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=token_num_bytes.device)
    for windows in batches:
        targets = windows.targets
        nats = token_nats(model(windows.inputs, documents=windows.documents), model.head, targets, chunk_rows)
        sums += torch.stack((nats.double().sum(), sums.new_tensor(targets.numel()), token_num_bytes[targets].sum().double()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    total, num_tokens, num_bytes = sums.tolist()
    return HeldOut(total / num_tokens, total / math.log(2) / (num_bytes or math.nan))


def held_out_loss(config: TrainingConfig, ranks: Ranks, data, model) -> HeldOutBySource:
    """The loss over `eval_tokens` tokens, spread evenly over the held-out part, and where that has several sources over as many
    more, an equal share of each source. In a mixture without a `validation_corpus` the whole is the mean of the sources that
    have a held-out window, each with its weight, as if they were read in those shares. Every rank must call this.
    """
    lengths, sources = torch.tensor(data.token_num_bytes(), device=device_of(ranks)), data.held_out_sources
    grid, by_source = grid_of([source.num_tokens for source in sources] or [0], config.context_length), {}
    several = [source for source, count in enumerate(grid.counts) if count]
    for source in several if len(several) > 1 else []:
        share = {"source": source, "num_tokens": config.eval_tokens // len(several)}
        batches = _held_out(config, ranks, data, grid, **share)
        by_source[source] = evaluate(model, batches, lengths, config.loss_chunk_rows)
    weights = None if config.validation_corpus else config.corpus_weights
    if by_source and weights is not None:
        whole = mean_of([weights[source] for source in by_source], [*by_source.values()])
    else:
        whole = evaluate(model, held_out_windows(config, ranks, data, config.eval_tokens), lengths, config.loss_chunk_rows)
    return HeldOutBySource(whole, {printable(sources[source].name): found for source, found in by_source.items()})


def mean_of(weights: Sequence[float], found: Sequence[HeldOut]) -> HeldOut:
    """The held-out loss of a text to which each source gives tokens in proportion to its weight."""
    shares = np.array(weights) / max(weights)
    nats, bits = np.array(found).T
    per_token = np.average(nats, weights=shares)
    bytes_per_token = np.average(nats / math.log(2) / bits, weights=shares)
    return HeldOut(float(per_token), float(per_token / math.log(2) / bytes_per_token))


def held_out_windows(config: TrainingConfig, ranks: Ranks, data, num_tokens: int) -> Iterator[Windows]:
    """This rank's batches of held-out windows, on its device; all ranks' together have `num_tokens`."""
    grid = grid_of([data.validation.num_tokens], config.context_length)
    return _held_out(config, ranks, data, grid, source=0, num_tokens=num_tokens)


def _held_out(config: TrainingConfig, ranks: Ranks, data, grid: Grid, *, source: int, num_tokens: int) -> Iterator[Windows]:
    share = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch_rows": config.micro_batch_rows}
    num_windows = max(1, num_tokens // config.context_length)
    batches = held_out_batches(data.validation, grid, source=source, num_windows=num_windows, **share)
    return (windows_on_device(ids, config, data, device_of(ranks)) for ids in batches)


def held_out_fields(found: HeldOutBySource) -> dict:
    """What a record holds of a held-out loss."""
    whole, by_source = found
    fields: dict = {"val_loss": finite(whole.nats_per_token), "val_bits_per_byte": finite(whole.bits_per_byte)}
    if by_source:
        fields["val_loss_by_source"] = {name: finite(each.nats_per_token) for name, each in by_source.items()}
        fields["val_bits_per_byte_by_source"] = {name: finite(each.bits_per_byte) for name, each in by_source.items()}
    return fields


def evaluation_record(run: Run, steps_done: int) -> dict:
    """The line of metrics.jsonl of an evaluation. Every rank must call this."""
    found = held_out_loss(run.config, run.ranks, run.data, run.engine.module)
    return {"kind": "eval", "step": steps_done, "tokens": run.config.tokens_before(steps_done), **held_out_fields(found)}


def sample_record(run: Run, steps_done: int) -> dict:
    """The event of a continuation of `sample_prompt`. Only rank 0 samples; no other rank waits for it."""
    is_first, seed = run.ranks.rank == 0, run.config.seed + steps_done
    text = sample_text(run.config, run.engine.module, run.data, seed) if is_first else None
    return {"kind": "event", "step": steps_done, "event": "sample", "text": text}


def sample_text(config: TrainingConfig, model, data, seed: int) -> str:
    """`sample_prompt` and what `model` continues it with, before the first of `sample_stop`."""
    ids = torch.tensor(data.encode(config.sample_prompt))
    new_ids = continue_ids(model, ids, config.sample_tokens, sampling=sampling_of(config), seed=seed)
    pieces = before_stop((bpe.decode(data.tokenizer, [each]) for each in new_ids), stop_bytes(config))
    return config.sample_prompt + b"".join(pieces).decode(errors="replace")


def is_spike(loss: float, losses_before: tuple[float, ...], config: TrainingConfig) -> bool:
    """Whether `loss` lies `spike_sigmas` standard deviations above the mean of the losses before it, as in OLMo-core.

    With it they fill a window of `spike_window_steps`. With fewer than half of a window before it nothing is a spike.
    """
    window = losses_before[1 - config.spike_window_steps :]
    if len(window) < max(2, config.spike_window_steps // 2):
        return False
    return bool(loss > np.mean(window) + config.spike_sigmas * np.std(window, ddof=1))


def bad_step_records(run: Run, step: int, taken: Step, before: Progress) -> Iterator[dict]:
    """Events for a skipped step and for a spike, with the documents to blame. Every rank must call this.

    In fp16 finite losses have no document to blame: the loss scale was too high for their gradients. The event has the next.
    """
    event = {"kind": "event", "step": step + 1, "loss": finite(taken.loss)}
    if taken.is_skipped:
        event |= {"event": "skipped", "skipped_steps": before.skipped_steps + 1}
        if run.config.precision == "fp16" and np.isfinite(taken.losses).all():
            yield event | {"cause": LOSS_SCALE, "loss_scale": run.engine.optimizer.loss_scale, "documents": []}
        else:
            yield event | {"documents": _documents_of(run, step, ~np.isfinite(taken.losses))}
    elif is_spike(taken.loss, before.recent_losses, run.config):
        yield event | {"event": "spike", "documents": _hardest_documents(run, step, taken.loss)}


def _documents_of(run: Run, step: int, suspects: np.ndarray) -> list[dict]:
    """The documents of `suspects` (ranks, micro-batches), or of the whole step if no micro-batch is suspected."""
    if run.ranks.rank != 0:
        return []
    suspects = suspects if suspects.any() else np.ones_like(suspects)
    config, stream, found = run.config, run.data.train, {}
    order = data_order(config, run.data)
    for rank, micro_batch in np.argwhere(suspects).tolist():
        windows = rank_windows(order, rank=rank, **step_share(run, step)).windows[micro_batch]
        for start in window_starts(windows, order.grid).tolist():
            for document in documents_between(stream, start, start + config.context_length + 1, run.data.end_of_text_id):
                found[document.number] = document
    return [{"document": number, "beginning": _beginning(run, found[number])} for number in sorted(found)]


@torch.no_grad()
def _hardest_documents(run: Run, step: int, mean_nats: float) -> list[dict]:
    """The documents that weigh most on a step's loss, in nats above its mean, hardest first. Every rank must call this."""
    config, data, model, grid = run.config, run.data, run.engine.module, data_grid(run.config, run.data)
    own = torch.full((NUM_NAMED_DOCUMENTS, 3), -math.inf, dtype=torch.float64)  # -inf where there is no piece
    for batch in step_batches(run, step):
        windows = windows_on_device(batch.ids, config, data, run.device)
        ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(window_starts(batch.windows, grid))
        hidden = model(windows.inputs, documents=windows.documents)
        nats = token_nats(hidden, model.head, windows.targets, config.loss_chunk_rows).double().cpu()
        own = torch.cat((own, _pieces(nats, ids, starts, data.end_of_text_id, mean_nats)))
        own = own[own[:, 0].argsort(descending=True, stable=True)[:NUM_NAMED_DOCUMENTS]]
    pieces, found = torch.cat(gather(own)), {}
    if run.ranks.rank != 0:
        return []
    pieces = pieces[pieces[:, 0].isfinite()]
    for _, nats_per_token, token in pieces[pieces[:, 0].argsort(descending=True)].tolist():
        (document,) = documents_between(data.train, int(token), int(token) + 1, data.end_of_text_id)
        words = {"nats_per_token": nats_per_token, "beginning": _beginning(run, document)}
        found.setdefault(document.number, {"document": document.number, **words})
    return list(found.values())[:NUM_NAMED_DOCUMENTS]


def _beginning(run: Run, document) -> str:
    stop = min(document.stop, document.start + NAMED_DOCUMENT_TOKENS)
    return run.data.decode(run.data.train.read(document.start, stop).tolist())


def _pieces(nats: Tensor, windows: Tensor, starts: Tensor, end_of_text_id: int, mean_nats: float) -> Tensor:
    """Every document's piece of every window: (B, T) nats, (B, T + 1) ids, (B,) starts in the stream -> (pieces, 3) float64:
    the sum over its tokens of nats above `mean_nats`, its nats per token, and where in the stream its first predicted token is.
    """
    rows, length = nats.shape
    piece = (windows[:, :-1] == end_of_text_id).cumsum(1) + torch.arange(rows)[:, None] * (length + 1)
    used, where = piece.flatten().unique(return_inverse=True)
    sums = torch.zeros(len(used), dtype=torch.float64).index_add_(0, where, nats.flatten())
    counts = where.bincount().double()
    positions = (starts[:, None] + 1 + torch.arange(length)).flatten()
    firsts = torch.full((len(used),), positions.max().item()).scatter_reduce_(0, where, positions, "amin")
    return torch.stack((sums - mean_nats * counts, sums / counts, firsts.double()), 1)
