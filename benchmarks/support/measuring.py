"""What happens to one pair: in a process of its own it is pruned, in another one loaded again."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pairs import Pair, config_of

RESULT = "result.json"
UNPRUNED = "unpruned"
PARTS = ("widths", "layers")
"""What is measured of a pair."""
LATE = "it did not end in time"
Note = Callable[..., None]


def measure(
    pair: Pair, parts: Iterable[str], folder: Path, seed: int, seconds: int, memory: int
) -> None:
    """Build, learn, make tiny, prune; what is known so far always lies in ``folder``.

    What is learned and proved of the class for its widths serves its layers too.

    Args:
        pair: the class.
        parts: what of it is measured, of ``PARTS``.
        folder: for the result, which goes on from the one that is there, and for pruned models.
        seed: of weights and inputs.
        seconds: processor time of this process for each part.
        memory: in bytes, of this process.
    """
    _surroundings(seconds, memory)
    result = read_result(folder) or {"stage": "class", "why": LATE, "widths": []}
    layers: dict[str, Any] = {"why": LATE}

    def note(**news: Any) -> None:
        result.update(news)
        (folder / RESULT).write_text(json.dumps(result))

    def note_layers(**news: Any) -> None:
        layers.update(news)
        note(layers=layers)

    note_part = note if "widths" in parts else note_layers
    note_part()
    made = None
    try:
        made = _prepared(pair, seed, note if "widths" in parts else _ignored)
        if "widths" in parts:
            _widths(made, folder, note)
            note(stage="done", why="", processor_seconds=round(time.process_time()))
    except BaseException as error:  # the child must say what happened, whatever it was
        note_part(why=_reason(error))
    if made is None or "layers" not in parts:
        return
    _limit(time.process_time() + seconds if "widths" in parts else seconds)
    try:
        note_layers()
        _layers(made, folder, note_layers)
        note_layers(why="")
    except BaseException as error:
        note_layers(why=_reason(error))


def read_result(folder: Path) -> dict[str, Any]:
    """What is known of a pair so far; empty: nothing."""
    path = folder / RESULT
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _prepared(pair: Pair, seed: int, note: Note) -> Any:
    """The class at tiny size with random weights, and how to run it."""
    import transformers

    from tp_hf_config.fieldmap.learn_field_map import map_of
    from tp_hf_config.model.build import Refusal, without_data
    from tp_hf_config.pipeline.support import prepared

    model_class = getattr(transformers, pair.class_name)
    note(stage="build")
    model = without_data(model_class, config_of(pair))
    if isinstance(model, Refusal):
        raise RuntimeError(model.reason)
    note(stage="learn", parameters=sum(p.numel() for p in model.parameters()))
    started = time.process_time()
    map_of(model)
    note(stage="run", learn_seconds=time.process_time() - started)
    made = prepared(model, seed)
    if isinstance(made, Refusal):
        raise RuntimeError(made.reason)
    note(stage="prune", partial=made.tiny.partial)
    return made


def _ignored(**news: Any) -> None:
    """Takes notes that the result has already."""


def _reason(error: BaseException) -> str:
    named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return f"{named}{str(error) or type(error).__name__}"[:400]


def _widths(case: Any, folder: Path, note: Note) -> None:
    """Prune every width, and with the defaults."""
    from tp_hf_config.pipeline.support import WidthSupport, attempt, trials

    widths: list[dict[str, Any]] = []
    for width, saved in trials(case, folder):
        widths.append(_tried(width, saved, folder))
        note(widths=widths)
    place = folder / "defaults"  # prune="inner", one ratio, one step
    outcome, why = attempt(case, copy.deepcopy(case.model), place)
    why = why or ("nothing was pruned" if outcome == "refused" else "")
    folders = (place,) if outcome == "works" else ()
    tried = _tried(WidthSupport((), outcome, why), folders, folder)
    note(defaults={key: tried[key] for key in ("outcome", "why", "folders")})


def _layers(case: Any, folder: Path, note: Note) -> None:
    """Drop a layer of every list, and let layers differ, if there are any."""
    from layer_trials import differ_trial, drop_trials, lists_of_layers

    from tp_hf_config.pipeline.support import save

    lists = lists_of_layers(case)
    note(lists=lists)
    if lists:
        save(case.model, case.tiny.inputs, folder / UNPRUNED, (), case.tiny.recipe)
    dropped: list[dict[str, Any]] = []
    for trial in drop_trials(case, lists, folder / "dropped"):
        dropped.append(_tried(trial, trial.folders, folder))
        note(dropped=dropped)
    if lists:
        trial = differ_trial(case, folder / "differ")
        note(differ=_tried(trial, trial.folders, folder))


def _tried(result: Any, folders: Iterable[Path], around: Path) -> dict[str, Any]:
    return {**result.to_dict(), "folders": [str(one.relative_to(around)) for one in folders]}


def learning(pair: Pair, field: str | None) -> dict[str, float]:
    """Seconds of processor time to learn the class's default config, and to prove a field of it.

    Empty: it is not learned. For a process of its own.
    """
    _quiet()
    import transformers

    from tp_hf_config.fieldmap.learn_field_map import map_of
    from tp_hf_config.graph.experiments import experiments_of
    from tp_hf_config.model.build import Refusal, without_data
    from tp_hf_config.model.config_json import field_name

    seconds: dict[str, float] = {}
    with suppress(Exception):  # the pair's own row says why
        model = without_data(getattr(transformers, pair.class_name), config_of(pair))
        if isinstance(model, Refusal):
            return seconds
        started = time.process_time()
        field_map = map_of(model)
        seconds["learn_seconds"] = time.process_time() - started
        fields = tuple(path for path in field_map.sizes if field_name(path) == field)
        if fields:
            experiments_of(field_map, fields=fields)
            seconds["field_seconds"] = time.process_time() - started
    return seconds


def attempts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was pruned of a pair, as far as it came."""
    layers = result.get("layers", {})
    alone = [
        held[name] for held, name in ((result, "defaults"), (layers, "differ")) if name in held
    ]
    return [*result.get("widths", ()), *layers.get("dropped", ()), *alone]


def load_again(pair: Pair, folder: Path, seconds: int, memory: int) -> None:
    """Load what was saved, in a process that has not seen the pruning."""
    _surroundings(seconds, memory)
    import transformers
    from layer_trials import reloaded_by_all

    result = read_result(folder)
    model_class = getattr(transformers, pair.class_name)
    if (folder / UNPRUNED).exists():
        refusal = reloaded_by_all(model_class, folder / UNPRUNED)
        if refusal is not None:  # whatever fails after that is no news of pruning
            kept = {k: v for k, v in result["layers"].items() if k not in ("dropped", "differ")}
            result["layers"] = {**kept, "why": f"before anything is pruned, {refusal.reason}"}
    for tried in attempts(result):
        for saved in tried.pop("folders", ()):
            refusal = reloaded_by_all(model_class, folder / saved)
            if refusal is not None:
                tried.update(outcome="failed", why=refusal.reason)
            shutil.rmtree(folder / saved)
    (folder / RESULT).write_text(json.dumps(result))


def _surroundings(seconds: int, memory: int) -> None:
    """Limits of this process: of processor time, so that a busy machine changes nothing."""
    _limit(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _quiet()


def _limit(seconds: float) -> None:
    """Limit the processor time of this process, since it began; its hard limit stays."""
    whole = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (whole, resource.RLIM_INFINITY))


def _quiet() -> None:
    """One thread, no network, nothing printed."""
    import torch
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    untyped: Any = transformers.logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
