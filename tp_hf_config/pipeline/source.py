"""Find a model (a folder, a GGUF file, a Hub id), and read it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.folder import ADAPTER, read_config
from ..errors import PipelineError, TPHFConfigError, UnsupportedModelError, listed
from ..model.surroundings import free_memory, raise_shortage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHOWN = 300  # characters of an error
_OLD_CACHES = {"TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"}  # Transformers 4 uses them
_ROTARY_TENSORS = ("rope_freqs", "rope_factors")
_SCALING = ".rope.scaling."
_SCALES = "gpt-oss"  # the only architecture whose scaling Transformers reads (up to 5.24)


@dataclass(frozen=True)
class Source:
    """Where a model is read from."""

    name: str  # as the user wrote it
    place: str  # a local folder or a Hub id
    gguf: str | None = None  # name of the GGUF file in place, if the model is one
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path | None:
        """The local folder; ``None`` for a Hub id."""
        folder = Path(self.place)
        return folder if folder.is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every ``from_pretrained`` of this model needs."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            # Transformers looks for a bare name in the working directory first
            options["gguf_file"] = os.path.abspath(Path(self.place, self.gguf))
        return options


def find_source(name: str, trust_remote_code: bool = False) -> Source:
    """Return the source that a folder, a file or a Hub id means, without torch or a request."""
    try:
        return _source(name, trust_remote_code)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no home folder, bad name
        raise PipelineError(f"{name} cannot be read: {error}") from error


def _source(name: str, trust_remote_code: bool) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PipelineError(f"{name}: {_without_config(path)}")
        reason = read_config(path).fault
        if reason is not None:
            raise PipelineError(f"{name}: {reason}. Download the file again, or correct it by hand")
        return Source(name, str(path), None, trust_remote_code)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise PipelineError(
                f"{name}: expected a folder with a config.json, a GGUF file or a Hub id, found a "
                f"{path.suffix or 'plain'} file. If it contains a model's weights, give its "
                f"folder: {path.parent}"
            )
        return Source(name, str(path.parent), path.name, trust_remote_code)
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise PipelineError(f"{name}: this file or folder does not exist")
    return Source(name, name, None, trust_remote_code)


def is_large(source: Source) -> bool:
    """True if a folder's weights take more than half of the free memory."""
    folder = source.folder
    files = () if folder is None else folder.rglob("*.safetensors")
    return 2 * sum(file.stat().st_size for file in files) > free_memory()


def cached_model(folder: Path) -> Path | None:
    """Return a model's folder in the Hub's cache, if ``folder`` (resolved) is a snapshot in it."""
    return folder.parent.parent if folder.parent.name == "snapshots" else None


def check_reachable(source: Source) -> None:
    """Raise if a model is in no local folder, and neither Hub nor cache has its config."""
    if source.folder is not None or os.environ.keys() & _OLD_CACHES:
        return
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(source.place, "config.json")
    except Exception as error:  # from the network, the Hub or the cache
        raise _cannot(source, "its config cannot be read", error) from error


def _without_config(folder: Path) -> str:
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return f"this folder has no config.json, but a GGUF file. Give the file: {gguf[0]}"
    inside = sorted(config.parent for config in folder.glob("*/config.json"))
    if inside:
        return f"this folder has no config.json, but a folder inside does. Give it: {inside[0]}"
    return "this folder has no config.json; expected a folder that save_pretrained wrote"


