"""Build a model class from a config, without weights.

A config goes through its JSON, as ``from_pretrained`` would read it, so a builder gives what a
reload will give.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ..errors import UnsupportedModelError, in_one_line
from .config_json import FieldPath, field_name
from .shapes import Shapes, named_modules, shapes
from .sharded import plain_class
from .shortage import note_shortage
from .surroundings import ONE_AT_A_TIME, no_log_lines, on_cpu, replaced, without_caches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_Made = TypeVar("_Made")
_MOST_MODULES = 150_000  # the largest models have 120,000, with 384 experts in 60 layers
_MOST_LAYERS = 10_000
_LARGEST = 2**28  # a dimension of a parameter; experiments count its units one by one
_KINDS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)
"""Mappings from config class to model class, in the order in which they are asked."""


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be; ``reason`` is in the class's own words, or in ours."""

    reason: str


class Builder:
    """Builds one model class from JSON configs, on the meta device.

    Args:
        model: the live model; its class, config class and dtype are used, its weights are not.
        options: arguments of the class's constructor beside the config.
        attention: the attention implementation that every config is given.
    """

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
        """Return a builder of the same class with another attention implementation."""
        other = copy.copy(self)
        other.attention = attention
        return other

    def of_class(self, model_class: type[PreTrainedModel]) -> Builder:
        """Return a builder of another class with the same config class, options and dtype."""
        other = copy.copy(self)
        other.model_class = model_class
        return other

    def config(self, data: dict[str, Any]) -> PreTrainedConfig:
        """Return the config that ``from_pretrained`` would read, with eager experts.

        Exceptions of the config class pass through.
        """
        decode = getattr(self.config_class, "_decode_special_floats", None)  # infinities
        values = (decode or dict)(copy.deepcopy(data))
        alone = _reads_values_alone(self.config_class) and not values.get("pruned_heads")
        config = self.config_class(**values) if alone else self.config_class.from_dict(values)
        config._attn_implementation = self.attention
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "eager"
        return config

    def build(self, data: dict[str, Any], buffers: bool = False) -> nn.Module | Refusal:
        """Build the class from a config's JSON.

        Args:
            data: the config as JSON.
            buffers: True to compute buffers on the CPU; parameters have no data all the same.

        Returns:
            The model in eval mode, or a refusal in the class's own words.
        """

        def make() -> nn.Module:
            config = self.config(data)
            if hasattr(type(config), "_experts_implementation"):
                config._experts_implementation = "batched_mm"  # its shapes need no routing
            model: nn.Module = self.model_class(config, **self.options)
            return model.train(False)

        if buffers:  # computed as a reload computes them, to the last bit
            return _constructed(make, _default_dtype(self.dtype), _EmptyOnMeta())
        built = _constructed(make, DefaultDtype(self.dtype), _OnMeta())
        if isinstance(built, Refusal) and "device" in built.reason:
            built = _constructed(make, DefaultDtype(self.dtype), _AllOnMeta())
        return built

    def initialised(self, data: dict[str, Any]) -> Refusal | None:
        """Return the refusal of a class to draw initial weights for a config's JSON, or ``None``.

        They are drawn on the meta device. Loading a folder runs the same code, and keeps the
        weights that it has.
        """
        return _constructed(lambda: _draw(self._plain(data)), _AllOnMeta(draws=True))

    def shapes_at(self, data: dict[str, Any]) -> Shapes | Refusal:
        """Return the shapes that the class builds from a config's JSON, or its refusal."""
        model = self.build(data)
        return model if isinstance(model, Refusal) else shapes(model)

    def build_unfilled(self, data: dict[str, Any]) -> nn.Module | Refusal:
        """Build the class in float64 without initial weights, or return its refusal.

        Parameters may have no data (a vision tower takes seconds to draw them), all buffers have.
        Where the class makes something of its parameters, it has initial weights.
        """
        model = _constructed(
            lambda: self._plain(data).double(), DefaultDtype(torch.float64), _EmptyOnMeta()
        )
        unfit = isinstance(model, Refusal) or _made_of_parameters(model)
        return self.build_real(data) if unfit else model

    def build_real(self, data: dict[str, Any]) -> nn.Module | Refusal:
        """Build the class with its initial weights in float64 on the CPU, or return its refusal."""
        return _constructed(
            lambda: self._plain(data).double(), DefaultDtype(torch.float64), initial_values=True
        )

    def _plain(self, data: dict[str, Any]) -> nn.Module:
        model: nn.Module = self.model_class(self.config(data), **self.options)
        return model.train(False)


def _reads_values_alone(config_class: type[PreTrainedConfig]) -> bool:
    """True if ``from_dict`` is Transformers' own: the constructor, and a log line.

    That line writes the whole config out, which takes a sixth of the time that a build takes.
    """
    holder = next(one for one in config_class.__mro__ if "from_dict" in vars(one))
    return holder.__module__ == "transformers.configuration_utils"


def _constructed(
    make: Callable[[], _Made], *places: AbstractContextManager[Any], initial_values: bool = False
) -> _Made | Refusal:
    """Return what is made while :func:`_construction` is open, or the class's refusal."""
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
    """Draw initial weights of every module by the model that it is in; constructors skip meta."""
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
    """Build a model class from a config on the meta device, in the config's dtype.

    ``max_modules``: how many modules it may have; building one with 10^9 layers would not end.
    ``than``: what that is far more than.

    Returns:
        The model in eval mode, or a refusal in the class's own words.
    """
    wanted = getattr(config, "dtype", None)
    dtype = wanted if isinstance(wanted, torch.dtype) else torch.float32

    def make() -> PreTrainedModel:
        model: PreTrainedModel = model_class(copy.deepcopy(config))
        model.tie_weights()  # construction without initial values skips it
        model.train(False)
        return model

    limit = _limited(max_modules, f"far more than {than}")
    return _constructed(make, DefaultDtype(dtype), _AllOnMeta(), limit)


