"""sentence-transformers, on the folder as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooling is what it does with a folder that does not say; all sentences in one batch."""
    model = SentenceTransformer(str(folder), device="cpu")
    return {"embeddings": model.encode(question["texts"], normalize_embeddings=True).tolist()}
