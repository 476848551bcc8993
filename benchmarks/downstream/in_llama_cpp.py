"""llama.cpp: converted, quantised and run by its own programs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from llama_programs import program, quantise, run

from tp_hf_config import PipelineError, export

FORMATS = {"llama.cpp F16": "F16", "llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_K_M": "Q4_K_M"}
_CONTEXT, _PROMPT, _NEW, _REPEATED = 256, 128, 32, 5


def measured(folder: Path, text: str, place: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Return for each format the size, perplexity and speed, or why there are none."""
    out = place / "gguf"
    shutil.rmtree(out, ignore_errors=True)
    try:
        export(folder, out, to="gguf", trust_remote_code=True)
    except PipelineError as error:
        return {name: {"error": str(error)} for name in FORMATS}
    texts = place / "text.txt"
    texts.write_text(text, encoding="utf-8")
    found = {name: _of(kind, out, texts, place, threads) for name, kind in FORMATS.items()}
    shutil.rmtree(out)
    return found


def _of(kind: str, out: Path, text: Path, place: Path, threads: int) -> dict[str, Any]:
    file, number = out / f"{kind}.gguf", str(threads)
    told, refused = quantise(out / "model.gguf", file, kind, place, threads)
    if refused:
        return {"error": refused}
    other = re.search(r"(\d+) of \d+ tensor\(s\) required fallback", told)
    asked = ("-m", file, "-f", text, "-c", str(_CONTEXT), "-t", number)
    said = run(program("llama-perplexity", place), *asked)
    final = re.search(r"PPL = ([\d.]+)", said.stdout + said.stderr)
    assert final is not None, said.stderr[-2000:]
    sizes = ("-p", str(_PROMPT), "-n", str(_NEW), "-r", str(_REPEATED), "-t", number)
    speeds = run(program("llama-bench", place), "-m", file, *sizes, "-o", "json").stdout
    prompt, new = (row["avg_ts"] for row in json.loads(speeds))
    return {
        "bytes": file.stat().st_size,
        "perplexity": float(final[1]),
        "fallbacks": int(other[1]) if other else 0,
        "prompt_per_second": prompt,
        "new_per_second": new,
    }
