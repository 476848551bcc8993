"""Let Transformers decide, from shapes alone, how the tensors of a checkpoint load.

Runs the code of ``from_pretrained`` for prefixes, renamed and fused tensors, ties and ignored keys,
on meta tensors.

Transformers 5 writes ``rope_parameters`` alone. Software based on Transformers 4 reads
``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``, and silently uses its own defaults
if they are missing. They are written only if the config loads the same with them.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, value_at, with_values
from ..model.shapes import Mismatch
from ..model.surroundings import quiet_transformers
from ..model.tensors import ties_of
from .building import Checkpoint, Classes, TooLarge, build, config_from, too_large
from .folder import CONFIG, Stored, write_config
from .reports import number, short

_ROPE = "rope_parameters"
_OWN_FIELDS = ("rope_theta", "partial_rotary_factor")
_TYPE_NAMES = {"rope_type", "type"}


@dataclass(frozen=True)
class Rotary:
    """A config's JSON with the rotary fields that Transformers 4 reads."""

    data: dict[str, Any]
    added: dict[FieldPath, Any] = field(default_factory=dict)  # new fields in data
    unwritable: tuple[str, ...] = ()  # fields that cannot be written, and why, one sentence each


def for_transformers_4(classes: Classes, data: dict[str, Any]) -> Rotary:
    """Add the fields for Transformers 4, each only if the config still loads the same."""
    result, reasons = Rotary(data), []
    for at, value, present in _fields_of_4(data):
        name, changed = field_name(at), with_values(result.data, {at: value})
        if present is not None:
            if value not in (None, present):
                reasons.append(
                    f"{name} is {number(present)}, but {_ROPE} has {number(value)}. "
                    "Transformers 4 reads the first, Transformers 5 the second: correct one of "
                    "them by hand"
                )
        elif value is None:
            reasons.append(
                f"{field_name((*at[:-1], _ROPE))} differs between layer types, which rope_theta "
                "cannot express: software based on Transformers 4 uses its own defaults"
            )
        elif _load_the_same(classes, result.data, changed, {*result.added, at}):
            result = Rotary(changed, {**result.added, at: value})
        else:
            reasons.append(
                f"{name} {number(value)} is only in {_ROPE}, which software based on "
                f"Transformers 4 does not read. It is not written beside {_ROPE}, because "
                f"{classes.config.__name__} would then load another config"
            )
    return Rotary(result.data, result.added, tuple(reasons))


def write_for_transformers_4(folder: Path, classes: Classes) -> tuple[str, ...]:
    """Add the fields to a folder's config.json; return ``unwritable``."""
    rotary = for_transformers_4(classes, json.loads((folder / CONFIG).read_bytes()))
    if rotary.added:
        write_config(folder, rotary.data)
    return rotary.unwritable


def unread_by_transformers_4(data: Mapping[str, Any]) -> list[str]:
    """Fields that only ``rope_parameters`` holds, so that Transformers 4 misses them."""
    return [field_name(at) for at, _, present in _fields_of_4(data) if present is None]


def _fields_of_4(data: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any, Any]]:
    """Yield each field that Transformers 4 reads, its value in ``rope_parameters``, and its own.

    The first value is ``None`` if it differs between layer types.
    """
    if not isinstance(data, Mapping):
        return
    rope = data.get(_ROPE)
    if isinstance(rope, dict):
        differs = any(isinstance(value, dict) for value in rope.values())
        fields = {"rope_theta": None} if differs else _separate_fields(data)
        yield from (((*path, name), value, data.get(name)) for name, value in fields.items())
    for key, value in data.items():
        if key != _ROPE:
            yield from _fields_of_4(value, (*path, key))


