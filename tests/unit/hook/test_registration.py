"""``hooks=`` on every Torch-Pruning pruner, and its undoing."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import weakref
from typing import Any, ClassVar

import pytest
import small
import torch
import torch_pruning as tp
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    Handle,
    HFConfigSyncHook,
    PrunerHook,
)
from tp_hf_config.graph.config_graph import ConfigGraph
from tp_hf_config.graph.sides import ConfigGroup
from tp_hf_config.hook.registration import register

CLASSES = {
    name: getattr(tp.pruner, name)
    for name in (
        "MetaPruner",
        "BasePruner",
        "MagnitudePruner",
        "GroupNormPruner",
        "BNScalePruner",
        "GrowingRegPruner",
    )
}
Base: Any = tp.pruner.BasePruner


class Spy:
    """A hook that notes every call; all it shares with the library's own is the interface."""

    def __init__(self, name: str = "spy", log: list[str] | None = None):
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.pruners: list[Any] = []

    def after_step(self, pruner: Any) -> None:
        self.log.append(self.name)
        self.pruners.append(pruner)


class FullSpy(Spy):
    """A hook with everything that a hook may have."""

    def constructing(self, arguments: dict[str, Any]) -> FullSpy:
        self.log.append(f"constructing {type(arguments['model']).__name__}")
        return self

    def __enter__(self) -> None:
        self.log.append("enter")

    def __exit__(self, *exception: object) -> None:
        self.log.append("exit" if exception[0] is None else f"exit {exception[0].__name__}")

    def attach(self, pruner: Any) -> None:
        self.log.append("attach")

    def detach(self, pruner: Any) -> None:
        self.log.append("detach")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("as_list", [True, False])
def test_every_pruner_takes_hooks(name: str, as_list: bool):
    model, spy = small.mlp(), Spy()
    pruner = small.pruner_of(model, CLASSES[name], hooks=[spy] if as_list else spy)
    assert spy.log == []
    pruner.step()
    assert spy.log == ["spy"]
    assert spy.pruners == [pruner]
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(8, 8), (6, 8), (4, 6)]


@pytest.mark.parametrize("empty", [None, [], ()])
def test_no_hooks_is_no_hooks(empty: Any):
    pruner = small.pruner_of(small.mlp(), hooks=empty)
    assert "step" not in vars(pruner)


def test_tuple_of_hooks():
    first, second = Spy(), Spy()
    pruner = small.pruner_of(small.mlp(), hooks=(first, second))
    pruner.step()
    assert (first.log, second.log) == (["spy"], ["spy"])


class Plain(Base):
    """Inherits its constructor."""


class OwnSignature(Base):
    """Spells out its arguments, as Torch-Pruning's own do."""

    def __init__(self, model: nn.Module, example_inputs: Any, importance: Any, ratio: float = 0.5):
        super().__init__(
            model,
            example_inputs,
            importance,
            pruning_ratio=ratio,
            ignored_layers=[model[4]],
        )
        self.ratio = ratio


class Keywords(Base):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen = kwargs


