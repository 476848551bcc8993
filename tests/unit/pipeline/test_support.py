"""``supports``: every width of a class tried at tiny size, and what a wrong one looks like."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from masked import masked_difference
from torch import nn
from transformers import CONFIG_MAPPING

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, supports
from tp_hf_config.model.build import Builder, Refusal
from tp_hf_config.model.config_json import config_json
from tp_hf_config.pipeline.support import reloaded, save

# One type for each mechanism: grouped heads, fused layers, Conv1D, experts, latent attention,
# relative positions, tied weights, heads with the hidden size, convolutions, images
# among text.  What they came to stands in the table that ``make support`` wrote.
TABLE = json.loads((small.ROOT / "docs" / "support.json").read_text())
MEASURED = {(pair["task"], pair["type"]): pair for pair in TABLE["pairs"]}
SAMPLE = [
    ("causal-lm", "phi3"),
    ("causal-lm", "mixtral"),
    ("masked-lm", "bert"),
    ("seq2seq-lm", "t5"),
    *(
        pytest.param(*pair, marks=pytest.mark.full)
        for pair in (
            ("causal-lm", "llama"),
            ("causal-lm", "gpt2"),
            ("causal-lm", "gpt_bigcode"),
            ("causal-lm", "gemma2"),
            ("masked-lm", "deberta-v2"),
            ("image-classification", "vit"),
            ("image-classification", "convnext"),
            ("model", "paligemma"),
        )
    ),
]


@pytest.mark.skipif(
    any(version(name) != TABLE["versions"][name] for name in ("transformers", "torch-pruning")),
    reason="the table in docs/support.json is of other versions",
)
@pytest.mark.parametrize(("task", "model_type"), SAMPLE)
def test_sample_of_the_support_table(task: str, model_type: str) -> None:
    expected = MEASURED[task, model_type]
    model_class = getattr(hf, expected["class"])
    found = supports(CONFIG_MAPPING[model_type](), model_class=model_class)
    assert found.why_not is None
    assert [json.loads(json.dumps(one.to_dict())) for one in found.widths] == expected["widths"]


def table_module() -> Any:
    """What writes the table."""
    return small.module_of(small.ROOT / "benchmarks" / "support" / "table.py")


def test_the_page_is_what_the_table_says_and_names_are_not_links() -> None:
    table = table_module()
    written = (small.ROOT / "docs" / "support.md").read_text()
    assert written == table.page(TABLE["pairs"], TABLE, list(TABLE["totals"].items()))
    assert not re.search(r"(?<!\\)\]\[", re.sub(r"`[^`]*`", "", written))


def test_a_row_that_does_not_end_is_counted_as_such() -> None:
    table = table_module()
    late = {"stage": "prune", "why": "no end within 60 s (prune)", "widths": []}
    rows = [{"task": "model", "type": "a", **late}]
    assert dict(table.totals(rows, 3))["pairs that did not end within their time"] == "1"


def test_the_table_says_how_long_a_pair_had() -> None:
    table = table_module()
    row = {"task": "model", "stage": "done", "why": "", "widths": [], "limit": 120}
    rows = [{**row, "type": "a"}, {**row, "type": "b"}]
    said = "pairs that did not end within their time"
    assert dict(table.totals(rows, 2))[said] == "0 (120 s of processor time each)"
    rows[1]["limit"] = 170
    assert dict(table.totals(rows, 2))[said] == "0 (120 or 170 s of processor time each)"


def test_a_pair_that_ended_with_more_time_is_counted_as_late() -> None:
    table = table_module()
    row = {"task": "model", "class": "A", "stage": "done", "why": "", "widths": [], "limit": 170}
    slow = {"longer": 600, "processor_seconds": 412}
    late = {"longer": 600, "stage": "prune", "why": "no end within 600 s (prune)"}
    too_large = {"longer": 600, "stage": "prune", "why": "can't allocate memory"}
    rows = [{**row, "type": "a"}, {**row, "type": "b", **slow}, {**row, "type": "c", **late}]
    rows.append({**row, "type": "d", **too_large})
    totals = dict(table.totals(rows, 3))
    assert totals["pairs that did not end within their time"] == "3 (170 s of processor time each)"
    assert totals["of those, measured again with 600 s, and ended"] == "1 of 3"
    page = table.page(rows, {"date": "2026-11-30", "versions": {}, "seed": 0}, [])
    cells = [line.split(" | ")[-1] for line in page.splitlines() if "| `A` |" in line]
    assert cells == [
        "  |",
        "takes 412 s |",
        "no end within 600 s (prune) |",
        "can't allocate memory |",
    ]
    assert [table.did_not_end(one, 900) for one in rows] == [False, False, True, False]
    assert [table.did_not_end(one, 600) for one in rows] == [False, False, False, False]
    assert [table.is_late(one) for one in rows] == [False, True, True, True]


def test_the_totals_say_how_many_pairs_are_learned_quickly() -> None:
    table = table_module()
    row = {"task": "model", "stage": "done", "why": "", "widths": []}
    times = [{"learn_seconds": 0.5, "field_seconds": 1.5}, {"learn_seconds": 1.5}, {}]
    times.append({"learn_seconds": 2.5, "field_seconds": 3.5})
    totals = dict(
        table.totals([{**row, "type": str(n), **each} for n, each in enumerate(times)], 4)
    )
    assert totals["learned within 2 s"] == "2 of 3 (66.7 %)"
    assert totals["learned, and one field proved, within 2 s"] == "1 of 2 (50.0 %)"


def test_the_field_to_time_is_one_that_goes_alone_and_feed_forward_if_there_is_one() -> None:
    table = table_module()

    def row(*widths: tuple[str, tuple[str, ...]]) -> dict[str, Any]:
        return {"widths": [{"outcome": outcome, "fields": fields} for outcome, fields in widths]}

    hidden = ("works", ("hidden_size",))
    assert table.a_field_of(row()) is None
    assert table.a_field_of(row(("works", ("num_heads", "hidden_size")))) is None
    assert table.a_field_of(row(("refused", ("intermediate_size",)), hidden)) == "hidden_size"
    assert table.a_field_of(row(hidden, ("works", ("text.d_ff",)))) == "text.d_ff"


def test_rows_of_the_table_are_read_if_it_is_of_the_same_versions_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_module()
    monkeypatch.setattr(table, "versions", lambda: {"torch": "2"})
    assert table.stored_rows(0, tmp_path) == {}
    row = {"task": "model", "type": "a", "code": "12"}
    (tmp_path / "docs").mkdir()
    stored = {"versions": {"torch": "2"}, "seed": 0, "pairs": [row]}
    (tmp_path / "docs" / "support.json").write_text(json.dumps(stored))
    assert table.stored_rows(0, tmp_path) == {"model.a": row}
    assert table.stored_rows(1, tmp_path) == {}
    monkeypatch.setattr(table, "versions", lambda: {"torch": "3"})
    assert table.stored_rows(0, tmp_path) == {}


def test_the_digest_of_the_code_changes_with_the_code_that_runs_alone(tmp_path: Path) -> None:
    module = small.module_of(small.ROOT / "benchmarks" / "support" / "code_digest.py")
    package, program = tmp_path / "package", tmp_path / "program.py"
    for folder in (package, package / "inner"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    program.write_text("import os\nfrom package.a import f\n\nf()\n")

    def digest() -> str:
        return str(module.code_digest(package, [program]))

    a, b, other = package / "a.py", package / "inner" / "b.py", package / "other.py"
    a.write_text(
        '"""One."""\n\ndef f():\n    """Two."""\n    from .inner import b\n    return b.g()\n'
    )
    b.write_text("def g():\n    return 1\n")
    other.write_text("from .a import f\n")
    before = digest()
    a.write_text("def f():  # four\n    from .inner import b\n    return (b.g())\n")
    other.write_text("from .inner import b\n")
    assert digest() == before
    b.write_text("def g():\n    return 2\n")
    assert digest() != before
    b.write_text("from .. import other\n\n\ndef g():\n    return 1\n")
    within = digest()
    assert within != before
    other.write_text("x = 1\n")
    assert digest() != within


def test_the_digest_of_the_package_is_of_what_a_measurement_runs() -> None:
    module = small.module_of(small.ROOT / "benchmarks" / "support" / "code_digest.py")
    package = small.ROOT / "tp_hf_config"
    trees = module.imported(package, (small.ROOT / "benchmarks" / "support").glob("*.py"))
    modules = {path.relative_to(package).as_posix() for path in trees}
    assert {"twin/twin_test.py", "hook/apply.py", "calibration/refit.py"} <= modules
    assert not modules & {"cli/main.py", "pipeline/gguf_file.py", "checkpoint/solving.py"}


def test_the_page_says_if_its_rows_are_of_several_states_of_the_code() -> None:
    table = table_module()
    head = {"date": "2026-11-27", "versions": {}, "seed": 0, "codes": 1}
    assert "states of the code" not in table.page([], head, table.totals([], 0))
    several = table.page([], {**head, "codes": 2}, table.totals([], 0))
    assert "seed 0, rows of 2 or more states of the code" in several


def test_the_page_has_a_column_for_the_defaults_once_they_were_tried() -> None:
    table = table_module()
    pairs = [
        {"task": "model", "type": name, "class": "A", "stage": "done", "why": "", "widths": []}
        for name in "ab"
    ]
    head = {"date": "2026-11-27", "versions": {}, "seed": 0}
    assert "| defaults |" not in table.page(pairs, head, table.totals(pairs, 2))
    pairs[0]["defaults"] = {"outcome": "works", "why": ""}  # type: ignore[assignment]
    pairs[1]["defaults"] = {"outcome": "refused", "why": "nothing"}  # type: ignore[assignment]
    assert dict(table.totals(pairs, 2))[table.DEFAULTS] == "1 of 2"
    page = table.page(pairs, head, table.totals(pairs, 2))
    assert "| heads | defaults | other widths that go |" in page
    assert "| model | `a` | `A` |   |   |   | yes |   |   |" in page
    assert "| model | `b` | `A` |   |   |   | refused |   |   |" in page


WORKS, REFUSED = ({"outcome": outcome, "why": ""} for outcome in ("works", "refused"))
FAILED = {"outcome": "failed", "why": "logits is 1e+00 off the original with the layer passing on"}
LATE = "no end within 60 s (prune)"


def with_layers(name: str, **layers: Any) -> dict[str, Any]:
    """The row of a class that ran; with what was measured of its layers, if there is anything."""
    row = {"task": "model", "type": name, "class": "A", "stage": "done", "why": "", "widths": []}
    return {**row, "layers": {"why": "", **layers}} if layers else row


def test_layers_have_columns_and_totals_of_the_pairs_that_have_some() -> None:
    table = table_module()
    pairs = [
        with_layers("a", lists=["h"], dropped=[{**WORKS, "unobserved": True}], differ=WORKS),
        with_layers("b", lists=["h", "g"], dropped=[WORKS, REFUSED], differ=REFUSED),
        with_layers("c", lists=["h", "g"], dropped=[WORKS, FAILED], differ=WORKS),
        with_layers("d", lists=["h"], why=LATE),
        with_layers("e", lists=[]),
    ]
    counted = dict(table.totals(pairs, 5))
    assert counted[table.DIFFER] == "2 of 4 (50.0 %)"
    every = "of every list: 1; in 1 lists no output depends on the layer"
    assert counted[table.DROPPED] == f"2 of 4 (50.0 %; {every})"
    assert counted[table.FAILED] == "1 (1)"
    assert not any(name.startswith("pairs that run whose") for name in counted)
    head = {"date": "2026-11-27", "versions": {}, "seed": 0}
    page = table.page(pairs, head, table.totals(pairs, 5))
    assert "| heads | layers differ | a layer dropped | other widths that go |" in page
    assert "| model | `a` | `A` |   |   |   | yes | yes |   |   |" in page
    assert "| model | `b` | `A` |   |   |   | refused | some |   |   |" in page
    assert "| model | `c` | `A` |   |   |   | yes | FAILED |   |   |" in page
    assert "| model | `d` | `A` |   |   |   |   |   |   |   |" in page
    assert "| layers differ | 1 | refused:" in page
    assert "| a layer dropped | 1 | failed:" in page
    missing = [*pairs, with_layers("f"), with_layers("g", why=LATE)]
    counted = dict(table.totals(missing, 7))
    assert counted[table.DIFFER] == "2 of 4 (50.0 %)"
    assert counted["pairs that run whose layers were looked at"] == "5 of 7"
    without = table.page([with_layers("f")], head, table.totals([with_layers("f")], 1))
    assert "| layers differ |" not in without
    assert "## Why layers" not in without


def test_a_model_is_measured_at_tiny_size_and_not_touched(capfd: Any) -> None:
    with torch.device("meta"):  # 70 billion parameters
        config = hf.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            dtype=torch.bfloat16,
        )
        model = hf.LlamaForCausalLM(config)
    before = config_json(model.config)
    capfd.readouterr()
    found = supports(model)
    assert capfd.readouterr() == ("", "")  # no bars of what is saved and loaded
    assert {width.name: width.outcome for width in found.widths} == {
        "head_dim": "refused",
        "hidden_size": "works",
        "intermediate_size": "works",
        "num_attention_heads": "works",
        "num_key_value_heads + num_attention_heads": "works",
    }
    assert found.outcome("hidden_size") == "works"
    assert found.outcome("num_key_value_heads") == "works"
    assert found.outcome("head_dim") == "refused"
    assert found.outcome("d_model") is None
    assert config_json(model.config) == before
    assert model.lm_head.weight.shape == (32000, 8192)
    assert "intermediate_size" in str(found)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["model"] == "LlamaForCausalLM"
    assert again["widths"][1]["outcome"] == "works"


def test_what_does_not_run_says_why() -> None:
    class Broken(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no forward pass today")

    found = supports(zoo.build("llama").config, model_class=Broken)
    assert found.why_not == "the tiny model does not run: no forward pass today"
    assert found.widths == ()
    assert "no forward pass today" in str(found)


def test_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^source={}: expected a Hugging Face model"):
        supports({})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no class of transformers"):
        supports(hf.PretrainedConfig())


def test_a_scale_that_is_not_refreshed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's embedding scale: the shapes fit without it, the outputs do not."""
    monkeypatch.setattr("tp_hf_config.hook.apply._write_values", lambda *args: [])
    config = zoo.build("gemma2").config
    found = {w.name: w for w in supports(config).widths}["hidden_size"]
    assert found.outcome == "failed"
    assert "off the original with the removed units masked" in found.why


