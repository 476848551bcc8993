"""What a pruned folder leaves behind of the one it was made of, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

from tp_hf_config.pipeline.companions import Copied, notes_on_uncopied
from tp_hf_config.pipeline.source import Source


def test_a_number_in_a_file_that_was_left_is_told(tmp_path: Path) -> None:
    """A field may hold a list; that is no number in another file, and it cannot be looked up."""
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "sizes": [8, 16]}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    changed = {"hidden_sizes": ([8, 16], [8, 12]), "hidden_size": (64, 48)}
    left = Copied((), ("1_Pooling/config.json",))
    assert notes_on_uncopied(Source("model", str(tmp_path)), left, changed) == (
        "1_Pooling/config.json was not copied; its word_embedding_dimension says 64, as "
        "hidden_size did: where it goes along by hand and means the same, write 48",
    )
