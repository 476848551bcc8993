"""The map from config to dimensions: learned at one config, it finds another."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import transformers as hf
from transformers.utils import logging as hf_logging

from tp_hf_config.errors import UnsupportedModelError
from tp_hf_config.fieldmap import (
    learn_field_map,
    lower_depth,
    probe,
    sensitivity,
)
from tp_hf_config.fieldmap.field_map import Depth, FieldMap
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.fieldmap.probe import may_matter
from tp_hf_config.fieldmap.solve import Conflict, Problem, solve
from tp_hf_config.forward.head_splits import heads_of, observe
from tp_hf_config.model.build import Builder, Refusal
from tp_hf_config.model.config_json import config_json, with_values
from tp_hf_config.model.shapes import named_modules, shapes

Values = dict[tuple[str | int, ...], int]
SEEDS = range(5)


def sizes(rng: random.Random, **choices: Any) -> Values:
    return {(name,): rng.choice(values) for name, values in choices.items()}


def heads_and_hidden(rng: random.Random, hidden: str = "hidden_size") -> Values:
    """A legal pair for classes whose head size is hidden size / heads."""
    heads = rng.choice([2, 3, 4, 6])
    return {("num_attention_heads",): heads, (hidden,): heads * rng.choice([4, 6, 8, 10])}


def llama(rng: random.Random) -> Values:
    kv = rng.choice([1, 2, 4])
    heads = kv * rng.choice([2, 3])
    return {
        ("num_key_value_heads",): kv,
        ("num_attention_heads",): heads,
        ("hidden_size",): heads * rng.choice([8, 10, 12]),
        **sizes(rng, intermediate_size=[17, 40, 64, 90], head_dim=[4, 6, 8, 16]),
    }


def qwen2(rng: random.Random) -> Values:
    """``head_dim`` is read by the class and declared nowhere."""
    return {**llama(rng), ("hidden_size",): rng.choice([30, 34, 52, 64])}


def gpt2(rng: random.Random) -> Values:
    heads = rng.choice([2, 3, 4])
    values = {("n_head",): heads, ("n_embd",): heads * rng.choice([6, 8, 12])}
    return values | (sizes(rng, n_inner=[33, 64, 100]) if rng.random() < 0.7 else {})


def opt(rng: random.Random) -> Values:
    """``word_embed_proj_dim`` has to move with ``hidden_size``: apart, other layers are built."""
    values = heads_and_hidden(rng)
    return {
        **values,
        ("word_embed_proj_dim",): values[("hidden_size",)],
        **sizes(rng, ffn_dim=[20, 48, 64]),
    }


def bert(rng: random.Random) -> Values:
    return heads_and_hidden(rng) | sizes(rng, intermediate_size=[17, 48, 64, 100])


def t5(rng: random.Random) -> Values:
    return sizes(rng, d_model=[24, 30, 48], d_kv=[4, 6, 9], num_heads=[2, 3, 5], d_ff=[40, 64, 77])


def phi3(rng: random.Random) -> Values:
    values = heads_and_hidden(rng)
    return {
        **values,
        ("num_key_value_heads",): values[("num_attention_heads",)],
        **sizes(rng, intermediate_size=[17, 48, 64, 100]),
    }


def whisper(rng: random.Random) -> Values:
    heads = rng.choice([2, 3, 4])
    values = {
        ("encoder_attention_heads",): heads,
        ("decoder_attention_heads",): rng.choice([h for h in (2, 3, 4) if (heads * 12) % h == 0]),
        ("d_model",): heads * 12,
    }
    return values | sizes(rng, encoder_ffn_dim=[30, 48, 64], decoder_ffn_dim=[32, 50, 66])


def clip(rng: random.Random) -> Values:
    values: Values = {("projection_dim",): rng.choice([20, 24, 32])}
    for tower in ("text_config", "vision_config"):
        for (name,), value in bert(rng).items():
            values[(tower, name)] = value
    return values


def mixtral(rng: random.Random) -> Values:
    # in Transformers 4 their number is one of layers, which no width is
    return llama(rng) | sizes(
        rng, num_local_experts=[2, 3, 4] if small.TRANSFORMERS >= (5,) else [4]
    )


_LLM = {
    "vocab_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
_TOWER = {"num_hidden_layers": 2}
CLASSES: dict[str, tuple[type, Callable[..., Any], Callable[[random.Random], Values]]] = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_LLM), llama),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_LLM), qwen2),
    "gpt2": (
        hf.GPT2LMHeadModel,
        lambda: hf.GPT2Config(vocab_size=40, n_positions=32, n_layer=3, n_embd=24, n_head=4),
        gpt2,
    ),
    "opt": (hf.OPTForCausalLM, lambda: hf.OPTConfig(**_LLM), opt),
    "bert": (hf.BertModel, lambda: hf.BertConfig(**_LLM), bert),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(vocab_size=40, num_layers=3, num_decoder_layers=3),
        t5,
    ),
    "vit": (
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(num_hidden_layers=3, image_size=16, patch_size=8),
        bert,
    ),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**_LLM, pad_token_id=0), phi3),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            vocab_size=40,
            encoder_layers=2,
            decoder_layers=2,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        whisper,
    ),
    "clip": (
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config={"vocab_size": 40, "max_position_embeddings": 16, **_TOWER},
            vision_config={"image_size": 16, "patch_size": 8, **_TOWER},
        ),
        clip,
    ),
    "mixtral": (hf.MixtralForCausalLM, lambda: hf.MixtralConfig(**_LLM), mixtral),
}


def built(cls: Any, config: Any, values: Values) -> Any:
    """The class at some values, on the meta device."""
    data = with_values(config_json(config, use_diff=False), dict(values))
    with torch.device("meta"):
        return cls(type(config).from_dict(data)).eval()


def learned(model: Any) -> FieldMap:
    builder = Builder(model)
    full = builder.build(config_json(model.config))
    assert not isinstance(full, Refusal), full.reason
    return learn_field_map.learn(builder, model.config, full)


def solved(field_map: FieldMap, target: Any) -> dict[Any, int] | Conflict:
    """Field values for the shapes of ``target`` and its head counts."""
    wanted: dict[Any, int] = {
        (name, dim): size
        for name, shape in shapes(target).items()
        for dim, size in enumerate(shape)
    }
    wanted |= {
        (name, heads_of(index)): split[0]
        for name, splits in observe(target).heads.items()
        for index, split in enumerate(splits)
    }
    expressions, targets = {}, {}
    for (name, which), size in wanted.items():
        expression = field_map.expressions.get((field_map.depth.canonical(name), which))
        if expression is not None:
            expressions[(name, which)], targets[(name, which)] = expression, size
    result = solve(Problem(expressions, field_map.values, targets))
    if isinstance(result, dict):
        result |= {follower: result[leader] for follower, leader in field_map.must_equal.items()}
    return result


def legal(sample: Callable[[random.Random], Values], rng: random.Random, start: Values) -> Values:
    """Values that the class accepts, up to four of them other than in ``start``."""
    while True:
        values = sample(rng)
        if values.keys() == start.keys() and len(values.items() - start.items()) <= 4:
            return values


@pytest.mark.parametrize("name", CLASSES)
def test_learn_from_one_config_and_find_another(name: str):
    cls, default, sample = CLASSES[name]
    config = default()
    rng = random.Random(name)
    start = sample(rng)
    field_map = learned(built(cls, config, start))
    base = config_json(built(cls, config, start).config, use_diff=False)
    moved = 0
    for _ in SEEDS:
        values = legal(sample, rng, start)
        moved += values != start
        target = built(cls, config, values)
        result = solved(field_map, target)
        assert isinstance(result, dict), (start, values, result)
        found = {path: result.get(path, start[path]) for path in values}
        if not observe(target).heads:  # one head is no split: then nothing shows
            continue
        assert found == values
        rebuilt = field_map.builder.build(with_values(base, {**start, **result}))
        assert not isinstance(rebuilt, Refusal)
        assert shapes(rebuilt) == shapes(target)
    assert moved > 2


def test_fields_that_are_read_and_not_declared():
    cls, default, _ = CLASSES["qwen2"]
    config = default()
    values: Values = {
        ("hidden_size",): 34,
        ("num_attention_heads",): 4,
        ("num_key_value_heads",): 2,
        ("head_dim",): 8,
    }
    field_map = learned(built(cls, config, values))
    assert field_map.values[("head_dim",)] == 8
    assert "head_dim" not in config_json(config, use_diff=False)
    del values[("head_dim",)]
    unset = learned(built(cls, config, {**values, ("hidden_size",): 32}))
    assert ("head_dim",) in unset.unset
    assert unset.values[("head_dim",)] == 8


def test_an_unset_field_that_means_a_multiple():
    cls, default, _ = CLASSES["gpt2"]
    field_map = learned(built(cls, default(), {}))
    assert ("n_inner",) in field_map.unset
    assert field_map.values[("n_inner",)] == 4 * 24


def test_fields_that_move_as_one():
    cls, default, _ = CLASSES["opt"]
    values = {("hidden_size",): 24, ("word_embed_proj_dim",): 24, ("num_attention_heads",): 4}
    field_map = learned(built(cls, default(), values))
    assert [sorted(pair) for pair in field_map.must_equal.items()] == [
        [("hidden_size",), ("word_embed_proj_dim",)]
    ]


def counted(monkeypatch: pytest.MonkeyPatch, model: Any) -> int:
    calls = 0
    original = Builder.build

    def build(self: Builder, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    builder = Builder(model)
    full = builder.build(config_json(model.config))
    monkeypatch.setattr(Builder, "build", build)
    learn_field_map.learn(builder, model.config, full)
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "clip", "gpt2"])
def test_learning_does_not_grow_with_the_depth(name: str, monkeypatch: pytest.MonkeyPatch):
    cls, default, _ = CLASSES[name]
    fields: dict[str, list[tuple[str | int, ...]]] = {
        "t5": [("num_layers",), ("num_decoder_layers",)],
        "clip": [("text_config", "num_hidden_layers"), ("vision_config", "num_hidden_layers")],
        "gpt2": [("n_layer",)],
    }
    start = CLASSES[name][2](random.Random(0))
    counts = [
        counted(
            monkeypatch,
            built(
                cls,
                default(),
                {**start, **dict.fromkeys(fields.get(name, [("num_hidden_layers",)]), layers)},
            ),
        )
        for layers in (37, 41)  # that no other field has, nor one more
    ]
    assert counts[0] == counts[1]
    assert counts[0] < 400


def test_the_shallow_config_and_its_names():
    model = built(hf.LlamaForCausalLM, hf.LlamaConfig(**_LLM), {("num_hidden_layers",): 12})
    builder = Builder(model)
    data = config_json(model.config, use_diff=False)
    found = lower_depth.shallow(builder, data, model)
    assert found.data["num_hidden_layers"] == 2
    assert found.canonical("model.layers.11.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert found.canonical("lm_head.weight") == "lm_head.weight"
    assert data["num_hidden_layers"] == 12


def test_a_large_number_for_every_layer_is_no_width():
    """Longformer's windows: the list goes down with the layers."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.LongformerConfig(vocab_size=40, **sizes, attention_window=[512] * 12)
    model = hf.LongformerModel(config)
    found = lower_depth.shallow(Builder(model), config_json(model.config, use_diff=False), model)
    assert (found.data["num_hidden_layers"], found.data["attention_window"]) == (2, [512, 512])


