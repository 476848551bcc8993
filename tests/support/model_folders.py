"""Folders with tiny models, as a user of the shell has them."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = tiny.VOCAB - 2
PROCESSOR = "preprocessor_config.json"


def save(name: str, folder: Path) -> Path:
    """A model of ``tiny`` with its tokenizer or image processor, and nothing beside these."""
    model = tiny.build(name)
    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        (folder / PROCESSOR).write_text('{"image_processor_type": "ViTImageProcessor"}')
    else:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token for each of the words w0, w1, ..."""
    vocab = {f"w{number}": number for number in range(WORDS)}
    vocab |= {"[UNK]": WORDS, "[MASK]": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)  # of Transformers 4


def save_text(path: Path, words: int = 1500) -> Path:
    """A text of these words."""
    path.write_text(" ".join(f"w{(i * i * 7 + i) % WORDS}" for i in range(words)))
    return path


def with_code(folder: Path, ran: Path) -> Path:
    """Make a model one whose class comes with it; the file ``ran`` shows that it was imported."""
    data = json.loads((folder / "config.json").read_text())
    data |= {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Own(LlamaForCausalLM):\n"
        "    pass\n"
    )
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
