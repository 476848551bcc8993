"""Import a module as soon as another one is imported, without importing that one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, follower: str) -> None:
    """Import ``follower`` right after module ``name``, or now if ``name`` is loaded."""
    if name in sys.modules:
        import_module(follower)
    elif not any(isinstance(f, _Watch) and f.names == (name, follower) for f in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, follower))


class _Watch(MetaPathFinder):
    """Makes the import of one module import its follower too; finds no module itself."""

    def __init__(self, name: str, follower: str):
        self.names = (name, follower)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.names[0]:
            return None
        # the spec of the other finders, with a loader that imports the follower at the end
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(self.names[1])
            if self in sys.meta_path:  # else the import failed, and another one is to come
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
