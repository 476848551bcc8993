"""What a pruned folder leaves behind of the one it was made of, and what is said of it."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import small
import transformers
from huggingface_hub.utils import filter_repo_objects

from tp_hf_config.pipeline.companions import (
    Copied,
    _metadata,
    base_model,
    code_files,
    copy_companions,
)
from tp_hf_config.pipeline.source import Source


def test_weights_in_a_subfolder_are_weights(tmp_path: Path) -> None:
    """They are written anew; those that nothing reads are named as what is not copied."""
    small.bert().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for part in ("parts", "other"):
        (tmp_path / "model" / part).mkdir()
    for shard in set(data["weight_map"].values()):
        (tmp_path / "model" / shard).rename(tmp_path / "model" / "parts" / shard)
    data["weight_map"] = {name: f"parts/{shard}" for name, shard in data["weight_map"].items()}
    index.write_text(json.dumps(data))
    (tmp_path / "model" / "other" / "model.safetensors").write_bytes(b"")
    (tmp_path / "out").mkdir()
    copied = copy_companions(Source("model", str(tmp_path / "model")), tmp_path / "out")
    assert (copied.files, copied.not_copied) == ((), ("other/model.safetensors",))


def vocabulary_files() -> Iterator[str]:
    """The files of every stock tokenizer, as the sources of Transformers name them."""
    root = Path(transformers.__file__).parent
    for path in [*root.glob("tokenization_*.py"), *root.glob("models/*/tokenization_*.py")]:
        text = path.read_text(encoding="utf-8")
        given = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign)]
        values = {ast.unparse(node.targets[0]): node.value for node in given}
        for name in ("VOCAB_FILES_NAMES", "vocab_files_names"):
            named = values.get(name)
            for value in named.values if isinstance(named, ast.Dict) else ():
                value = values.get(ast.unparse(value), value)
                assert isinstance(value, ast.Constant), (path, ast.unparse(value))
                yield str(value.value)


def test_the_files_of_every_stock_tokenizer_go_along(tmp_path: Path) -> None:
    names = {*vocabulary_files(), "tekken.json", "audio_tokenizer_config.json"}
    assert {"bpe.codes", "vocab.json", "spiece.model"} <= names
    for folder in ("model", "out"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / "model" / name).write_text("")
    copied = copy_companions(Source("model", str(tmp_path / "model")), tmp_path / "out")
    assert copied == Copied(tuple(sorted(names)), ())


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_a_tokenizer_goes_along_where_it_is_trusted(trusted: bool, tmp_path: Path) -> None:
    """The model's class is a stock one."""
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "tokenization_own.py").write_text("")
    copied = copy_companions(Source("model", str(folder), trust_remote_code=trusted), out)
    with_it = ("tokenization_own.py", "tokenizer_config.json")
    assert copied.files == (with_it if trusted else with_it[1:])
    assert copied.not_copied == (() if trusted else with_it[:1])


