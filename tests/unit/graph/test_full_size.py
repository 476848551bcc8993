"""What the tiny model shows carries over to sizes that stand in other proportions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
from masked_original import assert_same_as_masked, outputs
from torch import nn

from tp_hf_config import HFConfigSyncHook, prunable
from tp_hf_config.twin import prove

pytestmark = pytest.mark.usefixtures("every_width")


def pruner_of(model: Any, hook: HFConfigSyncHook, **settings: Any) -> Any:
    """A pruner of half."""
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        hooks=[hook],
        **settings,
    )


def pruned(
    model: Any,
    inputs: dict[str, torch.Tensor],
    tmp_path: Path,
    steps: int = 1,
    prune: tuple[str, ...] | None = None,
    prune_num_heads: bool = False,
) -> HFConfigSyncHook:
    """Prune half; the model has to be the original with the removed at zero, also once reloaded."""
    tiny.randomise(model.eval())
    original, hook = copy.deepcopy(model), HFConfigSyncHook(prune=prune, strict=True)
    pruner = pruner_of(model, hook, iterative_steps=steps, prune_num_heads=prune_num_heads)
    for _ in range(steps):
        pruner.step()
    assert_same_as_masked(original, model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    got, expected = outputs(loaded, inputs), outputs(model, inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    return hook


def test_heads_of_a_stage_that_are_no_whole_multiple_of_a_unit(tmp_path: Path) -> None:
    """A unit of Swin's width is two dimensions in its second stage, which has four heads here.

    In a tiny model it has two, so that a unit is one dimension of every head there.
    """
    config = hf.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[1, 4],
        window_size=4,
        num_labels=5,
    )
    model = hf.SwinForImageClassification(config)
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    hook = pruned(model, inputs, tmp_path, steps=2)
    fields = [report.fields for report in hook.reports]
    assert fields == [{"embed_dim": (32, 24)}, {"embed_dim": (24, 16)}]


_TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 takes any number of factors")
@pytest.mark.parametrize("asked", [{"prune": ("hidden_size",)}, {"prune_num_heads": True}])
def test_a_list_as_long_as_a_head_lets_heads_go_with_the_hidden_size(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """Phi-3 with longrope: hidden size over heads stays what its lists of factors are made for."""
    factors = [1 + place / 8 for place in range(8)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1]}
    config = hf.Phi3Config(**_TEXT, rope_parameters=rope, original_max_position_embeddings=16)
    hook = pruned(hf.Phi3ForCausalLM(config), {"input_ids": ids()}, tmp_path, **asked)
    (report,) = hook.reports
    fields = {name: new for name, (_, new) in report.fields.items()}
    heads = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert fields == heads | ({} if "prune" in asked else {"intermediate_size": 24})


def test_towers_with_other_numbers_of_heads(tmp_path: Path) -> None:
    """A tiny model has two heads in each tower; each has its own number at full size."""
    config = hf.CLIPConfig(
        text_config={**_TEXT, "num_attention_heads": 8},
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=24,
    )
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    hook = pruned(hf.CLIPModel(config), {"input_ids": ids(), "pixel_values": pixels}, tmp_path)
    assert {name: new for name, (_, new) in hook.reports[0].fields.items()} == {
        "text_config.hidden_size": 32,
        "text_config.intermediate_size": 24,
        "vision_config.hidden_size": 48,
        "vision_config.intermediate_size": 20,
    }


class PairedMLP(nn.Module):
    """Gate and up beside each other, for each unit."""

    def __init__(self, config: Any):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(nn.functional.silu(gate) * up)


class Paired(hf.LlamaForCausalLM):
    """A Llama with such layers."""

    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = PairedMLP(config)


def test_pairs_of_a_feed_forward_layer_are_no_heads(tmp_path: Path) -> None:
    model = Paired(hf.LlamaConfig(**_TEXT, num_key_value_heads=2, tie_word_embeddings=False))
    hook = pruned(model, {"input_ids": ids()}, tmp_path)
    assert hook.reports[0].fields == {"hidden_size": (64, 32), "intermediate_size": (48, 24)}
    heads = pruner_of(model, HFConfigSyncHook(prune=()), prune_num_heads=True)
    assert heads.DG.fields == [(("num_attention_heads",),)]


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 ties MBart whatever is said")
def test_a_table_that_nothing_reads_goes_with_the_one_of_its_shape(tmp_path: Path) -> None:
    """MBart untied: ``shared`` stands in the checkpoint beside the tables that are used."""
    config = hf.MBartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(5)}
    hook = pruned(hf.MBartForConditionalGeneration(config), inputs, tmp_path, prune=("d_model",))
    (report,) = hook.reports
    assert report.fields == {"d_model": (32, 16)}
    assert (
        "cut in the same way, though no output depends on it: model.shared.weight"
    ) in report.graph


def test_experts_that_no_token_goes_to(tmp_path: Path) -> None:
    """Of NLLB-MoE's experts two run, whatever goes in; the others are built like those."""
    config = hf.NllbMoeConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        num_experts=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(5)}
    hook = pruned(hf.NllbMoeForConditionalGeneration(config), inputs, tmp_path)
    (report,) = hook.reports
    assert report.fields == {"encoder_ffn_dim": (48, 24), "decoder_ffn_dim": (40, 20)}
    unseen = "no output depends on it: model.decoder.layers.1.ffn.experts.expert_2.fc1.bias"
    assert unseen in report.graph


