"""Rotary embeddings in config.json: what Transformers 4 reads stands beside what 5 writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import model_folders
import pytest
import small
import tiny
import torch
import transformers as hf
from shell import shell

from tp_hf_config import check_checkpoint, repair_checkpoint
from tp_hf_config.checkpoint import loading
from tp_hf_config.pipeline.output import save_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
ONLY_5 = pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="Transformers 4 has no rope_parameters to compare with"
)


def loaded(folder: Path) -> dict[str, Any]:
    return hf.AutoConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize(
    ("name", "rope", "added"),
    [
        ("llama", {}, {"rope_theta": 500000.0}),
        ("llama", LLAMA3, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
        (
            "qwen2_vl",
            MROPE,
            {"text_config.rope_theta": 500000.0, "text_config.rope_scaling": MROPE},
        ),
    ],
)
def test_what_stands_in_one_place_is_written_beside_it(
    name: str, rope: dict[str, Any], added: dict[str, Any], tmp_path: Path
):
    folder = folders.of_transformers_5(folders.saved(name, tmp_path), **rope)
    before, config = folders.config_of(folder), loaded(folder)
    report = repair_checkpoint(folder)
    assert (report.written, report.fields, report.added) == (True, {}, added)
    for path, value in added.items():
        assert f"  {path}: {value}, added for software based on Transformers 4" in str(report)
    after = folders.config_of(folder)
    for path in added:
        *inside, last = path.split(".")
        part = after[inside[0]] if inside else after
        assert part.pop(last) == added[path]
    assert after == before
    if small.TRANSFORMERS >= (5,):
        assert loaded(folder) == config
    assert check_checkpoint(folder).sound is True
    assert not repair_checkpoint(folder).written


@pytest.mark.parametrize("rope", [{}, LLAMA3], ids=["theta", "scaled"])
def test_it_computes_the_same_bits(rope: dict[str, Any], tmp_path: Path):
    """By 5, which reads both; by 4, what 5 computed: it reads the new fields alone."""
    folder = folders.of_transformers_5(folders.saved("llama", tmp_path), **rope)
    before = folders.logits(folder, "llama")
    repair_checkpoint(folder)
    assert torch.equal(before, folders.logits(folder, "llama")) is (small.TRANSFORMERS >= (5,))
    data = folders.config_of(folder)
    del data["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(data))
    by_4 = folders.logits(folder, "llama")
    del data["rope_theta"]
    (folder / "config.json").write_text(json.dumps(data))
    assert not torch.equal(by_4, folders.logits(folder, "llama"))
    if small.TRANSFORMERS >= (5,):
        assert torch.equal(before, by_4)


@ONLY_5
@pytest.mark.parametrize("partial", [0.25, 1.0])
def test_a_part_of_each_head(partial: float, tmp_path: Path):
    config = hf.StableLmConfig(
        **tiny._SIZES, rope_parameters={"rope_theta": 7.0, "partial_rotary_factor": partial}
    )
    hf.StableLmForCausalLM(config).save_pretrained(tmp_path)
    assert repair_checkpoint(tmp_path).added == {
        "rope_theta": 7.0,
        "partial_rotary_factor": partial,
    }
    assert loaded(tmp_path)["rope_parameters"] == config.rope_parameters


@ONLY_5
def test_what_longrope_has_beside_its_factors(tmp_path: Path):
    """Phi-3 of Transformers 4 takes three keys and no more."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = hf.Phi3Config(
        **tiny._SIZES,
        pad_token_id=0,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", **factors},
    )
    hf.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    report = repair_checkpoint(tmp_path)
    assert report.added == {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", **factors},
    }
    assert loaded(tmp_path)["rope_parameters"] == config.rope_parameters


@ONLY_5
def test_one_number_cannot_say_what_differs_by_layer(tmp_path: Path):
    folder = folders.saved("gemma3-deep", tmp_path)
    said = (
        "rope_parameters differs between layer types, which rope_theta cannot express: software "
        "based on Transformers 4 uses its own defaults",
    )
    before = folders.files(folder)
    report = repair_checkpoint(folder)
    assert (report.written, report.added, report.notes) == (False, {}, said)
    assert folders.files(folder) == before


@ONLY_5
def test_what_would_not_load_the_same_is_not_written(tmp_path: Path):
    folder = folders.saved("gpt_neox", tmp_path)
    data = folders.config_of(folder)
    for name in ("rope_theta", "partial_rotary_factor"):
        data.pop(name, None)
    (folder / "config.json").write_text(json.dumps(data))
    theta, part = (
        f"{name} is only in rope_parameters, which software based on Transformers 4 does not read. "
        "It is not written beside rope_parameters, because GPTNeoXConfig would then load another "
        "config"
        for name in ("rope_theta 10000.0", "partial_rotary_factor 0.25")
    )
    report = repair_checkpoint(folder)
    assert (report.written, report.notes) == (False, (theta, part))


def test_two_numbers_that_differ(tmp_path: Path):
    folder = folders.of_transformers_5(folders.saved("llama", tmp_path))
    folders.edit(folder, rope_theta=10000.0)
    said = (
        "rope_theta is 10000.0, but rope_parameters has 500000.0. Transformers 4 reads the first, "
        "Transformers 5 the second: correct one of them by hand",
    )
    assert repair_checkpoint(folder).notes == said
    assert folders.config_of(folder)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "rope", [None, [], {}, {"rope_theta": True}, {"rope_theta": None}, {"x": [{}]}]
)
def test_rotary_fields_of_any_kind(rope: Any, tmp_path: Path):
    """What is there may be anything; nothing is added to what says no number."""
    folder = folders.edit(folders.saved("bert", tmp_path), rope_parameters=rope)
    assert repair_checkpoint(folder).added == {}


def test_saving_writes_it(tmp_path: Path):
    assert save_model(small.llama(), tmp_path) == ()
    assert folders.config_of(tmp_path)["rope_theta"] == 10000.0
    assert not repair_checkpoint(tmp_path).written


def test_transformers_4_does_not_prune_what_it_would_read_wrongly(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = folders.of_transformers_5(model_folders.save("llama-gqa", tmp_path / "source"))
    monkeypatch.setattr(loading, "MAJOR", 4)
    typed = ("prune", source, "--out", tmp_path / "out", "--pruning-ratio", "0.25")
    code, _, errors = shell(capsys, *typed)
    assert code == 1
    assert errors == (
        f"tp-hf-config prune: {source}: Transformers 5 wrote rope_theta into rope_parameters, "
        "which "
        "the installed Transformers 4 does not read. Run first: tp-hf-config repair "
        f"{source}\n"
    )


def test_a_config_that_is_wrong_gets_both(tmp_path: Path):
    """The widths, and what older readers need."""
    folder = folders.of_transformers_5(folders.saved("llama", tmp_path))
    folders.edit(folder, intermediate_size=80)
    report = repair_checkpoint(folder)
    assert report.fields == {"intermediate_size": (80, 96)}
    assert report.added == {"rope_theta": 500000.0}
