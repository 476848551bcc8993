"""What only Linux has is taken away: macOS and Windows have to do without it."""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_hf_config.calibration.passes import memory_limit
from tp_hf_config.checkpoint import verify
from tp_hf_config.model import files
from tp_hf_config.model.surroundings import free_memory

GIB = 2**30


@pytest.fixture
def _without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = builtins.open

    def without_proc(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", without_proc)


@pytest.mark.usefixtures("_without_proc")
class TestFreeMemory:
    def test_macos_says_how_much_memory_there_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def sysconf(name: str) -> int:
            known = {"SC_PHYS_PAGES": 4 * GIB // 16384, "SC_PAGE_SIZE": 16384}
            if name not in known:
                raise ValueError("unrecognized configuration name")
            return known[name]

        monkeypatch.setattr(os, "sysconf", sysconf)
        assert free_memory() == 2 * GIB

    def test_windows_says_how_much_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def status(buffer: Any) -> int:
            assert (ctypes.sizeof(buffer), buffer[0]) == (64, 64)
            buffer[1], buffer[2] = 8 * GIB, 3 * GIB
            return 1

        kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
        monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
        monkeypatch.delattr(os, "sysconf")
        assert free_memory() == 3 * GIB

    def test_a_system_that_says_nothing_counts_as_a_small_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "sysconf")
        assert free_memory() == 4 * GIB
        assert memory_limit(torch.nn.Linear(2, 2), None) == 2 * GIB


def test_a_device_with_memory_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    assert free_memory(torch.device("cuda:1")) == 5 * GIB
    assert free_memory(torch.device("cpu")) == pytest.approx(free_memory(), rel=0.2)


WITHOUT = """
import importlib, os, pkgutil, signal, sys
import torch, torch_pruning, transformers
transformers.GenerationMixin, transformers.LlamaForCausalLM  # psutil has a part for each system
sys.modules["fcntl"] = sys.modules["resource"] = None
for module, names in {
    os: ("sysconf", "sched_getaffinity", "fork", "getuid", "geteuid", "statvfs", "fchmod"),
    signal: ("SIGKILL", "SIGHUP", "SIGALRM", "setitimer", "pthread_kill", "sigwait"),
}.items():
    for name in names:
        delattr(module, name)
import tp_hf_config
for found in pkgutil.walk_packages(tp_hf_config.__path__, "tp_hf_config."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
)
model = transformers.LlamaForCausalLM(config)
calibration = tp_hf_config.calibrate(model, torch.randint(3, 40, (4, 1, 8)))
ratios = {"intermediate_size": 0.5}
hook = tp_hf_config.HFConfigSyncHook(ratios=ratios, refit=calibration)
pruner = torch_pruning.pruner.MetaPruner(
    model,
    example_inputs=None,
    importance=calibration.importance(),
    hooks=[hook],
)
pruner.step()
model.save_pretrained(sys.argv[1])
model.config.intermediate_size = 32
model.config.save_pretrained(sys.argv[1])
tp_hf_config.repair_checkpoint(sys.argv[1])
print(transformers.AutoConfig.from_pretrained(sys.argv[1]).intermediate_size)
"""


def test_all_works_without_what_windows_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(tmp_path / "pruned")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["16"]


def test_windows_flushes_only_what_is_open_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Any, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Windows opens no folders")
        assert flags & os.O_RDWR
        return open_(path, flags, *mode)

    open_ = os.open
    monkeypatch.setattr(files, "_ON_WINDOWS", True)
    monkeypatch.setattr(os, "open", opened)
    (tmp_path / "a").write_bytes(b"1")
    files.flush(tmp_path / "a")
    files.flush(tmp_path)


def test_how_a_process_ended_is_said_without_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGKILL")
    assert verify._end_of(1, "a\nlast line\n") == "the fresh process ended with: last line"
