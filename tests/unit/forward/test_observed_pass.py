"""Parts of a model that run without an output that depends on them are watched, and proved so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import transformers as hf
from masked import masked_difference
from torch import Tensor, nn
from transformers.models.dinov3_vit import modeling_dinov3_vit

from tp_hf_config import HFConfigSyncHook, prunable, supports
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.observed_pass import (
    AllFloat64,
    PassResult,
    outputs_in_float64,
    watched_results,
)
from tp_hf_config.model.build import Builder
from tp_hf_config.model.config_json import config_json
from tp_hf_config.pipeline.support import subject
from tp_hf_config.twin.layout import TensorDim, UnitLayout
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model
from tp_hf_config.twin.twin_test import Links, TwinTest

HIDDEN, HEADS, RUN, TOKENS = 12, 4, 3, 5


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.double().eval()


def states() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)}


class Pooled(nn.Module):
    """A head whose result nobody takes, beside one whose result is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.pool = nn.Linear(HIDDEN, HIDDEN)
        self.inner = nn.Linear(HIDDEN, 6)
        self.out = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        pooled = self.pool(x[:, 0]).tanh()
        self.inner(pooled)
        pooled.mean(-1)
        return self.out(x)


class Scored(nn.Module):
    """Sparse attention's indexer: heads score the tokens, the best are taken."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HEADS * RUN, bias=False)
        self.key = nn.Linear(HIDDEN, RUN, bias=False)
        self.weights = nn.Linear(HIDDEN, HEADS, bias=False)
        self.causal = causal

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).view(*x.shape[:2], HEADS, RUN)
        scores = torch.einsum("bqhd,bkd->bhqk", query, self.key(x)).relu()
        scores = torch.einsum("bhqk,bqh->bqk", scores, self.weights(x))
        if self.causal:
            later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        return scores.topk(3).indices


class Sparse(nn.Module):
    """Every token is the mean of those that the indexer chooses."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.indexer = Scored(causal)
        self.out = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = F.one_hot(self.indexer(x), TOKENS).sum(-2).to(x.dtype)
        return self.out(chosen @ x)


QUERIES = TensorDim("indexer.query.weight", 0, UnitLayout(run=RUN))
WEIGHTS = TensorDim("indexer.weights.weight", 0)


def test_where_the_outputs_show_everything_nothing_is_watched() -> None:
    assert watched_results(ready(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), {"input": x4()}) == ()


def x4() -> Tensor:
    return torch.ones(2, 4, dtype=torch.float64)


def test_a_result_that_nobody_takes_is_watched() -> None:
    """One that shows all there is to see: not the mean, which shows no more."""
    model = ready(Pooled())
    assert watched_results(model, states()) == (PassResult("inner", "linear", 0),)
    *outputs, inner = outputs_in_float64(model, states(), [PassResult("inner", "linear", 0)])
    assert [output.shape for output in outputs] == [(2, TOKENS, 3)]
    assert inner.shape == (2, 6)


