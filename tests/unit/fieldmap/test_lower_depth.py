"""Configs with few layers: tensors with a piece for each layer, lists with an entry for each."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import memories
import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook, plan, prunable
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.fieldmap.solve import Recovery, recover
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.config_json import EntryOfKind, field_name, value_at, with_values
from tp_hf_config.model.shapes import shapes
from tp_hf_config.planning.plan import ParameterCount, flops_of

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def gemma4() -> Any:
    """Eighteen layers, of which the last six have no keys and values of their own."""
    sizes = {**_SIZES, **_HEADS, "vocab_size_per_layer_input": 64, "global_head_dim": 16}
    layers = {"num_hidden_layers": 18, "num_kv_shared_layers": 6}
    config = hf.Gemma4TextConfig(**sizes, **layers, hidden_size_per_layer_input=8)
    return hf.Gemma4ForCausalLM(config).eval()


def embedding_gemma() -> Any:
    sizes = {**_SIZES, **_HEADS, "hidden_size_per_layer_input": 8, "embedding_dim": 24}
    config = hf.EmbeddingGemma2TextConfig(**sizes, num_hidden_layers=12)
    return hf.EmbeddingGemma2TextModel(config).eval()


def esm() -> Any:
    """Its contacts are read from the attention of all heads of all layers."""
    config = hf.EsmConfig(
        **_SIZES, num_attention_heads=4, num_hidden_layers=6, pad_token_id=1, mask_token_id=32
    )
    return hf.EsmForMaskedLM(config).eval()


def laguna(number: int = 20) -> Any:
    """The first layer is dense; each layer has its own number of heads in the config."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    layers = {"num_hidden_layers": number, "num_attention_heads_per_layer": [4] * number}
    config = hf.LagunaConfig(**_SIZES, **_HEADS, **sizes, **experts, **layers)
    return hf.LagunaForCausalLM(config).eval()


def gemma3n() -> Any:
    """Every fifth of twenty layers sees all of the text."""
    config = hf.Gemma3nTextConfig(
        **_SIZES,
        **_HEADS,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_hidden_layers=20,
        num_kv_shared_layers=0,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 20,
    )
    return hf.Gemma3nForCausalLM(config).eval()


def _classes(*names: str) -> Any:
    """Skip on a version of Transformers that came before these classes."""
    missing = [name for name in names if not hasattr(hf, name)]
    return pytest.mark.skipif(bool(missing), reason=f"Transformers has no {missing} yet")


GEMMA4 = pytest.param(
    gemma4,
    {
        ("model.embed_tokens_per_layer.weight", 1): Fraction(18, 6),
        ("model.per_layer_model_projection.weight", 0): Fraction(18, 6),
    },
    marks=_classes("Gemma4TextConfig"),
)
EMBEDDING_GEMMA = pytest.param(
    embedding_gemma,
    {("ple.per_layer_model_projection.weight", 0): Fraction(12, 2)},
    marks=_classes("EmbeddingGemma2TextConfig"),
)
ESM = pytest.param(esm, {("esm.contact_head.regression.weight", 1): Fraction(6, 2)})


@pytest.mark.parametrize(("make", "pieces"), [GEMMA4, EMBEDDING_GEMMA, ESM])
def test_tensors_with_a_piece_for_each_layer_have_their_full_sizes(
    make: Callable[[], Any], pieces: dict[Any, Fraction]
) -> None:
    model = make()
    field_map = map_of(model)
    assert field_map.depth.pieces == pieces
    for name, shape in shapes(model).items():
        for dim, size in enumerate(shape):
            expression = field_map.expression_of(name, dim)
            assert expression is None or expression.base == size, (name, dim)
    assert all(field_map.fields_of(*place) for place in pieces)


@_classes("Gemma4TextConfig")
def test_what_is_counted_of_few_layers_is_that_of_all() -> None:
    """Parameters, FLOPs, and the heads into which the embedding's output is split."""
    model = gemma4()
    field_map = map_of(model)
    values = {("hidden_size_per_layer_input",): 5, ("hidden_size",): 24}
    smaller = field_map.builder.build(field_map.config_at(values, shallow=False))
    full = field_map.builder.build(field_map.data)
    assert not isinstance(smaller, Refusal)
    assert not isinstance(full, Refusal)
    count = ParameterCount(field_map, full).at(values)
    assert count == sum(parameter.numel() for parameter in smaller.parameters())
    assert field_map.splits_of("model.embed_tokens_per_layer") == ((18, 8),)
    less = {("hidden_size_per_layer_input",): 4}
    built = field_map.builder.build(field_map.config_at(less, shallow=False))
    assert not isinstance(built, Refusal)
    before, after = flops_of(field_map, full), flops_of(field_map, built)
    assert not isinstance(before, Refusal)
    assert not isinstance(after, Refusal)
    projection, in_layers = 2 * 32 * 18 * 8, 18 * 2 * 2 * 32 * 8
    assert before - after == (projection + in_layers) // 2


def _step(model: Any, fields: list[str]) -> None:
    """Prune half of some widths in one step."""
    tp.pruner.MetaPruner(
        model,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=fields)],
        example_inputs=None,
    ).step()


def _reloads(model: Any, folder: Path) -> bool:
    """True if a saved model gives the same outputs when it is loaded, to the last bit."""
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        return torch.equal(model(ids)[0], again(ids)[0])


@_classes("Gemma4TextConfig")
def test_pieces_of_all_layers_are_pruned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gemma4()
    _step(model, ["hidden_size_per_layer_input"])
    assert model.config.hidden_size_per_layer_input == 4
    assert model.model.embed_tokens_per_layer.weight.shape == (64, 18 * 4)
    assert _reloads(model, tmp_path)
    recovery = recover(map_of(gemma4()), shapes(model))
    assert isinstance(recovery, Recovery)
    assert recovery.values[("hidden_size_per_layer_input",)] == 4


