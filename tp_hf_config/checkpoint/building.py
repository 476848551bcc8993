"""The class that a folder's config names, built from it without data and within bounds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import CheckpointError
from ..reference import FieldPath, Refusal, field_name, without_data
from .headers import Stored
from .words import number, place, short

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_LARGEST = 2**20
_LONGEST = 2**24
_LENGTHS = ("position", "length", "window", "seq")
_SLACK = 4096
_A_TENSOR = 8
_CHOICES = ("_attn_implementation", "attn_implementation", "_experts_implementation")


@dataclass(frozen=True)
class Classes:
    """The classes of a folder.

    Attributes:
        config: reads the config.
        model: is built from it.
        most: how many modules it may have, going by the number of tensors.
        note: what the user should know of the choice; empty: nothing.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    most: int
    note: str = ""


@dataclass(frozen=True)
class Unknown:
    """Nothing can be said, and why."""

    reason: str


def classes_of(
    data: Mapping[str, Any], folder: Path, tensors: int, trust_remote_code: bool
) -> Classes | Unknown:
    """The class that config.json names.

    Raises:
        CheckpointError: the class is code in the folder, and ``trust_remote_code`` is not set.
    """
    most = _SLACK + _A_TENSOR * tensors
    model = _native(data)
    remote = data.get("auto_map")
    if isinstance(model, type):
        config = _config_class(data, model)
        if isinstance(config, Unknown):
            return config
        note = "the folder has code of its own, which was not run" if remote else ""
        return Classes(config, model, most, note)
    if not remote:
        return model
    if not trust_remote_code:
        raise CheckpointError(
            f"{folder}: its class is code in the folder (auto_map in config.json), which is not "
            "run. Read it, then say trust_remote_code=True (--trust-remote-code)."
        )
    return _remote(data, folder, most)


def _native(data: Mapping[str, Any]) -> type[PreTrainedModel] | Unknown:
    """The class of transformers that ``architectures`` names."""
    import transformers

    inner = (part.get("architectures") for part in data.values() if isinstance(part, dict))
    named = data.get("architectures") or next(filter(None, inner), None)  # 4 writes it inside
    kind = data.get("model_type")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return Unknown(
            "config.json names no class. Add it: "
            f'"architectures": [{_possible(kind)}] (the class that the weights were saved from)'
        )
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return Unknown(
        f"transformers {transformers.__version__} has no class {short(name)}, which config.json "
        f"names in architectures. Install a version that has it, or name another: "
        f"[{_possible(kind)}]"
    )


def _possible(kind: Any) -> str:
    """A class for a kind of model, as JSON has it."""
    from transformers.models.auto import modeling_auto

    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION"):
        names: Any = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if isinstance(kind, str) and kind in names:
            return f'"{names[kind]}"'
    return '"LlamaForCausalLM"'


def _config_class(
    data: Mapping[str, Any], model: type[PreTrainedModel]
) -> type[PreTrainedConfig] | Unknown:
    """The class of config that the model takes, where ``model_type`` says the same."""
    from transformers import CONFIG_MAPPING

    own: Any = getattr(model, "config_class", None)
    kind = data.get("model_type")
    other: Any = own
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        other = CONFIG_MAPPING[kind]
    if own is None and other is None:
        return Unknown(f"{model.__name__} cannot be built from a config alone")
    if own is None or issubclass(other, own):
        return other  # type: ignore[no-any-return]
    if issubclass(own, other):
        return own  # type: ignore[no-any-return]
    return Unknown(
        f'model_type says "{short(kind)}", but {model.__name__} (architectures) takes '
        f"{own.__name__}: one of the two is not this model's. Correct it in config.json"
    )


def _remote(data: Mapping[str, Any], folder: Path, most: int) -> Classes | Unknown:
    """The classes in the folder's own code, which is run."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = data["auto_map"]
    names = [name for name in remote if name != "AutoConfig"] if isinstance(remote, dict) else []
    if not names:
        return Unknown("auto_map in config.json names no model class")
    try:
        model: Any = get_class_from_dynamic_module(remote[names[0]], str(folder))
        config: Any = (
            get_class_from_dynamic_module(remote["AutoConfig"], str(folder))
            if "AutoConfig" in remote
            else _config_class(data, model)
        )
    except Exception as error:  # whatever the folder's code raises
        return Unknown(f"the folder's own code cannot be loaded: {short(error)}")
    if isinstance(config, Unknown):
        return config
    return Classes(config, model, most, "code of the folder was run")


def too_large(data: Any, tensors: Mapping[str, Stored]) -> dict[FieldPath, int]:
    """Numbers so large that building by them might not end: far above all that the weights have."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    found = {}
    for path, value in entries(data):
        name = str(path[-1])
        most = _LONGEST if any(word in name for word in _LENGTHS) else _LARGEST
        if type(value) is int and value > max(most, largest) and "theta" not in name:
            found[path] = value  # rotary bases (theta) count nothing
    return found


def entries(data: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every value in a config's JSON that is no object and no list, and where it stands."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from entries(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from entries(value, (*path, index))
    elif path:
        yield path, data


def longest_list(tensors: Mapping[str, Stored]) -> int:
    """How many layers the longest list of them in the weights has."""
    places = (place(name) for name in tensors)
    return max((at[1] + 1 for at in places if at is not None), default=0)


def said_too_large(large: Mapping[FieldPath, int], tensors: Mapping[str, Stored]) -> str:
    """What is wrong with numbers that are too large."""
    path, value = next(iter(large.items()))
    return (
        f"{field_name(path)} says {number(value)}, far above all that the weights have "
        f"({len(tensors):,} tensors, {longest_list(tensors):,} layers in the longest list)"
    )


def build(classes: Classes, data: Mapping[str, Any]) -> PreTrainedModel | Refusal:
    """The class built from a config's JSON on the meta device, or its own words."""
    try:
        config = config_from(classes, data)
        config._attn_implementation = "eager"  # no kernel is looked for
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "eager"
    except Exception as error:  # a class may refuse with any exception
        return Refusal(_reason(error))
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        return Refusal(f"dtype says {number(dtype)}, which is no type that torch has")
    with _bounded(classes.most):
        built = without_data(classes.model, config)
    return Refusal(_cleaned(built.reason)) if isinstance(built, Refusal) else built


def config_from(classes: Classes, data: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that ``from_pretrained`` would read; what the class raises passes through."""
    values = copy.deepcopy(_plain(data))
    decode = getattr(classes.config, "_decode_special_floats", None)  # infinities
    return classes.config.from_dict(values if decode is None else decode(values))


def _plain(data: Any) -> Any:
    """The config without the choice of kernels, which no shape depends on."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items() if key not in _CHOICES}
    return data


def _reason(error: BaseException) -> str:
    return _cleaned(" ".join(str(error).split()) or type(error).__name__)


def _cleaned(reason: str) -> str:
    return short(reason.removeprefix("Class validation error for validator ")).rstrip(".")


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """In this thread, no more than so many modules may be put into others."""
    count = 0
    own = threading.get_ident()

    def counted(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == own
        if count > most:
            raise ValueError(f"it asks for more than {most:,} modules, far more than the weights")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
