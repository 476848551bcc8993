"""Build a model class from a config, without weights, and compare it with the live model.

Everything goes through the config's JSON, as ``from_pretrained`` would read it, so what is built
here is what a reload will build.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors

from .dry_run import KnownShapes
from .leaves import copied_leaves
from .versions import no_init_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FieldPath = tuple[str | int, ...]
"""Where a value stands in a config's JSON: ``("text_config", "hidden_size")``."""

attention_of: dict[type, str] = {}
"""Classes whose eager attention computes no numbers, and the one that does."""

_BUILD_LOCK = threading.RLock()


def field_name(path: FieldPath) -> str:
    """The way people write a field: ``text_config.hidden_size``, ``depths[0]``."""
    return "".join(
        f"[{key}]" if isinstance(key, int) else ("." if i else "") + key
        for i, key in enumerate(path)
    )


@dataclass(frozen=True)
class Refusal:
    """A class or its config did not accept the values; ``reason`` is in its own words."""

    reason: str


def config_json(config: PreTrainedConfig, use_diff: bool = True) -> dict[str, Any]:
    """The config as ``save_pretrained`` writes it (``use_diff``), or with every default."""
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    return result


def with_values(data: dict[str, Any], values: dict[FieldPath, int | None]) -> dict[str, Any]:
    """A copy of a config's JSON with some fields set; missing parents are made."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        node: Any = result
        for key in path[:-1]:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
        node[path[-1]] = value
    return result


class Builder:
    """Builds one model class from JSON configs, on the meta device.

    Args:
        model: the live model; its class, config class and dtype are used, its weights are not.
        options: what the class's constructor is given beside the config.
    """

    def __init__(self, model: PreTrainedModel, options: Mapping[str, Any] | None = None):
        self.model_class = type(model)
        self.config_class = type(model.config)
        self.options = dict(options or {})
        self.dtype = model.dtype if model.dtype.is_floating_point else torch.float32

    def config(self, data: dict[str, Any]) -> PreTrainedConfig:
        """The config that ``from_pretrained`` would read; what the class raises passes through."""
        decode = getattr(self.config_class, "_decode_special_floats", None)  # infinities
        values = copy.deepcopy(data)
        config = self.config_class.from_dict(decode(values) if decode is not None else values)
        config._attn_implementation = attention_of.get(self.model_class, "eager")
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "eager"
        return config

    def build(self, data: dict[str, Any], buffers: bool = False) -> nn.Module | Refusal:
        """Build the class from a config's JSON.

        Args:
            data: the config as JSON.
            buffers: compute buffers for real (on the CPU), keep parameters without data.

        Returns:
            The model in eval mode, or the class's own words where it refuses the config.
        """
        text = ""
        for place in (_EmptyOnMeta(),) if buffers else (_OnMeta(), torch.device("meta")):
            try:
                with _construction(self.dtype, place):
                    config = self.config(data)
                    if hasattr(type(config), "_experts_implementation"):
                        config._experts_implementation = "batched_mm"  # its shapes need no routing
                    model: nn.Module = self.model_class(config, **self.options)
                    return model.train(False)
            except Exception as error:  # a class may refuse with any exception
                text = " ".join(str(error).split()) or type(error).__name__
            if "device" not in text:
                break
        return Refusal(text.removeprefix("Class validation error for validator "))

    def build_real(self, data: dict[str, Any]) -> nn.Module | Refusal:
        """Build the class with its initial weights, in float64 on the CPU."""
        try:
            with _construction(torch.float64, None):
                model: nn.Module = self.model_class(self.config(data), **self.options)
                return model.double().train(False)
        except Exception as error:  # as in build
            return Refusal(" ".join(str(error).split()) or type(error).__name__)


def without_data(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel | Refusal:
    """A model class built from a config on the meta device, in the config's dtype."""
    wanted = getattr(config, "dtype", None)
    dtype = wanted if isinstance(wanted, torch.dtype) else torch.float32
    try:
        with _construction(dtype, torch.device("meta")):
            model: PreTrainedModel = model_class(copy.deepcopy(config))
            model.tie_weights()  # construction without initialising leaves it out
            model.train(False)
            return model
    except Exception as error:  # as in Builder.build
        return Refusal(" ".join(str(error).split()) or type(error).__name__)


