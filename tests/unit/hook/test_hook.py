"""When the config follows, what is reported, and what stays as it was."""

from __future__ import annotations

import copy
import json
import warnings
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib.metadata import version
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import torch_pruning.ops as tp_ops
import torch_pruning.pruner.algorithms.base_pruner as tp_base
from torch import nn
from transformers.models.llama import modeling_llama

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
    SyncReport,
)
from tp_hf_config.reports import SCHEMA_VERSION


def pruner_with(model: nn.Module, hooks: Any, **kwargs: Any) -> Any:
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.GroupMagnitudeImportance(),
        "pruning_ratio": 0.25,
        **kwargs,
    }
    return tp.pruner.MetaPruner(model, **arguments, hooks=hooks)


def attached(model: nn.Module, **kwargs: Any) -> tuple[HFConfigSyncHook, Any]:
    hook = HFConfigSyncHook()
    return hook, pruner_with(model, [hook], **kwargs)


def self_traced(model: Any, **kwargs: Any) -> Any:
    """A pruner of BERT that got no arguments from the library."""
    return tp.pruner.MetaPruner(
        model,
        {"input_ids": torch.arange(1, 9)[None]},
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        output_transform=lambda output: output.pooler_output,
        **kwargs,
    )


def all_but_ffn(model: Any) -> list[nn.Module]:
    ffn = [layer.intermediate.dense for layer in model.encoder.layer]
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) and m not in ffn]


def widths(model: Any) -> tuple[int, int]:
    return model.config.hidden_size, model.config.intermediate_size


