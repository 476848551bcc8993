"""Attention heads by ``head_pruning_ratio`` on the graph made from the config: every way it has.

Each model of each head shape is built once, and copies of it lose half of their heads: query heads
out of every key/value group, whole key/value groups, or whole heads with the hidden size, in one
step and in three.  Asked of each: the config says the expected numbers after every step, the pruned
model computes what the original does with the removed units at zero, and a fresh process loads it
with the same outputs.  What is refused is refused before anything is touched, in the words written
in the table.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import head_zoo
import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from cases import some_in_make_test
from head_zoo import HEAD_DIM, Shape
from masked_original import WITHOUT_HEAD, assert_same_as_masked, kept_channels
from reloading import assert_reloaded
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
    UnsupportedModelError,
    plan,
)
from tp_hf_config.fieldmap.model_view import view_of

# Model -> shape -> mode -> the fields that changed after each step when half of the heads go in one
# step ("1") and in three ("3"), or the words in which it is refused.
TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("head_modes.json").read_text()
)
MODES = ("query", "group")


class Case(NamedTuple):
    """Half of the heads of a model, one way, in so many steps."""

    model: str
    shape: Shape
    mode: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}-{self.shape}-{self.mode}-{self.steps}"

    @property
    def expected(self) -> Any:
        return TABLE[self.model][str(self.shape)][self.mode]


def shapes_of(name: str) -> tuple[Shape, ...]:
    return head_zoo.SHAPES if name in head_zoo.GROUPED else head_zoo.PLAIN


def modes_of(name: str) -> tuple[str, ...]:
    return MODES if name in head_zoo.GROUPED else ("heads",)


EVERY = [
    Case(name, shape, mode, steps)
    for name in (*head_zoo.GROUPED, *head_zoo.ALONE)
    for shape in shapes_of(name)
    for mode in modes_of(name)
    for steps in (1, 3)
]


OF_EVERY_KIND = ("qwen3", "phi3", "falcon_new", "gpt2", "gpt_neox", "bert", "t5")
"""Norms over heads, fused projections, groups, and what goes with the hidden size or alone."""


def _in_make_test(case: Case) -> bool:
    """Every shape of one model, and models of every kind in one shape."""
    if case.model == "llama" and case.steps == 1:
        return True
    in_shape = case.shape.queries == 8 and case.shape.groups in (None, 2)
    return in_shape and case.steps == 3 and case.model in OF_EVERY_KIND


CASES = some_in_make_test(
    (case for case in EVERY if isinstance(case.expected, dict)), _in_make_test
)
REFUSED = some_in_make_test(
    (case for case in EVERY if isinstance(case.expected, str) and case.steps == 1),
    lambda case: case.shape.queries == 8,
)


@functools.lru_cache(maxsize=4)
def original_of(name: str, shape: Shape) -> Any:
    return head_zoo.build(name, shape)


class Run(NamedTuple):
    """A model whose heads were pruned, and what it was before."""

    original: Any
    model: Any
    pruner: Any
    hook: HFConfigSyncHook

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The fields that changed, after each step."""
        return [{k: new for k, (_, new) in report.fields.items()} for report in self.hook.reports]

    @property
    def notes(self) -> list[str]:
        return [note for report in self.hook.reports for note in report.notes]


def heads_pruner(
    model: nn.Module,
    gqa: Any = None,
    steps: int = 1,
    ratio: float = 0.5,
    **changes: Any,
) -> tuple[Any, HFConfigSyncHook]:
    """A pruner of heads and nothing else, unless ``changes``, the hook's too, say otherwise."""
    hook, changes = small.split(**{"prune": "inner", "gqa": gqa, **changes})
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.GroupMagnitudeImportance(),
        "pruning_ratio": 0.0,
        "prune_num_heads": True,
        "head_pruning_ratio": ratio,
        "iterative_steps": steps,
        **changes,
    }
    return tp.pruner.MetaPruner(model, **arguments, hooks=[hook]), hook


def pruned(original: Any, gqa: Any = None, steps: int = 1, **changes: Any) -> Run:
    """A copy that lost its heads in so many steps; ``pruner.num_heads`` was right after each."""
    model = copy.deepcopy(original)
    run = Run(original, model, *heads_pruner(model, gqa, steps, **changes))
    for _ in range(steps):
        run.pruner.step()
        assert_head_numbers(run)
    assert all(report.proof and report.error is None for report in run.hook.reports)
    return run