class Mixin:
    def __init__(self, *args: Any, label: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label = label


class Mixed(Mixin, Base):
    """Its constructor comes from a class that is no pruner."""


class OfGroupNorm(tp.pruner.GroupNormPruner):
    pass


@pytest.mark.parametrize("cls", [Plain, Keywords, Mixed, OfGroupNorm])
def test_subclass_defined_after_the_import(cls: Any):
    spy = Spy()
    pruner = small.pruner_of(small.mlp(), cls, hooks=[spy])
    pruner.step()
    assert spy.log == ["spy"]
    assert spy.pruners == [pruner]


def test_subclass_with_a_signature_of_its_own():
    model, spy = small.mlp(), Spy()
    importance = tp.importance.MagnitudeImportance()
    pruner = OwnSignature(model, torch.rand(1, 8), importance, 0.25, hooks=spy)
    pruner.step()
    assert spy.log == ["spy"]
    assert pruner.ratio == 0.25
    assert model[0].out_features == 12


def test_subclass_never_sees_hooks():
    pruner = small.pruner_of(small.mlp(), Keywords, hooks=[Spy()])
    assert "hooks" not in pruner.seen


def test_mixin_keeps_its_own_arguments_and_is_not_touched():
    spy = Spy()
    pruner = small.pruner_of(small.mlp(), Mixed, hooks=[spy], label="mine")
    assert pruner.label == "mine"
    assert not hasattr(Mixin.__init__, "_tp_hf_config")


def test_subclass_that_passes_hooks_on_itself():
    class Passing(Base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, hooks=[spy], **kwargs)

    spy = Spy()
    pruner = small.pruner_of(small.mlp(), Passing)
    pruner.step()
    assert spy.log == ["spy"]


def test_subclass_of_a_class_that_keeps_init_subclass_to_itself():
    class Registered(Base):
        known: ClassVar[list[type]] = []

        def __init_subclass__(cls, **kwargs: Any):
            super().__init_subclass__(**kwargs)
            Registered.known.append(cls)

    class Leaf(Registered):
        def __init__(self, model: nn.Module, example_inputs: Any, importance: Any, **kwargs: Any):
            super().__init__(model, example_inputs, importance, **kwargs)

    spy = Spy()
    pruner = small.pruner_of(small.mlp(), Leaf, hooks=[spy])
    pruner.step()
    assert Registered.known == [Leaf]
    assert spy.log == ["spy"]


def test_init_subclass_arguments_reach_the_classes_after_it():
    class Tagged:
        def __init_subclass__(cls, tag: str = "", **kwargs: Any):
            super().__init_subclass__(**kwargs)
            cls.tag = tag

    class Both(Base, Tagged, tag="x"):
        pass

    assert Both.tag == "x"


def test_subclass_with_hooks_of_its_own_is_left_alone():
    class Own(Base):
        def __init__(self, *args: Any, hooks: str = "none", **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.own_hooks = hooks

    init = vars(Own)["__init__"]
    pruner = small.pruner_of(small.mlp(), Own, hooks="mine")
    assert pruner.own_hooks == "mine"
    assert "step" not in vars(pruner)
    assert not hasattr(init, "_tp_hf_config")


def test_positional_arguments():
    model, spy = small.mlp(), Spy()
    importance = tp.importance.MagnitudeImportance()
    # model, example_inputs, importance, global_pruning, pruning_ratio
    pruner = Base(model, torch.rand(1, 8), importance, False, 0.25, hooks=[spy])
    assert pruner.pruning_ratio == 0.25
    assert pruner.global_pruning is False
    pruner.step()
    assert spy.log == ["spy"]
    assert model[0].out_features == 12


def test_model_as_a_keyword_reaches_constructing():
    model, spy = small.mlp(), FullSpy()
    importance = tp.importance.MagnitudeImportance()
    Base(importance=importance, example_inputs=torch.rand(1, 8), model=model, hooks=[spy])
    assert spy.log == ["constructing Sequential", "enter", "exit", "attach"]


def test_subclass_with_its_own_step_fires_once():
    class Stepping(Base):
        def step(self, interactive: bool = False) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(interactive)

    spy = Spy()
    pruner = small.pruner_of(small.mlp(), Stepping, hooks=[spy])
    pruner.step()
    assert pruner.steps == 1
    assert spy.log == ["spy"]


def test_classes_defined_before_the_import():
    printed = small.python(
        """
        import torch, torch_pruning as tp
        from torch import nn

        Base = tp.pruner.BasePruner
        class Plain(Base): pass
        class Strict(Base):
            def __init__(self, model, example_inputs, importance):
                super().__init__(model, example_inputs, importance, ignored_layers=[model[2]])
        class Mixin:
            def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs)
        class Mixed(Mixin, Base): pass
        class OfStrict(Strict): pass
        class OfGroupNorm(tp.pruner.GroupNormPruner): pass
        class Own(Base):
            def __init__(self, *args, hooks=None, **kwargs):
                super().__init__(*args, **kwargs); self.mine = hooks
        own_init = Own.__init__

        import tp_hf_config
        class Spy:
            calls = 0
            def after_step(self, pruner): self.calls += 1

        def fired(cls):
            spy = Spy()
            model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
            pruner = cls(model, torch.rand(1, 4), tp.importance.MagnitudeImportance(), hooks=[spy])
            pruner.step()
            return spy.calls
        print([fired(cls) for cls in (Plain, Strict, Mixed, OfStrict, OfGroupNorm, Own)])
        print(Own.__init__ is own_init)
        """
    )
    assert printed == "[1, 1, 1, 1, 1, 0]\nTrue"


def test_without_hooks_nothing_is_different():
    code = """
        import torch, torch_pruning as tp
        from torch import nn
        {}
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 4))
        pruner = tp.pruner.MetaPruner(
            model, torch.rand(1, 8), tp.importance.MagnitudeImportance(), pruning_ratio=0.4,
            iterative_steps=2, ignored_layers=[model[3]],
        )
        print(sorted(vars(pruner)))
        for _ in range(2):
            pruner.step()
        print(pruner.pruning_history())
        print([p.tolist() for p in model.parameters()])
        """
    assert small.python(code.format("")) == small.python(code.format("import tp_hf_config"))


def test_signature_and_docs_are_torch_prunings():
    printed = small.python(
        """
        import inspect, torch_pruning as tp
        before = inspect.signature(tp.pruner.BasePruner), tp.pruner.BasePruner.__init__.__doc__
        import tp_hf_config
        print((inspect.signature(tp.pruner.BasePruner), tp.pruner.BasePruner.__init__.__doc__)
              == before)
        """
    )
    assert printed == "True"


# Torch-Pruning's mutable defaults


DICTS = ("num_heads", "in_channel_groups", "out_channel_groups", "channel_groups")


def defaults_of(cls: Any) -> dict[str, dict[Any, Any]]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameters[name].default for name in DICTS}


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_leaks_through_default_dicts(name: str):
    cls = CLASSES[name]
    before = {key: dict(value) for key, value in defaults_of(cls).items()}
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1))
    arguments = (model, torch.rand(1, 4, 2, 2), tp.importance.MagnitudeImportance())
    pruner = cls(*arguments, hooks=[Spy()])
    assert pruner.out_channel_groups == {model[1]: 2}  # Torch-Pruning writes into its own
    assert defaults_of(cls) == before
    other = small.pruner_of(small.mlp(), cls, hooks=[Spy()])
    assert (other.num_heads, other.in_channel_groups, other.out_channel_groups) == ({}, {}, {})
    assert model[1] not in small.pruner_of(small.mlp(), cls).out_channel_groups


