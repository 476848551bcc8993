"""Check the arguments of public functions by their annotations, before anything else."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

Count = int  # integer >= 1
Share = float  # from 0 to 1
Positive = float  # above 0

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class _Wrong:
    """A value that is not what was expected."""

    found: Any
    expected: str
    error: type[Exception] = TypeError  # ValueError if only the type is right
    place: str = ""  # position in the argument: "[0]"


_Kind = Callable[[Any], Any]  # takes a value; returns it converted, or :class:`_Wrong`


def check_arguments(function: _Function) -> _Function:
    """Decorate a function to check its arguments by their annotations.

    It then raises ``TypeError`` for a wrong type and ``ValueError`` for a wrong value. Numbers of
    NumPy and torch become Python's; lists become tuples.
    """
    parameters = inspect.signature(function).parameters
    kinds = {
        name: _kind_of(ast.parse(parameter.annotation, mode="eval").body, function)
        for name, parameter in parameters.items()
        if isinstance(parameter.annotation, str) and parameter.kind is not parameter.VAR_KEYWORD
    }

    @wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False))
        taken = taken_by(with_checks, {**given, **kwargs})
        args = (*(taken[name] for name in given), *args[len(given) :])
        return function(*args, **{name: taken[name] for name in kwargs})

    with_checks.kinds = kinds  # type: ignore[attr-defined]
    return cast(_Function, with_checks)


def taken_by(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments converted as by :func:`check_arguments`; unknown ones are unchanged."""
    kinds = function.kinds
    return {
        name: _taken(name, value, kinds[name]) if name in kinds else value
        for name, value in arguments.items()
    }


def check(name: str, value: Any, annotation: str) -> None:
    """Raise as :func:`check_arguments` does if a value does not fit ``annotation``."""
    _taken(name, value, _kind_of(ast.parse(annotation, mode="eval").body))


def _taken(name: str, value: Any, kind: _Kind) -> Any:
    result = kind(value)
    if isinstance(result, _Wrong):
        found = f"{name}{result.place}={_shown(result.found)}"
        raise result.error(f"{found}: expected {result.expected}{_advice(result)}")
    return result


def _kind_of(node: ast.expr, function: Any = None) -> _Kind:
    """Return the check for an annotation; an unknown one accepts any value."""
    if isinstance(node, ast.BinOp):
        kinds = [_kind_of(part, function) for part in _alternatives(node)]
        return lambda value: _one_of(kinds, value)
    if isinstance(node, ast.Constant):
        return lambda value: None if value is None else _Wrong(value, "None")
    whole = node.value if isinstance(node, ast.Subscript) else node
    name = ast.unparse(whole).rpartition(".")[2]
    if name in ("Mapping", "Sequence", "Iterable") and isinstance(node, ast.Subscript):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        example = _EXAMPLES.get(ast.unparse(inside[-1]), "...")
        first, last = _kind_of(inside[0]), _kind_of(inside[-1])
        return _dict_of(first, last, example) if name == "Mapping" else _list_of(last, example)
    choices = getattr(function, "__globals__", {}).get(name)
    if get_origin(choices) is Literal:
        return _word_of(get_args(choices))
    return _KINDS.get(name, lambda value: value)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if not isinstance(node, ast.BinOp):
        return [node]
    parts = [*_alternatives(node.left), *_alternatives(node.right)]
    texts = ast.unparse(node)
    # a str next to a path is a path
    return [part for part in parts if "PathLike" not in texts or ast.unparse(part) != "str"]


def _one_of(kinds: Sequence[_Kind], value: Any) -> Any:
    wrong = []
    for kind in kinds:
        result = kind(value)
        if not isinstance(result, _Wrong):
            return result
        wrong.append(result)
    for result in wrong:
        if result.place:
            return result
    error = ValueError if ValueError in {result.error for result in wrong} else TypeError
    return _Wrong(value, " or ".join(result.expected for result in wrong), error)


