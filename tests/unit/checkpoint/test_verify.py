"""Saved, loaded in a fresh process and run: the same bits, or how far they are apart."""

from __future__ import annotations

import argparse
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
from torch import nn

from tp_hf_config import (
    CheckpointError,
    UnsupportedModelError,
    verify_checkpoint,
    verify_roundtrip,
)
from tp_hf_config.cli import verify as command


@pytest.mark.usefixtures("started_as_for_users")
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
        (Killed, "the fresh process was killed (SIGKILL), most often for want of memory"),
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


@pytest.mark.parametrize("start", ["started_as_for_users", "_start_at_once"])
def test_a_module_that_has_the_name_of_one_of_the_library(
    start: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    request.getfixturevalue(start)
    model_class = own_class("heads", "pass", tmp_path, monkeypatch)
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


def test_a_folder_that_is_not_sound_is_not_run(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    report = verify_checkpoint(folder)
    assert not report.same
    assert report.loading == ("intermediate_size says 80, the weights of layers 0-1 hold 96",)
    assert report.error == "it is not sound"


def test_a_folder_of_which_nothing_can_be_told(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), architectures=None)
    with pytest.raises(CheckpointError, match=r"config\.json names no class"):
        verify_checkpoint(folder)


def command_of(*argv: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args(argv))


def test_the_command_against_itself_and_against_another_folder(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = folders.saved("vit", tmp_path / "a"), folders.saved("vit", tmp_path / "b")
    outcome = command_of(str(one), str(other))
    assert outcome.code == 0
    assert outcome.text == (
        f"{one}: same outputs as {other} (ViTForImageClassification, fresh process)"
    )
    tensors = load_file(other / "model.safetensors")
    tensors["classifier.bias"] += 1.0
    save_file(tensors, other / "model.safetensors")
    outcome = command_of(str(one), "--against", str(other))
    assert outcome.code == 1
    head, line = outcome.text.splitlines()
    assert head == f"{one}: not the same as {other} (ViTForImageClassification, fresh process)"
    assert line.startswith("  logits: 5 of 5 numbers differ, by at most 1 (")


def test_what_two_folders_have_not_in_common_is_said(tmp_path: Path):
    """Of one class and other widths: how far apart; of another class: that it is one."""
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
    llama, bert = folders.saved("llama", places[0]), folders.saved("bert", places[2])
    small.llama(intermediate_size=48).save_pretrained(places[1])
    report = verify_checkpoint(llama, places[1])
    assert (report.same, report.error, report.against) == (False, None, str(places[1]))
    (note,) = report.notes
    assert note.startswith("config.json differs: ")
    assert "intermediate_size 96, there 48" in note
    assert [str(one) for one in report.differences] == ["logits: another shape or type"]
    report = verify_checkpoint(llama, bert)
    assert not report.same
    assert report.notes[0] == f"{bert} is of another class: BertForSequenceClassification"
