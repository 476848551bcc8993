"""Export to ``"gguf"``: one file with weights, widths by layer and tokenizer, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import PipelineError
from ..model.build import Refusal
from .card import base_model
from .exported import GGUF_FILE, Ready, Request
from .gguf_vocabulary import vocabulary_of
from .llama_layers import llama_layers, rotary_factors
from .source import tokenizer_of

_SILU = ("silu", "swish")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NO_TOKENIZER = (
    "a model that is not read from a folder comes without a tokenizer, and without one in the file "
    "llama-cli and llama-server end with an assertion. Save model and tokenizer to a folder, and "
    "give export that"
)


def prepare(request: Request) -> Ready | Refusal:
    """Prove that a model is a Llama, whose layers may differ, and that GGUF can say all of it.

    ``request``: what to export; with a multiple, the feed-forward of every layer is padded to it.

    Returns:
        The export, ready to be written; or a refusal that says what llama.cpp does not compute.
    """
    from . import gguf_file

    source = request.source
    if source is None:
        return Refusal(_NO_TOKENIZER)
    llama = llama_layers(request.model, request.multiple_of)
    if isinstance(llama, Refusal):
        return llama
    config = llama.config
    if config.hidden_act not in _SILU:
        return Refusal(f"hidden_act {config.hidden_act!r}: llama.cpp's Llama computes 'silu' alone")
    other = sorted({str(v.dtype) for v in llama.weights.values() if v.dtype not in _DTYPES})
    if other:
        return Refusal(
            f"its weights are {', '.join(other)}, and a GGUF file takes float32, float16 and "
            "bfloat16. Save it in one of these first"
        )
    factors = rotary_factors(config)
    if isinstance(factors, Refusal):
        return factors
    vocabulary = vocabulary_of(tokenizer_of(source), config.vocab_size)
    if isinstance(vocabulary, Refusal):
        return vocabulary

    def write(folder: Path) -> None:
        gguf_file.write(folder / GGUF_FILE, llama, vocabulary, factors, base_model(source))
        reason = gguf_file.difference(folder / GGUF_FILE, llama, factors)
        if reason is not None:
            raise PipelineError(f"the file was not written, read back it is another: {reason}")

    return Ready(
        write,
        llama.fields,
        llama.parameters,
        llama.proof,
        loading=f"llama-cli --model {GGUF_FILE}",
        notes=vocabulary.notes,
        holds_tokenizer=True,
    )