def assert_head_numbers(run: Run, head_dim: int = HEAD_DIM) -> None:
    """What the pruner keeps of every projection's heads is what the projection has."""
    names = {module: name for name, module in run.model.named_modules()}
    for module, count in run.pruner.num_heads.items():
        name = names[module]
        expected = len(module.weight) // head_dim
        if name.endswith(("qkv_proj", "query_key_value")):  # query heads, or groups with theirs
            before = run.original.config
            grouped = getattr(before, "new_decoder_architecture", False) and before.num_kv_heads > 1
            field = "num_kv_heads" if grouped else "num_attention_heads"
            expected = getattr(run.model.config, field)
        assert count == expected, name
        assert run.pruner.out_channel_groups[module] == expected, name


@functools.lru_cache(maxsize=4)
def run_of(case: Case) -> Run:
    """Prune a copy of a case's model; once, for all tests that ask about it."""
    gqa = case.mode if case.mode in MODES else None
    return pruned(original_of(case.model, case.shape), gqa, case.steps)


def same_state(one: Any, other: Any) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return one.config.to_dict() == other.config.to_dict() and all(
        torch.equal(value, others[key]) for key, value in mine.items()
    )


@pytest.mark.parametrize("case", CASES)
def test_half_of_the_heads(case: Case, collector: Any) -> None:
    """The config says so, the model is the masked original, and a fresh process loads the same."""
    run = run_of(case)
    assert run.steps == case.expected[str(case.steps)]
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))
    saved = run.model.model if case.model in WITHOUT_HEAD else run.model
    assert_reloaded(collector.reloaded(saved, zoo.inputs(saved)))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_these_words_and_nothing_is_touched(case: Case) -> None:
    model = copy.deepcopy(original_of(case.model, case.shape))
    before = small.state_of(model)
    with pytest.raises(UnsupportedModelError) as raised:
        heads_pruner(model)
    assert str(raised.value) == case.expected
    small.assert_same(before, small.state_of(model))


# --- which heads go -----------------------------------------------------------------------------


