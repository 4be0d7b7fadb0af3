"""Documents -> ids: which library encodes, by batches, what begins and ends a document, bytes that are no UTF-8.

tiktoken encodes where it surely gives the ids of `tokenizers`, which encodes elsewhere. Knows no files and no shards.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, tee
from typing import NamedTuple

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from ds import tokenizer as bpe

# The patterns that both libraries cut alike; GPT-2's is the one inside ByteLevel.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = (bpe.QWEN2_PATTERN, bpe.QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), GPT2_PATTERN)
# How much text is encoded at once, on all cores; the ids are the same.
BATCH_CHARACTERS, BATCH_PIECES = 2**21, 2**14


class Fast(NamedTuple):
    """tiktoken's encoding, the (R,) ids of its ranks, and what finds in a text the added tokens that it does not know."""

    encoding: tiktoken.Encoding
    ids: np.ndarray
    unknown: re.Pattern[str]


class Encoder(NamedTuple):
    """A tokenizer and what its encoding takes, to be made once a corpus. Where `fast` is None `tokenizers` encodes.

    `head` is what begins documents, (0,) or (1,) uint32; `byte_ids` the (256,) ids of single bytes, which alone are tokens
    if `is_raw`; `missing` finds a byte without a token.
    """

    tokenizer: Tokenizer
    head: np.ndarray
    byte_ids: np.ndarray
    is_raw: bool
    missing: re.Pattern[bytes] | None
    fast: Fast | None


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    """The fastest encoder that gives the ids of `tokenizers`. Takes a second for 100,000 ids."""
    return plain_encoder(tokenizer)._replace(fast=_fast(tokenizer))


def plain_encoder(tokenizer: Tokenizer) -> Encoder:
    """The encoder without tiktoken."""
    begin, missing = bpe.begin_of_text_id(tokenizer), bpe.missing_bytes(tokenizer)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return Encoder(
        tokenizer=tokenizer,
        head=np.array([] if begin is None else [begin], np.uint32),
        byte_ids=np.array([tokenizer.token_to_id(symbol) or 0 for symbol in bpe.BYTE_SYMBOLS], np.uint32),
        is_raw=tokenizer.get_vocab().keys() <= {*bpe.BYTE_SYMBOLS, *special},
        missing=re.compile(b"[" + re.escape(missing) + b"]") if missing else None,
        fast=None,
    )


def disagreement(encoder: Encoder, documents: Iterable[bytes]) -> str | None:
    """How the first text begins to which tiktoken and `tokenizers` give different ids, None if none does in the first batch of
    the documents. Raises ValueError as `encode`.
    """
    if encoder.fast is None:
        return None
    batches = _batches(piece for document in documents for piece in _checked_pieces(encoder, document))
    texts = [piece for piece in next(batches, []) if isinstance(piece, str)]
    both = (_encode_texts(each, texts, None) for each in (encoder, encoder._replace(fast=None)))
    differing = (text for text, *ids in zip(texts, *both, strict=True) if not np.array_equal(*ids))
    return next((text[: bpe.SHOWN_CHARACTERS] for text in differing), None)


def encode(encoder: Encoder, document: bytes) -> np.ndarray:
    """Bytes -> (T,) uint32, first the begin-of-text id if documents have one. A special token spelled out in the document is
    ordinary text; no end of text is appended. Raises ValueError if the tokenizer has no token for one of the bytes.
    """
    return _joined(encode_pieces(encoder, document, 1))


def encode_pieces(encoder: Encoder, document: bytes, num_threads: int | None = None) -> Iterator[np.ndarray]:
    """`encode`, with its errors, as arrays to be put together: first that of the begin-of-text id, which may be empty. Holds a
    batch of the document at a time, whatever its length. `num_threads` is 1 or, for as many as there are cores, None.
    """
    found = _checked_pieces(encoder, document)
    yield encoder.head
    yield from _encoded(encoder, found, num_threads)


def encode_documents(encoder: Encoder, documents: Iterable[bytes], num_threads: int | None = None) -> Iterator[np.ndarray]:
    """`encode` of each document, with its errors; short ones share a batch. `num_threads` as for `encode_pieces`."""
    numbered, to_encode = tee(
        (number, piece) for number, document in enumerate(documents) for piece in _checked_pieces(encoder, document)
    )
    encoded = _encoded(encoder, (piece for _, piece in to_encode), num_threads)
    for _, of_document in groupby(zip(numbered, encoded, strict=True), key=lambda pair: pair[0][0]):
        yield _joined(chain([encoder.head], (ids for _, ids in of_document)))


def with_end_of_text(ids: np.ndarray, end_of_text_id: int) -> np.ndarray:
    """The (T,) ids of a document -> (T + 1,), the end of text behind them: it is what separates documents in a shard."""
    return np.append(ids, ids.dtype.type(end_of_text_id))


