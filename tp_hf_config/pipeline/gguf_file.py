"""Export to ``"gguf"``: one file with weights, widths by layer and tokenizer, for llama.cpp.

llama.cpp supports SentencePiece's BPE and byte-level BPE, with a name for each way to split text
before it. What a tokenizer does is read from the JSON of its fast version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..errors import PipelineError, listed
from ..model.build import Refusal
from .card import base_model
from .job import Ready
from .llama import Layer, LlamaLayers, llama_layers
from .source import Source, tokenizer_of

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "model.gguf"  # in the folder of an export
_SILU = ("silu", "swish")
# dtype -> the type of such a tensor in the file, and of a file mostly of such tensors
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_ROTARY_FACTORS = "rope_freqs.weight"
_CLOSE = 1e-6  # relative difference up to which float32 frequencies count as the default ones
_SPACE = "\u2581"  # replaces a space in SentencePiece's tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how text is split, whether whole words skip the merges) -> llama.cpp's name for it
_PRE = {
    (("ByteLevel", True), False): "gpt-2",
    (("Digits",), ("ByteLevel", True), False): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False), True): "llama-bpe",
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False), False): "qwen2",
}
_SPECIAL = ("bos", "eos", "unk", "pad")
_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
_NO_TOKENIZER = (
    "a model that is not read from a folder comes without a tokenizer, and without one in the file "
    "llama-cli and llama-server end with an assertion. Save model and tokenizer to a folder, and "
    "give export that"
)
# a method of gguf.GGUFWriter without add_ -> its value, for a tokenizer
Vocabulary = dict[str, Any]


def prepare(
    model: PreTrainedModel, source: Source | None, multiple_of: int | None
) -> Ready | Refusal:
    """Prove that a model is a Llama, whose layers may differ, and that GGUF can express it."""
    if source is None:
        return Refusal(_NO_TOKENIZER)
    llama = llama_layers(model, multiple_of)
    if isinstance(llama, Refusal):
        return llama
    config = llama.config
    if config.hidden_act not in _SILU:
        return Refusal(f"hidden_act {config.hidden_act!r}: llama.cpp's Llama computes 'silu' alone")
    other = sorted({str(v.dtype) for v in llama.weights.values() if v.dtype not in _TYPES})
    if other:
        return Refusal(
            f"its weights are {', '.join(other)}, and a GGUF file takes float32, float16 and "
            "bfloat16. Save it in one of these first"
        )
    factors = rotary_factors(config)
    if isinstance(factors, Refusal):
        return factors
    found = vocabulary_of(tokenizer_of(source), config.vocab_size)
    if isinstance(found, Refusal):
        return found
    vocabulary, notes = found

    def write(folder: Path) -> None:
        write_file(folder / GGUF_FILE, llama, vocabulary, factors, base_model(source))
        reason = _difference(folder / GGUF_FILE, llama, factors)
        if reason is not None:
            raise PipelineError(f"the file was not written, read back it is another: {reason}")

    return Ready(
        write,
        llama.fields,
        llama.parameters,
        llama.proof,
        loading=f"llama-cli --model {GGUF_FILE}",
        notes=notes,
        holds_tokenizer=True,
    )


# ------------------------------------------------------------------------------ widths and weights


def write_file(
    path: Path, llama: LlamaLayers, vocabulary: Vocabulary, factors: Tensor | None, name: str
) -> None:
    writer: Any = gguf.GGUFWriter(path, _architecture(llama.layers))
    writer.add_name(name)
    writer.add_file_type(_TYPES[llama.weights["model.embed_tokens.weight"].dtype][1])
    _add_widths(writer, llama)
    for method, value in vocabulary.items():
        getattr(writer, f"add_{method}")(value)
    for key, tensor in _tensors(llama, factors):
        kind, tensor = _TYPES[tensor.dtype][0], tensor.contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy does not have it
            tensor = tensor.view(torch.uint8)
        writer.add_tensor(key, tensor.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _difference(path: Path, llama: LlamaLayers, factors: Tensor | None) -> str | None:
    """Read a file back; return how it differs from what was to be written, if it does."""
    reader = gguf.GGUFReader(path)
    arch = _architecture(llama.layers)
    for key, value in _by_layer(llama.layers).items():
        field = reader.get_field(f"{arch}.{key}")
        read = None if field is None else field.contents()
        if read != value:
            return f"{arch}.{key} is {read}, expected {value}"
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    for key, tensor in _tensors(llama, factors):
        read = found.pop(key, None)
        if read is None or not torch.equal(read.view(tensor.dtype), tensor):
            return f"{key} is not what was written"
    return f"it has other tensors: {listed(sorted(found))}" if found else None


def _architecture(layers: list[Layer]) -> str:
    """Return llama.cpp's name of a Llama with one width for all layers, or with several."""
    return "llama" if len(set(layers)) == 1 else "deci"


def _add_widths(writer: Any, llama: LlamaLayers) -> None:
    config = llama.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(llama.layers))
    writer.add_key_length(llama.head_dim)
    writer.add_value_length(llama.head_dim)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    by_layer = _by_layer(llama.layers)
    writer.add_feed_forward_length(by_layer["feed_forward_length"])
    writer.add_head_count(by_layer["attention.head_count"])
    writer.add_head_count_kv(by_layer["attention.head_count_kv"])


