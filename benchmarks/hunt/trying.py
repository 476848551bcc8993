"""One random config in a process of its own: drawn, built, pruned, compared, saved."""

from __future__ import annotations

import copy
import json
import os
import resource
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from configs import base_of, drawn_from
from feeding import fill, first_inputs, with_other_text
from generation import generated, outputs_of, prepare
from layered import check_dropped, copied_for, differing_settings, lists_of_layers, some_layers
from oracle import WrongError, compare
from pairs import Pair
from torch import Tensor, nn

from tp_hf_config.fieldmap.learn_field_map import map_of

RESULT, CASE = "result.json", "case.pt"
_AGREE = 1e-4
_DRAWS = 3
"""So many configs are drawn at most until one loads as it was saved."""
_ROUND = (2, 4, 8)
_STEPS = (1, 1, 2, 3)
_LAYERED = 0.5
"""The share of configs whose layers are dropped, and made to differ."""
_LISTS = 2
"""The most lists of one model of which layers are dropped."""


@dataclass(frozen=True)
class Mode:
    """How a copy of the model is pruned.

    Attributes:
        name: what is asked for.
        asked: settings of the hook; by default it prunes inner widths.
        settings: of the pruner; none: it is not pruned.
        dropped: the layers that are dropped before, by the name of their list.
    """

    name: str
    asked: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """What is asked for, as text where it is no data."""
        said = {
            **self.asked,
            **self.settings,
            **({"dropped": self.dropped} if self.dropped else {}),
        }
        ignored = said.pop("ignored_layers", None)
        return said if ignored is None else {**said, "ignored_layers": len(ignored)}


class Row:
    """What is known of one config so far, always on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: dict[str, Any] = {"stage": "class", "why": "it did not end", "modes": []}
        self.note()

    def note(self, **news: Any) -> None:
        """Write what is new."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.said.update(news, cpu=round(used.ru_utime + used.ru_stime, 1))
        (self.folder / RESULT).write_text(json.dumps(self.said, default=str))


@dataclass
class Subject:
    """A random model and what it computes."""

    model: Any
    inputs: dict[str, Any]
    agrees: bool | None


def try_config(pair: Pair, number: int, seed: int, folder: Path, bases: Path, limits: Any) -> None:
    """Everything about one config; what happens is written to ``folder`` as it happens."""
    _surroundings(*limits)
    row = Row(folder)
    try:
        _try(pair, number, seed, row, bases / f"{pair.name}.json")
    except BaseException as error:  # the process must say what happened, whatever it was
        named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        row.note(why=_line(f"{named}{error}"))


def _try(pair: Pair, number: int, seed: int, row: Row, base: Path) -> None:
    import transformers

    model_class = getattr(transformers, pair.class_name)
    row.note(stage="base")
    if not base.exists():
        base.write_text(json.dumps(base_of(pair, model_class)))
    rng = Random(f"{seed} {pair.name} {number}")
    data = json.loads(base.read_text())
    builder = _builder(model_class, pair)
    for left in reversed(range(_DRAWS)):
        row.note(stage="draw")
        drawn = drawn_from(rng, builder, data)
        if drawn is None:
            raise RuntimeError("the small default does not run")
        row.note(stage="original", changed=drawn.changed, config=drawn.data)
        try:
            subject = subject_of(model_class, pair, drawn.data, rng, row.folder)
            break
        except RuntimeError:
            if not left:
                raise
    row.note(parameters=sum(p.numel() for p in subject.model.parameters()), stage="prune")
    layered = Random(f"{seed} {pair.name} {number} layered").random() < _LAYERED
    row.note(layered=layered)
    for place, mode in enumerate((layered_modes if layered else modes_of)(rng, subject.model)):
        started = {"mode": mode.name, "asked": mode.said()}
        row.said["modes"].append({**started, "outcome": "not run", "why": "it did not end"})
        row.note()
        row.said["modes"][-1] = {**started, **tried(subject, mode, row.folder / f"{place:02d}")}
        row.note()
    row.note(stage="done", why="")


def _builder(model_class: type, pair: Pair) -> Any:
    from pairs import config_of

    from tp_hf_config.model.build import Builder, Refusal, without_data

    model = without_data(model_class, config_of(pair))  # type: ignore[type-var]
    if isinstance(model, Refusal):
        raise RuntimeError(model.reason)
    return Builder(model)


