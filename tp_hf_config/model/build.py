"""Build a model class from a config, without weights.

Configs pass through JSON, as in ``from_pretrained``, so a build has the shapes of a reload.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ..errors import UnsupportedModelError, in_one_line
from .config_json import field_name, plain_fields
from .shapes import Shapes, named_modules, shapes
from .sharded import plain_class
from .surroundings import (
    ONE_AT_A_TIME,
    no_log_lines,
    note_shortage,
    on_cpu,
    replaced,
    without_caches,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_Made = TypeVar("_Made")
_MOST_MODULES = 150_000  # the largest models have 120,000, with 384 experts in 60 layers
_MOST_LAYERS = 10_000
_LARGEST = 2**28  # a dimension of a parameter; experiments count its units one by one
_KINDS = (  # config class -> model class, asked in this order
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


@dataclass(frozen=True)
class Refusal:
    """Why something is impossible, in the words of the model class or in ours."""

    reason: str


class Builder:
    """Builds one model class from JSON configs; ``options``: the constructor's other arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        options: Mapping[str, Any] | None = None,
        attention: str = "eager",
    ):
        self.model_class: type[PreTrainedModel] = plain_class(type(model))
        self.config_class = type(model.config)
        self.options = dict(options or {})
        self.attention = attention
        self.dtype = model.dtype if model.dtype.is_floating_point else torch.float32

    def with_attention(self, attention: str) -> Builder:
        other = copy.copy(self)
        other.attention = attention
        return other

    def of_class(self, model_class: type[PreTrainedModel]) -> Builder:
        other = copy.copy(self)
        other.model_class = model_class
        return other

    def config(self, data: dict[str, Any], experts: str = "eager") -> PreTrainedConfig:
        """The config that ``from_pretrained`` would read; raises its errors."""
        decode = getattr(self.config_class, "_decode_special_floats", None)  # infinities
        values = (decode or dict)(copy.deepcopy(data))
        # from_dict logs the whole config, which takes a sixth of the time of a build
        alone = _reads_values_alone(self.config_class) and not values.get("pruned_heads")
        config = self.config_class(**values) if alone else self.config_class.from_dict(values)
        config._attn_implementation = self.attention
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = experts
        return config

    def build(self, data: dict[str, Any], buffers: bool = False) -> nn.Module | Refusal:
        """Build the class in eval mode; ``buffers`` computes buffers on the CPU."""
        # the shapes in a forward pass of these experts do not depend on routing
        make = partial(self._plain, data, "batched_mm")
        if buffers:  # computed as a reload computes them, to the last bit
            return _constructed(make, _default_dtype(self.dtype), _EmptyOnMeta())
        built = _constructed(make, DefaultDtype(self.dtype), _OnMeta())
        if isinstance(built, Refusal) and "device" in built.reason:
            built = _constructed(make, DefaultDtype(self.dtype), _AllOnMeta())
        return built

    def initialised(self, data: dict[str, Any]) -> Refusal | None:
        """Return why the class refuses to draw initial weights, as loading a folder does."""
        return _constructed(lambda: _draw(self._plain(data)), _AllOnMeta(draws=True))

    def shapes_at(self, data: dict[str, Any]) -> Shapes | Refusal:
        model = self.build(data)
        return model if isinstance(model, Refusal) else shapes(model)

    def build_unfilled(self, data: dict[str, Any]) -> nn.Module | Refusal:
        """Build in float64; parameters have values only if the class computes tensors from them."""
        # drawing the parameters of a vision tower takes seconds
        model = _constructed(
            lambda: self._plain(data).double(), DefaultDtype(torch.float64), _EmptyOnMeta()
        )
        unfit = isinstance(model, Refusal) or _made_of_parameters(model)
        return self.build_real(data) if unfit else model

    def build_real(self, data: dict[str, Any]) -> nn.Module | Refusal:
        return _constructed(
            lambda: self._plain(data).double(), DefaultDtype(torch.float64), initial_values=True
        )

    def _plain(self, data: dict[str, Any], experts: str = "eager") -> nn.Module:
        model: nn.Module = self.model_class(self.config(data, experts), **self.options)
        return model.train(False)