def _checked_pieces(encoder: Encoder, document: bytes) -> Iterator[str | bytes]:
    """At least one. Where bytes alone are tokens, they are not decoded."""
    found = encoder.missing and encoder.missing.search(document)
    if found:
        raise ValueError(
            f"the tokenizer has no token for the byte 0x{found[0][0]:02x}, which is byte {found.start()} of a document that"
            f" begins {document[:40]!r}; leave that document out, or use another tokenizer"
        )
    if encoder.is_raw:
        return (document[start : start + bpe.BLOCK_BYTES] for start in range(0, len(document) or 1, bpe.BLOCK_BYTES))
    return bpe.pieces(document)


def _encoded(encoder: Encoder, found: Iterable[str | bytes], num_threads: int | None) -> Iterator[np.ndarray]:
    """The ids of each piece."""
    assert encoder.tokenizer.encode_special_tokens, "a tokenizer that ds.tokenizer did not make, or a pickled one"
    for batch in _batches(found):
        of_texts = iter(_encode_texts(encoder, [piece for piece in batch if isinstance(piece, str)], num_threads))
        for piece in batch:
            yield next(of_texts) if isinstance(piece, str) else encoder.byte_ids[np.frombuffer(piece, np.uint8)]


def _batches(found: Iterable[str | bytes]) -> Iterator[list[str | bytes]]:
    batch, size = [], 0
    for piece in found:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_PIECES:
            yield batch
            batch, size = [], 0
    yield batch


def _encode_texts(encoder: Encoder, texts: list[str], num_threads: int | None) -> list[np.ndarray]:
    tokenizer, fast = encoder.tokenizer, encoder.fast
    if fast is None:
        return _encode_plainly(tokenizer, texts, num_threads)
    unknown = {text for text in texts if fast.unknown.search(text)}
    known = iter(_encode_fast(fast, [text for text in texts if text not in unknown], num_threads))
    others = iter(_encode_plainly(tokenizer, [text for text in texts if text in unknown], num_threads))
    return [next(others if text in unknown else known) for text in texts]


def _encode_plainly(tokenizer: Tokenizer, texts: list[str], num_threads: int | None) -> list[np.ndarray]:
    at_once = [[text] for text in texts] if num_threads == 1 else [texts]
    found = (each for some in at_once for each in tokenizer.encode_batch_fast(some, add_special_tokens=False))
    return [np.array(each.ids, np.uint32) for each in found]


def _encode_fast(fast: Fast, texts: list[str], num_threads: int | None) -> list[np.ndarray]:
    def encode_each(some: list[str]) -> list[np.ndarray]:
        return [fast.ids[fast.encoding.encode_to_numpy(text, disallowed_special=())] for text in some]

    threads = num_threads or os.cpu_count() or 1
    if threads == 1:
        return encode_each(texts)
    groups = 8 * threads
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(encode_each, [texts[first::groups] for first in range(groups)]))
    return [found[place % groups][place // groups] for place in range(len(texts))]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One array of all, whose memory grows in place, where concatenation would hold every id twice."""
    buffer = bytearray()
    for ids in parts:
        buffer += ids.data
    return np.frombuffer(buffer, np.uint32)


def _fast(tokenizer: Tokenizer) -> Fast | None:
    """None unless it surely gives the ids of `tokenizers`. tiktoken merges any neighbours that make a token, lowest rank first.

    What lies between two ends that no merge has crossed was merged as it would be alone. So where a token's own bytes merge to
    it, neighbours that make it are always those of its own last merge, which both libraries know; where they merge to three
    parts or more, it comes of no merge in either. Other tokens are left out, or are the reason for None.
    """
    state = json.loads(tokenizer.to_str())
    pattern, model = _pattern(state["pre_tokenizer"]), state["model"]
    made = [token for token, _ in groupby("".join(pair) for pair in model["merges"])]
    if pattern is None or not made or len(set(made)) < len(made):
        return None
    is_whole = bool(model.get("ignore_merges"))
    merging = Tokenizer.from_str(json.dumps(state | {"model": model | {"ignore_merges": False}})).model
    tokens: dict[str, None] = dict.fromkeys([*made, *(model["vocab"] if is_whole else [])])
    of_bytes = [token for token in tokens if len(token) > 1 and {*token} <= bpe.SYMBOL_BYTES.keys()]
    num_parts = {token: len(merging.tokenize(token)) for token in of_bytes}
    if is_whole and 2 in num_parts.values():
        return None
    kept = [*bpe.BYTE_SYMBOLS, *(token for token, number in num_parts.items() if is_whole or number == 1)]
    ranks = {bytes(bpe.SYMBOL_BYTES[symbol] for symbol in token): rank for rank, token in enumerate(kept)}
    added = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    # A special token that is never allowed costs less than none: the pattern of none matches at every character.
    encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={bpe.END_OF_TEXT: len(kept)})
    ids = np.array([model["vocab"].get(token, 0) for token in kept], np.uint32)
    return Fast(encoding, ids, re.compile("|".join(added) or "(?!)"))


def _pattern(part: dict | None) -> str | None:
    """What cuts as this pre-tokenizer does in both libraries, if it is one of SPLIT_PATTERNS."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {"pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            is_plain = (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
            return next((each for each in SPLIT_PATTERNS if is_plain and split["pattern"] == {"Regex": each}), None)
    return None
