"""The user's random numbers go on as if none had been drawn: those of devices too."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import torch
import zoo

import tp_hf_config
from tp_hf_config import calibrate, drop_layers
from tp_hf_config.checkpoint.verify import live_outputs
from tp_hf_config.pipeline.prune import _seeded

pytestmark = pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
PACKAGE = Path(tp_hf_config.__file__).parent


def _seed_for_a_job(model: Any) -> None:
    with _seeded(3):
        torch.rand(1)
        random.random()


def _write_text(model: Any) -> None:
    calibrate(model, "own", tokens=200)


def _measure(model: Any) -> None:
    calibrate(model, BATCHES)


def _compare_outputs(model: Any) -> None:
    live_outputs(model, BATCHES[0])


def _drop(model: Any) -> None:
    drop_layers(model, [1])


BATCHES = calibrated.batches(zoo.build("llama"), 2)
Use = Callable[[Any], None]
USES: list[Use] = [_seed_for_a_job, _write_text, _measure, _compare_outputs, _drop]


def _states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("use", USES)
def test_devices_that_are_not_in_use_are_not_seeded(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before CUDA is in use, its seed would wait until it is, and stay."""
    model, before = zoo.build("llama"), _states()
    for device in (torch.cuda, torch.xpu, torch.mps):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state"):
            if hasattr(device, name):
                monkeypatch.setattr(device, name, lambda *_: pytest.fail("a device was seeded"))
    use(model)
    assert _states() == before


@pytest.mark.parametrize("use", USES)
def test_devices_in_use_go_on_as_before(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generators of the CPU's stand for those of two devices."""
    model = zoo.build("llama")
    devices = [torch.Generator().manual_seed(number) for number in (5, 6)]
    before = [each.get_state() for each in devices]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(devices))
    use(model)
    assert all(
        torch.equal(each.get_state(), state) for each, state in zip(devices, before, strict=True)
    )


def test_a_device_in_use_draws_what_the_seed_says(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    with _seeded(3):
        drawn = torch.rand(4, generator=device)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_only_a_process_of_its_own_seeds_all_devices() -> None:
    """``torch.manual_seed`` does, also those not in use; so does all that calls it."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(
            r"torch\.manual_seed\(|\bset_seed\(|fork_rng|np\.random", path.read_text("utf-8")
        )
    }
    assert found == {"checkpoint/child.py"}
