"""Norms in front of weights are found behind a selection of rows too, as experts make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_hf_config.calibration.linear_ops import LinearOp
from tp_hf_config.calibration.passes import watched_pass
from tp_hf_config.calibration.sources import SELECTION, Sources

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 6
KEPT = torch.tensor([0, 2, 5])
Select = Callable[[Tensor], Tensor]


class Expert(nn.Module):
    """A norm, an activation, and a weight that reads some of what they give."""

    def __init__(self, select: Select, activates: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.select = select
        self.norm = nn.LayerNorm(SIZE)
        nn.init.uniform_(self.norm.weight)
        self.act = nn.GELU() if activates else None
        self.weight = nn.Parameter(torch.rand(4, SIZE))

    def forward(self, states: Tensor) -> Tensor:
        given = self.norm(states)
        if self.act is not None:
            given = self.act(given)
        selected = self.select(given)
        return nn.functional.linear(selected, self.weight[:, : selected.shape[-1]])


def seen(model: Expert, states: Tensor) -> list[tuple[tuple[str, ...], Tensor | None]]:
    """What is in front of each weight that is used, and what it reads after the cut."""
    sources = Sources(model)
    found: list[tuple[tuple[str, ...], Tensor | None]] = []

    def visit(op: LinearOp) -> Any:
        chain = sources.chain_of(op.inputs, op.axis)
        cut = sources.after_cut(op.inputs, SIZE, chain, KEPT, {}) if chain else None
        found.append((chain, cut))
        return op.run()

    watched_pass(model, [{"states": states}], visit, sources)
    return found


ROWS: dict[str, Select] = {
    "some": lambda x: x.view(-1, SIZE)[torch.tensor([3, 0, 3])],
    "some of each": lambda x: x[:, torch.tensor([1, 4])],
    "none": lambda x: x.view(-1, SIZE)[torch.tensor([], dtype=torch.long)],
    "by a mask": lambda x: x[torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) > 0.5],
    "behind a new axis": lambda x: x.view(-1, SIZE)[None, torch.tensor([2, 1])].reshape(-1, SIZE),
    "at two places": lambda x: x[torch.tensor([0, 1]), torch.tensor([4, 2])],
    "by a function": lambda x: torch.index_select(x, 1, torch.tensor([1, 0])),
    "by a method": lambda x: x.index_select(dim=0, index=torch.tensor([1])),
    "twice": lambda x: x[:, torch.tensor([1, 4, 0])].view(-1, SIZE)[torch.tensor([5, 0])],
}


CASES = [(how, activates) for how in ROWS for activates in (False, True)]
CASES.remove(("twice", True))  # more between the norm and the weight than is looked at


@pytest.mark.parametrize(("how", "activates"), CASES)
def test_rows_are_selected_of_what_the_norm_gives_the_kept_channels(
    how: str, activates: bool
) -> None:
    model = Expert(ROWS[how], activates)
    states = torch.rand(2, 5, SIZE)
    ((chain, cut),) = seen(model, states)
    assert chain[0] == "norm"
    assert chain[-1] == SELECTION
    assert ("act" in chain) == activates
    small = nn.LayerNorm(len(KEPT))
    small.load_state_dict({k: v[KEPT] for k, v in model.norm.state_dict().items()})
    full = torch.zeros(2, 5, SIZE)
    with torch.no_grad():
        given = small(states[..., KEPT])
        full[..., KEPT] = given if model.act is None else model.act(given)
        expected = model.select(full)[..., KEPT].reshape(-1, len(KEPT))
    assert cut is not None
    torch.testing.assert_close(cut, expected)


OTHERS: dict[str, Select] = {
    "channels in another order": lambda x: x[..., torch.arange(SIZE - 1, -1, -1)],
    "channels that repeat": lambda x: x.index_select(-1, torch.tensor([0, 0, 1, 1, 2, 2])),
    "rows in another order": lambda x: x.transpose(0, 1)[torch.tensor([0, 3])],
    "computed": lambda x: (x * 2)[:, torch.tensor([0])],
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_selections_are_none(how: str) -> None:
    assert seen(Expert(OTHERS[how]), torch.rand(2, 5, SIZE)) == [((), None)]
