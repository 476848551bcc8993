"""Compare a model that lost layers with what it computed while these passed on their inputs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.passes import undisturbed
from ..errors import ConfigSyncError, in_one_line
from ..forward.find_recipe import find_recipe
from ..forward.inputs import example_inputs, text_inputs
from ..forward.layer_passes import Argument, handed_on, without_layers
from ..forward.observed_pass import AllFloat64
from ..forward.output_tensors import unmasked
from ..model.build import Refusal
from ..model.config_json import config_nodes
from ..model.shortage import raise_shortage
from ..model.surroundings import quiet_transformers, same_random_state

_TWO_TOKENS: dict[str, Any] = {
    "use_cache": True,
    "do_sample": False,
    "min_new_tokens": 2,
    "max_new_tokens": 2,
    "pad_token_id": 0,
}
_TOLERANCE = 16  # times the dtype's epsilon: the same operations, in the same order


class OutputsWithout:
    """What a whole model computes on small inputs while some of its layers pass on theirs.

    Args:
        model: the live model, with all its layers.
        full: its class built from its config without data.
        layers: the list of layers.
        dropped: the numbers of those that pass on what they are given.

    Raises:
        ConfigSyncError: a layer gives out another shape than it is given.
    """

    def __init__(
        self, model: nn.Module, full: nn.Module, layers: Sequence[nn.Module], dropped: Sequence[int]
    ):
        self._model: Any = model
        self._total = len(layers)
        self._inputs = _small_inputs(model, full)
        with handed_on(layers) as handed:
            self._whole = self._run()
            text = text_inputs(model) if isinstance(self._whole, Refusal) else None
            if text is not None:  # a config may say sizes with which no image fits the text
                self._inputs = text
                self._whole = self._run()
        self._expected = self._run([layers[number] for number in dropped], handed)
        self._generated = self._cannot_generate() is None
        self._ran = self._cannot_run() is None

    def _run(
        self, passing: Sequence[nn.Module] = (), handed: Mapping[int, Argument] | None = None
    ) -> dict[str, Tensor] | Refusal:
        """Return the outputs by name while some layers pass on what they are given."""
        if isinstance(self._inputs, Refusal):
            return self._inputs
        try:
            dtypes = {parameter.dtype for parameter in self._model.parameters()}
            # what a class casts to float32 as it runs may not meet weights in float64
            precision = AllFloat64() if torch.float64 in dtypes else nullcontext()
            with undisturbed(self._model), precision, without_layers(passing, handed) as impossible:
                result = self._model(**self._inputs)
        except Exception as error:  # a class that the library cannot feed may raise anything
            raise_shortage(error)
            return Refusal(in_one_line(error))
        if impossible:
            raise ConfigSyncError(
                f"{impossible[0]}, a layer to drop, does not give out what it is given in the same "
                "shape, so the model cannot do without it. Nothing was changed."
            )
        return dict(tensors_by_name(result, self._total))

    def _cannot_generate(self) -> Refusal | None:
        """Return why the model generates no token with a cache; ``None`` if it does."""
        if not getattr(self._model, "can_generate", bool)():
            return Refusal("it generates nothing")
        return self._error_of(functools.partial(self._model.generate, **_TWO_TOKENS), "decoder")

    def _cannot_run(self) -> Refusal | None:
        """Return why the model fails with the cache that it makes by default; ``None``: it runs."""
        configs = [config for _, config in config_nodes(self._model.config)]
        if not any(getattr(config, "use_cache", False) for config in configs):
            return Refusal("it makes none")
        return self._error_of(functools.partial(self._model, use_cache=True))

    def _error_of(self, call: Callable[..., Any], *left_out: str) -> Refusal | None:
        """Return why a call fails on the inputs that say nothing of a cache; ``None``: it works.

        ``left_out``: beginnings of the names of other inputs that it does not take.
        """
        if isinstance(self._inputs, Refusal):
            return self._inputs
        given = {k: v for k, v in self._inputs.items() if not k.startswith((*left_out, "use_"))}
        try:
            with undisturbed(self._model), quiet_transformers(logging.CRITICAL):
                call(**given)
        except Exception as error:  # as in a forward pass
            raise_shortage(error)
            return Refusal(in_one_line(error))
        return None

    def notes(self) -> Iterator[str]:
        """Yield a note if the model generated with a cache, and no longer does."""
        refusal = self._cannot_generate() if self._generated else None
        if refusal is not None:
            yield (
                "it no longer generates with a cache, as the class makes one for other layers "
                f"({refusal.reason}): pass use_cache=False, or drop as many layers of its other "
                "list"
            )

    def compare(self, layers: str) -> str:
        """Return what was compared, in words, now that the layers are gone.

        ``layers``: the name of the list of layers.

        Raises:
            ConfigSyncError: the model computes something else now.
        """
        expected, now = self._expected, self._run()
        if isinstance(expected, Refusal):
            return f"outputs were not compared, as small inputs were not found: {expected.reason}"
        if isinstance(now, Refusal):
            raise ConfigSyncError(
                f"{type(self._model).__name__} does not run without these layers of {layers}: "
                f"{now.reason}. Nothing was changed."
            )
        failure = self._cannot_run() if self._ran else None
        if failure is not None:
            raise ConfigSyncError(
                f"{type(self._model).__name__} without these layers of {layers} fails with the "
                f"cache that it makes by default: {failure.reason.rstrip('.')}. Keep one layer of "
                "each kind. Nothing was changed."
            )
        for key, value in expected.items():
            error = _relative_error(value, now.get(key))
            if not error <= _TOLERANCE * torch.finfo(value.dtype).eps:
                raise ConfigSyncError(
                    f"{type(self._model).__name__} without these layers of {layers} computes "
                    "something else than with them passing on what they are given: "
                    f"{key} differs by {error:.1e}. Something behind them depends on their place. "
                    "Drop other layers, such as the last ones. Nothing was changed."
                )
        whole = {} if isinstance(self._whole, Refusal) else self._whole
        if all(key in whole and torch.equal(whole[key], v) for key, v in expected.items()):
            return "it computes what it did, as no output on small inputs depends on these layers"
        return "it computes what it did with the dropped layers passing on what they are given"


def _small_inputs(model: nn.Module, full: nn.Module) -> dict[str, Any] | Refusal:
    """Return small inputs for a model, or why there are none."""
    try:
        with torch.no_grad(), same_random_state():
            return example_inputs(model, find_recipe(full))
    except Exception as error:  # it runs parts of the model
        raise_shortage(error)
        return Refusal(in_one_line(error))


def tensors_by_name(output: Any, layers: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating point tensors of an output by name; of several, each by its place.

    ``layers``: how many layers there are; a tuple that may have a part for each (hidden states,
    attentions) is left out.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        yield name or "output", output.detach().clone()
    elif isinstance(output, Mapping):
        for key, item in output.items():
            if not (isinstance(item, tuple) and 0 <= len(item) - layers <= 1):
                yield from tensors_by_name(item, layers, ".".join(filter(None, (name, str(key)))))
    elif isinstance(output, (tuple, list)):
        for place, item in enumerate(output):
            yield from tensors_by_name(item, layers, f"{name}[{place}]")


def _relative_error(before: Tensor, after: Tensor | None) -> float:
    """Return how far two outputs are apart, relative to the first; infinite for another shape."""
    if after is None or after.shape != before.shape:
        return float("inf")
    before, after = (torch.nan_to_num(unmasked(value.double())) for value in (before, after))
    return float((after - before).norm()) / (float(before.norm()) or 1.0)
