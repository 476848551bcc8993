"""How well pruned models do without training: ``python benchmarks/quality`` (``make quality``).

SmolLM2-135M, Gemma 3 270M and all-MiniLM-L6-v2 are cut by several importances, with the cut only
and with the readers refitted; then by other calibration texts, beside a peer, and with a clock.
Finished rows lie in ``.quality/`` and are not measured again by the next run with the same versions
and seed, so that a slow machine can do it in pieces. Writes ``docs/quality.json`` and
``docs/quality.md``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from embedder import Embedder
from jobs import ROOT, Rows, Scale
from language import IMPORTANCES, Gemma, Language
from table import merged, write

PARTS = ("smollm2", "text", "layers", "optipfair", "gemma3", "minilm", "time")


def main() -> None:
    """Measure all rows, or some; print, and write."""
    parser = argparse.ArgumentParser(prog="benchmarks/quality", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument(
        "--importances",
        nargs="+",
        choices=IMPORTANCES,
        default=IMPORTANCES,
        help="of smollm2 and minilm, only these",
    )
    parser.add_argument("--subjects", nargs="+", help="only these cuts, or texts (ffn20, own, ...)")
    parser.add_argument(
        "--windows", type=int, help="so few of everything, to see that it works; nothing is written"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--written", action="store_true", help="measure nothing more, write")
    parser.add_argument("--again", action="store_true", help="measure what was measured before too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    scale = Scale.of(options.windows, options.seed)
    jobs = [*Language(scale).jobs(), *Gemma(scale).jobs(), *Embedder(scale).jobs()]
    rows = Rows(scale)
    left_out = set(IMPORTANCES).difference(options.importances)
    chosen = [job for job in jobs if job.part in options.parts and job.variant not in left_out]
    if options.subjects:
        chosen = [job for job in chosen if job.subject in options.subjects]
    if options.again:
        for job in chosen:
            rows.place(job).unlink(missing_ok=True)
    if not options.written:
        rows.run(chosen)
    found = rows.all(jobs)
    whole = options.windows is None
    write(
        merged(found, jobs, scale, ROOT) if whole else found, jobs, scale, ROOT if whole else None
    )


if __name__ == "__main__":
    main()