def _dict_of(keys: _Kind, values: _Kind, example: str) -> _Kind:
    def take(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _Wrong(value, f"a dict such as {{'name': {example}}}")
        taken = {key: values(given) for key, given in value.items()}
        for key, result in taken.items():
            if isinstance(keys(key), _Wrong):
                return replace(keys(key), place=" (a key)")
            if isinstance(result, _Wrong):
                return replace(result, place=f"[{_shown(key)}]{result.place}")
        return value if example == "..." else taken

    return take


def _list_of(kind: _Kind, example: str) -> _Kind:
    def take(value: Any) -> Any:
        single = isinstance(value, (str, bytes, Mapping, type)) or getattr(value, "ndim", 1) == 0
        if single or not isinstance(value, Iterable):
            return _Wrong(value, f"a list such as [{example}]")
        if example == "...":
            return value
        items = tuple(map(kind, value))
        wrong = [n for n, item in enumerate(items) if isinstance(item, _Wrong)]
        return replace(items[wrong[0]], place=f"[{wrong[0]}]") if wrong else items

    return take


def _word_of(words: tuple[str, ...]) -> _Kind:
    expected = " or ".join(map(repr, words))
    return lambda value: value if value in words else _Wrong(value, expected, ValueError)


def _scalar(value: Any) -> Any:
    """Convert a number of NumPy or torch to Python's; return anything else unchanged."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _number(expected: str, least: float | None, most: float | None = None) -> _Kind:
    """Return the check for numbers in a range; integers if ``expected`` says "whole"."""
    kind: Any = Integral if "whole" in expected else Real

    def take(given: Any) -> Any:
        value = _scalar(given)
        if isinstance(value, bool) or not isinstance(value, kind):
            return _Wrong(given, expected)
        finite = isinstance(value, Integral) or math.isfinite(value)
        fits = finite and (least is None or value >= least) and (most is None or value <= most)
        return value if fits else _Wrong(given, expected, ValueError)

    return take


def _bool(given: Any) -> Any:
    value = _scalar(given)
    return value if isinstance(value, bool) else _Wrong(given, "True or False")


def _is_a(cls: Any, *names: str) -> bool:
    """True if a class or a base has one of these names, so that nothing is imported."""
    return any(base.__name__ in names for base in cls.__mro__)


def _that(expected: str, fits: Callable[[Any], bool]) -> _Kind:
    return lambda value: value if fits(value) else _Wrong(value, expected)


def _instance(expected: str, *names: str) -> _Kind:
    return _that(expected, lambda value: _is_a(type(value), *names))


def _function(expected: str) -> _Kind:
    def fits(value: Any) -> bool:
        return callable(value) and not isinstance(value, type) and not _is_a(type(value), "Module")

    return _that(expected, fits)


def _is_data(value: Any) -> bool:
    other = isinstance(value, (bytes, type)) or _is_a(type(value), "Module")
    return value is None or (isinstance(value, Iterable) and not other)


def _path(value: Any) -> Any:
    if not isinstance(value, (str, PathLike)):
        return _Wrong(value, _PATH)
    return value if str(value) else _Wrong(value, _PATH, ValueError)


_TEXT, _PATH = "a text", "the path of a folder or a file"
_MODEL = "a Hugging Face model (or a module that contains one)"
_SMALLEST = math.ulp(0.0)
_NUMBER = r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*"
# the checks, by the last part of an annotation's name
_KINDS: dict[str, _Kind] = {
    "bool": _bool,
    "int": _number("a whole number", None),
    "Count": _number("a whole number, 1 or more", 1),
    "float": _number("a number", None),
    "Share": _number("a share between 0 and 1", 0, 1),
    "Positive": _number("a number above 0", _SMALLEST),
    "str": _instance(_TEXT, "str"),
    "PathLike": _path,
    "Module": _instance(_MODEL, "Module"),
    "PreTrainedConfig": _instance("a config", "PreTrainedConfig", "PretrainedConfig"),
    "type": _that(
        "a class such as transformers.LlamaForCausalLM",
        lambda value: isinstance(value, type) and _is_a(value, "PreTrainedModel"),
    ),
    "Calibration": _instance("what calibrate(model) returns", "Calibration"),
    "CutList": _instance("a CutList (hook.cuts)", "CutList"),
    "Optimizer": _that(
        "an optimizer of torch",
        lambda value: _is_a(type(value), "Optimizer") or hasattr(value, "optimizer"),  # wraps one
    ),
    "Pruner": _instance("a pruner of Torch-Pruning", "BasePruner"),
    "PreTrainedTokenizerBase": _function("a tokenizer (AutoTokenizer.from_pretrained(folder))"),
    "MakeInputs": _function("a function of a config that returns a dict of inputs"),
    "Scheduler": _function("a function of the final ratio and the number of steps"),
    "Shard": _function("a function of a module, which makes your fully_shard calls"),
    "Callable": _function("a function"),
    "Data": _that("batches (a list, a DataLoader) or texts", _is_data),
}
_EXAMPLES = {"int": "2", "Count": "2", "Share": "0.2", "str": "'hidden_size'"}


def _shown(value: Any) -> str:
    """Return a value as text for a message; a model would fill pages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, (str, bytes, Real, PathLike, type(None), list, tuple, dict))
    text = repr(value) if plain or hasattr(value, "ndim") else ""
    return text if 0 < len(text) <= _SHOWN else f"a {type(value).__name__}"


def _advice(wrong: _Wrong) -> str:
    """Return what to type instead, to append to a message; or ``""``."""
    value, expected = _scalar(wrong.found), wrong.expected
    if expected.startswith(_MODEL):
        if isinstance(value, type):
            return f". Load one: {value.__name__}.from_pretrained(folder)"
        parts = getattr(value, "__dict__", {}).items()
        if held := [name for name, part in parts if _is_a(type(part), "Module")]:
            return f". Pass what it holds: its .{held[0]}"
        if isinstance(value, (str, PathLike)):
            return ". Load it first, with from_pretrained of its class (AutoModelForCausalLM, ...)"
    elif isinstance(value, type):
        return f". Pass an object: {value.__name__}(...)"
    elif expected.startswith(_PATH) and _is_a(type(value), "Module"):
        return ". Save it first: model.save_pretrained(folder)"
    elif expected.startswith("a list") and isinstance(value, Integral):
        return f". Write [{value}]"
    elif expected.startswith(("a number", "a whole number", "a share")):
        if isinstance(value, str) and re.fullmatch(_NUMBER, value):
            return f". Write {value}, without quotes"
        if "share" in expected and isinstance(value, (int, float)) and 1 < value <= 100:
            return f" ({value:g} % is {value / 100:g})"
        if isinstance(value, float) and value.is_integer() and wrong.error is TypeError:
            return f". Write {value:.0f}"
    return ""
