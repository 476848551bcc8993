"""The weight in front of dropped layers: which one it is, its refit, and what a failure leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from tp_hf_config import ConfigSyncError, calibrate, drop_layers
from tp_hf_config.calibration.depth_refit import depth_refits
from tp_hf_config.forward.observed_pass import hidden_in, hidden_out
from tp_hf_config.hook import drop_layers as dropping
from tp_hf_config.model.config_json import runs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 90,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **settings)).eval()


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)).eval()


def granite() -> Any:
    return hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, residual_multiplier=0.3)).eval()


def neox() -> Any:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)).eval()


def bert() -> Any:
    return hf.BertModel(hf.BertConfig(**SIZES)).eval()


def gemma3() -> Any:
    layers = ["full_attention"] * 4
    heads: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2, "layer_types": layers}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, **heads)).eval()


def batches(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 90, (2, 16), generator=generator)} for _ in range(count)]


def in_and_out(
    model: Any, layers: Any, weight: str, numbers: list[int], data: Any
) -> tuple[torch.Tensor, ...]:
    """What a weight reads, and the states in front of layers and behind them, in float64."""
    caught: dict[str, list[torch.Tensor]] = {"read": [], "before": [], "after": []}

    def note(name: str, values: Any) -> None:
        caught[name].append(values.detach().double().flatten(0, -2))

    handles = [
        model.get_submodule(weight.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, args: note("read", args[0])
        ),
        layers[numbers[0]].register_forward_pre_hook(
            lambda module, args, kwargs: note("before", hidden_in(args, kwargs)), with_kwargs=True
        ),
        layers[numbers[-1]].register_forward_hook(
            lambda module, args, output: note("after", hidden_out(output))
        ),
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return tuple(torch.cat(caught[name]) for name in ("read", "before", "after"))


@pytest.mark.parametrize(
    ("make", "layers", "weight", "scale"),
    [
        (llama, "model.layers", "model.layers.1.mlp.down_proj.weight", 1.0),
        (gpt2, "transformer.h", "transformer.h.1.mlp.c_proj.weight", 1.0),  # a transposed weight
        (granite, "model.layers", "model.layers.1.mlp.down_proj.weight", 0.3),
        (neox, "gpt_neox.layers", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight", 1.0),
    ],
)
def test_the_refit_is_the_least_squares_solution(
    make: Any, layers: str, weight: str, scale: float
) -> None:
    model = make().double()
    calibration = calibrate(model, batches(), measure=False)
    modules = list(model.get_submodule(layers))
    (refit,), notes = depth_refits(calibration, modules, [2, 3])
    assert refit.parameter == weight
    assert notes == []
    read, before, after = in_and_out(model, modules, weight, [2, 3], calibration.train)
    norms = after.norm(dim=1, keepdim=True)
    read, added = read / norms, (after - before) / norms
    ridge = 0.1 * read.square().sum(0).mean()
    # the ridge as rows that ask for a change of zero
    rows = torch.cat([read, ridge.sqrt() * torch.eye(read.shape[1], dtype=read.dtype)])
    wanted = torch.cat([added, torch.zeros(read.shape[1], added.shape[1], dtype=added.dtype)])
    expected = torch.linalg.lstsq(rows, wanted).solution / scale
    change = refit.change if make is gpt2 else refit.change.T
    assert torch.allclose(change.double(), expected, rtol=1e-4, atol=1e-6)
    read, before, after = in_and_out(model, modules, weight, [2, 3], calibration.held_out)
    norms = after.norm(dim=1, keepdim=True)
    missing = (after - before) / norms - scale * (read / norms) @ expected
    explained = 1 - float(missing.square().sum() / ((after - before) / norms).square().sum())
    assert refit.explained == pytest.approx(explained, rel=1e-4)
    assert 0 < explained < 1


@pytest.mark.parametrize("make", [bert, gemma3])
def test_a_norm_behind_the_last_weight_leaves_none_to_refit(make: Any) -> None:
    model = make()
    name = "encoder.layer" if make is bert else "model.layers"
    calibration = calibrate(model, batches(), measure=False)
    refits, notes = depth_refits(calibration, list(model.get_submodule(name)), [2])
    assert refits == []
    assert notes == [
        "layer 2 has no refit: no weight in front of it writes to the hidden states last"
    ]


def test_nothing_is_in_front_of_the_first_layers() -> None:
    model = llama()
    calibration = calibrate(model, batches(), measure=False)
    refits, notes = depth_refits(calibration, list(model.model.layers), [0, 1, 3])
    assert [refit.parameter for refit in refits] == ["model.layers.2.mlp.down_proj.weight"]
    assert notes == [
        "layers 0, 1 have no refit: no weight in front of them writes to the hidden states last"
    ]


def test_a_weight_of_two_layers_stays() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    calibration = calibrate(model, batches(), measure=False)
    refits, notes = depth_refits(calibration, list(model.model.layers), [2])
    assert refits == []
    assert len(notes) == 1


def test_runs_of_numbers() -> None:
    assert runs([1, 2, 5, 7, 8, 9]) == [[1, 2], [5], [7, 8, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_dropped_layers_is_nearer_with_refits(dtype: torch.dtype) -> None:
    original = gpt2().to(dtype)
    data = batches()
    inputs = data[0]
    errors = []
    for refits in (False, True):
        model = copy.deepcopy(original)
        calibration = calibrate(model, data, measure=False)
        report = drop_layers(model, [2], refit=calibration if refits else None)
        assert model.config.n_layer == 3
        apart = model(**inputs).logits.double() - original(**inputs).logits.double()
        errors.append(float(apart.detach().norm()))
        assert list(report.refits) == ["transformer.h.1.mlp.c_proj.weight"] * refits
        assert ("refitted" in str(report)) is refits
    plain, refitted = errors
    assert refitted < 0.7 * plain


def test_refits_are_those_of_the_chosen_layers() -> None:
    model = llama()
    calibration = calibrate(model, batches(), measure=False)
    report = drop_layers(model, count=1, calibration=calibration, refit=calibration)
    (number,) = report.dropped
    expected = [f"model.layers.{number - 1}.mlp.down_proj.weight"] if number else []
    assert list(report.refits) == expected
    assert all(0 < explained < 1 for explained in report.refits.values())


def test_a_failure_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    calibration = calibrate(model, batches(), measure=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    def fails(*_: Any) -> None:
        raise ConfigSyncError("as if the class built something else")

    monkeypatch.setattr(dropping._Dropping, "_check_written", fails)
    with pytest.raises(ConfigSyncError, match="as if"):
        drop_layers(model, [2], refit=calibration)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert dict(model.named_parameters()) == parameters