class _OnMeta(DeviceContext):
    """The meta device, without torch's long ways there: most operations are shaped in Python."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self._constructors = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.arange and all(type(arg) is int for arg in args):
            options = dict(kwargs or {})
            start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
            if options.keys() <= {"dtype", "device"} and args and (end - start) * step >= 0:
                options["dtype"] = options.get("dtype") or torch.int64
                return torch.empty(-((start - end) // step), **{"device": "meta", **options})
        if func is torch.tensor and type(args[0]) is int and _is_whole(kwargs):
            return func(*args, **kwargs or {})  # a number goes with any device
        if func in _FILLS and args[0].is_meta and not any(map(torch.is_tensor, args[1:])):
            return args[0]
        if func not in self._constructors and getattr(func, "__name__", "") not in _CHEAP:
            with KnownShapes():  # type: ignore[no-untyped-call]
                return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


_FILLS = {
    getattr(torch.Tensor, f"{name}_")
    for name in ("add", "clamp", "clip", "div", "erfinv", "fill", "mul", "normal", "sub", "uniform")
}
"""How values are made in place (timm's initial weights): no shape changes."""
_CHEAP = {"__get__", "__set__", "_set_grad_enabled", "detach", "dim", "requires_grad_", "size"}
"""What asks for no shape."""


def _is_whole(options: Any) -> bool:
    dtype = (options or {}).get("dtype")
    return dtype is None or not dtype.is_floating_point


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` (parameters without values) goes to meta; computed tensors stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _construction(dtype: torch.dtype, place: Any) -> Iterator[None]:
    """The surroundings in which ``from_pretrained`` constructs: dtype, no init, no log lines.

    ``place``: where tensors go; ``None``: everything is computed.
    """
    import logging

    logger = logging.getLogger("transformers")
    with _BUILD_LOCK:
        default, level = torch.get_default_dtype(), logger.level
        rng = torch.random.get_rng_state()
        try:
            logger.setLevel(logging.CRITICAL)
            torch.set_default_dtype(dtype)
            if place is None:
                yield
                return
            leaves = copied_leaves() if isinstance(place, _OnMeta) else nullcontext()
            with torch.no_grad(), no_init_weights(), _short_configs(), leaves, place:
                yield
        finally:
            torch.set_default_dtype(default)
            torch.random.set_rng_state(rng)
            logger.setLevel(level)


@contextmanager
def _short_configs() -> Iterator[None]:
    """Configs say their class alone: log lines that nobody sees spell them out at great length."""
    from transformers import PretrainedConfig

    spelled_out = PretrainedConfig.__repr__
    try:
        PretrainedConfig.__repr__ = lambda self: type(self).__name__  # type: ignore[method-assign]
        yield
    finally:
        PretrainedConfig.__repr__ = spelled_out  # type: ignore[method-assign]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and saved buffer, tied ones under each of their names."""
    result: dict[str, tuple[int, ...]] = {}
    buffers: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                result[prefix + name] = tuple(parameter.shape)
        hidden = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items() if id(module) not in seen else ():
            if buffer is not None and name not in hidden:
                buffers[prefix + name] = tuple(buffer.shape)
        seen.add(id(module))
    return result | buffers


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, as torch orders them, several times as fast."""
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        children = [
            (f"{name}.{key}" if name else key, child)
            for key, child in module._modules.items()
            if child is not None
        ]
        waiting += reversed(children)


def vanished_counts(old: nn.Module, new: nn.Module) -> list[str]:
    """Whole-number attributes that are above 0 in one build of a class and 0 in another.

    A field that sets no shape did not follow: DeepSeek's ``num_key_value_groups`` is heads over
    ``num_key_value_heads``, which its latent attention does not use for any weight.
    """
    before = dict(old.named_modules())
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in new.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and value == 0
        for was in [vars(before[name]).get(key) if name in before else None]
        if type(was) is int and was > 0
    ]


@dataclass(frozen=True)
class Mismatch:
    """One tensor whose shape the config does not give."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.name}: found {list(self.found)}, but the config builds no such tensor"
        return f"{self.name}: found {list(self.found)}, the config builds {list(self.expected)}"


def listed(mismatches: Sequence[Mismatch]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
    return "; ".join(str(mismatch) for mismatch in mismatches[:3]) + more


def compare(
    live: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]]
) -> Sequence[Mismatch]:
    """Every live tensor that the built model lacks or has in another shape."""
    return [
        Mismatch(name, shape, built.get(name))
        for name, shape in live.items()
        if built.get(name) != shape
    ]
