"""Inputs reach what they can of the tiny model: arguments that a class may do without are tried."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError
from tp_hf_config.forward.coverage import forward_error, unreached_by, working_inputs
from tp_hf_config.forward.head_splits import splits_with
from tp_hf_config.model.build import Refusal
from tp_hf_config.twin.layout import TensorDim
from tp_hf_config.twin.tiny.tiny_model import randomise
from tp_hf_config.twin.twin_test import TwinTest

_LAYER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TEXT = {**_LAYER, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}


@pytest.mark.parametrize("error", [MemoryError(), TimeoutError("time is up")])
def test_want_of_time_or_memory_is_no_error_of_the_class(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise error

    model = small.bert()
    monkeypatch.setattr(type(model), "forward", stopped)
    for run in (forward_error, splits_with):
        with pytest.raises(type(error)):
            run(model, {})


def _longformer() -> hf.PreTrainedModel:
    return hf.LongformerForMaskedLM(hf.LongformerConfig(**_TEXT, attention_window=[4]))


def _luke() -> hf.PreTrainedModel:
    return hf.LukeForMaskedLM(hf.LukeConfig(**_TEXT, entity_vocab_size=9, entity_emb_size=8))


def _wav2vec2() -> hf.PreTrainedModel:
    config = hf.Wav2Vec2Config(
        **_LAYER,
        vocab_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return hf.Wav2Vec2Model(config)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (_longformer, {"global_attention_mask": (2, 8)}),
        (_luke, {"entity_ids": (2, 2), "entity_position_ids": (2, 2, 2)}),
        (_wav2vec2, {"mask_time_indices": (2, 383)}),
    ],
)
def test_optional_arguments_that_reach_more(
    make: Any, arguments: dict[str, tuple[int, ...]]
) -> None:
    model = make().double().eval()
    model.set_attn_implementation("eager")
    randomise(model)
    working = working_inputs(model)
    assert not isinstance(working, Refusal)
    inputs, partial = working.inputs, working.partial
    assert not partial
    assert {name: tuple(inputs[name].shape) for name in arguments} == arguments
    without = {name: value for name, value in inputs.items() if name not in arguments}
    assert {name for name in unreached_by(model, inputs) if "pooler" not in name} == set()
    assert {name for name in unreached_by(model, without) if "pooler" not in name}


class _Either(nn.Module):
    """Global attention that takes the place of the other instead of standing beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = hf.BertConfig(vocab_size=9)
        self.table = nn.Embedding(9, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, input_ids: Any, global_attention_mask: Any = None) -> torch.Tensor:
        x = self.table(input_ids)
        if global_attention_mask is None:
            return self.one(x)
        return self.third(self.other(x))


def test_what_reaches_something_else_is_not_taken() -> None:
    working = working_inputs(_Either().double())
    assert not isinstance(working, Refusal)
    assert list(working.inputs) == ["input_ids"]


class _Codes(nn.Module):
    """What it gives are numbers of codes, which have no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.config = hf.BertConfig(vocab_size=9)
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 6)

    def forward(self, input_ids: Any) -> torch.Tensor:
        return self.layer(self.table(input_ids)).argmax(-1)


def test_outputs_without_gradients_reach_nothing() -> None:
    model = _Codes().double()
    working = working_inputs(model)
    assert not isinstance(working, Refusal)
    assert unreached_by(model, working.inputs) == {"table.weight", "layer.weight", "layer.bias"}
    test = TwinTest(model, working.inputs, 6)
    links = test.links([TensorDim("layer.weight", 0), TensorDim("layer.bias", 0)])
    assert links.groups == ()
    assert test.unused(["layer.weight"])


class _InPlace(nn.Module):
    """It changes what its backward pass needs, as Doge does where ``norm_topk_prob``."""

    def __init__(self) -> None:
        super().__init__()
        self.config = hf.BertConfig(vocab_size=9)
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 6)

    def forward(self, input_ids: Any) -> torch.Tensor:
        scores = self.layer(self.table(input_ids)).softmax(-1)
        scores /= scores.sum(-1, keepdim=True)
        return scores


def test_a_class_without_a_backward_pass_does_not_run() -> None:
    working = working_inputs(_InPlace().double())
    assert isinstance(working, Refusal)
    assert working.reason.startswith(
        "the tiny model does not run: torch cannot compute its gradients: one of the variables "
        "needed for gradient computation has been modified by an inplace operation"
    )


def test_such_a_class_is_refused_before_anything_is_pruned() -> None:
    config = hf.DogeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        is_moe=True,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    model = hf.DogeForCausalLM(config).eval()
    before = small.state_of(model)
    for inputs in (None, {"input_ids": torch.arange(1, 9)[None]}):
        with pytest.raises(UnsupportedModelError) as raised:
            tp.pruner.MetaPruner(
                model,
                inputs,
                tp.importance.GroupMagnitudeImportance(),
                hooks=[HFConfigSyncHook()],
            )
        assert str(raised.value).startswith(
            "DogeForCausalLM cannot be pruned: the tiny model does not run: torch cannot compute "
            "its gradients: one of the variables needed for gradient computation has been modified "
            "by an inplace operation"
        )
        assert str(raised.value).endswith(
            ". To find the channels that belong together, a tiny model of the class has to run "
            "forward and backward in float64. Load the weights into a class that does: "
            "DogeModel.from_pretrained(...)."
        )
    small.assert_same(before, small.state_of(model))
