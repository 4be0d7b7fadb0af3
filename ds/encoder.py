"""Documents -> ids: which library encodes, by batches, what begins and ends a document, bytes that are no UTF-8.

tiktoken encodes where it surely gives the ids of `tokenizers`, which encodes elsewhere. Also the files of ids that other tools
write -> documents and ids. Knows no files of text and no shards.
"""

import json
import os
import re
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, groupby, tee
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from ds import files
from ds import tokenizer as bpe
from ds.files import EXCLUDE, LLM_C, MEGATRON, NANOGPT, CorpusFile, Part, is_megatron_index, is_url, one_line

# The patterns that both libraries cut alike; GPT-2's is the one inside ByteLevel.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = (bpe.QWEN2_PATTERN, bpe.QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), GPT2_PATTERN)
# How much text is encoded at once, on all cores; the ids are the same.
BATCH_CHARACTERS, BATCH_PIECES = 2**21, 2**14
# numpy's types of ids, in the order of the codes of Megatron's DType (megatron/core/datasets/indexed_dataset.py), and by magic
# and version of HEADERS_INFO in llm.c (dev/data/data_common.py), whose third magic begins evaluations.
MEGATRON_TYPES = ("code 0", "<u1", "<i1", "<i2", "<i4", "<i8", "float64", "float32", "<u2")
LLM_C_TYPES = {b"\x88\xd8\x34\x01\1\0\0\0": "<u2", b"\xa1\xd9\x34\x01\7\0\0\0": "<u4"}
NAMING = "corpus reads it as nanoGPT's uint16 tokens if an entry names the file itself"


class Fast(NamedTuple):
    """tiktoken's encoding, the (R,) ids of its ranks, and what finds added tokens that it does not know, if any."""

    encoding: tiktoken.Encoding
    ids: np.ndarray
    unknown: re.Pattern[str] | None


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


class TokenReader(NamedTuple):
    """What reading files of tokens takes, to be made once a corpus: `head` as in `Encoder`, the id that ends documents, the
    bytes of each id, and which ids there are, (V,) bool.
    """

    head: np.ndarray
    end: int
    token_bytes: list[bytes]
    is_id: np.ndarray


class TokenDocument(NamedTuple):
    """The bytes of a document's tokens, and its (T,) uint32 ids as `encode` gives them."""

    document: bytes
    ids: np.ndarray


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


def check_token_files(corpus: Iterable[CorpusFile], tokenizer_path: str | None, vocab_size: int) -> None:
    """Raises ValueError if one of the files of tokens is not what it should be, if there is one and the tokenizer would be
    trained, or if a file is binary that would be tokens if it were named. Reads their first and last bytes.
    """
    for path, num_bytes, _, tokens in corpus:
        if is_megatron_index(Path(path)):
            raise ValueError(
                f"{path} is an index of Megatron's tokens, and its .bin is not beside it; put it there, or {EXCLUDE}"
            )
        if tokens is None and path.endswith(".bin") and num_bytes:
            how = "tokens are read from a disk, download it first" if is_url(path) else NAMING
            raise ValueError(f"{path} is binary; {how}; or {EXCLUDE}")
        if tokens is not None and tokenizer_path is None and vocab_size != len(bpe.BYTE_SYMBOLS) + 1:
            remedy = "set tokenizer_path to the tokenizer that made them, or vocab_size=257 if they are bytes"
            raise ValueError(f"{path} holds {tokens}'s tokens, and a tokenizer that is trained has other ids; {remedy}")
        if tokens == NANOGPT and vocab_size > 2**16:
            raise ValueError(
                f"{path} would be nanoGPT's uint16 tokens, which vocab_size={vocab_size} does not fit in; {EXCLUDE}"
            )
        if tokens is not None:
            with _reading(path):
                _layout(path, tokens)


def token_reader(encoder: Encoder) -> TokenReader:
    """What reads files of its tokenizer's tokens. Takes most of a second for 100,000 ids."""
    tokenizer = encoder.tokenizer
    token_bytes, ids = bpe.token_bytes(tokenizer), [*tokenizer.get_vocab(with_added_tokens=True).values()]
    return TokenReader(encoder.head, bpe.end_of_text_id(tokenizer), token_bytes, np.bincount(ids).astype(bool))


