"""Evaluates the model of a run: held-out loss, samples, loss spikes, and the documents behind a bad step."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds.loader import count_windows, documents_between, held_out_batches, rank_windows
from scripts.config import NAMED_DOCUMENT_TOKENS, NUM_NAMED_DOCUMENTS, TrainingConfig
from scripts.engine.distributed import Ranks, device_of, gather
from scripts.model.documents import Windows
from scripts.model.losses import token_nats
from scripts.model.sampling import continue_ids
from scripts.run.metrics import finite
from scripts.run.state import Progress, Run, Step, step_batches, step_order, windows_on_device

LOSS_SCALE = "the loss scale"


class HeldOut(NamedTuple):
    """`nats_per_token` over held-out tokens; `bits_per_byte`: the same nats in bits, over the bytes of the text."""

    nats_per_token: float
    bits_per_byte: float


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
    return HeldOut(total / num_tokens, total / math.log(2) / num_bytes)


def held_out_loss(config: TrainingConfig, ranks: Ranks, data, model) -> HeldOut:
    """The loss over `eval_tokens` tokens, spread evenly over the held-out part. Every rank must call this."""
    lengths = torch.tensor(data.token_num_bytes(), device=device_of(ranks))
    return evaluate(model, held_out_windows(config, ranks, data, config.eval_tokens), lengths, config.loss_chunk_rows)


def held_out_windows(config: TrainingConfig, ranks: Ranks, data, num_tokens: int) -> Iterator[Windows]:
    """This rank's batches of held-out windows, on its device; all ranks' together have `num_tokens`."""
    length, rows = config.context_length, config.micro_batch_rows
    shape = {"micro_batch_rows": rows, "context_length": length, "num_windows": num_tokens // length}
    batches = held_out_batches(data.validation, rank=ranks.rank, world_size=ranks.world_size, **shape)
    return (windows_on_device(ids, config, data, device_of(ranks)) for ids in batches)


def held_out_fields(found: HeldOut) -> dict:
    """What a record holds of a held-out loss."""
    return {"val_loss": finite(found.nats_per_token), "val_bits_per_byte": finite(found.bits_per_byte)}


def evaluation_record(run: Run, steps_done: int) -> dict:
    """The line of metrics.jsonl of an evaluation. Every rank must call this."""
    found = held_out_loss(run.config, run.ranks, run.data, run.engine.module)
    return {"kind": "eval", "step": steps_done, "tokens": steps_done * run.config.tokens_per_step, **held_out_fields(found)}


def sample_record(run: Run, steps_done: int) -> dict:
    """The event of a continuation of `sample_prompt`. Only rank 0 samples; no other rank waits for it."""
    config, model, text = run.config, run.engine.module, None
    if run.ranks.rank == 0:
        prompt, seed = torch.tensor(run.data.encode(config.sample_prompt)), config.seed + steps_done
        ids = continue_ids(
            model, prompt, config.sample_tokens, temperature=config.sample_temperature, top_k=config.sample_top_k, seed=seed
        )
        text = config.sample_prompt + run.data.decode(list(ids))
    return {"kind": "event", "step": steps_done, "event": "sample", "text": text}


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
    num_windows = count_windows(stream.num_tokens, config.context_length)
    for rank, micro_batch in np.argwhere(suspects).tolist():
        windows = rank_windows(num_windows, rank=rank, **step_order(run, step)).windows[micro_batch]
        for start in (windows * config.context_length).tolist():
            for document in documents_between(stream, start, start + config.context_length + 1, run.data.end_of_text_id):
                found[document.number] = document
    return [{"document": number, "beginning": _beginning(run, found[number])} for number in sorted(found)]


@torch.no_grad()
def _hardest_documents(run: Run, step: int, mean_nats: float) -> list[dict]:
    """The documents that weigh most on a step's loss, in nats above its mean, hardest first. Every rank must call this."""
    config, data, model = run.config, run.data, run.engine.module
    own = torch.full((NUM_NAMED_DOCUMENTS, 3), -math.inf, dtype=torch.float64)  # -inf where there is no piece
    for batch in step_batches(run, step):
        windows = windows_on_device(batch.ids, config, data, run.device)
        ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(batch.windows * config.context_length)
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
