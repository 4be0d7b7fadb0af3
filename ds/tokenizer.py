"""Byte-level BPE: train, load, fingerprint, compare, cut into pieces, decode. What encodes them is in ds/encoder.py.

Owns the vocabulary and the ids at the ends of documents, which stand in the post-processor: the token before documents, and
among its special tokens the end of text, unless that is the usual one. Knows tokenizer.json and what is beside it, no shards.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ds.files import one_line

END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>")
BEGINS_OF_TEXT = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<s>")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Part of how text becomes ids: a text of so many characters without a line end is cut after them.
PIECE_CHARACTERS = 2**16
# How much of a document is text at once; the pieces are the same.
BLOCK_BYTES = 2**18
INVALID_BYTES = re.compile("([\udc80-\udcff]+)")
# No pre-token of QWEN2_PATTERN holds a line end and what stands after it, so here a text can be cut without a trace.
LAST_LINE_END = re.compile(r"(?s:.*)\n(?=\S)")
# The character that stands for each byte, by byte; source: bytes_to_unicode in GPT-2's encoder.py.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_SYMBOLS = [chr(byte if byte in PRINTABLE_BYTES else 256 + OTHER_BYTES.index(byte)) for byte in range(256)]
SYMBOL_BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
# In no common text; SmolLM's vocabulary lacks 21 of them, because none was in the text that it was made from.
RARE_BYTES = bytes([*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF1, 256)])
PRE_TOKENIZERS = ("ByteLevel", "Digits", "Punctuation", "Split")
# Far above every real tokenizer; a file beyond them would only fill the memory.
LARGEST_FILE_BYTES = 2**28
LARGEST_VOCABULARY_IDS = 2**24
SHOWN_CHARACTERS = 20
QWEN2_PRE_TOKENIZER = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
REMEDY = "name the tokenizer.json of a byte-level BPE, such as Qwen3's, Llama 3's or SmolLM's"


def raw_bytes() -> Tokenizer:
    """The tokenizer without merges: id = byte value, and 256 is the end of text."""
    return _finished(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}, merges=[]))


def train(documents: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """A BPE of exactly `vocab_size` ids, the 256 bytes among them; the last id is the end of text. Deterministic.
    Raises ValueError if the documents do not yield that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = QWEN2_PRE_TOKENIZER
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=BYTE_SYMBOLS, show_progress=False)
    texts = (piece for document in documents for piece in pieces(document) if isinstance(piece, str))
    tokenizer.train_from_iterator(texts, trainer)
    nearest = tokenizer.get_vocab_size() + 1
    if nearest != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the corpus yields only {nearest} tokens; nearest is {nearest}")
    return _finished(tokenizer.model)


