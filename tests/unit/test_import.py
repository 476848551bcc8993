"""Importing the library stays light."""

from __future__ import annotations

import sys
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import small

from tp_hf_config.when_imported import when_imported


def loaded(code: str) -> list[str]:
    return small.python(
        f"""
        import sys
        {code}
        print("\\n".join(sorted(sys.modules)))
        """
    ).splitlines()


def test_import_loads_no_modelling_code():
    modules = loaded("import tp_hf_config; tp_hf_config.HFConfigSyncHook()")
    assert "torch_pruning" in modules
    assert "tp_hf_config.hook.hook" in modules
    assert "transformers.modeling_utils" not in modules
    assert [name for name in modules if name.startswith("transformers")] == []


def test_import_alone_loads_no_torch_and_lists_every_public_name():
    modules = loaded(
        "import tp_hf_config, tp_hf_config.errors;"
        "assert set(tp_hf_config.__all__) <= set(dir(tp_hf_config))"
    )
    assert not {"torch", "torch_pruning", "transformers"} & set(modules)


@pytest.mark.parametrize(
    "first",
    [
        "import tp_hf_config, torch_pruning as tp",
        "import torch_pruning as tp, tp_hf_config",
        "import tp_hf_config, importlib.util as u; u.find_spec('torch_pruning'); "
        "import torch_pruning as tp",
        "from tp_hf_config import HFConfigSyncHook; import torch_pruning as tp",
    ],
)
def test_pruners_take_hooks_whichever_is_imported_first(first: str):
    printed = small.python(
        f"""
        {first}
        from torch import nn, rand
        class Hook:
            def after_step(self, pruner):
                print("fired")
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        importance = tp.importance.MagnitudeImportance()
        kept = [model[1]]
        tp.pruner.BasePruner(
            model, rand(1, 4), importance, ignored_layers=kept, hooks=[Hook()]
        ).step()
        """
    )
    assert printed == "fired"


def test_import_adds_nothing_beside_itself():
    before = set(loaded("import torch_pruning"))
    after = set(loaded("import torch_pruning, tp_hf_config"))
    added = {name for name in after - before if not name.startswith("tp_hf_config")}
    assert added == set()


def test_import_loads_only_what_it_names():
    own = {name for name in loaded("import tp_hf_config") if name.startswith("tp_hf_config.")}
    assert not own & {
        f"tp_hf_config.{name}" for name in ("learn", "sync", "prepare", "tracing", "study")
    }


def test_everything_in_all_is_there():
    printed = small.python(
        """
        import tp_hf_config
        print([name for name in tp_hf_config.__all__ if not hasattr(tp_hf_config, name)])
        try:
            tp_hf_config.nonsense
        except AttributeError as error:
            print(error)
        """
    )
    assert printed == "[]\nmodule 'tp_hf_config' has no attribute 'nonsense'"


def test_import_twice_changes_nothing():
    printed = small.python(
        """
        import importlib, torch_pruning as tp, tp_hf_config
        init = tp.pruner.BasePruner.__init__
        importlib.import_module("tp_hf_config")
        import tp_hf_config.hook.registration
        print(tp.pruner.BasePruner.__init__ is init)
        importlib.reload(tp_hf_config)
        print(tp.pruner.BasePruner.__init__ is init)
        """
    )
    assert printed == "True\nTrue"


def test_a_follower_that_could_not_be_imported_is_imported_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "followed_module.py").write_text("")
    (tmp_path / "following_module.py").write_text("import no_such_module_here")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    when_imported("followed_module", "following_module")
    with pytest.raises(ImportError):
        import_module("followed_module")
    assert not {"followed_module", "following_module"} & sys.modules.keys()
    (tmp_path / "following_module.py").write_text("at_last = True")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    invalidate_caches()
    import_module("followed_module")
    assert sys.modules.pop("following_module").at_last
    assert sys.modules.pop("followed_module")
    assert sys.meta_path == finders