def true(model: Any) -> bool:
    """The config builds the shapes that the model has."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    expected = {name: p.shape for name, p in built.named_parameters()}
    return {name: p.shape for name, p in model.named_parameters()} == expected


# When


def test_step():
    model = small.llama()
    hook, pruner = attached(model, pruning_ratio=0.5, iterative_steps=2)
    for count, expected in enumerate([(24, 48), (16, 32)], 1):
        assert pruner.step() is None
        assert widths(model) == expected
        assert true(model)
        assert len(hook.reports) == count
        assert hook.last_report is hook.reports[-1]
        assert hook.last_report.step == count


def test_interactive_to_the_end():
    model = small.llama()
    hook, pruner = attached(model)
    groups = pruner.step(interactive=True)
    seen = 0
    for group in groups:
        assert hook.reports == []
        group.prune()
        seen += 1
    assert seen == 3
    assert widths(model) == (24, 48)
    assert len(hook.reports) == 1
    assert len(hook.last_report.groups) == 3


def test_interactive_with_break():
    model = small.llama()
    hook, pruner = attached(model)
    for group in pruner.step(interactive=True):
        group.prune()  # hidden size comes first
        break
    assert len(hook.reports) == 1
    assert hook.last_report.fields == {"hidden_size": (32, 24)}
    assert widths(model) == (24, 64)
    assert true(model)


def test_interactive_generator_that_is_kept_and_dropped():
    model = small.llama()
    hook, pruner = attached(model)
    groups = pruner.step(interactive=True)
    next(groups).prune()
    assert hook.reports == []
    del groups
    assert widths(model) == (24, 64)
    assert len(hook.reports) == 1


def test_interactive_generator_that_is_closed():
    model = small.llama()
    hook, pruner = attached(model)
    groups = pruner.step(interactive=True)
    next(groups).prune()
    groups.close()
    groups.close()
    assert widths(model) == (24, 64)
    assert len(hook.reports) == 1


def test_interactive_and_an_exception_of_the_users():
    model = small.llama()
    hook, pruner = attached(model)

    def loop() -> None:
        for group in pruner.step(interactive=True):
            group.prune()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop()
    assert widths(model) == (24, 64)
    assert len(hook.reports) == 1


def test_an_exception_thrown_into_the_generator():
    model = small.llama()
    _, pruner = attached(model)
    groups = pruner.step(interactive=True)
    next(groups).prune()
    with pytest.raises(KeyError, match="mine"):
        groups.throw(KeyError("mine"))
    assert widths(model) == (24, 64)


def test_leaving_the_loop_where_no_config_fits_warns():
    model = small.llama()
    hook, pruner = attached(model)
    before = small.state_of(model)
    groups = pruner.step(interactive=True)
    next(groups)
    next(groups).prune()  # one layer's FFN of two
    with pytest.warns(PrunerSettingsWarning) as told:
        groups.close()
    assert [str(one.message) for one in told] == [
        "pruned groups are recorded but not cut yet: a config describes the result only if these "
        "are pruned too: intermediate_size in model.layers.1.mlp.gate_proj (hook.pending). Until "
        "then the model and its config are unchanged."
    ]
    assert hook.pending == ("intermediate_size in model.layers.1.mlp.gate_proj",)
    assert hook.reports == []
    small.assert_same(before, small.state_of(model))


def test_the_users_exception_surfaces_where_no_config_fits():
    model = small.llama()
    hook, pruner = attached(model)

    def loop() -> None:
        for number, group in enumerate(pruner.step(interactive=True)):
            if number == 1:
                group.prune()
                raise KeyError("mine")

    def caught() -> None:
        with pytest.raises(KeyError, match="mine"):
            loop()

    # the traceback keeps the generator; it is closed when that goes
    with pytest.warns(PrunerSettingsWarning, match="recorded but not cut yet"):
        caught()
    assert len(hook.pending) == 1
    assert true(model)


def test_the_users_exception_surfaces_whatever_a_hook_raises():
    class Broken:
        def after_step(self, pruner: Any) -> None:
            raise RuntimeError("a bug in the hook")

    class Step(tp.pruner.BasePruner):
        def step(self, interactive: bool = False) -> None:
            raise KeyError("mine")

    model = small.mlp()
    pruner = small.pruner_of(model, Step, hooks=[Broken()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyError, match="mine"):
            pruner.step()


def test_an_exception_inside_the_choice_of_units():
    model = small.llama()
    hook, pruner = attached(model)

    def fails(group: Any) -> bool:
        if pruner.DG.recorded:  # the hidden size is, the first layer's FFN is next
            raise RuntimeError("in the graph")
        return True

    pruner.DG.check_pruning_group = fails
    with pytest.raises(RuntimeError, match="in the graph"):
        pruner.step()
    assert widths(model) == (32, 64)
    assert (hook.reports, hook.pending, pruner.current_step) == ([], (), 0)
    assert true(model)


class Broken:
    """A hook that fails, in one of its methods, after it has looked at the model."""

    def __init__(self, method: str, error: BaseException):
        self.error, self.seen = error, list[Any]()
        setattr(self, method, self.fail if method == "after_step" else self.failing)

    def after_step(self, pruner: Any) -> None: ...

    def fail(self, pruner: Any) -> None:
        self.seen.append((widths(pruner.model), true(pruner.model)))
        raise self.error

    @contextmanager
    def failing(self, pruner: Any) -> Any:
        yield
        self.fail(pruner)


def step_through(pruner: Any, interactive: bool) -> None:
    for group in pruner.step(interactive=interactive) or ():
        group.prune()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("a bug in the hook"), KeyboardInterrupt()])
def test_another_hook_that_fails_sees_and_leaves_a_whole_step(
    first: bool, interactive: bool, error: BaseException
):
    model, hook, other = small.llama(), HFConfigSyncHook(), Broken("after_step", error)
    pruner = pruner_with(model, [other, hook] if first else [hook, other])
    with pytest.raises(type(error)):
        step_through(pruner, interactive)
    assert other.seen == [((24, 48), True)]
    assert (widths(model), true(model)) == ((24, 48), True)
    assert len(hook.reports) == 1


@pytest.mark.parametrize("first", [False, True])
def test_another_hook_that_fails_around_a_step_undoes_it(first: bool):
    model, hook = small.llama(), HFConfigSyncHook()
    other = Broken("stepping", RuntimeError("a bug in the hook"))
    before = small.state_of(model)
    pruner = pruner_with(model, [other, hook] if first else [hook, other])
    with pytest.raises(RuntimeError, match="a bug in the hook"):
        pruner.step()
    if first:  # ours has ended by then
        assert (widths(model), true(model)) == ((24, 48), True)
    else:
        small.assert_same(before, small.state_of(model))
        assert (hook.reports, pruner.current_step) == ([], 0)


def test_groups_that_are_listed_and_not_pruned():
    model = small.llama()
    hook, pruner = attached(model)
    before = small.state_of(model)
    groups = list(pruner.step(interactive=True))
    assert len(groups) == 3
    report = hook.last_report
    assert (report.groups, report.fields, report.attributes, report.buffers, report.ties) == (
        [],
        {},
        [],
        [],
        [],
    )
    parameters = f"{model.num_parameters():,}"
    assert str(report).startswith(
        "sync 1: 0 groups pruned (config graph); no config field changes\n"
        f"  parameters: {parameters} -> {parameters} (100.0%)\n"
        "  note: nothing was pruned: the ratios ask for less than one unit of each group, or no "
        "group that the step yielded was pruned\n"
        "  nothing else updated; proved: "
    )
    small.assert_same(before, small.state_of(model))
    groups[0].prune()  # and later, by hand
    assert (widths(model), true(model), hook.pending) == ((24, 64), True, ())
    with pytest.warns(
        PrunerSettingsWarning, match=r"only if these are pruned too: intermediate_size in model"
    ):
        groups[1].prune()
    assert (widths(model), true(model), len(hook.pending)) == ((24, 64), True, 1)
    groups[2].prune()
    assert (widths(model), true(model), hook.pending) == ((24, 48), True, ())
    assert [len(report.groups) for report in hook.reports] == [0, 1, 2]
    twin = small.llama()
    attached(twin)[1].step()
    small.assert_equal_weights(model, twin)


def test_a_step_of_which_nothing_is_pruned_does_not_tell_of_nearest_numbers():
    model = small.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    hook = HFConfigSyncHook(prune=(), gqa="query")
    pruner = pruner_with(model, [hook], head_pruning_ratio=0.3, pruning_ratio=0)
    for _group in pruner.step(interactive=True):
        pass
    (note,) = hook.last_report.notes
    assert note.startswith("nothing was pruned: ")


@pytest.mark.filterwarnings("ignore:pruned groups are recorded")
def test_what_was_cut_is_told_though_a_sync_failed_meanwhile():
    model = small.llama()
    hook, pruner = attached(model)
    groups = list(pruner.step(interactive=True))
    fields = (("intermediate_size",),)
    one, *others = [group for group in groups if group.graph_group.fields == fields]
    hook.reports.clear()
    one.prune()
    with pytest.raises(ConfigSyncError):
        hook.sync()
    for group in others:
        group.prune()
    assert [report.error is None for report in hook.reports] == [False, True]
    assert hook.cuts is not None
    assert hook.cuts.changes() == [(("intermediate_size",), 64, 48)]


MODELS = {"llama": small.llama, "bert": small.bert}


@pytest.mark.filterwarnings("ignore:pruned groups are recorded")
@pytest.mark.parametrize("make", [small.llama, small.bert])
def test_groups_pruned_after_their_loop_are_cut_as_soon_as_a_config_describes_them(make: Any):
    model, twin = make(), make()
    steps = {"pruning_ratio": 0.5, "iterative_steps": 2}
    hook, pruner = attached(model, **steps)
    _, other = attached(twin, **steps)
    for _ in range(2):
        for group in list(pruner.step(interactive=True)):
            group.prune()
            assert true(model)
        other.step()
        assert hook.pending == ()
        assert model.config.to_dict() == twin.config.to_dict()
        small.assert_equal_weights(model, twin)
    assert widths(model) == (16, 32)
    assert pruner.pruning_history() == other.pruning_history()


ENDINGS: dict[str, Any] = {
    "closed": lambda groups, hook, pruner: groups.pop().close(),
    "let go of": lambda groups, hook, pruner: groups.clear(),
    "synced": lambda groups, hook, pruner: hook.sync(),
    "another step": lambda groups, hook, pruner: pruner.step(),
    "another loop": lambda groups, hook, pruner: list(pruner.step(interactive=True)),
}


@pytest.mark.parametrize("make", [small.llama, small.bert])
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_iterator_that_is_kept_leaves_a_model_as_it_was(make: Any, ending: str):
    """Until the loop ends; then the model is what a step makes of it."""
    model, twin = make(), make()
    steps = {"pruning_ratio": 0.5, "iterative_steps": 2}
    hook, pruner = attached(model, **steps)
    before = small.state_of(model)
    groups = [pruner.step(interactive=True)]
    for count, group in enumerate(groups[0], 1):
        group.prune()
        if count == len(pruner.DG.graph_groups):
            break
    small.assert_same(before, small.state_of(model))
    assert hook.pending == ("the end of the loop over step(interactive=True)",)
    del group
    ENDINGS[ending](groups, hook, pruner)
    _, other = attached(twin, **steps)
    other.step()
    if ending == "another step":
        other.step()
    assert model.config.to_dict() == twin.config.to_dict()
    small.assert_equal_weights(model, twin)
    assert hook.pending == ()
    reports = len(hook.reports)
    groups.clear()
    assert len(hook.reports) == reports


def test_what_never_was_complete_is_dropped_by_the_next_step():
    model, twin = small.llama(), small.llama()
    hook, pruner = attached(model, iterative_steps=2)
    groups = list(pruner.step(interactive=True))
    with pytest.warns(PrunerSettingsWarning, match="recorded but not cut yet"):
        groups[1].prune()
    with pytest.raises(
        ValueError, match=r"^unit \d+ of intermediate_size in model.layers.0.mlp.gate"
    ):
        groups[1].prune()
    with pytest.warns(PrunerSettingsWarning) as told:
        pruner.step()
    assert [str(one.message) for one in told] == [
        "recorded groups are discarded, because no config describes the model with only these "
        "groups pruned: intermediate_size in model.layers.1.mlp.gate_proj would have to "
        "be pruned too. The model "
        "and its config are unchanged."
    ]
    _, other = attached(twin, iterative_steps=2)
    list(other.step(interactive=True))
    other.step()
    small.assert_equal_weights(model, twin)
    assert (hook.pending, true(model)) == ((), True)


def test_a_hook_that_is_removed_takes_what_it_recorded_with_it():
    model, hook = small.bert(), HFConfigSyncHook()
    pruner = self_traced(model)
    before = small.state_of(model)
    handle = hook.register(pruner)
    group = list(pruner.step(interactive=True))[-1]
    with pytest.warns(PrunerSettingsWarning, match="recorded but not cut yet"):
        group.prune()
    with pytest.warns(PrunerSettingsWarning, match="no config describes the model with only these"):
        handle.remove()
    assert hook.pending == ()
    small.assert_same(before, small.state_of(model))


def test_a_hook_that_is_used_again_starts_anew():
    """What it reported of another model does not belong to this one's cuts and notes."""
    hook = HFConfigSyncHook()
    for _ in range(2):
        pruner = self_traced(small.bert(), iterative_steps=2)
        with hook.register(pruner):
            pruner.DG.notes = ["of the graph"]
            pruner.step()
            assert hook.last_report.notes == ["of the graph"]
            assert hook.cuts.changes() == [
                (("hidden_size",), 32, 28),
                (("intermediate_size",), 64, 56),
            ]
            pruner.step()
        assert hook.last_report.notes == []
        assert hook.cuts.before["intermediate_size"] == 64
    assert [report.step for report in hook.reports] == [1, 2, 3, 4]


