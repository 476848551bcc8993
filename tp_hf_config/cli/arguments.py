"""Define the arguments that several commands share, and parse their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..pipeline.source import Source

_Value = TypeVar("_Value")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


class UsageError(Exception):
    """The arguments contradict each other; the command prints its usage and exits with code 2."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and ``--trust-remote-code``."""
    parser.add_argument(
        "model", metavar="MODEL", type=place, help="a folder, a GGUF file or a Hub id"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files that come with the model"
    )


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add a model folder and ``--trust-remote-code``."""
    parser.add_argument(
        "folder", metavar="FOLDER", type=path, help="holds config.json and the weights"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the folder's own code, if it has any"
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the folder to write, and ``--overwrite``."""
    parser.add_argument(
        "--out", metavar="DIR", type=path, required=True, help="the folder to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is there, in the end"
    )


def check_model(options: argparse.Namespace) -> None:
    """Raise if there is no such model."""
    from ..pipeline.source import check_reachable, find_source

    check_reachable(find_source(options.model, options.trust_remote_code))


def read_config(options: argparse.Namespace) -> tuple[Source, PreTrainedConfig, Any]:
    """Return where the model is, its config and its class."""
    from ..pipeline.source import class_for, config_of, find_source

    source = find_source(options.model, options.trust_remote_code)
    config = config_of(source)
    return source, config, class_for(source, config)


