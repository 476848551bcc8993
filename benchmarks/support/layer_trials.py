"""Let the layers of one class differ, and drop a layer of each of its lists, at tiny size."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tp_hf_config.checkpoint.child import load
from tp_hf_config.errors import TPHFConfigError, in_one_line
from tp_hf_config.fieldmap.fewer_layers import layer_lists_in
from tp_hf_config.fieldmap.learn_field_map import build_live, map_of, whole_build
from tp_hf_config.forward.observed_pass import AllFloat64, handed_on, without_layers
from tp_hf_config.forward.output_tensors import outputs_of, unmasked
from tp_hf_config.graph.experiments import experiments_of
from tp_hf_config.hook.drop_layers import drop_layers, tensors_by_name
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.config_json import config_json, config_nodes
from tp_hf_config.model.layer_class import layer_lists
from tp_hf_config.model.layer_entries import layer_lists_of
from tp_hf_config.pipeline.support import Outcome, Subject, attempt, reloaded, save
from tp_hf_config.planning.settings import INNER
from tp_hf_config.twin.masked_check import EXACT

GLOBAL, FIRST_KEPT = "global", "firsts-kept"


@dataclass(frozen=True)
class LayerTrial:
    """What became of letting layers differ, or of dropping one.

    Attributes:
        outcome: ``works``: the model computes what it is to compute, and one that is loaded from
            the saved folder computes the same bits; ``refused``: an error came before anything was
            changed; ``failed``: anything else.
        why: why it does not work; empty if it does.
        how: how layers were made to differ, or the list and the number of the layer that went.
        folders: where the model was saved, if it works.
        unobserved: True if no output depends on that layer.
    """

    outcome: Outcome
    why: str = ""
    how: str = ""
    folders: tuple[Path, ...] = ()
    unobserved: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the result as data for ``json.dumps``."""
        data = {"outcome": self.outcome, "why": self.why, "how": self.how}
        return data | ({"unobserved": True} if self.unobserved else {})


def reloaded_by_all(model_class: Any, folder: Path) -> Refusal | None:
    """Load a saved model and compare its outputs bit for bit; return what is wrong, or ``None``.

    Code that was saved with it runs, as every auto class that it names lets it: those of the model
    itself, and those of the classes beside it, which only have to have its layers.
    """
    config = json.loads((folder / "config.json").read_text())
    places = (config.get("auto_map") or {}).items()
    models = {
        getattr(transformers, name): place for name, place in places if name.startswith("AutoModel")
    }
    if not models:
        return reloaded(model_class, folder)
    saved = f".{config['architectures'][0]}"
    own = [auto for auto, place in models.items() if place.endswith(saved)] or [model_class]
    for auto in own:
        refusal = reloaded(auto, folder, trust_remote_code=True)
        if refusal is not None:
            return refusal
    for auto in models.keys() - set(own):
        try:
            reason = _lacks(auto, folder)
        except Exception as error:
            reason = f"it cannot be loaded: {in_one_line(error)}"
        if reason is not None:
            return Refusal(f"{auto.__name__}: {reason}"[:500])
    return None


def _lacks(loader: Any, folder: Path) -> str | None:
    """Return which layers get no weights in a class beside the saved one; ``None`` if all do."""
    options = {"trust_remote_code": True, "ignore_mismatched_sizes": True}  # of its own head
    model, problems = load(loader, str(folder), options)
    lists = tuple(f"{name}." for name in layer_lists(type(model)))
    keys = (*problems.get("missing_keys", ()), *problems.get("mismatched_keys", ()))
    # not "layers." in the fresh decoder of ViTMAEForPreTraining, which is all its own
    body = f"{type(model).base_model_prefix}."
    lacking = [key for key in keys if key.removeprefix(body).startswith(lists)]
    return f"no weights are loaded for {lacking}" if lacking else None


def lists_of_layers(case: Subject) -> list[str]:
    """Return the names of a model's lists of layers: of those that a config can make shorter.

    If there are none, only the first list.
    """
    model: Any = case.model
    builder, built = build_live(model)
    full = whole_build(model, builder, built)
    lists = layer_lists_in(builder, config_json(model.config, use_diff=False), full)
    return [name for name, refusal in lists.items() if refusal is None] or list(lists)[:1]