def test_a_generator_that_is_never_started_fires_nothing():
    model = small.llama()
    hook, pruner = attached(model)
    pruner.step(interactive=True)
    assert hook.reports == []


def test_sync_after_a_group_by_hand():
    model = small.llama()
    hook, pruner = attached(model)
    layer = model.model.layers[0].mlp.down_proj
    group = pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, [1, 5, 9, 31])
    assert pruner.DG.check_pruning_group(group)
    group.prune()
    assert widths(model) == (28, 64)
    report = hook.last_report
    assert report.fields == {"hidden_size": (32, 28)}
    assert [(g.root.name, g.root.out, g.root.removed, g.root.before) for g in report.groups] == [
        ("model.layers.0.mlp.down_proj", True, 4, 32)
    ]
    assert true(model)


def test_sync_after_a_group_pruned_with_other_indices():
    model = small.llama()
    hook, pruner = attached(model)
    for group in pruner.step(interactive=True):
        group.prune(idxs=[0, 2, 4, 6])
    (hidden, *ffn) = hook.last_report.groups
    assert [group.root.removed for group in (hidden, *ffn)] == [4] * 3
    kept = [c for c in range(64) if c not in (0, 2, 4, 6)]
    for name, kinds in hook.cuts.edits.items():
        for positions in hook.cuts.kept(name).values():
            assert positions.tolist() == kept[: len(positions)], (name, kinds)
    assert widths(model) == (28, 60)
    assert true(model)


