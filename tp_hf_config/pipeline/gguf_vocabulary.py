"""A tokenizer as llama.cpp reads it from a GGUF file, or why llama.cpp would cut text otherwise.

llama.cpp knows byte-level BPE, with a name for each way to split text before it, and the BPE of
SentencePiece.  What a tokenizer does is read from the JSON of its fast form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..model.build import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "\u2581"
"""What stands for a space in SentencePiece's tokens."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    (("ByteLevel", True), False): "gpt-2",
    (("Digits",), ("ByteLevel", True), False): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False), True): "llama-bpe",
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False), False): "qwen2",
}
"""How text is split, and whether whole words skip the merges -> llama.cpp's name for that."""
_SPECIAL = ("bos", "eos", "unk", "pad")
_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file says it.

    Attributes:
        model: llama.cpp's name of its kind.
        pre: llama.cpp's name of the way to split text before merging.
        tokens: the text of each token, as many as the model has embeddings.
        types: the name of each token's ``gguf.TokenType``.
        merges: which pairs are merged, the first one first.
        scores: in whose order SentencePiece merges, the largest first.
        special: bos, eos, unk, pad -> token.
        adds_bos: the first token is put before a text.
        adds_eos: the last token is put behind a text.
        adds_space: a space is put before a text.
        chat_template: one, or several with names.
        notes: where llama.cpp cuts text otherwise.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[str]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | Sequence[Mapping[str, str]] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Cutting:
    """How a kind of tokenizer cuts text: fields of :class:`Vocabulary`."""

    model: str
    pre: str = "default"
    merges: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    adds_space: bool = False
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary | Refusal:
    """Return a tokenizer as llama.cpp reads it.

    ``size``: how many embeddings the model has.

    Returns:
        The tokenizer; or a refusal: llama.cpp would cut text in another way.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return Refusal(f"its tokenizer ({type(tokenizer).__name__}) has no fast form to read")
    data = json.loads(fast.to_str())
    model, added = data["model"], data["added_tokens"]
    reason = _why_another_bpe(model) or _why_other_added(added, data["normalizer"])
    if reason is not None:
        return Refusal(reason)
    own = {token["content"] for token in added}
    vocabulary = {token: number for token, number in model["vocab"].items() if token not in own}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    cut = _sentencepiece if model["byte_fallback"] else _byte_level
    cutting = cut(data, vocabulary, merges)
    if isinstance(cutting, Refusal):
        return cutting
    ends = _ends(tokenizer)
    if isinstance(ends, Refusal):
        return ends
    named = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    if max(named.values()) >= size:
        return Refusal(
            f"its tokenizer has tokens up to {max(named.values())}, and the model {size} embeddings"
        )
    kinds = dict.fromkeys(_BYTES, "BYTE") if cutting.model == "llama" else {}
    kinds |= {t["content"]: "CONTROL" if t["special"] else "USER_DEFINED" for t in added}
    special = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    template: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    texts, types = [f"[PAD{number}]" for number in range(size)], ["UNUSED"] * size
    for text, number in named.items():
        texts[number], types[number] = text, kinds.get(text, "NORMAL")
    return Vocabulary(
        cutting.model,
        cutting.pre,
        texts,
        types,
        cutting.merges,
        [cutting.scores.get(text, 0.0) for text in texts] if cutting.scores else (),
        {kind: token for kind, token in special.items() if token is not None},
        *ends,
        cutting.adds_space,
        template,
        cutting.notes,
    )


def _why_another_bpe(model: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp's BPE is not that of a tokenizer, or ``None``."""
    kind = model.get("type")
    if kind != "BPE":
        return (
            f"its tokenizer is of the type {kind}, and byte-level BPE and SentencePiece's BPE are "
            "what is written"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its tokenizer's {key} is {model[key]!r}, which a GGUF file does not say"
    return None


def _why_other_added(added: Sequence[Mapping[str, Any]], normalizer: Any) -> str | None:
    """Return why llama.cpp would find added tokens elsewhere in a text, or ``None``."""
    for token in added:
        for key in ("single_word", "lstrip", "rstrip"):
            if token[key]:
                return (
                    f"its tokenizer's token {token['content']!r} has {key} set, which a GGUF file "
                    "does not say"
                )
        if token["normalized"] and normalizer not in (None, {"type": "NFC"}):
            return (
                f"its tokenizer looks for {token['content']!r} after it has changed the text "
                "(normalized), llama.cpp before"
            )
    return None


def _byte_level(
    data: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]]
) -> _Cutting | Refusal:
    """Return how byte-level BPE cuts text."""
    from tokenizers.pre_tokenizers import ByteLevel

    lacking = set(ByteLevel.alphabet()) - vocabulary.keys()
    unknown = data["model"].get("unk_token")
    if lacking and unknown is not None:
        return Refusal(
            f"its tokenizer makes {unknown!r} of the {len(lacking)} bytes that it has no token "
            "for, llama.cpp nothing"
        )
    notes: tuple[str, ...] = ()
    if data["normalizer"] == {"type": "NFC"}:
        notes = (
            "the tokenizer composes characters first (NFC), which llama.cpp does not: text with "
            "combining accents is cut otherwise there",
        )
    elif data["normalizer"] is not None:
        return Refusal(_what("normalizer", data["normalizer"]))
    steps = _steps(data["pre_tokenizer"])
    pre = _PRE.get((*steps, bool(data["model"].get("ignore_merges"))))
    if pre is None:
        return Refusal(_what("pre_tokenizer", data["pre_tokenizer"]))
    return _Cutting("gpt2", pre, [" ".join(pair) for pair in merges], notes=notes)