def config_of(source: Source) -> PreTrainedConfig:
    from transformers import AutoConfig

    from ..model.build import too_many_layers

    data = None if source.gguf or source.folder is None else read_config(source.folder).data
    reason = too_many_layers(data or {})  # a list with an entry for each would never end
    if reason is not None:
        raise PipelineError(f"{source.name}: {reason}. Correct config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.place, **source.options)
        return config
    except Exception as error:  # a config class may raise anything
        raise _cannot(source, "its config cannot be read", error) from error


def class_for(source: Source, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that the config names, or the auto classes' class for it."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from ..checkpoint.building import own_reference
    from ..model.build import class_of

    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    reference = own_reference(
        {"auto_map": getattr(config, "auto_map", None), "architectures": named}
    )
    is_stock = any(hasattr(transformers, name) for name in named)
    # trusted code is preferred to a stock class
    goes_first = source.trust_remote_code and str(reference).rpartition(".")[2] in named
    if named and not is_stock and reference is None:
        raise UnsupportedModelError(
            f"{source.name}: Transformers has no class {named[0]}, which config.json names "
            "(architectures). Another class would lack some weights or initialise them randomly: "
            "name the class that the weights were saved from"
        )
    if reference is None or (is_stock and not goes_first):
        return class_of(config)
    if not source.trust_remote_code:
        raise untrusted(source, reference)
    try:
        return get_class_from_dynamic_module(reference, source.place)  # type: ignore[no-any-return]
    except Exception as error:  # that code may raise anything
        raise _cannot(source, f"its code ({reference}) cannot be loaded", error) from error


def check_source(source: Source, config: PreTrainedConfig) -> None:
    """Raise if what Transformers would load is not the whole model, or cannot be pruned."""
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
    from ..checkpoint.building import quantisation
    from ..model.config_json import config_json

    packed = quantisation(config_json(config))
    if packed is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise UnsupportedModelError(
            f"{source.name} is quantised ({method or 'method unknown'}): packed weights cannot be "
            "pruned. Prune the float16, bfloat16 or float32 model that it was made from, and "
            "quantise the result."
        )


def _check_rotary(source: Source) -> None:
    from ..checkpoint.loading import MAJOR, unread_by_transformers_4

    if MAJOR >= 5 or source.folder is None:
        return
    unread = unread_by_transformers_4(read_config(source.folder).data or {})
    if unread:
        raise PipelineError(
            f"{source.name}: Transformers 5 wrote {', '.join(unread)} into rope_parameters, which "
            f"the installed Transformers {MAJOR} does not read. Run first: tp-hf-config repair "
            f"{source.name}"
        )


def _check_gguf(source: Source) -> None:
    import gguf

    reader: Any = gguf.GGUFReader(source.options["gguf_file"])
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UnsupportedModelError(
            f"{source.name} is one of {int(parts.contents())} files of a model, and Transformers "
            "would read only this one. Merge them first: llama-gguf-split --merge"
        )
    unread = list(_unread(reader))  # tensors and fields that scale rotary embeddings
    if unread:
        raise UnsupportedModelError(
            f"{source.name} scales its rotary embeddings ({listed(unread)}), which Transformers "
            "does not read from a GGUF file, so the loaded model would compute other outputs. "
            "Prune the safetensors model that it was made from"
        )


def _unread(reader: Any) -> Iterator[str]:
    yield from (t.name for t in reader.tensors if t.name.startswith(_ROTARY_TENSORS))
    for name, field in reader.fields.items():
        architecture, scaling, kind = name.partition(_SCALING)
        if scaling and architecture != _SCALES and (kind, field.contents()) != ("type", "none"):
            yield name


def load(
    source: Source,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    complete: bool = False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a model in eval mode, with notes; on the CPU, weights used as stored are mapped."""
    import torch

    from ..model.paging import conversions_in_files

    stored: Any = torch.float32 if source.gguf else "auto"
    try:
        with conversions_in_files():
            loaded: Any = model_class.from_pretrained(
                source.place,
                config=config,
                dtype=dtype or stored,
                output_loading_info=True,
                **source.options,
            )
        model, info = loaded
        model = model.eval().to(device)
    except Exception as error:  # reading weights may raise anything
        raise_shortage(error)
        raise _cannot(source, "its weights cannot be loaded", error) from error
    if source.gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are unpacked now
    notes = _notes(source, info)
    if complete and info["missing_keys"]:
        raise PipelineError(
            f"{notes[0]}. The pruned model would contain the random values: add these tensors to "
            "the folder first"
        )
    return model, notes


def _notes(source: Source, info: Mapping[str, Any]) -> tuple[str, ...]:
    # from_pretrained does not list tensors that the class ignores
    kinds = {
        "missing_keys": f"are missing from {source.name} and were initialised randomly",
        "unexpected_keys": f"of {source.name} are not used by its class, so the result lacks them",
    }
    return tuple(
        f"{len(info[kind])} tensors {what}: {', '.join(sorted(info[kind])[:3])}"
        f"{', ...' if len(info[kind]) > 3 else ''}"
        for kind, what in kinds.items()
        if info[kind]
    )


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, **source.options
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise _cannot(source, "its tokenizer cannot be loaded", error) from error
    return tokenizer


def _cannot(source: Source, what: str, error: Exception) -> TPHFConfigError:
    text = " ".join(str(error).split())
    if not source.trust_remote_code and "trust_remote_code" in text:
        return untrusted(source, "its class")
    if source.folder is None:
        what = f"no file or folder of this name exists here, and as a model on the Hub {what}"
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        what = f"its config does not fit its weights (see tp-hf-config check {source.name}); {what}"
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
    return PipelineError(f"{source.name}: {what}: {type(error).__name__}: {shown}")


def untrusted(source: Source, what: str) -> PipelineError:
    return PipelineError(
        f"{source.name}: {what} is code that comes with the model, which is not run by default. "
        "Read its .py files, then add trust_remote_code=True"
    )
