"""Parse the values of options, and find options that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar

import typer

UsageError: Any = typer.BadParameter.__base__  # click's; new versions have a copy of click
_Value = TypeVar("_Value")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
# options that say how much of a width to prune
_AMOUNTS = {"pruning_ratio", "ratios", "target_params", "head_pruning_ratio"}
# options that tp_hf_config.plan takes unchanged
_OF_WIDTHS = (*_AMOUNTS, "prune", "gqa", "round_to", "target", "max_pruning_ratio")
_NEED_AMOUNT = {"per_layer", "ranking", "steps", "round_to", "target", "max_pruning_ratio"}
_ALLOCATED = {"pruning_ratio", "ratios", "head_pruning_ratio", "gqa", "max_pruning_ratio"}
_ALLOCATED |= {"ranking", "no_refit"}


def place(text: str) -> str:
    """Refuse an empty path or model name (an unset $VARIABLE)."""
    if not text.strip():
        raise _wrong(text, "a folder, a file or a name")
    return text


def path(text: str) -> Path:
    """Parse a path; shells do not expand ``~`` after ``=``."""
    try:
        return Path(place(text)).expanduser()
    except RuntimeError:
        raise _wrong(text, "a path; this home folder does not exist") from None


def calibration(text: str) -> Path | Literal["own"]:
    """Parse the path of a text file, or the word ``own``; a file of this name is ``./own``."""
    return "own" if text == "own" else path(text)


def share(text: str) -> float:
    """Parse a share above 0 and below 1: ``0.2``, ``1/5``, ``20%``."""
    above, _, below = text.removesuffix("%").partition("/")
    try:  # Decimal parses 1e999999999 quickly
        number = float(Decimal(above) / Decimal(below or 1) / (100 if text.endswith("%") else 1))
    except ArithmeticError:
        raise _wrong(text, "a share such as 0.2, 1/5 or 20%") from None
    if not 0 < number < 1:
        raise _wrong(text, "a share between 0 and 1")
    return number


def amount(text: str) -> float:
    """Parse a number of parameters or a share of them: ``100M``, ``1.5B``, ``0.8``, ``80%``."""
    if text.endswith("%"):
        return share(text)
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        number = float(Decimal(text[:-1] if unit > 1 else text) * unit)
    except ArithmeticError:
        number = 0.0
    if not (0 < number < 1 or (number > 1 and number.is_integer())):
        raise _wrong(text, "a whole number of parameters (100M), or a share of them (0.8)")
    return number


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise _wrong(text, "a whole number, 1 or more")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    fields = tuple(name.strip() for name in text.split(","))
    if not all(fields):
        raise _wrong(text, "config fields separated by commas: hidden_size,intermediate_size")
    return fields


def ratios(text: str) -> dict[str, float]:
    return _by_field(text, share, "hidden_size=0.1,intermediate_size=0.3")


def sizes(text: str) -> dict[str, int]:
    return _by_field(text, count, "num_attention_heads=4,head_dim=64")


def _by_field(text: str, parse: Callable[[str], _Value], example: str) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not value:
            raise _wrong(text, example)
        if name in values:
            raise _wrong(text, f"one value for every field, found two for {name}")
        values[name] = parse(value)
    return values


def layers(text: str) -> tuple[str | None, int]:
    """Parse how many layers to drop, and from which list of layers: ``2``, ``decoder=2``."""
    name, _, number = text.rpartition("=")
    return name.strip() or None, count(number.strip())


def file_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMG]B", text.upper()):
        raise _wrong(text, "a size such as 500MB or 5GB")
    return text.upper()


def _wrong(text: str, expected: str) -> typer.BadParameter:
    return typer.BadParameter(f"{text!r}: expected {expected}")


def widths_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``tp_hf_config.plan``; none if only layers are dropped."""
    unset = {"steps": 1, "ranking": "local"}
    given = {k: v for k, v in options.items() if v not in (None, False, unset.get(k))}
    for message in _contradictions(given):
        raise UsageError(message)
    amounts = given.keys() & _AMOUNTS
    if not amounts:
        return {}
    widths = {name: given[name] for name in _OF_WIDTHS if name in given}
    if amounts == {"head_pruning_ratio"}:
        widths["prune"] = ()
    if "per_layer" in given or "allocate" in given:
        widths["per_layer"] = True
    return {**widths, "iterative_steps": options["steps"]}


def _contradictions(given: Mapping[str, Any]) -> Iterator[str]:
    ratio, target = "pruning_ratio" in given, "target_params" in given
    ratios, fields = given.get("ratios", {}), given.get("prune", ())
    without = ", ".join(field for field in fields if field not in ratios)
    if "allocate" in given:
        for name in sorted(given.keys() & _ALLOCATED):
            yield f"--allocate finds each width and refits the weights: leave {_typed(name)} out"
        if not target:
            yield "--allocate needs the size to reach: add --target-params 0.8"
    elif "ranking" in given and target:
        yield (
            "--ranking gives each layer its own ratio, but --target-params finds one for all "
            "layers: use --pruning-ratio 0.2 instead"
        )
    if not given.keys() & _AMOUNTS:
        no_effect = sorted(_typed(name) for name in given.keys() & _NEED_AMOUNT)
        if no_effect or "drop_layers" not in given:
            yield (
                "say how much to prune: --pruning-ratio 0.2, --ratios FIELD=0.2, "
                "--head-pruning-ratio 0.25 or --target-params 0.8"
                + "".join(f"; or leave {option} out" for option in no_effect)
            )
    if "round_to" in given and "target" in given:
        yield "--for and --round-to both say what widths are multiples of: leave one out"
    if ratio and target:
        yield "--target-params finds the ratio by itself: leave --pruning-ratio out"
    if "gqa" in given and not target and "head_pruning_ratio" not in given:
        yield "--gqa says which heads to prune, not how many: add --head-pruning-ratio 0.25"
    if ratio and ratios and not fields:
        yield (
            "--pruning-ratio applies to fields that are not in --ratios: name all fields in "
            "--prune, or leave --pruning-ratio out"
        )
    if without and not (ratio or target):
        yield f"no ratio is given for {without}: add --pruning-ratio 0.2"


def _typed(name: str) -> str:
    return "--for" if name == "target" else f"--{name.replace('_', '-')}"