def _steps(pre: Any) -> tuple[Any, ...]:
    """Return the steps of a pre-tokenizer in short; those with other settings as their JSON."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for one in pre["pretokenizers"] for step in _steps(one))
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (("ByteLevel", pre.get("use_regex", True)),)
        case {"type": "Digits", "individual_digits": True}:
            return (("Digits",),)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} if not pre[
            "invert"
        ]:
            return (("Split", regex),)
    return (json.dumps(pre),)


def _sentencepiece(
    data: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]]
) -> _Cutting | Refusal:
    """Return how SentencePiece's BPE cuts text."""
    if not vocabulary.keys() >= set(_BYTES):
        return Refusal("its tokenizer has byte_fallback and not a token for each of 256 bytes")
    if data["model"].get("ignore_merges"):
        return Refusal("its tokenizer has byte_fallback and ignore_merges, llama.cpp not both")
    scores = _scores(vocabulary, merges)
    if scores is None:
        return Refusal(
            "its tokenizer's merges are not those of SentencePiece: llama.cpp merges any two "
            "tokens that make up a third, in the order of the third"
        )
    space = _space_before(data["normalizer"], data["pre_tokenizer"])
    if space is None:
        both = [data["normalizer"], data["pre_tokenizer"]]
        return Refusal(_what("normalizer and pre_tokenizer", both))
    adds, exact = space
    notes = (
        ()
        if exact
        else (
            "llama.cpp puts a space before a text that begins with one, and after each control "
            "token, where the tokenizer does not",
        )
    )
    return _Cutting("llama", merges=(), scores=scores, adds_space=adds, notes=notes)


def _scores(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]]
) -> dict[str, float] | None:
    """Return token -> score; ``None`` if no scores lead to these merges in this order.

    Merges to an added token say nothing: it is cut out of a text before.
    """
    merges = [pair for pair in merges if "".join(pair) in vocabulary]
    possible = {
        (token[:at], token[at:])
        for token in vocabulary.keys() - set(_BYTES)
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    }
    in_order = ["".join(pair) for pair in merges]
    distinct = dict.fromkeys(in_order)
    runs = [token for token, _ in groupby(in_order)]
    if set(merges) != possible or len(runs) != len(distinct):
        return None
    return {token: -float(rank) for rank, token in enumerate(distinct, start=1)}


def _space_before(normalizer: Any, pre: Any) -> tuple[bool, bool] | None:
    """Return whether a space is put before text, and whether just where llama.cpp puts it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if pre is None:
        steps = (normalizer or {}).get("normalizers", [normalizer])
        return (steps != [replace], True) if steps in ([replace], [prepend, replace]) else None
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if normalizer is not None or not metaspace.items() <= pre.items():
        return None
    adds = pre["prepend_scheme"] != "never"
    return adds, not adds


def _what(name: str, value: Any) -> str:
    """Return that a setting of a tokenizer is none that llama.cpp has."""
    text = json.dumps(value, ensure_ascii=False)
    shown = text if len(text) <= 200 else f"{text[:200]} ..."
    return f"its tokenizer's {name} is none that llama.cpp has for such a tokenizer: {shown}"


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | Refusal:
    """Return whether bos is put before a text, and eos behind it."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return Refusal(
            "its tokenizer has no eos_token, and llama.cpp would take some other token for it. Set "
            "tokenizer.eos_token and save it again"
        )
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for before in ([], [tokenizer.bos_token_id]):
        for behind in ([], [eos]):
            if whole == [*before, *bare, *behind]:
                return bool(before), bool(behind)
    return Refusal(
        f"its tokenizer makes {whole} of {bare}; llama.cpp puts bos before or eos behind, no others"
    )
