"""The config that weights need: found, written as one, never guessed, nothing lost on the way."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import folders
import pytest
import small
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from shell import shell

from tp_hf_config import (
    CheckpointError,
    check_checkpoint,
    repair_checkpoint,
    verify_checkpoint,
)
from tp_hf_config.checkpoint import check

BROKEN: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("llama", {"intermediate_size": 80}, {}),
    ("llama", {"num_hidden_layers": 3, "intermediate_size": 80}, {"num_hidden_layers": 2}),
    ("llama", {"num_attention_heads": 2}, {"head_dim": 16}),
    ("llama-tied", {"tie_word_embeddings": False, "hidden_size": 32}, {}),
    ("qwen3", {"head_dim": None}, {}),
    ("gpt2", {"n_embd": 32}, {}),
    ("gpt2", {"n_head": 3}, {"num_attention_heads": 4}),
    ("llama", {"hidden_size": "abc"}, {"hidden_size": 64}),
    ("bert", {"intermediate_size": 8, "vocab_size": 7}, {}),
    ("t5", {"num_decoder_layers": 3, "d_kv": 6}, {"num_heads": 4, "num_decoder_layers": 2}),
    ("mixtral", {"num_local_experts": 2, "intermediate_size": 99}, {}),
    ("swin", {"embed_dim": 8}, {}),
    ("vit", {"image_size": 64}, {"image_size": 32}),
]


def refused(folder: Path) -> CheckpointError:
    """Why a folder is not repaired; nothing in it changed."""
    before = folders.files(folder)
    with pytest.raises(CheckpointError) as error:
        repair_checkpoint(folder)
    assert folders.files(folder) == before
    return error.value


@pytest.mark.parametrize(("name", "fields", "given"), BROKEN)
def test_the_right_config_comes_back(
    name: str, fields: dict[str, Any], given: dict[str, int], tmp_path: Path
):
    folder = folders.saved(name, tmp_path)
    right, before = folders.config_of(folder), folders.files(folder)
    broken = (folders.edit(folder, **fields) / "config.json").read_bytes()
    report = repair_checkpoint(folder, given=given)
    assert folders.config_of(folder) == right
    assert report.written
    assert report.backup == "config.json.bak"
    assert {name for name, _ in report.fields.items()} >= {
        name for name, value in fields.items() if not isinstance(value, list)
    }
    after = folders.files(folder)
    assert after.pop("config.json.bak") == broken
    assert {k: v for k, v in after.items() if k != "config.json"} == {
        k: v for k, v in before.items() if k != "config.json"
    }
    assert report.after == check_checkpoint(folder)
    assert report.after is not None
    assert report.after.sound is True


def test_a_repaired_folder_computes_the_same_bits(tmp_path: Path):
    name = "bert"
    folder = folders.saved(name, tmp_path)
    expected = folders.logits(folder, name)
    folders.edit(folder, intermediate_size=80, hidden_size=32)
    repair_checkpoint(folder, given={"num_attention_heads": 4})
    assert torch.equal(folders.logits(folder, name), expected)


def test_only_what_changes_is_written(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80, own={"a": [1]})
    before = list(folders.config_of(folder).items())
    report = repair_checkpoint(folder)
    after = list(folders.config_of(folder).items())
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        (("intermediate_size", 80), ("intermediate_size", 96))
    ]
    assert report.difference.splitlines() == [
        "--- config.json",
        "+++ config.json (new)",
        "@@ -13,3 +13,3 @@",
        '   "initializer_range": 0.02,',
        '-  "intermediate_size": 80,',
        '+  "intermediate_size": 96,',
        '   "max_position_embeddings": 64,',
    ]
    assert str(report).startswith(
        f"{folder}: repaired\n  intermediate_size: 80 -> 96\n  the old config is in config.json.bak"
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["fields"] == {"intermediate_size": {"old": 80, "new": 96}}


def test_tensors_that_are_not_tied_are_untied_in_the_config(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), tie_word_embeddings=True)
    assert repair_checkpoint(folder).fields == {"tie_word_embeddings": (True, False)}
    assert check_checkpoint(folder).notes == ()


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="there a setting unties them")
def test_tensors_that_no_setting_unties(tmp_path: Path):
    """T5's config says that they are tied whatever config.json says: nobody promises a repair."""
    folder = folders.edit(folders.saved("t5", tmp_path), tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = folders.files(folder)
    text = (
        "the config ties lm_head.weight and shared.weight, which hold different numbers, and no "
        "setting of T5Config unties them"
    )
    found, report = check_checkpoint(folder), repair_checkpoint(folder)
    assert found.sound is True
    assert found.notes == (f"{text}; Transformers loads them untied",)
    assert (report.written, report.fields, report.notes) == (False, {}, (text,))
    assert report.after == found
    assert folders.files(folder) == before


@pytest.mark.parametrize(
    ("name", "fields", "undecided"),
    [
        ("bert", {"intermediate_size": 80}, ("num_attention_heads",)),
        ("llama", {}, ()),
        ("llama", {"intermediate_size": 80}, ()),
    ],
)
def test_a_dry_run_says_what_the_folder_will_be_like(
    name: str, fields: dict[str, Any], undecided: tuple[str, ...], tmp_path: Path
):
    folder = folders.edit(folders.saved(name, tmp_path), **fields)
    planned = repair_checkpoint(folder, dry_run=True)
    done = repair_checkpoint(folder)
    assert done.written is bool(fields)
    assert planned.undecided == done.undecided == undecided
    assert planned.after == done.after == check_checkpoint(folder)
    assert done.after is not None
    assert done.after.parameters > 0


def test_a_field_that_is_there_under_two_names(tmp_path: Path):
    """The class reads the alias."""
    folder = folders.edit(folders.saved("gpt2", tmp_path), hidden_size=32)
    assert folders.config_of(folder)["n_embd"] == 64
    assert not folders.loads(folder)
    report = check_checkpoint(folder)
    text = "hidden_size says 32, but the weights of layers 0-1 hold 64"
    assert [cause.text for cause in report.causes] == [text]
    assert repair_checkpoint(folder).fields == {"hidden_size": (32, 64)}
    assert folders.loads(folder)


def flat_folder(place: Path) -> Path:
    """A model of text and images whose config.json is in the form of the Hub's oldest ones.

    What the class keeps in ``text_config`` stands at the top, with values that are no defaults.
    """
    folder = folders.saved("qwen2_vl", place)
    data = folders.config_of(folder)
    text = data.pop("text_config")
    text |= {"rms_norm_eps": 0.001, "hidden_act": "gelu", "max_position_embeddings": 77}
    data = {**text, **data, "model_type": "qwen2_vl"}
    for derived in ("layer_types", "dtype", "tie_word_embeddings", "architectures"):
        data.pop(derived, None)
    data["architectures"] = ["Qwen2VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    return folder


def test_fields_above_the_config_that_they_belong_in_stay_there(tmp_path: Path):
    folder = flat_folder(tmp_path)
    right = folders.config_of(folder)
    read = hf.Qwen2VLConfig.from_pretrained(folder)
    assert check_checkpoint(folder).sound is True
    folders.edit(folder, intermediate_size=80, vocab_size=101)
    changed = {"intermediate_size": (80, 96), "vocab_size": (101, 99)}
    assert {cause.field for cause in check_checkpoint(folder).causes} == changed.keys()
    assert repair_checkpoint(folder).fields == changed
    assert folders.config_of(folder) == right
    again = hf.Qwen2VLConfig.from_pretrained(folder)
    assert again.to_dict() == read.to_dict()


def test_a_config_inside_that_is_not_there_is_written_whole(tmp_path: Path):
    """No field at the top stands for it: what it means by default goes along."""
    folder = folders.saved("llava", tmp_path)
    data = folders.config_of(folder)
    sizes = {"image_size": 336, "patch_size": 84, "num_hidden_layers": 24}
    vision = {**data["vision_config"], **sizes}
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig.from_dict({**data, "vision_config": vision})
    )
    model.save_pretrained(folder)
    del data["vision_config"]
    (folder / "config.json").write_text(json.dumps(data))
    default = hf.LlavaConfig.from_pretrained(folder).vision_config.to_dict()
    repair_checkpoint(folder, given={"vision_config.num_attention_heads": 4})
    found = hf.LlavaConfig.from_pretrained(folder)
    assert folders.loads(folder)
    kept = ("hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range")
    assert {name: found.vision_config.to_dict()[name] for name in kept} == {
        name: default[name] for name in kept
    }
    assert folders.config_of(folder)["text_config"] == data["text_config"]


def test_a_field_that_is_there_under_another_name_alone(tmp_path: Path):
    folder = folders.saved("gpt2", tmp_path)
    data = folders.config_of(folder)
    data["hidden_size"] = data.pop("n_embd")
    (folder / "config.json").write_text(json.dumps({**data, "hidden_size": 32}))
    fields = repair_checkpoint(folder, given={"num_attention_heads": 4}).fields
    assert fields == {"hidden_size": (32, 64)}
    assert folders.config_of(folder) == data


def under_other_names(place: Path) -> Path:
    """A GPT-2 whose config.json has the names that all configs have."""
    folder = folders.saved("gpt2", place)
    data = folders.config_of(folder)
    for other, own in hf.GPT2Config.attribute_map.items():
        if own in data and own != "n_positions":
            data[other] = data.pop(own)
    assert {"num_hidden_layers", "hidden_size", "num_attention_heads"} <= data.keys()
    (folder / "config.json").write_text(json.dumps({**data, "own": {"a": 1}}, indent=2) + "\n")
    return folder


@pytest.mark.parametrize("make", [under_other_names, flat_folder])
@pytest.mark.parametrize(
    ("field", "wrong", "right"), [("num_attention_heads", 3, 4), ("num_hidden_layers", 9, 2)]
)
def test_a_value_in_another_place_is_all_that_changes(
    make: Any, field: str, wrong: int, right: int, tmp_path: Path
):
    folder = make(tmp_path)
    before = folders.config_of(folder)
    folders.edit(folder, **{field: wrong})
    assert repair_checkpoint(folder, given={field: right}).fields == {field: (wrong, right)}
    assert folders.config_of(folder) == before


def test_a_given_field_that_no_shape_shows_takes_effect_under_its_alias(tmp_path: Path):
    folder = folders.edit(folders.saved("gpt2", tmp_path), num_attention_heads=2)
    repair_checkpoint(folder, given={"n_head": 4})
    assert hf.GPT2Config.from_pretrained(folder).n_head == 4


def test_a_number_of_layers_is_not_guessed(tmp_path: Path):
    error = refused(folders.edit(folders.saved("llama", tmp_path), num_hidden_layers=3))
    assert "tensors are missing from the weights; LlamaForCausalLM would initialise" in str(error)
    assert str(error).endswith(
        "If layers were removed, give the number that remains: given={'num_hidden_layers': ...} or "
        "--given num_hidden_layers=N. Nothing was written."
    )


def test_a_sound_folder_is_left_alone(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    before = folders.files(folder)
    report = repair_checkpoint(folder)
    assert (report.written, report.fields, report.difference) == (False, {}, "")
    assert str(report).endswith("config.json fits the weights; nothing to repair")
    assert folders.files(folder) == before


def test_a_dry_run_writes_nothing(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    before = folders.files(folder)
    report = repair_checkpoint(folder, dry_run=True)
    assert report.fields == {"intermediate_size": (80, 96)}
    assert not report.written
    assert "not written (dry run)" in str(report)
    assert folders.files(folder) == before
    assert not (tmp_path / "new").exists()


# What shapes do not decide


def test_heads_that_no_shape_decides_are_asked_for(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), num_attention_heads=2)
    error = refused(folder)
    assert error.candidates == (
        {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    )
    assert str(error).endswith(
        "No shape shows which one is right; choose one: given={'head_dim': 16} or --given "
        "head_dim=16. Nothing was written."
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hidden_act", "sliu", "sliu"),
        ("n_head", 3, "must be divisible by num_heads"),
        ("n_embd", 10**25, "far larger than any size in the weights"),
    ],
)
def test_what_the_class_refuses_is_to_be_corrected_by_hand(
    field: str, value: Any, says: str, tmp_path: Path
):
    name = "gpt2" if field.startswith("n_") else "llama"
    error = refused(folders.edit(folders.saved(name, tmp_path), **{field: value}))
    assert says in str(error)
    assert str(error).endswith("Nothing was written.")


def test_a_field_of_a_config_inside_can_be_said_in_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = folders.saved("llava", tmp_path)
    text = {**folders.config_of(folder)["text_config"], "num_attention_heads": 2}
    folders.edit(folder, text_config=text)
    with pytest.raises(CheckpointError, match=r" or --given text_config\.head_dim=16\. Nothing"):
        repair_checkpoint(folder)
    with pytest.raises(CheckpointError) as error:
        repair_checkpoint(folder, given={"num_attention_heads": 4})
    name = "text_config.num_attention_heads"
    assert (
        f"LlavaConfig has several fields num_attention_heads: use one of {name}, "
        f"vision_config.num_attention_heads, as in given={{'{name}': 4}} or --given {name}=4."
    ) in str(error.value)
    _, out, _ = shell(capsys, "repair", folder, "--given", f"{name}=4", "--json")
    assert json.loads(out)["fields"] == {name: {"old": 2, "new": 4}}


def test_a_size_that_is_no_width_is_not_made_up(tmp_path: Path):
    folder = folders.edit(folders.saved("vit", tmp_path), image_size=64)
    assert "no width of ViTConfig gives" in str(refused(folder))


def test_heads_that_stay_are_named(tmp_path: Path):
    folder = folders.edit(folders.saved("bert", tmp_path), intermediate_size=8)
    report = repair_checkpoint(folder)
    assert report.undecided == ("num_attention_heads",)
    assert "not changed, because no shape shows it: num_attention_heads" in str(report)


def test_a_given_field_that_the_class_has_not(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    with pytest.raises(CheckpointError) as error:
        repair_checkpoint(folder, given={"width": 3})
    assert (
        "LlamaConfig has no field width that sets a size: use one of head_dim, hidden_size, "
        "intermediate_size, num_attention_heads, num_key_value_heads, vocab_size"
    ) in str(error.value)


def test_layers_of_different_widths_are_told_apart(tmp_path: Path):
    folder = folders.with_a_narrow_layer(tmp_path)
    with pytest.raises(CheckpointError, match="64 in layers 0-2, 4-5; 40 in layer 3"):
        repair_checkpoint(folder)


# Written as one, or not at all


def test_backups_are_numbered(tmp_path: Path):
    folder = folders.saved("llama", tmp_path)
    names = []
    for size in (80, 81, 82):
        folders.edit(folder, intermediate_size=size)
        names.append(repair_checkpoint(folder).backup)
    assert names == ["config.json.bak", "config.json.bak.1", "config.json.bak.2"]
    for size, name in zip((80, 81, 82), names, strict=True):
        assert json.loads((folder / str(name)).read_text())["intermediate_size"] == size


def _failing(original: Any, nth: int, error: BaseException, late: bool) -> Any:
    """A function whose n-th call fails, before or after it has done its work."""
    calls = iter(range(nth, -1, -1))

    def call(*args: Any, **options: Any) -> Any:
        now = next(calls, None) == 0
        if now and not late:
            raise error
        result = original(*args, **options)
        if now:
            raise error
        return result

    return call


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_a_full_disk_or_an_interrupt_at_any_moment(
    name: str, error: BaseException, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Opened and flushed: two files, each with its folder; renamed: two."""
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    old, text = folders.files(folder), b"new"
    new = {**old, "config.json": text, "config.json.bak": old["config.json"]}
    failed = 0
    for nth in range({"open": 4, "fsync": 4, "replace": 2}[name]):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _failing(getattr(os, name), nth, error, late))
            try:
                check._replace_config(folder, text)
            except (OSError, KeyboardInterrupt):
                failed += 1
                assert folders.files(folder) in (old, new)
            else:
                assert folders.files(folder) == new  # a folder that cannot be flushed is no failure
        (folder / "config.json.bak").unlink(missing_ok=True)
        (folder / "config.json").write_bytes(old["config.json"])
    of_folders = {"open": 2, "fsync": 2, "replace": 0}[name] * isinstance(error, OSError)
    assert failed == nth + 1 - of_folders


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError) as error:
        repair_checkpoint(folder)
    assert str(error.value) == (
        f"{folder} cannot be written: No space left on device. It was not changed. Copy the "
        "folder, and repair the copy."
    )


def test_what_a_killed_repair_left_is_in_nobodys_way(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    (folder / ".config.json.part").write_text("half")
    (folder / ".config.json.bak.part").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("untouched")
    repair_checkpoint(folder)
    assert folders.config_of(folder)["intermediate_size"] == 96
    assert (tmp_path / "victim").read_text() == "untouched"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "config.json.bak",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    blob = tmp_path / "blob"
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to(blob)
    before = blob.read_bytes()
    repair_checkpoint(folder)
    assert not (folder / "config.json").is_symlink()
    assert blob.read_bytes() == before
    assert (folder / "config.json.bak").read_bytes() == before
    assert not (folder / "config.json.bak").is_symlink()
    assert folders.config_of(folder)["intermediate_size"] == 96


def test_a_link_in_the_place_of_the_backup_is_not_written_through(tmp_path: Path):
    folder = folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    (folder / "config.json.bak").symlink_to(tmp_path / "nowhere")
    assert repair_checkpoint(folder).backup == "config.json.bak.1"
    assert not (tmp_path / "nowhere").exists()


# The command


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No shell stands before the Python functions."""
    folders.edit(folders.saved("llama", tmp_path), intermediate_size=80)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = repair_checkpoint(Path("~/model"))
    assert (report.folder, report.fields) == (
        str(tmp_path / "model"),
        {"intermediate_size": (80, 96)},
    )
    assert check_checkpoint("~/model").folder == str(tmp_path / "model")
    assert verify_checkpoint("~/model", "~/model").against == str(tmp_path / "model")
    assert not (tmp_path / "~").exists()


def test_a_home_folder_that_nobody_has(tmp_path: Path):
    folder, nobody = folders.saved("llama", tmp_path), "~nobody-of-this-name/x"
    message = f"{nobody}: this home folder does not exist"
    for call in (
        lambda: check_checkpoint(nobody),
        lambda: repair_checkpoint(nobody),
        lambda: verify_checkpoint(folder, nobody),
    ):
        with pytest.raises(CheckpointError) as error:
            call()
        assert str(error.value) == message


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = folders.edit(folders.saved("llama", tmp_path), num_attention_heads=2)
    typed = ("--given", "head_dim=16", "--dry-run", "--json")
    code, out, _ = shell(capsys, "repair", folder, *typed)
    assert (code, json.loads(out)["written"]) == (0, False)
    code, out, _ = shell(capsys, "repair", folder, "--given", "num_attention_heads=4")
    assert code == 0
    assert out.startswith(f"{folder}: repaired\n  num_attention_heads: 2 -> 4")
    assert folders.config_of(folder)["num_attention_heads"] == 4
