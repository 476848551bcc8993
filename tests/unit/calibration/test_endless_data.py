"""Data without a length is read only as far as tokens are needed, and data with one whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from torch.utils.data import DataLoader, IterableDataset

from tp_hf_config import CalibrationError, calibrate
from tp_hf_config.calibration import batches as batches_module

pytestmark = pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
LENGTH = 10  # tokens of a batch
TOKENS = 700  # default in these tests
MOST = 200  # batches that an endless stream gives before the test fails


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "TOKENS", TOKENS)
    monkeypatch.setattr(batches_module, "ROWS", 16)


def _row(number: int) -> torch.Tensor:
    return torch.full((1, LENGTH), 3 + number % 80)


class Endless(IterableDataset[Any]):
    """Counts what is read of it."""

    def __init__(self, *given: Any) -> None:
        self.given, self.read = given or tuple(map(_row, range(9))), 0

    def __iter__(self) -> Iterator[Any]:
        for item in itertools.cycle(self.given):
            assert self.read < MOST, "it is read for ever"
            self.read += 1
            yield item


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


@pytest.mark.parametrize(
    ("tokens", "batches"), [(None, 80), (70, 8), (LENGTH, 2), (1, 2), (141, 17)]
)
@pytest.mark.parametrize("kind", ["iterator", "dataset", "loader"])
def test_batches_are_read_until_there_are_tokens(
    kind: str, tokens: int | None, batches: int
) -> None:
    """Every eighth is held out and does not count, and one at least of two."""
    stream = Endless()
    data: Any = {"iterator": iter, "dataset": lambda s: s, "loader": _loader}[kind](stream)
    calibration = calibrate(zoo.build("llama"), data, tokens=tokens, measure=False)
    assert stream.read == batches
    assert len(calibration.train) + len(calibration.held_out) == batches
    assert calibration.held_out
    assert calibration.tokens >= (TOKENS if tokens is None else tokens)


def _loader(stream: Endless) -> Any:
    return DataLoader(stream, batch_size=None)


def test_images_count_as_rows() -> None:
    stream = Endless({"pixel_values": torch.rand(4, 3, 30, 30)})
    calibration = calibrate(zoo.build("vit"), iter(stream), measure=False)
    assert stream.read == 5  # 16 rows and those held out
    assert calibration.tokens == 4 * 4


def test_batches_of_padding_end_too() -> None:
    stream = Endless({"input_ids": _row(0), "attention_mask": 0 * _row(0)})
    with pytest.raises(CalibrationError, match="all rows of the 22 batches are padding"):
        calibrate(zoo.build("llama"), iter(stream), tokens=20)
    assert stream.read == 22


def test_a_batch_of_padding_among_others_ends_nothing() -> None:
    padding = {"input_ids": _row(0), "attention_mask": 0 * _row(0)}
    stream = Endless(*({"input_ids": _row(1)} for _ in range(40)), padding)
    calibration = calibrate(zoo.build("llama"), iter(stream), measure=False)
    assert stream.read == 81
    assert calibration.tokens == 800 - 6 * LENGTH


@pytest.mark.parametrize("wrap", [list, tuple, lambda rows: torch.stack(rows)])
def test_data_with_a_length_is_taken_whole(wrap: Any) -> None:
    data = wrap([_row(number) for number in range(100)])
    calibration = calibrate(zoo.build("llama"), data, measure=False)
    assert calibration.tokens == (100 - 6) * LENGTH
    assert calibrate(zoo.build("llama"), data, tokens=70, measure=False).tokens == 7 * LENGTH


def test_texts_are_read_until_there_are_tokens() -> None:
    stream, model = Endless("abcdefghij" * 5), zoo.build("llama")
    tokenizer: Any = Letters()
    calibration = calibrate(model, iter(stream), tokenizer=tokenizer, tokens=186, measure=False)
    assert stream.read == 6  # 186 tokens, a seventh of that, and a window of 62
    assert calibration.tokens == 186
    assert len(calibration.held_out) == 1
    empty = Endless("")
    calibrate(model, iter(empty), tokenizer=tokenizer, tokens=2, measure=False)
    assert empty.read == 64


def test_texts_and_batches_are_not_mixed() -> None:
    tokenizer: Any = Letters()
    with pytest.raises(CalibrationError, match="item 2 of the calibration data is a Tensor, but"):
        calibrate(zoo.build("llama"), ["a text", _row(0)], tokenizer=tokenizer)
