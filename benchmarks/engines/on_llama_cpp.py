"""llama.cpp by the server in xllamacpp, on a GGUF file of float32 tensors."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class Server:
    """llama.cpp's server with one model, computing in float32."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "model.gguf")
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # By itself it keeps keys and values in float16.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for name, value in settings.items():
            setattr(params, name, value)
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, **question: Any) -> Any:
        """What it answers to a request."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, after prompts that its own tokenizer has to cut as transformers does."""
    found: dict[str, Any] = {"tokens": [], "log_probabilities": []}
    server = Server(folder)
    for text, ids in zip(question["texts"], question["ids"], strict=True):
        cut = server.ask("tokenize", content=text, add_special=True)["tokens"]
        if cut != ids:
            raise ValueError(f"its tokenizer gives {cut}, transformers' {ids}")
        tokens: list[int] = []
        scores: list[float] = []
        for _ in range(question["new_tokens"]):  # one by one: at its end token it would stop
            answer = server.ask(
                "completion", prompt=ids + tokens, n_predict=1, temperature=0, n_probs=1
            )
            (best,) = answer["completion_probabilities"]
            tokens.append(best["id"])
            scores.append(best["logprob"])
        found["tokens"].append(tokens)
        found["log_probabilities"].append(scores)
    return found


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors, from the text itself."""
    pooling = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = Server(folder, embedding=True, pooling_type=pooling)
    answers = [server.ask("v1/embeddings", input=text) for text in question["texts"]]
    return {"embeddings": [answer["data"][0]["embedding"] for answer in answers]}