def test_the_files_of_a_models_own_class() -> None:
    """Those of its tokenizer and its processor are others."""
    auto_map = {
        "AutoConfig": "us/model--configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoBackbone": "backbone_own.Own",
        "AutoProcessor": "processing_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    config = transformers.LlamaConfig(auto_map=auto_map)
    assert code_files(config) == {"configuration_own.py", "modeling_own.py", "backbone_own.py"}
    assert code_files(transformers.LlamaConfig()) == set()


def test_what_lies_in_folders_of_a_processor_goes_along(tmp_path: Path) -> None:
    """InstructBLIP's second tokenizer, the language model of Wav2Vec 2, the voices of Bark."""
    belong = (
        "alphabet.json",
        "language_model/attrs.json",
        "language_model/lm.bin",
        "language_model/unigrams.txt",
        "qformer_tokenizer/tokenizer.json",
        "qformer_tokenizer/vocab.txt",
        "speaker_embeddings/v2/en_speaker_0.npy",
        "speaker_embeddings_path.json",
    )
    left = ("language_model/model.safetensors", "vision/preprocessor_config.json")
    for name in (*belong, *left):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("")
    (tmp_path / "out").mkdir()
    source = Source("model", str(tmp_path / "model"))
    copied = copy_companions(source, tmp_path / "out")
    assert copied == Copied(belong, left)
    assert (tmp_path / "out" / belong[-2]).is_file()


@pytest.mark.parametrize("way", ["path", "link", "inside"])
def test_links_of_the_hubs_cache_are_followed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever its folder is named; the card says which model it is."""
    cached = tmp_path / "hub" / "models--us--tiny"
    snapshot = cached / "snapshots" / "abc"
    for folder in (snapshot, cached / "blobs", tmp_path / "out"):
        folder.mkdir(parents=True)
    (cached / "blobs" / "0f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0f")
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    places = {"path": str(snapshot), "link": str(tmp_path / "link"), "inside": "."}
    source = Source("model", places[way])
    assert copy_companions(source, tmp_path / "out") == Copied(("tokenizer.json",), ())
    assert base_model(source) == "us/tiny"


def test_code_that_does_not_go_along_is_named_no_more(tmp_path: Path) -> None:
    """The class is a stock one; whoever loads the result with its code would look for a file."""
    folder, out = tmp_path / "model", tmp_path / "out"
    for made in (folder, out):
        made.mkdir()
    (folder / "modeling_own.py").write_text("")
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.Own",
        "AutoModelForCausalLM": "us/model--modeling_own.Own",
    }
    (out / "config.json").write_text(json.dumps({"auto_map": auto_map, "hidden_size": 4}))
    copy_companions(Source("model", str(folder), trust_remote_code=True), out)
    kept = {name: auto_map[name] for name in ("AutoModel", "AutoModelForCausalLM")}
    assert json.loads((out / "config.json").read_text()) == {"auto_map": kept, "hidden_size": 4}
    (out / "modeling_own.py").unlink()
    (out / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_own.Own"}}))
    copy_companions(Source("model", str(folder)), out)
    assert json.loads((out / "config.json").read_text()) == {}


class TestOnTheHub:
    @pytest.fixture
    def fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
        """A model of which everything that is asked for is fetched."""
        snapshot = tmp_path / "hub" / "models--us--tiny" / "snapshots" / "abc"
        (tmp_path / "hub" / "models--us--tiny" / "refs").mkdir(parents=True)
        (tmp_path / "hub" / "models--us--tiny" / "refs" / "main").write_text("abc")
        files = {
            "model.safetensors": "weights",
            "model.safetensors.index.json": "large",
            "config.json": "{}",
            "modules.json": "[]",
            "1_Pooling/config.json": "{}",
            "merges.txt": "",
            "notes.txt": "",
            "README.md": "---\nlicense: mit\nlanguage: en\ntags: [x]\n---\n# A\n",
        }

        def download(name: str, **patterns: Any) -> str:
            assert name == "us/tiny"
            for file in filter_repo_objects(files, **patterns):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / file).write_text(files[file])
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return Source("us/tiny", "us/tiny")

    def test_what_is_not_copied_is_named(self, fetched: Source, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        copied = copy_companions(fetched, tmp_path / "out")
        left = ("1_Pooling/config.json", "modules.json", "notes.txt")
        assert copied == Copied(("merges.txt",), left)
        names = {path.name for path in (tmp_path / "hub").rglob("*")}
        assert not {"model.safetensors", "model.safetensors.index.json"} & names

    def test_the_card_says_its_licence_and_language(self, fetched: Source, tmp_path: Path) -> None:
        assert _metadata(fetched) == {}  # nothing is fetched yet
        (tmp_path / "out").mkdir()
        copy_companions(fetched, tmp_path / "out")
        assert _metadata(fetched) == {"license": "mit", "language": "en"}
        shutil.rmtree(tmp_path / "hub")
        assert _metadata(fetched) == {}
