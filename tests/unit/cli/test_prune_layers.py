"""``tp-hf-config prune`` where layers may differ: by ranking, by ratios, by sensitivity."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deep_zoo
import layer_zoo
import model_folders as folders
import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf
from shell import shell

from tp_hf_config.reports import MOST_LINES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers"),
]
GLOBAL = ("--per-layer", "--ranking", "global")
FFN = ("--prune", "intermediate_size", "--pruning-ratio", "0.3")
FILE = "modeling_layerwise_llama.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers, of which the second hardly does anything; and other folders."""
    root = tmp_path_factory.mktemp("models")
    llama = deep_zoo.build("llama")
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    llama.save_pretrained(root / "llama")
    folders.save_tokenizer(root / "llama")
    folders.save("bert", root / "bert")
    folders.save_text(root / "text.txt")
    return root


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformers keeps the code of folders."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))


def widths_of(folder: Path, field: str = "intermediate_size") -> list[int]:
    """What config.json says of each layer."""
    data = json.loads((folder / "config.json").read_text())
    entries = data["per_layer_config"]
    return [entries[str(layer)][field] for layer in range(data["num_hidden_layers"])]


class TestRanked:
    def test_together(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """A fresh process loads it; so do check and verify, and whoever reads the card."""
        out = tmp_path / "out"
        code, printed, errors = shell(
            capsys, "prune", models / "llama", "--out", out, *GLOBAL, *FFN
        )
        assert code == 0, errors
        assert (
            "the plan assumes one ratio for all layers; --ranking global decides how much of each "
            "layer is pruned" in errors.splitlines()
        )
        widths = widths_of(out)
        assert min(widths) < max(widths)
        assert abs(sum(widths) - 4 * 96 * 0.7) < 4 * 96 * 0.02  # each goes to its grid, if near
        data = json.loads((out / "config.json").read_text())
        assert data["rope_theta"] == data["rope_parameters"]["rope_theta"]
        lines = printed.splitlines()
        assert lines[0] == (
            f"LayerwiseLlamaForCausalLM: intermediate_size 96 -> {min(widths)}..{max(widths)} in 4 "
            "layers"
        )
        loading = f'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
        assert lines[-3] == (
            f"layers differ: {loading} runs {FILE}, written by tp-hf-config, which builds each "
            "layer with its own widths; tp-hf-config export writes formats that need no code"
        )
        assert lines[-2].startswith(f"written: {out} (")
        assert lines[-1] == "copied: tokenizer.json, tokenizer_config.json"
        assert len(lines) <= MOST_LINES
        card = (out / "README.md").read_text()
        for line in (
            f"| intermediate_size | 96 | {min(widths)}..{max(widths)} in 4 layers |",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)',
            f"| intermediate_size | {' '.join(map(str, widths))} |",
            "| per_layer | `True` |",
            "| ranking | `global` |",
        ):
            assert line in card.splitlines()
        assert "`trust_remote_code=True` allows Transformers to run that file" in card
        assert "`tp-hf-config export`" in card
        assert "Without `trust_remote_code=True`, loading fails with `Ambiguous" in card
        code, printed, _ = shell(capsys, "check", out, "--trust-remote-code")
        assert (code, printed.splitlines()[0]) == (0, f"{out}: sound")
        code, printed, _ = shell(capsys, "verify", out, "--trust-remote-code")
        assert (code, printed.splitlines()[0]) == (
            0,
            f"{out}: loads and runs (LayerwiseLlamaForCausalLM, fresh process)",
        )
        model = hf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == widths

    @pytest.mark.usefixtures("unproved")
    @pytest.mark.parametrize(
        ("typed", "arguments"),
        [
            ((), {}),
            (("--ranking", "isomorphic"), {"global_pruning": True, "isomorphic": True}),
        ],
    )
    def test_in_the_words_of_torch_pruning(
        self,
        capsys: Any,
        models: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        typed: tuple[str, ...],
        arguments: dict[str, bool],
    ) -> None:
        given: list[dict[str, Any]] = []
        constructor = tp.pruner.MetaPruner

        def noted(*args: Any, **kwargs: Any) -> Any:
            names = ("global_pruning", "isomorphic")
            given.append({name: kwargs[name] for name in names if name in kwargs})
            return constructor(*args, **kwargs)

        monkeypatch.setattr(tp.pruner, "MetaPruner", noted)
        out = tmp_path / "out"
        common = ("prune", models / "llama", "--out", out, "--per-layer", *FFN)
        code, _, errors = shell(capsys, *common, *typed)
        assert code == 0, errors
        assert given == [arguments] * (2 if typed else 1)

    def test_layers_that_may_not_differ(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """In the words of the library, and before the model is run on any text."""
        typed = ("prune", models / "llama", "--out", tmp_path / "out", "--ranking", "global")
        code, printed, errors = shell(capsys, *typed, *FFN)
        assert (code, printed) == (1, "")
        assert errors.splitlines()[-1] == (
            "tp-hf-config prune: BasePruner of LlamaForCausalLM: the 4 groups of "
            "intermediate_size are ranked together, so they lose different numbers of units, and "
            "one config field cannot describe that. Use global_pruning=False and "
            "isomorphic=False, and put no two of them under one key of pruning_ratio_dict. Or let "
            "each layer have its own widths: --per-layer. Nothing is pruned yet. "
            "tp_hf_config.plan(model, ...) shows what settings lead to."
        )
        assert "calibrating" not in errors
        assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("unproved")
class TestByRatio:
    def test_of_a_single_layer(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "llama", "--out", out, "--per-layer", "--json")
        code, printed, errors = shell(
            capsys, *typed, "--ratios", "per_layer_config.2.intermediate_size=0.5"
        )
        assert code == 0, errors
        assert widths_of(out) == [96, 96, 48, 96]
        found = json.loads(printed)
        assert found["fields"] == {
            "per_layer_config.2.intermediate_size": {"old": 96, "new": 48},
        }
        assert found["layers_differ"] == {
            "widths": {"intermediate_size": [96, 96, 48, 96]},
            "auto_class": "AutoModelForCausalLM",
            "file": FILE,
        }
        assert found["allocation"] is None

    def test_that_leaves_all_alike(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "llama", "--out", out, "--per-layer", *FFN)
        code, printed, errors = shell(capsys, *typed)
        assert code == 0, errors
        assert (
            "note: all layers have the same widths after pruning, so the stock class is used"
            in printed.splitlines()
        )
        assert "layers differ" not in printed
        assert "## Loading" not in (out / "README.md").read_text()
        assert FILE not in os.listdir(out)
        assert hf.AutoConfig.from_pretrained(out).intermediate_size == 67

    def test_a_plan_has_a_row_for_each_layer(self, capsys: Any, models: Path) -> None:
        typed = ("plan", models / "llama", "--per-layer", *FFN, "--json")
        code, printed, errors = shell(capsys, *typed)
        assert code == 0, errors
        found = json.loads(printed)
        assert found["settings"]["per_layer"] is True
        assert [(width["name"], *width["after"].values()) for width in found["widths"]] == [
            (f"per_layer_config.{number}.intermediate_size", 67) for number in range(4)
        ]


class TestAllocated:
    TARGET = ("--allocate", "--target-params", "0.85")

    def test_what_is_missed_least_goes(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """The widths are shown before anything is cut, and a fresh process loads the result."""
        out = tmp_path / "out"
        typed = ("prune", models / "llama", "--out", out, *self.TARGET, "--json")
        code, printed, errors = shell(capsys, *typed)
        assert code == 0, errors
        found = json.loads(printed)
        widths = widths_of(out)
        assert widths[1] == min(widths) == 38
        lines = errors.splitlines()
        shown = lines.index(f"intermediate_size, 96 in each layer -> {' '.join(map(str, widths))}")
        cut = next(n for n, line in enumerate(lines) if line.startswith("sync 1: "))
        assert shown < cut
        assert found["plan"] is None
        assert list(found["allocation"]["widths"].values()) == widths
        assert found["layers_differ"]["widths"] == {"intermediate_size": widths}
        assert found["parameters"] == found["allocation"]["parameters"]
        before, after = found["parameters"].values()
        assert 0.84 * before < after <= 0.85 * before
        assert found["steps"][0]["refits"]["layers"]
        assert found["proof"] == {"tensors": 1, "numbers": 8 * tiny.VOCAB}
        card = (out / "README.md").read_text().splitlines()
        assert "| allocate | `True` |" in card
        assert "| target_params | `0.85` |" in card

    @pytest.mark.usefixtures("unproved")
    def test_in_steps_with_recovery(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "llama", "--out", out, *self.TARGET, "--json", "--round-to", 4)
        code, printed, errors = shell(capsys, *typed, "--steps", 3, "--recover", 3)
        assert code == 0, errors
        found = json.loads(printed)
        assert list(found["allocation"]["widths"].values()) == widths_of(out)
        assert not any(width % 4 for width in widths_of(out))
        assert [step["step"] for step in found["steps"]] == [1, 2, 3]
        assert all(step["fields"] for step in found["steps"])
        assert "step 3/3: recovery: 1 windows" in errors.splitlines()

    @pytest.mark.usefixtures("unproved")
    def test_after_layers_are_dropped(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """The target is of the whole model, and the layers that are left are compared."""
        out = tmp_path / "out"
        typed = ("prune", models / "llama", "--out", out, "--allocate", "--json")
        code, printed, errors = shell(capsys, *typed, "--target-params", 0.7, "--drop-layers", 1)
        assert code == 0, errors
        found = json.loads(printed)
        assert len(found["allocation"]["widths"]) == len(widths_of(out)) == 3
        before, after = found["parameters"].values()
        assert 0.69 * before < after <= 0.7 * before

    @pytest.mark.usefixtures("unproved")
    def test_a_model_without_a_head_on_a_file(
        self, capsys: Any, models: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        typed = ("prune", models / "bert", "--out", out, *self.TARGET)
        code, printed, errors = shell(capsys, *typed, "--calibration", models / "text.txt")
        assert code == 0, errors
        assert f'layers differ: AutoModel.from_pretrained("{out}", trust_remote_code=True)' in (
            printed
        )
        model = hf.AutoModel.from_pretrained(out, trust_remote_code=True)
        assert [layer.intermediate.dense.out_features for layer in model.encoder.layer] == (
            widths_of(out)
        )

    @pytest.mark.usefixtures("unproved", "own_cache")
    def test_once_more(self, capsys: Any, models: Path, tmp_path: Path) -> None:
        """What was written is pruned again, if its code is trusted; the file is written anew."""
        first, second = tmp_path / "first", tmp_path / "second"
        code, _, errors = shell(capsys, "prune", models / "llama", "--out", first, *self.TARGET)
        assert code == 0, errors
        typed = ("prune", first, "--out", second, *self.TARGET)
        code, _, errors = shell(capsys, *typed)
        assert code == 1
        assert "is code that comes with the model, which is not run by default. Read its" in errors
        code, printed, errors = shell(capsys, *typed, "--trust-remote-code")
        assert code == 0, errors
        old, new = (" ".join(map(str, widths_of(folder))) for folder in (first, second))
        assert f"intermediate_size, {old} -> {new}" in errors.splitlines()
        assert "copied: tokenizer.json, tokenizer_config.json" in printed.splitlines()
        assert "not copied" not in printed
        assert (first / FILE).read_bytes() == (second / FILE).read_bytes()

    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            (
                "--tokens 62",
                "--allocate compares layers on held-out text, but the text has only one window: "
                "give a longer text (--calibration FILE), or leave --tokens out",
            ),
            (
                "--drop-layers 2",
                "--allocate: the model already has only 74,432 parameters, so --target-params "
                "115,708 prunes no width. Choose a smaller target",
            ),
            (
                "--prune hidden_size",
                "allocate: hidden_size is not a width that can differ from layer to layer. The "
                "widths that can: intermediate_size, num_attention_heads",
            ),
            (
                "--target-params 0.3",
                "--allocate: target_params=40,838: 91,584 parameters remain even if the largest "
                "of shares= is pruned from every layer. Pass larger shares, name more fields in "
                "--prune, or choose a larger target",
            ),
        ],
    )
    def test_what_cannot_be(
        self, capsys: Any, models: Path, tmp_path: Path, typed: str, message: str
    ) -> None:
        common = ("prune", models / "llama", "--out", tmp_path / "out", *self.TARGET)
        code, printed, errors = shell(capsys, *common, *typed.split())
        assert (code, printed) == (1, "")
        assert message in errors
        assert "sync 1" not in errors
        assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("own_cache")
class TestCodeThatComesWithAModel:
    def test_is_not_run_beside_the_generated_file(
        self, capsys: Any, tmp_path: Path, unproved: None
    ) -> None:
        """A stock class may do where the config names other code too."""
        folder = folders.with_code(folders.save("llama-gqa", tmp_path / "model"), tmp_path / "ran")
        data = json.loads((folder / "config.json").read_text())
        data["architectures"] = ["LlamaForCausalLM"]
        (folder / "config.json").write_text(json.dumps(data))
        (folder / FILE).write_text(
            f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()"
        )
        out = tmp_path / "out"
        code, _, errors = shell(capsys, "prune", folder, "--out", out, *GLOBAL, *FFN)
        assert code == 0, errors
        assert not (tmp_path / "ran").exists()
        assert [name for name in os.listdir(out) if name.endswith(".py")] == [FILE]
        assert "Written by tp_hf_config" in (out / FILE).read_text()
        auto_map = json.loads((out / "config.json").read_text())["auto_map"]
        assert {auto_map[auto] for auto in ("AutoModel", "AutoModelForCausalLM")} == {
            f"{FILE[:-3]}.Layerwise{name}" for name in ("LlamaModel", "LlamaForCausalLM")
        }

    def test_has_no_layers_that_differ(self, capsys: Any, tmp_path: Path) -> None:
        folder = folders.with_code(folders.save("llama-gqa", tmp_path / "model"), tmp_path / "ran")
        typed = ("prune", folder, "--out", tmp_path / "out", *GLOBAL, *FFN, "--trust-remote-code")
        code, _, errors = shell(capsys, *typed)
        assert code == 1
        assert (
            "--per-layer: Own is defined in code that came with the model (transformers_modules."
        ) in errors
        assert "from where a saved model cannot import it. Leave --per-layer out, or put" in errors
        assert not (tmp_path / "out").exists()