def kept_heads(run: Run, name: str, dim: int = 0, width: int = HEAD_DIM) -> list[int]:
    """The original heads that are left along one dimension of a parameter; whole ones."""
    before, after = (model.get_parameter(name).detach() for model in (run.original, run.model))
    channels = kept_channels(before, after)[dim].view(-1, width)
    assert torch.equal(channels % width, torch.arange(width).expand_as(channels))
    return [int(head) for head in channels[:, 0] // width]


def squares(weight: torch.Tensor, dim: int, heads: int) -> torch.Tensor:
    """What each head's part of a weight adds to its magnitude."""
    return weight.detach().movedim(dim, 0).reshape(heads, -1).double().pow(2).sum(1)


def largest(values: torch.Tensor, number: int) -> list[int]:
    return sorted(values.topk(number).indices.tolist())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_least_query_heads_of_every_group_go(name: str, steps: int) -> None:
    run = pruned(head_zoo.build(name, Shape(8, 2)), "query", steps)
    picked = []
    for number, layer in enumerate(run.original.model.layers):
        attention = layer.self_attn
        magnitude = squares(attention.q_proj.weight, 0, 8) + squares(attention.o_proj.weight, 1, 8)
        expected = [
            4 * group + head
            for group, values in enumerate(magnitude.view(2, 4))
            for head in largest(values, 2)
        ]
        prefix = f"model.layers.{number}.self_attn"
        assert kept_heads(run, f"{prefix}.q_proj.weight") == expected
        assert kept_heads(run, f"{prefix}.o_proj.weight", dim=1) == expected
        assert kept_heads(run, f"{prefix}.k_proj.weight") == [0, 1]
        picked.append(expected)
    assert picked[0] != picked[1]  # each layer chooses for itself


@pytest.mark.parametrize("steps", [1, 3])
def test_the_least_key_value_groups_go(steps: int) -> None:
    run = pruned(head_zoo.build("llama", Shape(24, 8)), "group", steps)
    picked = []
    for number, layer in enumerate(run.original.model.layers):
        attention = layer.self_attn
        queries = squares(attention.q_proj.weight, 0, 8) + squares(attention.o_proj.weight, 1, 8)
        keys = squares(attention.k_proj.weight, 0, 8) + squares(attention.v_proj.weight, 0, 8)
        expected = largest(queries + keys, 4)
        prefix = f"model.layers.{number}.self_attn"
        for projection, dim, width in (("q", 0, 24), ("k", 0, 8), ("v", 0, 8), ("o", 1, 24)):
            assert kept_heads(run, f"{prefix}.{projection}_proj.weight", dim, width) == expected
        picked.append(expected)
    assert picked[0] != picked[1]


def test_the_least_key_value_groups_of_a_fused_projection_go() -> None:
    """Phi-3: rows of all query heads, of all key heads, of all value heads."""
    run = pruned(head_zoo.build("phi3", Shape(8, 4)), "group")
    for number, layer in enumerate(run.original.model.layers):
        attention = layer.self_attn
        queries, keys, values = attention.qkv_proj.weight.split((64, 32, 32))
        magnitude = squares(queries, 0, 4) + squares(attention.o_proj.weight, 1, 4)
        expected = largest(magnitude + squares(keys, 0, 4) + squares(values, 0, 4), 2)
        prefix = f"model.layers.{number}.self_attn"
        assert kept_heads(run, f"{prefix}.o_proj.weight", 1, 16) == expected
        assert kept_heads(run, f"{prefix}.qkv_proj.weight") == [
            *(2 * group + head for group in expected for head in (0, 1)),
            *(8 + group for group in expected),
            *(12 + group for group in expected),
        ]


@pytest.mark.parametrize(
    ("name", "attention", "layers"),
    [
        ("vit", "vit.layers.{}.attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (
            "bert",
            "bert.encoder.layer.{}.attention",
            ("self.query", "self.key", "self.value", "output.dense"),
        ),
    ],
)
def test_the_least_whole_heads_go(name: str, attention: str, layers: tuple[str, ...]) -> None:
    """Alone (ViT), and together with the hidden size (BERT)."""
    run = pruned(head_zoo.build(name, Shape(8)))
    picked = []
    for number in range(2):
        weights = [f"{attention.format(number)}.{layer}.weight" for layer in layers]
        found = [
            squares(run.original.get_parameter(weight), int(weight == weights[-1]), 8)
            for weight in weights
        ]
        expected = largest(torch.stack(found).sum(0), 4)
        for weight in weights:
            assert kept_heads(run, weight, int(weight == weights[-1])) == expected
        picked.append(expected)
    assert picked[0] != picked[1]


# --- what belongs to a head goes with it --------------------------------------------------------


@pytest.mark.parametrize("gqa", MODES)
def test_biases_go_with_their_heads(gqa: str) -> None:
    run = pruned(head_zoo.build("qwen2", Shape(8, 2)), gqa)
    for number in range(2):
        for projection in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{number}.self_attn.{projection}"
            assert kept_heads(run, f"{name}.bias") == kept_heads(run, f"{name}.weight")


@pytest.mark.parametrize("gqa", MODES)
def test_norms_over_all_heads_go_with_them(gqa: str) -> None:
    """OLMo 2 normalises the queries of all heads at once, and the keys."""
    run = pruned(head_zoo.build("olmo2", Shape(8, 2)), gqa, 3)
    assert run.model.config.num_attention_heads == 4
    assert run.model.config.num_key_value_heads == {"query": 2, "group": 1}[gqa]
    for number in range(2):
        for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
            name = f"model.layers.{number}.self_attn"
            heads = kept_heads(run, f"{name}.{projection}.weight")
            assert kept_heads(run, f"{name}.{norm}.weight") == heads
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


@pytest.mark.parametrize("gqa", MODES)
def test_attention_sinks_go_with_their_heads(gqa: str) -> None:
    run = pruned_of_zoo("gpt_oss", 12, gqa)
    for number in range(2):
        name = f"model.layers.{number}.self_attn"
        heads = kept_heads(run, f"{name}.q_proj.weight", width=12)
        assert len(heads) == 2
        assert kept_heads(run, f"{name}.sinks", width=1) == heads
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


def pruned_of_zoo(name: str, head_dim: int | None, gqa: Any = None, **changes: Any) -> Run:
    """A model of ``zoo`` without half of its heads, in one step."""
    original = zoo.build(name)
    model = copy.deepcopy(original)
    run = Run(original, model, *heads_pruner(model, gqa, **changes))
    run.pruner.step()
    if head_dim is not None:
        assert_head_numbers(run, head_dim)
    return run


def test_latent_attention_has_one_number_of_heads() -> None:
    """DeepSeek-V3 asks for as many key/value heads as heads, which set no shape."""
    run = pruned_of_zoo("deepseek_v3", None)
    assert run.steps == [{"num_attention_heads": 2, "num_key_value_heads": 2}]
    names = {module: name for name, module in run.model.named_modules()}
    assert {names[module]: count for module, count in run.pruner.num_heads.items()} == {
        f"model.layers.{number}.self_attn.{projection}": 2
        for number in range(2)
        for projection in ("q_b_proj", "kv_b_proj")
    }
    for number in range(2):
        name = f"model.layers.{number}.self_attn"
        heads = kept_heads(run, f"{name}.q_b_proj.weight", width=12 + 8)
        assert kept_heads(run, f"{name}.kv_b_proj.weight", width=12 + 10) == heads
        assert kept_heads(run, f"{name}.o_proj.weight", 1, 10) == heads
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


def test_relative_position_biases_go_with_their_heads() -> None:
    """T5's first blocks hold one bias a head for all blocks: they lose the same heads."""
    run = pruned(head_zoo.build("t5", Shape(8)))
    for stack in ("encoder", "decoder"):
        first = f"{stack}.block.0.layer.0.SelfAttention"
        heads = kept_heads(run, f"{first}.relative_attention_bias.weight", 1, 1)
        assert len(heads) == 4
        for block in range(2):
            name = f"{stack}.block.{block}.layer.0.SelfAttention"
            assert kept_heads(run, f"{name}.q.weight") == heads
            assert kept_heads(run, f"{name}.o.weight", 1) == heads


def test_heads_of_torchs_own_attention() -> None:
    """SigLIP's pooling head: queries, keys and values are thirds of one bare parameter."""
    run = pruned(head_zoo.build("siglip_vision", Shape(8)), steps=3)
    assert run.steps[-1] == {"hidden_size": 32, "num_attention_heads": 4}
    before, after = (
        model.head.attention.in_proj_weight.detach() for model in (run.original, run.model)
    )
    heads = (kept_channels(before, after)[0].view(3, 4, HEAD_DIM) // HEAD_DIM)[..., 0]
    assert after.shape == (96, 32)
    assert torch.equal(heads - torch.tensor([[0], [8], [16]]), heads[:1].expand(3, -1))
    assert run.model.head.attention.num_heads == 4
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


# --- what pruner's arguments mean with heads ----------------------------------------------------


def projections(model: Any, leaf: str = "q_proj") -> list[nn.Module]:
    return [getattr(layer.self_attn, leaf) for layer in model.model.layers]


def test_one_head_ratio_for_all_layers_by_layer() -> None:
    model = head_zoo.build("mistral", Shape(8, 2))
    ratios = dict.fromkeys(projections(model), 0.25)
    pruner, hook = heads_pruner(model, head_pruning_ratio_dict=ratios)
    pruner.step()
    assert hook.reports[0].fields == {"num_attention_heads": (8, 6)}


def deberta() -> Any:
    """Its queries, keys and values are one layer, three positions of it for each channel."""
    small_sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = hf.DebertaConfig(vocab_size=40, num_attention_heads=4, **small_sizes)
    return hf.DebertaForMaskedLM(config).eval()


def wav2vec2_bert_with_adapter() -> Any:
    """The states that the adapter's attention reads are those of a convolution with a gate."""
    config = hf.Wav2Vec2BertConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        add_adapter=True,
        num_adapter_layers=1,
        output_hidden_size=32,
        feature_projection_input_dim=16,
    )
    return hf.Wav2Vec2BertModel(config).eval()


@pytest.mark.parametrize("build", [deberta, wav2vec2_bert_with_adapter])
def test_heads_at_another_ratio_than_all_else(build: Callable[[], Any]) -> None:
    """Groups in which no layer has one output for each channel follow the head ratios too."""
    model = build()
    settings: dict[str, Any] = {"pruning_ratio": 0.5, "head_pruning_ratio": 0.25}
    planned = plan(model, **settings)
    hook = HFConfigSyncHook(strict=True, prune="inner")
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=None,
        prune_num_heads=True,
        importance=tp.importance.MagnitudeImportance(),
        hooks=[hook],
        **settings,
    )
    pruner.step()
    config = model.config
    left = (config.num_attention_heads, config.hidden_size, config.intermediate_size)
    assert left == (3, 24, 20)
    assert planned.values == {
        "num_attention_heads": 3,
        "hidden_size": 24,
        "intermediate_size": 20,
    }


