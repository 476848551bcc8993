"""Wrong arguments of public functions: what is said at once, and which types do as well."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messages
import numpy as np
import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf

import tp_hf_config
from tp_hf_config import (
    CutList,
    HFConfigSyncHook,
    PipelineError,
    PruningCallback,
    allocate,
    apply_cuts,
    calibrate,
    check_checkpoint,
    drop_layers,
    export,
    optimizer_follows,
    plan,
    prunable,
    repair_checkpoint,
    save_sharded,
    supports,
    verify_checkpoint,
    verify_roundtrip,
)
from tp_hf_config.cli.main import main

M = small.llama(num_hidden_layers=4)
FOLDER = "no/such/folder"
NUMBER = ": expected a whole number"
SHARE = ": expected a share between 0 and 1"
A_MODEL = ": expected a Hugging Face model (or a module that contains one)"
LOAD = ". Load it first, with from_pretrained of its class (AutoModelForCausalLM, ...)"
A_PATH = ": expected the path of a folder or a file"
SAVE = ". Save it first: model.save_pretrained(folder)"
SWITCH = ": expected True or False"
MEASURED = ": expected what calibrate(model) returns"
TOKENIZER = hf.AutoTokenizer


def pruner(**arguments: Any) -> Any:
    arguments = {"importance": tp.importance.MagnitudeImportance(), **arguments}
    return tp.pruner.MetaPruner(M, None, **arguments, hooks=[HFConfigSyncHook(prune="inner")])


WRONG: list[tuple[Callable[[], Any], str]] = [
    # what a hook is told
    (lambda: HFConfigSyncHook(refit=True), f"refit=True{MEASURED} or None"),
    (lambda: HFConfigSyncHook(refit=M), f"refit=a LlamaForCausalLM{MEASURED} or None"),
    (lambda: HFConfigSyncHook(strict="yes"), f"strict='yes'{SWITCH}"),
    (lambda: HFConfigSyncHook(per_layer="differ"), f"per_layer='differ'{SWITCH}"),
    (lambda: HFConfigSyncHook(make_inputs={"input_ids": 1}), "make_inputs={'input_ids': 1}: expec"),
    (lambda: HFConfigSyncHook(shard=M), "shard=a LlamaForCausalLM: expected a function of"),
    (lambda: HFConfigSyncHook().register(M), "pruner=a LlamaForCausalLM: expected a pruner of"),
    (lambda: HFConfigSyncHook().register(M), "pruner=a LlamaForCausalLM: expected a pruner of"),
    # widths and ratios
    (lambda: HFConfigSyncHook(ratios=[0.2]), "ratios=[0.2]: expected a dict such as {'name': 0"),
    (lambda: plan(M, ratios=[("hidden_size", 0.2)]), "ratios=[('hidden_size', 0.2)]: expected a"),
    (lambda: plan(M, ratios={"hidden_size": "0.2"}), f"ratios['hidden_size']='0.2'{SHARE}. Writ"),
    (lambda: plan(M, ratios={"hidden_size": 20}), f"ratios['hidden_size']=20{SHARE} (20 % is 0.2"),
    (lambda: plan(M, ratios={3: 0.2}), "ratios (a key)=3: expected a text"),
    (lambda: plan(M, pruning_ratio="0.2"), f"pruning_ratio='0.2'{SHARE} or None. Write 0.2, wit"),
    (lambda: plan(M, pruning_ratio=True), f"pruning_ratio=True{SHARE} or None"),
    (lambda: plan(M, pruning_ratio=float("nan")), f"pruning_ratio=nan{SHARE}"),
    (lambda: plan(M, target_params="0.8"), "target_params='0.8': expected a number above 0 or N"),
    (lambda: plan(M, target_params=-5), "target_params=-5: expected a number above 0 or None"),
    (lambda: plan(M, target_params=True), "target_params=True: expected a number above 0 or Non"),
    (lambda: plan(M, prune=3), "prune=3: expected a text or a list such as ['hidden_size'] or N"),
    (lambda: plan(M, prune=["hidden_size", 3]), "prune[1]=3: expected a text"),
    (lambda: plan(M, gqa="all", pruning_ratio=0.2), "gqa='all': expected 'query' or 'group' or "),
    (lambda: plan(M, iterative_steps=0), f"iterative_steps=0{NUMBER}, 1 or more"),
    (lambda: plan(M, iterative_steps=2.0), f"iterative_steps=2.0{NUMBER}, 1 or more. Write 2"),
    (lambda: plan(M, round_to="8"), f"round_to='8'{NUMBER}, 1 or more or None. Write 8, without"),
    (lambda: plan(M, prune_num_heads=0.25), f"prune_num_heads=0.25{SWITCH} or None"),
    (lambda: plan(M, iterative_pruning_ratio_scheduler=[0.1]), "iterative_pruning_ratio_schedul"),
    (lambda: pruner(pruning_ratio="0.5"), f"pruning_ratio='0.5'{SHARE}"),
    (lambda: pruner(ignored_layers=M.lm_head), "ignored_layers=a Linear: expected"),
    (lambda: pruner(num_heads=4), "num_heads=4: expected a dict"),
    (lambda: pruner(pruning_ratio_dict={M.lm_head: 5}), "pruning_ratio_dict[a Line"),
    (lambda: pruner(iterative_steps="2"), "iterative_steps='2': expected a whole num"),
    (lambda: pruner(importance=True), "importance=True: expected a function"),
    # a model
    (lambda: plan(hf.LlamaForCausalLM), f"model_or_config=the class LlamaForCausalLM{A_MODEL} or "),
    (lambda: plan(FOLDER), f"model_or_config='no/such/folder'{A_MODEL} or a config{LOAD}"),
    (lambda: prunable(Path(FOLDER)), "model_or_config=PosixPath('no/such/folder'): expected a Hug"),
    (lambda: prunable(None), f"model_or_config=None{A_MODEL} or a config"),
    (lambda: prunable(M.config, model_class="LlamaForCausalLM"), "model_class='LlamaForCausalLM"),
    (lambda: prunable(M.config, model_class=M), "model_class=a LlamaForCausalLM: expected a "),
    (lambda: supports({}), f"source={{}}{A_MODEL} or a config"),
    (lambda: supports(M, seed="a"), f"seed='a'{NUMBER}"),
    (lambda: calibrate(FOLDER), f"model='no/such/folder'{A_MODEL}{LOAD}"),
    (lambda: calibrate(M, 3), "data=3: expected batches (a list, a DataLoader) or texts"),
    (lambda: calibrate(M, M), "data=a LlamaForCausalLM: expected batches"),
    (lambda: calibrate(M, tokenizer=FOLDER), "tokenizer='no/such/folder': expected a tokenizer"),
    (lambda: calibrate(M, tokenizer=TOKENIZER), "tokenizer=the class AutoTokenizer: expected"),
    (lambda: calibrate(M, "text", tokens="12k"), f"tokens='12k'{NUMBER}, 1 or more"),
    (lambda: calibrate(M, "text", max_memory="2GB"), f"max_memory='2GB'{NUMBER}, 1 or more or No"),
    (lambda: calibrate(M, "text", ridge=True), "ridge=True: expected a number or None"),
    (lambda: allocate(M, None, target_params=0.8), f"calibration=None{MEASURED}"),
    (lambda: verify_roundtrip(FOLDER, {}), f"model='no/such/folder'{A_MODEL}{LOAD}"),
    (lambda: verify_roundtrip(M, torch.ones(2)), "inputs=tensor([1., 1.]): expected a dict such"),
    (lambda: save_sharded(FOLDER, FOLDER), f"model='no/such/folder'{A_MODEL}{LOAD}"),
    (lambda: optimizer_follows(M, M), "optimizer=a LlamaForCausalLM: expected an optimizer "),
    # layers
    (lambda: drop_layers(M, [1.0]), f"layers[0]=1.0{NUMBER}. Write 1"),
    (lambda: drop_layers(M, [True]), f"layers[0]=True{NUMBER}"),
    (lambda: drop_layers(M, ["1"]), f"layers[0]='1'{NUMBER}. Write 1, without quotes"),
    (lambda: drop_layers(M, "1"), "layers='1': expected a list such as [2] or None"),
    (lambda: drop_layers(M, 1), "layers=1: expected a list such as [2] or None. Write [1]"),
    (lambda: drop_layers(M, {1: 2}), "layers={1: 2}: expected a list such as [2] or None"),
    (lambda: drop_layers(M, torch.tensor([True])), f"layers[0]=tensor(True){NUMBER}"),
    (lambda: drop_layers(M, [1, 1]), "layers=[1, 1] names layer 1 twice"),
    (lambda: drop_layers(M, [-1]), "layers=[-1] names layer -1: model.layers has layers 0 to 3"),
    (lambda: drop_layers(M, count="2"), f"count='2'{NUMBER}, 1 or more or None. Write 2, without"),
    (lambda: drop_layers(M, [1], which=0), "which=0: expected a text or None"),
    # folders
    (lambda: check_checkpoint(M), f"folder=a LlamaForCausalLM{A_PATH}{SAVE}"),
    (lambda: check_checkpoint(None), f"folder=None{A_PATH}"),
    (lambda: check_checkpoint(""), f"folder=''{A_PATH}"),
    (lambda: check_checkpoint(FOLDER, trust_remote_code="no"), f"trust_remote_code='no'{SWITCH}"),
    (lambda: repair_checkpoint(FOLDER, given=["head_dim=4"]), "given=['head_dim=4']: expected a d"),
    (lambda: repair_checkpoint(FOLDER, given={"head_dim": "4"}), f"given['head_dim']='4'{NUMBER}"),
    (lambda: verify_checkpoint(FOLDER, M), f"against=a LlamaForCausalLM{A_PATH} or None{SAVE}"),
    (lambda: export(3, FOLDER, to="gguf"), f"model_or_folder=3{A_MODEL} or the path of a folder"),
    (lambda: export(M, FOLDER, to="onnx"), "to='onnx': expected 'padded' or 'decilm' or 'gguf'"),
    (lambda: apply_cuts(M, {}), "cuts={}: expected a CutList (hook.cuts) or the path of a folder"),
    (lambda: CutList.load(3), f"path=3{A_PATH}"),
    # training
    (lambda: PruningCallback(every="100"), f"every='100'{NUMBER} or None. Write 100, without quot"),
    (lambda: PruningCallback(at=100), "at=100: expected a list such as [2]. Write [100]"),
    (lambda: PruningCallback(M, every=1), "build=a LlamaForCausalLM: expected a function or None"),
    (lambda: PruningCallback(every=1, pruning_ratio="a"), f"pruning_ratio='a'{SHARE}"),
    (lambda: PruningCallback(every=1, ratios=[0.2]), "ratios=[0.2]: expected a dict such as"),
    (lambda: PruningCallback(every=1, prunning_ratio=0.2), "no pruner takes prunning_ratio= (did "),
]  # fmt: skip


@pytest.mark.parametrize(("call", "expected"), WRONG, ids=[text[:50] for _, text in WRONG])
def test_what_is_said(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).startswith(expected)


def test_scalars_of_numpy_and_torch_do_as_well() -> None:
    widths = ["hidden_size", "intermediate_size"]
    before = plan(M, prune=widths, pruning_ratio=0.25, iterative_steps=2, ratios={widths[0]: 0.5})
    for ratio, steps, half in (
        (np.float32(0.25), np.int64(2), np.float64(0.5)),
        (torch.tensor(0.25), torch.tensor(2), torch.tensor(0.5)),
        (np.array(0.25), np.uint8(2), np.array(0.5)),
    ):
        ratios = {widths[0]: half}
        again = plan(M, prune=widths, pruning_ratio=ratio, iterative_steps=steps, ratios=ratios)
        assert again.settings == before.settings
        assert str(again) == str(before)


@pytest.mark.parametrize(
    "layers",
    [[1, 2], (2, 1), range(1, 3), {1, 2}, np.array([1, 2]), torch.tensor([1, 2]), iter([1, 2])],
    ids=lambda layers: type(layers).__name__,
)
def test_layers_by_any_list_of_whole_numbers(layers: Any) -> None:
    model = small.llama(num_hidden_layers=4)
    assert drop_layers(model, layers).dropped == (1, 2)


def test_a_pruner_s_own_arguments_are_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"^pruning_ratio='0.5': expected a share between 0 and 1"):
        tp.pruner.MetaPruner(
            M,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio="0.5",
            hooks=[HFConfigSyncHook()],
        )


OPTION = re.compile(r"(?<![\w-])--[a-z]")
OF_THE_COMMAND = {  # what is said of a job, which only the command makes
    "prune",
    "text",
}


def test_python_is_answered_in_python() -> None:
    """No message names an option of the command line, unless it is a whole command."""
    found = []
    for path in sorted(messages.PACKAGE.rglob("*.py")):
        if path.parent.name == "cli" or path.stem in OF_THE_COMMAND:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = [node for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))]
        notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = {id(part) for node in said for part in ast.walk(node) if part is not node}
        for node in said:
            text = ast.unparse(node)
            commands = ("tp-hf-config", "pip install", "llama-", "in the shell", "or --given")
            if id(node) not in notes | inside and OPTION.search(text):
                found += [] if any(word in text for word in commands) else [(path.name, text)]
    assert found == []


def test_the_same_message_names_options_in_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    for place in (folder, out):
        small.llama().save_pretrained(place)
    with pytest.raises(PipelineError) as raised:
        export(folder, out, to="padded")
    text = f"{out}: is not empty. Choose another folder, or add "
    assert str(raised.value) == f"{text}overwrite=True to replace it."
    assert main(["export", str(folder), "--to", "padded", "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"export: {text}--overwrite to replace it.\n")


def test_every_public_function_checks_its_arguments() -> None:
    functions = {
        name: getattr(tp_hf_config, name)
        for name in tp_hf_config.__all__
        if inspect.isfunction(getattr(tp_hf_config, name))
    }
    unchecked = [name for name, function in functions.items() if not hasattr(function, "kinds")]
    assert unchecked == []
