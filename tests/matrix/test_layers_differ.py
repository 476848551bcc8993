"""Layers that differ: rankings, ratios and ignored layers that leave each layer its own widths.

Asked of each class: the config says what each layer is, the pruned model computes what the original
does with the removed units at zero, a fresh process that has nothing of this library loads it with
the same outputs and text, and it can be trained.  What a class cannot do is refused before the cut.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import layer_zoo
import pytest
import torch
import torch_pruning as tp
import zoo
from cases import some_in_make_test
from masked_original import WITHOUT_HEAD, assert_same_as_masked
from reloading import assert_reloaded

from tp_hf_config import ConfigSyncError, HFConfigSyncHook, UnsupportedModelError
from tp_hf_config.model.layer_entries import layer_lists_of

pytestmark = [
    pytest.mark.skipif(
        not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
    ),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
HALF = 0.5


class Case(NamedTuple):
    """A class pruned in one way, in so many steps."""

    model: str
    way: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}-{self.way}-{self.steps}"


class Run(NamedTuple):
    """A pruned model, what it was, and its hook."""

    original: Any
    model: Any
    hook: HFConfigSyncHook


def first_layers(model: Any) -> list[torch.nn.Module]:
    """The first layer of each list whose layers may differ."""
    lists = layer_lists_of(model)
    return [model.base_model.get_submodule(found.name)[0] for found in lists]


def arguments(model: Any, case: Case) -> dict[str, Any]:
    """What the pruner gets for a way of pruning."""
    settings: dict[str, Any] = {"pruning_ratio": HALF, "iterative_steps": case.steps}
    if case.way in ("global", "isomorphic"):
        isomorphic = case.way == "isomorphic"
        settings |= {"global_pruning": True, "isomorphic": isomorphic, "pruning_ratio": 0.3}
    elif case.way == "dict":
        settings["pruning_ratio_dict"] = dict.fromkeys(first_layers(model), 0.25)
    else:
        settings["ignored_layers"] = first_layers(model)
    return settings


@functools.cache
def run_of(case: Case) -> Run:
    """Prune a case's model; once, for all tests that ask about it."""
    model = layer_zoo.build(case.model)
    original = copy.deepcopy(model)
    hook = HFConfigSyncHook(prune=layer_zoo.FIELDS[case.model], per_layer=True)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[hook],
        **arguments(model, case),
    )
    for _ in range(case.steps):
        pruner.step()
    assert all(report.proof and report.error is None for report in hook.reports)
    return Run(original, model, hook)


OF_EVERY_KIND = ("llama", "gemma3", "mixtral", "deepseek_v3", "bart", "dinov2")
"""Classes that ``make test`` runs: a decoder, entries of kinds, experts, two stacks, images."""
WAYS = ("global", "isomorphic", "dict", "ignored")
CASES = some_in_make_test(
    (
        case
        for name in layer_zoo.FIELDS
        for way in WAYS
        for case in (Case(name, way, 1), Case(name, way, 3))
        if case.steps == 3 or name in ("llama", "gpt_oss", "bert", "whisper")
        if (name, way) not in layer_zoo.REFUSED
    ),
    lambda case: case.model in OF_EVERY_KIND if case.way == "ignored" else case.model == "llama",
)


@pytest.mark.parametrize("case", CASES)
def test_layers_that_differ(case: Case, collector: Any) -> None:
    """The config says so, the model is the masked original, and a fresh process loads the same."""
    run = run_of(case)
    built = type(run.model)(copy.deepcopy(run.model.config))
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in run.model.named_parameters()
    }
    differ = layer_zoo.has_entries(run.model)
    assert type(run.model).__name__.startswith("Layerwise") == differ
    if case.way in ("dict", "ignored"):
        kept = {"dict": 0.75, "ignored": 1.0}[case.way]
        before = layer_zoo.widths(run.original, layer_zoo.FIELDS[case.model])
        after = layer_zoo.widths(run.model, before)
        assert differ
        for field, sizes in before.items():
            held = [size for size in sizes if size]
            assert after[field][0] in (int(kept * held[0]), held[0]), field
            assert after[field][1] in (int(HALF * held[1]), held[1]), field

    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))
    if case.model not in WITHOUT_HEAD:
        assert_reloaded(collector.reloaded(run.model, zoo.inputs(run.model)))


@pytest.mark.parametrize(
    "name",
    some_in_make_test(
        layer_zoo.FIELDS, lambda name: name in ("llama", "gpt_oss", "gemma3", "bart", "vit")
    ),
)
def test_text_with_a_cache_is_that_without_and_it_can_be_trained(name: str) -> None:
    model = copy.deepcopy(run_of(Case(name, "ignored", 3)).model)
    inputs = zoo.inputs(model)
    if model.can_generate() and "input_ids" in inputs:
        ways: list[dict[str, Any]] = [{"use_cache": True}, {"use_cache": False}]
        if not model.config.is_encoder_decoder and name not in layer_zoo.NO_STATIC_CACHE:
            ways.append({"cache_implementation": "static"})
        settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        texts = [model.generate(**inputs, **settings, **way) for way in ways]
        assert all(torch.equal(text, texts[0]) for text in texts)
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = next(v for v in model(**inputs).values() if isinstance(v, torch.Tensor))
    first.float().square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "way"), layer_zoo.REFUSED)
def test_what_layers_share_is_refused_before_the_cut(name: str, way: str) -> None:
    with pytest.raises(ConfigSyncError, match=layer_zoo.REFUSED[name, way]):
        run_of(Case(name, way, 1))


@pytest.mark.parametrize("name", ["swin", "convnext", "mamba2"])
def test_a_class_without_such_layers_is_refused(name: str) -> None:
    model = zoo.build(name)
    stock = type(model)
    before = model.config.to_json_string()
    with pytest.raises(
        UnsupportedModelError,
        match=r"per_layer=True: .* no width that .* could set for each layer separately",
    ):
        tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            hooks=[HFConfigSyncHook(per_layer=True)],
        )
    assert type(model) is stock
    assert model.config.to_json_string() == before


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_uniform_layers_refuse_it_before_the_cut_and_say_what_allows_it(name: str) -> None:
    model = zoo.build(name)
    shapes = [parameter.shape for parameter in model.parameters()]
    with pytest.raises(
        ConfigSyncError,
        match=r"each layer have its own widths: per_layer=True\. "
        "Nothing is",
    ):
        tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            hooks=[HFConfigSyncHook(prune="intermediate_size")],
        )
    assert [parameter.shape for parameter in model.parameters()] == shapes