def test_other_head_ratios_in_other_layers_are_told_before_pruning() -> None:
    model = head_zoo.build("mistral", Shape(8, 2))
    before = small.state_of(model)
    ratios = dict(zip(projections(model), (0.25, 0.5), strict=True))
    words = "groups of num_attention_heads will have different numbers of units: 4 in .*; 6 in "
    with pytest.raises(ConfigSyncError, match=words):
        heads_pruner(model, head_pruning_ratio_dict=ratios)
    small.assert_same(before, small.state_of(model))


@pytest.mark.parametrize("gqa", MODES)
@pytest.mark.parametrize("leaf", ["q_proj", "k_proj"])
def test_ignored_projections_keep_their_heads(gqa: str, leaf: str) -> None:
    """Query heads do not go with keys; groups do."""
    model = head_zoo.build("llama", Shape(8, 2))
    pruner, hook = heads_pruner(model, gqa, ignored_layers=projections(model, leaf))
    pruner.step()
    stay = leaf == "q_proj" or gqa == "group"
    assert hook.reports[0].fields == ({} if stay else {"num_attention_heads": (8, 4)})


def test_one_ignored_projection_is_told_before_pruning() -> None:
    model = head_zoo.build("llama", Shape(8, 2))
    words = (
        "^num_attention_heads is kept at 8: ignored_layers= keeps the outputs of "
        r"model\.layers\.0\.self_attn\.q_proj, and one config field sets this width everywhere"
    )
    with pytest.warns(PrunerSettingsWarning, match=words):
        heads_pruner(model, ignored_layers=projections(model)[:1])


