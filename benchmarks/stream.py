"""What it takes to prune models from folder to folder: ``python benchmarks/stream.py``.

A random Llama of real size is written in bfloat16, pruned by magnitude from its folder into another
one with ``--stream``, and checked there by a fresh process.  Shown are the most anonymous memory
that a process of it took (pages of files do not count: the system drops them when memory is short),
and the time beside reading the folder twice and writing the result once, in the same run.  The same
for a model of Qwen2 72B's widths that is padded for eight ranks.  Then the time and memory for
the plan, the graph and the cut list of a 70B Llama and of DeepSeek-V3, from their configs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SHARD = "2GB"
CHUNK = 1 << 24  # bytes
GIB = 2**30
RATIO = 0.2
MOST_MEMORY = 3 * GIB  # anonymous, of a process, whatever the size of the model
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
QWEN_72B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
console = Console()


def llama(**settings: Any) -> Any:
    """A Llama without data."""
    config = LlamaConfig(**settings, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def qwen(**settings: Any) -> Any:
    """A Qwen2 of 72B's widths, without data."""
    config = Qwen2Config(**QWEN_72B, **settings, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        return Qwen2ForCausalLM(config).to(torch.bfloat16)


def deepseek_v3() -> Any:
    """DeepSeek-V3 of full size, without data."""
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(dtype="bfloat16")).to(torch.bfloat16)


MODELS: dict[str, Callable[[], Any]] = {
    "Llama 70B": lambda: llama(**LLAMA_70B),
    "DeepSeek-V3": deepseek_v3,
}


def random_values(like: Tensor) -> Tensor:
    """A tensor whose rows are of different sizes."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(like.numel())
    block = (torch.randn(1 << 20, generator=generator) * 0.02).to(like.dtype)
    values = block.repeat(-(-like.numel() // len(block)))[: like.numel()].view(like.shape)
    return values * torch.rand(len(like), 1, generator=generator).to(like.dtype)


def write_folder(model: Any, folder: Path) -> None:
    """Write a random model of these shapes, file by file."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, names in split.filename_to_tensors.items():
        values = {name: random_values(state[name]) for name in names}
        save_file(values, folder / file, {"format": "pt"})


def read_and_write(source: Path, pruned: Path, target: Path) -> float:
    """Seconds to read a folder's weights twice and write as many bytes as another's once."""
    started = time.perf_counter()
    for _ in range(2):
        for chunk in _chunks(source):
            del chunk
    left = sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    data = os.urandom(CHUNK)
    with target.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(data[:left])
        os.fsync(file.fileno())
    target.unlink()
    return time.perf_counter() - started


def _chunks(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                yield chunk


def measured(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function returns in a process of its own, with its time and memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, args))
    process.start()
    sender.close()  # so that a process that fails ends the wait
    result: dict[str, Any] = receiver.recv()
    process.join()
    return result


def _send(sender: Any, work: Callable[..., dict[str, Any]], args: Any) -> None:
    warnings.simplefilter("ignore")
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, *map(anonymous, ("self", *children())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        result = work(*args)
    finally:
        done.set()
        watcher.join()
    sender.send({**result, "seconds": time.perf_counter() - started, "memory": most})


def children() -> list[str]:
    """The processes that this one has started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def anonymous(process: str) -> int:
    """The bytes of anonymous memory of a process; 0 if it has ended."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 0


def prune_folder(source: Path, out: Path, threads: int) -> dict[str, Any]:
    """Prune every default width by magnitude, folder to folder."""
    torch.set_num_threads(threads)
    from tp_hf_config.pipeline.job import Job
    from tp_hf_config.pipeline.prune import prune_checkpoint
    from tp_hf_config.pipeline.source import Source

    job = Job(
        Source(str(source), str(source)),
        out,
        {"pruning_ratio": RATIO},
        importance="magnitude",
        refit=False,
        stream=True,
    )
    return {"text": str(prune_checkpoint(job))}


def pad_folder(source: Path, out: Path, threads: int) -> dict[str, Any]:
    """Pad the feed-forward width 29,568 for eight ranks with groups of 128: to 29,696."""
    torch.set_num_threads(threads)
    from tp_hf_config import export

    return {"text": str(export(source, out, to="padded", multiple_of=1024))}


def make_cut_list(name: str, out: Path) -> dict[str, Any]:
    """Plan, graph and cut list of a model without weights, by random importance."""
    torch.set_num_threads(1)
    import torch_pruning as tp

    from tp_hf_config import HFConfigSyncHook, plan

    model = MODELS[name]()
    planned = plan(model, pruning_ratio=RATIO)
    hook = HFConfigSyncHook(plan=planned)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        hooks=[hook],
    )
    pruner.step()
    assert hook.cuts is not None
    hook.cuts.save(out)
    return {
        "text": str(hook.cuts),
        "file": out.stat().st_size,
        "parameters": planned.before.parameters,
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/stream.py", description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B Llama that is written")
    parser.add_argument("--folder", type=Path, help="where there is room for twice the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("stream", "pad", "cut-list"), help="this part")
    parser.add_argument("--padded-layers", type=int, default=5, help="of the 72B that is padded")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder, prefix="stream-") as name:
        folder = Path(name)
        if options.only in (None, "stream"):
            model = llama(**LLAMA_7B, num_hidden_layers=options.layers)
            _stream("by magnitude", model, prune_folder, folder, options)
        if options.only in (None, "pad"):
            model = qwen(num_hidden_layers=options.padded_layers)
            _stream("padded", model, pad_folder, folder, options)
        if options.only in (None, "cut-list"):
            _cut_lists(folder)


def _stream(
    how: str, model: Any, work: Callable[..., Any], folder: Path, options: argparse.Namespace
) -> None:
    source, out = folder / "model", folder / "out"
    source.mkdir()
    console.print(f"writing {model.num_parameters():,} random parameters in bfloat16")
    write_folder(model, source)
    result = measured(work, source, out, options.threads)
    console.print(result["text"], markup=False)
    plain = read_and_write(source, out, folder / "plain")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    table = Table(f"folder to folder, {how}", "measured")
    table.add_row("weights", f"{size / 1e9:.1f} GB")
    table.add_row("written", f"{written / 1e9:.1f} GB")
    table.add_row("most anonymous memory of a process", f"{result['memory'] / GIB:.2f} GiB")
    table.add_row("seconds", f"{result['seconds']:.0f}")
    table.add_row("read twice, written once, by itself", f"{plain:.0f}")
    table.add_row("ratio", f"{result['seconds'] / plain:.2f}")
    console.print(table)
    check_memory(result)
    shutil.rmtree(source)
    shutil.rmtree(out)


def _cut_lists(folder: Path) -> None:
    table = Table("cut list", "parameters", "seconds", "memory", "file")
    for name in MODELS:
        result = measured(make_cut_list, name, folder / "cuts.safetensors")
        console.print(result["text"], markup=False)
        table.add_row(
            name,
            f"{result['parameters'] / 1e9:.0f} billion",
            f"{result['seconds']:.0f}",
            f"{result['memory'] / GIB:.2f} GiB",
            f"{result['file'] / 1e6:.1f} MB",
        )
        check_memory(result)
    console.print(table)


def check_memory(result: dict[str, Any]) -> None:
    """Exit with an error if a process took more memory than is promised."""
    if result["memory"] > MOST_MEMORY:
        raise SystemExit(
            f"{result['memory'] / GIB:.2f} GiB of memory, expected {MOST_MEMORY / GIB:.0f} at most"
        )


if __name__ == "__main__":
    main()