def test_the_users_dicts_are_not_written_to():
    model = small.bert()
    attention = [layer.attention.self for layer in model.encoder.layer]
    kwargs: dict[str, Any] = {name: {} for name in DICTS[:3]}
    kwargs["num_heads"] = {each.query: 4 for each in attention}
    before = {name: dict(given) for name, given in kwargs.items()}
    pruner = tp.pruner.MetaPruner(
        model,
        None,
        **kwargs,
        prune_num_heads=True,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        hooks=[HFConfigSyncHook()],
    )
    pruner.step()
    assert set(pruner.num_heads.values()) == {2}
    assert kwargs == before


# What a hook is


class Weak:
    def __init__(self) -> None:
        self.after_step_count = 0


@pytest.mark.parametrize("wrong", [Weak(), "text", 3, {"a": 1}])
def test_an_object_that_is_no_hook(wrong: Any):
    message = (
        f"hooks: {type(wrong).__name__} has no method after_step(pruner). Pass HFConfigSyncHook() "
        "or another object with this method."
    )
    model = small.mlp()
    with pytest.raises(TypeError) as raised:
        small.pruner_of(model, hooks=[Spy(), wrong])
    assert str(raised.value) == message
    pruner = small.pruner_of(model)
    before = dict(vars(pruner))
    with pytest.raises(TypeError) as raised:
        register(pruner, wrong)
    assert str(raised.value) == message
    assert vars(pruner) == before


