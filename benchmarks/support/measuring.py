"""What happens to one pair: in a process of its own it is pruned, in another one loaded again."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pairs import Pair, config_of

RESULT = "result.json"
UNPRUNED = "unpruned"


def measure(pair: Pair, part: str, folder: Path, seed: int, seconds: int, memory: int) -> None:
    """Build, learn, make tiny, prune; what is known so far always lies in ``folder``.

    Args:
        pair: the class.
        part: what of it is measured, ``"widths"`` or ``"layers"``.
        folder: for the result, and for pruned models.
        seed: of weights and inputs.
        seconds: processor time of this process.
        memory: in bytes, of this process.
    """
    _surroundings(seconds, memory)
    import transformers

    from tp_hf_config.fieldmap.learn_field_map import map_of
    from tp_hf_config.model.build import Refusal, without_data
    from tp_hf_config.model.surroundings import memory_kept
    from tp_hf_config.pipeline.support import prepared

    result: dict[str, Any] = {"stage": "class", "why": "it did not end in time", "widths": []}

    def note(**news: Any) -> None:
        result.update(news)
        (folder / RESULT).write_text(json.dumps(result))

    try:
        note()
        model_class = getattr(transformers, pair.class_name)
        note(stage="build")
        config = config_of(pair)
        model = without_data(model_class, config)
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
        with memory_kept():
            {"widths": _widths, "layers": _layers}[part](made, folder, note)
        note(stage="done", why="")
    except BaseException as error:  # the child must say what happened, whatever it was
        named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        note(why=f"{named}{str(error) or type(error).__name__}"[:400])


def _widths(case: Any, folder: Path, note: Callable[..., None]) -> None:
    """Prune every width, and with the defaults."""
    from tp_hf_config.pipeline.trial import WidthSupport, attempt, trials

    widths: list[dict[str, Any]] = []
    for trial in trials(case, folder):
        widths.append(_tried(trial.width, trial.folders, folder))
        note(widths=widths)
    saved = folder / "defaults"  # pruner_kwargs(model), one ratio, one step
    outcome, why = attempt(case, copy.deepcopy(case.model), saved)
    why = why or ("nothing was pruned" if outcome == "refused" else "")
    folders = (saved,) if outcome == "works" else ()
    tried = _tried(WidthSupport((), outcome, why), folders, folder)
    note(defaults={key: tried[key] for key in ("outcome", "why", "folders")})


def _layers(case: Any, folder: Path, note: Callable[..., None]) -> None:
    """Drop a layer of every list, and let layers differ, if there are any."""
    from layer_trials import differ_trial, drop_trials, lists_of_layers

    from tp_hf_config.pipeline.trial import save

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


def learning(pair: Pair) -> float | None:
    """Seconds of processor time to learn the class's default config; ``None``: it is not learned.

    Several pairs in one process, whose modules and garbage are those of all before.
    """
    _quiet()
    import transformers

    from tp_hf_config.fieldmap.learn_field_map import map_of
    from tp_hf_config.model.build import Refusal, without_data

    try:
        model = without_data(getattr(transformers, pair.class_name), config_of(pair))
        if isinstance(model, Refusal):
            return None
        started = time.process_time()
        map_of(model)
    except Exception:  # the pair's own row says why
        return None
    return time.process_time() - started


def attempts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All that was pruned of a pair, as far as it came."""
    alone = [result[name] for name in ("defaults", "differ") if name in result]
    return [*result.get("widths", ()), *result.get("dropped", ()), *alone]


def load_again(pair: Pair, folder: Path, seconds: int, memory: int) -> None:
    """Load what was saved, in a process that has not seen the pruning."""
    _surroundings(seconds, memory)
    import transformers

    from tp_hf_config.pipeline.trial import reloaded

    result = json.loads((folder / RESULT).read_text())
    model_class = getattr(transformers, pair.class_name)
    if (folder / UNPRUNED).exists():
        refusal = reloaded(model_class, folder / UNPRUNED)
        if refusal is not None:  # whatever fails after that is no news of pruning
            result = {k: v for k, v in result.items() if k not in ("dropped", "differ")}
            result["why"] = f"before anything is pruned, {refusal.reason}"
    for tried in attempts(result):
        for saved in tried.pop("folders"):
            refusal = reloaded(model_class, folder / saved)
            if refusal is not None:
                tried.update(outcome="failed", why=refusal.reason)
            shutil.rmtree(folder / saved)
    (folder / RESULT).write_text(json.dumps(result))


def _surroundings(seconds: int, memory: int) -> None:
    """Limits of this process: of processor time, so that a busy machine changes nothing."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _quiet()


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
