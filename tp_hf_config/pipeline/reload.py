"""What a model computes on fixed inputs; run as a module: what a saved one does.

``python -m tp_hf_config.pipeline.reload CASE ANSWER``: the case (:func:`torch.save`) names the
folder, the device, the number of threads and the inputs; the answer holds the outputs, or why there
are none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..twins import tensors_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a forward pass in eval mode returns, on the CPU."""
    for parameter in model.parameters():  # the order of sums can depend on alignment in memory
        parameter.data = parameter.data.clone()
    torch.manual_seed(0)  # some forward passes draw masks
    return [tensor.cpu() for tensor in tensors_in(model(**inputs))]


def main(case_file: str, answer_file: str) -> None:
    """Load the folder, run it, write down what comes out."""
    from .source import class_for, config_of, find_source, read_weights

    case = torch.load(case_file, weights_only=True)
    torch.set_num_threads(case["threads"])
    source = find_source(case["folder"], case["trust_remote_code"])
    try:
        config = config_of(source)
        model, info = read_weights(source, config, class_for(source, config), "auto")
        wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
        if wrong:
            answer: dict[str, Any] = {"reason": f"loading reports {wrong}"}
        else:
            model = model.to(case["device"])
            inputs = {
                name: value.to(case["device"]) if isinstance(value, Tensor) else value
                for name, value in case["inputs"].items()
            }
            answer = {"outputs": outputs_of(model, inputs)}
    except Exception as error:  # the answer of a process that cannot answer
        answer = {"reason": f"{type(error).__name__}: {error}"}
    torch.save(answer, answer_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