def _by_layer(layers: list[Layer]) -> dict[str, int | list[int]]:
    values = {
        "feed_forward_length": [layer.ffn for layer in layers],
        "attention.head_count": [layer.queries for layer in layers],
        "attention.head_count_kv": [layer.keys for layer in layers],
    }
    return {key: own[0] if len(set(own)) == 1 else own for key, own in values.items()}


def _tensors(llama: LlamaLayers, factors: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of each tensor, as llama.cpp expects them."""
    if factors is not None:
        yield _ROTARY_FACTORS, factors
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(llama.layers))
    for key, weight in llama.weights.items():
        name = known.get_name(key, try_suffixes=(".weight", ".bias")) or key
        parts = key.split(".")
        if parts[-2] in ("q_proj", "k_proj"):
            layer = llama.layers[int(parts[2])]
            # llama.cpp rotates neighbouring channels together, Transformers those half a head apart
            weight = _in_pairs(weight, layer.queries if parts[-2] == "q_proj" else layer.keys)
        # norms and biases have to be float32, which represents the other dtypes exactly
        yield name, weight.float() if weight.dim() == 1 else weight


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def rotary_factors(config: LlamaConfig) -> Tensor | Refusal | None:
    """Return llama.cpp's divisors of the rotary frequencies (Llama 3 scales them).

    ``None``: all 1.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    kind = str(getattr(rotary, "rope_type", "default"))
    if "dynamic" in kind or kind == "longrope":
        return Refusal(
            f"rope_type {kind!r}: its frequencies depend on the length of the text, and a GGUF "
            "file has one factor for each"
        )
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    if scaling != 1:
        return Refusal(
            f"rope_type {kind!r} scales attention by {scaling:.4g}, which a GGUF file of a Llama "
            "does not say"
        )
    frequencies = rotary.inv_freq.double().cpu()
    size = 2 * len(frequencies)
    default = _rope_theta(config) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = default / frequencies
    if torch.allclose(factors, torch.ones_like(factors), rtol=_CLOSE, atol=0):
        return None
    return factors.float()


def _rope_theta(config: LlamaConfig) -> float:
    """Return the base of the rotary frequencies, which Transformers 4 keeps elsewhere."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or config.rope_theta)


# --------------------------------------------------------------------------------------- vocabulary


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, size: int
) -> tuple[Vocabulary, tuple[str, ...]] | Refusal:
    """Return a tokenizer as llama.cpp reads it, with notes on small differences, or refuse it."""
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
    in_pieces = bool(model["byte_fallback"])  # as SentencePiece cuts
    cutting = (_sentencepiece if in_pieces else _byte_level)(data, vocabulary, merges)
    if isinstance(cutting, Refusal):
        return cutting
    ends = _ends(tokenizer)
    if isinstance(ends, Refusal):
        return ends
    ids = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    if max(ids.values()) >= size:
        return Refusal(
            f"its tokenizer has tokens up to {max(ids.values())}, and the model {size} embeddings"
        )
    how, scores, adds_space, notes = cutting
    kind = gguf.TokenType
    kinds = dict.fromkeys(_BYTES, kind.BYTE) if in_pieces else {}
    kinds |= {t["content"]: kind.CONTROL if t["special"] else kind.USER_DEFINED for t in added}
    texts, types = [f"[PAD{number}]" for number in range(size)], [kind.UNUSED] * size
    for text, number in ids.items():
        texts[number], types[number] = text, kinds.get(text, kind.NORMAL)
    found: Vocabulary = {
        "tokenizer_model": "llama" if in_pieces else "gpt2",
        "tokenizer_pre": how,
        "token_list": texts,
        "token_types": types,
        "token_scores": [scores.get(text, 0.0) for text in texts] if scores else None,
        "token_merges": None if in_pieces else [" ".join(pair) for pair in merges] or None,
    }
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    found |= {f"{name}_token_id": token for name, token in special.items()}
    found |= {"add_bos_token": ends[0], "add_eos_token": ends[1], "add_space_prefix": adds_space}
    template: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found["chat_template"] = template or None
    return {method: value for method, value in found.items() if value is not None}, notes


# How text is split: llama.cpp's name of the pre-tokenizer, SentencePiece's scores, whether a space
# is put before a text, and notes.
_Cutting = tuple[str, dict[str, float], bool, tuple[str, ...]]


def _why_another_bpe(model: Mapping[str, Any]) -> str | None:
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
    """Return why llama.cpp would find added tokens elsewhere in a text, if it would."""
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
    return pre, {}, False, notes


def _steps(pre: Any) -> tuple[Any, ...]:
    """Return a pre-tokenizer's steps in short; those with unknown settings as JSON."""
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
    return "default", scores, adds, notes


def _scores(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]]
) -> dict[str, float] | None:
    """Return token -> score; ``None`` if no scores lead to these merges in this order."""
    # without added tokens: they are split off before any merge
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
    """Return whether a space is put before text, and whether exactly where llama.cpp does."""
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
    text = json.dumps(value, ensure_ascii=False)
    shown = text if len(text) <= 200 else f"{text[:200]} ..."
    return f"its tokenizer's {name} is none that llama.cpp has for such a tokenizer: {shown}"


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | Refusal:
    """Return whether bos is put before a text and eos after it, or refuse."""
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