def test_sync_after_calling_a_group():
    model = small.llama()
    hook, pruner = attached(model)
    for group in pruner.step(interactive=True):
        group()
    assert widths(model) == (24, 48)
    assert len(hook.last_report.groups) == 3


@pytest.mark.filterwarnings("ignore:pruned groups are recorded")
def test_sync_after_manual_prune_width():
    model = small.llama()
    hook, pruner = attached(model)
    for layer in model.model.layers:
        pruner.manual_prune_width(layer.mlp.up_proj, tp.prune_linear_out_channels, 0.5)
    report = hook.last_report
    assert report.fields == {"intermediate_size": (64, 32)}
    assert [group.root.removed for group in report.groups] == [32, 32]
    if small.TORCH_PRUNING < (1, 6):  # it takes ratios alone: another name is never set
        with pytest.raises(UnboundLocalError, match="pruning_idxs"):
            pruner.manual_prune_width(layer.mlp.up_proj, tp.prune_linear_out_channels, [0, 1])
        return
    for layer in model.model.layers:
        pruner.manual_prune_width(layer.mlp.up_proj, tp.prune_linear_out_channels, [0, 1])
    assert hook.last_report.fields == {"intermediate_size": (32, 30)}


@pytest.mark.parametrize("heads", [False, True])
def test_sync_after_loading_a_pruning_history(heads: bool):
    first, again = small.bert(), small.bert()
    kwargs: dict[str, Any] = {"pruning_ratio": 0.5}
    if heads:
        kwargs["head_pruning_ratio"] = 0.5
    hooks, pruners = zip(
        *(attached(model, **kwargs, prune_num_heads=heads) for model in (first, again)),
        strict=True,
    )
    pruners[0].step()
    history = copy.deepcopy(pruners[0].pruning_history())
    pruners[1].load_pruning_history(history)
    report = hooks[1].last_report
    assert again.config.to_dict() == first.config.to_dict()
    assert again.config.num_attention_heads == (2 if heads else 4)
    assert report.fields == hooks[0].last_report.fields
    assert len(report.groups) == len(history)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).last_hidden_state, again(ids).last_hidden_state)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_the_history_is_torch_prunings():
    plain, followed = small.bert(), small.bert()
    reference = self_traced(plain, ignored_layers=all_but_ffn(plain))
    with pytest.warns(PrunerSettingsWarning, match="^hidden_size is kept at 32: ignored_layers="):
        pruner = self_traced(
            followed, ignored_layers=all_but_ffn(followed), hooks=[HFConfigSyncHook()]
        )
    pruner.step()
    reference.step()
    assert type(reference.DG) is tp.DependencyGraph
    histories = (pruner.pruning_history(), reference.pruning_history())
    assert sorted(map(str, histories[0])) == sorted(map(str, histories[1]))
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, followed.get_parameter(name)), name


