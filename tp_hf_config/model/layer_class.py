"""Generate a subclass of a model class that builds each layer from a config of its own.

Transformers reads ``per_layer_config`` into the config (5.15 and newer), but few of its classes
build their layers from it (pull request 45332). The generated file does, and imports nothing but
Transformers. It is saved beside the weights and loaded with ``trust_remote_code=True``.
"""

from __future__ import annotations

import atexit
import copyreg
import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from .build import Refusal, without_data
from .surroundings import ONE_AT_A_TIME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# package of the generated modules, which are copied into folders
GENERATED = "tp_hf_config_generated"
_MARK = "layers_with_own_config"  # attribute of a generated class: the names of its lists of layers

_SOURCE = '''\
"""{stock} with layers that differ: each is built from its own entry in ``per_layer_config``.

Written by tp_hf_config, which pruned this model. It needs only Transformers, 5.15 or newer:
{auto}.from_pretrained(folder, trust_remote_code=True)
"""

import inspect
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import wraps

from transformers import conversion_mapping
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
        modules = dict(self.base_model.named_modules())
        for name in LISTS.keys() & modules.keys():
            around = name
            while not hasattr(modules[around], "config"):
                around = around.rpartition(".")[0]
            config = modules[around].config
            for part in modules[name].modules():
                if type(getattr(part, "config", None)) is type(config):
                    setattr(part.config, key, getattr(config, key, None))


def _layerwise(stock, name, *auto_classes):
    """Derive the class of this name, which these auto classes load, from a stock class."""

    class Layerwise(_LayersWithOwnConfig, stock):
        _auto_class = auto_classes[0]  # save_pretrained copies this file
        loaded_by = auto_classes

        @wraps(stock.__init__)
        def __init__(self, config, *args, **kwargs):
            with _own_configs():
                super().__init__(config, *args, **kwargs)
            # building PeAudioVideoModel sets its text model's attention anew, after that is built
            self._tell_layers("_attn_implementation_internal")

        # Transformers finds both in the source of a class's module
        @classmethod
        def _can_set_attn_implementation(cls):
            return stock._can_set_attn_implementation()

        @classmethod
        def _can_set_experts_implementation(cls):
            return stock._can_set_experts_implementation()

    Layerwise.__name__ = Layerwise.__qualname__ = name
    conversions = conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__)
    if conversions is not None:  # how names in a file become names in the class
        conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return Layerwise


def __getattr__(name):
    """Return what Transformers looks up in the module of a class, from that of the stock class."""
    return getattr(sys.modules[{stock}.__module__], name)


{classes}
'''
_PREFIX = "Layerwise"


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a generated class is derived from; any other class itself."""
    if not layer_lists(model_class):
        return model_class
    return next(base for base in model_class.__mro__[1:] if hasattr(base, "from_pretrained"))


def layer_lists(model_class: type) -> tuple[str, ...]:
    """Lists built from own configs, relative to the base model; empty for a stock class."""
    names: tuple[str, ...] = getattr(model_class, _MARK, ())
    return names


def layerwise_class(
    model: PreTrainedModel, lists: Mapping[str, Iterable[type]]
) -> type[PreTrainedModel]:
    """Return the generated subclass; ``lists``: list of layers -> classes of the layers."""
    base: Any = model.base_model
    named = tuple((name, tuple(dict.fromkeys(classes))) for name, classes in lists.items())
    key: Any = (type(model), type(base), type(model.config), named)
    with ONE_AT_A_TIME:
        if key not in _generated:
            loaded = _loaded_classes(model, dict(named))
            _generated[key] = _generate(type(model), loaded, named)
    return _generated[key]


_generated: dict[Any, type[PreTrainedModel]] = {}


def _generate(
    stock: type, loaded: Mapping[str, type], lists: tuple[tuple[str, tuple[type, ...]], ...]
) -> Any:
    """Write a module with subclasses of ``loaded`` (by auto class); return that of ``stock``."""
    loaders: dict[type, list[str]] = {}
    for auto, cls in loaded.items():
        loaders.setdefault(cls, []).append(auto)
    imported = (*loaders, *(cls for _, classes in lists for cls in classes))
    text = _SOURCE.format(
        stock=stock.__name__,
        auto=loaders[stock][0],
        imports="\n".join(_imports(imported)),
        lists="\n".join(
            f'    "{name}": ({", ".join(c.__name__ for c in classes)},),' for name, classes in lists
        ),
        mark=_MARK,
        classes="\n".join(
            f"{_name(cls)} = _layerwise(\n    {cls.__name__},\n"
            + "".join(f'    "{name}",\n' for name in (_name(cls), *autos))
            + ")"
            for cls, autos in loaders.items()
        ),
    )
    family = stock.__module__.rpartition(".")[2].removeprefix("modeling_")
    return getattr(_module(f"modeling_layerwise_{family}", text), _name(stock))


def _name(stock: type) -> str:
    # save_pretrained mistakes "Tokenizer" (in names of audio codecs) for a tokenizer, and writes
    # two names into auto_map (transformers 5.24, custom_object_save)
    return f"{_PREFIX}{stock.__name__.replace('Tokenizer', 'Codec')}"


def _loaded_classes(
    model: PreTrainedModel, lists: Mapping[str, tuple[type, ...]]
) -> dict[str, type]:
    """Auto class -> the class it loads: the model's, or one beside it.

    Beside it are classes of the same config that have such layers in the same lists and in no
    others. ``AutoModel`` is always included, because vLLM asks for it; it loads the class without a
    head.
    """
    stock: Any = type(model)
    own = auto_classes(type(model.config), stock)
    result: dict[str, Any] = {"AutoModel": type(model.base_model)}
    fitting: dict[Any, bool] = {stock: True}
    for auto, candidates in _mapped(type(model.config)).items():
        candidate = candidates[0]
        if auto not in own and candidate not in fitting:
            fitting[candidate] = _has_layers_of(candidate, model, lists)
        if auto in own or fitting[candidate]:
            result[auto] = stock if auto in own else candidate
    return dict.fromkeys(own, stock) | {a: cls for a, cls in result.items() if a not in own}


def _has_layers_of(
    candidate: Any, model: PreTrainedModel, lists: Mapping[str, tuple[type, ...]]
) -> bool:
    """True if a class builds layers of these classes, in these lists only."""
    if getattr(candidate, "config_class", None) is not type(model.config):
        return False
    # LlamaForQuestionAnswering would not find its weights
    if candidate.base_model_prefix != model.base_model_prefix:
        return False
    built = without_data(candidate, model.config)
    if isinstance(built, Refusal):
        return False
    in_body = _lists_in(built.base_model)
    # BartForConditionalGeneration would not find BartForCausalLM's encoder
    has_all = in_body.keys() <= _lists_in(model.base_model).keys()
    classes = {cls for layers in lists.values() for cls in layers}
    found = {
        name: tuple(dict.fromkeys(map(type, layers)))
        for name, layers in in_body.items()
        if classes & {type(layer) for layer in layers}
    }
    return has_all and bool(found) and found.items() <= lists.items()


def _lists_in(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    file = model_class.__module__.rpartition(".")[2]
    return {
        auto: f"{file}.{cls.__name__}"
        for cls in generated_classes(model_class)
        for auto in cls.loaded_by
    }


def generated_classes(model_class: type) -> list[Any]:
    """The generated classes in the module of one of them."""
    return _generated_in(sys.modules[model_class.__module__])


def _generated_in(module: ModuleType) -> list[Any]:
    return [cls for cls in vars(module).values() if hasattr(cls, "loaded_by")]


def auto_classes(config_class: type, stock: type) -> list[str]:
    """Auto classes that load a class; the first is the one to show to users."""
    names = [auto for auto, classes in _mapped(config_class).items() if stock in classes]
    return names or ["AutoModel"]


def _mapped(config_class: type) -> dict[str, tuple[Any, ...]]:
    """Auto class -> classes it loads for a config class; ``AutoModel`` first, then tasks."""
    from transformers.models.auto import modeling_auto

    result: dict[str, tuple[Any, ...]] = {}
    for name, auto in vars(modeling_auto).items():
        # AutoBackbone cannot load a local folder: transformers 5.24 asks the Hub
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        found = mapping.get(config_class, None) if mapping else None
        if found:
            result[name] = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    order = sorted(
        result, key=lambda name: (name != "AutoModel", name == "AutoModelForPreTraining")
    )
    return {name: result[name] for name in order}


def _imports(classes: Iterable[type]) -> Iterator[str]:
    by_module: dict[str, set[str]] = {}
    for cls in classes:
        by_module.setdefault(cls.__module__, set()).add(cls.__name__)
    for module in sorted(by_module):
        yield f"from {module} import {', '.join(sorted(by_module[module]))}"


def _module(name: str, text: str) -> Any:
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
        vars(module)["SOURCE"] = text  # for pickling; the system may delete temporary files
        sys.modules[full] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full]  # else the next caller would get a partial module
            raise
        for cls in _generated_in(module):
            copyreg.pickle(cls, _reduced)
    return sys.modules[full]


def _reduced(model: Any) -> tuple[Any, ...]:
    """Reduce a model for ``pickle`` and ``copy``; its module is recreated from its source."""
    cls: Any = type(model)
    text = vars(sys.modules[cls.__module__])["SOURCE"]
    name = cls.__module__.rpartition(".")[2]
    return _unfilled, (name, text, cls.__name__), *object.__reduce_ex__(model, 2)[2:]


def _unfilled(module: str, text: str, name: str) -> Any:
    cls: Any = getattr(_module(module, text), name)
    return cls.__new__(cls)


@cache
def _folder() -> Path:
    """Folder of this process's generated modules, deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="tp_hf_config-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
