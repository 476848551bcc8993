"""Memory that runs out says nothing of a model or of data: wherever it happens, that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import deep_zoo
import pytest
import tiny
import torch
from torch import nn

from tp_hf_config import CalibrationError, calibrate, drop_layers
from tp_hf_config.calibration.batches import Text
from tp_hf_config.calibration.sources import Sources
from tp_hf_config.cli import main
from tp_hf_config.forward.run_recipe import PLAIN
from tp_hf_config.model.surroundings import is_out_of_memory
from tp_hf_config.pipeline import text as text_module
from tp_hf_config.pipeline.job import Job
from tp_hf_config.pipeline.proofs import first_run
from tp_hf_config.pipeline.source import Source
from tp_hf_config.pipeline.text import Choice, gather

CUDA = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
_IDS = torch.arange(3, 11)[None]


def _on_cuda(*_: Any) -> None:
    raise CUDA


def _on_the_cpu(*_: Any) -> None:
    torch.empty(2**48)  # a quarter of a million GiB


def _in_python(*_: Any) -> None:
    raise MemoryError


def _in_cublas(*_: Any) -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")


RUNS_OUT = [_on_cuda, _on_the_cpu, _in_python, _in_cublas]


@pytest.mark.parametrize("runs_out", RUNS_OUT)
def test_calibrate_says_that_memory_ran_out(runs_out: Callable[..., None]) -> None:
    model = calibrated.build("llama", torch.float32)
    batches = calibrated.batches(model, 3)
    calls: list[int] = []

    def second(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            runs_out()

    model.lm_head.register_forward_pre_hook(second)
    with pytest.raises(CalibrationError) as refused:
        calibrate(model, batches)
    message = str(refused.value)
    assert message.startswith(
        "LlamaForCausalLM ran out of memory on batch 2 of the calibration data, {'input_ids': [2, 7"
    )
    assert message.endswith(
        "Pass smaller batches, or a smaller max_memory= to calibrate() (the default is half of "
        "the free memory), or refits=False, so that importances need no Gram matrices"
    )
    assert is_out_of_memory(refused.value.__cause__ or refused.value)


@pytest.mark.parametrize("runs_out", RUNS_OUT)
def test_a_text_that_does_not_fit_is_no_model_that_takes_no_text(
    runs_out: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama-gqa")
    model.lm_head.register_forward_pre_hook(runs_out)
    monkeypatch.setattr(text_module, "own_text", lambda *_: Text(_IDS, _IDS[:0]))
    job = Job(Source("model", "model"), Path("out"), {})
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        gather(job, Choice("wanda", "own"), model)
    assert is_out_of_memory(raised.value)


def test_windows_that_do_not_fit_are_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "own_text", _on_cuda)
    job = Job(Source("model", "model"), Path("out"), {})
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gather(job, Choice("wanda", "own"), tiny.build("llama-gqa"))


def test_inputs_that_do_not_fit_are_no_inputs_that_do_not_run() -> None:
    model = tiny.build("llama-gqa")
    model.lm_head.register_forward_pre_hook(_on_cuda)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        first_run(model, PLAIN)


def test_layers_are_not_dropped_unchecked() -> None:
    model = deep_zoo.build("llama")
    model.lm_head.register_forward_pre_hook(_on_cuda)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        drop_layers(model, [1])
    assert model.config.num_hidden_layers == len(model.model.layers) == 4


def test_a_norm_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    sources = Sources(model)
    monkeypatch.setattr("tp_hf_config.calibration.sources._mixes", _on_cuda)
    with sources.watching(), pytest.raises(torch.cuda.OutOfMemoryError):
        sources.chain_of(model[0](torch.rand(3, 4)), 1)


def test_the_shell_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tp_hf_config.cli.commands.check_model_folder", _on_cuda)
    assert main.main(["check", "."]) == 2
    assert capsys.readouterr().err == (
        f"tp-hf-config check: OutOfMemoryError: {CUDA}\n"
        "Memory ran out. Use a machine or a --device with more memory, or prune with --stream.\n"
    )