def _reads_values_alone(config_class: type[PreTrainedConfig]) -> bool:
    holder = next(one for one in config_class.__mro__ if "from_dict" in vars(one))
    return holder.__module__ == "transformers.configuration_utils"


def _constructed(
    make: Callable[[], _Made], *places: AbstractContextManager[Any], initial_values: bool = False
) -> _Made | Refusal:
    try:
        with _construction(*places, initial_values=initial_values):
            return make()
    except Exception as error:  # a class may refuse with any exception
        note_shortage(error)
        return Refusal(in_one_line(error).removeprefix("Class validation error for validator "))


def _made_of_parameters(model: nn.Module) -> bool:
    kept = (value for _, module in named_modules(model) for value in vars(module).values())
    held = (*model.buffers(), *(value for value in kept if isinstance(value, Tensor)))
    return any(value.is_meta for value in held)


def _draw(model: Any) -> None:
    """Call ``_init_weights`` of the model around each module; constructors skip it on meta."""
    waiting = [(model, model)]
    while waiting:
        module, owner = waiting.pop()
        owner = module if hasattr(module, "_init_weights") else owner
        owner._init_weights(module)
        waiting += [(child, owner) for child in module.children()]


def without_data(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    max_modules: int = _MOST_MODULES,
    than: str = "any model has",
) -> PreTrainedModel | Refusal:
    """Build a model class in eval mode on the meta device, in the config's dtype."""
    wanted = getattr(config, "dtype", None)
    dtype = wanted if isinstance(wanted, torch.dtype) else torch.float32

    def make() -> PreTrainedModel:
        model: PreTrainedModel = model_class(copy.deepcopy(config))
        model.tie_weights()  # construction without initial values skips it
        model.train(False)
        return model

    # a build with 10^9 layers would never finish
    limit = _limited(max_modules, f"far more than {than}")
    return _constructed(make, DefaultDtype(dtype), _AllOnMeta(), limit)


def module_of(
    source: nn.Module | PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> nn.Module:
    """Return a module as it is, or build a config's class without weights."""
    if isinstance(source, nn.Module):
        return source
    target = class_of(source) if model_class is None else model_class
    reason = too_many_layers(source.to_dict())
    built = without_data(target, source) if reason is None else Refusal(reason)
    for name, shape in () if isinstance(built, Refusal) else shapes(built).items():
        if max(shape, default=0) > _LARGEST:
            built = Refusal(f"{name} would be {list(shape)}, larger than in any model")
            break
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{target.__name__} cannot be built from this {type(source).__name__}: "
            f"{built.reason.rstrip('.')}. Correct the config, or pass the class: model_class=."
        )
    return built


def too_many_layers(data: Mapping[str, Any]) -> str | None:
    """Why a config's JSON has more layers than any model, or ``None``."""
    for path, value in plain_fields(data):
        if path[-1] == "num_hidden_layers" and isinstance(value, int) and value > _MOST_LAYERS:
            name = field_name(path)
            return f"{name} says {value:,}, and no model has more than {_MOST_LAYERS:,} layers"
    return None


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a config names in ``architectures``, or that an auto class loads."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type):
            return named
    for kind in _KINDS:
        mapping: Any = getattr(transformers, kind)
        if type(config) in mapping:
            entry: Any = mapping[type(config)]
            return entry[0] if isinstance(entry, (list, tuple)) else entry  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"no class of transformers {transformers.__version__} belongs to {type(config).__name__} "
        f"(architectures: {getattr(config, 'architectures', None)}). Pass the class: model_class=."
    )


@contextmanager
def _limited(max_modules: int, why: str) -> Iterator[None]:
    count = 0
    own = threading.get_ident()

    def counted(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() != own:
            return
        count += 1
        if count > max_modules:
            raise ValueError(f"it asks for more than {max_modules:,} modules, {why}")

    with register_module_module_registration_hook(counted):
        yield


_OF_FLOATS = {  # their results have the default dtype, unless another is given
    getattr(torch, name)
    for name in (
        *("empty", "empty_strided", "empty_permuted", "zeros", "ones", "rand", "randn", "eye"),
        *("linspace", "logspace", "bartlett_window", "blackman_window", "hamming_window"),
        *("hann_window", "kaiser_window"),
    )
} | {torch.fft.fftfreq, torch.fft.rfftfreq}
_BY_VALUES = {  # their results have the default dtype if an argument is a Python float
    getattr(torch, name)
    for name in ("arange", "as_tensor", "asarray", "full", "range", "scalar_tensor", "tensor")
}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double}


