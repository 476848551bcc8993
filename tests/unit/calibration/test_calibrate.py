"""What is measured, on which data, and that a model is left as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import calibrated
import pytest
import small
import torch
import transformers as hf
import zoo
from accelerate import dispatch_model
from torch import nn

import tp_hf_config
from tp_hf_config import CalibrationError, CalibrationWarning, HFConfigSyncHook, calibrate
from tp_hf_config.calibration import measured
from tp_hf_config.calibration.batches import own_text, shipped_text, split_batches, unpadded
from tp_hf_config.calibration.linear_ops import Consumer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


def llama() -> Any:
    return zoo.build("llama")


def inputs_of(model: nn.Module, layer: str, batches: list[Any]) -> torch.Tensor:
    """All that a layer gets, as ``(tokens, channels)``, by a hook of torch's."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


def test_sums_are_those_of_what_a_layer_gets() -> None:
    model = calibrated.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 10))
    rows = inputs_of(model, "model.layers.1.mlp.down_proj", calibration.train)
    statistics = calibration.readings.of(Consumer("model.layers.1.mlp.down_proj.weight", 1))
    assert statistics is not None
    assert statistics.gram is not None
    assert statistics.tokens == len(rows) == calibration.tokens == 9 * 14
    torch.testing.assert_close(statistics.gram, rows.T @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.norms, rows.square().mean(0).sqrt())


def test_a_head_that_nothing_reads_runs_on_one_token() -> None:
    """From the second batch on; what it reads is measured on all tokens."""
    model = calibrated.build("llama")
    sizes, outputs = list[int](), list[torch.Size]()
    product = nn.functional.linear

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is product and args[1] is model.lm_head.weight:
                sizes.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    handle = model.register_forward_hook(lambda *args: outputs.append(args[2].logits.shape))
    with Watching():
        calibration = calibrate(model, calibrated.batches(model, 4))
    handle.remove()
    assert sizes == [7, 1, 1]
    assert outputs == [(2, 7, model.config.vocab_size)] * 3
    statistics = calibration.readings.of(Consumer("lm_head.weight", 1))
    assert statistics is not None
    rows = inputs_of(model, "lm_head", calibration.train)
    torch.testing.assert_close(statistics.norms, rows.square().mean(0).sqrt())


