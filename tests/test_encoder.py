"""Laws of ds/encoder.py: one document, one array of ids, by whichever library, in whatever batches, in bounded memory."""

import json
import subprocess
import sys
import sysconfig
import tracemalloc
from itertools import repeat
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiktoken
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import (
    BYTE_LEVEL,
    BYTES,
    HOSTILE,
    LLAMA3_PATTERN,
    LONG,
    NFC_TEXT,
    PUBLISHED,
    RAW,
    SMOLLM_LACKS,
    SOURCE,
    TRAINED,
    changed,
    plain_ids,
    read_published,
    split,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ds import encoder as encoding
from ds import tokenizer as bpe
from ds.encoder import disagreement, encode, encode_documents, encode_pieces, encoder_of, plain_encoder, with_end_of_text

TEXT = st.text(max_size=80) | st.text(
    st.sampled_from("aA \t\r\n\u00a0\u2028'stvmlLrReE\u017f\u0130019\u0661.=<think>\u6f22\u00e9e\u0301"), max_size=80
)


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, Tokenizer]:
    return read_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def encoders(read) -> dict[str, encoding.Encoder]:
    return {name: encoder_of(tokenizer) for name, tokenizer in (read | {"trained": TRAINED, "raw": RAW}).items()}


def encodable(name: str, document: bytes) -> bytes:
    return document.translate(None, SMOLLM_LACKS) if name == "smollm" else document


def fast(tokenizer: Tokenizer, documents: list[bytes], num_threads: int | None = 1) -> list[list[int]]:
    return [ids.tolist() for ids in encode_documents(encoder_of(tokenizer), documents, num_threads)]


@given(document=BYTES)
def test_raw_ids_are_the_bytes(document):
    assert bytes(plain_ids(RAW, document).tolist()) == document


def test_bytes_alone_are_tokens_only_where_nothing_else_is():
    """A vocabulary that lacks rare bytes may have merges and still no more ids than there are bytes."""
    state = json.loads(PUBLISHED_SMOLLM)
    made = ["".join(pair) for pair in state["model"]["merges"][:9]]
    singles = [token for token in state["model"]["vocab"] if len(token) == 1]
    state["model"] |= {"merges": state["model"]["merges"][:9], "vocab": {"<|endoftext|>": 0, "<|im_end|>": 1}}
    state["model"]["vocab"] |= {token: 2 + number for number, token in enumerate(dict.fromkeys([*singles, *made]))}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    document = "".join(token for token in made if token.isascii()).encode()
    assert tokenizer.get_vocab_size() <= 257 and len(plain_ids(tokenizer, document)) < len(document)
    assert plain_ids(tokenizer, document).tolist() == tokenizer.encode(document.decode(), add_special_tokens=False).ids


PUBLISHED_SMOLLM = json.dumps(PUBLISHED["smollm"])