def test_a_group_pruned_without_a_record_is_followed_all_the_same():
    model = small.llama()
    hook, pruner = attached(model)
    for group in pruner.step(interactive=True):
        group.prune(record_history=False)
    assert pruner.pruning_history() == []
    assert len(hook.last_report.groups) == 3
    assert widths(model) == (24, 48)


# Reports


def test_report_to_json():
    model = small.llama()
    hook, pruner = attached(model)
    pruner.step()
    report = hook.last_report
    data = json.loads(json.dumps(report.to_dict()))
    assert data == report.to_dict()
    seconds = data.pop("seconds")
    assert 0 < seconds < 60
    installed = data.pop("versions")
    assert installed.pop("tp-hf-config") in ("not installed", "0.1.0")
    assert installed == {name: version(name) for name in ("torch", "transformers", "torch-pruning")}
    names = ["hidden_size", "mlp.hidden_size", "mlp.intermediate_size"]
    groups = data.pop("groups")
    assert groups[0] | {"root": "?"} == {
        "root": "?",
        "side": "out",
        "removed": 8,
        "of": 32,
        "layers": 21,
    }
    assert sorted(groups[1:], key=lambda group: group["root"]) == [
        {
            "root": f"model.layers.{layer}.mlp.gate_proj",
            "side": "out",
            "removed": 16,
            "of": 64,
            "layers": 3,
        }
        for layer in range(2)
    ]
    assert data == {
        "schema_version": SCHEMA_VERSION,
        "step": 1,
        "graph": "config graph: 3 groups, each proved by permutation",
        "fields": {
            "hidden_size": {"old": 32, "new": 24},
            "intermediate_size": {"old": 64, "new": 48},
        },
        "attributes": [f"model.layers.{layer}.{name}" for layer in range(2) for name in names],
        "buffers": [],
        "ties": [],
        "proof": "proved: 21 tensors have the shapes that LlamaForCausalLM builds from the new "
        "config.json",
        "parameters": {"before": 23200, "after": 15096},
        "notes": [],
        "inputs": {},
        "refits": None,
        "ranked_by": [],
        "error": None,
    }
    assert SCHEMA_VERSION == 1


