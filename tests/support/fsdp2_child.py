"""One rank: prunes every case under FSDP2, and writes what came of it.

Arguments: rank, number of ranks, a folder for the store and the results, names of cases.
"""

from __future__ import annotations

import datetime
import errno
import functools
import gc
import os
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import small
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch_pruning as tp
import transformers as hf
import zoo
from accelerate import Accelerator, FullyShardedDataParallelPlugin, state
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
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
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.multiprocessing import reductions
from torch.nn.parallel import DistributedDataParallel
from transformers import modeling_utils
from transformers.utils import logging

from tp_hf_config import (
    HFConfigSyncHook,
    calibrate,
    drop_layers,
    plan,
    prunable,
    save_sharded,
)
from tp_hf_config.hook import ranks
from tp_hf_config.model import sharded as shards


@functools.cache
def pairs() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicated", "sharded"))


def shard(module: Any) -> None:
    """As a user's script does: each layer, then the rest; four ranks as two pairs (HSDP)."""
    mesh = pairs() if dist.get_world_size() == 4 else None
    for part in list(module.modules()):
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def sharded(name: str = "llama") -> Any:
    model = zoo.build(name)
    shard(model)
    return model


def pruner_of(model: Any, hook: HFConfigSyncHook, importance: Any = None) -> Any:
    importance = importance or tp.importance.GroupMagnitudeImportance()
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=importance,
        pruning_ratio=0.5,
        hooks=[hook],
    )


def refusal(act: Any) -> str:
    """What an act raises, as text."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@contextmanager
def full_disk(at: str) -> Iterator[None]:
    """While open, the disk is full, for the ``config`` or for the ``weights``."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patched = (hf.PretrainedConfig, "save_pretrained", full)
    if at == "weights":
        patched = (modeling_utils, "safe_save_file", full)
    with mock.patch.object(*patched):
        yield


def of_case(name: str, rank: int, folder: Path) -> dict[str, Any]:
    model, optimizer, hook = run(CASES[name], shard, rank)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    result = came_to(model, optimizer, hook)
    save_sharded(model, folder / name)
    if name == "llama":
        dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder / "dcp"))
        before = snapshot(model)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        dcp.load({"model": model.state_dict()}, checkpoint_id=str(folder / "dcp"))
        after = snapshot(model)
        result["dcp"] = all(torch.equal(before[key], after[key]) for key in before)
    return result


def came_to(model: Any, optimizer: Any, hook: HFConfigSyncHook) -> dict[str, Any]:
    return {
        "tensors": snapshot(model, optimizer),
        "config": model.config.to_dict(),
        "fields": [report.fields for report in hook.reports],
    }


