"""Models whose weights are read from files: measured and refitted as in memory, read once."""

from __future__ import annotations

import copy
import errno
import gc
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import calibrated
import pytest
import small
import tiny
import torch
import zoo
from torch import nn
from transformers import AlbertConfig, AlbertModel

from tp_hf_config import HFConfigSyncHook, calibrate
from tp_hf_config.calibration import measure, refits_of_step, sums
from tp_hf_config.calibration.measured import MeasuredModel
from tp_hf_config.checkpoint import lazy_weights, scratch
from tp_hf_config.errors import CalibrationError, CheckpointError
from tp_hf_config.model.lazy_tensor import LazyTensor, values_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
CLASSES = ("llama", "mixtral", "gpt2", "t5", "bert", "albert")
COUNT = 10
Reads = Counter[tuple[int, tuple[int, ...]]]
"""Where a tensor starts in its file, and its shape -> how often it was read."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """How often each tensor of a file was read; those of temporary files are left out."""
    counts: Reads = Counter()
    original = lazy_weights._read

    def read(path: Path, stored: Any) -> torch.Tensor:
        if not path.parent.name.startswith("tp_hf_config-"):
            counts[stored.start, tuple(stored.shape)] += 1
        return original(path, stored)

    monkeypatch.setattr(lazy_weights, "_read", read)
    return counts


def albert() -> Any:
    """One layer that runs four times."""
    config = AlbertConfig(
        vocab_size=zoo.VOCAB,
        embedding_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = AlbertModel(config)
    tiny.randomise(model)
    return model


def models(name: str, folder: Path) -> tuple[Any, Any]:
    """A model in memory, and the same read from its folder."""
    built = albert() if name == "albert" else zoo.build(name)
    built.save_pretrained(folder)
    whole = type(built).from_pretrained(folder)
    config = type(whole.config).from_pretrained(folder)
    lazy, _ = lazy_weights.load_lazily(type(whole), folder, config)
    assert all(isinstance(parameter, LazyTensor) for parameter in lazy.parameters())
    return whole, lazy


def pruned(model: Any, calibration: Any, **settings: Any) -> HFConfigSyncHook:
    """Rank by what channels carry, refit, and cut; the hook has the report."""
    hook = HFConfigSyncHook(compensate=calibration)
    given = {"importance": calibration.importance("wanda"), "pruning_ratio": 0.25, **settings}
    calibrated.pruner_of(model, hook, **given).step()
    return hook


def assert_same(whole: Any, lazy: Any) -> None:
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, values_of(lazy.get_parameter(name))), name


@pytest.mark.parametrize("memory", [None, 1, 30_000])
@pytest.mark.parametrize("name", CLASSES)
def test_the_same_bits_as_in_memory(name: str, memory: int | None, tmp_path: Path) -> None:
    """However many passes it takes, and whatever waits for how many others."""
    whole, lazy = models(name, tmp_path)
    calibrations = [
        calibrate(whole, calibrated.batches(whole, COUNT)),
        calibrate(lazy, calibrated.batches(lazy, COUNT), max_memory=memory),
    ]
    first, second = (each.readings for each in calibrations)
    assert first.leaders == second.leaders
    assert first.chains == second.chains
    for leader, statistics in first.statistics.items():
        other = second.statistics[leader]
        assert torch.equal(statistics.total, other.total)
        assert torch.equal(statistics.squares, other.squares)
        if other.gram is not None and statistics.gram is not None:
            assert torch.equal(statistics.gram, values_of(other.gram))
    hooks = [pruned(*pair) for pair in zip((whole, lazy), calibrations, strict=True)]
    assert_same(whole, lazy)
    told, other_told = (hook.last_report.compensation for hook in hooks)
    assert sorted(told.layers, key=str) == sorted(other_told.layers, key=str)
    assert (told.cut, told.refit, told.after) == (
        other_told.cut,
        other_told.refit,
        other_told.after,
    )
    assert any(layer.used for layer in told.layers)


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
def test_products_of_a_layer_s_experts_take_no_more_memory_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the norm each expert has its own, as all others that read of the layer."""
    _, lazy = models("mixtral", tmp_path)
    most = 2 * 4 * 48 * (48 + 64)  # bytes: of two inputs
    held: list[int] = []
    make_room = sums.Sums._make_room

    def noted(found: Any, leader: Any, size: int) -> None:
        make_room(found, leader, size)
        each = [(of, s) for of, matrices in found._matrices.items() for s in matrices]
        before = [s.nbytes for of, s in each if of != leader and not isinstance(s, LazyTensor)]
        held.append(sum(before) + size)

    monkeypatch.setattr(sums.Sums, "_make_room", noted)
    calibration = calibrate(lazy, calibrated.batches(lazy, COUNT), max_memory=most * 8 // 3)
    pruned(lazy, calibration, prune="hidden_size")
    assert len(set(calibration.readings.chains.values())) > 4
    assert most // 2 < max(held) <= most


@pytest.mark.parametrize("name", CLASSES)
def test_each_weight_is_read_once(name: str, tmp_path: Path, reads: Reads) -> None:
    _, lazy = models(name, tmp_path)
    reads.clear()
    calibration = calibrate(lazy, calibrated.batches(lazy, COUNT))
    counts = {key: number for key, number in reads.items() if len(key[1]) > 1}
    tables = {key for key in counts if zoo.VOCAB in key[1]}
    assert {counts[key] for key in counts.keys() - tables} == {1}
    assert max(counts[key] for key in tables) <= 3  # tied: on both sides, and in the head
    assert calibration.memory == 0
    grams = [each.gram for each in calibration.readings.statistics.values()]
    assert calibration.scratch == sum(gram.nbytes for gram in grams if gram is not None) > 0
    assert f"{calibration.scratch / 2**20:,.0f} MiB in temporary files" in str(calibration)


def test_once_for_each_group_of_batches(tmp_path: Path, reads: Reads) -> None:
    whole, lazy = models("llama", tmp_path)
    ids = torch.randint(3, 80, (9, 16, 60), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": rows} for rows in ids]
    hidden = 4 * 64 * ids[0].numel()  # bytes
    expected = calibrate(whole, data)
    for at_once, groups in ((8, 1), (4, 2), (3, 3)):
        reads.clear()
        # an eighth is for what waits: hidden states, and the angles of positions
        calibration = calibrate(lazy, data, max_memory=int(8 * 1.1 * at_once * hidden))
        assert {number for (_, shape), number in reads.items() if len(shape) > 1} == {groups}
        assert_grams_as(expected, calibration)


class Looped(nn.Module):
    """Two layers that run three times, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers, *self.layers):
            x = layer(x).tanh()
        return x


def test_layers_that_are_come_back_to_are_added_up_in_the_same_order() -> None:
    """That is, for one batch after the other: sums in another order have other last bits."""
    torch.manual_seed(0)
    whole, batches = Looped(), [{"x": torch.randn(5, 8)} for _ in range(7)]
    lazy = copy.deepcopy(whole)
    for layer in lazy.layers:
        values = layer.weight.data
        layer.weight = nn.Parameter(LazyTensor(values.to("meta"), values.clone))
    first, second = (measure.measure(model, batches, None, "") for model in (whole, lazy))
    assert first.in_lockstep
    assert not second.in_lockstep
    for leader, statistics in first.statistics.items():
        other = second.statistics[leader]
        assert torch.equal(statistics.total, other.total)
        assert other.gram is not None
        assert torch.equal(statistics.gram, values_of(other.gram))


def assert_grams_as(whole: MeasuredModel, streamed: MeasuredModel) -> None:
    for leader, statistics in whole.readings.statistics.items():
        gram = streamed.readings.statistics[leader].gram
        if statistics.gram is not None:
            assert isinstance(gram, LazyTensor)
            assert torch.equal(statistics.gram, values_of(gram))


def own_threads() -> list[threading.Thread]:
    """All threads but that of progress bars."""
    return [each for each in threading.enumerate() if type(each).__name__ != "TMonitor"]


class TestWhatFails:
    """An error is said, and nothing is left: no thread, no hook, no temporary file."""

    @pytest.fixture
    def lazy(self, tmp_path: Path) -> Any:
        return models("llama", tmp_path)[1]

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, lazy: Any) -> Iterator[None]:
        gc.collect()
        files, threads = set(scratch._folder().iterdir()), own_threads()
        yield
        gc.collect()
        assert set(scratch._folder().iterdir()) == files
        assert not set(own_threads()) - set(threads)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in lazy.modules())
        assert not lazy.training
        assert torch.is_grad_enabled()

    def test_a_batch_that_the_model_does_not_take(self, lazy: Any) -> None:
        data = calibrated.batches(lazy, 3)
        data[1] = {"input_ids": torch.tensor([[10_000]])}
        match = r"LlamaForCausalLM does not run on batch 2 .*\{'input_ids': \[1, 1\]\}"
        with pytest.raises(CalibrationError, match=match):
            calibrate(lazy, data)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError])
    def test_an_interrupt_or_a_damaged_file_at_a_read(
        self, lazy: Any, error: type[BaseException]
    ) -> None:
        reads: list[None] = []

        def read(values: torch.Tensor) -> torch.Tensor:
            reads.append(None)
            if len(reads) == 3:
                raise error("here")
            return values

        for parameter in lazy.model.layers[1].parameters():
            parameter.read = partial(read, parameter.read())
        with pytest.raises(error, match="here"):
            calibrate(lazy, calibrated.batches(lazy, COUNT))
        assert len(reads) == 3

    def test_a_full_disk(self, lazy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(tensors: Any, path: Path) -> None:
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(scratch, "write_safetensors", write)
        match = (
            r"a temporary file of 16,384 bytes cannot be written to \S+: .*No space left on "
            "device. Set TMPDIR to a folder on a disk with more room"
        )
        with pytest.raises(CheckpointError, match=match):
            calibrate(lazy, calibrated.batches(lazy, COUNT))


@pytest.mark.parametrize(("matrices", "count"), [(0, 2), (1, 3), (10, 4)])
def test_a_small_disk_takes_more_passes(
    matrices: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory has room for the two Gram matrices of a layer, the disk for so many of the larger."""
    whole, lazy = models("llama", tmp_path)
    largest, other = 4 * 96**2, 4 * 64**2
    for module in (measure, refits_of_step):
        monkeypatch.setattr(module, "free_on_disk", lambda: 2 * matrices * largest)
    data = calibrated.batches(lazy, COUNT)
    calibration = calibrate(lazy, data, max_memory=3 * (largest + other))
    grams = [each.gram for each in calibration.readings.statistics.values()]
    assert sum(gram is not None for gram in grams) == count
    pruned(whole, calibrate(whole, data))
    pruned(lazy, calibration)
    assert_same(whole, lazy)