def test_the_map_is_kept_until_the_config_changes(monkeypatch: pytest.MonkeyPatch):
    model = small.bert()
    first = map_of(model)
    assert map_of(model) is first
    model.config.layer_norm_eps = 1e-3
    assert map_of(model) is not first


# Nothing stays behind


def test_config_classes_are_left_as_they_were():
    models = [small.llama(), small.bert(), built(hf.CLIPModel, CLASSES["clip"][1](), {})]
    for model in models:
        classes = {
            cls
            for module in model.modules()
            if hasattr(module, "config")
            for cls in type(module.config).__mro__
        }
        before = {cls: dict(vars(cls)) for cls in classes}
        learned(model)
        assert {cls: dict(vars(cls)) for cls in classes} == before
        assert "__getattribute__" not in vars(type(model.config))


def test_a_config_class_with_a_getattribute_of_its_own_keeps_it():
    class Config(hf.LlamaConfig):
        model_type = "llama"

        def __getattribute__(self, key: str) -> Any:
            return super().__getattribute__(key)

    own = vars(Config)["__getattribute__"]
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(Config(**_LLM, hidden_size=32, num_attention_heads=4))
    learned(model)
    assert vars(Config)["__getattribute__"] is own


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_global_state_is_as_it_was(level: int):
    model = small.llama(attn_implementation="sdpa").to(torch.float64)
    config = dict(vars(model.config))
    verbosity = hf_logging.get_verbosity()
    torch.manual_seed(3)
    rng = torch.random.get_rng_state()
    hf_logging.set_verbosity(level)
    torch.set_default_dtype(torch.bfloat16)
    try:
        field_map = map_of(model)
        assert torch.get_default_dtype() == torch.bfloat16
        assert hf_logging.get_verbosity() == level
        assert logging.getLogger("transformers").level == level
        assert torch.equal(torch.random.get_rng_state(), rng)
        assert torch.is_grad_enabled()
        assert torch.empty(1).device.type == "cpu"
        built_again = field_map.builder.build(config_json(model.config), buffers=True)
        assert not isinstance(built_again, Refusal)
        assert torch.equal(torch.random.get_rng_state(), rng)
    finally:
        torch.set_default_dtype(torch.float32)
        hf_logging.set_verbosity(verbosity)
    assert vars(model.config) == config
    assert next(built_again.parameters()).dtype == torch.float64


