"""Compare what two runs of models computed: the same bits, or how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .reports import Difference, RoundtripReport


def compared(
    what: str,
    model: str,
    reference: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    against: str,
) -> RoundtripReport:
    """Return the report on outputs, with their differences from reference outputs.

    Outputs without one finite number are not taken for the same.
    """
    names = tuple(dict.fromkeys((*reference, *outputs)))
    differences = tuple(
        difference
        for name in names
        for difference in _difference(name, reference.get(name), outputs.get(name))
    )
    ours = tuple(not_finite(outputs))
    theirs = (line for line in not_finite(reference) if line not in ours)
    notes = (*ours, *(f"{line} in {against}" for line in theirs))
    same = bool(names) and not differences and not notes
    numbers = sum(tensor.numel() for tensor in reference.values())
    return RoundtripReport(what, model, same, (), names, differences, None, against, notes, numbers)


def not_finite(outputs: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield a line for each output that has numbers of which none is finite."""
    for name, tensor in outputs.items():
        if tensor.numel() and not bool(tensor.isfinite().any()):
            yield f"every number of {name} is NaN or infinite"


def _difference(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> Iterator[Difference]:
    """Yield how two tensors differ, if they do; ``None`` differs from any tensor.

    Of floating types that differ, the numbers are compared.

    ``a``: the reference.
    """
    if a is None or b is None or not _comparable(a, b):
        count = max(tensor.numel() for tensor in (a, b) if tensor is not None)
        yield Difference(name, count, count)
        return
    dtypes = None
    if a.dtype != b.dtype:
        dtypes = str(b.dtype).removeprefix("torch."), str(a.dtype).removeprefix("torch.")
        a, b = a.double(), b.double()
    unequal = (a != b) & ~((a != a) & (b != b))  # NaN equals NaN here
    if dtypes is not None or bool(unequal.any()):
        x, y = a.double(), b.double()
        largest = _largest((x - y)[unequal])
        scale = _largest(x[x.isfinite()]) or 1.0
        count = int(unequal.sum())
        yield Difference(name, count, a.numel(), largest, largest / scale, dtypes)


def _comparable(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors are of one shape, and of one type or floating types."""
    floating = a.is_floating_point() and b.is_floating_point()
    return a.shape == b.shape and (a.dtype == b.dtype or floating)


def _largest(numbers: torch.Tensor) -> float:
    """Return the largest absolute value; 0 if there is none."""
    return float(numbers.abs().max()) if numbers.numel() else 0.0