def test_a_class_is_no_hook():
    with pytest.raises(TypeError) as raised:
        small.pruner_of(small.mlp(), hooks=[Spy])
    assert str(raised.value) == "hooks: Spy is a class. Pass an object: Spy()"


def test_a_wrong_hook_is_refused_before_any_tracing():
    spy = FullSpy()
    with pytest.raises(TypeError, match="has no method after_step"):
        small.pruner_of(small.mlp(), hooks=[spy, object()])
    assert spy.log == []


def test_hooks_are_the_documented_interface():
    assert isinstance(HFConfigSyncHook(), PrunerHook)
    assert isinstance(Spy(), PrunerHook)
    assert not isinstance(Weak(), PrunerHook)


def test_hooks_fire_in_the_order_given():
    log: list[str] = []
    pruner = small.pruner_of(small.mlp(), hooks=[Spy("b", log), Spy("a", log)])
    register(pruner, Spy("c", log))
    pruner.step()
    assert log == ["b", "a", "c"]


def test_everything_a_hook_may_have_is_called_in_order():
    log: list[str] = []
    spy = FullSpy("full", log)
    pruner = small.pruner_of(small.mlp(), hooks=[spy])
    pruner.step()
    handle = register(pruner, Spy())
    handle.remove()
    assert log == ["constructing Sequential", "enter", "exit", "attach", "full"]


def fails(model: nn.Module, example_inputs: Any) -> Any:
    raise RuntimeError("mine")


def test_constructing_ends_when_the_constructor_raises():
    log: list[str] = []
    with pytest.raises(RuntimeError, match="mine"):
        small.pruner_of(small.mlp(), hooks=[FullSpy("full", log)], forward_fn=fails)
    assert log == ["constructing Sequential", "enter", "exit RuntimeError"]


def test_an_argument_that_torch_pruning_does_not_know():
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        small.pruner_of(small.mlp(), hooks=[Spy()], nonsense=1)


def test_a_hook_that_cannot_be_attached_takes_the_others_off():
    class Refuses(Spy):
        def attach(self, pruner: Any) -> None:
            raise ValueError("not this one")

    model, hook = small.bert(), HFConfigSyncHook()
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.GroupMagnitudeImportance(),
    }
    with pytest.raises(ValueError, match="not this one"):
        tp.pruner.MetaPruner(model, **arguments, hooks=[hook, Refuses()])
    pruner = tp.pruner.MetaPruner(model, **arguments, pruning_ratio=0.25, hooks=[hook])
    pruner.step()
    assert model.config.hidden_size == 24


# Registering and removing


def everything(obj: Any) -> dict[str, Any]:
    return dict(vars(obj))


def same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is before[key] for key in now)


def hf_pruner(cls: Any = tp.pruner.MetaPruner, **kwargs: Any) -> Any:
    """A pruner of BERT that traces by itself, unless a hook is among its arguments."""
    arguments = {
        "model": small.bert(),
        "example_inputs": {"input_ids": torch.arange(1, 9)[None]},
        "importance": tp.importance.GroupMagnitudeImportance(),
        "pruning_ratio": 0.25,
        "output_transform": lambda output: output.pooler_output,
    }
    return cls(**{**arguments, **kwargs})


def test_attach_then_remove_leaves_the_pruner_as_it_was():
    pruner = hf_pruner()
    before, graph, model = everything(pruner), everything(pruner.DG), everything(pruner.model)
    handle = HFConfigSyncHook().register(pruner)
    assert isinstance(handle, Handle)
    assert not same(everything(pruner), before)
    handle.remove()
    assert same(everything(pruner), before)
    assert same(everything(pruner.DG), graph)
    assert same(everything(pruner.model), model)
    handle.remove()  # a second call does nothing
    assert same(everything(pruner), before)
    pruner.step()
    assert pruner.model.config.hidden_size == 32


def test_register_follows():
    pruner = hf_pruner()
    hook = HFConfigSyncHook()
    hook.register(pruner)
    pruner.step()
    assert pruner.model.config.hidden_size == 24
    assert len(hook.reports) == 1