@pytest.mark.filterwarnings("ignore:pruned groups are recorded")
def test_a_group_asked_for_by_its_inputs():
    model = small.llama()
    hook, pruner = attached(model)
    for layer in model.model.layers:
        pruner.DG.get_pruning_group(
            layer.mlp.down_proj, tp.prune_linear_in_channels, [3, 4]
        ).prune()
    (first, _) = hook.last_report.to_dict()["groups"]
    assert first == {
        "root": "model.layers.0.mlp.down_proj",
        "side": "in",
        "removed": 2,
        "of": 64,
        "layers": 3,
    }


@pytest.mark.filterwarnings("ignore:pruned groups are recorded")
def test_report_of_a_failed_sync_to_json():
    model = small.llama()
    hook, pruner = attached(model)
    layer = model.model.layers[0].mlp.up_proj
    pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, [0]).prune()
    with pytest.raises(ConfigSyncError):
        hook.sync()
    data = json.loads(json.dumps(hook.last_report.to_dict()))
    assert data["error"].startswith("no LlamaConfig describes LlamaForCausalLM with these widths")
    assert data["fields"] == {}
    assert len(data["groups"]) == 1


def test_report_is_short_enough_for_a_loop():
    model = small.llama(num_hidden_layers=8, tie_word_embeddings=True)
    hook, pruner = attached(model)
    pruner.step()
    lines = str(hook.last_report).splitlines()
    assert lines[0] == (
        "sync 1: 9 groups pruned (config graph); hidden_size 32 -> 24, intermediate_size 64 -> 48"
    )
    assert lines[1].startswith("  parameters: ")
    assert lines[2].startswith("  24 attributes updated; proved: ")
    assert lines[2].endswith(" s")
    assert len(lines) == 3
    assert all(len(line) < 140 for line in lines)


def test_report_notes_and_singular_words():
    report = SyncReport(3, fields={"n_inner": (None, 48)}, buffers=["b"], notes=["look here"])
    assert str(report) == (
        "sync 3: 0 groups pruned; n_inner None -> 48\n  note: look here\n"
        "  1 buffer updated; ; 0.00 s"
    )
    assert SyncReport(1).to_dict()["error"] is None


# What stays as it was