def seen_and_refused(rank: int, folder: Path) -> dict[str, Any]:
    """What works on a sharded model beside pruning, and what is refused."""
    results: dict[str, Any] = {}
    model = sharded()
    results["prunable"] = str(prunable(model)).splitlines()[0]
    fields = small.inside(model)
    results["plan"] = plan(model, prune=fields, pruning_ratio=0.5).after.parameters
    results["no shard"] = refusal(lambda: pruner_of(model, HFConfigSyncHook()))
    results["drop_layers"] = refusal(lambda: drop_layers(model, [0]))
    inside = nn.ModuleDict({"inner": model})
    results["inside"] = refusal(lambda: pruner_of(inside, HFConfigSyncHook()))
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "notes.txt").touch()
    results["taken"] = refusal(lambda: save_sharded(model, folder / "taken"))
    for at in FULL:
        with full_disk(at) if rank == 0 else nullcontext():
            results[f"full at {at}"] = refusal(lambda: save_sharded(model, folder / "full"))
    results["other settings"] = refusal(lambda: calibrate(model, [batch(0)], ridge=0.1 * rank))
    results["no data"] = refusal(lambda: calibrate(model, []))
    parallel = zoo.build("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(parallel, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    results["tensor parallelism"] = refusal(lambda: pruner_of(parallel, HFConfigSyncHook()))
    fully_shard(parallel.model.layers[1], mesh=mesh)
    results["both"] = refusal(lambda: pruner_of(parallel, HFConfigSyncHook()))
    return results


def own_data(rank: int) -> dict[str, Any]:
    """Every rank measures data of its own: experts are read here that are not read there."""
    model = sharded("mixtral")
    calibration = calibrate(model, data_of(rank), ridge=RIDGE)
    hook = HFConfigSyncHook(shard=shard, refit=calibration)
    results = cut_by(calibration, model, hook)
    model = sharded()
    first_alone = calibrate(model, data_of(0) if rank == 0 else [])
    results["the first alone"] = of_measurement(first_alone)
    results["text"] = str(first_alone).partition(";")[0]
    leaves = zoo.build("llama")
    for part in [*leaves.modules()]:
        if any(True for _ in part.parameters(recurse=False)):
            fully_shard(part)
    fully_shard(leaves)
    results["leaves"] = of_measurement(calibrate(leaves, data_of(0)))
    bad: Any = {"input_ids": torch.tensor([[0, zoo.VOCAB]])}
    results["bad data"] = refusal(lambda: calibrate(model, [*[bad] * rank, *data_of(0)]))
    results["after it"] = refusal(lambda: calibrate(model, data_of(rank)))

    def breaks(*_: Any) -> None:
        raise ValueError("broken")

    layer = model.model.layers[0].mlp
    handle = layer.register_forward_hook(breaks) if rank == 1 else nullcontext()
    with handle:
        results["broken layer"] = refusal(lambda: calibrate(model, data_of(rank)))
    results["after that"] = refusal(lambda: calibrate(model, data_of(rank)))
    return results


def copies(rank: int) -> dict[str, Any]:
    """Every rank has a copy of the model (DistributedDataParallel), and data of its own."""
    model, optimizer, hook = run(CASES[OF_OWN_DATA], None, rank, DistributedDataParallel)
    results: dict[str, Any] = {"trained": came_to(model, optimizer, hook)}
    model = zoo.build("mixtral")
    calibration = calibrate(model, data_of(rank), ridge=RIDGE, distributed=True)
    hook = HFConfigSyncHook(distributed=True, refit=calibration)
    results["calibrated"] = cut_by(calibration, model, hook)
    model = zoo.build("llama")
    wrapped, before = DistributedDataParallel(model), snapshot(model)
    for name, act in {
        "calibrate": lambda: calibrate(wrapped, data_of(rank), distributed=True),
        "pruner": lambda: pruner_of(wrapped, HFConfigSyncHook()),
    }.items():
        results[name] = refusal(act)
    random = tp.importance.RandomImportance()
    pruner = pruner_of(model, HFConfigSyncHook(distributed=True), random)
    torch.manual_seed(rank)
    results["other channels"] = refusal(pruner.step)
    results["untouched"] = all(
        torch.equal(before[name], value) for name, value in snapshot(model).items()
    )
    torch.manual_seed(0)
    results["again, with one seed"] = refusal(pruner.step)
    return results


def accelerate_shards_on_the_cpu() -> None:
    """Accelerate takes DistributedDataParallel on the CPU, whatever its plugin says."""
    start = state.AcceleratorState.__init__

    def starts(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    state.AcceleratorState.__init__ = starts


def accelerated(rank: int) -> dict[str, Any]:
    """Accelerate shards by its FSDP2 plugin, in a loop of one's own."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model, optimizer, hook = run(
        CASES[OF_OWN_DATA],
        lambda module: fsdp2_prepare_model(accelerator, module),
        rank,
        accelerator=accelerator,
    )
    results = came_to(model, optimizer, hook)
    results["layers"] = [type(layer).__name__ for layer in model.model.layers]
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    results["norm"] = float(getattr(norm, "full_tensor", lambda: norm)())
    state.AcceleratorState._reset_state(True)
    return results


def failing(rank: int) -> dict[str, Any]:
    """One rank does something else than the others: all raise, and the model is as it was."""
    results: dict[str, Any] = {}
    model = sharded()
    before = snapshot(model)
    hook = HFConfigSyncHook(shard=shard)
    pruner = pruner_of(model, hook, tp.importance.RandomImportance())
    if rank == 0:
        model.config.architectures = ["LlamaForCausalLM"]  # save_pretrained sets it where it runs
    torch.manual_seed(rank)
    results["other channels"] = refusal(pruner.step)
    results["untouched"] = hook.sharded_model is model and all(
        torch.equal(before[name], value) for name, value in snapshot(model).items()
    )
    torch.manual_seed(0)
    results["again, with one seed"] = refusal(pruner.step)
    results["pruned"] = hook.sharded_model.config.hidden_size

    def fails_on_rank_1(module: Any) -> None:
        if rank == 1:
            raise MemoryError("no room for shards")
        shard(module)

    failing_hook = HFConfigSyncHook(shard=fails_on_rank_1)
    results["shard fails"] = refusal(pruner_of(model, failing_hook).step)
    hook = HFConfigSyncHook(shard=shard)
    results["a new pruner after it"] = refusal(pruner_of(model, hook).step)
    results["pruned after it"] = hook.sharded_model.config.hidden_size
    return results


def held() -> dict[str, Any]:
    """How many whole weights there are at once, and whether the old model is freed."""
    model = sharded()
    old, weights, most = weakref.ref(model), [], 0
    gather = shards.whole

    def gathered(tensor: Any) -> torch.Tensor:
        nonlocal most
        result = gather(tensor)
        weights.append(reductions.StorageWeakRef(result.untyped_storage()))
        most = max(most, sum(not weight.expired() for weight in weights))
        return result

    shards.whole = ranks.whole = gathered
    hook = HFConfigSyncHook(shard=shard)
    pruner = pruner_of(model, hook)
    pruner.step()
    shards.whole = ranks.whole = gather
    del model
    gc.collect()
    return {"gathered": len(weights), "at once": most, "old model": old() is not None}


def absent(rank: int, folder: Path) -> str:
    """Rank 1 comes to the step when the process group's timeout is over."""
    pruner = pruner_of(sharded(), HFConfigSyncHook(shard=shard))
    while rank == 1 and not (folder / "said").exists():
        time.sleep(0.1)
    said = refusal(pruner.step)
    (folder / "said").touch()
    return said


def dying(rank: int) -> str:
    """Rank 1 ends while both measure."""
    model, passes = sharded(), []

    def dies(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            os._exit(0)

    if rank == 1:
        model.model.layers[1].register_forward_pre_hook(dies)
    return refusal(lambda: calibrate(model, [batch(seed) for seed in range(3)]))


def start(rank: int, size: int, store: Path, seconds: float) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    start(rank, size, folder / "store", 600)
    results: dict[str, Any] = {name: of_case(name, rank, folder) for name in names if name in CASES}
    torch.save(results, folder / f"rank{rank}.pt")
    if "refusals" in names:
        results["refusals"] = seen_and_refused(rank, folder)
        results["failures"] = failing(rank)
        results["held"] = held()
        results["own data"] = own_data(rank)
        results["copies"] = copies(rank)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
        accelerate_shards_on_the_cpu()
        results["accelerate"] = accelerated(rank)
        dist.destroy_process_group()
        start(rank, size, folder / "other store", 4)
        results["absent"] = absent(rank, folder)
        torch.save(results, folder / f"rank{rank}.pt")
        results["dying"] = dying(rank)
    torch.save(results, folder / f"rank{rank}.pt")
    os._exit(0)  # without the farewell of a process group in which a rank was missing


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
