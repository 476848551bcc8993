"""How a model is run and let generate, alike before saving and after loading; needs torch alone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NEW_TOKENS = 4
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_COMPILING = "is_torchdynamo_compiling"
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Precise(TorchFunctionMode):
    """Everything is computed in float64, where a class would go down to float32 as well.

    Caches of classes are passed over, as where torch compiles: nothing of it may stay in them.
    """

    def __enter__(self) -> Any:
        self._caches = sys.modules.get("transformers.pytorch_utils", SimpleNamespace())
        self._compiling = getattr(self._caches, _COMPILING, None)
        setattr(self._caches, _COMPILING, lambda: True)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        setattr(self._caches, _COMPILING, self._compiling)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        args = [torch.float64 if _is_low(one) else one for one in args]
        named = {k: torch.float64 if _is_low(v) else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


def _is_low(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _LOW


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in what a model returns, caches left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if "past" not in str(key) and "cache" not in str(key):
                yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What a forward pass returns, with the same random numbers whenever it draws some."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return list(tensors_in(model(**copied(inputs))))


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that a forward pass may write to."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def generated(model: Any, inputs: Mapping[str, Any], cache: bool) -> list[Tensor] | None:
    """Greedy tokens and the scores behind each; ``None``: the class does not generate so."""
    if not model.can_generate():
        return None
    given = {k: v for k, v in copied(inputs).items() if k not in ("use_cache", "decoder_input_ids")}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            made = model.generate(
                **given,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return [made.sequences, *made.logits]
    except Exception:  # it takes other arguments, or has no cache of this kind
        return None


def prepare(model: Any) -> Any:
    """Experts one by one, evaluation, weights aligned in memory as fresh ones are."""
    for module in model.modules():
        if getattr(module, "_can_set_experts_implementation", bool)():
            module.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy, without the history of what a forward pass left in the model."""
    values = [value for module in model.modules() for value in vars(module).values()]
    left = [one for one in values if isinstance(one, Tensor) and not one.is_leaf]
    return copy.deepcopy(model, {id(one): one.detach().clone() for one in left})


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating point buffers that are saved with the weights."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
        and buffer.is_floating_point()
        and key not in module._non_persistent_buffers_set
    }
