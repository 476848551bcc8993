"""Saved, loaded in a fresh process and run: the same bits, or how far they are apart."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import folders
import pytest
import small
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from shell import shell
from torch import nn

from tp_hf_config import (
    CheckpointError,
    UnsupportedModelError,
    verify_checkpoint,
    verify_roundtrip,
)


def test_a_model_that_comes_back_the_same():
    model = tiny.build("t5").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = verify_roundtrip(model, tiny.inputs(model))
    assert (report.same, report.loading, report.differences, report.error) == (True, (), (), None)
    assert report.outputs == ("logits", "encoder_last_hidden_state")
    assert str(report) == (
        "T5ForConditionalGeneration: same outputs as the live model "
        "(T5ForConditionalGeneration, fresh process)"
    )
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_whose_config_does_not_follow():
    model = tiny.build("bert-cls")
    model.config.intermediate_size = 96
    report = verify_roundtrip(model, tiny.inputs(model))
    assert not report.same
    assert report.error is not None
    assert report.error.startswith("RuntimeError: ")
    assert "not the same as the live model" in str(report)


def test_differences_are_quantified():
    model = tiny.build("qwen2")
    model.config.rms_norm_eps = 0.1  # the live norms keep theirs
    report = verify_roundtrip(model, tiny.inputs(model))
    assert not report.same
    (difference,) = report.differences
    assert (difference.output, difference.of) == ("logits", 2 * 7 * 99)
    assert 0 < difference.elements <= difference.of
    assert difference.largest is not None
    assert 0 < difference.largest < 10
    assert "of 1,386 numbers differ, by at most " in str(report)
    assert json.loads(json.dumps(report.to_dict()))["differences"][0]["output"] == "logits"


class OwnModel(hf.BertModel):
    """A class that only this module has."""


def test_a_class_of_another_module():
    model = OwnModel(hf.BertConfig(**tiny._SIZES)).eval()
    report = verify_roundtrip(model, tiny.inputs(model))
    assert (report.same, report.error, report.model) == (True, None, "OwnModel")


class Killed(hf.BertModel):
    """A class whose loading takes all memory that there is."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), cls.number)

    number = signal.SIGKILL


class Crashing(Killed):
    number = signal.SIGABRT


@pytest.mark.parametrize(
    ("model_class", "said"),
    [
        (Killed, "the fresh process was killed (SIGKILL), most often because memory ran out"),
        (Crashing, "the fresh process was ended by signal 6 (Aborted): "),
    ],
)
def test_a_process_that_a_signal_ends(model_class: Any, said: str):
    model = model_class(hf.BertConfig(**tiny._SIZES)).eval()
    report = verify_roundtrip(model, tiny.inputs(model))
    assert not report.same
    assert report.error is not None
    assert report.error.startswith(said)


