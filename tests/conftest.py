"""Shared by all tests: how many threads, and a collector that reloads saved models elsewhere."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
import reload_child
import torch
import warm_processes

# Two processes at once share the cores of the smallest machine.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)

CACHE = "TP_HF_CONFIG_CACHE"
os.environ[CACHE] = "off"  # what a test needs, it finds out by itself
_ROOMS = ("calibration", "checkpoint", "cli", "hook", "pipeline", "planning")
_ON_GROUPS = ("config_graph", "cut_list", "layer_fields", "sides")
SHARE = (
    "docs",
    "matrix",
    *(f"unit/{room}" for room in _ROOMS),
    *(f"unit/graph/test_{module}.py" for module in _ON_GROUPS),
    "unit/fieldmap/test_layer_map.py",
    "unit/test_notebook.py",
)
"""Tests of what comes after experiments: a class's run once, for all of them."""
_IN_GRAPH = ("experiments", "full_size", "layer_experiments")
EXPERIMENTS = ("model", "forward", "fieldmap", "twin", *(f"graph.{name}" for name in _IN_GRAPH))
"""The rooms and modules of the package whose code runs in experiments."""

SLOW = "~"  # before a line of sample.txt: the quick tests leave it out


def _listed(file: str) -> list[str]:
    """Return the lines of a list of tests, without comments."""
    lines = Path(__file__).with_name(file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


LISTS = {"sample": _listed("sample.txt"), "full": _listed("full.txt")}  # mark -> what has it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what the lists name; a line that stands for nothing is an error."""
    found: set[str] = set()
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        for mark, lines in LISTS.items():
            matching = {line for line in lines if _stands_for(line.removeprefix(SLOW), name)}
            found |= matching
            if matching:
                item.add_marker(mark)
            if mark == "sample" and any(not line.startswith(SLOW) for line in matching):
                item.add_marker("quick")
    missing = [line for lines in LISTS.values() for line in lines if line not in found]
    if missing and all(Path(argument).name == "tests" for argument in config.args):  # all of them
        raise pytest.UsageError(f"sample.txt, full.txt: no test is {', '.join(missing)}")


def _stands_for(line: str, name: str) -> bool:
    """Whether a line of the list means a test: itself, or the class, file or function it is in."""
    escaped = line.replace("[", "[[]")
    return fnmatch(name, escaped) or name.startswith((f"{line}::", f"{line}["))


class Collector:
    """Saves models, and has a fresh process reload each."""

    def __init__(self, root: Path):
        self._root = root
        self._numbers = itertools.count()

    def reloaded(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What a fresh process found; see ``reload_child.reload`` for the keys.

        Args:
            model: a live model in eval mode.
            inputs: for its forward pass; ``input_ids`` is also what it generates from.
        """
        folder = self._root / f"{next(self._numbers):03d}"
        model.save_pretrained(folder)
        case = {
            "class": type(model).__name__,
            "inputs": inputs,
            "outputs": reload_child.outputs_of(model, inputs),
            "tokens": reload_child.tokens_of(model, inputs),
        }
        torch.save(case, folder / reload_child.CASE)
        results, errors = self._root / "results.json", self._root / "errors.txt"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        arguments = (str(torch.get_num_threads()), str(results), str(folder))
        child = warm_processes.start(reload_child.__file__, arguments, environment, errors)
        assert child.wait() == 0, errors.read_text()
        found: dict[str, Any] = json.loads(results.read_text())[str(folder)]
        shutil.rmtree(folder)
        return found


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Collector:
    """One collector for the whole run."""
    return Collector(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session", autouse=True)
def _start_at_once() -> Iterator[Any]:
    """The library's fresh processes are forks, which need not import what every one imports.

    Yields what starts them outside of the tests.
    """
    from tp_hf_config.checkpoint import child, verify

    def start_child(job_file: Path, errors: Path) -> warm_processes.Fork:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return warm_processes.start(child.__file__, [str(job_file)], environment, errors)

    by_subprocess = verify.start_child
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "start_child", start_child)
        yield by_subprocess


@pytest.fixture
def started_as_for_users(_start_at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's fresh processes are started as they are outside of the tests."""
    from tp_hf_config.checkpoint import verify

    monkeypatch.setattr(verify, "start_child", _start_at_once)


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache on disk of this run, for all of its processes."""
    own = tmp_path_factory.getbasetemp()
    return str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache")


def _shares(request: pytest.FixtureRequest) -> bool:
    """Whether a test is one of those that share experiments."""
    return request.path.relative_to(Path(__file__).parent).as_posix().startswith(SHARE)


@pytest.fixture(scope="module", autouse=True)
def _experiments_once(request: pytest.FixtureRequest, _shared: str) -> Iterator[None]:
    """Some tests share experiments; but see ``_not_of_changed_code``.

    A file of ``docs`` shares its own: what a page shows does not come from an earlier run.
    """
    own = f"{_shared}-{request.path.stem}" if request.path.parent.name == "docs" else _shared
    os.environ[CACHE] = own if _shares(request) else "off"
    yield
    os.environ[CACHE] = "off"


@pytest.fixture(autouse=True)
def _not_of_changed_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that replace something neither find what others found, nor leave others anything.

    Those that share experiments replace what comes after these, or switch the cache off and call
    ``memories.forget``.
    """
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    if _shares(request):
        patch: Any = request.getfixturevalue("monkeypatch")
        yield
        inside = [name for target, name, _ in patch._setattr if _runs_in_experiments(target)]
        assert not inside or os.environ[CACHE] == "off", f"{inside}: switch the cache off, forget"
    else:
        from tp_hf_config.twin.tiny import tiny_model

        tiny_model._built.clear()
        yield
        tiny_model._built.clear()


def _runs_in_experiments(target: Any) -> bool:
    """Whether a module, class or object is of code that runs in experiments."""
    place = str(getattr(target, "__module__", getattr(target, "__name__", "")))
    return f"{place}.".startswith(tuple(f"tp_hf_config.{name}." for name in EXPERIMENTS))


@pytest.fixture(scope="module", autouse=True)
def _put_aside() -> None:
    """What the files before have left is not looked through at every collection, nor by a hook."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


_TESTS_BETWEEN = 20
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _put_aside_within_a_file() -> None:
    """Some files keep hundreds of models."""
    if next(_tests) % _TESTS_BETWEEN == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models that small wait for their threads longer than they compute."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process proves a pruned folder: what it would find is not what a test is about."""
    from tp_hf_config.pipeline import prune
    from tp_hf_config.pipeline.proofs import Proof

    monkeypatch.setattr(prune, "prove_roundtrip", lambda *_: Proof(1, 2))


@pytest.fixture
def every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no width is named, all inside go, the hidden size too: as without inner widths."""
    from tp_hf_config.planning import selection

    monkeypatch.setattr(selection, "inner_widths_of", lambda view: ())