def test_step_of_a_pruner_that_nobody_holds():
    spy = Spy()
    small.pruner_of(small.mlp(), hooks=[spy]).step()
    assert spy.log == ["spy"]
    step = small.pruner_of(small.mlp(), hooks=[spy]).step
    gc.collect()
    step()
    assert spy.log == ["spy", "spy"]
    groups = small.pruner_of(small.mlp(), hooks=[spy]).step(interactive=True)
    gc.collect()
    assert len([group.prune() for group in groups]) == 2
    assert spy.log == ["spy"] * 3


def test_handle_is_a_context_manager():
    pruner = hf_pruner()
    before = everything(pruner)
    hook = HFConfigSyncHook()
    with hook.register(pruner) as handle:
        assert isinstance(handle, Handle)
        pruner.step()
    assert vars(pruner).keys() == before.keys()
    assert pruner.model.config.hidden_size == 24
    with pytest.raises(RuntimeError, match="mine"), hook.register(pruner):
        raise RuntimeError("mine")
    assert "step" not in vars(pruner)


def test_removing_one_of_two_leaves_the_other():
    log: list[str] = []
    pruner = small.pruner_of(small.mlp(), iterative_steps=2)
    before = everything(pruner)
    first, second = FullSpy("first", log), FullSpy("second", log)
    one, two = register(pruner, first), register(pruner, second)
    one.remove()
    pruner.step()
    assert log == ["attach", "attach", "detach", "second"]
    two.remove()
    assert log[-1] == "detach"
    assert everything(pruner).keys() == before.keys()
    pruner.step()
    assert log[-1] == "detach"


def test_removing_a_hook_while_hooks_fire():
    log: list[str] = []

    class Leaves(Spy):
        def after_step(self, pruner: Any) -> None:
            super().after_step(pruner)
            handle.remove()

    pruner = small.pruner_of(small.mlp(), iterative_steps=2)
    handle = register(pruner, Leaves("once", log))
    register(pruner, Spy("always", log))
    pruner.step()
    pruner.step()
    assert log == ["once", "always", "always"]


def test_a_step_that_the_user_put_on_the_pruner_comes_back():
    pruner = small.pruner_of(small.mlp())
    calls: list[Any] = []

    def mine(interactive: bool = False) -> None:
        calls.append(interactive)

    pruner.step = mine
    spy = Spy()
    handle = register(pruner, spy)
    pruner.step()
    assert calls == [False]
    assert spy.log == ["spy"]
    handle.remove()
    assert vars(pruner)["step"] is mine


def test_a_get_pruning_group_that_the_user_put_on_the_graph_comes_back():
    pruner = hf_pruner()
    original = pruner.DG.get_pruning_group

    def mine(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    pruner.DG.get_pruning_group = mine
    HFConfigSyncHook().register(pruner).remove()
    assert vars(pruner.DG).get("get_pruning_group") is mine


def test_a_hook_gives_the_trace_back():
    pruner = hf_pruner()
    trace, graph = pruner.DG, everything(pruner.DG)
    handle = HFConfigSyncHook().register(pruner)
    assert isinstance(pruner.DG, ConfigGraph)
    handle.remove()
    assert pruner.DG is trace
    assert same(everything(pruner.DG), graph)


# Pruners that have traced their model


def layers_of(model: Any, name: str) -> list[nn.Module]:
    return [layer.get_submodule(name) for layer in model.encoder.layer]


def late_schedule(ratio: float, steps: int) -> list[float]:
    """Nothing in the first step, all in the last."""
    return [0.0] * steps + [ratio]


SETTINGS: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
    "ratio": (lambda model: {}, {"hidden_size": (32, 24), "intermediate_size": (64, 48)}),
    "round_to": (
        lambda model: {"round_to": 20},
        {"hidden_size": (32, 20), "intermediate_size": (64, 40)},
    ),
    "ignored layers": (
        lambda model: {"ignored_layers": [model.embeddings]},
        {"intermediate_size": (64, 48)},
    ),
    "an ignored parameter": (
        lambda model: {"ignored_layers": [model.embeddings.word_embeddings.weight]},
        {"intermediate_size": (64, 48)},
    ),
    "ratios of layers": (
        lambda model: {
            "pruning_ratio_dict": dict.fromkeys(layers_of(model, "intermediate.dense"), 0.5)
        },
        {"hidden_size": (32, 24), "intermediate_size": (64, 32)},
    ),
    "ratios of modules": (
        lambda model: {"pruning_ratio_dict": dict.fromkeys(layers_of(model, "intermediate"), 0.5)},
        {"hidden_size": (32, 24), "intermediate_size": (64, 32)},
    ),
    "a schedule": (
        lambda model: {
            "iterative_pruning_ratio_scheduler": late_schedule,
            "iterative_steps": 2,
            "pruning_ratio_dict": dict.fromkeys(layers_of(model, "intermediate.dense"), 0.5),
        },
        {},
    ),
    "heads": (
        lambda model: {
            "num_heads": dict.fromkeys(
                [
                    layer
                    for name in ("query", "key", "value")
                    for layer in layers_of(model, f"attention.self.{name}")
                ],
                4,
            ),
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": 0.5,
        },
        {
            "num_attention_heads": (4, 2),
            "hidden_size": (32, 16),
            "intermediate_size": (64, 48),
        },
    ),
    "heads of layers": (
        lambda model: {
            "num_heads": dict.fromkeys(layers_of(model, "attention.self.query"), 4),
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio_dict": {model: 0.5},
        },
        {
            "num_attention_heads": (4, 2),
            "hidden_size": (32, 16),
            "intermediate_size": (64, 48),
        },
    ),
}