def test_what_layers_in_a_list_compute_is_not_of_the_module_around_it() -> None:
    """The list never runs: CvT's stage gives a map that no output depends on, behind its layers."""

    class Layered(Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            F.linear(x[:, 0], self.inner.weight)
            return self.out(x)

    model = ready(Layered())
    assert watched_results(model, states()) == (PassResult("", "linear", 0),)
    x = states()["x"]
    for layer in model.layers:
        x = layer(x)
    *_, shown = outputs_in_float64(model, states(), [PassResult("", "linear", 0)])
    assert torch.equal(shown, F.linear(x[:, 0], model.inner.weight))


class _Lent(nn.Module):
    """Uses a layer that the model around it has too, under an earlier name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) - 1


def test_what_a_layer_computes_that_two_modules_have_is_its_own() -> None:
    model = nn.Module()
    model.layer = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
    model.inner = _Lent(model.layer)
    model.forward = lambda x: model.inner(x)  # type: ignore[method-assign]
    x = states()["x"]
    *_, result = outputs_in_float64(ready(model), {"x": x}, [PassResult("inner", "relu", 0)])
    torch.testing.assert_close(result - 1, model(x), rtol=0, atol=0)
    *_, lost = outputs_in_float64(model, {"x": x}, [PassResult("inner", "relu", 1)])
    assert bool(lost.isnan())


def test_what_does_not_run_is_not_watched() -> None:
    model = ready(Pooled())
    model.idle = nn.Linear(HIDDEN, 4).double()  # type: ignore[assignment]
    assert watched_results(model, states()) == (PassResult("inner", "linear", 0),)


def test_scores_that_only_choose_are_watched() -> None:
    watched = watched_results(ready(Sparse()), states())
    assert watched == (PassResult("indexer", "einsum", 1), PassResult("indexer", "topk", 0))


@pytest.mark.parametrize("causal", [False, True])
def test_heads_of_scores_go_with_their_weights(causal: bool) -> None:
    """A mask's least number beside the scores does not hide how they differ."""
    model = ready(Sparse(causal))
    dims = [QUERIES, WEIGHTS]
    blind = TwinTest(model, states(), HEADS).links(dims)
    assert blind == Links((), (), (QUERIES, WEIGHTS))
    test = TwinTest(model, states(), HEADS, watched=watched_results(model, states()))
    assert test.links(dims) == Links(((QUERIES, WEIGHTS),), (), ())
    order = [1, 0, 3, 2]
    assert test.proves(dims, order)
    assert not test.proves([QUERIES], order)
    assert not test.proves([WEIGHTS], order)


def test_a_comparison_chooses_too() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.gate(x)
            return self.out(x * (scores.softmax(-1)[..., :1] > 0.5))

    assert watched_results(ready(Gated()), states()) == (PassResult("", "__getitem__", 0),)


def test_a_number_read_chooses_too() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            total = self.gate(x).sum()
            total.exp()
            return self.out(x[:, : 1 + int(total.item()) % 2])

    watched = watched_results(ready(Counted()), states())
    assert watched == (PassResult("", "sum", 0), PassResult("", "exp", 0))


def test_scores_that_make_no_difference_are_watched() -> None:
    """SwiftFormer's: of a softmax over a single score the result is 1, whatever the score is."""

    class Single(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.out(x * F.linear(x, self.weight).softmax(-1))

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, HIDDEN))

    model = ready(Single())
    watched = watched_results(model, states())
    assert watched == (PassResult("", "linear", 0),)
    dims = [
        TensorDim("body.weight", 0),
        TensorDim("body.bias", 0),
        TensorDim("weight", 1),
        TensorDim("out.weight", 1),
    ]
    links = TwinTest(model, states(), HIDDEN, watched=watched).links(dims)
    assert [set(one) for one in links.groups] == [set(dims)]


def test_a_tensor_of_the_same_shape_chooses_nothing() -> None:
    """Longformer's global keys go into zeros that are made like all of its keys."""

    class Blank(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            keys = self.body(x)
            return self.out(keys.new_zeros(keys.shape) + torch.ones_like(keys)) + keys.sum() * 0

    watched = watched_results(ready(Blank()), states())
    assert "body" not in {result.module for result in watched}


def test_a_parameter_that_is_changed_as_the_model_runs_is_left_alone() -> None:
    class Changing(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.pool.weight.mul_(1.0)
            return super().forward(x)

    assert watched_results(ready(Changing()), states()) == ()


def test_a_watched_result_is_no_output() -> None:
    model = ready(Pooled())
    test = TwinTest(model, states(), 6, watched=watched_results(model, states()))
    assert not test.shows_outside()
    assert TwinTest(model, states(), 3).shows_outside()


def test_a_result_that_a_pass_does_not_give_proves_nothing() -> None:
    model = ready(Pooled())
    test = TwinTest(model, states(), 6, watched=watched_results(model, states()))
    dims, order = [TensorDim("inner.weight", 0), TensorDim("inner.bias", 0)], [5, 4, 3, 2, 1, 0]
    assert test.proves(dims, order)
    test.watched = [PassResult("inner", "linear", 1)]
    assert not test.proves(dims, order)


def siglip() -> hf.PreTrainedModel:
    vision = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    return hf.SiglipForImageClassification(hf.SiglipConfig(vision_config={**vision, **sizes}))


def big_bird() -> hf.PreTrainedModel:
    config = hf.BigBirdConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return hf.BigBirdForMaskedLM(config)


def hunyuan_moe() -> hf.PreTrainedModel:
    """The one best expert has the whole weight: its router has no gradient, yet it decides."""
    config = hf.HunYuanMoEV1Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        moe_topk=1,
    )
    return hf.HunYuanMoEV1ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "fields", "part"),
    [
        (
            siglip,
            ("vision_config.hidden_size", "vision_config.intermediate_size"),
            "vision_model.head.mlp.fc1.weight",
        ),
        (big_bird, ("hidden_size",), "bert.pooler.weight"),
        (hunyuan_moe, ("hidden_size",), "model.layers.0.mlp.gate.wg.weight"),
    ],
)
def test_widths_of_parts_that_no_output_shows(
    build: Callable[[], hf.PreTrainedModel], fields: tuple[str, ...], part: str
) -> None:
    widths = {width.name: width for width in prunable(build().eval()).widths}
    for field in fields:
        assert widths[field].reason is None
        assert part in {dim.name for group in widths[field].groups for dim in group.dims}
        assert not widths[field].unobserved_parameters


