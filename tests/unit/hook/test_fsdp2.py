"""Models under FSDP2, on two processes that are started once: the same bits as in one process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import zoo
from fsdp2_cases import CASES, batch, run, snapshot

RANKS = 2
CHILD = small.ROOT / "tests" / "support" / "fsdp2_child.py"
pytestmark = [
    pytest.mark.skipif(small.TORCH < (2, 6), reason="fully_shard is not public"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


PAIRS = ("llama, Taylor", "llama, layers differ")
"""Cases for four ranks, two times two of which hold the same shards (HSDP)."""


def started(size: int, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each of so many ranks wrote."""
    path = os.pathsep.join([str(small.ROOT), str(CHILD.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log{rank}" for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(rank), str(size), str(folder), *names],
            env=environment,
            stderr=log.open("w"),
        )
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


def assert_as_alone(name: str, results: dict[str, Any]) -> None:
    expected = alone(name)[1]
    assert any(key.startswith("exp_avg of ") for key in expected["tensors"])
    assert results[name]["fields"] == expected["fields"]
    assert results[name]["config"] == expected["config"]
    assert differing(expected["tensors"], results[name]["tensors"]) == []


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(
    name: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    for results in ranks:
        assert_as_alone(name, results)
    model = alone(name)[0]
    model.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (folder / name).iterdir()}
    loaded = type(model).from_pretrained(folder / name).eval()
    assert torch.equal(loaded(**batch(7)).logits, model(**batch(7)).logits)


def test_pairs_of_ranks_that_hold_the_same(tmp_path: Path) -> None:
    for results in started(4, tmp_path, PAIRS):
        for name in PAIRS:
            assert_as_alone(name, results)


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
        assert held["at once"] == 1
        assert not held["old model"]


MESSAGES = {
    "no rebuild": "UnsupportedModelError: LlamaForCausalLM is under fully_shard (FSDP2). Its "
    "weights cannot be cut in place: pass a function that makes your fully_shard calls on the "
    "pruned model, HFConfigSyncHook(rebuild=shard)",
    "drop_layers": "UnsupportedModelError: LlamaForCausalLM: model.embed_tokens.weight is sharded "
    "by fully_shard (FSDP2). A pruner that is constructed with HFConfigSyncHook(rebuild=shard) "
    "prunes it, where shard(module) makes your fully_shard calls; anything else wants the whole "
    "model in one process.",
    "inside": "UnsupportedModelError: LlamaForCausalLM is under fully_shard (FSDP2) and inside a "
    "ModuleDict. Pass the model itself: the .inner of that",
    "other data": "CalibrationError: rank 1 decided otherwise than rank 0 at calibrate (the data). "
    "Every rank needs the same settings and the same importances: equal seeds, and statistics that "
    "are summed over all ranks. Under FSDP2 pass calibrate() the same data on every rank",
    "tensor parallelism": "UnsupportedModelError: LlamaForCausalLM: "
    "model.layers.0.mlp.up_proj.weight is sharded over several processes by tensor parallelism or "
    "DeepSpeed ZeRO-3. Prune the model's folder, and load the pruned one: tp-hf-config prune "
    "FOLDER, or apply_cuts(folder, cuts, out) with the cuts of a pruner elsewhere. Of sharded "
    "models only those of fully_shard (FSDP2) can be pruned.",
}
MESSAGES["both"] = MESSAGES["tensor parallelism"]


@pytest.mark.parametrize("what", MESSAGES)
def test_refusals(what: str, ranks: list[dict[str, Any]]) -> None:
    assert [results["refusals"][what] for results in ranks] == [MESSAGES[what]] * RANKS


def test_a_folder_that_is_taken(ranks: list[dict[str, Any]], folder: Path) -> None:
    said = (
        f"PipelineError: rank 0 at the start of save_sharded: {folder / 'taken'}: is not empty. "
        "Choose another folder, or add --overwrite to replace it."
    )
    assert [results["refusals"]["taken"] for results in ranks] == [said] * RANKS
    assert [path.name for path in (folder / "taken").iterdir()] == ["notes.txt"]


def test_a_rank_that_decides_otherwise(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        failures = results["failures"]
        assert failures["other channels"] == (
            "TrainingError: rank 1 decided otherwise than rank 0 at step 1 "
            "(model.layers.0.self_attn.o_proj). Every rank needs the same settings and the same "
            "importances: equal seeds, and statistics that are summed over all ranks. The sharded "
            "model is as it was."
        )
        assert failures["untouched"]
        assert failures["again, with one seed"] == "nothing was raised"
        assert failures["pruned"] == 32


def test_a_rank_that_cannot_wrap(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["failures"] for results in ranks)
    assert first["rebuild fails"] == (
        "TrainingError: rank 1 at rebuild= of step 1: no room for shards. The sharded model is as "
        "it was."
    )
    assert second["rebuild fails"] == "MemoryError: no room for shards"
    for failures in (first, second):
        assert failures["a new pruner after it"] == "nothing was raised"
        assert failures["pruned after it"] == 32


def test_a_rank_that_comes_too_late(ranks: list[dict[str, Any]]) -> None:
    """Who is missing is read from the process group's store, which every backend has."""
    rest = (
        ". Every rank has to prune at the same point of the program. The sharded model is as it "
        "was."
    )
    assert [results["absent"] for results in ranks] == [
        "TrainingError: rank 0 waited 4 seconds for the others at the start of step 1, and rank 1 "
        f"did not come{rest}",
        "TrainingError: rank 1 came to the start of step 1 when rank 0 had given up waiting for "
        f"it{rest}",
    ]
