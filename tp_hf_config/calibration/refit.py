"""Refit weights in closed form: those that read pruned channels make up for them.

With X what a weight W reads (tokens x channels), K the channels that stay and S the selection of K
among all channels, the refitted weight is ``W (S + B)ᵀ`` with ``B = (XKᵀXK + r)⁻¹ XKᵀ(X - XK S)``:
least squares for what the plain cut ``W Sᵀ`` loses, with a ridge r that stays with the plain cut.
(The grounds: FLAP, arXiv 2312.11983; OSSCAR, arXiv 2403.12983; GRAIL, arXiv 2602.23795.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.edits import Refit

_TRIES = 12  # the ridge grows tenfold until the solve succeeds


def refit_from_gram(gram: Tensor, kept: Tensor, ridge: float) -> Refit | None:
    """Return the refit of weights that read channels without a norm in between.

    Args:
        gram: the products of all channels, shape ``(channels, channels)``.
        kept: the channels that stay, 1-D.
        ridge: relative to the mean square of the kept channels.

    Returns:
        The refit, its solve in float64; ``None`` if the channels carry nothing.
    """
    size = len(gram)
    stays = torch.zeros(size, dtype=torch.bool)
    stays[kept] = True
    gone = (~stays).nonzero().flatten()
    rows = gram[kept.to(gram.device)]
    own, cross = (rows[:, some.to(gram.device)].double() for some in (kept, gone))
    del rows
    share = _solve(own, cross, ridge)
    return None if share is None else Refit(kept, gone, share.to(gram.dtype), size)


def refit_from_products(own: Tensor, cross: Tensor, kept: Tensor, ridge: float) -> Refit | None:
    """Return the refit of weights that read channels through a norm.

    Args:
        own: the products of what the norm gives the kept channels alone, ``(kept, kept)``.
        cross: their products with what it gave all channels, ``(kept, channels)``.
        kept: the channels that stay, 1-D.
        ridge: relative to the mean square of the kept channels.
    """
    size = cross.shape[1]
    lost = cross.double().clone()
    lost[:, kept.to(lost.device)] -= own.double()
    share = _solve(own.double(), lost, ridge)
    return None if share is None else Refit(kept, torch.arange(size), share.to(own.dtype), size)


def _solve(own: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Return ``(own + ridge)⁻¹ cross`` in float64; ``None`` if there is nothing to solve."""
    mean = own.diagonal().mean() if len(own) else own.new_zeros(())
    if not mean > 0 or not torch.isfinite(mean):
        return None
    for attempt in range(_TRIES):
        amount = ridge * 10.0**attempt if ridge else (0.0 if not attempt else 1e-15 * 10**attempt)
        shifted = own.clone()
        shifted.diagonal().add_(amount * mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        del shifted
        if not int(failed):
            solved = torch.cholesky_solve(cross, factor)
            if torch.isfinite(solved).all():
                return solved
    return None