class Draws(hf.LlamaForCausalLM):
    """Construction takes random numbers, as a few classes' buffers do."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.register_buffer("noise", torch.rand(4), persistent=False)


def test_random_numbers_are_not_used_up():
    with torch.device("meta"):
        model = Draws(small.llama().config)
    rng = torch.random.get_rng_state()
    rebuilt = Builder(model).build(config_json(model.config), buffers=True)
    assert not isinstance(rebuilt, Refusal)
    assert not rebuilt.noise.is_meta
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_global_state_is_as_it_was_when_a_class_refuses():
    model = small.llama()
    rng, level = torch.random.get_rng_state(), logging.getLogger("transformers").level
    data = with_values(config_json(model.config), {("hidden_size",): 33})
    refusal = Builder(model).build(data)
    assert isinstance(refusal, Refusal)
    assert "The hidden size (33) is not a multiple of the number of attention heads (4)" in (
        refusal.reason
    )
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert logging.getLogger("transformers").level == level


def test_a_study_of_what_cannot_be_built_says_so():
    model = small.llama()
    data = with_values(config_json(model.config), {("hidden_size",): 33})
    said = r"the class cannot be built from its own config: .*\(33\) is not a multiple of"
    with pytest.raises(UnsupportedModelError, match=said):
        probe.Study(Builder(model), Depth(data), {})


def test_an_entry_of_a_list_that_counts_layers_is_lowered():
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 6], num_heads=[2, 4]
    )
    field_map = map_of(hf.SwinModel(config).eval())
    assert field_map.depth.data["depths"] == [2, 2]
    bias = "encoder.layers.1.blocks.{}.layernorm_before.bias"
    assert field_map.depth.canonical(bias.format(4)) == bias.format(0)
    assert field_map.depth.canonical(bias.format(5)) == bias.format(1)  # its windows are shifted
    assert field_map.fields_of(bias.format(5), 0) == {("embed_dim",)}


def mask2former():
    backbone = hf.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    config = hf.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=24,
        encoder_layers=2,
        decoder_layers=7,
        dim_feedforward=32,
        num_attention_heads=2,
        num_queries=5,
    )
    return hf.Mask2FormerModel(config).eval()


def test_a_field_that_counts_one_layer_more_is_lowered():
    assert map_of(mask2former()).depth.data["decoder_layers"] == 3


def test_a_tiny_copy_keeps_its_layers():
    """Else what it is compared with has fewer."""
    model = mask2former()
    builder = Builder(model)
    bare = builder.build(config_json(model.config))
    known = learn_field_map.learn(builder, model.config, bare, tiny=True)
    assert known.depth.data["decoder_layers"] == 7
    assert shapes(known.build_at({})) == shapes(bare)


def test_layers_of_one_shape_in_a_list_that_stays_are_not_taken_for_one():
    """Parakeet's convolutions follow one another; pruned with Canary's, the mel bins grew."""
    config = hf.ParakeetEncoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        subsampling_conv_channels=8,
        num_mel_bins=16,
    )
    model = hf.ParakeetEncoder(config).eval()
    field_map = map_of(model)
    assert field_map.depth.data["num_hidden_layers"] == 2
    weight = "subsampling.layers.{}.weight"
    shape = model.get_parameter(weight.format(3)).shape
    assert model.get_parameter(weight.format(6)).shape == shape
    assert field_map.depth.canonical(weight.format(6)) == weight.format(6)


def test_entries_for_layers_that_are_gone_go_too():
    """Gemma 4 has what differs from layer to layer under the layers' numbers."""
    config = hf.Gemma4TextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        intermediate_size=48,
        hidden_size_per_layer_input=0,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    field_map = map_of(hf.Gemma4ForCausalLM(config).eval())
    assert field_map.depth.data["num_hidden_layers"] == 4
    assert set(map(int, field_map.depth.data["per_layer_config"])) == {1, 3}
    query = "model.layers.{}.self_attn.q_proj.weight"
    # 16 and 17 are the last of their kind that hand their keys on to later layers
    layers = [field_map.depth.canonical(query.format(n)) for n in (4, 11, 16, 17)]
    assert layers == [query.format(n) for n in (0, 1, 2, 3)]


