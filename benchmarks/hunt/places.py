"""Where things are: imported first, so that the modules of the support table are found."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(1, str(ROOT / "benchmarks" / "support"))
