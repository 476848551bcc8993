"""Build the class that a folder's config names, on the meta device and within limits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, in_one_line
from ..model.build import Refusal, without_data
from ..model.config_json import FieldPath, config_json, field_name, value_at, without_names
from .folder import Stored, Weights
from .reports import number, short

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO_MODELS = ("AutoModel", "AutoBackbone")  # prefixes of the auto_map keys for model classes
_EXTRA_MODULES = 4096  # modules that any build may have
_MODULES_PER_TENSOR = 8  # additional modules per tensor in the weights
# fields that choose kernels and set no shape
_KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation")
_LARGEST = 2**20  # largest value of a field, unless a tensor is larger
_LONGEST = 2**24  # the same for lengths: fields with one of _LENGTHS in their name
_LENGTHS = ("position", "length", "window", "seq")


@dataclass(frozen=True)
class Classes:
    config: type[PreTrainedConfig]  # reads config.json
    model: type[PreTrainedModel]  # is built from it
    max_modules: int  # of a build, from the number of tensors
    note: str = ""  # about the choice of classes, for the user


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose config can be read, and whose class is known."""

    path: Path
    data: dict[str, Any]  # config.json
    weights: Weights
    classes: Classes


class TooLarge(Refusal):
    """A number in the config is so large that building the class might not finish."""


def classes_of(
    data: Mapping[str, Any], folder: Path, tensors: int, trust_remote_code: bool
) -> Classes | Refusal:
    """Return the classes that config.json names, or why they are not known."""
    max_modules = _EXTRA_MODULES + _MODULES_PER_TENSOR * tensors
    model = _transformers_class(data)
    remote = data.get("auto_map")
    if isinstance(model, type):
        config = _config_class(data, model)
        if isinstance(config, Refusal):
            return config
        note = (
            "the folder contains model code, which was not run: the class of Transformers was used"
            if remote
            else ""
        )
        return Classes(config, model, max_modules, note)
    if not remote:
        return model
    if not trust_remote_code:
        raise CheckpointError(
            f"{folder}: its class is code in the folder (auto_map in config.json), which is not "
            "run by default. Read the code, then pass trust_remote_code=True."
        )
    return _remote_classes(data, folder, max_modules)


def _transformers_class(data: Mapping[str, Any]) -> type[PreTrainedModel] | Refusal:
    import transformers

    inner = (part.get("architectures") for part in data.values() if isinstance(part, dict))
    # Transformers 4 nests it
    named = data.get("architectures") or next(filter(None, inner), None)
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return Refusal(
            "config.json names no class. Add the one that the weights were saved from: "
            '"architectures": ["LlamaForCausalLM"]'
        )
    candidate = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
        return candidate
    return Refusal(
        f"transformers {transformers.__version__} has no class {short(name)}, which config.json "
        "names in architectures. Install a version that has it, or name another"
    )


def _config_class(
    data: Mapping[str, Any], model: type[PreTrainedModel]
) -> type[PreTrainedConfig] | Refusal:
    from transformers import CONFIG_MAPPING

    own: Any = getattr(model, "config_class", None)
    kind = data.get("model_type")
    other: Any = own
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        other = CONFIG_MAPPING[kind]
    if own is None and other is None:
        return Refusal(f"{model.__name__} cannot be built from a config alone")
    if own is None or issubclass(other, own):
        return other  # type: ignore[no-any-return]
    if issubclass(own, other):
        return own  # type: ignore[no-any-return]
    return Refusal(
        f'model_type is "{short(kind)}", but {model.__name__} (architectures) needs a '
        f"{own.__name__}. One of the two fields is wrong: correct it in config.json"
    )


def own_reference(data: Mapping[str, Any]) -> str | None:
    """The model class in ``auto_map``: the one in ``architectures``, else the first."""
    remote = data.get("auto_map")
    references = [
        reference
        for auto, reference in (remote.items() if isinstance(remote, dict) else ())
        if auto.startswith(AUTO_MODELS) and isinstance(reference, str)
    ]
    named = data.get("architectures") or ()
    own = (one for one in references if one.rpartition(".")[2] in named)
    return next(own, references[0] if references else None)


