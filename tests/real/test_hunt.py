"""``benchmarks/hunt``: draws the same legal configs for a seed, and its oracle sees a fault."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook, drop_layers
from tp_hf_config.model.build import Builder

pytestmark = pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="it hunts in the newest alone")
FOLDERS = [str(small.ROOT / "benchmarks" / name) for name in ("hunt", "support")]
NAMES = ("figures", "feeding", "trying", "oracle", "generation", "configs", "options")
NAMES += ("hunting", "layered")
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def hunt() -> Iterator[Any]:
    """Its modules, which know each other by their bare names."""
    sys.path[:0] = FOLDERS
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        del sys.path[: len(FOLDERS)]
        for name in (*NAMES, "narrowed", "pairs", "recipes"):
            sys.modules.pop(name, None)


def subject(hunt: Any, tmp_path: Path, data: dict[str, Any]) -> Any:
    pair = sys.modules["pairs"].Pair("causal-lm", "qwen3", "Qwen3ForCausalLM")
    return hunt["trying"].subject_of(hf.Qwen3ForCausalLM, pair, data, Random(0), tmp_path)


@pytest.mark.full
def test_a_seed_draws_the_same_legal_config(hunt: Any) -> None:
    builder = Builder(hf.Qwen3ForCausalLM(hf.Qwen3Config(**BASE)))
    base = hf.Qwen3Config(**BASE).to_dict()
    base = json.loads(json.dumps(base))
    first, again = (hunt["configs"].drawn_from(Random(3), builder, base) for _ in range(2))
    assert first == again
    assert len(first.changed) >= 5
    changed = {key: first.data[key] for key in first.changed if "." not in key}
    assert changed == first.changed
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**first.data))


def test_a_pruned_model_is_the_masked_original(hunt: Any, tmp_path: Path) -> None:
    one = subject(hunt, tmp_path, BASE)
    mode = hunt["trying"].Mode("defaults", {}, {"pruning_ratio": 0.4, "iterative_steps": 2})
    said = hunt["trying"].tried(one, mode, tmp_path / "case")
    assert said == {
        "outcome": "works",
        "why": "",
        "fields": {"intermediate_size": (32, 24)},
        "folder": "case",
    }


@pytest.mark.full
def test_attention_in_one_function_is_scaled_by_the_new_head_dim(hunt: Any, tmp_path: Path) -> None:
    config = hf.WavLMConfig(
        hidden_size=48, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2,
        conv_dim=[4, 4], conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2,
        num_conv_pos_embedding_groups=12, num_conv_pos_embeddings=16, apply_spec_augment=False,
        do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    pair = sys.modules["pairs"].Pair("model", "wavlm", "WavLMModel")
    data = json.loads(config.to_json_string())
    one = hunt["trying"].subject_of(hf.WavLMModel, pair, data, Random(0), tmp_path)
    settings = {"pruning_ratio": 0.25, "iterative_steps": 1}
    mode = hunt["trying"].Mode("width", {"prune": ("hidden_size",)}, settings)
    said = hunt["trying"].tried(one, mode, tmp_path / "case")
    assert (said["outcome"], said["fields"]) == ("works", {"hidden_size": (48, 36)})


def test_what_is_wrong_is_seen(hunt: Any, tmp_path: Path) -> None:
    one = subject(hunt, tmp_path, BASE)
    model = copy.deepcopy(one.model)
    hook = HFConfigSyncHook(prune=("intermediate_size",))
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    fresh = type(model)(copy.deepcopy(model.config))
    oracle = hunt["oracle"]
    assert oracle.compare(one.model, model, one.inputs, fresh).keys() == one.inputs.keys()
    mlp = model.model.layers[1].mlp
    kept, mixed = mlp.down_proj.weight.data, mlp.up_proj.weight.data
    before = one.model.model.layers[1].mlp.down_proj.weight
    mlp.down_proj.weight.data = torch.cat([kept[:, :1], before[:, -19:]], 1).detach()
    with pytest.raises(oracle.WrongError, match=r"output 0 is .* off the masked original"):
        oracle.compare(one.model, model, one.inputs, fresh)
    mlp.down_proj.weight.data = kept
    mlp.up_proj.weight.data = mixed.flip(0)
    with pytest.raises(oracle.WrongError, match=r"up_proj\.weight holds channels of mixed origin"):
        oracle.compare(one.model, model, one.inputs, fresh)


@pytest.mark.full
def test_layers_dropped_and_made_to_differ_load_by_every_auto_class(
    hunt: Any, tmp_path: Path
) -> None:
    one = subject(hunt, tmp_path, {**BASE, "num_hidden_layers": 4})
    settings = {"pruning_ratio": 0.3, "iterative_steps": 1, "ignored_layers": []}
    settings["ignored_layers"] = [one.model.model.layers[2]]
    prune = {"prune": "intermediate_size", "per_layer": True}
    mode = hunt["trying"].Mode("both", prune, settings, {"model.layers": [1]})
    said = hunt["trying"].tried(one, mode, tmp_path / "case")
    assert (said["outcome"], said["why"]) == ("works", "")
    assert said["fields"]["num_hidden_layers"] == (4, 3)
    config = json.loads((tmp_path / "case" / "config.json").read_text())
    widths = [layer["intermediate_size"] for layer in config["per_layer_config"].values()]
    assert sorted(widths) == [28, 28, 40]
    reloader = hunt["hunting"].Reloader(60)
    folder = tmp_path / "case"
    try:
        assert reloader.ask([folder]) == {str(folder): None}
        del config["auto_map"]["AutoModelForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
        (why,) = reloader.ask([folder]).values()
    finally:
        reloader.close()
    assert why is not None
    assert why.startswith("AutoModelForCausalLM: ")


def test_a_layer_that_stayed_with_other_values_is_seen(hunt: Any, tmp_path: Path) -> None:
    one = subject(hunt, tmp_path, {**BASE, "num_hidden_layers": 4})
    name, layers = "model.layers", [1, 2]
    assert list(hunt["layered"].lists_of_layers(one.model)) == [name]
    dropped = copy.deepcopy(one.model)
    drop_layers(dropped, layers, which=name)
    hunt["layered"].check_dropped(one.model, dropped, name, layers, one.inputs)
    with pytest.raises(hunt["oracle"].WrongError, match="is not the tensor of the layer that"):
        hunt["layered"].check_dropped(one.model, dropped, name, [0, 1], one.inputs)
    dropped.model.layers[1].self_attn.scaling *= 1.5
    with pytest.raises(hunt["oracle"].WrongError, match=r"output 0 is .* off where layers pass on"):
        hunt["layered"].check_dropped(one.model, dropped, name, layers, one.inputs)


def test_the_figures_stand_between_their_marks(hunt: Any, tmp_path: Path) -> None:
    rows = [
        {
            "type": "a",
            "modes": [{"outcome": "works"}, {"outcome": "wrong"}],
            "changed": {"x": 1},
            "code": "c1",
        },
        {"type": "b", "modes": [], "code": "c2"},
    ]
    document = tmp_path / "random-configs.md"
    document.write_text("before <!-- hunt:begin --> old <!-- hunt:end --> after")
    hunt["figures"].write(rows, 5, document)
    text = document.read_text()
    assert text.startswith("before <!-- hunt:begin -->\n| measured | ")
    assert text.endswith("\n<!-- hunt:end --> after")
    assert "| random configs | 1 |\n| model types | 1 |" in text
    assert "| versions of the code they ran with | 1 |" in text
    assert "| prunings | 2 |" in text
    assert "| silently wrong | 1 |" in text
    document.write_text("no marks")
    with pytest.raises(ValueError, match=r"has no <!-- hunt:begin --> \.\.\. <!-- hunt:end -->"):
        hunt["figures"].write(rows, 5, document)


def test_what_is_kept_counts_and_the_latest_of_a_config_is_taken(hunt: Any, tmp_path: Path) -> None:
    kept = tmp_path / "hunt.jsonl"
    limits = hunt["hunting"].Limits(1, 1)

    def opened(name: str) -> Any:
        return hunt["hunting"].Hunt([], tmp_path / name, 0, limits, kept)

    def row(number: int, outcome: str, why: str) -> dict[str, Any]:
        named = {"task": "t", "type": "a", "number": number, "class": "A", "code": "c"}
        mode = {"mode": "defaults", "outcome": outcome, "why": why, "fields": {"x": [2, 1]}}
        return {**named, "config": {}, "modes": [mode]}

    def outcomes(of: Any) -> list[str]:
        return [mode["outcome"] for row in of.rows() for mode in row["modes"]]

    first = opened("0-a")
    lines = (row(0, "wrong", "off"), row(1, "works", ""))
    first.results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    first.keep()
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [
        {
            "of": "0-a",
            "task": "t",
            "type": "a",
            "class": "A",
            "number": number,
            "code": "c",
            "modes": [{"mode": "defaults", "outcome": outcome, **why}],
        }
        for number, outcome, why in ((0, "wrong", {"why": "off"}), (1, "works", {}))
    ]
    first.results.write_text(json.dumps(row(0, "works", "")))
    assert outcomes(first) == ["works", "works"]
    other = opened("1-a")
    assert outcomes(other) == []
    other.results.write_text(json.dumps(row(0, "crashed", "")))
    other.keep()
    assert outcomes(other) == ["crashed"]
    assert list(map(hunt["hunting"].is_bad, other.rows())) == [True]
    assert outcomes(first) == ["works", "works"]
