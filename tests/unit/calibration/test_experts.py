"""Whole experts are ranked by REAP's score, which is written down here once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import calibrated
import pytest
import small
import tiny
import torch
import torch.nn.functional as F
import torch_pruning as tp
import transformers as hf
import zoo
from torch import Tensor, nn

from tp_hf_config import CalibrationWarning, HFConfigSyncHook, calibrate
from tp_hf_config.calibration.linear_ops import Consumer, Contribution
from tp_hf_config.calibration.measured import Readings, added_up
from tp_hf_config.calibration.passes import Ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
    pytest.mark.skipif(
        small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert"
    ),
]
_TEXT = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = {
    **_TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Case:
    """A class, and how its router weighs the experts of a token."""

    model: Callable[[], Any]
    field: str
    block: str  # of the last layer
    renormalised: bool | None = True  # over the experts of a token; None: by the router's output


def _qwen2(renormalise: bool) -> Any:
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 6}
    config = hf.Qwen2MoeConfig(**_TEXT, **sizes, norm_topk_prob=renormalise)
    return hf.Qwen2MoeForCausalLM(config)


CASES = {
    "mixtral": Case(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_TEXT, num_local_experts=6)),
        "num_local_experts",
        "mlp",
    ),
    "qwen2_moe": Case(lambda: _qwen2(False), "num_experts", "mlp", False),
    "qwen2_moe renormalised": Case(lambda: _qwen2(True), "num_experts", "mlp"),
    "olmoe": Case(
        lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_TEXT, num_experts=6)),
        "num_experts",
        "mlp",
        False,
    ),
    "granitemoe": Case(
        lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**_TEXT, num_local_experts=6)),
        "num_local_experts",
        "block_sparse_moe",
    ),
    "gpt_oss": Case(
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**_TEXT, head_dim=8, num_local_experts=6, sliding_window=4)
        ),
        "num_local_experts",
        "mlp",
    ),
    "deepseek_v3": Case(
        lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_DEEPSEEK)),
        "n_routed_experts",
        "mlp",
        None,
    ),
}


def built(case: Case) -> Any:
    """Random weights, and experts of different sizes, so that their scores differ."""
    model = case.model()
    tiny.randomise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and "down_proj" in name:
                parameter.mul_(torch.linspace(1.5, 0.5, len(parameter))[:, None, None])
    return model.eval()


def block_of(model: Any, case: Case) -> Any:
    return getattr(model.model.layers[-1], case.block)


@contextmanager
def inputs_of(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """While open, ``seen`` gets what a module reads, ``(tokens, channels)``."""
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    yield
    handle.remove()


@torch.no_grad()
def published(model: Any, case: Case, data: list[Any]) -> Tensor:
    """The scores as in the code that was published with REAP: every expert runs on all tokens."""
    block, seen = block_of(model, case), list[Tensor]()
    router = block.gate if hasattr(block, "gate") else block.router
    with inputs_of(block, seen):
        for batch in data:
            model(**batch)
    tokens = torch.cat(seen)
    if case.renormalised is None:
        _, own, chosen = router(tokens)
        weights = torch.zeros(len(tokens), len(router.weight)).scatter(1, chosen, own)
    else:
        logits = F.linear(tokens, router.weight, getattr(router, "bias", None))
        weights = logits.softmax(1)
        chosen = logits.topk(2, dim=1).indices
        if case.renormalised:
            weights = weights / weights.gather(1, chosen).sum(1, keepdim=True)
    scores = torch.zeros(weights.shape[1])
    model.set_experts_implementation("eager")
    for expert in range(len(scores)):
        active = (chosen == expert).any(1)
        number = torch.full((len(tokens), 1), expert)
        output = block.experts(tokens, number, torch.ones(len(tokens), 1))
        scores[expert] = (output.norm(dim=1) * weights[:, expert])[active].mean()
    return scores


def values_of(model: Any, importance: Any, case: Case) -> Tensor:
    """What a pruner gets for the experts of the last layer."""
    pruner = calibrated.pruner_of(model, prune=case.field, importance=importance)
    *_, group = pruner.DG.get_all_groups()
    return pruner.estimate_importance(group)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_published_code(name: str) -> None:
    case = CASES[name]
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 12), refits=False)
    expected = published(model, case, calibration.train)
    values = values_of(model, calibration.importance(normalizer=None), case)
    assert len(set(expected.tolist())) == len(expected)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["activation", "curvature"])
def test_every_kind_of_importance_ranks_experts_by_this_score(kind: Any) -> None:
    case = CASES["mixtral"]
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 4))
    first, second = (
        values_of(model, calibration.importance(which), case) for which in ("auto", kind)
    )
    assert torch.equal(first, second)


@torch.no_grad()
def test_routing_weights_of_the_experts_inputs() -> None:
    """Llama 4 runs all experts on all tokens, those of other experts times zero."""
    config = hf.Llama4TextConfig(
        **_TEXT, head_dim=8, intermediate_size_mlp=40, num_local_experts=6, moe_layers=[1]
    )
    case = Case(lambda: hf.Llama4ForCausalLM(config), "num_local_experts", "feed_forward")
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 12), refits=False)
    importance, data = calibration.importance(normalizer=None), calibration.train
    seen: list[Tensor] = []
    block = block_of(model, case)
    with inputs_of(block.experts, seen):
        for batch in data:
            model(**batch)
    norms = torch.cat([block.experts(each).view(6, -1, 32).norm(dim=2) for each in seen], dim=1)
    routed = torch.cat([each.view(6, -1, 32).abs().sum(2) > 0 for each in seen], dim=1)
    assert int(routed.sum()) == 2 * sum(batch["input_ids"].numel() for batch in data)
    expected = norms.sum(1) / routed.sum(1)
    torch.testing.assert_close(values_of(model, importance, case), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_outputs_that_are_joined_before_they_are_added() -> None:
    """JetMoE, in which the attention has experts of its own too."""
    sizes = {key: value for key, value in _TEXT.items() if key != "num_attention_heads"}
    sizes |= {"num_key_value_heads": 4, "kv_channels": 16, "num_local_experts": 6}
    config = hf.JetMoeConfig(**sizes)
    case = Case(lambda: hf.JetMoeForCausalLM(config), "num_local_experts", "mlp")
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 12), refits=False)
    importance, data = calibration.importance(normalizer=None), calibration.train
    seen: list[Tensor] = []
    block = block_of(model, case)
    with inputs_of(block, seen):
        for batch in data:
            model(**batch)
    tokens = torch.cat(seen)
    best = block.router.layer(tokens).topk(2, dim=1)
    gates = best.values.softmax(1)
    expected = torch.zeros(6)
    for expert in range(6):
        rows, places = (best.indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(tokens[rows], block.input_linear.weight[expert]).chunk(2, 1)
        output = F.linear(block.activation(gate) * up, block.output_linear.weight[expert])
        expected[expert] = (output.norm(dim=1) * gates[rows, places]).mean()
    found = calibration.readings.experts
    names = [
        f"model.layers.1.{part}.output_linear.weight" for part in ("mlp", "self_attention.experts")
    ]
    scores = [torch.tensor([found[Consumer(name, 2, n)].score for n in range(6)]) for name in names]
    torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=0)
    values = values_of(model, importance, case)  # expert 1 of the attention is the same unit
    torch.testing.assert_close(values, scores[0] + scores[1], rtol=1e-5, atol=0)


class Mixture(nn.Module):
    """A plain PyTorch mixture of experts, each a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            output = expert(tokens[rows]) * weights[rows, places, None]
            result.index_add_(0, rows, output)
        return result


