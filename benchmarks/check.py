"""What ``check_checkpoint`` costs on 70 billion parameters: seconds and memory of fresh processes.

    python benchmarks/check.py [--rounds 3] [--json FILE]

A folder as Llama 3 70B has it, 30 shards and an index, is made of files whose headers are true and
whose data are holes; ``check_checkpoint`` reads headers alone.  One process checks it as it is,
another with a wrong ``intermediate_size``, a third only imports the class from Transformers.  Each
phase is printed with its seconds (the best of some rounds) and the peak of memory until its end;
importing is a phase of its own.  A check, imports apart, has to end in 5 seconds, and to stay under
1.5 GiB with them: what does not makes this command fail.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SECONDS, GIB = 5.0, 1.5
SHARDS = 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
WRONG = 28_000
CASES = ("as it is", "wrong width", "class alone")
_CHILD = "--phases-of"


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of Llama 3 70B.  By hand: this process imports no torch.

    What a process had in memory counts as its child's peak too.
    """
    hidden, inner, words = 8192, 28672, 128256
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for number in range(80):
        found |= {f"model.layers.{number}.{key}.weight": shape for key, shape in layer.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def write(folder: Path) -> None:
    """The folder: config, index, and shards without data."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    every = list(shapes().items())
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        begin, end = (len(every) * part // SHARDS for part in (number, number + 1))
        write_sparse(folder / name, every[begin:end])
        weight_map |= {tensor: name for tensor, _ in every[begin:end]}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_sparse(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file in bfloat16 whose header is right and whose data is a hole."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors:
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def phases_of(folder: Path | None) -> dict[str, Any]:
    """In this process: seconds and peak of memory of each phase; without a folder, imports."""
    found: dict[str, Any] = {"seconds": {}, "gib": {}}

    def phase(name: str, do: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = do()
        found["seconds"][name] = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["gib"][name] = peak / 2**20
        return result

    phase("import class", _import_class)
    if folder is not None:
        phase("import check", _import_check)
        from tp_hf_config import check_checkpoint
        from tp_hf_config.checkpoint.folder import read_weights

        phase("headers", lambda: read_weights(folder))
        report = phase("check", lambda: check_checkpoint(folder))
        found |= {"said": str(report), "sound": report.sound}
    return found


def _import_class() -> None:
    from transformers import LlamaForCausalLM  # noqa: F401


def _import_check() -> None:
    pass


def fresh(folder: Path | None) -> dict[str, Any]:
    """The phases of a process that has nothing yet."""
    command = [sys.executable, __file__, _CHILD, "" if folder is None else str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measured(rounds: int) -> dict[str, dict[str, Any]]:
    """Each case: the best seconds and the highest peak of each phase, and what was said."""
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as place:
        folders = {CASES[0]: Path(place) / "sound", CASES[1]: Path(place) / "wrong"}
        for folder in folders.values():
            folder.mkdir()
            write(folder)
        wrong = {**CONFIG, "intermediate_size": WRONG}
        (folders[CASES[1]] / "config.json").write_text(json.dumps(wrong))
        for name in CASES:
            runs = [fresh(folders.get(name)) for _ in range(rounds)]
            found[name] = {
                **runs[0],
                "seconds": {
                    key: min(r["seconds"][key] for r in runs) for key in runs[0]["seconds"]
                },
                "gib": {key: max(run["gib"][key] for run in runs) for key in runs[0]["gib"]},
            }
    return found


def misses(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it has to be."""
    found = []
    for name in CASES[:2]:
        case = figures[name]
        if case["seconds"]["check"] > SECONDS or case["gib"]["check"] > GIB:
            found.append(f"{name}: over {SECONDS:g} s or {GIB} GiB")
    expected = f"intermediate_size says {WRONG:,}, but the weights of layers 0-79 hold 28,672"
    if figures[CASES[0]]["sound"] is not True or expected not in figures[CASES[1]]["said"]:
        found.append("a verdict is not the right one")
    return found


def main() -> None:
    """Measure, print a table, write JSON; exit code 1: over a limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(_CHILD, dest="child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(phases_of(Path(arguments.child) if arguments.child else None)))
        return
    figures = measured(arguments.rounds)
    _show(figures)
    wrong = misses(figures)
    print(*wrong, sep="\n", end="")
    if arguments.json:
        from tp_hf_config.reports import dated

        arguments.json.write_text(json.dumps(dated({"figures": figures})))
    sys.exit(1 if wrong else 0)


def _show(figures: dict[str, dict[str, Any]]) -> None:
    """The table; imported here is what a measured process would inherit."""
    from rich.console import Console
    from rich.table import Table

    from tp_hf_config.reports import versions

    title = f"70 billion parameters in {SHARDS} shards; {time.strftime('%Y-%m-%d')}"
    table = Table("phase", title=title)
    for name in CASES:
        table.add_column(f"{name}, s", justify="right")
        table.add_column("GiB", justify="right")
    for phase in figures[CASES[0]]["seconds"]:
        row = []
        for name in CASES:
            seconds, peak = figures[name]["seconds"].get(phase), figures[name]["gib"].get(phase)
            row += ["", ""] if seconds is None else [f"{seconds:.2f}", f"{peak:.2f}"]
        table.add_row(phase, *row)
    console = Console()
    console.print(table)
    alone = sum(figures[CASES[2]]["seconds"].values())
    for name in CASES[:2]:
        check = figures[name]["seconds"]["check"]
        console.print(f"{name}: the check takes {check / alone:.2f} times the import")
    console.print(f"limits: {SECONDS:g} s without imports, {GIB} GiB", str(versions()), sep="\n")


if __name__ == "__main__":
    main()