class SecondHead(nn.Module):
    """Reads the logits of its language model, but only if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.model = calibrated.build("llama")
        self.judge = nn.Linear(self.model.config.vocab_size, 1).double()

    def forward(self, input_ids: torch.Tensor, judged: bool = False) -> Any:
        logits = self.model(input_ids).logits
        return self.judge(logits) if judged else logits


def test_a_head_that_is_read_in_some_batches_runs_on_all_tokens() -> None:
    model = SecondHead().eval()
    data = [
        {**batch, "judged": number > 0}
        for number, batch in enumerate(calibrated.batches(model.model, 4))
    ]
    calibration = calibrate(model, data)
    rows = inputs_of(model, "judge", calibration.train)
    statistics = calibration.readings.of(Consumer("judge.weight", 1))
    assert statistics is not None
    assert statistics.tokens == len(rows) == 2 * 14
    torch.testing.assert_close(statistics.norms, rows.square().mean(0).sqrt())


def test_weights_that_read_the_same_share_one_sum() -> None:
    model = llama()
    readings = calibrate(model, calibrated.batches(model, 2)).readings
    q, k, v = (Consumer(f"model.layers.0.self_attn.{x}_proj.weight", 1) for x in "qkv")
    assert readings.leaders[q] == readings.leaders[k] == readings.leaders[v] == q
    assert readings.chains[q] == ("model.layers.0.input_layernorm",)
    down = Consumer("model.layers.0.mlp.down_proj.weight", 1)
    assert readings.leaders[down] == down
    assert down not in readings.chains


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
def test_experts_have_their_own_tokens() -> None:
    model = zoo.build("mixtral")
    calibration = calibrate(model, calibrated.batches(model, 10))
    name = "model.layers.0.mlp.experts.down_proj"
    experts = [calibration.readings.of(Consumer(name, 2, part)) for part in range(4)]
    assert sum(one.tokens for one in experts if one is not None) == 2 * calibration.tokens
    assert model.get_experts_implementation() != {"": "eager"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails: bool) -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    data = calibrated.batches(model, 3)
    data[1] = {"input_ids": torch.tensor([[10_000]])} if fails else data[1]
    refused = pytest.raises(CalibrationError, match=r"does not run on batch 2 .*\{'input_ids': \[1")
    with refused if fails else contextlib.nullcontext():
        calibrate(model, data)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (7, 1), (8, 1), (17, 2), (90, 6)])
def test_every_eighth_batch_is_held_out(count: int, held_out: int) -> None:
    data = [{"input_ids": torch.tensor([[number]])} for number in range(count)]
    train, other = split_batches(data, nn.Linear(1, 1))
    assert (len(train), len(other)) == (count - held_out, held_out)
    assert not {id(b) for b in train} & {id(b) for b in other}


def test_padding_is_left_out() -> None:
    model = calibrated.build("llama")
    ids = torch.randint(3, 80, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    other = {"input_ids": ids[:1]}  # held out
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}, other])
    alone = calibrate(model, [{"input_ids": ids[:1, :6]}, {"input_ids": ids[1:, 2:]}, other])
    consumer = Consumer("model.layers.1.mlp.down_proj.weight", 1)
    first, second = padded.readings.of(consumer), alone.readings.of(consumer)
    assert first is not None
    assert second is not None
    assert first.tokens == second.tokens == 13
    torch.testing.assert_close(first.gram, second.gram)


def test_each_side_of_an_encoder_decoder_has_its_own_padding() -> None:
    batch = {
        "input_ids": torch.arange(10).view(2, 5),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "decoder_input_ids": torch.arange(10).view(2, 5),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
    }
    first, second = unpadded(batch, decodes=True)
    assert first["input_ids"].tolist() == [[0, 1, 2]]
    assert first["decoder_input_ids"].tolist() == [[0, 1, 2, 3]]
    assert second["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert second["decoder_input_ids"].tolist() == [[6, 7, 8, 9]]


def _measured(model: Any, data: list[Any], weight: str) -> Any:
    statistics = calibrate(model, data).readings.of(Consumer(weight, 1))
    assert statistics is not None
    return statistics


def test_padding_inside_a_row_is_left_out() -> None:
    model = calibrated.build("llama")
    ids = torch.randint(3, 80, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[0, 5] = mask[1, 3:5] = 0
    other = {"input_ids": ids[:1]}  # held out
    rows = [{"input_ids": ids[row : row + 1, mask[row].bool()]} for row in range(2)]
    weight = "model.layers.1.mlp.down_proj.weight"
    first = _measured(model, [{"input_ids": ids, "attention_mask": mask}, other], weight)
    second = _measured(model, [*rows, other], weight)
    assert first.tokens == second.tokens == 13
    torch.testing.assert_close(first.gram, second.gram)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_that_pad_are_no_tokens_of_the_decoder(name: str) -> None:
    model = zoo.build(name)
    ids = torch.randint(3, 80, (2, 6))
    mask, labels = torch.ones_like(ids), torch.randint(3, 80, (2, 7))
    mask[0, 4:], labels[0, 3:], labels[1, 6:] = 0, -100, -100
    other = {"input_ids": ids[:1], "labels": labels[1:, :6]}  # held out
    rows = [
        {"input_ids": ids[:1, :4], "labels": labels[:1, :3]},
        {"input_ids": ids[1:], "labels": labels[1:, :6]},
    ]
    for weight, tokens in {
        "t5": {
            "decoder.block.1.layer.2.DenseReluDense.wo.weight": 9,
            "encoder.block.1.layer.1.DenseReluDense.wo.weight": 10,
        },
        "bart": {"model.decoder.layers.1.fc2.weight": 9, "model.encoder.layers.1.fc2.weight": 10},
    }[name].items():
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        first = _measured(model, [batch, other], weight)
        second = _measured(model, [*rows, other], weight)
        assert first.tokens == second.tokens == tokens
        torch.testing.assert_close(first.gram, second.gram)


def test_masks_that_do_not_say_what_is_padding() -> None:
    """Longformer's names tokens that attend to all; frames behind mel bins are all needed."""
    ids = torch.arange(6).view(2, 3)
    attends_to_all = {"input_ids": ids, "global_attention_mask": torch.tensor([[1, 0, 0]] * 2)}
    assert list(unpadded(attends_to_all, decodes=False)) == [attends_to_all]
    frames = {
        "input_ids": ids,
        "input_features": torch.rand(2, 4, 8),
        "feature_attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    }
    for row, single in enumerate(unpadded(frames, decodes=False)):
        assert {key: len(value) for key, value in single.items()} == dict.fromkeys(frames, 1)
        assert all(torch.equal(single[key][0], value[row]) for key, value in frames.items())
    by_frames = {**frames, "input_features": torch.rand(2, 8, 4)}
    assert [len(one["input_features"][0]) for one in unpadded(by_frames, False)] == [8, 5]


def padded(width: int = 9) -> dict[str, torch.Tensor]:
    """Two rows, the first padded behind, the second in front."""
    ids = torch.randint(3, 80, (2, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_labels_of_a_decoder_only_model_are_cut_as_its_tokens() -> None:
    batch = padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    bert = zoo.build("bert")
    tagger = hf.BertForTokenClassification(bert.config).eval()
    cases = [(llama(), labels), (tagger, labels.clamp(max=4)), (bert, torch.tensor([1, 2]))]
    for model, of_model in cases:
        calibration = calibrate(model, [{**batch, "labels": of_model}] * 2)
        assert calibration.tokens == 6 + 7 + 6  # the last row is held out


def test_labels_of_an_encoder_decoder_are_its_decoder_s() -> None:
    model = zoo.build("t5")
    batch = {**padded(5), "labels": torch.arange(10).view(2, 5)}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    train, held_out = split_batches([batch], model)
    assert train[0]["labels"].tolist() == [[0, 1, 2, 3]]
    assert held_out[0]["labels"].tolist() == [[5, 6, 7, 8, 9]]


def test_images_that_stand_in_one_tensor_for_all_rows_stay_together() -> None:
    model = zoo.build("qwen2_vl")
    batch = zoo.inputs(model)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 8:] = 0
    message = "pixel_values cannot be split into the rows of its batch, so padding is measured"
    with pytest.warns(CalibrationWarning, match=message) as record:
        calibration = calibrate(model, [batch] * 2)
    assert len(calibration.train) == len(calibration.held_out) == 1
    assert calibration.train[0]["pixel_values"].shape == batch["pixel_values"].shape
    assert next(one for one in record if "pixel_values" in str(one.message)).filename == __file__
    alone = {key: value[:1] for key, value in batch.items()} | {
        "pixel_values": batch["pixel_values"][:16]
    }
    train, _ = split_batches([alone], model)
    assert train[0]["input_ids"].shape == (1, 8)


def test_one_batch_may_be_passed_as_it_is() -> None:
    model = llama()
    batch = zoo.inputs(model)
    for data in (batch, hf.BatchEncoding(batch), hf.BatchFeature(batch)):
        calibration = calibrate(model, data)
        assert [one.keys() for one in calibration.train] == [batch.keys()]
        assert calibration.tokens == batch["input_ids"].numel()


def test_weights_on_one_storage_are_told_apart() -> None:
    """As ``from_pretrained`` leaves them, where a checkpoint has them in one tensor."""
    apart, together = llama(), llama()
    for layer in together.model.layers:
        weights = [getattr(layer.self_attn, f"{one}_proj") for one in "qkv"]
        fused = torch.cat([one.weight.detach() for one in weights])
        for one, part in zip(weights, fused.split([64, 32, 32]), strict=True):
            one.weight = nn.Parameter(part)
    states = []
    for model in (apart, together):
        calibration = calibrate(model, calibrated.batches(model, 10))
        hook = HFConfigSyncHook(prune="hidden_size", refit=calibration)
        calibrated.pruner_of(model, hook, importance=calibration.importance()).step()
        refits = hook.reports[0].refits
        assert refits is not None
        states.append((model.state_dict(), [one.weight for one in refits.layers]))
    (first, weights), (second, others) = states
    assert weights == others
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_changes_nothing(made_inside: bool) -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for model, data in (
        (llama(), calibrated.batches(llama(), 4)),
        (plain, [torch.rand(5, 6) for _ in range(4)]),  # aligned as their copies are
    ):
        expected = calibrate(model, data).readings.statistics
        with torch.inference_mode():
            given = copy.deepcopy(data) if made_inside else data
            found = calibrate(model, given).readings.statistics
        assert expected.keys() == found.keys()
        for leader, statistics in expected.items():
            assert torch.equal(statistics.squares, found[leader].squares)


class Wrapped(nn.Module):
    """A plain module around a model, as for a loss of one's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result = self.inner(input_ids)
        self.cached = result.past_key_values is not None
        return result.logits


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
def test_a_model_inside_a_plain_module_is_run_without_caches_and_kernels() -> None:
    model = zoo.build("mixtral")
    wrapped, data = Wrapped(model), calibrated.batches(model, 4)
    how = model.get_experts_implementation()
    alone = calibrate(model, data).readings
    found = calibrate(wrapped, data).readings
    assert {f"inner.{consumer.parameter}" for consumer in alone.leaders} == {
        consumer.parameter for consumer in found.leaders
    }
    assert not wrapped.cached
    assert model.config.use_cache
    assert model.get_experts_implementation() == how != {"": "eager"}


def test_more_passes_give_the_same() -> None:
    """One Gram matrix for each, where memory has no room for more; or none before a refit asks."""
    weights = []
    for grams, options in {4: {}, 1: {"max_memory": 1}, 0: {"refits": False}}.items():
        model = llama()
        calibration = calibrate(model, calibrated.batches(model, 10), **options)
        statistics = calibration.readings.statistics.values()
        assert sum(each.gram is not None for each in statistics) == grams
        ratios = {"intermediate_size": 0.5, "hidden_size": 0.25}
        hook = HFConfigSyncHook(ratios=ratios, refit=calibration)
        calibrated.pruner_of(model, hook).step()
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True))


def test_importances_alone_want_no_warning_of_few_tokens(recwarn: pytest.WarningsRecorder) -> None:
    calibrate(llama(), [torch.arange(14)[None] % 90] * 2, refits=False)
    assert not [each for each in recwarn if each.category is CalibrationWarning]


def test_bfloat16_is_summed_in_float32() -> None:
    model = zoo.build("llama").bfloat16()
    calibration = calibrate(model, calibrated.batches(model, 10))
    statistics = calibration.readings.of(Consumer("model.layers.0.mlp.down_proj.weight", 1))
    assert statistics is not None
    assert statistics.gram is not None
    assert statistics.gram.dtype == torch.float32
    hook = HFConfigSyncHook(refit=calibration)
    calibrated.pruner_of(model, hook).step()
    assert model.dtype == torch.bfloat16


def test_few_tokens_are_warned_of() -> None:
    model = llama()
    with pytest.warns(
        CalibrationWarning,
        match="model.layers.0.mlp.down_proj.weight reads 96 channels but was measured on 14 "
        r"tokens: refits need at least 8 tokens a channel \(4 inputs have fewer\). Pass "
        "more data, or a larger tokens=",
    ):
        calibrate(model, calibrated.batches(model, 1))


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
def test_experts_that_no_token_reaches_are_warned_of() -> None:
    model = zoo.build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2] - 0.5
            layer.mlp.gate.weight[:2] = layer.mlp.gate.weight[2:] + 1.0
    ids = torch.full((1, 7), 5)
    match = (
        r"mlp.experts.\w+: no token reached .* of 4 experts .*, so they are pruned without a refit"
    )
    with pytest.warns(CalibrationWarning, match=match):
        calibrate(model, [{"input_ids": ids}])


def test_a_model_that_accelerate_dispatched_is_measured_and_refitted_alike() -> None:
    states = []
    for dispatched in (False, True):
        model = llama()
        if dispatched:
            model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
        hook = HFConfigSyncHook(refit=calibrate(model, calibrated.batches(model, 10)))
        calibrated.pruner_of(model, hook).step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_values_that_are_not_finite_are_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(
        CalibrationError,
        match=r"layers\.1\.mlp\.down_proj\.weight reads values that are not finite",
    ):
        calibrate(model, calibrated.batches(model, 1))


def test_what_needs_data_says_so() -> None:
    for name in ("bert", "t5", "vit"):
        model = zoo.build(name)
        with pytest.raises(
            CalibrationError, match=r"is not a causal language model, so calibrate\(\) needs data"
        ):
            calibrate(model)
    with pytest.raises(
        CalibrationError, match=r"cannot generate its own text, so calibrate\(\) needs data"
    ):
        calibrate(model, "own")


@pytest.mark.parametrize(
    ("name", "offered"), [("bert", True), ("t5", False), ("vit", False), ("clip", False)]
)
def test_texts_are_offered_where_they_are_enough(name: str, offered: bool) -> None:
    if name == "clip" and small.TRANSFORMERS < (5,):
        pytest.skip("Transformers 4 does not say that it takes images too")
    with pytest.raises(CalibrationError, match=r"calibrate\(model, batches\)") as refused:
        calibrate(zoo.build(name))
    assert str(refused.value).endswith("or pass texts and a tokenizer") == offered


def test_what_takes_no_text_refuses_it() -> None:
    for model in (zoo.build("vit"), Wrapped(llama()), nn.Linear(2, 2)):
        with pytest.raises(CalibrationError, match=r"takes no text\. Pass batches of its inputs"):
            calibrate(model, ["a text"])


def test_data_of_a_wrong_kind_is_refused() -> None:
    model = llama()
    with pytest.raises(CalibrationError, match="the calibration data is empty"):
        calibrate(model, [])
    with pytest.raises(CalibrationError, match="batch 1 of the calibration data is a int"):
        calibrate(model, [3])
    ids = torch.arange(8).view(2, 4)
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(CalibrationError, match=r"^all rows of the 3 batches are padding"):
        calibrate(model, [padding] * 3)
    with pytest.raises(
        CalibrationError, match=(r"where there is no tokenizer\. Pass one: calibrate")
    ):
        calibrate(model)


def test_a_causal_language_model_needs_no_data() -> None:
    class Letters:
        """A tokenizer whose tokens are letters."""

        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    model = llama()
    tokenizer: Any = Letters()
    calibration = calibrate(model, tokenizer=tokenizer, tokens=620)
    assert calibration.tokens == 620 // 62 * 62
    assert len(calibration.held_out) == 6
    texts = calibrate(model, ["abc" * 100, "def" * 100], tokenizer=tokenizer)
    assert len(texts.train) + len(texts.held_out) == 602 // 62
    own = calibrate(model, "own", tokens=620)
    assert own.train[0]["input_ids"].shape == (1, 62)
    again = calibrate(model, "own", tokens=620)
    assert torch.equal(own.train[3]["input_ids"], again.train[3]["input_ids"])


@pytest.mark.parametrize(("before", "after"), [([2], []), ([1], [0]), ([], [1, 1])])
def test_windows_have_the_special_tokens_that_the_tokenizer_puts_around_a_text(
    before: list[int], after: list[int]
) -> None:
    def tokenizer(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [3 + ord(letter) % 90 for letter in text]
        return {"input_ids": [*before, *ids, *after] if add_special_tokens else ids}

    model = llama()
    given: Any = tokenizer
    texts = calibrate(model, ["abc" * 100], tokenizer=given)
    for batch in (*texts.train, *texts.held_out):
        (row,) = batch["input_ids"].tolist()
        assert len(row) == 62
        inside = row[len(before) : 62 - len(after)]
        assert row == before + inside + after
        assert min(inside) > 2
    own = calibrate(model, "own", tokenizer=given, tokens=620)
    assert all(b["input_ids"][0, : len(before)].tolist() == before for b in own.train)
    assert own.train[0]["input_ids"].shape == (1, 62)


def test_own_text_is_written_without_dropout() -> None:
    """The same text in both modes; each module keeps the mode that it has."""
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=99, n_positions=64)
    model = hf.GPT2LMHeadModel(config)  # its dropout is 0.1
    written = []
    for mode in (False, True):
        model.train(mode).transformer.h[0].eval()
        modes = [module.training for module in model.modules()]
        text = own_text(model, 200, seed=0)
        assert [module.training for module in model.modules()] == modes
        written.append(torch.cat([text.train, text.held_out]))
    assert torch.equal(*written)


def test_the_shipped_text_is_broad_and_long_enough() -> None:
    text = shipped_text()
    assert len(text) > 50_000
    assert "\n----\n" not in text


def test_plain_modules_take_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    calibration = calibrate(model, [torch.rand(5, 6) for _ in range(4)])
    assert {c.parameter for c in calibration.readings.leaders} == {"0.weight", "2.weight"}
    assert str(calibration).startswith("Sequential on 15 tokens: 2 inputs of 2 weights measured")


def test_a_copy_needs_no_other_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    twin = copy.deepcopy(model)
    monkeypatch.setattr(measured, "measure", None)  # it would be called
    again = calibration.on_copy(twin)
    assert again.model is twin
    assert calibration.model is model
    assert again.current() is not calibration.current()
    assert again.readings.leaders == calibration.readings.leaders
    with torch.no_grad():
        twin.lm_head.weight[0, 0] += 1
    with pytest.raises(CalibrationError, match="is not a copy of the LlamaForCausalLM that was"):
        calibration.on_copy(twin)


def _merge_adapter(weight: torch.Tensor) -> None:
    """As PEFT's ``merge_and_unload`` adds an adapter's product."""
    weight.data += 0.01 * torch.ones_like(weight)


def _copy_average(weight: torch.Tensor) -> None:
    """As an exponential moving average is put in the place of the weights."""
    weight.data.copy_(0.9 * weight.detach())


def _replace_data(weight: torch.Tensor) -> None:
    weight.data = 0.9 * weight.detach()


def _change_last(weight: torch.Tensor) -> None:
    weight.data[-1, -1] += 1e-3


def _swap_rows(weight: torch.Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]]


def _swap_columns(weight: torch.Tensor) -> None:
    weight.data[:, [3, 5]] = weight.data[:, [5, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [_merge_adapter, _copy_average, _replace_data, _change_last, _swap_rows, _swap_columns],
)
def test_weights_changed_without_a_trace_are_measured_again(
    change: Callable[[torch.Tensor], None], dtype: torch.dtype
) -> None:
    """What is written through ``.data`` leaves a parameter's version counter as it was."""
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)
    calibration = calibrate(model, list(torch.rand(4, 5, 7)))
    before, version = calibration.readings, model[2].weight._version
    assert calibration.current() is before
    change(model[2].weight)
    assert model[2].weight._version == version
    again = calibration.current()
    assert again is not before
    assert calibration.current() is again


def test_the_same_values_are_not_measured_again() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 2))
    before = calibration.readings
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.lm_head.weight.data = model.lm_head.weight.detach().clone()
    assert calibration.current() is before


def test_what_is_only_held_is_measured_once_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Influences of layers are no reason to."""
    model = zoo.build("llama")
    passes: list[int] = []
    measure = measured.measure

    def noted(model: Any, *given: Any) -> Any:
        passes.append(model.config.num_hidden_layers)
        return measure(model, *given)

    monkeypatch.setattr(measured, "measure", noted)
    calibration = calibrate(model, calibrated.batches(model, 8), measure=False)
    tokens = calibration.tokens
    assert str(calibration) == f"LlamaForCausalLM on {tokens} tokens: not measured yet"
    tp_hf_config.drop_layers(model, count=1, calibration=calibration)
    assert passes == []
    with pytest.warns(CalibrationWarning, match="refits need at least"):
        calibration.measure()
    assert passes == [1]
    assert str(calibration).startswith(
        f"LlamaForCausalLM on {tokens} tokens: 5 inputs of 8 weights measured"
    )


def test_public_names() -> None:
    assert tp_hf_config.calibrate is calibrate
    assert tp_hf_config.Calibration.__name__ == "Calibration"