def load(path: str | Path, *, begin_of_text: bool | None = None, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in the folder that holds one, without an NFC normalizer. So text stays byte
    for byte what it is, and text that is in NFC gets the ids that a published model was trained on.

    Documents begin with its begin-of-text id if `begin_of_text` (None: if its own template does). They end with `end_of_text`;
    None: with the first of `ENDS_OF_TEXT`, else with what the files beside it name. Raises ValueError if it is not there,
    `tokenizers` cannot read it, it is not a lossless byte-level BPE, or it lacks such a token.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is not there; name a tokenizer.json or a folder that holds one")
    with _naming(file):
        parts = _read_object(file)
        if not isinstance(parts.get("model"), dict):
            raise ValueError("it has no model in it")
    _check_parts(parts, file)
    with _naming(file):
        tokenizer = Tokenizer.from_str(json.dumps(parts | {"normalizer": None}))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
    _choose_ends(tokenizer, file, begin_of_text, end_of_text)
    return _checked(tokenizer, file)


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of ids, added tokens and holes included: the greatest id + 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def padded_vocab_size(path: str, num_ids: int) -> int | None:
    """The rows of the embedding of the model whose folder or tokenizer `path` is: some have more than there are ids."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > num_ids else None


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends documents: that of the end of text that the post-processor names, else of the first usual one."""
    special = _special_tokens(tokenizer)
    return next(special[token] for token in (*_named_end(tokenizer), *ENDS_OF_TEXT) if token in special)


def begin_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id that begins documents, None if they begin with their text."""
    begin = _begin(tokenizer)
    return None if begin is None else tokenizer.token_to_id(begin)


def missing_bytes(tokenizer: Tokenizer) -> bytes:
    """The bytes for which it has no token."""
    return bytes(byte for byte, symbol in enumerate(BYTE_SYMBOLS) if tokenizer.token_to_id(symbol) is None)


def pieces(document: bytes) -> Iterator[str | bytes]:
    """A document as texts that no token crosses, cut at line ends or where they get too long, and as the bytes between them
    that are not UTF-8, whose tokens are single bytes. Holds a few blocks of it at a time.
    """
    decoder, rest = getincrementaldecoder("utf-8")("surrogateescape"), ""
    for start in range(0, len(document), BLOCK_BYTES):
        end = start + BLOCK_BYTES
        text = rest + decoder.decode(document[start:end], final=end >= len(document))
        *parts, rest = INVALID_BYTES.split(text) if _has_invalid_bytes(text) else [text]
        for text, invalid in zip(parts[::2], parts[1::2], strict=True):
            yield from _cut(text)
            yield invalid.encode("utf-8", "surrogateescape")
        *cut, rest = _cut(rest)
        yield from cut
    yield rest


def decode(tokenizer: Tokenizer, ids: Iterable[int] | np.ndarray) -> bytes:
    """(T,) integers -> the bytes of the tokens; special tokens have none."""
    distinct, places = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    tokens = _bytes_of(tokenizer, distinct.tolist())
    return b"".join(tokens[place] for place in places.tolist())


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id; b"" for special tokens and holes."""
    return _bytes_of(tokenizer, range(vocab_size(tokenizer)))


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of all that decides how text becomes ids: vocabulary, merges, added tokens, pre-tokenizer."""
    return sha256(json.dumps(_decisive(tokenizer), sort_keys=True).encode()).hexdigest()


def difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """The first thing in which two tokenizers differ, in a few words; None if their fingerprints are the same."""
    here, there = _decisive(ours), _decisive(theirs)
    compared = {
        "vocabulary": _vocabulary_difference,
        "merges": _merges_difference,
        "ignore_merges": lambda here, there: f"ignore_merges is {there} there and {here} here",
        "added_tokens": _added_tokens_difference,
        "pre_tokenizer": _pre_tokenizer_difference,
    }
    for name, difference_of in compared.items():
        if json.dumps(here[name], sort_keys=True) != json.dumps(there[name], sort_keys=True):
            return difference_of(here[name], there[name])
    return None


def to_json(tokenizer: Tokenizer) -> str:
    """What stands in tokenizer.json; the same tokenizer gives the same text."""
    return tokenizer.to_str(pretty=True)


def _decisive(tokenizer: Tokenizer) -> dict:
    state = json.loads(tokenizer.to_str())
    return {
        "vocabulary": tokenizer.get_vocab(with_added_tokens=True),
        "merges": state["model"]["merges"],
        "ignore_merges": state["model"].get("ignore_merges"),
        "added_tokens": [[token["id"], token["content"], token["special"]] for token in state["added_tokens"]],
        "pre_tokenizer": state["pre_tokenizer"],
    }


def _vocabulary_difference(here: dict[str, int], there: dict[str, int]) -> str:
    sizes = [max(vocabulary.values(), default=-1) + 1 for vocabulary in (there, here)]
    if sizes[0] != sizes[1]:
        return f"{sizes[0]} ids there, {sizes[1]} here"
    number = min(number for _, number in here.items() ^ there.items())
    changed = (there.items() - here.items(), here.items() - there.items())
    tokens = [min((token for token, place in pairs if place == number), default=None) for pairs in changed]
    return f"id {number} is {_token_words(tokens[0])} there and {_token_words(tokens[1])} here"


def _merges_difference(here: list[list[str]], there: list[list[str]]) -> str:
    number = next(number for number, (one, other) in enumerate(zip_longest(there, here)) if one != other)
    one, other = (" ".join(merges[number]) if number < len(merges) else None for merges in (there, here))
    return f"merge {number} is {_token_words(one)} there and {_token_words(other)} here"


def _added_tokens_difference(here: list[list], there: list[list]) -> str:
    kinds = [{number: "special" if special else "added" for number, _, special in tokens} for tokens in (there, here)]
    for number, token, _ in sorted(there + here):
        one, other = (kind.get(number, "ordinary") for kind in kinds)
        if one != other:
            return f"id {number}, {_token_words(token)}, is {one} there and {other} here"
    return "the added tokens differ in order"


def _pre_tokenizer_difference(here: object, there: object) -> str:
    one, other = (", ".join(map(str, reversed(_pre_tokenizer_kinds(part)))) or "none" for part in (there, here))
    if one == other:
        return f"the pre-tokenizers {one} have other settings there than here"
    return f"the pre-tokenizer is {one} there and {other} here"


def _token_words(token: str | None) -> str:
    if token is None:
        return "nothing"
    return repr(token if len(token) <= SHOWN_CHARACTERS else token[: SHOWN_CHARACTERS - 1] + "…")


def _finished(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = QWEN2_PRE_TOKENIZER
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """What breaks inside, a panic of `tokenizers` included, is raised as a ValueError that names the file."""
    try:
        yield
    except BaseException as error:  # tokenizers raises Exception itself, and its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file} cannot be read as a tokenizer ({one_line(error)}); name another tokenizer.json") from error


def _read_object(file: Path) -> dict:
    num_bytes = file.stat().st_size
    if num_bytes > LARGEST_FILE_BYTES:
        raise ValueError(f"{num_bytes} bytes are more than the {LARGEST_FILE_BYTES} that one may have")
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _check_parts(parts: dict, file: Path) -> None:
    """Refuses what changes or drops text before `tokenizers` sees it, which would abort the process at some of it."""
    model, part = parts["model"], parts.get("normalizer")
    inner = part.get("normalizers") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if part is not None and not (isinstance(inner, list) and inner and all(one == {"type": "NFC"} for one in inner)):
        raise ValueError(f"{file} has a normalizer, which changes the text; {REMEDY}")
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        raise ValueError(f"{file} is not a BPE without dropout; {REMEDY}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"{file} marks the parts of words by a prefix or suffix; {REMEDY}")
    unknown = [kind for kind in _pre_tokenizer_kinds(parts.get("pre_tokenizer")) if kind not in PRE_TOKENIZERS]
    if unknown:
        raise ValueError(f"{file} has a pre-tokenizer {unknown[0]!r:.40}, not only {', '.join(PRE_TOKENIZERS)}; {REMEDY}")


def _pre_tokenizer_kinds(part: object) -> list[object]:
    kinds, waiting = [], [] if part is None else [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and part.get("type") == "Sequence":
            inner = part.get("pretokenizers")
            waiting += inner if isinstance(inner, list) else [inner]
        else:
            kinds.append(part.get("type") if isinstance(part, dict) else part)
    return kinds


def _checked(tokenizer: Tokenizer, file: Path) -> Tokenizer:
    if vocab_size(tokenizer) > LARGEST_VOCABULARY_IDS:
        raise ValueError(f"{file} has the id {vocab_size(tokenizer) - 1}, ids are below {LARGEST_VOCABULARY_IDS}; {REMEDY}")
    ids = tokenizer.get_vocab(with_added_tokens=False).values()
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file} gives the same id to several tokens; {REMEDY}")
    missing = missing_bytes(tokenizer).translate(None, RARE_BYTES)
    if missing:
        raise ValueError(f"{file} has no token for {len(missing)} of the 256 bytes, the first is 0x{missing[0]:02x}; {REMEDY}")
    single = bytes(range(256)).translate(None, missing_bytes(tokenizer))
    texts = (
        "a",
        single.decode(errors="ignore"),
        "a  b\t\r\n\n ß 漢 🂡 e\u0301 \u2028 It's 123 x_y;  ",
        "  ".join(["", *(token.content for token in tokenizer.get_added_tokens_decoder().values()), ""]),
        *(token for token in (_begin(tokenizer), *_named_end(tokenizer)) if token),
    )
    with _naming(file):
        given = [decode(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        of_bytes = decode(tokenizer, [tokenizer.token_to_id(BYTE_SYMBOLS[byte]) or 0 for byte in single])
        changed = [of_bytes, *given] != [single, *(text.encode() for text in texts)]
    if changed:
        raise ValueError(f"{file} does not give back the text that it is given; {REMEDY}")
    return tokenizer


def _template(tokenizer: Tokenizer) -> dict:
    part = json.loads(tokenizer.post_processor.__getstate__()) if tokenizer.post_processor else {}
    parts = [one for one in part.get("processors", [part]) if one.get("type") == "TemplateProcessing"]
    return parts[0] if parts else {"single": [], "pair": [], "special_tokens": {}}


def _begin(tokenizer: Tokenizer) -> str | None:
    return next((part.get("SpecialToken", {}).get("id") for part in _template(tokenizer)["single"]), None)


def _named_end(tokenizer: Tokenizer) -> list[str]:
    """The special tokens that a template names and puts nowhere."""
    template = _template(tokenizer)
    used = [part.get("SpecialToken", {}).get("id") for part in template["single"] + template["pair"]]
    return [token for token in template["special_tokens"] if token not in used]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _choose_ends(tokenizer: Tokenizer, file: Path, begin_of_text: bool | None, end_of_text: str | None) -> None:
    special, begin = _special_tokens(tokenizer), _begin(tokenizer)
    usual = [token for token in ENDS_OF_TEXT if token in special]
    names = [end_of_text] if end_of_text else [*_named_end(tokenizer), *usual, *_named_beside(file, "eos")]
    end = next(_tokens(tokenizer, names), None)
    listed = f"its special tokens are {', '.join(map(repr, [*special][:SHOWN_CHARACTERS])) or 'none'}"
    if end is None:
        words = f"no token {end_of_text!r}" if end_of_text else "no end-of-text token that is known"
        raise ValueError(f"{file} has {words}; name one of its own in end_of_text: {listed}")
    names = [begin, *_named_beside(file, "bos"), *(token for token in BEGINS_OF_TEXT if token in special)]
    found = next((token for token in _tokens(tokenizer, names) if token != end), None)
    if begin_of_text and found is None:
        words = f"begin_of_text=True: {file} has no begin-of-text token beside its end of text {end!r}"
        raise ValueError(f"{words}; {listed}; set begin_of_text=None")
    is_own = begin is not None and begin != end or True in _named_beside(file, "add_bos")[:1]
    _set_ends(tokenizer, found if (is_own if begin_of_text is None else begin_of_text) else None, end)


def _named_beside(file: Path, kind: str) -> list:
    """The `kind`_token and `kind`_token_id of transformers' files beside a tokenizer.json; one that cannot be read has none."""
    found = []
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        try:
            part = _read_object(file.with_name(name))
        except (OSError, ValueError, RecursionError):
            part = {}
        token, ids = part.get(f"{kind}_token"), part.get(f"{kind}_token_id")
        found += [token.get("content") if isinstance(token, dict) else token, *(ids if isinstance(ids, list) else [ids])]
    return found


def _tokens(tokenizer: Tokenizer, names: Iterable) -> Iterator[str]:
    """Those that are tokens, of tokens, ids and other things."""
    for name in names:
        is_id = isinstance(name, int) and not isinstance(name, bool) and 0 <= name < LARGEST_VOCABULARY_IDS
        token = tokenizer.id_to_token(name) if is_id else name
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            yield token


def _set_ends(tokenizer: Tokenizer, begin: str | None, end: str) -> None:
    new = {token for token in (begin, end) if token} - _special_tokens(tokenizer).keys()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(new)])
    tokenizer.post_processor = None
    is_usual = end == next((token for token in ENDS_OF_TEXT if token in _special_tokens(tokenizer)), None)
    named = [token for token in (begin, None if is_usual else end) if token]
    if named:
        first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        start = [{"SpecialToken": {"id": begin, "type_id": 0}}] if begin else []
        tokens = {token: {"id": token, "ids": [tokenizer.token_to_id(token)], "tokens": [token]} for token in named}
        part = {"type": "TemplateProcessing", "single": [*start, first], "pair": [*start, first, second]}
        template = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        template.__setstate__(json.dumps(part | {"special_tokens": tokens}).encode())
        tokenizer.post_processor = template


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        line_end = LAST_LINE_END.match(text, start, end)
        yield text[start : line_end.end() if line_end else end]
        start = line_end.end() if line_end else end
    yield text[start:]


def _has_invalid_bytes(text: str) -> bool:
    """What `INVALID_BYTES.search` finds, a hundred times as fast where there is nothing."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _bytes_of(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    return [_token_bytes(added.get(number) or tokenizer.id_to_token(number)) for number in ids]


def _token_bytes(token: AddedToken | str | None) -> bytes:
    if isinstance(token, AddedToken):
        return b"" if token.special else token.content.encode()
    return bytes(SYMBOL_BYTES[symbol] for symbol in token or "" if symbol in SYMBOL_BYTES)