@pytest.mark.filterwarnings("ignore::tp_hf_config.PrunerSettingsWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_arguments_mean_after_a_trace_what_they_mean_before(name: str):
    settings, fields = SETTINGS[name]
    models = small.bert(), small.bert()
    hooks = HFConfigSyncHook(), HFConfigSyncHook()
    late = hf_pruner(model=models[0], **settings(models[0]))
    assert type(late.DG) is tp.DependencyGraph
    hooks[0].register(late)
    early = hf_pruner(model=models[1], **settings(models[1]), hooks=[hooks[1]])
    for pruner in (late, early):
        pruner.step()
    first, second = (hook.last_report for hook in hooks)
    assert first.fields == fields
    assert (first.graph, first.groups, first.fields, first.notes) == (
        second.graph,
        second.groups,
        second.fields,
        second.notes,
    )
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    kept = ("per_step_pruning_ratio", "iterative_pruning_ratio_scheduler", "current_step")
    assert all(getattr(late, key) == getattr(early, key) for key in kept)


def test_layers_that_are_ranked_together_stay_so():
    """One key of two layers: with global ranking, nobody knows how much of each goes."""
    model = small.bert()
    key = tuple(layers_of(model, "intermediate.dense"))
    pruner = hf_pruner(model=model, global_pruning=True, pruning_ratio_dict={key: 0.5})
    before, graph, state = everything(pruner), everything(pruner.DG), small.state_of(model)
    with pytest.raises(ConfigSyncError, match="the 2 groups of intermediate_size are ranked"):
        HFConfigSyncHook().register(pruner)
    assert same(everything(pruner), before)
    assert same(everything(pruner.DG), graph)
    small.assert_same(state, small.state_of(model))


@pytest.mark.parametrize("cls", [tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner])
def test_groups_that_a_pruner_regularises_are_those_of_the_new_graph(cls: Any):
    pruner = hf_pruner(cls)
    before = everything(pruner)
    handle = HFConfigSyncHook().register(pruner)
    assert {type(group) for group in pruner._groups} == {ConfigGroup}
    assert len(pruner._groups) == 8
    handle.remove()
    assert same(everything(pruner), before)


TRACED = (
    "this {name} has already traced its model, and the groups of that trace are not proved. They "
    "cannot be replaced by the graph made from the config: {why}. Pass the hook to the pruner's "
    "constructor: {name}(model, ..., hooks=[HFConfigSyncHook()])."
)


def test_a_pruner_that_has_pruned_by_its_trace_is_refused():
    """Nothing went: the config and the weights still agree, and only the steps are gone."""
    pruner = hf_pruner(iterative_steps=2, iterative_pruning_ratio_scheduler=late_schedule)
    pruner.step()
    before, state = everything(pruner), small.state_of(pruner.model)
    with pytest.raises(ValueError, match="traced") as raised:
        HFConfigSyncHook().register(pruner)
    why = "the pruner has already pruned with that trace"
    assert str(raised.value) == TRACED.format(name=type(pruner).__name__, why=why)
    assert same(everything(pruner), before)
    small.assert_same(state, small.state_of(pruner.model))


def test_a_pruner_with_a_constructor_of_its_own_is_refused():
    class Own(Base):
        @functools.wraps(Base.__init__)
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.groups = list(self.DG.get_all_groups())

    pruner = hf_pruner(Own)
    before, state = everything(pruner), small.state_of(pruner.model)
    with pytest.raises(ValueError, match="traced") as raised:
        HFConfigSyncHook().register(pruner)
    why = "the constructor of Own may have stored groups of that trace"
    assert str(raised.value) == TRACED.format(name="Own", why=why)
    assert same(everything(pruner), before)
    small.assert_same(state, small.state_of(pruner.model))
    hook = HFConfigSyncHook()
    hf_pruner(Own, hooks=[hook]).step()
    assert hook.last_report.fields["hidden_size"] == (32, 24)


def test_channel_groups_of_other_pruners_are_not_this_ones():
    """Torch-Pruning's default dicts carry over from one pruner to the next."""
    other = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1))
    pruner = hf_pruner()
    pruner.out_channel_groups = {other[1]: 2}
    hook = HFConfigSyncHook()
    hook.register(pruner)
    assert other[1] not in pruner.out_channel_groups