@pytest.mark.parametrize(
    ("ratio", "round_to", "left"),
    [(0.5, 1, 4), (0.35, 1, 5), (0.35, 16, 6), (0.35, 32, 4), (0.35, 6, 6)],
)
def test_channels_of_heads_are_rounded(ratio: float, round_to: int, left: int) -> None:
    """Eight channels a head: two heads are a multiple of 16, three of 24 (and so of 6)."""
    model = head_zoo.build("vit", Shape(8))
    pruner, hook = heads_pruner(model, ratio=ratio, round_to=round_to)
    pruner.step()
    assert hook.reports[0].fields["num_attention_heads"] == (8, left)
    assert HEAD_DIM * left % round_to == 0


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("gqa", MODES)
def test_every_number_of_steps_ends_alike(gqa: str, steps: int) -> None:
    run = pruned(original_of("llama", Shape(24, 8)), gqa, steps)
    once = pruned(original_of("llama", Shape(24, 8)), gqa)
    assert same_state(run.model, once.model)
    left = {"query": (16, 8), "group": (12, 4)}[gqa]
    assert (run.model.config.num_attention_heads, run.model.config.num_key_value_heads) == left


def test_heads_and_other_widths_in_the_same_steps() -> None:
    original = head_zoo.build("llama", Shape(8, 2))
    run = pruned(original, "group", 3, pruning_ratio=0.25, prune=("intermediate_size",))
    assert run.model.config.num_key_value_heads == 1
    assert run.model.config.intermediate_size == 36
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


@pytest.mark.parametrize("gqa", MODES)
def test_interactive_steps(gqa: str) -> None:
    original = head_zoo.build("llama", Shape(8, 2))
    model = copy.deepcopy(original)
    run = Run(original, model, *heads_pruner(model, gqa, steps=2))
    for _ in range(2):
        for group in run.pruner.step(interactive=True):
            group.prune()
        assert_head_numbers(run)
    assert len(run.hook.reports) == 2
    assert same_state(model, pruned(original, gqa, 2).model)