def own_class(name: str, body: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class in a module of this name, which a fresh process finds as this one does."""
    lines = ["import os", "import transformers", "class Own(transformers.BertModel):"]
    (place / f"{name}.py").write_text("\n    ".join(["\n".join(lines), *body.splitlines()]))
    monkeypatch.syspath_prepend(place)
    found = importlib.import_module(name).Own
    monkeypatch.delitem(sys.modules, name)
    return found


ENDING = """
@classmethod
def from_pretrained(cls, *arguments, **options):
    super().from_pretrained(*arguments, **options)
    os._exit(3)
"""


@pytest.mark.usefixtures("started_as_for_users")
def test_a_progress_bar_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model_class = own_class("ending", ENDING, tmp_path, monkeypatch)
    model = model_class(hf.BertConfig(**tiny._SIZES)).eval()
    report = verify_roundtrip(model, tiny.inputs(model))
    assert report.error is not None
    assert report.error.startswith("the fresh process ended with: ")
    assert "it/s" not in report.error


@pytest.mark.usefixtures("started_as_for_users")
def test_a_module_that_has_the_name_of_one_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model_class = own_class("solving", "pass", tmp_path, monkeypatch)
    model = model_class(hf.BertConfig(**tiny._SIZES)).eval()
    report = verify_roundtrip(model, tiny.inputs(model))
    assert (report.same, report.error, report.model) == (True, None, "Own")


def test_no_hugging_face_model():
    with pytest.raises(UnsupportedModelError, match=r"contains no transformers\.PreTrainedModel"):
        verify_roundtrip(nn.Linear(2, 2), {})


def test_a_folder_loads_and_runs(tmp_path: Path):
    folder = folders.saved("t5", tmp_path)
    report = verify_checkpoint(folder)
    assert (report.same, report.error, report.against) == (True, None, None)
    assert report.outputs == ("logits", "encoder_last_hidden_state")
    assert str(report) == f"{folder}: loads and runs (T5ForConditionalGeneration, fresh process)"


def test_a_folder_that_is_not_sound_does_not_load(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    report = verify_checkpoint(folder)
    assert not report.same
    assert report.error is not None
    assert report.error.startswith("RuntimeError: ")
    assert str(report).startswith(f"{folder}: does not load or run (LlamaForCausalLM, fresh proces")


def test_a_folder_of_which_nothing_can_be_told(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), architectures=None)
    with pytest.raises(CheckpointError, match=r"config\.json names no class"):
        verify_checkpoint(folder)


def test_the_command_against_itself_and_against_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = folders.saved("vit", tmp_path / "a"), folders.saved("vit", tmp_path / "b")
    code, out, _ = shell(capsys, "verify", one, other)
    assert code == 0
    assert out == f"{one}: same outputs as {other} (ViTForImageClassification, fresh process)\n"
    tensors = load_file(other / "model.safetensors")
    tensors["classifier.bias"] += 1.0
    save_file(tensors, other / "model.safetensors")
    code, out, _ = shell(capsys, "verify", one, other)
    assert code == 1
    head, line = out.splitlines()
    assert head == f"{one}: not the same as {other} (ViTForImageClassification, fresh process)"
    assert line.startswith("  logits: 5 of 5 numbers differ, by at most 1 (")


def test_folders_of_other_widths_and_of_another_class_are_not_the_same(tmp_path: Path):
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    llama, bert = folders.saved("llama", places[0]), folders.saved("bert", places[2])
    small.llama(intermediate_size=48).save_pretrained(places[1])
    report = verify_checkpoint(llama, places[1])
    assert (report.same, report.error, report.against) == (False, None, str(places[1]))
    assert [str(one) for one in report.differences] == ["logits: different shapes or dtypes"]
    assert not verify_checkpoint(llama, bert).same


# What cannot be compared as it is


def with_tensor(folder: Path, name: str, index: Any, value: float) -> Path:
    """Put a value into a tensor of a folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def two_folders(place: Path) -> tuple[Path, Path]:
    """The same Llama in two folders."""
    (place / "b").mkdir()
    return folders.saved("llama", place), folders.saved("llama", place / "b")


def test_numbers_that_are_all_nan_prove_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, other = two_folders(tmp_path)
    with_tensor(one, "model.norm.weight", slice(None), float("nan"))
    assert shell(capsys, "verify", one)[:2] == (
        1,
        f"{one}: runs, but an output has no finite number (LlamaForCausalLM, fresh process)\n"
        "  note: every number of logits is NaN or infinite\n",
    )
    report = verify_checkpoint(one, one)
    assert (report.same, report.differences) == (False, ())
    assert report.notes == ("every number of logits is NaN or infinite",)
    report = verify_checkpoint(other, one)
    assert report.notes == (f"every number of logits is NaN or infinite in {one}",)
    (difference,) = report.differences
    assert str(difference) == "logits: 792 of 792 numbers differ, some by NaN or infinity"


def test_a_live_model_of_which_every_number_is_nan():
    model = tiny.build("qwen2")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    report = verify_roundtrip(model, tiny.inputs(model))
    assert (report.same, report.error, report.differences) == (False, None, ())
    assert report.notes == ("every number of logits is NaN or infinite",)


def test_numbers_that_json_has_not(tmp_path: Path):
    """One token is NaN in one folder: the others are compared, and the same."""
    one, other = two_folders(tmp_path)
    with_tensor(other, "lm_head.weight", 5, float("nan"))
    report = verify_checkpoint(one, other)
    assert (report.same, report.notes) == (False, ())
    assert [str(one) for one in report.differences] == [
        "logits: 8 of 792 numbers differ, some by NaN or infinity"
    ]
    text = json.dumps(report.to_dict(), allow_nan=False)
    (found,) = json.loads(text)["differences"]
    assert found == {
        "output": "logits",
        "elements": 8,
        "of": 792,
        "largest": None,
        "relative": None,
        "dtypes": None,
    }


def test_nan_in_both_hides_no_distance(tmp_path: Path):
    one, other = two_folders(tmp_path)
    for folder in (one, other):
        with_tensor(folder, "lm_head.weight", 5, float("nan"))
    assert verify_checkpoint(one, other).same
    with_tensor(other, "lm_head.weight", 6, 0.0)
    (difference,) = verify_checkpoint(one, other).differences
    assert difference.elements == 8
    assert difference.largest is not None
    assert difference.relative is not None
    assert 0 < difference.relative < 2


def test_how_far_apart_two_types_compute(tmp_path: Path):
    one = folders.saved("llama", tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(one).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    report = verify_checkpoint(one, tmp_path / "b")
    assert not report.same
    (difference,) = report.differences
    assert difference.dtypes == ("float32", "bfloat16")
    assert difference.of == 792
    assert 0 < difference.elements <= 792
    assert difference.largest is not None
    assert difference.relative is not None
    assert 0 < difference.relative < 0.05
    assert str(difference) == (
        f"logits: {difference.elements:,} of 792 numbers differ, by at most "
        f"{difference.largest:.3g} ({difference.relative:.3g} of the largest); "
        "its dtype is float32, that of the reference bfloat16"
    )
    assert json.loads(json.dumps(report.to_dict()))["differences"][0]["dtypes"] == [
        "float32",
        "bfloat16",
    ]
    (back,) = verify_checkpoint(tmp_path / "b", one).differences
    assert back.dtypes == ("bfloat16", "float32")
