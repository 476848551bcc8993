"""From the shapes of a whole model to a config that builds them, or why there is none."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import small
import transformers as hf
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tp_hf_config.fieldmap.field_map import FieldMap
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.fieldmap.solve import Conflict, Recovery, recover
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.config_json import FieldPath, with_values
from tp_hf_config.model.shapes import shapes

Shapes = dict[str, tuple[int, ...]]
EXAMPLES = settings(max_examples=6, deadline=None, derandomize=True)

FIELDS: dict[str, list[FieldPath]] = {
    "llama": [
        ("hidden_size",),
        ("intermediate_size",),
        ("num_attention_heads",),
        ("num_key_value_heads",),
    ],
    "bert": [("hidden_size",), ("intermediate_size",), ("num_attention_heads",)],
    "t5": [("d_model",), ("d_ff",), ("d_kv",), ("num_heads",)],
    "swin": [("embed_dim",), ("num_heads", 0), ("num_heads", 1)],
    "wav2vec2": [("conv_dim", 0), ("conv_dim", 1), ("hidden_size",), ("intermediate_size",)],
    "clip": [
        ("text_config", "hidden_size"),
        ("text_config", "intermediate_size"),
        ("vision_config", "hidden_size"),
        ("vision_config", "num_attention_heads"),
        ("projection_dim",),
    ],
    "mixtral": [("hidden_size",), ("intermediate_size",), ("num_local_experts",)],
}
"""Widths, heads that no shape shows, entries of lists, and nested configs."""


@lru_cache
def known_of(name: str) -> FieldMap:
    return map_of(zoo.build(name))


@lru_cache
def known_llama(**changes: Any) -> FieldMap:
    return map_of(small.llama(**changes))


def built(field_map: FieldMap, values: dict[FieldPath, int]) -> Shapes | None:
    """What the class builds at some values; None: it refuses them, or builds other tensors."""
    model = field_map.builder.build(with_values(field_map.data, dict(values)))
    names = shapes(field_map.builder.build(field_map.data))
    found = None if isinstance(model, Refusal) else shapes(model)
    return found if found is not None and found.keys() == names.keys() else None


def target(field_map: FieldMap, **values: int) -> Shapes:
    found = built(field_map, {(name,): value for name, value in values.items()})
    assert found is not None
    return found


def proved(field_map: FieldMap, found: Recovery) -> Shapes:
    """What the recovered config builds."""
    model = field_map.builder.build(found.data)
    assert not isinstance(model, Refusal)
    return shapes(model)


# Widths that the class takes are found


@pytest.mark.parametrize("name", FIELDS)
@EXAMPLES
@given(data=st.data())
def test_random_widths_are_recovered(name: str, data: st.DataObject):
    known = known_of(name)
    fields = data.draw(st.lists(st.sampled_from(FIELDS[name]), min_size=1, max_size=4, unique=True))
    values = {}
    for path in fields:
        now: Any = known.data
        for key in path:
            now = now[key]
        part = data.draw(st.integers(1, 8))
        values[path] = max(1, now * part // 8)
    wanted = built(known, values)
    assume(wanted is not None)
    assert wanted is not None
    found = recover(known, wanted)
    if isinstance(found, Conflict):
        assert len(found.ambiguous) > 1, (values, found)
        choices = [recover(known, wanted, one) for one in found.ambiguous]
    else:
        choices = [found]
    for one in choices:
        assert isinstance(one, Recovery), (values, one)
        assert proved(known, one) == wanted


def test_what_no_shape_shows_stays_and_is_named():
    known = known_of("bert")
    found = recover(known, target(known, intermediate_size=40))
    assert isinstance(found, Recovery)
    assert found.values[("intermediate_size",)] == 40
    assert found.values[("num_attention_heads",)] == 4
    assert found.undecided == {("num_attention_heads",)}


def test_an_image_size_has_to_be_given():
    """Pictures are cut into whole patches of eight: several sizes build the same."""
    known = known_of("vit")
    wanted = target(known, image_size=26)
    found = recover(known, wanted)
    assert isinstance(found, Refusal)
    assert "position_embeddings" in found.reason
    told = recover(known, wanted, {("image_size",): 26})
    assert isinstance(told, Recovery)
    assert told.values[("image_size",)] == 26
    stays = recover(known, target(known))
    assert isinstance(stays, Recovery)
    assert stays.values == known.sizes


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("t5", "shared.weight", (0, 64)),
        ("swin", "swin.embeddings.patch_embeddings.projection.weight", (0, 3, 4, 4)),
    ],
)
def test_a_dimension_of_nothing(name: str, tensor: str, shape: tuple[int, ...]):
    known = known_of(name)
    found = recover(known, {**target(known), tensor: shape})
    assert isinstance(found, Refusal | Conflict)
    told = str(found)
    assert tensor in told, told


def test_heads_move_with_a_hidden_size_that_they_do_not_divide():
    known = known_of("bert")
    wanted = target(known, hidden_size=51, num_attention_heads=3)
    found = recover(known, wanted, {("num_attention_heads",): 3})
    assert isinstance(found, Recovery)
    assert found.undecided == set()
    alone = recover(known, wanted)  # one head, or three: four do not divide 51
    assert isinstance(alone, Recovery)
    assert alone.values[("num_attention_heads",)] == 3
    assert alone.values[("hidden_size",)] == 51
    assert proved(known, alone) == wanted


def test_heads_and_head_dim_that_both_moved():
    known = known_of("qwen3")  # 4 query heads and 2 key/value heads of 12
    wanted = target(known, num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    found = recover(known, wanted)
    assert isinstance(found, Recovery)
    assert found.values[("head_dim",)] == 6
    assert found.values[("num_attention_heads",)] == 2
    assert found.values[("num_key_value_heads",)] == 1


@pytest.mark.parametrize(
    "values",
    [
        {"num_heads": 2, "hidden_size": 16},
        {"head_dim": 8, "hidden_size": 16},
        {"expand": 1, "head_dim": 8},
        {"expand": 4, "hidden_size": 16},
        {"num_heads": 8, "head_dim": 8},
    ],
)
def test_fields_that_the_class_takes_in_proportion(values: dict[str, int]):
    known = known_of("mamba2")
    found = recover(known, target(known, **values))
    assert isinstance(found, Recovery), found
    whole = {"hidden_size": 32, "expand": 2, "num_heads": 4, "head_dim": 16, **values}
    assert {name: found.values[(name,)] for name in whole} == whole


def test_key_value_heads_of_a_class_without_a_head_dim():
    config = hf.StableLmConfig(**{**zoo._GQA, "num_attention_heads": 8, "num_key_value_heads": 8})
    field_map = map_of(hf.StableLmForCausalLM(config))
    wanted = target(field_map, hidden_size=48, num_key_value_heads=4)
    heads = ("num_attention_heads",)
    found = recover(field_map, wanted, {heads: 8})  # 8 and 4 heads of 6, or 16 and 8 of 3
    assert isinstance(found, Recovery)
    assert found.values[("num_key_value_heads",)] == 4
    assert found.values[("hidden_size",)] == 48
    assert proved(field_map, found) == wanted
    several = recover(field_map, wanted)
    assert isinstance(several, Conflict)
    assert [one[heads] for one in several.ambiguous] == [8, 16]


def test_layers_of_a_deep_model_and_entries_of_a_short_list():
    known = known_of("wav2vec2")
    first, second = known.data["conv_dim"][:2]
    wanted = built(known, {("conv_dim", 0): first - 8, ("conv_dim", 1): second - 4})
    assert wanted is not None
    found = recover(known, wanted)
    assert isinstance(found, Recovery)
    assert found.data["conv_dim"][:2] == [first - 8, second - 4]


def test_the_target_may_hold_tied_tensors_once():
    known = known_llama(tie_word_embeddings=True, num_hidden_layers=6)
    wanted = target(known, hidden_size=28, intermediate_size=40)
    del wanted["lm_head.weight"]
    found = recover(known, wanted)
    assert isinstance(found, Recovery)
    assert found.values[("hidden_size",)] == 28
    assert found.data["num_hidden_layers"] == 6


# What no config says is refused, with the reason


def test_layers_that_need_different_widths_are_named():
    known = known_llama(num_hidden_layers=6)
    wanted = target(known, intermediate_size=48)
    for name, shape in target(known, intermediate_size=40).items():
        if name.startswith("model.layers.4."):
            wanted[name] = shape
    found = recover(known, wanted)
    assert isinstance(found, Conflict)
    needs = found.needs[("intermediate_size",)]
    assert sorted(needs) == [40, 48]
    assert {name for name, _ in needs[40]} == {  # type: ignore[index]
        f"model.layers.4.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert len({name for name, _ in needs[48]}) == 15  # type: ignore[index]


def test_shapes_that_fit_several_configs():
    field_map = map_of(hf.MistralForCausalLM(hf.MistralConfig(**zoo._GQA, head_dim=8)))
    heads, kv, dim = ("num_attention_heads",), ("num_key_value_heads",), ("head_dim",)
    wanted = target(field_map, num_attention_heads=2, num_key_value_heads=1)
    found = recover(field_map, wanted)
    assert found == Conflict(
        ambiguous=[{heads: 2, kv: 1, dim: 8}, {heads: 4, kv: 2, dim: 4}]
    ) or found == Conflict(ambiguous=[{heads: 4, kv: 2, dim: 4}, {heads: 2, kv: 1, dim: 8}])
    told = recover(field_map, wanted, {dim: 8})
    assert isinstance(told, Recovery)
    assert (told.values[heads], told.values[kv]) == (2, 1)
    assert proved(field_map, told) == wanted


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (
            "model.layers.9.mlp.up_proj.weight",
            (64, 32),
            "LlamaForCausalLM builds no model.layers.9.mlp.up_proj.weight from this config at any "
            "width",
        ),
        (
            "model.layers.1.mlp.up_proj.weight",
            None,
            "model.layers.1.mlp.up_proj.weight is missing, which LlamaForCausalLM builds from "
            "this config",
        ),
    ],
)
def test_other_tensors_are_refused(name: str, shape: Any, reason: str):
    known = known_llama()
    wanted: dict[str, Any] = {**shapes(known.builder.build(known.data)), name: shape}
    found = recover(known, {key: value for key, value in wanted.items() if value is not None})
    assert found == Refusal(reason)


def test_a_dimension_that_no_field_sets():
    known = known_of("vit")
    wanted = target(known)
    wanted["vit.embeddings.cls_token"] = (1, 2, 64)
    found = recover(known, wanted)
    assert found == Refusal(
        "no width of ViTConfig gives vit.embeddings.cls_token: found [1, 2, 64], the config "
        "builds [1, 1, 64]"
    )


def test_values_that_the_class_refuses():
    known = known_of("bert")
    found = recover(known, target(known, hidden_size=48), {("num_attention_heads",): 5})
    assert isinstance(found, Refusal)
    assert "hidden size (48) is not a multiple of the number of attention heads (5)" in found.reason


@pytest.mark.parametrize("name", ["llama", "bert", "clip", "swin"])
@EXAMPLES
@given(data=st.data())
def test_a_config_that_builds_something_else_is_never_accepted(name: str, data: st.DataObject):
    known = known_of(name)
    wanted = shapes(known.builder.build(known.data))
    for one in data.draw(st.lists(st.sampled_from(sorted(wanted)), min_size=1, max_size=3)):
        if wanted[one]:
            dim = data.draw(st.integers(0, len(wanted[one]) - 1))
            less = data.draw(st.integers(1, max(1, wanted[one][dim] - 1)))
            wanted[one] = (*wanted[one][:dim], less, *wanted[one][dim + 1 :])
    found = recover(known, wanted)
    if isinstance(found, Recovery):
        assert proved(known, found) == wanted
    else:
        assert isinstance(found, (Conflict, Refusal))
