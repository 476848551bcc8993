"""Refuse a source whose weights cannot be pruned, or of which Transformers reads only a part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..checkpoint.building import quantisation
from ..checkpoint.folder import ADAPTER, read_config
from ..errors import PipelineError, UnsupportedModelError, listed
from ..model.config_json import config_json
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ROTARY_TENSORS = ("rope_freqs", "rope_factors")
_SCALING = ".rope.scaling."
_SCALES = "gpt-oss"  # the architecture whose scaling Transformers reads (5.24, and before)


def check_source(source: Source, config: PreTrainedConfig) -> None:
    """Raise if pruning what ``from_pretrained`` gives of a source would not be pruning the model.

    Raises:
        UnsupportedModelError: the weights are quantised, an adapter belongs to them, or
            Transformers does not read all of a GGUF file.
        PipelineError: Transformers 5 wrote the config, and Transformers 4 is installed.
    """
    if source.gguf is not None:
        _check_gguf(source)
        return
    _check_not_quantised(source, config)
    _check_rotary(source)
    if source.folder is not None and (source.folder / ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{source.name} holds an adapter ({ADAPTER}), and adapters are not pruned. Merge it "
            "first (model.merge_and_unload()), and save the merged model"
        )


def _check_not_quantised(source: Source, config: PreTrainedConfig) -> None:
    packed = quantisation(config_json(config))
    if packed is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise UnsupportedModelError(
            f"{source.name} is quantised ({method or 'method unknown'}): packed weights cannot be "
            "pruned. Prune the float16, bfloat16 or float32 model that it was made of, and "
            "quantise the result."
        )


def _check_rotary(source: Source) -> None:
    from ..checkpoint.loading import MAJOR
    from ..checkpoint.rotary import unread_by_transformers_4

    if MAJOR >= 5 or source.folder is None:
        return
    unread = unread_by_transformers_4(read_config(source.folder).data or {})
    if unread:
        raise PipelineError(
            f"{source.name}: Transformers 5 wrote {', '.join(unread)} into rope_parameters, where "
            f"the installed Transformers {MAJOR} does not look. First: tp-hf-config repair "
            f"{source.name}"
        )


def _check_gguf(source: Source) -> None:
    import gguf

    reader: Any = gguf.GGUFReader(source.options["gguf_file"])
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UnsupportedModelError(
            f"{source.name} is one of {int(parts.contents())} files of a model, and Transformers "
            "would read this one alone. Merge them first: llama-gguf-split --merge"
        )
    unread = list(_unread(reader))
    if unread:
        raise UnsupportedModelError(
            f"{source.name} scales its rotary embeddings ({listed(unread)}), which Transformers "
            "does not read from a GGUF file: the model would compute something else. Prune the "
            "safetensors model that it was made of"
        )


def _unread(reader: Any) -> Iterator[str]:
    """Yield the names of tensors and fields in a GGUF file that scale rotary embeddings."""
    yield from (t.name for t in reader.tensors if t.name.startswith(_ROTARY_TENSORS))
    for name, field in reader.fields.items():
        architecture, scaling, kind = name.partition(_SCALING)
        if scaling and architecture != _SCALES and (kind, field.contents()) != ("type", "none"):
            yield name