def subject_of(
    model_class: type, pair: Pair, data: dict[str, Any], rng: Random, folder: Path
) -> Subject:
    """The class with random weights; it loads again by itself, and computes the same then."""
    model = built(_builder(model_class, pair).config_class, model_class, data)
    fill(model, rng.randrange(2**31))
    model.tie_weights()
    inputs = first_inputs(model, map_of(model).recipe)
    if inputs is None:
        raise RuntimeError("it does not run")
    inputs = with_other_text(rng, model, inputs)
    outputs = outputs_of(model, inputs)
    again = outputs_of(model, inputs)
    if not all(bool(torch.isfinite(one).all()) for one in outputs):
        raise RuntimeError("it computes no numbers")
    if not all(map(torch.equal, outputs, again)):
        raise RuntimeError("it computes something else every time")
    loaded = _loaded_again(model, folder / "original")  # some layers stay in float32 by that
    twice = _loaded_again(loaded, folder / "again")
    now, then = outputs_of(loaded, inputs), outputs_of(twice, inputs)
    if not all(map(_close, outputs, now)) or not all(map(torch.equal, now, then)):
        raise RuntimeError("unpruned, it does not load as it was saved")
    return Subject(loaded, inputs, _same_with_cache(loaded, inputs))


def _loaded_again(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return prepare(
        type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    )


def built(config_class: Any, model_class: Any, data: dict[str, Any]) -> Any:
    """The class at a config, eager, in float64."""
    decode = getattr(config_class, "_decode_special_floats", copy.copy)  # infinities
    config = config_class.from_dict(decode(copy.deepcopy(data)))
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        return prepare(model_class(config).double())
    finally:
        torch.set_default_dtype(before)


def modes_of(rng: Random, model: nn.Module) -> Iterator[Mode]:
    """By defaults, by heads, by rounded widths, and by every proved width alone."""
    from tp_hf_config import prunable

    yield Mode("defaults", {}, _settings(rng))
    gqa = rng.choice((None, "query", "group"))
    heads = {"prune_num_heads": True}
    both = {**heads, **_settings(rng), "head_pruning_ratio": _ratio(rng)}
    yield Mode("heads", {"gqa": gqa} if gqa else {}, both)
    yield Mode("round_to", {}, {"round_to": rng.choice(_ROUND), **_settings(rng)})
    widths = [width for width in prunable(model).widths if width.reason is None]
    if len(widths) > 1:
        chosen = rng.sample(widths, 2)
        ratios = {width.names[0]: _ratio(rng) for width in chosen}
        yield Mode("ratios", {"ratios": ratios}, _settings(rng))
    for width in widths:
        yield Mode(f"width {width.name}", {"prune": width.names}, _settings(rng))


def layered_modes(rng: Random, model: nn.Module) -> Iterator[Mode]:
    """Layers that differ in widths and in heads, layers dropped, and one after the other."""
    differ = {"per_layer": True}
    steps = rng.choice(_STEPS)
    yield Mode("differ", differ, {**differing_settings(rng, model), "iterative_steps": steps})
    heads = {**_settings(rng), "head_pruning_ratio": _ratio(rng), "global_pruning": True}
    yield Mode("differ, heads", differ, {"prune_num_heads": True, **heads})
    lists = list(lists_of_layers(model).items())
    chosen = {name: some_layers(rng, len(layers)) for name, layers in lists}
    for name in rng.sample(list(chosen), min(_LISTS, len(chosen))):
        yield Mode(f"dropped of {name}", dropped={name: chosen[name]})
    if chosen:
        name = rng.choice(list(chosen))
        yield Mode("dropped and pruned", {}, _settings(rng), {name: chosen[name]})
        settings = {**_settings(rng), "global_pruning": True}
        yield Mode("dropped and differ", differ, settings, {name: chosen[name]})


def _settings(rng: Random) -> dict[str, Any]:
    return {"pruning_ratio": _ratio(rng), "iterative_steps": rng.choice(_STEPS)}


def _ratio(rng: Random) -> float:
    return round(rng.uniform(0.1, 0.7), 2)


def tried(subject: Subject, mode: Mode, folder: Path) -> dict[str, Any]:
    """What one mode came to: the outcome, why, and where the copy lies that is to be loaded."""
    from tp_hf_config import TPHFConfigError, drop_layers

    model, settings = copied_for(subject.model, mode.settings)
    before, fields, notes = _state(model), {}, list[str]()
    try:
        for name, layers in mode.dropped.items():
            fields |= drop_layers(model, layers, which=name).fields
            check_dropped(subject.model, model, name, layers, subject.inputs)
        base = copy.deepcopy(model) if mode.dropped else subject.model
        if settings:
            before = _state(model)
            for report in _pruned(model, mode.asked, settings):
                fields |= report.fields
                notes = report.notes
    except WrongError as error:
        return {"outcome": "wrong", "why": _line(str(error))}
    except Exception as error:  # whatever it is: it says how far it went
        said = _line(f"{type(error).__name__}: {error}")
        if _state(model) != before:
            return {"outcome": "failed", "why": said}
        expected = isinstance(error, TPHFConfigError)
        return {"outcome": "refused" if expected else "crashed", "why": said}
    if _state(model) == before and not mode.dropped:
        return {"outcome": "nothing", "why": "; ".join(notes)[:200]}
    try:
        why = _checked(base, subject, model, folder)
    except WrongError as error:
        why = str(error)
    except Exception as error:
        return {"outcome": "failed", "why": _line(f"{type(error).__name__}: {error}")}
    if why is not None:
        return {"outcome": "wrong", "why": _line(why), "fields": fields}
    return {"outcome": "works", "why": "", "fields": fields, "folder": folder.name}


def _pruned(model: Any, asked: dict[str, Any], settings: dict[str, Any]) -> list[Any]:
    """Prune a model in all its steps; the reports of the steps."""
    import torch_pruning as tp

    from tp_hf_config import HFConfigSyncHook

    default = {} if "ratios" in asked else {"prune": "inner"}
    hook = HFConfigSyncHook(**{**default, **asked})
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[hook],
        **settings,
    )
    for _ in range(settings["iterative_steps"]):
        pruner.step()
    return list(hook.reports)