@_classes("EmbeddingGemma2TextConfig")
def test_a_field_of_the_stock_class_is_not_that_of_single_layers(tmp_path: Path) -> None:
    """One of two layers has a single key/value head of its own, which stays."""
    torch.manual_seed(0)
    model = embedding_gemma()
    values = {**model.config.to_dict(), "num_hidden_layers": 2, "layer_types": None}
    entries = {"1": {"head_dim": 16, "num_key_value_heads": 1}}
    model = type(model)(type(model.config)(**{**values, "per_layer_config": entries})).eval()
    _step(model, ["num_key_value_heads", "num_attention_heads"])
    assert model.config.to_dict()["num_key_value_heads"] == 1
    assert model.config.num_attention_heads == 2
    assert _reloads(model, tmp_path)


@_classes("LagunaConfig")
def test_the_entries_of_all_layers_of_a_kind_are_one_field(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = laguna()
    of_kinds = [f"num_attention_heads_per_layer[{layers}]" for layers in ("0", "1-19")]
    assert [w.name for w in prunable(model).widths if "per_layer" in w.name] == of_kinds
    assert plan(laguna(), prune=["num_attention_heads_per_layer"]).values == dict.fromkeys(
        of_kinds, 2
    )
    _step(model, of_kinds[1:])
    assert model.config.num_attention_heads_per_layer == [4, *[2] * 19]
    assert _reloads(model, tmp_path)
    recovery = recover(map_of(laguna()), shapes(model))
    assert isinstance(recovery, Recovery)
    assert recovery.data["num_attention_heads_per_layer"] == [4, *[2] * 19]


@_classes("LagunaConfig")
def test_what_is_kept_of_a_tiny_model_is_of_as_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model is the same, in memory too; what its entries stand for is not."""
    monkeypatch.setenv("TP_HF_CONFIG_CACHE", str(tmp_path))
    memories.forget(monkeypatch)
    for layers, cached in ((20, False), (18, False), (17, False), (20, True)):
        if layers == 17:  # as in a new process
            memories.forget(monkeypatch)
        found = prunable(laguna(layers))
        assert found.cached == cached
        assert f"num_attention_heads_per_layer[1-{layers - 1}]" in [w.name for w in found.widths]


@_classes("Gemma3nTextConfig")
def test_a_list_of_widths_goes_down_with_the_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gemma3n()
    field_map = map_of(model)
    widths = [f for f in field_map.values if f[0] == "intermediate_size"]
    by_kind = ["0-3+5-8+10-13+15-18", "4+9+14+19"]
    if small.TRANSFORMERS < (5,):  # the last of each kind store their keys, and are others
        by_kind = ["0-3+5-8+10-13+15-17", "4+9+14", "18", "19"]
    assert field_map.depth.data["num_hidden_layers"] == len(by_kind)
    names = [f"intermediate_size[{layers}]" for layers in by_kind]
    assert [field_name(field) for field in widths] == names
    full_attention = [name for name in names if "4" in name or "19" in name]
    _step(model, [*full_attention, "hidden_size_per_layer_input"])
    assert model.config.intermediate_size == [*[48] * 4, 24] * 4
    assert model.config.hidden_size_per_layer_input == 4
    assert _reloads(model, tmp_path)


def test_a_key_of_several_entries() -> None:
    """It is written and read in the full list and in the short one; other lists have its number."""
    key = EntryOfKind(1, {3: (1, 2), 6: (2, 3, 5)})
    field = ("widths", key)
    assert field == ("widths", 1)  # what a model with few layers, learned by itself, calls it
    assert {field: 4}[("widths", 1)] == 4
    assert field_name(field) == "widths[2-3+5]"
    full = with_values({"widths": [8] * 6}, {field: 4})
    assert full == {"widths": [8, 8, 4, 4, 8, 4]}
    assert with_values({"widths": [8] * 3}, {field: 4}) == {"widths": [8, 4, 4]}
    assert with_values({"widths": [8] * 2}, {field: 4}) == {"widths": [8, 4]}
    inside = with_values({"kinds": [{}, {}, {}]}, {("kinds", key, "width"): 4})
    assert inside == {"kinds": [{}, {"width": 4}, {"width": 4}]}
    assert (value_at(full, field), value_at(full, ("widths", 1))) == (4, 8)
    for again in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (again, again.places) == (key, key.places)


class MapsConfig(hf.PretrainedConfig):
    """Five channels of an image, and five feature maps taken of it."""

    model_type = "maps"

    def __init__(self, width: int = 16, channels: int = 5, maps: Any = tuple("abcde"), **rest: Any):
        self.width, self.channels, self.maps = width, channels, list(maps)
        super().__init__(**rest)


class Maps(hf.PreTrainedModel):
    config_class = MapsConfig

    def __init__(self, config: MapsConfig):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(config.width, config.width) for _ in config.maps
        )
        self.image = config.channels  # the class reads it, and it sets no shape
        self.post_init()


def test_a_field_as_large_as_a_list_by_chance_is_not_lowered_with_it():
    data = map_of(Maps(MapsConfig())).depth.data
    assert (data["maps"], data["channels"]) == (["a", "b"], 5)


class Patches(Maps):
    """The image's channels set a shape."""

    def __init__(self, config: MapsConfig):
        super().__init__(config)
        self.patches = torch.nn.Linear(4 * config.channels, config.width)


def test_what_is_as_often_as_there_are_layers_by_chance_is_no_piece_of_each() -> None:
    depth = map_of(Patches(MapsConfig())).depth
    assert depth.data["channels"] == 5
    assert depth.pieces == {}