@torch.no_grad()
def test_experts_in_modules_of_their_own() -> None:
    model, data = Mixture().eval(), [torch.randn(20, 8) for _ in range(4)]
    experts = calibrate(model, data).readings.experts
    tokens = torch.cat(data[:-1])  # the last one is held out
    weights, chosen = model.router(tokens).softmax(-1).topk(2)
    for number, expert in enumerate(model.experts):
        rows, places = (chosen == number).nonzero(as_tuple=True)
        found = experts[Consumer(f"experts.{number}.2.weight", 1)]
        expected = (expert(tokens[rows]).norm(dim=1) * weights[rows, places]).mean()
        assert found.tokens == len(rows)
        assert found.score == pytest.approx(float(expected), rel=1e-5)
    assert len(experts) == 4  # nothing else is added up row by row


def test_a_step_removes_the_experts_with_the_lowest_scores() -> None:
    case = CASES["mixtral"]
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 12), refits=False)
    kept = published(model, case, calibration.train).argsort()[3:].sort().values
    router = block_of(model, case).gate.weight.detach().clone()
    hook = HFConfigSyncHook(prune=case.field)
    calibrated.pruner_of(model, hook, importance=calibration.importance()).step()
    assert model.config.num_local_experts == 3
    assert torch.equal(block_of(model, case).gate.weight, router[kept])
    assert not any("no calibration token" in note for note in hook.last_report.notes)