def _state(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return sizes, model.config.to_dict()


def _checked(base: Any, subject: Subject, model: Any, folder: Path) -> str | None:
    """Compare with the masked original, save with what it computes; what is wrong, or ``None``.

    ``base``: the original, without the layers that were dropped before pruning.
    """
    config = json.loads(model.config.to_json_string())
    fresh = built(type(model.config), type(model), config)
    inputs = compare(base, model, subject.inputs, fresh)
    agrees = _same_with_cache(model, inputs)
    if subject.agrees and agrees is False:
        return "generating with a cache and without gives different scores, unpruned the same"
    prepare(model)
    case: dict[str, Any] = {"inputs": inputs, "class": _stock(model)}
    case["outputs"] = outputs_of(model, inputs)
    case["generated"] = [generated(model, inputs, cache) for cache in (True, False)]
    model.save_pretrained(folder)
    torch.save(case, folder / CASE)
    return None


def _stock(model: Any) -> str:
    """The name of the class of Transformers that a model is of, or is derived from."""
    named = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return next(named).__name__


def _same_with_cache(model: Any, inputs: Mapping[str, Any]) -> bool | None:
    """Whether generating gives the same scores with a cache; ``None``: it cannot be told.

    Where two tokens are as likely, rounding decides, and what follows is another text. A padding
    token that was generated is passed over where positions are counted, but with a cache.
    """
    one, other = (generated(model, inputs, cache) for cache in (True, False))
    if one is None or other is None:
        return None
    padded = False
    for scores, others in zip(one[1:], other[1:], strict=True):
        if not _close(scores, others):
            return None if padded else False
        chosen = scores.argmax(-1)
        if not torch.equal(chosen, others.argmax(-1)):
            return None
        padded |= model.generation_config.pad_token_id in chosen.tolist()
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=_AGREE, atol=_AGREE
    )


def _surroundings(seconds: int, memory: int) -> None:
    """Limits of this process: of processor time, so that a busy machine changes nothing."""
    import transformers

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)


def _line(text: str) -> str:
    return " ".join(text.split())[:400]