def test_frozen_parameters_stay_frozen():
    model = small.llama(attention_bias=True)
    frozen = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "lm_head.weight",
    }
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    _, pruner = attached(model, pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        pruner.step()
        now = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert now == frozen
    assert widths(model) == (16, 32)


def test_a_wholly_frozen_model_is_pruned_and_stays_frozen():
    model = small.bert().requires_grad_(False)
    _, pruner = attached(model)
    pruner.step()
    assert widths(model) == (24, 48)
    assert not any(p.requires_grad for p in model.parameters())


def test_tied_and_frozen():
    model = small.llama(tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(False)
    _, pruner = attached(model)
    pruner.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad


def surroundings(model: Any) -> dict[str, Any]:
    """What constructing a pruner touches and has to leave alone."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "config": dict(vars(model.config)),
        "configs": [id(m.config) for m in model.modules() if hasattr(m, "config")],
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        },
        "rotate_half": modeling_llama.rotate_half,
        "filters": list(warnings.filters),
        "graph": dict(vars(tp.DependencyGraph)),
        "dependency": tp_base.dependency,
        "ops": dict(vars(tp_ops)),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "rng": torch.random.get_rng_state().tolist(),
    }


def unusual(training: bool) -> Any:
    """A model in a state that a trace would disturb."""
    model = small.llama(attn_implementation="sdpa", num_key_value_heads=2)
    model.config.use_cache = True
    model.train(training)
    model.model.layers[0].mlp.train(not training)
    model.model.layers[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_construction_leaves_everything_as_it_was(training: bool):
    model = unusual(training)
    before = surroundings(model)
    assert before["config"]["_attn_implementation_internal"] == "sdpa"
    pruner = tp.pruner.MetaPruner(
        model,
        None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[HFConfigSyncHook()],
    )
    assert surroundings(model) == before
    pruner.step()
    after = surroundings(model)
    assert (after["training"], after["requires_grad"]) == (
        before["training"],
        before["requires_grad"],
    )
    changed = {"hidden_size", "intermediate_size"}
    assert {k: v for k, v in after["config"].items() if k not in changed} == {
        k: v for k, v in before["config"].items() if k not in changed
    }


@pytest.mark.parametrize("training", [True, False])
def test_a_constructor_that_raises_leaves_everything_as_it_was(training: bool):
    model = unusual(training)
    before = surroundings(model)
    state = small.state_of(model)
    hook = HFConfigSyncHook()

    def fails(ratio: float, steps: int) -> Any:
        assert tp_base.dependency is before["dependency"]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tp.pruner.MetaPruner(
            model,
            None,
            iterative_pruning_ratio_scheduler=fails,
            importance=tp.importance.GroupMagnitudeImportance(),
            hooks=[hook],
        )
    assert surroundings(model) == before
    small.assert_same(state, small.state_of(model))
    pruner = tp.pruner.MetaPruner(  # and the hook is free again
        model,
        None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    pruner.step()
    assert model.config.hidden_size == 24


def test_a_sync_leaves_the_surroundings_as_they_were():
    model = unusual(training=True)
    hook, _ = attached(model)
    before = surroundings(model)
    hook.sync()
    assert surroundings(model) == before


def test_the_model_still_trains_after_a_step():
    model = small.llama(tie_word_embeddings=True)
    _, pruner = attached(model)
    pruner.step()
    model.train()
    ids = torch.arange(1, 9)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.grad is not None for p in model.parameters())


def integers(value: Any) -> int:
    """How many whole numbers are kept in an object, all it holds included."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(map(integers, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(integers, value))
    if is_dataclass(value):
        return integers(vars(value))
    return int(type(value) is int)


@pytest.mark.parametrize("width", [128, 512])
def test_what_a_hook_keeps_does_not_grow_with_widths_nor_its_cut_list_with_steps(width: int):
    model = small.llama(num_hidden_layers=3, intermediate_size=width)
    before = sum(map(sum, (p.shape for p in model.parameters())))
    hook = HFConfigSyncHook(prune="intermediate_size")
    pruner = pruner_with(model, [hook], iterative_steps=30, round_to=1)
    for _ in range(30):
        pruner.step()
    assert len(hook.reports) == 30
    assert model.config.intermediate_size == width * 3 // 4
    for report in hook.reports:
        assert integers(report) == 2 * 3 * 3 + 5  # two a side of each layer, and of the report
        assert len(json.dumps(report.to_dict())) < 2000
    assert hook.cuts is not None
    assert integers(dict(hook.cuts.edits)) == 9 * model.config.intermediate_size < before


def test_repr_says_settings_and_state():
    hook = HFConfigSyncHook(strict=True, per_layer=True, make_inputs=lambda config: {})
    settings = "HFConfigSyncHook(strict=True, per_layer=True, make_inputs=...)"
    assert repr(hook) == f"{settings}: attached to no pruner, 0 reports"
    hook, pruner = attached(small.llama(), iterative_steps=2)
    groups = list(pruner.step(interactive=True))
    with pytest.warns(PrunerSettingsWarning, match="recorded but not cut yet"):
        groups[1].prune()
    assert repr(hook) == (
        "HFConfigSyncHook(): BasePruner of LlamaForCausalLM, step 1 of 2, 1 reports, recorded "
        "groups are not cut yet (hook.pending)"
    )