def test_what_was_done_instead_is_noted() -> None:
    run = pruned(head_zoo.build("mistral", Shape(9, 3)), "query", 3)
    assert run.notes == [
        "step 1: the ratios ask for num_attention_heads 7.5 (num_attention_heads has to be a "
        "multiple of 3); nearest valid: num_attention_heads 9",
        "step 3: the ratios ask for num_attention_heads 4.5 (num_attention_heads has to be a "
        "multiple of 3); nearest valid: num_attention_heads 6",
    ]


# --- head dims ----------------------------------------------------------------------------------


def heads_of(model: Any) -> dict[nn.Module, int]:
    """How many heads each projection has: only with ``num_heads=`` are head dims pruned."""
    return {layer: count for _, layer, count in view_of(model).head_layers()}


@pytest.mark.parametrize(("name", "field"), [("t5", "d_kv"), ("vit", "head_dim")])
def test_dims_of_every_head(name: str, field: str) -> None:
    original = head_zoo.build(name, Shape(8))
    model = copy.deepcopy(original)
    pruner, hook = heads_pruner(
        model,
        steps=3,
        pruning_ratio=0.5,
        num_heads=heads_of(model),
        prune=(),
        prune_num_heads=False,
    )
    for _ in range(3):
        pruner.step()
        assert set(pruner.num_heads.values()) == {8}
    values = [report.fields[field][1] for report in hook.reports]
    assert values == [6, 5, 4]
    assert_same_as_masked(original, model, zoo.inputs(original))


def test_value_dims_of_latent_attention() -> None:
    """Value dims stand behind key dims in every head: one at a time."""
    model = zoo.build("deepseek_v3")
    with pytest.warns(PrunerSettingsWarning) as told:
        heads_pruner(model, num_heads=heads_of(model), prune_num_heads=False)
    assert str(told[0].message) == (
        "prune_head_dims=True, but head dims are kept: DeepseekV3ForCausalLM: qk_nope_head_dim "
        "and v_head_dim both set dimension 0 of model.layers.0.self_attn.kv_b_proj.weight. Prune "
        "them one after the other, each with a pruner of its own."
    )
    alone = {"prune_num_heads": False, "prune": ("v_head_dim",)}
    run = pruned_of_zoo("deepseek_v3", None, pruning_ratio=0.5, **alone)
    assert run.steps == [{"v_head_dim": 5}]
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


def test_dims_that_rotate_stay() -> None:
    model = head_zoo.build("llama", Shape(8, 2))
    with pytest.warns(PrunerSettingsWarning, match="encodes positions in its head dims"):
        heads_pruner(model, num_heads=heads_of(model), prune_num_heads=False)


# --- graphs and modes that cannot be had --------------------------------------------------------


def test_a_class_without_heads() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        heads_pruner(zoo.build("mamba2"))
    assert str(raised.value).startswith(
        "Mamba2ForCausalLM cannot prune attention heads: no attention heads were found. Widths "
        "that can be pruned: "
    )


def test_heads_of_every_stage_go_with_the_width() -> None:
    """Swin's stages have other numbers of heads, and its width doubles from one to the next."""
    original = zoo.build("swin")
    model = copy.deepcopy(original)
    hook = HFConfigSyncHook(prune="inner")
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        prune_num_heads=True,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"embed_dim": (16, 8), "num_heads": ([2, 4], [1, 2])}
    assert_same_as_masked(original, model, zoo.inputs(original))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_without_groups_every_mode_is_the_same(name: str) -> None:
    model = head_zoo.build(name, Shape(8))
    hooks = [heads_pruner(copy.deepcopy(model), gqa)[1] for gqa in ("query", "group", None)]
    ways = [hook.sync().graph for hook in hooks]
    assert len(set(ways)) == 1
    assert "heads: whole heads" in ways[0]


@pytest.mark.parametrize("gqa", MODES)
def test_multi_query_heads_go_one_by_one_in_either_mode(gqa: str) -> None:
    run = pruned(head_zoo.build("llama", Shape(8, 1)), gqa)
    assert run.steps == [{"num_attention_heads": 4}]
    assert run.hook.reports[0].graph.endswith("heads: whole heads (num_attention_heads)")
