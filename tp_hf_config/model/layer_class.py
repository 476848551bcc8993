"""Generate the subclass of a model class whose layers are each built from a config of their own.

Transformers reads ``per_layer_config`` into the config (5.15 and newer), but few of its classes
build their layers from it (pull request 45332).  The generated file does, and imports nothing but
Transformers: it is saved beside the weights, and loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .surroundings import ONE_AT_A_TIME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATED = "tp_hf_config_generated"
"""The package of the generated modules; folders hold copies of them."""
_MARK = "layers_with_own_config"
"""The attribute of a generated class that holds the names of its lists of layers."""

_SOURCE = '''\
"""{stock} with layers that differ: each is built from its own entry in ``per_layer_config``.

Written by tp_hf_config, which pruned this model. It needs only Transformers, 5.15 or newer:
{auto}.from_pretrained(folder, trust_remote_code=True)
"""

import inspect
import threading
from collections import Counter
from contextlib import contextmanager
from functools import wraps

{imports}

LISTS = {{
{lists}
}}
_BUILDING = threading.RLock()


def _from_own_entry(build, name, built):
    """Wrap a layer's constructor: it gets the layer's own config in place of the model's."""
    signature = inspect.signature(build)

    @wraps(build)
    def build_from_own_entry(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        config, number = call.arguments["config"], call.arguments.get("layer_idx")
        number = built[name, id(config)] if number is None else number
        built[name, id(config)] += 1
        # the convolutions before the encoder of NemotronAsrStreamingModel are counted from 1
        if config.is_heterogeneous and number < config.num_hidden_layers:
            call.arguments["config"] = config.per_layer_config[number]
        build(*call.args, **call.kwargs)

    return build_from_own_entry


@contextmanager
def _own_configs():
    """While open, layers are built from their own entries in ``per_layer_config``."""
    with _BUILDING:
        built, originals = Counter(), {{}}
        for name, classes in LISTS.items():
            for layer_class in classes:
                originals.setdefault(layer_class, layer_class.__init__)
                layer_class.__init__ = _from_own_entry(layer_class.__init__, name, built)
        try:
            yield
        finally:
            for layer_class, build in originals.items():
                layer_class.__init__ = build


class _LayersWithOwnConfig:
    {mark} = tuple(LISTS)

    @classmethod
    def is_custom_code(cls):
        """False: as of the stock class, loading computes buffers that are not saved."""
        return False

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        self._tell_layers("_attn_implementation_internal")

    def set_experts_implementation(self, *args, **kwargs):
        super().set_experts_implementation(*args, **kwargs)
        self._tell_layers("_experts_implementation_internal")

    def _tell_layers(self, key):
        """Give the layers' own configs a value that the model's config has now."""
        for name in LISTS:
            around = name
            while not hasattr(self.base_model.get_submodule(around), "config"):
                around = around.rpartition(".")[0]
            config = self.base_model.get_submodule(around).config
            for part in self.base_model.get_submodule(name).modules():
                if type(getattr(part, "config", None)) is type(config):
                    setattr(part.config, key, getattr(config, key, None))
{classes}'''

_CLASS = """

class {name}(_LayersWithOwnConfig, {stock}):
    _auto_class = "{auto}"  # save_pretrained copies this file

    @wraps({stock}.__init__)
    def __init__(self, config, *args, **kwargs):
        with _own_configs():
            super().__init__(config, *args, **kwargs)
        # building PeAudioVideoModel sets its text model's attention anew, after that is built
        self._tell_layers("_attn_implementation_internal")
"""
_PREFIX = "Layerwise"


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class from which a generated class is derived; of another, the class itself."""
    if not layer_lists(model_class):
        return model_class
    return next(base for base in model_class.__mro__[1:] if hasattr(base, "from_pretrained"))


def layer_lists(model_class: type) -> tuple[str, ...]:
    """Return the names of the lists whose layers a generated class builds from own configs.

    The names count from the model that a task's class holds (``layers`` of a ``LlamaModel``). They
    are empty for a class that was not generated.
    """
    names: tuple[str, ...] = getattr(model_class, _MARK, ())
    return names


def layerwise_class(
    model: PreTrainedModel, lists: Mapping[str, Iterable[type]]
) -> type[PreTrainedModel]:
    """Return the generated subclass of a model's class; made once for each class and lists.

    ``lists``: the name of each list of layers -> the classes of its layers.

    Returns:
        The class. Its module lies in a temporary folder until the process ends, from where
        ``save_pretrained`` copies it.
    """
    base: Any = model.base_model
    named = tuple((name, tuple(dict.fromkeys(classes))) for name, classes in lists.items())
    classes: Any = (type(model), type(base), type(model.config))
    with ONE_AT_A_TIME:
        generated: type[PreTrainedModel] = _generated(*classes, named)
    return generated


@cache
def _generated(
    stock: type, base: type, config_class: type, lists: tuple[tuple[str, tuple[type, ...]], ...]
) -> Any:
    auto = _auto_class(config_class, stock, base)
    text = _SOURCE.format(
        stock=stock.__name__,
        auto=auto,
        imports="\n".join(_imports((stock, base, *(c for _, classes in lists for c in classes)))),
        lists="\n".join(
            f'    "{name}": ({", ".join(c.__name__ for c in classes)},),' for name, classes in lists
        ),
        mark=_MARK,
        classes="".join(
            _CLASS.format(name=_name(cls), stock=cls.__name__, auto=of_class)
            for cls, of_class in {base: "AutoModel", stock: auto}.items()
        ),
    )
    family = stock.__module__.rpartition(".")[2].removeprefix("modeling_")
    module = _module(f"modeling_layerwise_{family}", text)
    return getattr(module, _name(stock))


def _name(stock: type) -> str:
    """Return the name of the class that is generated of a class.

    ``save_pretrained`` takes a class with "Tokenizer" in its name (audio codecs) for a tokenizer,
    and writes two names into ``auto_map`` (transformers 5.24, ``custom_object_save``).
    """
    return f"{_PREFIX}{stock.__name__.replace('Tokenizer', 'Codec')}"


def _auto_class(config_class: type, stock: type, base: type) -> str:
    """Return the name of the auto class that loads a class: ``AutoModel`` if it has no head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if stock is base and stock in _classes_of(MODEL_MAPPING, config_class):
        return "AutoModel"
    return auto_classes(config_class, stock)[0]


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """Return the ``auto_map`` of a config whose model is of a generated class."""
    members: dict[str, Any] = vars(sys.modules[model_class.__module__])
    file = model_class.__module__.rpartition(".")[2]
    return {
        auto: f"{file}.{name}"
        for name, cls in sorted(members.items())
        if isinstance(cls, type) and layer_lists(cls)
        if (auto := getattr(cls, "_auto_class", None)) is not None
    }


def auto_classes(config_class: type, stock: type) -> list[str]:
    """Return the names of the auto classes that load a class, those for its task first."""
    from transformers.models.auto import modeling_auto

    names = [
        name
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModelFor")
        and hasattr(auto, "_model_mapping")
        and stock in _classes_of(auto._model_mapping, config_class)
    ]
    return names or ["AutoModel"]


def _classes_of(mapping: Any, config_class: type) -> tuple[type, ...]:
    found = mapping.get(config_class, None)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _imports(classes: Iterable[type]) -> Iterator[str]:
    """Yield a line of imports for each module of some classes."""
    by_module: dict[str, set[str]] = {}
    for cls in classes:
        by_module.setdefault(cls.__module__, set()).add(cls.__name__)
    for module in sorted(by_module):
        yield f"from {module} import {', '.join(sorted(by_module[module]))}"


def _module(name: str, text: str) -> Any:
    """Return the module of this name and text; imported once for each text."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    full = f"{GENERATED}.{digest}.{name}"
    if full not in sys.modules:
        folder = _folder() / digest
        folder.mkdir(parents=True, exist_ok=True)  # the system may have cleaned up since
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full]  # the next one to ask would get what was defined so far
            raise
    return sys.modules[full]


@cache
def _folder() -> Path:
    """Return the folder of this process's generated modules; it goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="tp_hf_config-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
