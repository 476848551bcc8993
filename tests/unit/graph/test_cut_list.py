"""Cut lists: saved, read again, and carried out on another copy of the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tp_hf_config import (
    CheckpointError,
    CutList,
    HFConfigSyncHook,
    UnsupportedModelError,
    apply_cuts,
    calibrate,
)
from tp_hf_config.graph import cut_list
from tp_hf_config.model.config_json import config_json

pytestmark = pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
CLASSES = (
    "llama",
    "phi3",
    "gpt2",
    "opt",
    "mixtral",
    "deepseek_v3",
    "bert",
    "t5",
    "whisper",
    "convnext",
)


def prune(model: Any, hook: HFConfigSyncHook, **settings: Any) -> None:
    """All steps of a pruner, by magnitude unless an importance is given."""
    settings = {"pruning_ratio": 0.25, **settings}
    settings.setdefault("importance", tp.importance.GroupMagnitudeImportance())
    pruner = tp.pruner.MetaPruner(model, example_inputs=None, hooks=[hook], **settings)
    for _ in range(pruner.iterative_steps):
        pruner.step()


def refitted(model: Any) -> CutList:
    """What a pruner with refits cuts from a model."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 99, (2, 32), generator=generator)} for _ in range(10)]
    calibration = calibrate(model, batches)
    hook = HFConfigSyncHook(prune="inner", refit=calibration)
    prune(model, hook, importance=calibration.importance())
    assert hook.cuts is not None
    return hook.cuts


def assert_same(model: Any, other: Any) -> None:
    """Class, config and every tensor are the same, and so are ties and modes."""
    assert type(other) is type(model)
    assert config_json(other.config) == config_json(model.config)
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert [name for name in state if not torch.equal(state[name], others[name])] == []
    buffers = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert len(list(model.parameters())) == len(list(other.parameters()))
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]


class TestCarriedOut:
    @pytest.mark.parametrize("name", CLASSES)
    def test_on_another_copy(self, name: str, tmp_path: Path) -> None:
        model = zoo.build(name)
        before, hook = copy.deepcopy(model), HFConfigSyncHook(prune="inner")
        prune(model, hook, iterative_steps=2, pruning_ratio=0.5)
        assert hook.cuts is not None
        hook.cuts.save(tmp_path / "cuts.safetensors")
        unchanged = copy.deepcopy(before)
        pruned = apply_cuts(before, tmp_path / "cuts.safetensors")
        assert_same(model, pruned)
        assert_same(unchanged, before)

    def test_of_heads(self) -> None:
        model = small.llama()
        before, hook = copy.deepcopy(model), HFConfigSyncHook(prune=(), gqa="group")
        prune(model, hook, head_pruning_ratio=0.5)
        assert hook.cuts is not None
        assert_same(model, apply_cuts(before, hook.cuts))

    def test_where_layers_differ(self, tmp_path: Path) -> None:
        model = small.llama(num_hidden_layers=3)
        before = copy.deepcopy(model)
        hook = HFConfigSyncHook(prune="intermediate_size", per_layer=True)
        prune(model, hook, pruning_ratio_dict={model.model.layers[0]: 0.5})
        assert model.config.is_heterogeneous
        assert hook.cuts is not None
        hook.cuts.save(tmp_path / "cuts.safetensors")
        assert_same(model, apply_cuts(before, tmp_path / "cuts.safetensors"))

    def test_of_refitted_weights_is_refused(self, tmp_path: Path) -> None:
        """It holds cuts alone, so that it is neither saved nor carried out."""
        model = zoo.build("llama")
        before = copy.deepcopy(model)
        unchanged = copy.deepcopy(before)
        cuts = refitted(model)
        name = "model.layers.0.mlp.down_proj.weight"
        assert str(cuts).endswith(" refitted")
        assert cuts.kept(name)[1].tolist() == refitted(zoo.build("llama")).kept(name)[1].tolist()
        message = "weights were refitted, but a cut list stores only which channels were removed"
        with pytest.raises(ValueError, match=message):
            cuts.save(tmp_path / "cuts.safetensors")
        with pytest.raises(ValueError, match=message):
            apply_cuts(before, cuts)
        with pytest.raises(ValueError, match=message):
            cuts.of(name, before.get_parameter(name))
        assert_same(unchanged, before)
        assert list(tmp_path.iterdir()) == []