@pytest.mark.parametrize("settings", [{}, {"global_pruning": True}])
@pytest.mark.parametrize("ranked_by", ["data", "weights"])
def test_each_group_of_a_router_loses_its_own_lowest(
    ranked_by: str, settings: dict[str, Any]
) -> None:
    case = CASES["deepseek_v3"]
    model = built(case)
    with torch.no_grad():  # the lowest of the first group is its second, that of the other its last
        block_of(model, case).experts.down_proj[1].mul_(0.1)
    importance: Any = tp.importance.GroupMagnitudeImportance()
    if ranked_by == "data":
        data = calibrated.batches(model, 12)
        importance = calibrate(model, data, refits=False).importance()
    scores = values_of(model, importance, case).view(2, 4)
    lowest = [int(scores[0].argmin()), 4 + int(scores[1].argmin())]
    assert lowest[0] + 4 != lowest[1]
    router = block_of(model, case).gate.weight.detach().clone()
    hook = HFConfigSyncHook(prune=case.field)
    arguments = {"importance": importance, "pruning_ratio": 0.25, **settings}
    calibrated.pruner_of(model, hook, **arguments).step()
    kept = [number for number in range(8) if number not in lowest]
    assert torch.equal(block_of(model, case).gate.weight, router[kept])


def test_experts_that_no_token_reached_are_removed_first_and_named() -> None:
    case = CASES["gpt_oss"]
    model = built(case)
    router = block_of(model, case).router
    with torch.no_grad():
        router.bias[[1, 4]] -= 1000
    message = (
        r"gate_up_proj: no token reached 2 of 6 experts \(number 1, 4\), so they are pruned with"
    )
    with pytest.warns(CalibrationWarning, match=message):
        calibration = calibrate(model, calibrated.batches(model, 12))
    values = values_of(model, calibration.importance(), case)
    assert (values == 0).nonzero().flatten().tolist() == [1, 4]
    left = router.weight.detach()[[0, 2, 3, 5]].clone()
    hook = HFConfigSyncHook(prune=case.field)
    arguments = {"importance": calibration.importance(), "pruning_ratio": 0.33}
    calibrated.pruner_of(model, hook, **arguments).step()
    assert torch.equal(router.weight, left)


def test_experts_whose_outputs_are_not_found_are_ranked_by_magnitude() -> None:
    case = CASES["mixtral"]
    model = built(case)
    calibration = calibrate(model, calibrated.batches(model, 4), refits=False)
    calibration.readings.experts.clear()
    with pytest.warns(CalibrationWarning, match="what each expert adds to its layer's output was"):
        found = values_of(model, calibration.importance(), case)
    plain = tp.importance.GroupMagnitudeImportance(group_reduction="sum")
    assert torch.equal(found.argsort(), values_of(model, plain, case).argsort())


class TwoRanks(Ranks):
    """This rank and another with the same readings."""

    def gathered(self, value: Any) -> list[Any]:
        return [value, value]


def test_contributions_of_all_ranks_are_added_up() -> None:
    experts = {Consumer("down", 2, part): Contribution(3.0 * part, part) for part in range(3)}
    result = added_up(Readings(experts=experts), set(), TwoRanks(2, own_data=True), 0)
    assert [each.tokens for each in result.experts.values()] == [0, 2, 4]
    assert [each.score for each in result.experts.values()] == [0, 3, 3]
