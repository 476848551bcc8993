"""The cache on disk: what lies there is whole, and ours, or it counts as missing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from tp_hf_config.model import disk_cache, surroundings
from tp_hf_config.model.build import Builder, Refusal
from tp_hf_config.model.config_json import EntryOfKind, config_json
from tp_hf_config.twin.layout import TensorDim, UnitLayout

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
VALUE = {
    "dims": (TensorDim("a.weight", 1, UnitLayout(parts=2)),),
    "share": Fraction(2, 3),
    "entry": EntryOfKind(1, {2: (0, 1)}),
    "names": [{"a", None}, 1.5, True],
    "fields": frozenset({("text_config", "hidden_size"), ("sizes", 0)}),
}


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_stored_is_read(place: Path) -> None:
    assert disk_cache.load("key") is None
    disk_cache.store("key", VALUE)
    assert disk_cache.load("key") == VALUE
    assert disk_cache.load("key")["entry"].places == {2: (0, 1)}
    assert [path.name for path in place.iterdir()] == ["key"]
    disk_cache.store("key", 2)
    assert disk_cache.load("key") == 2


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_damaged_entry_counts_as_missing(place: Path, length: int) -> None:
    disk_cache.store("key", VALUE)
    data = (place / "key").read_bytes()
    (place / "key").write_bytes(data[:length])
    assert disk_cache.load("key") is None
    disk_cache.store("key", VALUE)
    assert disk_cache.load("key") == VALUE


@pytest.mark.parametrize(
    "entry",
    [
        {"os:mkdir": {"dict": [["path", "made-by-an-entry"]]}},
        {"tp_hf_config.model.disk_cache:Path": {"dict": []}},
        {"tp_hf_config.model.disk_cache:store": {"dict": [["key", "a"], ["value", 1]]}},
        {"one": 1, "two": 2},
    ],
)
def test_an_entry_of_anything_else_is_not_run(
    place: Path, entry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    place.mkdir()
    (place / "key").write_text(json.dumps(entry))
    assert disk_cache.load("key") is None
    assert [path.name for path in place.iterdir()] == ["key"]
    assert not (tmp_path / "made-by-an-entry").exists()


@pytest.mark.parametrize("word", ["off", "OFF", ""])
def test_it_can_be_switched_off(place: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.store("key", VALUE)
    monkeypatch.setenv(disk_cache.VARIABLE, word)
    assert disk_cache.folder() is None
    assert disk_cache.load("key") is None
    disk_cache.store("other", VALUE)
    assert [path.name for path in place.iterdir()] == ["key"]


def test_it_can_be_suspended(place: Path) -> None:
    disk_cache.store("key", VALUE)
    with disk_cache.suspended():
        assert disk_cache.load("key") is None
    assert disk_cache.load("key") == VALUE


@pytest.mark.parametrize(
    ("error", "raised", "kept"),
    [
        (ValueError("no such width"), False, True),
        (
            RuntimeError(
                "[..] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            False,
            False,
        ),
        (MemoryError(), True, True),
        (TimeoutError("time is up"), True, True),
    ],
)
def test_want_of_time_or_memory_is_no_answer_to_keep(
    error: Exception, raised: bool, kept: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "_noted", False)

    def refuse(*_: Any) -> None:
        raise error

    model = hf.LlamaModel(hf.LlamaConfig(**{**SIZES, "vocab_size": 9}))
    builder = Builder(model)
    monkeypatch.setattr(hf.LlamaModel, "__init__", refuse)
    with pytest.raises(type(error)) if raised else nullcontext():
        refusal = builder.build(config_json(model.config))
        assert isinstance(refusal, Refusal)
        assert refusal.reason == str(error)
    disk_cache.store("key", 2)
    assert disk_cache.load("key") == (2 if kept else None)


def test_it_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(disk_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / "tp_hf_config"


def test_what_cannot_be_written_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.store("key", VALUE)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    disk_cache.store("key", 2)
    assert disk_cache.load("key") == VALUE
    assert disk_cache.load("key")["entry"].places == {2: (0, 1)}
    assert [path.name for path in place.iterdir()] == ["key"]
    monkeypatch.setenv(disk_cache.VARIABLE, str(place / "key"))  # a file stands there
    disk_cache.store("key", 2)


def test_several_at_once_read_whole_entries(place: Path) -> None:
    def work(number: int) -> set[Any]:
        read = set()
        for _ in range(50):
            disk_cache.store("key", (number,) * 1000)
            read.add(disk_cache.load("key"))
        return read

    with ThreadPoolExecutor(4) as pool:
        read = set().union(*pool.map(work, range(4)))
    assert read <= {(number,) * 1000 for number in range(4)}
    assert [path.name for path in place.iterdir()] == ["key"]