def test_small_widths_in_a_list_are_not_taken_for_repeated_layers():
    """Every layer has an entry of its own, however alike they are."""
    config = hf.HubertConfig(
        conv_dim=[4] * 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    field_map = map_of(hf.HubertModel(config).eval())
    weight = "feature_extractor.conv_layers.{}.conv.weight"
    assert field_map.depth.canonical(weight.format(3)) == weight.format(3)
    assert field_map.fields_of(weight.format(3), 0) == {("conv_dim", 3)}
    assert field_map.fields_of(weight.format(3), 1) == {("conv_dim", 2)}


def test_a_value_that_makes_a_layer_another_kind_is_other_tensors():
    """ConvBERT's dense layers get one more dimension where they are in groups."""
    config = hf.ConvBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        embedding_size=32,
    )
    field_map = map_of(hf.ConvBertModel(config).eval())
    assert ("intermediate_size",) in field_map.values


def shallow_of(model: hf.PreTrainedModel) -> tuple[int, int]:
    """How many tensors a model has, and with how few it is learned."""
    field_map = map_of(model)
    return len(shapes(model)), len(field_map.shapes)


def test_layers_go_where_a_class_needs_one_more_than_kinds_of_them():
    """CvT looks up the dropout of a layer by the number of its stage."""
    config = hf.CvtConfig(
        embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 8], image_size=32
    )
    full, few = shallow_of(hf.CvtForImageClassification(config).eval())
    layer = "cvt.encoder.stages.2.layers.0."
    each = sum(name.startswith(layer) for name in shapes(hf.CvtForImageClassification(config)))
    assert full - few == 5 * each