def _remote_classes(data: Mapping[str, Any], folder: Path, max_modules: int) -> Classes | Refusal:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote, reference = data["auto_map"], own_reference(data)
    if reference is None:
        return Refusal("auto_map in config.json names no model class")
    try:
        model: Any = get_class_from_dynamic_module(reference, str(folder))
        config: Any = (
            get_class_from_dynamic_module(remote["AutoConfig"], str(folder))
            if "AutoConfig" in remote
            else _config_class(data, model)
        )
    except Exception as error:  # the folder's code may raise anything
        return Refusal(f"the folder's own code cannot be loaded: {short(error)}")
    if isinstance(config, Refusal):
        return config
    return Classes(config, model, max_modules, "the folder's own code was run")


def _entries(data: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield each field whose value is neither an object nor a list, with its value."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _entries(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _entries(value, (*path, index))
    elif path:
        yield path, data


def value_in(data: Any, path: FieldPath) -> Any:
    """Return the value of a field; ``None`` if it, or an entry of a list, does not exist."""
    try:
        return value_at(data, path)
    except IndexError:
        return None


def quantisation(data: Mapping[str, Any]) -> Any:
    """The quantization config of the model or of a part; ``None`` if the weights are plain."""
    parts = (part for part in data.values() if isinstance(part, dict))
    packed = (part.get("quantization_config") for part in (data, *parts))
    return next((settings for settings in packed if settings is not None), None)


def build(classes: Classes, data: Mapping[str, Any]) -> PreTrainedModel | Refusal:
    """Return the model built on the meta device in eager mode, or the class's refusal."""
    try:
        config = config_from(classes, data)
        config._attn_implementation = "eager"  # avoids a search for kernels
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "eager"
    except Exception as error:  # a class may refuse with any exception
        return _refused(in_one_line(error))
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        return Refusal(f"dtype is {number(dtype)}, which is not a dtype of torch")
    built = without_data(classes.model, config, classes.max_modules, than="the weights")
    return _refused(built.reason) if isinstance(built, Refusal) else built


def config_from(classes: Classes, data: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that ``from_pretrained`` would read; exceptions of the class propagate."""
    values = copy.deepcopy(without_names(data, _KERNELS))
    decode = getattr(classes.config, "_decode_special_floats", None)  # infinities in JSON
    return classes.config.from_dict(values if decode is None else decode(values))


def as_json(
    classes: Classes, data: Mapping[str, Any], use_diff: bool = False
) -> dict[str, Any] | None:
    """The config as the class writes it, or ``None`` if refused; ``use_diff`` omits defaults."""
    try:
        return config_json(config_from(classes, data), use_diff)
    except Exception:  # a class may refuse with any exception
        return None


def _refused(reason: str) -> Refusal:
    return Refusal(short(reason.removeprefix("Class validation error for validator ")).rstrip("."))


def too_large(
    classes: Classes, data: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> str | None:
    """Return a sentence on a number so large that building might not finish, or ``None``."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    large: dict[Any, tuple[FieldPath, int]] = {}
    for path, value in _entries(data):
        name = str(path[-1])
        limit = _LONGEST if any(word in name for word in _LENGTHS) else _LARGEST
        if type(value) is int and value > max(limit, largest) and not _is_rotary_base(name):
            large.setdefault(path[0], (path, value))
    small = {key: value for key, value in data.items() if key not in large}
    for key, (path, value) in large.items():
        if _is_read(classes, small, str(key)):  # a value that the class only stores is harmless
            return (
                f"{field_name(path)} is {number(value)}, far larger than any size in the weights "
                f"({len(tensors):,} tensors; their largest dimension is {largest:,})"
            )
    return None


def _is_rotary_base(name: str) -> bool:
    return "theta" in name or ("base" in name and ("rot" in name or "rope" in name))


def _is_read(classes: Classes, data: dict[str, Any], key: str) -> bool:
    """True if the class reads a field, and does not only store its value."""
    full = as_json(classes, data)
    if full is None or key in full:
        return True
    return any(as_json(classes, {**data, key: n}) != {**full, key: n} for n in (1, 2))
