"""Models under FSDP2, on two processes that are started once: the same bits as in one process."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import warm_processes
import zoo
from fsdp2_cases import (
    CASES,
    FULL,
    OF_OWN_DATA,
    RIDGE,
    batch,
    cut_by,
    data_of,
    of_measurement,
    run,
    snapshot,
)

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.calibration.batches import split_batches
from tp_hf_config.calibration.calibrate import Calibration
from tp_hf_config.pipeline.output import save_model

RANKS = 2
CHILD = small.ROOT / "tests" / "support" / "fsdp2_child.py"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(small.TORCH < (2, 6), reason="fully_shard is not public"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
    pytest.mark.usefixtures("one_thread"),
]


PAIRS = ("llama, Taylor", "llama, layers differ")
"""Cases for four ranks, two times two of which hold the same shards (HSDP)."""


def started(size: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each of so many ranks wrote."""
    path = os.pathsep.join([str(small.ROOT), str(CHILD.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log{rank}" for rank in range(size)]
    processes = [
        warm_processes.start(CHILD, [str(rank), str(size), str(folder), *names], environment, log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size, "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return started(RANKS, folder, [*CASES, "refusals"])


@functools.cache
def alone(name: str) -> tuple[Any, dict[str, Any]]:
    """What a case comes to in one process: the model, and what a rank writes of it."""
    model, optimizer, hook = run(CASES[name], None)
    return model, {
        "tensors": snapshot(model, optimizer),
        "config": model.config.to_dict(),
        "fields": [report.fields for report in hook.reports],
    }


def differing(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    assert tensors.keys() == others.keys()
    return [name for name in tensors if not torch.equal(tensors[name], others[name])]


def assert_as_alone(name: str, result: dict[str, Any]) -> None:
    expected = alone(name)[1]
    assert any(key.startswith("exp_avg of ") for key in expected["tensors"])
    assert result["fields"] == expected["fields"]
    assert result["config"] == expected["config"]
    assert differing(expected["tensors"], result["tensors"]) == []


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(
    name: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    for results in ranks:
        assert_as_alone(name, results[name])
    model = alone(name)[0]
    save_model(model, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (folder / name).iterdir()}
    loaded = type(model).from_pretrained(folder / name).eval()
    assert torch.equal(loaded(**batch(7)).logits, model(**batch(7)).logits)


def test_pairs_of_ranks_that_hold_the_same(tmp_path: Path) -> None:
    for results in started(4, tmp_path, PAIRS):
        for name in PAIRS:
            assert_as_alone(name, results[name])


def test_every_field_was_pruned(ranks: list[dict[str, Any]]) -> None:
    fields = {name: ranks[0][name]["fields"][-1] for name in CASES}
    halved = {"hidden_size": (48, 32), "intermediate_size": (72, 48)}
    assert fields["llama"] == fields["llama, Taylor"] == fields["llama, calibrated"] == halved
    assert fields["mixtral, heads"]["num_key_value_heads"] == (2, 1)
    assert fields["bert, ignored"] == {"hidden_size": (64, 32)}
    assert ranks[0]["gemma2, tied"]["config"]["tie_word_embeddings"] is True


def test_a_distributed_checkpoint(ranks: list[dict[str, Any]]) -> None:
    assert [results["llama"]["dcp"] for results in ranks] == [True, True]


def test_what_works_beside_pruning(ranks: list[dict[str, Any]]) -> None:
    refusals = ranks[0]["refusals"]
    assert refusals["prunable"] == "LlamaForCausalLM"
    assert 0 < refusals["plan"] < zoo.build("llama").num_parameters() / 2


def test_one_whole_weight_at_a_time(ranks: list[dict[str, Any]]) -> None:
    weights = len(list(zoo.build("llama").parameters()))
    for results in ranks:
        held = results["held"]
        assert held["gathered"] > weights
        assert held["at once"] <= 2  # gloo's thread may hold on to the last one for a moment
        assert not held["old model"]


MESSAGES = {
    "no shard": "UnsupportedModelError: LlamaForCausalLM is under fully_shard (FSDP2). Its "
    "weights cannot be cut in place. Pass a function that makes your fully_shard "
    "calls on the pruned model: HFConfigSyncHook(shard=shard)",
    "drop_layers": "UnsupportedModelError: LlamaForCausalLM: model.embed_tokens.weight is sharded "
    "by fully_shard (FSDP2). Construct the pruner with "
    "hooks=[HFConfigSyncHook(shard=shard)], where shard(module) makes your "
    "fully_shard calls. Everything else needs the whole model in one process.",
    "inside": "UnsupportedModelError: LlamaForCausalLM is under fully_shard (FSDP2) and inside a "
    "ModuleDict. Pass the model itself, the .inner of that module",
    "other settings": "CalibrationError: rank 1 made another decision than rank 0 at calibrate "
    "(the settings). Every rank needs the same settings and the same "
    "importances: equal seeds, and statistics that are summed over all ranks",
    "no data": "CalibrationError: the calibration data is empty on every rank. Pass at least one "
    "batch on one of them",
    "tensor parallelism": "UnsupportedModelError: LlamaForCausalLM: "
    "model.layers.0.mlp.up_proj.weight is sharded over several processes by "
    "tensor parallelism or DeepSpeed ZeRO-3. Only models that are sharded "
    "by fully_shard (FSDP2) can be pruned. Prune the model's folder "
    "instead, and load the result: tp-hf-config prune FOLDER, or "
    "apply_cuts(folder, cuts, out) with the cut list of an unsharded model.",
}
MESSAGES["both"] = MESSAGES["tensor parallelism"]


@pytest.mark.parametrize("what", MESSAGES)
def test_refusals(what: str, ranks: list[dict[str, Any]]) -> None:
    assert [results["refusals"][what] for results in ranks] == [MESSAGES[what]] * RANKS


@functools.cache
def measured_alone(name: str, ranks: int) -> Any:
    """A calibration in one process, on the data of so many ranks."""
    model = zoo.build(name)
    parts = [split_batches(data_of(rank), model) for rank in range(ranks)]
    train, held_out = ([batch for part in parts for batch in part[side]] for side in (0, 1))
    calibration = Calibration(model, train, held_out, RIDGE)
    calibration.current()
    return calibration


def assert_close(
    ours: tuple[torch.Tensor | None, ...], theirs: tuple[torch.Tensor | None, ...]
) -> None:
    """The same up to the order in which float32 and float64 numbers were added."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@functools.cache
def cut_alone() -> dict[str, Any]:
    """What the data of both ranks prunes in one process."""
    calibration = measured_alone("mixtral", 2)
    return cut_by(calibration, calibration.model, HFConfigSyncHook(refit=calibration))


def assert_decided_as_alone(result: dict[str, Any]) -> None:
    """The same channels and the same weights refitted, with values up to rounding."""
    alone = cut_alone()
    ours, theirs = result["refits"], alone["refits"]
    assert _as_lists(result["kept"]) == _as_lists(alone["kept"])
    assert [layer["used"] for layer in ours["layers"]] == [
        layer["used"] for layer in theirs["layers"]
    ]
    assert {layer["used"] for layer in ours["layers"]} == {True, False}
    assert ours["notes"] == theirs["notes"]
    for name in ("cut", "refit", "after"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for name, tensor in alone["tensors"].items():
        assert_close((result["tensors"][name],), (tensor,))


def assert_same_bits(ranks: Sequence[dict[str, Any]]) -> None:
    first, second = (pickle.dumps(_as_lists(result)) for result in ranks)
    assert first == second


class TestOwnData:
    """Every rank measures data of its own, and all decide as if each had seen all of it."""

    @pytest.fixture
    def own(self, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [results["own data"] for results in ranks]

    def test_all_ranks_have_the_same_bits(self, own: list[dict[str, Any]]) -> None:
        for name in ("measurement", "kept", "refits", "tensors", "the first alone"):
            assert_same_bits([results[name] for results in own])

    def test_sums_of_both(self, own: list[dict[str, Any]]) -> None:
        ours, theirs = own[0]["measurement"], of_measurement(measured_alone("mixtral", 2))
        for name in ("leaders", "chains", "unread"):
            assert ours[name] == theirs[name]
        assert list(ours["sums"]) == list(theirs["sums"])
        for leader, sums in theirs["sums"].items():
            assert ours["sums"][leader][0] == sums[0]
            assert_close(ours["sums"][leader][1:], sums[1:])

    def test_a_rank_without_data_adds_nothing(self, own: list[dict[str, Any]]) -> None:
        alone = of_measurement(measured_alone("llama", 1))
        assert _as_lists(own[1]["the first alone"]) == _as_lists(alone)
        rest = "(of 2 ranks, this one): 9 inputs of 15 weights measured"
        assert [results["text"] for results in own] == [
            f"LlamaForCausalLM on 768 tokens {rest}",
            f"LlamaForCausalLM on 0 tokens {rest}",
        ]

    def test_layers_that_are_each_sharded_alone(self, own: list[dict[str, Any]]) -> None:
        """Norms are back in shards when what reads them runs."""
        for results in own:
            assert _as_lists(results["leaves"]) == _as_lists(
                of_measurement(measured_alone("llama", 1))
            )

    def test_the_same_decisions_as_one_process(self, own: list[dict[str, Any]]) -> None:
        assert_decided_as_alone(own[0])

    def test_data_that_one_rank_cannot_measure(self, own: list[dict[str, Any]]) -> None:
        said = (
            "LlamaForCausalLM does not run on batch 1 of the calibration data, {'input_ids': "
            "[1, 2]}: IndexError: index out of range in self. Pass batches that the model takes: "
            "model(**batch)"
        )
        assert [results["bad data"] for results in own] == [
            f"CalibrationError: rank 1 at the end of calibrate: {said}",
            f"CalibrationError: {said}",
        ]
        assert [results["after it"] for results in own] == ["nothing was raised"] * 2

    def test_a_pass_that_fails_in_a_layer(self, own: list[dict[str, Any]]) -> None:
        """The other rank waits for the layers behind it, and is told."""
        for results in own:
            assert results["broken layer"].startswith("CalibrationError: ")
            assert "ValueError: broken. Pass batches" in results["broken layer"]
            assert results["after that"] == "nothing was raised"


class TestCopies:
    """Every rank has the whole model: DistributedDataParallel."""

    @pytest.fixture
    def copies(self, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [results["copies"] for results in ranks]

    def test_as_in_one_process(self, copies: list[dict[str, Any]]) -> None:
        for results in copies:
            assert_as_alone(OF_OWN_DATA, results["trained"])

    def test_own_data(self, copies: list[dict[str, Any]]) -> None:
        assert_same_bits([results["calibrated"] for results in copies])
        assert_decided_as_alone(copies[0]["calibrated"])

    def test_the_wrapper_is_refused(self, copies: list[dict[str, Any]]) -> None:
        said = (
            "UnsupportedModelError: a DistributedDataParallel keeps the Parameters that it was "
            "made with, and would not train pruned ones. Pass the LlamaForCausalLM inside, its "
            ".module, on every rank, with distributed=True (HFConfigSyncHook, calibrate). After "
            "the step, discard the wrapper and wrap the pruned model again"
        )
        for results in copies:
            for name in ("calibrate", "pruner"):
                assert results[name] == said

    def test_a_rank_that_decides_otherwise(self, copies: list[dict[str, Any]]) -> None:
        for results in copies:
            assert results["other channels"] == (
                "TrainingError: rank 1 made another decision than rank 0 at step 1 "
                "(model.layers.0.self_attn.o_proj). Every rank needs the same settings and the "
                "same importances: equal seeds, and statistics that are summed over all ranks. "
                "The model is unchanged."
            )
            assert results["untouched"]
            assert results["again, with one seed"] == "nothing was raised"


class TestAccelerate:
    """Accelerate shards."""

    def test_a_loop_of_ones_own(self, ranks: list[dict[str, Any]]) -> None:
        for results in ranks:
            result = results["accelerate"]
            assert_as_alone(OF_OWN_DATA, result)
            assert result["layers"] == ["FSDPLlamaDecoderLayer"] * 2
            gradients = [
                value for name, value in result["tensors"].items() if name.startswith("gradient")
            ]
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            assert result["norm"] == pytest.approx(float(norm), rel=1e-5)


def _as_lists(value: Any) -> Any:
    """Tensors and containers as what can be compared exactly."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_a_rank_that_dies(ranks: list[dict[str, Any]]) -> None:
    said = ranks[0]["dying"]
    assert said.startswith(
        "CalibrationError: this rank lost the connection to the other ranks in calibrate: "
    )
    assert said.endswith(". Read the logs of the other ranks")


def test_a_folder_that_is_taken(ranks: list[dict[str, Any]], folder: Path) -> None:
    said = (
        f"{folder / 'taken'}: is not empty. Choose another folder, or add overwrite=True to "
        "replace it."
    )
    assert [results["refusals"]["taken"] for results in ranks] == [
        f"PipelineError: {said}",
        f"PipelineError: rank 0 at the start of save_sharded: {said}",
    ]
    assert [path.name for path in (folder / "taken").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("at", FULL)
def test_a_disk_that_is_full(at: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    """Before the first weight, or in the middle of them: no rank is left waiting."""
    said = f"{folder / 'full'}: cannot be written: [Errno 28] No space left on device"
    assert [results["refusals"][f"full at {at}"] for results in ranks] == [
        f"PipelineError: {said}",
        f"PipelineError: rank 0 at the end of save_sharded: {said}",
    ]
    assert not (folder / "full").exists()


def test_a_rank_that_decides_otherwise(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        failures = results["failures"]
        assert failures["other channels"] == (
            "TrainingError: rank 1 made another decision than rank 0 at step 1 "
            "(model.layers.0.self_attn.o_proj). Every rank needs the same settings and the same "
            "importances: equal seeds, and statistics that are summed over all ranks. The sharded "
            "model is unchanged."
        )
        assert failures["untouched"]
        assert failures["again, with one seed"] == "nothing was raised"
        assert failures["pruned"] == 32


def test_a_rank_that_cannot_wrap(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["failures"] for results in ranks)
    assert first["shard fails"] == (
        "TrainingError: rank 1 at shard= of step 1: no room for shards. The sharded model is "
        "unchanged."
    )
    assert second["shard fails"] == "MemoryError: no room for shards"
    for failures in (first, second):
        assert failures["a new pruner after it"] == "nothing was raised"
        assert failures["pruned after it"] == 32


def test_a_rank_that_comes_too_late(ranks: list[dict[str, Any]]) -> None:
    """Who is missing is read from the process group's store, which every backend has."""
    rest = (
        ". Every rank has to prune at the same point of the program. The sharded model is "
        "unchanged."
    )
    assert [results["absent"] for results in ranks] == [
        "TrainingError: rank 0 waited 4 seconds for the other ranks at the start of step 1, but "
        f"rank 1 did not arrive{rest}",
        "TrainingError: rank 1 arrived at the start of step 1 after rank 0 had stopped waiting "
        f"for it{rest}",
    ]