def test_a_list_of_large_numbers_that_sets_no_width_goes_with_the_layers():
    """Longformer has a window for every layer, as large as a width."""
    config = hf.LongformerConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        attention_window=32,
    )
    model = hf.LongformerForMaskedLM(config).eval()
    field_map = map_of(model)
    assert field_map.depth.data["num_hidden_layers"] == 2
    assert field_map.depth.data["attention_window"] == [32, 32]


def test_layers_go_where_a_backbone_names_its_last():
    config = hf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage6"],
    )
    field_map = map_of(hf.Dinov2Backbone(config).eval())
    assert field_map.depth.data["num_hidden_layers"] == 2


class Filled(hf.LlamaForCausalLM):
    """Construction fills weights in place and computes with them, as timm's classes do."""

    def __init__(self, config: Any):
        super().__init__(config)
        norm, width = self.model.norm.weight, config.hidden_size
        self.scale = torch.nn.Parameter(torch.empty(width).uniform_(-1, 1).erfinv_().clamp_(min=-1))
        self.table = torch.nn.Parameter(norm.unsqueeze(0) * torch.zeros(3, 1).mul_(self.scale[:1]))


def test_weights_filled_in_place_have_their_shapes():
    with torch.device("meta"):
        model = Filled(small.llama().config)
    built = Builder(model).build(config_json(model.config))
    assert not isinstance(built, Refusal)
    assert shapes(built) == shapes(model)
    assert built.table.shape == (3, model.config.hidden_size)


