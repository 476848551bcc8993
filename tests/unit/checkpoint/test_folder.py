"""Folders from anywhere: cut off, lying, absurd or meant to harm; a clear answer to each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import folders
import hostile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from tp_hf_config import CheckpointError, check_checkpoint, repair_checkpoint
from tp_hf_config.checkpoint import folder as folder_module

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REFUSED = "safetensors refuses it: Error while deserializing header"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.saved("llama", tmp_path)


def refused(folder: Path, expected: str) -> None:
    """Not sound, with this as its first cause; not repaired; and nothing in the folder changed."""
    before = folders.files(folder)
    report = check_checkpoint(folder)
    assert report.sound is False
    assert expected in report.causes[0].text, report.causes[0].text
    with pytest.raises(CheckpointError):
        repair_checkpoint(folder)
    assert folders.files(folder) == before


# Weights files


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (5, "header too small"),
        (100, "invalid header length"),
        (-40, "incomplete metadata, file not fully covered"),
    ],
)
def test_a_file_that_is_cut_off(cut: int, expected: str, folder: Path):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:cut])
    refused(folder, f"model.safetensors: {REFUSED}: {expected}")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"{", "invalid JSON in header"),
        (b"[" * 100_000, "invalid JSON in header"),
        (b'{"a": {"dtype": "F32", "shape": [-1]}}', "invalid JSON in header"),
        (
            b'{"\\u001b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [1, 8]}}',
            "invalid offset for tensor",
        ),
    ],
)
def test_a_header_that_is_none(header: bytes, expected: str, folder: Path):
    folders.with_header(folder / WEIGHTS, header)
    refused(folder, f"{REFUSED}: {expected}")
    assert "\x1b" not in str(check_checkpoint(folder))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": [65]}, "invalid shape, data type, or offset for tensor"),
        ({"data_offsets": [10**12, 10**12 + 256]}, "invalid offset for tensor"),
        ({"data_offsets": [0, 256]}, "invalid offset for tensor"),
        ({"dtype": "F33"}, "invalid JSON in header: unknown variant"),
    ],
)
def test_a_header_that_lies(change: dict[str, Any], expected: str, folder: Path):
    header = folders.header_of(folder / WEIGHTS)
    folders.with_header(folder / WEIGHTS, {**header, NORM: {**header[NORM], **change}})
    refused(folder, f"{REFUSED}: {expected}")


def test_a_tensor_without_numbers(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "lm_head.weight": torch.zeros(99, 0)}, folder / WEIGHTS)
    refused(folder, "lm_head.weight has shape [99, 0], but the config builds [99, 64]")


def test_weights_that_do_not_fit_into_the_address_space(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def unmapped(*_: Any, **__: Any) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(folder_module, "safe_open", unmapped)
    report = check_checkpoint(folder)
    assert (report.sound, report.why_not) == (
        None,
        "model.safetensors cannot be mapped into memory: Cannot allocate memory (os error 12)",
    )


def test_data_that_belongs_to_no_tensor(folder: Path):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"0123")
    refused(folder, f"{REFUSED}: incomplete metadata, file not fully covered")


def test_a_hole_in_the_data(folder: Path):
    header = folders.header_of(folder / WEIGHTS)
    first = min(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"],
    )
    del header[first]
    folders.with_header(folder / WEIGHTS, header)
    refused(folder, f"{REFUSED}: invalid offset for tensor")


def test_a_folder_in_the_place_of_the_weights(folder: Path):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a file; expected the"):
        check_checkpoint(folder)


# Shards and their index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return folders.saved("llama", tmp_path, max_shard_size="100KB")


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return found


def test_a_shard_that_is_missing(sharded: Path):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refused(sharded, f"{gone.name} is missing; the index names it")
    assert len(check_checkpoint(sharded).causes) == 1


def test_a_shard_that_is_missing_and_a_config_that_is_refused(sharded: Path):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    folders.edit(sharded, hidden_size=66)
    report = check_checkpoint(sharded)
    assert [cause.kind for cause in report.causes] == ["files", "config"]


def test_a_shard_that_is_a_folder(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    refused(sharded, f"{shard.name} is not a file; the index names it")


@pytest.mark.parametrize(
    "name",
    ["../../secret.safetensors", "/etc/secret.safetensors", "..\\x.safetensors", "passwd", "a\0b"],
)
def test_an_index_that_names_files_outside(name: str, sharded: Path, tmp_path: Path):
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], tmp_path / "secret.safetensors")
    index = index_of(sharded)
    index["weight_map"][NORM] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "which is outside the folder and was not read")


def test_an_index_that_promises_what_is_not_there(sharded: Path):
    index = index_of(sharded)
    index["weight_map"]["model.extra.weight"] = index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "the index says that model.extra.weight is in ")


def test_shards_in_a_folder_inside(sharded: Path):
    """Transformers loads them from there."""
    index = index_of(sharded)
    (sharded / "parts").mkdir()
    for shard in sharded.glob("*.safetensors"):
        shard.rename(sharded / "parts" / shard.name)
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    assert check_checkpoint(sharded).sound is True
    folders.edit(sharded, intermediate_size=80)
    repair_checkpoint(sharded)
    assert folders.config_of(sharded)["intermediate_size"] == 96
    assert check_checkpoint(sharded).sound is True


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_weights_that_the_config_names(name: str, sharded: Path):
    """They are loaded, and not those under the usual name."""
    (sharded / INDEX).rename(sharded / "other.safetensors.index.json")
    save_file({"a": torch.ones(1)}, sharded / WEIGHTS, {"format": "pt"})
    if name.endswith("safetensors"):
        shards = sorted(sharded.glob("model-*.safetensors"))
        tensors = {k: v for shard in shards for k, v in load_file(shard).items()}
        save_file(tensors, sharded / name, {"format": "pt"})
    assert check_checkpoint(sharded).sound is False
    folders.edit(sharded, transformers_weights=name)
    assert check_checkpoint(sharded).sound is True


@pytest.mark.parametrize("name", ["gone.safetensors", "../model.safetensors", "model.bin", 5])
def test_weights_that_the_config_names_wrongly(name: Any, folder: Path, tmp_path: Path):
    shutil.copy(folder / WEIGHTS, tmp_path / WEIGHTS)
    shutil.copy(folder / WEIGHTS, folder / "model.bin")
    folders.edit(folder, transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"says that its weights are in .*; expected a safe"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(name: str, folder: Path):
    (folder / WEIGHTS).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(
        folder, f"{name} is a Git LFS pointer, not the weights. Download the weights: git lfs pull"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "model.safetensors.index.json is not JSON"),
        ("[]", "model.safetensors.index.json holds a list; expected an object"),
        ('"x"', "model.safetensors.index.json holds a str; expected an object"),
        ('{"weight_map": {}}', "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": {"a": 5}}', "its weight_map should give a file's name for every tensor"),
        ('{"weight_map": {"a": "b.bin"}}', "json has no metadata, which Transformers reads. Add "),
        ('\ufeff{"weight_map": {}}', "json is not JSON: Unexpected UTF-8 BOM (decode using utf-"),
        ("[" * 100_000, "model.safetensors.index.json is nested too deeply"),
    ],
)
def test_an_index_that_is_none(content: str, expected: str, sharded: Path):
    (sharded / INDEX).write_text(content, encoding="utf-8")
    refused(sharded, expected)


# config.json


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "config.json is not JSON"),
        ("[1, 2]", "config.json holds a list; expected an object"),
        ("null", "config.json holds a NoneType; expected an object"),
        ('"llama"', "config.json holds a str; expected an object"),
        ("[" * 100_000, "config.json is nested too deeply"),
        ('{"a": \xff}', "config.json is not JSON"),
        ("\xef\xbb\xbf{}", "config.json is not JSON: Unexpected UTF-8 BOM"),
        ("\xff\xfe{\0}\0", "config.json is not JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_config_that_is_none(content: str, expected: str, folder: Path):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, expected)


def test_a_config_that_is_a_folder(folder: Path):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    report = check_checkpoint(folder)
    assert [cause.text for cause in report.causes] == ["config.json is not a file"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": [64]}, "LlamaConfig refuses config.json: "),
        ({"hidden_size": float("nan")}, "LlamaConfig refuses config.json: "),
        ({"hidden_size": -64}, "LlamaConfig refuses config.json: "),
        ({"hidden_size": 0}, ""),
        ({"num_hidden_layers": 5000}, "it asks for more than 4,264 modules, far more than the"),
        ({"rope_parameters": 7}, "LlamaConfig refuses config.json: "),
        ({"dtype": False}, "dtype is false, which is not a dtype of torch"),
    ],
)
def test_absurd_values(fields: dict[str, Any], expected: str, folder: Path):
    report = check_checkpoint(folders.edit(folder, **fields))
    assert report.sound is False
    assert expected in report.causes[0].text


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": 10**30}, "hidden_size is about 2**100, far larger than any size in the"),
        ({"intermediate_size": 2**40}, "intermediate_size is 1,099,511,627,776, far larger than"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, far larger than any"),
        ({"architectures": "LlamaForCausalLM"}, "config.json names no class"),
        ({"architectures": ["x" * 10_000]}, "has no class xxx"),
        ({"model_type": ["llama"], "architectures": [5]}, "config.json names no class"),
    ],
)
def test_what_is_not_tried(fields: dict[str, Any], why: str, folder: Path):
    report = check_checkpoint(folders.edit(folder, **fields))
    assert report.sound is None
    assert report.why_not is not None
    assert why in report.why_not
    assert len(str(report)) < 1000
    with pytest.raises(CheckpointError):
        repair_checkpoint(folder)


# Code


CODE = """
import pathlib
import transformers
pathlib.Path({mark!r}).write_text("run")
class OwnConfig(transformers.LlamaConfig):
    model_type = "own-llama"
