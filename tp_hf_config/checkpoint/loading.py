"""Let Transformers itself decide, from shapes alone, which tensor of a checkpoint goes where.

The code of ``from_pretrained`` handles a checkpoint's keys here too (prefixes, renamed and fused
tensors, ties, keys that a class ignores), on tensors without data.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from ..model.shapes import Mismatch
from ..model.surroundings import quiet_transformers
from .headers import Stored
from .words import short

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

MAJOR = int(version("transformers").partition(".")[0])


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that most of a model's weights have, with which it has to be loaded.

    Transformers takes that of the first weight, which a class may keep in float32 (BLIP-2's
    queries).
    """
    sizes: Counter[torch.dtype] = Counter()
    for weight in model.parameters():
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.get_default_dtype())


@dataclass(frozen=True)
class LoadResult:
    """How a checkpoint's tensors load into a model.

    Attributes:
        shapes: name -> the shape in the checkpoint, for each tensor of the model that it has.
        missing: tensors of the model that would be newly initialised.
        unexpected: tensors of the checkpoint without a place in the model, named as in the model.
        mismatched: tensors in another shape than the model's.
        failed: name -> the reason, for tensors that cannot be put together from the checkpoint's;
            the name is empty where loading failed as a whole.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)


def load_shapes(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> LoadResult:
    """Load tensors without data into a model without data.

    ``model``: the model on the meta device; it cannot be used afterwards.

    Returns:
        How the tensors load. If Transformers raises, only ``failed`` is set.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        state = {
            name: torch.empty(tensor.shape, dtype=model.dtype, device="meta")
            for name, tensor in tensors.items()
        }
        with quiet_transformers(logging.CRITICAL):
            result = (_loaded_by_5 if MAJOR >= 5 else _loaded_by_4)(model, state)
    except Exception as error:  # Transformers' loading may raise anything
        return LoadResult(failed={"": short(error) or type(error).__name__})
    missing, unexpected, mismatched, failed, absent = result
    if MAJOR < 5:  # Transformers 5 casts them
        failed = {**failed, **_whole_numbers(model, tensors)}
    shapes = {name: shape for name, shape in expected.items() if name not in absent}
    shapes.update(mismatched)
    return LoadResult(
        shapes,
        tuple(sorted(missing)),
        tuple(sorted(unexpected)),
        tuple(Mismatch(n, shape, expected[n]) for n, shape in sorted(mismatched.items())),
        {name: _last_line(text) for name, text in sorted(failed.items())},
    )


_Outcome = tuple[set[str], set[str], dict[str, tuple[int, ...]], dict[str, str], set[str]]
"""Missing, unexpected, mismatched and failed tensors, and the model's that the files lack."""


def _loaded_by_5(model: Any, state: dict[str, torch.Tensor]) -> _Outcome:
    """Return how Transformers 5 loads the tensors: see :data:`_Outcome`."""
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
    """Return how Transformers 4 loads the tensors: see :data:`_Outcome`.

    Its loading cannot be run without allocating memory, so its parts are called here.
    """
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


def _whole_numbers(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Return the weights stored as integers, with the reason why Transformers 4 fails on them."""
    whole = ("I", "U", "BOOL", "int", "uint", "bool")
    floating = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    return {
        name: f"its type is {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in floating and tensor.dtype.startswith(whole)
    }


def _last_line(text: str) -> str:
    """Return the exception's message in the text that Transformers keeps, without the traceback."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("Error: ")]
    return short((errors or lines or [""])[-1])