def module_of(
    source: nn.Module | PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> nn.Module:
    """Return a module as it is, or a config's class built without weights.

    ``model_class``: the class to build from a config; None for the one it belongs to.

    Raises:
        UnsupportedModelError: no class belongs to the config, or the class refuses it.
    """
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
            f"{built.reason.rstrip('.')}. Mend the config, or say which class: model_class=."
        )
    return built


def too_many_layers(data: Mapping[str, Any], path: FieldPath = ()) -> str | None:
    """Return why a config, as JSON, has more layers than any model; ``None``: it has not."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            reason = too_many_layers(value, (*path, key))
            if reason is not None:
                return reason
        elif key == "num_hidden_layers" and isinstance(value, int) and value > _MOST_LAYERS:
            name = field_name((*path, key))
            return f"{name} says {value:,}, and no model has more than {_MOST_LAYERS:,} layers"
    return None


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a config belongs to: the one it names, or the auto classes' choice.

    Raises:
        UnsupportedModelError: no class of the installed Transformers belongs to the config.
    """
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
        f"(architectures: {getattr(config, 'architectures', None)}). Say which: model_class=."
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


_OF_FLOATS = {
    getattr(torch, name)
    for name in (
        *("empty", "empty_strided", "empty_permuted", "zeros", "ones", "rand", "randn", "eye"),
        *("linspace", "logspace", "bartlett_window", "blackman_window", "hamming_window"),
        *("hann_window", "kaiser_window"),
    )
} | {torch.fft.fftfreq, torch.fft.rfftfreq}
"""Functions whose results are of the default dtype, where no other is asked for."""
_BY_VALUES = {
    getattr(torch, name)
    for name in ("arange", "as_tensor", "asarray", "full", "range", "scalar_tensor", "tensor")
}
"""Functions whose results are of the default dtype if an argument is a ``float``."""
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double}


class DefaultDtype(TorchFunctionMode):
    """While open, ``dtype`` is what this thread's new floating point tensors are of by default.

    What torch computes of whole numbers and numbers of Python's (a quotient, a mask times the
    least number of a dtype) is computed with the whole numbers converted to ``dtype``, as torch
    converts them to its default: in torch's own default it could overflow.
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
            condition, *values = args  # where torch's own default would overflow, it raises
            return func(condition, *(torch.as_tensor(v, dtype=self.dtype) for v in values))
        output = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if default is self.dtype or not isinstance(output, Tensor) or output.dtype is not default:
            return output
        if func in _CASTS or _holds(given, _says_dtype):  # that dtype is asked for
            return output
        args = self._converted(args)
        output = func(*args, **{name: self._converted(value) for name, value in kwargs.items()})
        return output.to(self.dtype) if output.dtype is default else output

    def _converted(self, value: Any) -> Any:
        """Return a value with its tensors of whole numbers in the dtype."""
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
    """True for a dtype, and for a tensor that has one which is no kind of whole number."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, torch.dtype)


_FILLS = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
}
"""Functions that give a tensor values, and return it."""


class _AllOnMeta(DeviceContext):
    """The meta device for this thread's new tensors; ``torch.device`` tells all threads of it.

    Functions that give tensors initial values do nothing, which saves a third of the time, unless
    ``draws`` is True: a class may refuse what it should draw.
    """

    def __init__(self, draws: bool = False) -> None:
        super().__init__(torch.device("meta"))
        self._draws = draws

    def __enter__(self) -> Any:
        # above another device, which the caller has set
        return TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        TorchFunctionMode.__exit__(self, *exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._draws and (tensor := _without_values(func, args, kwargs)) is not None:
            return tensor
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def _without_values(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the tensor on meta that a function would fill; ``None``: it does something else."""
    filled: Any = None
    if func in _FILLS:
        filled = args[0] if args else kwargs["tensor"]  # by name, in ``nn.init``
    return filled if filled is not None and filled.is_meta else None


class _OnMeta(_AllOnMeta):
    """The meta device, but for single whole numbers: those on the CPU work with any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and args and type(args[0]) is int and _is_whole(kwargs):
            return func(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


def _is_whole(options: Any) -> bool:
    dtype = (options or {}).get("dtype")
    return dtype is None or not dtype.is_floating_point


class _EmptyOnMeta(TorchFunctionMode):
    """Puts ``torch.empty`` (parameters without values) on meta; computed tensors stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif (tensor := _without_values(func, args, kwargs)) is not None:
            return tensor
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for all threads, if it is another, as ``from_pretrained`` does.

    Results in half precision depend on where torch rounds; only torch itself rounds alike.
    """
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
    """Construct as ``from_pretrained`` does: without initial values or log lines.

    Nothing that is computed while this is open stays in the caches of classes, and no tensor is one
    of ``inference_mode``.

    Args:
        places: modes that say where tensors go, and of which dtype they are.
        initial_values: draw them, and let gradients be computed.
    """
    from transformers import PreTrainedModel

    rng = torch.random.get_rng_state()
    with ExitStack() as stack:
        stack.callback(torch.random.set_rng_state, rng)
        surroundings = [torch.inference_mode(False), on_cpu(), without_caches()]
        surroundings.append(no_log_lines(logging.CRITICAL + 1))
        if not initial_values:
            # it would tie weights too; models inside of models draw theirs, so that it is the class
            nothing = replaced(PreTrainedModel, "init_weights", lambda model: None)
            surroundings += [torch.no_grad(), nothing]
        for surrounding in (*surroundings, *places):
            stack.enter_context(surrounding)
        yield