@pytest.mark.parametrize("name", ["trained", "raw", *PUBLISHED])
@given(
    documents=st.lists(BYTES, max_size=6), sizes=st.tuples(*[st.integers(1, 40)] * 3), num_threads=st.sampled_from([1, None])
)
def test_batches_and_streams_give_the_ids_of_each_document(encoders, name, documents, sizes, num_threads):
    encoder, documents = encoders[name], [encodable(name, document) for document in documents]
    wanted = [encode(encoder, document).tolist() for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", sizes[0])
        patch.setattr(encoding, "BATCH_PIECES", sizes[1])
        patch.setattr(bpe, "BLOCK_BYTES", sizes[2])
        together = list(encode_documents(encoder, iter(documents), num_threads))
        streamed = [list(encode_pieces(encoder, document, num_threads)) for document in documents]
    assert [ids.tolist() for ids in together] == wanted
    assert [np.concatenate(arrays).tolist() for arrays in streamed] == wanted
    assert all(ids.dtype == np.uint32 for ids in together + [ids for arrays in streamed for ids in arrays])
    begin = bpe.begin_of_text_id(encoder.tokenizer)
    assert all(arrays[0][:1].tolist() == ([] if begin is None else [begin]) for arrays in streamed)


def joined(pieces: list[str | bytes]) -> list[str | bytes]:
    """Without empty texts, and bytes that follow each other as one."""
    found: list[str | bytes] = []
    for piece in filter(None, pieces):
        last = found[-1] if found else ""
        if isinstance(piece, bytes) and isinstance(last, bytes):
            found[-1] = last + piece
        else:
            found.append(piece)
    return found


INVALID_TEXT = st.lists(
    TEXT.map(str.encode)
    | st.sampled_from([b"\xff", b"\xe6\xbc", b"\xf0\x9f\x82", b"a\n", b"\n\n", b" "])
    | st.binary(max_size=9)
).map(b"".join)


@given(document=INVALID_TEXT, size=st.integers(1, 9), block=st.integers(1, 12))
@example(document=b"\xe6\xbc", size=4, block=1)
def test_pieces_are_those_of_the_whole_document_whatever_the_block(document, size, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        whole = joined(list(bpe.pieces(document)))
        patch.setattr(bpe, "BLOCK_BYTES", block)
        assert joined(list(bpe.pieces(document))) == whole
    assert b"".join(piece.encode() if isinstance(piece, str) else piece for piece in whole) == document
    assert all(len(piece) <= size for piece in whole if isinstance(piece, str))


@given(lines=st.lists(st.text(st.sampled_from("ab .,'\t\r\n\u00e91"), max_size=12).map(lambda text: text + "\nx"), min_size=1))
def test_cuts_at_line_ends_leave_no_trace(encoders, lines):
    document = "".join(lines).encode()
    for encoder in (encoders["trained"], plain_encoder(TRAINED)):
        whole = encode(encoder, document)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe, "PIECE_CHARACTERS", 16)
            assert encode(encoder, document).tolist() == whole.tolist()


@given(document=BYTES, size=st.integers(1, 5))
def test_cuts_anywhere_lose_nothing(encoders, document, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        assert bpe.decode(TRAINED, encode(encoders["trained"], document)) == document


@given(document=BYTES)
def test_end_of_text_comes_behind_a_document(document):
    ids = plain_ids(TRAINED, document)
    ended = with_end_of_text(ids, 599)
    assert ended.dtype == np.uint32 and ended.tolist() == [*ids.tolist(), 599]
    assert bpe.decode(TRAINED, ended) == document


@given(document=BYTES)
def test_begin_of_text_stands_before_a_document_and_counts_no_byte(read, document):
    ids, lengths = plain_ids(read["llama3"], document), [len(token) for token in bpe.token_bytes(read["llama3"])]
    assert ids[0] == 599 and 599 not in ids[1:]
    assert sum(lengths[number] for number in with_end_of_text(ids, 600)) == len(document)
    assert bpe.decode(read["llama3"], ids) == document


@given(document=BYTES, byte=st.sampled_from(list(SMOLLM_LACKS)), rest=BYTES)
def test_byte_without_a_token_is_refused_by_name_and_every_other_text_comes_back(encoders, document, byte, rest):
    encoder, document = encoders["smollm"], document.translate(None, SMOLLM_LACKS)
    assert bpe.decode(encoder.tokenizer, encode(encoder, document)) == document
    with pytest.raises(ValueError) as caught:
        next(encode_pieces(encoder, document + bytes([byte]) + rest))
    message = str(caught.value)
    assert "\n" not in message and "leave that document out" in message
    assert f"no token for the byte 0x{byte:02x}, which is byte {len(document)} of a document that begins" in message


@pytest.mark.parametrize("name", ["trained", *PUBLISHED])
@given(documents=st.lists(TEXT.map(str.encode) | BYTES, max_size=4))
@example(documents=[HOSTILE, NFC_TEXT.encode(), b"", bytes(range(256))])
def test_many_documents_get_the_ids_that_tokenizers_gives_each(encoders, name, documents):
    encoder, documents = encoders[name], [encodable(name, document) for document in documents]
    found = [ids.tolist() for ids in encode_documents(encoder, documents, 1)]
    assert found == [plain_ids(encoder.tokenizer, document).tolist() for document in documents]
    assert disagreement(encoder, documents) is None


def test_tiktoken_encodes_where_one_pattern_cuts_and_tokenizers_elsewhere(encoders):
    assert {name: encoder.fast is not None for name, encoder in encoders.items()} == {
        "qwen3": True, "llama3": True, "gpt2": True, "smollm": False, "deepseek": False, "trained": True, "raw": False,
    }  # fmt: skip
    for part, is_fast in ((BYTE_LEVEL, True), (BYTE_LEVEL | {"use_regex": False}, False), (QWEN2_CUTS, True), (None, False)):
        assert (encoder_of(with_parts(part)).fast is not None) == is_fast, part
    assert plain_encoder(TRAINED).fast is None


GPT2_CUTS, CUT_CHARACTERS = BYTE_LEVEL, "aLstlveRmd'1. \n"
QWEN2_CUTS, LLAMA3_CUTS = (
    {"type": "Sequence", "pretokenizers": [split(pattern), BYTE_LEVEL | {"use_regex": False}]}
    for pattern in (bpe.QWEN2_PATTERN, LLAMA3_PATTERN)
)
every_cut = pytest.mark.parametrize("part", [GPT2_CUTS, QWEN2_CUTS, LLAMA3_CUTS], ids=["gpt2", "qwen2", "llama3"])


def with_parts(part: dict | None, seed: int | None = None, ignore_merges: bool = False, added: bool = False) -> Tokenizer:
    """TRAINED with another pre-tokenizer, its merges in another order, whole words and added tokens."""

    def change(state: dict) -> None:
        state.update(pre_tokenizer=part)
        state["model"]["ignore_merges"] = ignore_merges
        if seed is not None:
            Random(seed).shuffle(state["model"]["merges"])
        if ignore_merges:
            state["model"]["vocab"] |= {"zqxj\u0120": 600, "qzq": 601}
        if added:
            names = [("<think>", False), ("\u00e9\u00e9", False), ("a a", False), ("<|im_end|>", True)]
            state["added_tokens"] += [
                LONG | {"id": 602 + number, "content": token, "special": special}
                for number, (token, special) in enumerate(names)
            ]

    tokenizer = changed(change)
    tokenizer.encode_special_tokens = True
    return tokenizer


@every_cut
@given(
    documents=st.lists(TEXT.map(str.encode) | BYTES | st.just(b" <|im_end|><think>a a zqxj qzq\xc3\xa9\xc3\xa9 "), max_size=4),
    seed=st.none() | st.integers(0, 99),
    added=st.booleans(),
    ignore_merges=st.booleans(),
)
@example(documents=[SOURCE, HOSTILE], seed=None, added=True, ignore_merges=True)
@example(documents=[SOURCE, HOSTILE], seed=1, added=True, ignore_merges=False)
def test_both_encoders_agree_with_merges_in_any_order(part, documents, seed, added, ignore_merges):
    tokenizer = with_parts(part, seed, ignore_merges, added)
    encoder = encoder_of(tokenizer)
    assert encoder.fast is not None or ignore_merges and seed is not None
    found = [ids.tolist() for ids in encode_documents(encoder, documents, 1)]
    assert found == [plain_ids(tokenizer, document).tolist() for document in documents]


def of_merges(merges: list[list[str]], more: list[str], ignore_merges: bool, part: dict | None = None) -> Tokenizer:
    """RAW with merges and the ids of what they make and of `more`, in this order, and another pre-tokenizer."""
    state = json.loads(bpe.to_json(RAW)) | ({"pre_tokenizer": part} if part else {})
    state["model"] |= {"merges": merges, "ignore_merges": ignore_merges}
    names = dict.fromkeys([*more, *map("".join, merges)])
    state["model"]["vocab"] |= {token: 257 + number for number, token in enumerate(names)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    return tokenizer


@st.composite
def merged(draw) -> Tokenizer:
    """A BPE of drawn merges, in any order, several for a token, over three letters; tokens that no merge makes, too."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = [draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))]
        merges.append(pair)
        tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    whole = draw(st.lists(st.text(st.sampled_from("abc"), min_size=2, max_size=5), max_size=3))
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    return of_merges(merges, draw(st.permutations([*tokens[3:], *whole])), draw(st.booleans()))


TWICE_MADE = [["a", "bc"], ["a", "b"], ["c", "a"], ["b", "c"], ["ab", "c"]]


@example(tokenizer=of_merges(TWICE_MADE, [], False), documents=[b"abca"])
@given(tokenizer=merged(), documents=st.lists(st.text(st.sampled_from("aaabbc "), max_size=30).map(str.encode), max_size=9))
@settings(max_examples=200)
def test_any_merges_give_the_ids_of_tokenizers(tokenizer, documents):
    assert fast(tokenizer, documents) == [plain_ids(tokenizer, document).tolist() for document in documents]


@every_cut
@given(text=st.text(st.sampled_from(CUT_CHARACTERS), max_size=40))
@example(text="".join(f"a'{end} 1111 'a \n " for end in ("s", "t", "Re", "ve", "m", "ll", "d", "sd")))
def test_patterns_cut_alike_where_every_two_characters_are_a_token(part, text):
    symbols = [bpe.BYTE_SYMBOLS[ord(character)] for character in CUT_CHARACTERS]
    tokenizer = EVERY_PAIR.setdefault(
        json.dumps(part), of_merges([[one, other] for one in symbols for other in symbols], [], False, part)
    )
    assert fast(tokenizer, [text.encode()]) == [plain_ids(tokenizer, text.encode()).tolist()]


EVERY_PAIR: dict[str, Tokenizer] = {}
LIBRARY = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py"))]


@pytest.mark.parametrize("num_threads", [1, None])
def test_sources_of_the_standard_library_keep_their_ids(num_threads):
    tokenizer = bpe.train(LIBRARY[:9], 1024)
    assert fast(tokenizer, LIBRARY, num_threads) == [
        tokenizer.encode(document.decode(), add_special_tokens=False).ids for document in LIBRARY
    ]


@pytest.mark.parametrize("text", ["a", " ", "\n", "7", "\u6f22", "=", " a", " \t", "\r\n", "'s"], ids=repr)
def test_the_longest_piece_of_one_kind_is_encoded(encoders, text):
    document = (text * 2**16)[: 2**16 + 9].encode()
    for name in ("trained", "gpt2", "llama3"):
        assert encode(encoders[name], document).tolist() == plain_ids(encoders[name].tokenizer, document).tolist()


@pytest.mark.parametrize("text", [" ", "a"], ids=repr)
def test_a_run_that_a_pattern_could_not_scan_whole_is_cut_and_encoded(encoders, text):
    document = text.encode() * 2**20
    ids = encode(encoders["trained"], document)
    assert ids.tolist() == plain_ids(TRAINED, document).tolist() and bpe.decode(TRAINED, ids) == document


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_libraries_know_the_same_letters_numbers_and_spaces(kind):
    numbers = [
        *range(0x3400),
        *range(0x4DB0, 0x4E10),
        *range(0x9FF0, 0xD800, 4),
        *range(0xE000, 0x20000),
        *range(0x2A6D0, 0x33500, 8),
    ]
    every = "".join(map(chr, numbers))
    theirs = pre_tokenizers.Split(Regex(kind + "+"), "removed").pre_tokenize_str(every)
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    found = tiktoken.Encoding("bytes", pat_str=kind + "+", mergeable_ranks=bytes_alone, special_tokens={}).encode_ordinary(
        every
    )
    assert {*every} - {*"".join(text for text, _ in theirs)} == {*bytes(found).decode()}


def test_first_text_that_differs_is_named(encoders):
    encoder = encoders["trained"]
    number = encoder.tokenizer.token_to_id("\u0120the")
    wrong = encoder._replace(fast=encoder.fast._replace(ids=np.where(encoder.fast.ids == number, 65, encoder.fast.ids)))
    documents = [b"a", b"\xff\xff", b"", b"some words and the others of it", b"of the", b"and so on"]
    assert disagreement(wrong, iter(documents)) == "some words and the o"
    assert disagreement(wrong, documents[:3]) is None and disagreement(wrong, []) is None
    assert disagreement(encoder, documents) is None and disagreement(plain_encoder(TRAINED), documents) is None
    with pytest.raises(ValueError, match="no token for the byte 0x04"):
        disagreement(encoders["smollm"]._replace(fast=wrong.fast), [b"a\x04"])


def peak_bytes(work) -> int:
    """How much Python and numpy hold at most during `work` beside what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["trained", "plain", "raw"])
def test_a_long_document_takes_its_ids_and_no_more(encoders, monkeypatch, name):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2**14)
    monkeypatch.setattr(bpe, "PIECE_CHARACTERS", 2**12)
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 2**13)
    encoder = plain_encoder(TRAINED) if name == "plain" else encoders[name]
    line = "def f(x):\n    return 'a \u6f22\u5b57 \U0001f0a1'\n\n".encode()
    document = (line * 40 + b"\xff") * (2**20 // len(line) // 40)
    num_ids, fixed_bytes = len(encode(encoder, document)), 2**19
    assert num_ids * 4 > 2 * fixed_bytes
    assert peak_bytes(lambda: encode(encoder, document)) < num_ids * 4 * 1.13 + fixed_bytes
    assert peak_bytes(lambda: [None for _ in encode_pieces(encoder, document, 1)]) < fixed_bytes


def test_many_empty_documents_take_no_more_than_a_batch_of_them(encoders, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_PIECES", 2**7)
    documents = repeat(b"", 2000)
    assert peak_bytes(lambda: [None for _ in encode_documents(encoders["trained"], documents, 1)]) < 2**18


MEASURED = r"""
import resource, sys
from ds import encoder as encoding, tokenizer as bpe
kind, size = sys.argv[1], int(sys.argv[2])
tokenizer = bpe.raw_bytes() if kind == "raw" else bpe.train([b"def f(x): return 'abc'" * 9], 270)
make = encoding.plain_encoder if kind == "plain" else encoding.encoder_of
encoder = make(tokenizer)
line = b"x" * 20 + "def f(x): return '\u6f22\u5b57 \U0001f0a1'\n".encode()
encoding.encode(encoder, line * (2**23 // len(line)))
document = line * (size // len(line))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for ids in encoding.encode_pieces(encoder, document, 1): pass
streamed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = encoding.encode(encoder, document)
whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(ids.nbytes, *(1024 * (peak - before) for peak in (streamed, whole)))
"""


@pytest.mark.parametrize("kind", ["raw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiktoken", "tokenizers"))])
def test_the_process_grows_by_no_more_than_the_ids_of_a_document_of_64_mebibytes(kind):
    command = [sys.executable, "-c", MEASURED, kind.replace("tokenizers", "plain"), str(2**26)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    ids_bytes, streamed, whole = map(int, run.stdout.split())
    fixed_bytes = 96 * 2**20
    assert ids_bytes > 2 * fixed_bytes and streamed < fixed_bytes and whole < ids_bytes + fixed_bytes