def test_two_config_hooks_on_one_pruner():
    message = "already has an HFConfigSyncHook, and it can have one"
    with pytest.raises(ValueError, match=message):
        hf_pruner(hooks=(HFConfigSyncHook(), HFConfigSyncHook()))
    first = HFConfigSyncHook()
    pruner = hf_pruner(hooks=[first])
    with pytest.raises(ValueError, match=message):
        HFConfigSyncHook().register(pruner)
    pruner.step()
    assert first.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}


def test_one_hook_on_two_pruners():
    hook = HFConfigSyncHook()
    first, second = hf_pruner(hooks=[hook]), hf_pruner()
    before = everything(second)
    with pytest.raises(ValueError, match="another pruner") as raised:
        hook.register(second)
    assert str(raised.value) == (
        "this HFConfigSyncHook is attached to another pruner. Make a hook for each pruner, or "
        "first call remove() on the handle that register() returned for the other pruner"
    )
    assert same(everything(second), before)
    first.step()
    assert first.model.config.hidden_size == 24


def test_a_hook_moves_on_once_removed():
    hook = HFConfigSyncHook()
    first, second = hf_pruner(), hf_pruner()
    hook.register(first).remove()
    hook.register(second)
    second.step()
    assert (first.model.config.hidden_size, second.model.config.hidden_size) == (32, 24)


def test_sync_of_a_hook_on_no_pruner():
    hook = HFConfigSyncHook()
    assert hook.last_report is None
    with pytest.raises(ValueError, match="attached to no pruner") as raised:
        hook.sync()
    assert str(raised.value) == (
        "this HFConfigSyncHook is attached to no pruner. Pass it to the pruner as hooks=[hook], "
        "or call hook.register(pruner)"
    )
    handle = hook.register(hf_pruner())
    handle.remove()
    with pytest.raises(ValueError, match="attached to no pruner"):
        hook.sync()


def test_a_pruner_and_its_model_are_freed():
    pruner = hf_pruner(hooks=[HFConfigSyncHook()])
    pruner.step()
    references = weakref.ref(pruner), weakref.ref(pruner.model)
    del pruner
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_the_model_carries_nothing_of_the_hook():
    model = small.bert()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[HFConfigSyncHook()],
    )
    pruner.step()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    copied = copy.deepcopy(model)
    assert copied.config.hidden_size == model.config.hidden_size == 16