def _random(name: str) -> Any:
    model = zoo.build(name).double()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if "embed_scale" in module._buffers:
            module.embed_scale = module.embed_scale.double()
    return model


def _halved(model: nn.Module, field: str) -> Any:
    model = copy.deepcopy(model)
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=[field])],
    ).step()
    return model


def _difference(original: Any, pruned: Any) -> Refusal | None:
    fresh = Builder(pruned).build_real(config_json(pruned.config))
    assert isinstance(fresh, nn.Module)
    return masked_difference(original, pruned, fresh, zoo.inputs(original))


def test_the_masked_comparison_can_fail() -> None:
    original = _random("llama")
    pruned = _halved(original, "intermediate_size")
    assert _difference(original, pruned) is None
    wrong = copy.deepcopy(pruned)
    with torch.no_grad():
        wrong.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    name = "model.layers.0.mlp.up_proj.weight"
    assert _difference(original, wrong) == Refusal(f"{name} holds values that the original has not")
    wrong = copy.deepcopy(pruned)
    with torch.no_grad():
        weight = wrong.model.layers[0].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    assert _difference(original, wrong) == Refusal(f"{name} holds channels in another order")
    wrong = copy.deepcopy(pruned)
    for layer in wrong.model.layers:
        layer.self_attn.scaling *= 1.01
    assert "off the original" in str(_difference(original, wrong))


