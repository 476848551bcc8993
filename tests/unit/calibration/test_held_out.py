"""Refits at the cut: exact where they can be, never worse than the cut, no other change."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import calibrated
import pytest
import small
import torch
import torch_pruning as tp
import zoo
from reloading import assert_reloaded
from transformers import LlamaForCausalLM

from tp_hf_config import (
    CalibrationError,
    CalibrationWarning,
    HFConfigSyncHook,
    UnsupportedModelError,
    calibrate,
)
from tp_hf_config.calibration import held_out
from tp_hf_config.calibration.held_out import Refits
from tp_hf_config.calibration.linear_ops import Consumer
from tp_hf_config.calibration.refit import StepRefits, refit_from_gram

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]

# where no tied head and no product of queries and keys loses channels, but for T5's: between them
# is nothing, so they are cut in another basis
EXACT: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"prune": "intermediate_size"},
    "phi3": {},
    "gpt2": {"prune": "n_inner"},
    "gpt_neox": {},
    "opt": {"prune": "ffn_dim"},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "deepseek_v3": {"prune": ("intermediate_size", "moe_intermediate_size", "v_head_dim")},
    "mamba2": {},
    "bert": {"prune": "intermediate_size"},
    "modernbert": {},
    "t5": {"prune": ("d_ff", "d_kv")},
    "bart": {"prune": ("encoder_ffn_dim", "decoder_ffn_dim")},
    "whisper": {"prune": ("encoder_ffn_dim", "decoder_ffn_dim")},
    "vit": {},
    "convnext": {},
    "clip": {"prune": ("text_config.intermediate_size", "vision_config.intermediate_size")},
    "wav2vec2": {"prune": ("conv_dim[0]", "intermediate_size")},
}
_OWN_FLOAT32 = {"mamba2": 1e-5}
"""Classes that compute in float32 in a float64 model, and what that leaves."""


OF_EVERY_KIND = (
    ("llama", "gpt2", "mixtral", "convnext"),
    ("gemma3", "gpt_oss", "deberta_v2"),
)
"""Those that ``make test`` runs: first of the exact ones, then of all."""


@pytest.mark.parametrize("name", calibrated.others_full(EXACT, OF_EVERY_KIND[0]))
def test_units_that_others_make_up_for_leave_no_trace(name: str) -> None:
    """Half of all units are copies of others: the pruned model computes what the whole one did."""
    model = calibrated.build(name)
    data = calibrated.batches(model)
    hook = HFConfigSyncHook(**EXACT[name])
    pruner = calibrated.pruner_of(model, hook)
    calibrated.duplicate(model, pruner, calibrated.chosen(pruner), data)
    hook.refit = calibrate(model, data, ridge=0.0)
    inputs = zoo.inputs(model)
    before = calibrated.outputs(model, inputs)
    plain = copy.deepcopy(model)
    calibrated.pruner_of(plain, **EXACT[name]).step()
    pruner.step()
    after = calibrated.outputs(model, inputs)
    scale = float(before.abs().max())
    assert float((after - before).abs().max()) <= _OWN_FLOAT32.get(name, 1e-9) * scale
    cut = calibrated.outputs(plain, inputs)
    assert float((cut - before).abs().max()) > 1e-3 * scale, "the plain cut is exact too"
    assert plain.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", calibrated.others_full(zoo.NAMES, OF_EVERY_KIND[1]))
def test_no_layer_is_worse_than_its_plain_cut(name: str) -> None:
    """On the data that refits are solved for."""
    model = calibrated.build(name)
    data = calibrated.batches(model, 12)
    calibration = calibrate(model, data)
    calibration.held_out = calibration.train
    hook = HFConfigSyncHook(refit=calibration)
    calibrated.pruner_of(model, hook).step()
    report = hook.reports[0].refits
    assert report is not None
    assert report.layers
    worse = [layer for layer in report.layers if layer.refit > layer.cut * (1 + 1e-6)]
    assert worse == []
    assert sum(layer.refit < 0.99 * layer.cut for layer in report.layers) > 0


ROUND_TRIPS = ("llama", "gpt2", "mixtral", "bert", "t5", "convnext")


@pytest.mark.parametrize("name", calibrated.others_full(ROUND_TRIPS, ("t5",)))
def test_a_refitted_model_is_the_same_after_a_reload(name: str, collector: Any) -> None:
    model = calibrated.build(name, torch.float32)
    plain = copy.deepcopy(model)
    calibrated.pruner_of(plain).step()
    hook = HFConfigSyncHook(refit=calibrate(model, calibrated.batches(model, 10)))
    calibrated.pruner_of(model, hook).step()
    assert model.config.to_dict() == plain.config.to_dict()
    assert_reloaded(collector.reloaded(model, zoo.inputs(model)))


def llama(seed: int = 0) -> Any:
    return zoo.build("llama", seed)


def test_two_runs_give_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = llama()
        calibration = calibrate(model, calibrated.batches(model, 10))
        hook = HFConfigSyncHook(refit=calibration)
        importance = calibration.importance("curvature")
        calibrated.pruner_of(model, hook, importance=importance, iterative_steps=2).step()
        states.append(model.state_dict())
    first, second = states
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_fewer_tokens_a_weight_read_the_stronger_is_its_ridge() -> None:
    """As many times as it read fewer than eight a channel."""
    model = calibrated.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 10), ridge=0.5)
    pruner = calibrated.pruner_of(model, HFConfigSyncHook(prune="intermediate_size"))
    step = StepRefits(calibration, calibrated.chosen(pruner))
    assert len(step.refits) == 2
    for consumer, refit in step.refits.items():
        statistics = step.readings.statistics[consumer]
        assert 1 < 8 * 96 / statistics.tokens < 10
        assert statistics.gram is not None
        ridge = 0.5 * 8 * 96 / statistics.tokens
        expected = refit_from_gram(statistics.gram, step.kept[consumer], ridge)
        assert expected is not None
        torch.testing.assert_close(refit.share, expected.share)


def test_what_is_foretold_of_the_model_is_what_comes() -> None:
    model = calibrated.build("llama")
    hook = HFConfigSyncHook(refit=calibrate(model, calibrated.batches(model)))
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    assert result.after == pytest.approx(result.refit, rel=1e-9)
    assert result.refit < result.cut
    assert str(result).startswith(f"{sum(layer.used for layer in result.layers)} of 13 weights")
    assert hook.reports[0].to_dict()["refits"]["layers"][0]["weight"]


def roberta_of_48(between: Any = None) -> tuple[HFConfigSyncHook, Refits]:
    """A hook that has cut a RoBERTa's hidden size, and the effect of its refits.

    ``between``: computed of each layer's queries before they are multiplied with the keys.
    """
    model = small.roberta(hidden_size=64)
    for layer in model.roberta.encoder.layer:
        part = layer.attention.self
        for linear, factor in {part.query: 30, part.key: 30, part.value: 10}.items():
            linear.weight.data *= factor
        layer.attention.output.dense.weight.data *= 10
        if between is not None:
            part.query.register_forward_hook(lambda linear, args, output: between(output))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 30, (2, 16), generator=generator) for _ in range(20)]
    calibration = calibrate(model, [{"input_ids": row} for row in rows])
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    importance = calibration.importance()
    calibrated.pruner_of(model, hook, importance=importance, pruning_ratio=0.25).step()
    assert model.config.hidden_size == 48
    assert hook.last_report is not None
    result = hook.last_report.refits
    assert result is not None
    return hook, result


def test_narrower_heads_are_cut_in_another_basis_and_foretold() -> None:
    """The products of fewer dimensions, and which of them are kept."""
    hook, result = roberta_of_48()
    assert result.after == pytest.approx(result.refit, rel=0.1)  # 0.22 without the products
    assert hook.last_report is not None
    assert hook.last_report.to_dict()["ranked_by"] == ["activation"]
    (note,) = (note for note in result.notes if "another basis" in note)
    assert note.startswith(
        "6 weights that compute queries, keys or values are cut in another basis ("
    )
    changes = [float(each) for each in re.findall(r"\d\.\d+", note)]
    assert changes[0] < 0.95 * changes[1]


def test_queries_that_are_more_than_multiplied_keep_their_basis() -> None:
    _, result = roberta_of_48(between=torch.tanh)
    assert [note for note in result.notes if "another basis" in note] == []


def test_a_costly_step_says_before_it_cuts_what_would_cost_less() -> None:
    model = calibrated.build("llama")
    before = model.num_parameters()
    calibration = calibrate(model, calibrated.batches(model, 70))
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    pruner = calibrated.pruner_of(model, hook, pruning_ratio=0.25)
    with pytest.warns(CalibrationWarning, match="this step removes ") as warned:
        pruner.step()
    result, after = hook.reports[0].refits, model.num_parameters()
    text = str(warned[0].message)
    assert text.startswith(
        f"this step removes {before - after:,} of {before:,} parameters. On held-out data the "
        f"output distribution is expected to change by a KL divergence of {result.refit:.3g}: do "
        "not expect good answers without training (over 0.5). A change below 0.1 is hardly "
        "noticeable. If as many parameters are removed from the inner widths only, the expected KL "
        "divergence is "
    )
    other = float(
        text.partition("inner widths only, the expected KL divergence is ")[2].split(":")[0]
    )
    ratio = (before - after) / (2 * 3 * 64 * 96)
    assert (
        f'prune=("intermediate_size",), pruning_ratio={ratio:.2f}. The outputs of layers change by '
        in text
    )
    assert f"allocate(model, calibration, target_params={after}) prunes most in" in text
    assert f"KL {result.refit:.3g}: do not expect good answers without" in str(result)
    fresh = calibrated.build("llama")
    calibration = calibrate(fresh, calibrated.batches(fresh, 70))
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    importance = calibration.importance()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)  # it costs little, so nothing is said
        calibrated.pruner_of(
            fresh,
            hook,
            pruning_ratio=int(ratio * 96) / 96,
            importance=importance,
        ).step()
    assert hook.reports[0].refits.refit == pytest.approx(other, rel=0.02)
    assert other < result.refit


@pytest.mark.parametrize(
    ("change", "meaning"),
    [(0.09, "hardly noticeable"), (0.3, "noticeable, some training helps"), (0.6, "do not expect")],
)
def test_a_report_says_what_a_change_means(change: float, meaning: str) -> None:
    told = str(Refits(measure="KL", cut=1.0, refit=change)).splitlines()
    assert told[1].strip().startswith(f"KL {change}: {meaning}")
    assert len(str(Refits(measure="squared error", cut=1.0, refit=change)).splitlines()) == 1


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
@pytest.mark.parametrize(
    "name", calibrated.others_full(["mixtral", "qwen3_moe", "gpt_oss"], ["gpt_oss"])
)
def test_experts_read_what_the_norm_gives_the_kept_channels_alone(name: str) -> None:
    """They read some rows of it; what goes is loud, so the others get far more of the norm."""
    model = calibrated.build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 48:] *= 8
    calibration = calibrate(model, calibrated.batches(model))
    calibration.held_out = calibration.train[:8]
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    calibrated.pruner_of(model, hook, pruning_ratio=0.25).step()
    result = hook.reports[0].refits
    assert result is not None
    assert any(layer.part is not None for layer in result.layers)
    assert result.after == pytest.approx(result.refit, rel=1e-6)


def test_what_the_plain_cut_would_come_to_is_foretold_too() -> None:
    model = calibrated.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 16))
    plain = copy.deepcopy(model)
    hook = HFConfigSyncHook(refit=calibration)
    calibrated.pruner_of(model, hook).step()
    calibrated.pruner_of(plain).step()
    result = hook.reports[0].refits
    assert result is not None
    divergences = []
    for batch in calibration.held_out:
        before = calibrated.outputs(calibrated.build("llama"), batch).float().log_softmax(-1)
        now = calibrated.outputs(plain, batch).float().log_softmax(-1)
        divergences.append((before.exp() * (before - now)).sum(-1).mean())
    assert result.cut == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-4)


def test_a_refit_that_overfits_is_left_out() -> None:
    """About hundred tokens for 96 channels and a tiny ridge: nonsense on other tokens."""
    model = calibrated.build("llama")
    down = [layer.mlp.down_proj.weight[:, :48].clone() for layer in model.model.layers]
    calibration = calibrate(model, calibrated.batches(model, 10), ridge=1e-12)
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    assert [layer.used for layer in result.layers] == [False, False]
    assert all(layer.refit > layer.cut for layer in result.layers)
    for layer, weight in zip(model.model.layers, down, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, weight)


def test_without_held_out_data_a_refit_needs_eight_tokens_a_channel() -> None:
    """One batch: nothing is held out."""
    used = []
    for length in (40, 60):
        model = calibrated.build("llama")
        ids = torch.randint(3, 80, (16, length), generator=torch.Generator().manual_seed(0))
        calibration = calibrate(model, [{"input_ids": ids}])
        hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
        calibrated.pruner_of(model, hook).step()
        result = hook.reports[0].refits
        assert result is not None
        assert result.cut is None
        used.append(([layer.used for layer in result.layers], result.notes))
    note = (
        "2 weights are not refitted: no data is held out, so their refits cannot be compared, and "
        "they were measured on fewer than 8 tokens a channel. Pass more batches"
    )
    assert used == [([False, False], [note]), ([True, True], [])]


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
@pytest.mark.parametrize(("rows", "enough"), [(16, False), (80, True)])
def test_an_expert_that_no_held_out_token_reaches_needs_eight_tokens_a_channel(
    rows: int, enough: bool
) -> None:
    model = calibrated.build("mixtral")
    ids = torch.randint(3, 80, (rows, 60), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(model, [{"input_ids": row[None]} for row in ids])
    calibration.held_out = [{"input_ids": torch.tensor([[5]])}]
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    unreached = [layer for layer in result.layers if layer.cut == layer.refit == 0]
    assert len(unreached) == 4  # a token goes to two of four experts
    assert all(layer.used == enough for layer in unreached)
    note = (
        "4 weights are not refitted: no held-out token reaches them, so their refits cannot be "
        "compared, and they were measured on fewer than 8 tokens a channel. Pass more batches"
    )
    assert (note in result.notes) == (not enough)


def test_refits_that_make_the_whole_model_worse_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = iter([0.1, 0.2, 0.1])  # cut, refitted, after the cut
    monkeypatch.setattr(held_out.Difference, "mean", lambda self: next(changes))
    model = calibrated.build("llama")
    down = [layer.mlp.down_proj.weight[:, :48].clone() for layer in model.model.layers]
    calibration = calibrate(model, calibrated.batches(model))
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    assert result.notes == [
        "no weight is refitted: on held-out data the whole model changes more with refits (KL 0.2) "
        "than without (0.1). More calibration data may help"
    ]
    assert (result.cut, result.refit, result.after) == (0.1, 0.1, 0.1)
    for layer, weight in zip(model.model.layers, down, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, weight)


def tied_llama() -> Any:
    config = zoo.build("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def test_tied_heads_are_refitted_with_their_embeddings() -> None:
    """The estimate knows of the changed embeddings too."""
    model = tied_llama()
    embeddings = model.get_input_embeddings().weight.detach().clone()
    calibration = calibrate(model, calibrated.batches(model))
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    now = model.get_input_embeddings().weight
    assert now is model.get_output_embeddings().weight
    half = embeddings.shape[1] // 2
    change = now - embeddings[:, :half]
    assert change.abs().max() > 1e-3
    assert torch.linalg.matrix_rank(torch.cat([change, embeddings], dim=1)) == embeddings.shape[1]
    result = hook.reports[0].refits
    assert result is not None
    assert result.notes == []
    assert result.after == pytest.approx(result.refit, rel=1e-6)


def test_a_tied_head_keeps_its_rows_where_other_embeddings_cost_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = iter([1.0, 0.3, 0.2, 0.2])  # cut, refitted, but for the head, after the cut
    monkeypatch.setattr(held_out.Difference, "mean", lambda self: next(changes))
    model = tied_llama()
    embeddings = model.get_input_embeddings().weight.detach().clone()
    calibration = calibrate(model, calibrated.batches(model, 10))
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    assert torch.equal(model.lm_head.weight, embeddings[:, : embeddings.shape[1] // 2])
    result = hook.reports[0].refits
    assert result is not None
    assert result.notes == [
        "not refitted, because it embeds tokens too, and with other embeddings the whole model "
        "changes more (KL 0.3 instead of 0.2): model.embed_tokens.weight"
    ]
    assert [layer.weight for layer in result.layers if not layer.used] == [
        "model.embed_tokens.weight"
    ]
    assert (result.cut, result.refit, result.after) == (1.0, 0.2, 0.2)


def embedded(model: Any, count: int = 10) -> list[dict[str, torch.Tensor]]:
    """Batches of embeddings in the place of token ids."""
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return [{"inputs_embeds": torch.rand(2, 7, width, generator=generator)} for _ in range(count)]


def test_tied_heads_keep_embeddings_that_no_batch_looks_up() -> None:
    model = zoo.build("gemma2")
    embeddings = model.get_input_embeddings().weight.detach().clone()
    calibration = calibrate(model, embedded(model))
    assert calibration.readings.unread == {"model.embed_tokens.weight"}
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    half = embeddings.shape[1] // 2
    assert torch.equal(model.get_output_embeddings().weight, embeddings[:, :half])


def test_held_out_data_that_the_pruned_model_does_not_take_costs_no_report() -> None:
    model = llama()
    hook = HFConfigSyncHook(prune="hidden_size", refit=calibrate(model, embedded(model)))
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    assert model.config.hidden_size == 32
    assert result.refit is not None
    assert result.after is None
    assert result.notes[-1].startswith(
        "not measured after pruning: LlamaForCausalLM does not run on batch 1 of the calibration "
        "data, {'inputs_embeds': [2, 7, 64]}: "
    )


def test_an_interactive_step_refits_the_groups_that_are_pruned() -> None:
    model, other = llama(), llama()
    for each in (model, other):
        calibration = calibrate(each, calibrated.batches(each, 10))
        hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
        pruner = calibrated.pruner_of(each, hook)
        if each is other:
            pruner.step()
            continue
        for group in pruner.step(interactive=True):
            group.prune()
    first, second = model.state_dict(), other.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_group_that_the_user_leaves_keeps_its_weights() -> None:
    """Of two fields, the user cuts one: what reads the other is not refitted."""
    model = llama()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    calibration = calibrate(model, calibrated.batches(model, 10))
    hook = HFConfigSyncHook(prune=("intermediate_size", "hidden_size"), refit=calibration)
    pruner = calibrated.pruner_of(model, hook)
    for group in pruner.step(interactive=True):
        if group.graph_group.fields == (("hidden_size",),):
            group.prune()
    left = model.config.hidden_size
    assert left == len(weight) // 2
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight[:left])
    result = hook.reports[0].refits
    assert result is not None
    readers = {layer.weight.split(".")[-2] for layer in result.layers}
    assert readers == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}


def test_the_next_step_is_measured_anew() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    first = calibration.readings
    hook = HFConfigSyncHook(refit=calibration)
    importance = calibration.importance()
    pruner = calibrated.pruner_of(model, hook, importance=importance, iterative_steps=2)
    pruner.step()
    assert calibration.readings is first
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    pruner.step()
    assert calibration.readings is not first
    assert len(hook.reports) == 2
    assert all(report.refits is not None for report in hook.reports)


def test_a_refused_step_changes_no_weight() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    pruner = calibrated.pruner_of(model, hook)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers = model.model.layers[:1]
    with pytest.raises(UnsupportedModelError, match="lost"):
        pruner.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_weights_that_were_not_measured_are_named() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    name = "model.layers.0.mlp.down_proj.weight"
    del calibration.readings.leaders[Consumer(name, 1)]
    hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
    calibrated.pruner_of(model, hook).step()
    result = hook.reports[0].refits
    assert result is not None
    assert f"not refitted, because it was not measured: {name}" in result.notes
    assert [layer.weight for layer in result.layers] == [name.replace("0", "1")]


def test_a_step_of_somebody_s_own_is_refitted_too() -> None:
    class Own(tp.pruner.MetaPruner):
        """A pruner with a step of its own."""

        def step(self, interactive: bool = False) -> Any:
            return super().step(interactive)

    model, other = llama(), llama()
    for each, kind in ((model, Own), (other, tp.pruner.MetaPruner)):
        calibration = calibrate(each, calibrated.batches(each, 10))
        hook = HFConfigSyncHook(prune="intermediate_size", refit=calibration)
        kind(
            each,
            example_inputs=None,
            importance=calibration.importance(),
            pruning_ratio=0.25,
            hooks=[hook],
        ).step()
        assert hook.reports[0].refits is not None
    first, second = model.state_dict(), other.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_model_s_calibration_is_refused() -> None:
    model, other = llama(), llama()
    calibration = calibrate(other, calibrated.batches(other, 2))
    with pytest.raises(
        CalibrationError, match="was measured on another model than the LlamaForCausalLM that"
    ):
        calibrated.pruner_of(model, HFConfigSyncHook(refit=calibration))


def test_any_importance_of_torch_pruning_can_be_refitted() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    hook = HFConfigSyncHook(refit=calibration)
    importance = tp.importance.GroupMagnitudeImportance()
    calibrated.pruner_of(model, hook, importance=importance, pruning_ratio=0.25).step()
    result = hook.reports[0].refits
    assert result is not None
    assert len(result.layers) == 13