def differ_trial(case: Subject, folder: Path) -> LayerTrial:
    """Prune a copy so that its layers differ.

    All layers are ranked together, with the default widths. If that is refused, as for a width that
    several groups share, or happens to leave the layers alike, the first layers keep their widths;
    then the same with all widths (LW-DETR's encoder has no inner one).

    ``case``: the model, which is not changed, and its inputs.
    """
    model: Any = case.model
    if layer_lists_of(model):  # else it is refused without experiments
        field_map = map_of(model, make_inputs=case.tiny.recipe.make_inputs)
        experiments_of(field_map, case.tiny)  # once for all that follows
    trial = LayerTrial("refused")
    tries: tuple[tuple[str, Any], ...] = ((GLOBAL, INNER), (FIRST_KEPT, INNER), (FIRST_KEPT, None))
    for how, prune in tries:
        pruned = copy.deepcopy(model)
        firsts = [
            pruned.base_model.get_submodule(layers.name)[0] for layers in layer_lists_of(pruned)
        ]
        given = {"global_pruning": True} if how == GLOBAL else {"ignored_layers": firsts}
        saved = folder / f"{type(model).__name__}-{how}"  # names the package of the code in it
        outcome, why = attempt(case, pruned, saved, per_layer=True, prune=prune, **given)
        if outcome == "failed":
            return LayerTrial(outcome, f"{how}: {why}")
        if outcome == "works" and layer_lists(type(pruned)):
            return LayerTrial(outcome, how=how, folders=(saved,))
        trial = LayerTrial("refused", trial.why or why or "its layers came out alike")
    return trial


def drop_trials(case: Subject, lists: Sequence[str], folder: Path) -> Iterator[LayerTrial]:
    """Yield a trial for each list: a layer dropped from a copy.

    The second layer if it can go; otherwise the last, one in the middle, or the first.

    ``case``: the model, which is not changed, and its inputs.
    """
    for place, name in enumerate(lists):
        layers = len(list(case.model.get_submodule(name).children()))
        numbers = dict.fromkeys((1, layers - 1, layers // 2, 0))
        trials = (_dropped(case, name, number, folder / str(place)) for number in numbers)
        first = next(trials)
        yield next((trial for trial in (first, *trials) if trial.outcome != "refused"), first)


def _dropped(case: Subject, name: str, number: int, folder: Path) -> LayerTrial:
    """Drop one layer of a list of a copy, compare, and save."""
    model: Any = copy.deepcopy(case.model)
    trial = LayerTrial("works", how=f"layer {number} of {name}", folders=(folder,))
    try:
        report = drop_layers(model, [number], which=name)
    except TPHFConfigError as error:
        return replace(trial, outcome="refused", why=str(error), folders=())
    except Exception as error:
        return replace(trial, outcome="failed", why=in_one_line(error), folders=())
    if any("use_cache=False" in note for note in report.notes):
        case = replace(case, model=_without_cache(case.model))
        model = _without_cache(model)
    depends = _compare(case, model, name, number)
    watched = [r for r in case.tiny.watched if not r.module.startswith(f"{name}.")]
    refusal = (
        depends
        if isinstance(depends, Refusal)
        else save(model, case.tiny.inputs, folder, watched, case.tiny.recipe)
    )
    if refusal is not None:
        return replace(trial, outcome="failed", why=refusal.reason, folders=())
    return replace(trial, unobserved=not depends)


def _without_cache(model: Any) -> Any:
    """Return a copy of a model that makes no cache unless it is asked for one."""
    model = copy.deepcopy(model)
    for _, config in config_nodes(model.config):
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def _compare(case: Subject, model: nn.Module, name: str, number: int) -> bool | Refusal:
    """Compare a model without a layer with the original while that layer passes on.

    Returns:
        Whether any output depends on the layer, or where the two differ.

    Args:
        case: the original and its inputs.
        model: the original without the layer.
        name: the list of layers.
        number: the layer.
    """
    original = copy.deepcopy(case.model)
    layers = list(original.get_submodule(name).children())
    try:
        with handed_on(layers) as handed:
            whole = _outputs(case, original, len(layers))
        with without_layers([layers[number]], handed):
            expected = _outputs(case, original, len(layers))
        actual = _outputs(case, model, len(layers))
    except Exception as error:
        return Refusal(f"it does not run: {in_one_line(error)}")
    for key, value in expected.items():
        if key not in actual or actual[key].shape != value.shape:
            return Refusal(f"{key} has another shape than with the layer passing on")
        off = float((actual[key] - value).norm() / value.norm().clamp_min(1e-30))
        if not off <= EXACT:
            return Refusal(f"{key} is {off:.0e} off the original with the layer passing on")
    return not all(torch.equal(whole[key], value) for key, value in expected.items())


def _outputs(case: Subject, model: nn.Module, layers: int) -> dict[str, Tensor]:
    """Return the outputs of one pass by name, without those that have a part for each layer."""
    torch.default_generator.manual_seed(0)
    with torch.no_grad(), AllFloat64():
        result = outputs_of(model, case.tiny.inputs, case.tiny.recipe)
    return {name: unmasked(value) for name, value in tensors_by_name(result, layers)}
