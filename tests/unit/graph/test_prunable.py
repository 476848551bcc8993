"""What is offered of classes that were refused, or failed, for a reason that was not theirs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook, plan, prunable
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.graph.experiments import _unless_shared
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.hook.apply import all_or_nothing, write_fields
from tp_hf_config.model.build import module_of
from tp_hf_config.twin.find_groups import _finest, _in_proportion
from tp_hf_config.twin.layout import Finding, TensorDim, TinyGroup, UnitLayout
from tp_hf_config.twin.prove import counted_by
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model
from tp_hf_config.twin.width_scalars import take_scales

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def albert() -> Any:
    """Heads need not divide its hidden size, but they count in the width of the queries."""
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**SMALL, embedding_size=32))


def markuplm() -> Any:
    """It has a projection of its paths' units that none of its code reads."""
    sizes = {"max_depth": 4, "max_xpath_tag_unit_embeddings": 12, "xpath_unit_hidden_size": 8}
    tokens = {"max_xpath_subs_unit_embeddings": 12, "tag_pad_id": 9, "subs_pad_id": 9}
    return hf.MarkupLMModel(hf.MarkupLMConfig(**SMALL, **sizes, **tokens))


def gpt_bigcode() -> Any:
    """Its heads share one key and one value, as wide as a head, in one layer with the queries."""
    config = hf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
    return hf.GPTBigCodeForCausalLM(config)