def add_widths(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what to prune and how much, the arguments of ``tp_hf_config.plan``; return the group."""
    group = parser.add_argument_group("what to prune")
    group.add_argument(
        "--pruning-ratio", metavar="R", type=share, help="the share of every width to prune"
    )
    group.add_argument(
        "--prune",
        metavar="FIELDS",
        type=names,
        help="config fields to prune, with commas between; default: those that --ratios "
        "names, else the inner widths of feed-forward layers and experts; of a class without them, "
        "every width inside the model except heads, head dims and numbers of experts",
    )
    group.add_argument(
        "--ratios", metavar="FIELD=R,...", type=ratios, help="a share for each field"
    )
    group.add_argument(
        "--head-pruning-ratio",
        metavar="R",
        type=share,
        help="the share of attention heads to prune",
    )
    group.add_argument(
        "--gqa",
        choices=("query", "group"),
        help="query heads out of every key/value group, or whole groups",
    )
    group.add_argument(
        "--layers",
        choices=("uniform", "differ"),
        help="differ: each layer may get widths of its own, as --ranking, --allocate or --ratios "
        "per_layer_config.3.FIELD=0.5 leave them; default: uniform",
    )
    group.add_argument(
        "--target-params",
        metavar="N",
        type=amount,
        help="how many parameters to leave (100M), or which share of them (0.8)",
    )
    group.add_argument("--steps", metavar="N", type=count, default=1, help="pruning steps")
    group.add_argument(
        "--round-to", metavar="N", type=count, help="keep widths multiples of this (64)"
    )
    group.add_argument(
        "--max-pruning-ratio", metavar="R", type=share, help="the most that any layer may lose"
    )
    return group


def widths_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return keyword arguments for ``tp_hf_config.plan``; leave out what the user did not give.

    There are none if layers are dropped and no width is pruned.

    Raises:
        UsageError: the user did not say how much to prune, or an argument would have no effect.
    """
    reason = _contradiction(options)
    if reason is not None:
        raise UsageError(reason)
    if getattr(options, "drop_layers", None) is not None and names_no_width(options):
        return {}
    no_widths = (options.pruning_ratio, options.ratios, options.target_params) == (None, None, None)
    given = {
        "pruning_ratio": options.pruning_ratio,
        "ratios": options.ratios,
        "prune": () if no_widths else options.prune,
        "head_pruning_ratio": options.head_pruning_ratio,
        "gqa": options.gqa,
        "iterative_steps": options.steps,
        "round_to": options.round_to,
        "max_pruning_ratio": options.max_pruning_ratio,
        "target_params": options.target_params,
        "layers": "differ" if options.layers == "differ" else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _contradiction(options: argparse.Namespace) -> str | None:
    """Return why the arguments do not fit together, or ``None``."""
    ratio, ratios, prune = options.pruning_ratio, options.ratios, options.prune
    target, heads = options.target_params, options.head_pruning_ratio
    depth = getattr(options, "drop_layers", None)
    if depth is None and names_no_width(options):
        return (
            "say how much to prune: --pruning-ratio 0.2, --ratios FIELD=0.2, "
            "--head-pruning-ratio 0.25 or --target-params 0.8"
        )
    if names_no_width(options) and options.layers == "differ":
        return (
            "--layers differ says that widths may differ, not how much goes: add --pruning-ratio "
            "0.2, or leave it out"
        )
    if names_no_width(options) and (of_widths := _of_widths(options)):
        return (
            f"{of_widths[0]} says how widths are pruned, not how much goes: add "
            "--pruning-ratio 0.2, or leave it out"
        )
    if ratio is not None and target is not None:
        return "--target-params finds the ratio by itself: leave --pruning-ratio out"
    if options.gqa is not None and heads is None and target is None:
        return "--gqa says which heads go, not how many: add --head-pruning-ratio 0.25"
    if ratio is not None and ratios and prune is None:
        return (
            "with --ratios, --pruning-ratio is for other fields: name them all in --prune, or "
            "leave it out"
        )
    without = [name for name in prune or () if name not in (ratios or {})]
    if without and ratio is None and target is None:
        return f"which share of {', '.join(without)}? Add --pruning-ratio 0.2"
    return None


def _of_widths(options: argparse.Namespace) -> list[str]:
    """Return the arguments that were given and have an effect only where widths are pruned."""
    given = {
        "--steps": options.steps > 1,
        "--round-to": options.round_to is not None,
        "--max-pruning-ratio": options.max_pruning_ratio is not None,
    }
    return [name for name, is_given in given.items() if is_given]


def names_no_width(options: argparse.Namespace) -> bool:
    """True if no argument says how much of any width to prune."""
    given = (options.pruning_ratio, options.ratios, options.target_params)
    return all(value is None for value in (*given, options.head_pruning_ratio))


def place(text: str) -> str:
    """Return a path or name unchanged; refuse an empty one (from an unset shell variable)."""
    if not text.strip():
        raise _wrong(text, "a folder, a file or a name")
    return text


def path(text: str) -> Path:
    """Parse a path; shells do not write ``~`` out behind ``=``."""
    try:
        return Path(place(text)).expanduser()
    except RuntimeError:
        raise _wrong(text, "a path; there is no such home folder") from None


def share(text: str) -> float:
    """Parse a share above 0 and below 1: ``0.2``, ``1/5``, ``20%``."""
    digits = text.removesuffix("%")
    try:
        number = Fraction(digits) if "/" in digits else float(digits)
        if 0 < number <= 100:  # Fraction writes 1e999999999 out, digit by digit
            number = Fraction(digits) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise _wrong(text, "a share such as 0.2, 1/5 or 20%") from None
    if number == 0:
        raise argparse.ArgumentTypeError("0 prunes nothing: expected a share such as 0.2")
    if not 0 < number < 1:
        raise _wrong(text, "a share between 0 and 1")
    return float(number)


def names(text: str) -> tuple[str, ...]:
    """Parse config fields with commas between them."""
    fields = tuple(name.strip() for name in text.split(","))
    if not all(fields):
        raise _wrong(text, "config fields with commas between: hidden_size,intermediate_size")
    return fields


def ratios(text: str) -> dict[str, float]:
    """Parse a share for each config field: ``hidden_size=0.1,intermediate_size=0.3``."""
    return _by_field(text, share, "hidden_size=0.1,intermediate_size=0.3")


def sizes(text: str) -> dict[str, int]:
    """Parse a size for each config field: ``num_attention_heads=4,head_dim=64``."""
    return _by_field(text, count, "num_attention_heads=4,head_dim=64")


def _by_field(text: str, parse: Callable[[str], _Value], expected: str) -> dict[str, _Value]:
    """Parse a value for each config field.

    Args:
        text: fields and values, with commas between them.
        parse: parses a value.
        expected: an example.
    """
    values: dict[str, _Value] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise _wrong(text, expected)
        if name.strip() in values:
            raise _wrong(text, f"one value for every field, found two for {name.strip()}")
        values[name.strip()] = parse(value.strip())
    return values


def amount(text: str) -> float:
    """Parse a number of parameters or a share of them: ``100M``, ``1.5B``, ``0.8``, ``80%``."""
    if text.endswith("%"):
        return share(text)
    unit = _UNITS.get(text[-1:].lower(), 1)
    digits = text[:-1] if unit > 1 else text
    try:
        rounded = float(digits) * unit
        if not 0 < rounded < float("inf"):
            raise _wrong(text, "a number above 0")
        number = Fraction(digits) * unit
    except ValueError:
        raise _wrong(text, "a number of parameters (100M), or a share of them (0.8)") from None
    if number == 1 or (number > 1 and number % 1):
        raise _wrong(text, "a whole number of parameters (100M), or a share of them below 1 (0.8)")
    return float(number)


def count(text: str) -> int:
    """Parse a whole number, 1 or more."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a whole number, 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise _wrong(text, f"a whole number, {least} or more")
    return int(text)


def _wrong(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