def test_classes_that_are_as_many_as_something_else_by_chance() -> None:
    """Falcon-H1's dims of Mamba heads: two classes in the tiny model, and two heads of keys."""
    config = hf.FalconH1Config(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_d_ssm=64,
        mamba_n_heads=16,
        mamba_d_head=4,
        mamba_n_groups=1,
        mamba_d_state=36,
        mamba_d_conv=1,
        mamba_expand=1,
        mamba_chunk_size=16,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = hf.FalconH1ForCausalLM(config).eval()
    norms = [layer.mamba.norm for layer in model.model.layers]
    for norm in norms:
        norm.weight.data = torch.arange(64.0)
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.25,
        hooks=[HFConfigSyncHook(prune=("mamba_d_head", "mamba_d_ssm"))],
    ).step()
    assert (model.config.mamba_d_head, model.config.mamba_d_ssm) == (3, 48)
    for norm in norms:
        heads = norm.weight.view(16, 3) // 4
        assert torch.equal(heads, torch.arange(16.0)[:, None].expand(16, 3))


def mamba_2(**values: Any) -> Any:
    """Sixteen heads of four dims; the tiny model has eight of four."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    heads = {"num_heads": 16, "head_dim": 4, "expand": 2, "n_groups": 1}
    torch.manual_seed(0)
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(**{**sizes, **heads, **values})).eval()


def test_a_unit_is_in_as_many_places_as_there_are_heads() -> None:
    """As many dims have to go of every head; of two heads together, the one lost all of its own."""
    model = mamba_2()
    for layer in model.backbone.layers:
        layer.mixer.norm.weight.data = torch.arange(64.0)
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=("expand", "head_dim"))],
    ).step()
    assert (model.config.expand, model.config.head_dim) == (1, 2)
    for layer in model.backbone.layers:
        heads = layer.mixer.norm.weight.view(16, 2) // 4
        assert torch.equal(heads, torch.arange(16.0)[:, None].expand(16, 2))


def test_two_groups_of_one_width_in_one_dimension(tmp_path: Path) -> None:
    """A step of time that is clamped to 0 depends on no head: its rows are a group of their own.

    When heads had gone from before them, they were looked for where they had been.
    """
    model = mamba_2(time_step_limit=(float("inf"), 0.0))
    widths = ("num_heads", "hidden_size")
    graph = pruner_of(model, HFConfigSyncHook(prune=widths)).DG
    sides = [side for group in graph.graph_groups for side in group.sides]
    first = model.backbone.layers[0].mixer.in_proj
    assert sum(side.module is first and side.out for side in sides) == 2
    inputs = {"input_ids": ids()}
    (report,) = pruned(model, inputs, tmp_path, prune=widths).reports
    assert report.fields == {"hidden_size": (32, 16), "num_heads": (16, 8)}
    lost = [
        layer
        for group in report.groups
        for layer in group.layers
        if (layer.name, layer.out) == ("backbone.layers.0.mixer.in_proj", True)
    ]
    assert [(layer.before, layer.removed) for layer in lost] == [(160, 64), (160, 8)]  # at once


def test_an_experiment_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    own = prove._scales_parts

    def scales(*args: Any) -> Any:
        asked.append(args[:2])
        return own(*args)

    monkeypatch.setattr(prove, "_scales_parts", scales)
    model = mamba_2(num_hidden_layers=5)
    assert {width.name: width.reason for width in prunable(model).widths}[
        "expand + head_dim"
    ] is None
    assert len(asked) == len(set(asked)) > 0