def sew() -> Any:
    """What it makes two time steps of is twice as wide, as wide as two neighbouring heads."""
    config = hf.SEWConfig(
        **SMALL | {"hidden_size": 96},
        conv_dim=(16, 24),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return hf.SEWModel(config)


def deepseek() -> Any:
    """Its hidden size has to be a multiple of its heads, key/value heads have to follow them."""
    config = hf.DeepseekV2Config(
        **SMALL,
        moe_intermediate_size=48,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    return hf.DeepseekV2ForCausalLM(config)


def informer() -> Any:
    """Its decoder runs where the future is given; one of its convolutions is None."""
    config = hf.InformerConfig(
        prediction_length=8,
        context_length=16,
        lags_sequence=[1, 2],
        d_model=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=56,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    return hf.InformerModel(config)


def qwen2_vl() -> Any:
    """Its rotary sections fix the head dim: the queries' heads only show with the hidden size."""
    sizes = SMALL | {"hidden_size": 512, "num_key_value_heads": 2}
    return hf.Qwen2VLTextModel(hf.Qwen2VLTextConfig(**sizes))


def glm4v() -> Any:
    """The number at which its forward pass goes furthest is rounded to heads of equal width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = SMALL | {"hidden_size": 512, "num_key_value_heads": 2}
    config = hf.Glm4vTextConfig(
        **sizes, pad_token_id=0, rope_parameters={**rope, "mrope_section": [8, 12, 12]}
    )
    return hf.Glm4vTextModel(config)


def helium() -> Any:
    """What attention ends with reads the hidden size, and gets heads times head dim."""
    config = hf.HeliumConfig(**SMALL, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    return hf.HeliumForCausalLM(config)


def electra() -> Any:
    """Half of its hidden size is the width of its embeddings, and then a projection is left out."""
    return hf.ElectraForMaskedLM(hf.ElectraConfig(num_hidden_layers=2))


def roformer() -> Any:
    """Its queries are as many whole heads as go into the hidden size."""
    return hf.RoFormerForMaskedLM(hf.RoFormerConfig(**SMALL))


def lxmert() -> Any:
    """All of its tokens are of the type whose row is called padding."""
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1}
    config = hf.LxmertConfig(**SMALL | {"num_hidden_layers": 1}, **layers, visual_feat_dim=16)
    return hf.LxmertModel(config)


def gemma4_unified() -> Any:
    """One layer in six has heads of another width, which the tiny model must keep apart."""
    config = hf.Gemma4UnifiedTextConfig(
        **SMALL | {"num_hidden_layers": 6},
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=24,
    )
    return hf.Gemma4UnifiedForCausalLM(config)


def canine() -> Any:
    """Each of eight tables holds an eighth of its hidden size, rounded down."""
    sizes = SMALL | {"hidden_size": 40, "num_attention_heads": 2}
    return hf.CanineModel(hf.CanineConfig(**sizes, num_hash_buckets=32))


def mamba2() -> Any:
    """Its heads times head dim are its hidden size times ``expand``; two heads share a state."""
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 4, "state_size": 12}
    config = hf.Mamba2Config(**sizes, num_hidden_layers=2, vocab_size=100, chunk_size=16)
    return hf.Mamba2ForCausalLM(config)


def bamba() -> Any:
    """As Mamba 2, with attention in every other layer, whose heads read the same hidden size."""
    config = hf.BambaConfig(
        **SMALL | {"num_hidden_layers": 4, "hidden_size": 128},
        num_key_value_heads=2,
        attn_layer_indices=[1, 3],
        mamba_n_heads=16,
        mamba_d_head=16,
        mamba_d_state=12,
    )
    return hf.BambaForCausalLM(config)


def falcon_h1() -> Any:
    """Its heads times head dim are a width of their own."""
    config = hf.FalconH1Config(
        **SMALL,
        num_key_value_heads=2,
        mamba_d_ssm=48,
        mamba_n_heads=6,
        mamba_d_head=8,
        mamba_d_state=12,
    )
    return hf.FalconH1ForCausalLM(config)


def swin() -> Any:
    """Its stages have other numbers of heads, and stand in other parts of their streams."""
    config = hf.SwinConfig(
        image_size=32, embed_dim=96, depths=[1, 1, 1], num_heads=[3, 6, 12], window_size=2
    )
    return hf.SwinForImageClassification(config)


def swin_backbone() -> Any:
    """It gives a map of features, twice as wide as the field says, and channels first."""
    config = hf.SwinConfig(
        image_size=32,
        embed_dim=24,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=2,
        out_features=["stage2"],
    )
    return hf.SwinBackbone(config)


def swin2sr() -> Any:
    """Its stages are alike, and the config has a number of heads for each of them."""
    config = hf.Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[1] * 3, num_heads=[2] * 3, window_size=4
    )
    return hf.Swin2SRModel(config)


def test_a_setting_of_single_layers_follows_under_their_number() -> None:
    """The config answers for layers alone, and raises where it is asked for all of them."""
    config = hf.Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 6, "num_attention_heads": 2},
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=0,
        num_key_value_heads=2,
        head_dim=16,
    )
    with all_or_nothing() as changes:
        model = hf.Gemma4TextModel(config)
        own = ("", ("per_layer_config", "05", "head_dim"), 8)
        write_fields(changes, model, [own, ("", ("head_dim",), 16)])
    saved = config.to_dict()
    assert [config.per_layer_config[n].head_dim for n in (0, 5)] == [16, 8]
    assert saved["head_dim"] == 16


@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (albert, ["hidden_size", "num_attention_heads + hidden_size"]),
        (markuplm, ["hidden_size", "num_attention_heads + hidden_size"]),
        (gpt_bigcode, ["n_inner", "n_head + n_embd"]),
        (sew, ["hidden_size"]),
        (deepseek, ["hidden_size", "num_attention_heads"]),
        (informer, ["d_model", "encoder_ffn_dim", "decoder_ffn_dim"]),
        (qwen2_vl, ["num_attention_heads + num_key_value_heads + hidden_size"]),
        (glm4v, ["num_attention_heads + num_key_value_heads + hidden_size"]),
        (helium, ["num_key_value_heads + num_attention_heads + hidden_size"]),
        (roformer, ["num_attention_heads + embedding_size"]),
        (lxmert, ["hidden_size"]),
        (canine, ["hidden_size"]),
        (swin, ["num_heads[0] + num_heads[1] + num_heads[2] + embed_dim"]),
        (swin_backbone, ["embed_dim", "num_heads[0] + num_heads[1] + embed_dim"]),
        (swin2sr, ["embed_dim", "num_heads[0] + num_heads[1] + num_heads[2] + embed_dim"]),
        (gemma4_unified, ["hidden_size", "intermediate_size", "num_attention_heads"]),
        (mamba2, ["num_heads + hidden_size", "head_dim + hidden_size", "expand + head_dim"]),
        (bamba, ["mamba_n_heads + hidden_size", "mamba_d_head + hidden_size"]),
        (falcon_h1, ["hidden_size", "mamba_n_heads + mamba_d_ssm", "mamba_d_head + mamba_d_ssm"]),
    ],
    ids=[
        "Albert",
        "MarkupLM",
        "GPT-BigCode",
        "SEW",
        "DeepSeek-V2",
        "Informer",
        "Qwen2-VL",
        "GLM-4V",
        "Helium",
        "RoFormer",
        "LXMERT",
        "CANINE",
        "Swin",
        "Swin, a backbone",
        "Swin2SR",
        "Gemma 4",
        "Mamba 2",
        "Bamba",
        "Falcon-H1",
    ],
)
def test_widths_are_offered(build: Any, widths: list[str]) -> None:
    found = {" + ".join(width.names): width.reason for width in prunable(build().eval()).widths}
    assert {name: found[name] for name in widths} == dict.fromkeys(widths)


def test_half_of_a_width_is_no_other_width_where_layers_hang_on_it() -> None:
    made = tiny_model(map_of(electra()))
    assert isinstance(made, TinyModel)
    sizes = made.field_map.values
    assert sizes[("hidden_size",)] // 2 != sizes[("embedding_size",)]


def test_a_width_of_which_the_class_takes_no_smaller_number_is_refused() -> None:
    """BiT's norms stand in 32 groups; with as many channels none can go."""
    config = hf.BitConfig(embedding_size=32, hidden_sizes=[256] * 4, depths=[1] * 4)
    model = hf.BitForImageClassification(config)
    found = {width.name: width.reason for width in prunable(model).widths}
    assert found["embedding_size"] == (
        "the tiny model cannot be built with a smaller embedding_size, so pruning it cannot be "
        "checked: num_channels (31) must be divisible by num_groups (32)"
    )


def test_scales_of_a_module_without_a_config() -> None:
    """Idefics' layers hold a config that is None."""
    one, other = (hf.LlamaModel(hf.LlamaConfig(**SMALL)) for _ in range(2))
    one.layers[0].config, other.layers[0].config = None, None
    take_scales(one, other)
    assert one.layers[0].config is None


@pytest.mark.parametrize(("new", "taken"), [(0.5, 0.5), (0.1, float(torch.tensor(0.1)))])
def test_a_scale_in_another_precision_is_not_another_scale(new: float, taken: float) -> None:
    """Gemma 3n's scale of a query is kept in float32, and built in float64 for the experiments."""
    one, other = (torch.nn.Module() for _ in range(2))
    one.register_buffer("scale", torch.tensor(0.1).double(), persistent=False)
    other.register_buffer("scale", torch.tensor(new, dtype=torch.float64), persistent=False)
    take_scales(one, other)
    assert one.scale.item() == taken


@pytest.mark.parametrize("groups", [8, 4])
def test_heads_that_share_states_go_in_as_many_classes_as_a_field_says(groups: int) -> None:
    """No layer shows the number: it is seen at another value in the tiny model."""
    config = hf.Mamba2Config(num_hidden_layers=2, n_groups=groups)
    model = module_of(config, hf.Mamba2ForCausalLM)
    widths = {width.name: width for width in widths_of(model)}
    width = widths["num_heads + hidden_size"]
    assert (width.reason, width.units) == (None, 128)
    assert [
        (one.count.units, one.count.channel_groups, one.count.per_field_unit)
        for one in width.groups
    ] == [
        (4096, 1, 32),
        (128, groups, 1),
        (128, groups, 1),
    ]
    (table,) = [m.layout for m in width.groups[1].dims if "norm" in m.name]
    assert table == UnitLayout(run=64)


def test_only_the_field_that_counts_classes_is_taken_for_it() -> None:
    made = tiny_model(map_of(mamba2()))
    assert isinstance(made, TinyModel)
    found = _in_proportion(made, (("num_heads",), ("hidden_size",)))
    group = next(one for one in found.groups if one.channel_groups > 1)
    numbers = made.field_map.values | made.field_map.non_size_fields
    assert len([path for path, number in numbers.items() if number == group.channel_groups]) > 1
    assert counted_by(group, made) == [("n_groups",)]


def test_a_plan_says_both_fields_of_a_proportion() -> None:
    config = hf.Mamba2Config(num_hidden_layers=2)
    planned = plan(config, prune=["hidden_size"], pruning_ratio=0.3)
    (width,) = planned.widths
    assert width.before == {"num_heads": 128, "hidden_size": 4096}
    assert width.steps == ({"num_heads": 88, "hidden_size": 2816},)  # heads by eights
    assert list(width.reachable) == list(range(8, 129, 8))
    assert planned.refusal is None
    (width,) = plan(config, prune=["head_dim"], pruning_ratio=0.25).widths
    assert width.steps == ({"head_dim": 48, "hidden_size": 3072},)


@pytest.mark.full
def test_norms_with_other_weights_for_every_head_lose_whole_heads() -> None:
    """Chameleon's ``q_norm`` is a ``LayerNorm`` over head dims, its weights ``[heads, dims]``."""
    config = hf.ChameleonConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        vocabulary_map={"<image>": 4, "IMGIMGA0": 5},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "resolution": 16,
        },
    )
    model = hf.ChameleonModel(config)
    fields = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    before = model.layers[0].self_attn.q_norm.weight.detach().clone().normal_()
    model.layers[0].self_attn.q_norm.weight.data.copy_(before)
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=fields)],
    ).step()
    assert [getattr(model.config, field) for field in fields] == [2, 2, 24]
    left = model.layers[0].self_attn.q_norm.weight
    assert left.shape == (2, 12)
    assert all(any(torch.equal(row, other) for other in before) for row in left)