def test_modules_are_named_as_torch_names_them():
    model = hf.T5ForConditionalGeneration(hf.T5Config(num_layers=1, d_model=8, d_kv=2, d_ff=8))
    assert list(named_modules(model)) == list(model.named_modules(remove_duplicate=False))
    tied = model.named_parameters(remove_duplicate=False)
    assert shapes(model) == {name: tuple(one.shape) for name, one in tied}


class TestQuestionsTogether:
    @staticmethod
    def asked(*matter: int) -> tuple[list[Any], int]:
        """Which of 16 fields may matter, and after how many questions that is known."""
        questions: list[Any] = []

        def in_vain(paths: Any) -> bool:
            questions.append(paths)
            return not {path[0] for path in paths} & {*matter}

        found = [path[0] for path in may_matter([(number,) for number in range(16)], in_vain)]
        return found, len(questions)

    def test_one_question_is_enough_where_nothing_matters(self) -> None:
        assert self.asked() == ([], 1)

    def test_those_that_matter_are_found_in_their_order(self) -> None:
        assert self.asked(9, 2, 3)[0] == [2, 3, 9]
        assert self.asked(5) == ([5], 9)

    def test_the_rest_is_not_asked_once_one_is_enough(self) -> None:
        questions = iter([False, True, False, False])
        found = may_matter([(0,), (1,), (2,)], lambda _: next(questions))
        assert next(found) == (1,)

    def test_nothing_is_asked_of_nothing(self) -> None:
        assert list(may_matter([], lambda _: False)) == []


class StagedConfig(hf.PretrainedConfig):
    """Widths, and the number of a stage, of which there is one."""

    model_type = "staged"

    def __init__(
        self, first: int = 6, second: int = 10, third: int = 14, stage: int = 3, **rest: Any
    ):
        self.first, self.second, self.third, self.stage = first, second, third, stage
        super().__init__(**rest)


class Staged(hf.PreTrainedModel):
    config_class = StagedConfig

    def __init__(self, config: StagedConfig):
        super().__init__(config)
        if config.stage != 3:
            raise ValueError("there is no such stage")
        self.one = torch.nn.Linear(config.first, config.second)
        self.two = torch.nn.Linear(config.second, config.third)
        self.post_init()


def test_what_changes_no_word_of_a_refusal_is_not_tried_with_every_field(
    monkeypatch: pytest.MonkeyPatch,
):
    """DETR's stages are numbers of a backbone's; no width has anything to do with them."""
    asked: list[Any] = []
    own, built = sensitivity._with_partner, probe.Study.build

    def together(study: Any, path: Any, probes: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(probe.Study, "build", lambda *args: asked.append(path) or built(*args))
            return own(study, path, probes)

    monkeypatch.setattr(sensitivity, "_with_partner", together)
    field_map = learned(Staged(StagedConfig()))
    assert asked == [("stage",), ("stage",)]  # alone, and with all others
    assert field_map.values == {("first",): 6, ("second",): 10, ("third",): 14}


def test_what_every_config_has_follows_no_width(monkeypatch: pytest.MonkeyPatch):
    """Two labels where none are named are asked for no width of the class."""
    model = small.llama()
    builder, data = Builder(model), config_json(model.config, use_diff=False)
    asked = probe.Study(builder, Depth(data), {})
    monkeypatch.setattr(asked, "build", lambda values: pytest.fail(f"built at {values}"))
    values = {("hidden_size",): model.config.hidden_size}
    assert sensitivity.independent(asked, {("num_labels",): 2}, values) == {("num_labels",): 2}
    assert sensitivity.independent(asked, {("head_dim",): 5}, values) == {
        ("head_dim",): 5
    }  # no divisor of it


def test_a_quotient_is_found_though_other_numbers_of_heads_round_it() -> None:
    """SAM's positions are as wide as a head: 40 channels have 20 in each of 2, 6 in each of 6."""
    hidden, heads = ("hidden_size",), ("num_attention_heads",)
    config = hf.SamVisionConfig(
        hidden_size=40,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_dim=48,
        image_size=64,
        output_channels=24,
        global_attn_indexes=[1],
    )
    model = hf.SamVisionModel(config)
    power = map_of(model).powers["vision_encoder.layers.0.attn.rel_pos_h", 1]
    assert (power.base, power.exponents) == (20, {hidden: 1, heads: -1})
    assert [sensitivity._exponent(2, 20, [(4, at), (6, 6)]) for at in (10, 9)] == [-1, 0]