def test_other_channels_in_one_layer_of_a_group_are_seen() -> None:
    """Right shapes, values of the original in order, but not those that the others kept."""
    original = _random("llama")
    pruned = _halved(original, "intermediate_size")
    down, full = pruned.model.layers[0].mlp.down_proj, original.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(full.weight[:, : down.in_features].clone())
    other = nn.Parameter(full.weight[:, -down.in_features :].clone())
    first = _difference(original, pruned)
    down.weight = other
    second = _difference(original, pruned)
    assert "off the original" in f"{first} {second}"


class Scaled(nn.Module):
    """A scale that holds a norm without weights, as Moonshine's streaming encoder has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * self.gamma


def test_a_norm_inside_a_scale_is_taken_over_what_is_left() -> None:
    torch.manual_seed(0)
    original, left = (
        nn.Sequential(nn.Linear(4, width), Scaled(width), nn.Linear(width, 3)).double()
        for width in (8, 5)
    )
    with torch.no_grad():
        original[1].gamma += torch.rand(8)
        for one, other in zip(left.parameters(), original.parameters(), strict=True):
            one.copy_(other[tuple(map(slice, one.shape))])
    inputs = {"input": torch.randn(2, 3, 4).double()}
    assert masked_difference(original, left, left, inputs) is None
    with torch.no_grad():
        left[0].weight.copy_(original[0].weight[3:])
    assert "off the original" in str(masked_difference(original, left, left, inputs))


def test_a_folder_that_changed_is_seen(tmp_path: Path) -> None:
    model = _random("llama")
    assert save(model, zoo.inputs(model), tmp_path / "one") is None
    assert reloaded(type(model), tmp_path / "one") is None
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    assert reloaded(type(model), tmp_path / "one") == Refusal(
        "loaded again it computes other outputs"
    )
    config["intermediate_size"] += 1
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in str(reloaded(type(model), tmp_path / "one"))


def _outcomes(config: Any, model_class: Any) -> dict[str, str]:
    return {width.name: width.outcome for width in supports(config, model_class=model_class).widths}


def test_integers_beside_weights_go_along_and_layers_that_return_a_scale_have_heads() -> None:
    found = _outcomes(hf.IBertConfig(), hf.IBertForMaskedLM)
    assert found["hidden_size"] == "works"
    assert found["intermediate_size"] == "works"
    assert found["num_attention_heads + hidden_size"] == "works"


def test_every_expert_is_reached_by_some_token() -> None:
    config = hf.SwitchTransformersConfig(num_layers=2, num_decoder_layers=2)
    found = _outcomes(config, hf.SwitchTransformersForConditionalGeneration)
    assert found == {"d_ff": "works", "d_kv": "works", "d_model": "works", "num_heads": "works"}


def test_a_tiny_copy_is_not_made_smaller_still() -> None:
    """Groups of convolutions at a size at which heads and groups are no longer told apart."""
    found = _outcomes(hf.SqueezeBertConfig(), hf.SqueezeBertForMaskedLM)
    assert found == {"embedding_size": "works", "intermediate_size": "works"}


def test_heads_behind_experts_that_no_run_without_data_comes_to() -> None:
    """JetMoE asks for its tokens' experts as numbers; what follows them is not seen."""
    found = _outcomes(hf.JetMoeConfig(), hf.JetMoeForCausalLM)
    assert found["num_key_value_heads"] == "works"
    assert found["kv_channels"] == "refused"