class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_folder_is_only_run_when_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    folders.edit(
        folder,
        model_type="own-llama",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    for call in (check_checkpoint, repair_checkpoint):
        with pytest.raises(CheckpointError) as error:
            call(folder)
        assert str(error.value) == (
            f"{folder}: its class is code in the folder (auto_map in config.json), which is not "
            "run by default. Read the code, then pass trust_remote_code=True."
        )
    assert not mark.exists()
    report = check_checkpoint(folder, trust_remote_code=True)
    assert (report.sound, report.model) == (True, "OwnModel")
    assert report.notes == ("the folder's own code was run",)
    assert mark.exists()


def test_code_beside_a_class_of_transformers_is_not_run(folder: Path, tmp_path: Path):
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    folders.edit(folder, auto_map={"AutoConfig": "own.OwnConfig"})
    report = check_checkpoint(folder)
    assert report.sound is True
    assert report.notes == (
        "the folder contains model code, which was not run: the class of Transformers was used",
    )
    assert not (tmp_path / "mark").exists()


# Permissions


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    folders.edit(folder, intermediate_size=80)
    before = folders.files(folder)

    def denied(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")  # root may write everywhere

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", denied)
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            repair_checkpoint(folder)
    assert folders.files(folder) == before


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    report = check_checkpoint(folder)
    assert [cause.text for cause in report.causes] == [
        "model.safetensors cannot be read: Permission denied"
    ]


# Fuzzed: ``make fuzz`` does the same with more time and other seeds


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("kind", hostile.KINDS)
@given(data=st.data())
def test_folders_that_were_changed_anywhere(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    change, judge = hostile.KINDS[kind]
    folder = change(data, tmp_path_factory.mktemp("fuzz"))
    judge(folder)
    shutil.rmtree(folder)