def test_a_class_that_exchanges_modules_as_it_first_runs_is_compared_as_it_then_is() -> None:
    found = {width.name: width for width in supports(big_bird()).widths}
    assert (found["hidden_size"].outcome, found["hidden_size"].why) == ("works", "")


def indexer() -> hf.PreTrainedModel:
    config = hf.DeepseekV32Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=28,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=64,
    )
    torch.manual_seed(0)
    return hf.DeepseekV32ForCausalLM(config).eval()


@pytest.mark.skipif(not hasattr(hf, "DeepseekV32Config"), reason="this version has no such class")
def test_heads_that_only_choose_tokens_are_pruned_and_compared() -> None:
    found = {width.name: width for width in supports(indexer()).widths}
    assert found["index_n_heads"].outcome == "works"
    assert found["hidden_size"].outcome == "works"
    assert found["index_head_dim"].outcome == "refused"

    tiny = tiny_model(map_of(indexer()))
    assert isinstance(tiny, TinyModel)
    case = subject(tiny, 0)
    pruned: Any = copy.deepcopy(case.model)
    tp.pruner.MetaPruner(
        pruned,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=("index_n_heads",))],
    ).step()
    fresh = Builder(pruned).build_real(config_json(pruned.config))
    assert isinstance(fresh, nn.Module)
    assert masked_difference(case.model, pruned, fresh, case.tiny.inputs, case.tiny.watched) is None
    name = "model.layers.0.self_attn.indexer.weights_proj.weight"
    full, left = case.model.get_parameter(name), pruned.get_parameter(name)
    assert len(left) == len(full) // 2
    gone = [row for row in full if not any(torch.equal(row, other) for other in left)]
    left.data.copy_(torch.stack(gone))
    # all tokens are taken
    assert masked_difference(case.model, pruned, fresh, case.tiny.inputs) is None
    assert "off the original with the removed units masked" in str(
        masked_difference(case.model, pruned, fresh, case.tiny.inputs, case.tiny.watched)
    )


class Cached(nn.Module):
    """Keeps what a pass computes in every place where a class may, as LeViT and Mimi do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(6, HIDDEN))
        self.kept: Tensor | None = None
        self.by_size: dict[int, Tensor] = {}
        self.register_buffer("codes", None)
        self.called = 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        if self.kept is None:
            self.kept = self.table.detach().sub(1).sub(2)
            self.by_size[len(x)] = self.table.mul(2)
            self.register_buffer("codes", self.table.detach().mul(3))
        return x.sub(3) + self.kept.mean() + self.by_size[len(x)].mean() + self.codes.mean()


def test_a_pass_leaves_no_tensors_behind() -> None:
    watched = [PassResult("", "sub", 0)]
    model, again = ready(Cached()), ready(Cached())
    results = [outputs_in_float64(model, states(), watched) for _ in range(2)]
    assert all(map(torch.equal, *results))
    assert (model.kept, model.by_size, model.codes, model.called) == (None, {}, None, 2)
    with torch.no_grad():
        model.table += 1
    assert not torch.equal(outputs_in_float64(model, states())[0], results[0][0])
    assert masked_difference(again, ready(Cached()), ready(Cached()), states(), watched) is None


def test_the_row_of_padding_is_read_like_any_other() -> None:
    embedding = nn.Embedding(3, 4, padding_idx=0).double()
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    (out,) = outputs_in_float64(embedding, {"input": torch.tensor([0, 0, 2])})
    out.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[:, 0].tolist() == [2.0, 0.0, 1.0]


def test_nothing_stays_in_the_caches_of_classes() -> None:
    """DINOv3 keeps the centers of patches: asked for in float32, an experiment makes float64."""
    cpu = torch.device("cpu")

    def ask() -> torch.Tensor:
        return modeling_dinov3_vit.get_patches_center_coordinates(3, 5, torch.float32, cpu)

    with AllFloat64():
        assert ask().dtype == torch.float64
    assert ask().dtype == torch.float32
    with AllFloat64():
        assert ask().dtype == torch.float64
    assert ask() is ask()


class _ChangedInPlace(nn.Module):
    """It changes the scores that it chose by, which their backward pass would need."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layer = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        scores = self.gate(states).softmax(-1)
        chosen = scores.argmax(-1)
        scores /= 2
        return self.layer(states) * (1 + chosen[..., None])


def test_what_is_changed_in_place_shows_nothing() -> None:
    model = ready(_ChangedInPlace().double())
    inputs = {"states": torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)}
    watched = watched_results(model, inputs)
    assert watched == (PassResult("gate", "linear", 0),)