class DefaultDtype(TorchFunctionMode):
    """While open, new floating point tensors of this thread have ``dtype`` by default.

    If torch computes floats from integer tensors and Python numbers (a quotient, a mask times the
    smallest number of a dtype), the integers are converted to ``dtype`` first, as torch converts
    them to its own default, where the result could overflow.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        given = (*args, *kwargs.values())
        if func in _OF_FLOATS or (func in _BY_VALUES and _holds(given, _is_float)):
            if kwargs.get("dtype") is None and kwargs.get("out") is None:
                kwargs["dtype"] = self.dtype
            return func(*args, **kwargs)
        if func is torch.where and _holds(given, _is_float) and not _holds(given, _says_dtype):
            condition, *values = args  # torch raises if its own default overflows
            return func(condition, *(torch.as_tensor(v, dtype=self.dtype) for v in values))
        output = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if default is self.dtype or not isinstance(output, Tensor) or output.dtype is not default:
            return output
        if func in _CASTS or _holds(given, _says_dtype):  # that dtype was requested
            return output
        args = self._converted(args)
        output = func(*args, **{name: self._converted(value) for name, value in kwargs.items()})
        return output.to(self.dtype) if output.dtype is default else output

    def _converted(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._converted, value))
        return value.to(self.dtype) if isinstance(value, Tensor) else value


def _holds(values: Iterable[Any], wanted: Callable[[Any], bool]) -> bool:
    return any(
        _holds(value, wanted) if isinstance(value, (list, tuple)) else wanted(value)
        for value in values
    )


def _is_float(value: Any) -> bool:
    return type(value) is float


def _says_dtype(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, torch.dtype)


_FILLS = {  # they fill a tensor in place and return it
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
}


class _AllOnMeta(DeviceContext):
    """Creates this thread's tensors on the meta device; ``torch.device`` affects all threads."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__(torch.device("meta"))
        self._draws = draws

    def __enter__(self) -> Any:
        # on top of the stack, above a device that the caller has set
        return TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        TorchFunctionMode.__exit__(self, *exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # skipping initial values saves a third of the time; a class may refuse to draw them
        if not self._draws and (tensor := _without_values(func, args, kwargs)) is not None:
            return tensor
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _without_values(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The meta tensor that a call would fill; ``None`` for any other call."""
    if func not in _FILLS:
        return None
    filled: Tensor = args[0] if args else kwargs["tensor"]  # by name, in ``nn.init``
    return filled if filled.is_meta else None


class _OnMeta(_AllOnMeta):
    """Like ``_AllOnMeta``, but single integers are on the CPU: they combine with any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and args and type(args[0]) is int:
            dtype = (kwargs or {}).get("dtype")
            if dtype is None or not dtype.is_floating_point:
                return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


class _EmptyOnMeta(TorchFunctionMode):
    """Puts ``torch.empty`` (parameters) on the meta device; computed tensors have values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif (tensor := _without_values(func, args, kwargs)) is not None:
            return tensor
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for all threads, so that half precision rounds as in a reload."""
    with ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def _construction(
    *places: AbstractContextManager[Any], initial_values: bool = False
) -> Iterator[None]:
    """Construct as ``from_pretrained`` does: without initial values and log lines.

    The caches of classes are not used, and no tensor is an ``inference_mode`` tensor. ``places``
    are modes that set device and dtype. ``initial_values`` draws weights and computes gradients.
    """
    from transformers import PreTrainedModel

    rng = torch.random.get_rng_state()
    with ExitStack() as stack:
        stack.callback(torch.random.set_rng_state, rng)
        surroundings = [torch.inference_mode(False), on_cpu(), without_caches()]
        surroundings.append(no_log_lines(logging.CRITICAL + 1))
        if not initial_values:
            # on the class, since inner models call it too; it would also tie weights
            nothing = replaced(PreTrainedModel, "init_weights", lambda model: None)
            surroundings += [torch.no_grad(), nothing]
        for surrounding in (*surroundings, *places):
            stack.enter_context(surrounding)
        yield
