"""Laws of ds/encoder.py: one document, one array of ids, by whichever library, in whatever batches."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import (
    BYTE_LEVEL,
    BYTES,
    HOSTILE,
    LLAMA3_PATTERN,
    NFC_TEXT,
    PUBLISHED,
    RAW,
    SMOLLM_LACKS,
    TRAINED,
    changed,
    plain_ids,
    read_published,
    split,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ds import encoder as encoding
from ds import tokenizer as bpe
from ds.encoder import disagreement, encode, encode_documents, encoder_of, plain_encoder, with_end_of_text

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
    documents=st.lists(BYTES, max_size=6), sizes=st.tuples(*[st.integers(1, 40)] * 2), num_threads=st.sampled_from([1, None])
)
def test_batches_give_the_ids_of_each_document(encoders, name, documents, sizes, num_threads):
    encoder, documents = encoders[name], [encodable(name, document) for document in documents]
    wanted = [encode(encoder, document).tolist() for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", sizes[0])
        patch.setattr(encoding, "BATCH_PIECES", sizes[1])
        together = list(encode_documents(encoder, iter(documents), num_threads))
    assert [ids.tolist() for ids in together] == wanted
    assert all(ids.dtype == np.uint32 for ids in together)


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
        encode(encoder, document + bytes([byte]) + rest)
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


def with_parts(part: dict | None) -> Tokenizer:
    """TRAINED with another pre-tokenizer."""
    tokenizer = changed(lambda state: state.update(pre_tokenizer=part))
    tokenizer.encode_special_tokens = True
    return tokenizer


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
