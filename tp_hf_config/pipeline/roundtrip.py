"""The proof of what was written: a fresh process loads it and computes the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PipelineError
from ..inputs import example_inputs, input_forms
from .reload import outputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Proof:
    """That a folder holds a model: how many output tensors, and numbers in them, are identical."""

    tensors: int
    numbers: int

    def __str__(self) -> str:
        return (
            f"a fresh process loaded it: {self.numbers:,} numbers in {self.tensors} output "
            "tensors, bit for bit the same"
        )


def prove_roundtrip(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> Proof:
    """Compare a model with what a fresh process loads from the folder that it was saved to.

    Raises:
        PipelineError: it does not load, or computes anything else.
    """
    inputs, outputs = _run(model)
    with TemporaryDirectory(prefix="tp_hf_config-") as scratch:
        case, answer = Path(scratch, "case.pt"), Path(scratch, "answer.pt")
        content = {
            "folder": str(folder),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "trust_remote_code": trust_remote_code,
            "inputs": inputs,
        }
        torch.save(content, case)
        command = [sys.executable, "-m", "tp_hf_config.pipeline.reload", str(case), str(answer)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=scratch,  # python -m imports from there first, which may be anybody's folder
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise _failed(f"the process that loads it ended with {done.returncode}: {last}")
        found = torch.load(answer, weights_only=True)
    if "reason" in found:
        raise _failed(f"it does not load again: {found['reason']}")
    different = [
        i for i, pair in enumerate(zip(outputs, found["outputs"], strict=False)) if not _same(*pair)
    ]
    if different or len(outputs) != len(found["outputs"]):
        raise _failed(f"loaded again it computes other outputs (of {len(outputs)}: {different})")
    return Proof(len(outputs), sum(tensor.numel() for tensor in outputs))


def _run(model: PreTrainedModel) -> tuple[dict[str, Any], list[Tensor]]:
    """Inputs that the model runs with, and what it makes of them."""
    reason = ""
    for inputs in (example_inputs(model), *input_forms(model)):
        try:
            return inputs, outputs_of(model, inputs)
        except Exception as error:  # whatever a forward pass raises at another form
            reason = reason or f"{type(error).__name__}: {error}"
    raise _failed(f"no inputs were found that it runs with: {reason}")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits (which NaN is of)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _failed(reason: str) -> PipelineError:
    return PipelineError(
        f"the pruned model was not written, its round trip is not proved: {reason}"
    )