def test_what_is_as_wide_as_a_part_that_did_not_run_is_told_at_full_size() -> None:
    heads, channels = ("num_attention_heads",), ("vq_config", "channel_multiplier", 2)
    found, unseen = Finding((heads,)), Finding((channels,), reason="not seen", unobserved=True)
    alike: Any = SimpleNamespace(values={heads: 4, channels: 4})
    other: Any = SimpleNamespace(values={heads: 32, channels: 4})
    reason = _unless_shared(found, [found, unseen], alike).reason
    assert reason is not None
    assert reason.startswith("vq_config.channel_multiplier[2] has the same width, and its part")
    assert _unless_shared(found, [found, unseen], other) is found


def test_heads_stay_whole_where_their_dims_could_change_places() -> None:
    """A layer of sound that attends to all alike: its values alone are of no head."""
    heads, layer = ("num_attention_heads",), "encoder.self_attn.v_proj"
    known = SimpleNamespace(
        expressions={(layer, "heads"): SimpleNamespace(fields=frozenset({heads}))},
        shapes={f"{layer}.weight": (32, 8), "encoder.self_attn.o_proj.weight": (8, 32)},
        splits_of=lambda name: ((2, 16),) if name == layer else None,
    )
    run = UnitLayout(run=16)
    dims = (
        TensorDim(f"{layer}.weight", 0, run),
        TensorDim("encoder.self_attn.o_proj.weight", 1, run),
    )
    group = TinyGroup((heads,), dims, (heads, heads), 2, 1)
    tiny: Any = SimpleNamespace(field_map=known)
    assert _finest(tiny, group) is group


def test_a_unit_s_parameters_are_what_the_model_loses_with_it() -> None:
    """Queries, keys and values lie in one dimension of Phi-3's projection, each by a layout."""
    config = hf.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0)
    model = hf.Phi3ForCausalLM(config)
    (width,) = (w for w in prunable(model).widths if w.name.startswith("num_key_value_heads +"))
    before = model.num_parameters()
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.MagnitudeImportance(),
        head_pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=(), gqa="group")],
    ).step()
    assert model.config.num_key_value_heads == width.units - 1 == 1
    assert before - model.num_parameters() == width.parameters