class TestTheList:
    @pytest.fixture
    def cuts(self) -> CutList:
        hook = HFConfigSyncHook(prune="intermediate_size")
        prune(small.llama(), hook, pruning_ratio=0.5)
        assert hook.cuts is not None
        return hook.cuts

    def test_says_what_is_cut(self, cuts: CutList) -> None:
        assert str(cuts) == "LlamaForCausalLM: intermediate_size 64 -> 32; 6 tensors are cut"
        edit = cuts.edits["model.layers.0.mlp.down_proj.weight"]
        assert edit.refits == ()
        assert edit.kept.keys() == {1}
        assert len(edit.kept[1]) == 32

    def test_is_small(self, cuts: CutList, tmp_path: Path) -> None:
        cuts.save(tmp_path / "cuts.safetensors")
        file = CutList.load(tmp_path / "cuts.safetensors")
        assert file.edits.keys() == cuts.edits.keys()
        positions = {id(p) for edit in file.edits.values() for p in edit.kept.values()}
        assert len(positions) == 2  # a layer's three weights lose the same channels

    def test_another_class_is_refused(self, cuts: CutList) -> None:
        bert = zoo.build("bert")
        message = f"for a LlamaForCausalLM, but this is a {type(bert).__name__}"
        with pytest.raises(UnsupportedModelError, match=message):
            apply_cuts(bert, cuts)

    def test_another_config_is_refused(self, cuts: CutList) -> None:
        with pytest.raises(UnsupportedModelError, match=r"with num_hidden_layers 2, .* has 3"):
            apply_cuts(small.llama(num_hidden_layers=3), cuts)

    def test_a_pruned_model_is_refused(self, cuts: CutList) -> None:
        pruned = apply_cuts(small.llama(), cuts)
        with pytest.raises(UnsupportedModelError, match=r"with intermediate_size 64, .* has 32"):
            apply_cuts(pruned, cuts)

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path) -> None:
        small.llama().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="expected a cut list"):
            CutList.load(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="cannot be read"):
            CutList.load(tmp_path / "config.json")

    def rewritten(self, file: Path, change: Any, checksum: bool = True) -> None:
        """Change the table and the tensors of a saved cut list; with the checksum of the result."""
        with safe_open(file, framework="pt") as opened:
            head = opened.metadata()
        tensors, table = load_file(file), json.loads(head["cut_list"])
        change(table, tensors)
        if checksum:
            head["sha256"] = cut_list._digest(table, tensors)
        save_file(tensors, file, {**head, "cut_list": json.dumps(table)})

    def test_a_file_that_was_changed_is_refused(self, cuts: CutList, tmp_path: Path) -> None:
        def other_epsilon(table: Any, tensors: Any) -> None:
            table["after"]["rms_norm_eps"] = 0.5

        def other_positions(table: Any, tensors: Any) -> None:
            tensors["0"] += 1

        file = tmp_path / "cuts.safetensors"
        for change in (other_epsilon, other_positions):
            cuts.save(file)
            self.rewritten(file, change, checksum=False)
            with pytest.raises(CheckpointError, match="it was changed after it was saved: its sha"):
                CutList.load(file)
            with pytest.raises(CheckpointError, match=r"Save it again: hook.cuts.save\(path\)$"):
                apply_cuts(small.llama(), file)

    def test_a_file_without_a_checksum_is_refused(self, cuts: CutList, tmp_path: Path) -> None:
        file = tmp_path / "cuts.safetensors"
        cuts.save(file)
        with safe_open(file, framework="pt") as opened:
            head = opened.metadata()
        del head["sha256"]
        save_file(load_file(file), file, head)
        with pytest.raises(CheckpointError, match=r"it has no checksum \(sha256\), which every cu"):
            CutList.load(file)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                lambda t, _: t.pop("after"),
                "expected an object of model, before, after, edi",
            ),
            (lambda t, _: t.update(edits=[]), "expected an object of model, before, after"),
            (
                lambda t, _: t["edits"].update(a=5),
                "a: expected a list of one cut",
            ),
            (
                lambda t, _: t["edits"].update(a=[{}]),
                "a: expected a list of one cut, dimension numbers with the positions that are kept",
            ),
            (
                lambda t, _: t["edits"].update(a=[{"keep": {"x": "0"}}]),
                "a: expected a list of one cut, dimension numbers",
            ),
            (
                lambda t, _: t["edits"].update(a=[{"keep": {"0": "9"}}]),
                "a: expected a list of one cut",
            ),
            (
                lambda _, p: p["0"].fill_(3),
                "whole numbers, 0 or more, increasing, without duplicates",
            ),
            (
                lambda _, p: p["0"].sub_(99),
                "whole numbers, 0 or more, increasing, without duplicates",
            ),
            (
                lambda _, p: p.update({"0": p["0"].float()}),
                "positions that are kept: a list of whole numbers",
            ),
            (
                lambda _, p: p.update({"0": p["0"][:0]}),
                "positions that are kept: a list of whole numbers",
            ),
            (lambda _, p: p["0"].add_(50), "it needs .* positions along dimension"),
            (
                lambda t, _: t["edits"].update(a=[{"keep": {"0": "0"}}]),
                "it cuts a, which the",
            ),
            (
                lambda t, _: t["edits"].update({"lm_head.weight": [{"keep": {"7": "0"}}]}),
                "it needs .* along dimension 7 of lm_head.weight",
            ),
        ],
    )
    def test_what_is_no_cut_list_of_the_model_is_refused(
        self, change: Any, expected: str, cuts: CutList, tmp_path: Path
    ) -> None:
        file, model = tmp_path / "cuts.safetensors", small.llama()
        cuts.save(file)
        self.rewritten(file, change)
        with pytest.raises((CheckpointError, UnsupportedModelError), match=expected):
            apply_cuts(model, file)
        assert_same(small.llama(), model)

    def test_nothing_pruned_is_no_list(self) -> None:
        hook = HFConfigSyncHook()
        assert hook.cuts is None

    def test_what_other_code_changed_is_not_known(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook(prune="intermediate_size")
        prune(model, hook, importance=tp.importance.RandomImportance(), pruning_ratio=0.5)
        for layer in model.model.layers:
            mlp = layer.mlp
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight = torch.nn.Parameter(linear.weight[:16].detach().clone())
                linear.out_features = 16
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :16].detach().clone())
            mlp.down_proj.in_features = 16
        assert hook.cuts is not None
        assert hook.sync().fields == {"intermediate_size": (32, 16)}
        assert hook.cuts is None