def _separate_fields(node: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformers 4 fields equivalent to a part's ``rope_parameters``."""
    rope: dict[str, Any] = node[_ROPE]
    fields = {name: rope[name] for name in _OWN_FIELDS if type(rope.get(name)) in (int, float)}
    scaling = {name: value for name, value in rope.items() if name not in _OWN_FIELDS}
    if "longrope" in (scaling.get("rope_type"), scaling.get("type")):
        # Transformers 4 accepts the length only beside rope_scaling, and the type only
        # under one name
        if scaling.get("original_max_position_embeddings") == node.get(
            "original_max_position_embeddings"
        ):
            scaling.pop("original_max_position_embeddings", None)
        if "type" in scaling:
            scaling.pop("rope_type", None)
    if "rope_theta" in fields and scaling.keys() - _TYPE_NAMES:
        fields["rope_scaling"] = scaling
    return fields


def _load_the_same(
    classes: Classes, data: dict[str, Any], changed: dict[str, Any], added: set[FieldPath]
) -> bool:
    """True if both JSONs load as the same config."""
    try:
        before, after = (config_from(classes, variant).to_dict() for variant in (data, changed))
    except Exception:  # a class may refuse with any exception
        return False
    # Transformers 4 reads the added fields: they must load as written, and are not compared
    if MAJOR < 5:
        for path in added:
            if value_at(after, path) != value_at(changed, path):
                return False
        same = dict.fromkeys(added)
        before, after = with_values(before, same), with_values(after, same)
    return bool(before == after)


MAJOR = int(version("transformers").partition(".")[0])
_SAMPLES = 16  # rows that are compared with another tensor's


@dataclass(frozen=True)
class Assessment:
    """How Transformers loads a checkpoint's tensors into the class built from one config."""

    # name in the model -> shape in the checkpoint
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()  # tensors of the model that would be newly initialised
    mismatched: tuple[Mismatch, ...] = ()
    # name -> why the tensor cannot be assembled; "" if loading failed as a whole
    failed: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()  # stored tensors of a part that the model has, but without a place
    unused: tuple[str, ...] = ()  # other stored tensors without a place (another head)
    # name -> all names of that tensor
    tied: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if no tensor is missing, lost or of another shape."""
        return not (self.mismatched or self.misplaced)

    @property
    def misplaced(self) -> int:
        """Number of tensors that are missing, have no place or cannot be assembled."""
        return len(self.missing) + len(self.lost) + len(self.failed)

    def ties(self, names: tuple[str, str] | None) -> bool:
        return names is not None and names[1] in self.tied.get(names[0], ())


def assess(checkpoint: Checkpoint, data: Mapping[str, Any]) -> Assessment | Refusal:
    """Load meta tensors into the class built from a config, or return the class's refusal."""
    classes, tensors = checkpoint.classes, checkpoint.weights.tensors
    large = too_large(classes, data, tensors)
    model = build(classes, data) if large is None else TooLarge(large)
    if isinstance(model, Refusal):
        return model
    lists = (nn.ModuleList, nn.Sequential)
    modules = {name: isinstance(module, lists) for name, module in model.named_modules()}
    buffers = {name for name, _ in model.named_buffers()}
    tied = {name: frozenset(tie.names) for tie in ties_of(model) for name in tie.names}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        state = {
            name: torch.empty(tensor.shape, dtype=model.dtype, device="meta")
            for name, tensor in tensors.items()
        }
        with quiet_transformers(logging.CRITICAL):
            loaded = (_loaded_by_5 if MAJOR >= 5 else _loaded_by_4)(model, state)
    except Exception as error:  # Transformers' loading may raise anything
        return Assessment(failed={"": short(error) or type(error).__name__}, tied=tied)
    missing, unexpected, mismatched, failed, absent = loaded
    if MAJOR < 5:  # Transformers 5 casts them
        failed = {**failed, **_whole_numbers(model, tensors)}
    shapes = {name: shape for name, shape in expected.items() if name not in absent}
    prefix = model.base_model_prefix
    lost: list[str] = []
    unused: list[str] = []
    for name in sorted(unexpected):
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        if not buffers.intersection(names):
            (lost if any(_belongs(one, modules) for one in names) else unused).append(name)
    return Assessment(
        {**shapes, **mismatched},
        tuple(sorted(missing)),
        tuple(Mismatch(n, shape, expected[n]) for n, shape in sorted(mismatched.items())),
        {name: _last_line(text) for name, text in sorted(failed.items())},
        tuple(lost),
        tuple(unused),
        tied,
    )


def _belongs(name: str, modules: Mapping[str, bool]) -> bool:
    """True if a tensor is in a list of layers (True in ``modules``), or directly in a module."""
    parts = name.split(".")
    inside = any(modules.get(".".join(parts[:end])) for end in range(1, len(parts)))
    return inside or ".".join(parts[:-1]) in modules


# missing, unexpected, mismatched (with shapes) and failed (with reasons) tensors, and those of the
# model that the files lack
_Outcome = tuple[set[str], set[str], dict[str, tuple[int, ...]], dict[str, str], set[str]]


def _loaded_by_5(model: Any, state: dict[str, torch.Tensor]) -> _Outcome:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    conversions: Any = get_model_conversion_mapping(model, None, None)
    settings = LoadStateDictConfig(
        ignore_mismatched_sizes=True, device_map={"": "meta"}, weight_mapping=conversions
    )
    info, _ = convert_and_load_state_dict_in_model(model, state, settings)
    absent = set(info.missing_keys)
    model.mark_tied_weights_as_initialized(info)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    mismatched = {name: tuple(shape) for name, shape, _ in info.mismatched_keys}
    return info.missing_keys, info.unexpected_keys, mismatched, info.conversion_errors, absent


def _loaded_by_4(model: Any, state: dict[str, torch.Tensor]) -> _Outcome:
    """Call parts of Transformers 4's loading, because the whole would allocate memory."""
    from transformers import modeling_utils

    hf: Any = modeling_utils
    prefix = model.base_model_prefix
    has = bool(prefix) and any(name.startswith(prefix) for name in state)
    wants = bool(prefix) and hasattr(model, prefix)
    base, task = has and not wants, wants and not has
    name = type(model).__name__.lower()
    mapping = model._checkpoint_conversion_mapping if any(n in name for n in hf.VLMS) else None
    renamed = model._get_key_renaming_mapping(list(state), mapping, base, task)
    missing, unexpected = hf._find_missing_and_unexpected_keys(
        model, list(state), list(renamed.values()), base, None
    )
    names, shape_pairs = hf._find_mismatched_keys(model, state, None, True, renamed, False, True)
    mismatched = {name: tuple(shape) for name, (shape, _) in zip(names, shape_pairs, strict=True)}
    absent = set(model.state_dict()) - set(renamed.values())
    missing, unexpected = model._adjust_missing_and_unexpected_keys(missing, unexpected, task)
    return set(missing), set(unexpected), mismatched, {}, absent


def _whole_numbers(model: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Weights stored as integers -> why Transformers 4 fails on them."""
    prefix: Any = model.base_model_prefix
    dtypes = {
        key: tensors[key].dtype
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and (key := _stored(name, tensors, prefix)) is not None
    }
    return {
        name: f"its dtype is {dtype}, not a floating-point dtype"
        for name, dtype in dtypes.items()
        if dtype.startswith(("I", "U", "BOOL"))
    }


def _last_line(text: str) -> str:
    """The message of the exception in a traceback that Transformers keeps as text."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("Error: ")]
    return short((errors or lines or [""])[-1])


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's weights, with which it must be loaded."""
    # Transformers takes that of the first weight, which may be kept in float32 (BLIP-2's queries)
    sizes: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())


def differing_tie(checkpoint: Checkpoint, assessment: Assessment) -> tuple[str, str] | None:
    """Two names that the model ties, with different rows in the files, or ``None``."""
    tensors, prefix = checkpoint.weights.tensors, checkpoint.classes.model.base_model_prefix
    for group in dict.fromkeys(assessment.tied.values()):
        names = sorted(name for name in group if name in assessment.shapes)
        stored = [(name, _stored(name, tensors, prefix)) for name in names]
        located = [(name, key) for name, key in stored if key is not None]
        for (first, a), (second, b) in itertools.pairwise(located):
            if _differ(checkpoint.path, {a: tensors[a], b: tensors[b]}):
                return first, second
    return None


def _stored(name: str, tensors: Mapping[str, Stored], prefix: str) -> str | None:
    """The name in the files, with or without the base model's prefix, or ``None``."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _differ(folder: Path, pair: Mapping[str, Stored]) -> bool:
    """True if two safetensors tensors differ in their shape or in some rows."""
    first, *others = ((stored.dtype, stored.shape) for stored in pair.values())
    if any(other != first for other in others):
        return True
    rows = first[1][0] if first[1] else 0
    wanted = sorted({(rows - 1) * part // (_SAMPLES - 1) for part in range(_SAMPLES) if rows})
    try:
        with ExitStack() as stack:
            parts = [
                stack.enter_context(safe_open(folder / stored.file, framework="pt")).get_slice(name)
                for name, stored in pair.items()
            ]
            return any(not torch.equal(*(part[row : row + 1] for part in parts)) for row in wanted)
    except (OSError, RuntimeError, SafetensorError):  # such as a file that is too large to map
        return False