def token_documents(reader: TokenReader, part: Part) -> Iterator[TokenDocument]:
    """The documents that start in one part of a file of tokens, also those without any. The parts of a file give together, in
    order, what the whole file gives. At one time there are in memory one document and a few MiB.

    A document ends before an end-of-text id, or where Megatron's does. Its ids are those of the file, with `head` before them
    if they do not begin with it. Raises ValueError, with file and place, at an id that the tokenizer has not, or if the file
    cannot be read or is not what it should be.
    """
    assert part.tokens is not None, part
    with _reading(part.path), open(part.path, "rb") as file:
        layout = _layout(part.path, part.tokens)
        places = [max(0, -((layout.start - byte) // layout.dtype.itemsize)) for byte in (part.start, part.stop or sys.maxsize)]
        own = range(*places)
        for run in _runs(layout, own):
            for ids in _cut(reader, file, layout, run, own):
                document = b"".join(map(reader.token_bytes.__getitem__, ids.tolist()))
                has_head = np.array_equal(ids[: len(reader.head)], reader.head)
                yield TokenDocument(document, ids if has_head else _joined([reader.head, ids]))


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
    unknown = {text for text in texts if fast.unknown.search(text)} if fast.unknown else set()
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
    return Fast(encoding, ids, re.compile("|".join(added)) if added else None)


def _pattern(part: dict | None) -> str | None:
    """What cuts as this pre-tokenizer does in both libraries, if it is one of SPLIT_PATTERNS."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {"pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            is_plain = (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
            return next((each for each in SPLIT_PATTERNS if is_plain and split["pattern"] == {"Regex": each}), None)
    return None


class _Index(NamedTuple):
    """Megatron's .idx: 34 bytes, the lengths (S,) int32 and first bytes (S,) int64 of its sequences, and the numbers of the
    sequences with which its D documents begin, and S, (D + 1,) int64.
    """

    path: Path
    num_sequences: int
    num_documents: int


class _Layout(NamedTuple):
    """Where the ids of a file are: of type `dtype` from byte `start` to its end; `index` says where documents begin."""

    path: str
    num_bytes: int
    dtype: np.dtype
    start: int
    index: _Index | None


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}); repair it, or {EXCLUDE}") from error


def _layout(path: str, tokens: str) -> _Layout:
    with open(path, "rb") as file:
        begin, num_bytes = file.read(1024), file.seek(0, os.SEEK_END)
    if tokens == MEGATRON:
        return _megatron_layout(path, num_bytes)
    if tokens == LLM_C:
        return _llm_c_layout(path, num_bytes, begin)
    if num_bytes % 2:
        raise ValueError(f"{path} has {num_bytes} bytes, and nanoGPT's tokens have 2 each; write it again, or {EXCLUDE}")
    if len(begin) >= 256 and b"\0" not in begin and len(begin.decode(errors="ignore").encode()) > len(begin) - 4:
        raise ValueError(f"{path} begins like text, not like nanoGPT's tokens; end its name in .txt, or {EXCLUDE}")
    return _Layout(path, num_bytes, np.dtype("<u2"), 0, None)


def _llm_c_layout(path: str, num_bytes: int, begin: bytes) -> _Layout:
    magic, version, num_ids = struct.unpack("<iiI", begin[:12].ljust(12, b"\0"))
    if begin[:8] not in LLM_C_TYPES:
        raise ValueError(f"{path} has llm.c's magic {magic} and version {version}, which are of no corpus; {EXCLUDE}")
    dtype = np.dtype(LLM_C_TYPES[begin[:8]])
    wanted = 1024 + num_ids * dtype.itemsize
    if num_bytes != wanted:
        words = f"has {num_bytes} bytes, and a head and {num_ids} tokens, as it says, have {wanted}"
        raise ValueError(f"{path} {words}; download or write it again, or {EXCLUDE}")
    return _Layout(path, num_bytes, dtype, 1024, None)


def _megatron_layout(path: str, num_bytes: int) -> _Layout:
    index_path, wrong = Path(path).with_suffix(".idx"), None
    with index_path.open("rb") as file:
        version, code, num_sequences, num_borders = struct.unpack("<9xQBQQ", file.read(34).ljust(34, b"\0"))
        size, wanted = file.seek(0, os.SEEK_END), 34 + 12 * num_sequences + 8 * num_borders
        dtype = MEGATRON_TYPES[code] if code < len(MEGATRON_TYPES) else f"code {code}"
        if size >= 34 and (version != 1 or not dtype.startswith("<")):
            wrong = f"is of version {version} with tokens of type {dtype}, not of version 1 with whole numbers"
        elif size != wanted or not num_borders:
            wrong = f"has {size} bytes, and {num_sequences} sequences and {num_borders} borders of documents have {wanted}"
        else:
            borders = [int(_numbers(file, wanted - 8 * n, "<i8", 1)[0]) for n in (num_borders, 1)]
            if borders != [0, num_sequences] or (num_bytes and not num_sequences):
                wrong = f"has documents of sequences {borders} of {num_sequences}, and its .bin has {num_bytes} bytes"
        if wrong:
            raise ValueError(f"{index_path} {wrong}; write both files again, or {EXCLUDE}")
        layout = _Layout(path, num_bytes, np.dtype(dtype), 0, _Index(index_path, num_sequences, num_borders - 1))
        for last in range(num_borders - 1)[-1:]:
            _document_ids(file, layout, last)
    return layout


def _numbers(file: BinaryIO, at: int, dtype: str | np.dtype, count: int) -> np.ndarray:
    """(count,) of that type from byte `at` on."""
    file.seek(at)
    found = file.read(count * np.dtype(dtype).itemsize)
    if len(found) != count * np.dtype(dtype).itemsize:
        raise OSError(f"it ends at byte {at + len(found)}, too early")
    return np.frombuffer(found, dtype)


def _runs(layout: _Layout, own: range) -> Iterator[range]:
    """The ids between two borders of documents, in order, of all that may hold some of `own`."""
    if layout.index is None:
        yield range((layout.num_bytes - layout.start) // layout.dtype.itemsize)
        return
    with layout.index.path.open("rb") as file:
        numbers = range(layout.index.num_documents)
        first = bisect_left(numbers, own.start, key=lambda number: _document_ids(file, layout, number).start)
        for number in numbers[max(0, first - 1) :]:
            run = _document_ids(file, layout, number)
            if run.start >= own.stop:
                return
            yield run


def _document_ids(file: BinaryIO, layout: _Layout, number: int) -> range:
    """The ids of one of Megatron's documents. Raises ValueError if its sequences do not lie where their lengths put them."""
    index, size = layout.index, layout.dtype.itemsize
    assert index is not None, layout
    bytes_at, num_sequences = 34 + 4 * index.num_sequences, index.num_sequences
    first, last = _numbers(file, bytes_at + 8 * (num_sequences + number), "<i8", 2).tolist()
    words = f"document {number} has the sequences from {first} up to {last} of {num_sequences}"
    if 0 <= first <= last <= num_sequences:
        found = (_numbers(file, bytes_at + 8 * n, "<i8", min(1, num_sequences - n)).tolist() for n in (first, last))
        start, stop = (next(iter(byte), layout.num_bytes) for byte in found)
        lengths = _numbers(file, 34 + 4 * first, "<i4", last - first).astype(np.int64)
        if start in range(stop + 1 if number else 1) and stop - start == lengths.sum() * size:
            return range(start // size, stop // size)
        words = f"document {number} has {lengths.sum()} tokens of {size} bytes, from byte {start} up to {stop} of its .bin"
    raise ValueError(f"{index.path}: {words}, which does not fit; write both files again, or {EXCLUDE}")


def _cut(reader: TokenReader, file: BinaryIO, layout: _Layout, run: range, own: range) -> Iterator[np.ndarray]:
    """The documents within a run that start in `own`. An end of text right before the end of the run begins none."""
    at, held = run.start if run.start >= own.start else own.start - 1, []
    place = at
    for ids in _checked_ids(reader, file, layout, range(at, run.stop)) if at < own.stop else ():
        begin = 0
        for end in np.flatnonzero(ids == reader.end).tolist():
            if at in own:
                yield _joined([*held, ids[begin:end]])
            held, begin, at = [], end + 1, place + end + 1
            if at >= own.stop:
                return
        held += [ids[begin:]] if at in own else []
        place += len(ids)
    if at in own and (at < run.stop or not run):
        yield _joined(held)


def _checked_ids(reader: TokenReader, file: BinaryIO, layout: _Layout, places: range) -> Iterator[np.ndarray]:
    """The ids at these places as uint32, a block at a time."""
    size, num_ids = layout.dtype.itemsize, len(reader.is_id)
    block = max(1, files.PIECE_BYTES // size)
    for first in places[::block]:
        count = min(block, places.stop - first)
        ids = _numbers(file, layout.start + first * size, layout.dtype, count).astype(np.int64)
        wrong = np.flatnonzero((ids < 0) | (ids >= num_ids) | ~reader.is_id[ids.clip(0, num_ids - 1)])
        if len(wrong):
            words = f"{layout.path}, token {first + wrong[0]}: {ids[wrong[0]]} is none of the tokenizer's {num_ids} ids"
            raise ValueError(f"{words}; is it of this tokenizer? name the one that made it in tokenizer_path")
        yield ids.astype(np.uint32)
