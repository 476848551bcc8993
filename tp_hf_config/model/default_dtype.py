"""Another default dtype in one thread: ``torch.set_default_dtype`` holds for all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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

    What torch computes of whole numbers alone (their quotient) is computed in torch's own default
    dtype, and then converted.
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
        output = func(*args, **kwargs)
        default = torch.get_default_dtype()
        if default is self.dtype or not isinstance(output, Tensor) or output.dtype is not default:
            return output
        asked_for = func in _CASTS or _holds(given, _says_dtype)
        return output if asked_for else output.to(self.dtype)


def _holds(values: Iterable[Any], wanted: Callable[[Any], bool]) -> bool:
    """True if one of some values is wanted, or one in a list among them."""
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
