"""How a random model is fed and filled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from random import Random
from typing import Any

import torch
from generation import outputs_of, saved_buffers
from torch import Tensor, nn

from tp_hf_config.forward.inputs import input_forms, second_sample, text_inputs
from tp_hf_config.forward.run_recipe import RunRecipe

_FORMS = 6
_PLAIN_TEXT = {"input_ids", "decoder_input_ids", "use_cache"}


def first_inputs(model: nn.Module, recipe: RunRecipe) -> dict[str, Any] | None:
    """The first inputs of two samples with which a model runs; ``None``: there are none."""
    forms = chain(islice(input_forms(model, recipe), _FORMS), [text_inputs(model)])
    for form in forms:
        if form is None:
            continue
        inputs = {k: _double(v) for k, v in second_sample(form).items()}
        try:
            outputs_of(model, inputs)
        except Exception:  # whatever a class's forward pass raises
            continue
        return inputs
    return None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def with_other_text(rng: Random, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Random tokens, more of them and some masked, where a model takes text alone and runs so."""
    if not inputs.keys() <= _PLAIN_TEXT or not all(
        inputs[name].ndim == 2 for name in inputs.keys() - {"use_cache"}
    ):
        return inputs
    highest = min(int(value.max()) for k, value in inputs.items() if k != "use_cache")
    vocabulary = model.get_input_embeddings()  # type: ignore[operator]
    size = getattr(vocabulary, "num_embeddings", highest + 1)
    special = {v for k, v in _numbers(model.config) if "token" in k}  # type: ignore[union-attr]
    plain = [n for n in range(3, size) if n not in special]
    if len(plain) < 4:
        return inputs
    for length in (rng.randint(9, 40), rng.randint(5, 8)):
        tried = dict(inputs)
        for name in inputs.keys() - {"use_cache"}:
            ids = [[rng.choice(plain) for _ in range(length)] for _ in range(2)]
            tried[name] = torch.tensor(ids)
        try:
            if all(bool(torch.isfinite(one).all()) for one in outputs_of(model, tried)):
                return tried
        except Exception:  # too long for its positions, say
            continue
    return inputs


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    for key, value in config.to_dict().items():
        if type(value) is int:
            yield key, value


def fill(model: nn.Module, seed: int) -> None:
    """Random weights, none of them twice in one tensor, exact in float32 as some classes load."""
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)
            if name in unsaved or not parameter.numel():
                continue
            values = _spread(parameter.shape, generator)
            if parameter.ndim > 1:
                values = values / max(1.0, _fan_in(parameter)) ** 0.5
            else:
                values = parameter + 0.3 * values
            parameter.copy_(values.float())
        for buffer in saved_buffers(model).values():
            values = torch.special.ndtr(_spread(buffer.shape, generator))  # variances stay above 0
            buffer.copy_((buffer * (1 + 0.1 * values) + 0.3 * values).float())


def _fan_in(parameter: Tensor) -> float:
    per_row = parameter[0].numel() if parameter.ndim > 2 else parameter.shape[-1]
    return float(parameter.shape[-1] if parameter.ndim == 3 else per_row)


def _spread(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers that are spread like normal ones, each another."""
    count = shape.numel()
    order = torch.randperm(count, generator=generator).double()
    return torch.special.ndtri((order + 0.5) / count).view(shape)
