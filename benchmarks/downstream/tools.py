"""The tools, what each is asked for, and what has to be installed for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One thing that a tool does with a model.

    Attributes:
        name: the column of the table.
        module: the module here that does it, in the tool's environment.
        task: its function.
        environment: the folder of the environment.
        requirements: what pip installs.
        shown: packages whose versions matter.
        target: the target whose models it has to take.
        without: packages that come along and keep it from starting.
    """

    name: str
    module: str
    task: str
    environment: str
    requirements: tuple[str, ...]
    shown: tuple[str, ...]
    target: str | None = None
    without: tuple[str, ...] = ()


_TORCH = ("transformers", "torch")
TOOLS = (
    *(
        Tool(
            f"torchao {task}",
            "with_torchao",
            task,
            "torchao",
            ("torchao", *_TORCH),
            ("torchao", *_TORCH),
            "gguf-32" if task == "int4" else None,
        )
        for task in ("int8", "int4")
    ),
    *(
        Tool(
            f"optimum-quanto {task}",
            "with_quanto",
            task,
            "quanto",
            ("optimum-quanto", *_TORCH),
            ("optimum-quanto", *_TORCH),
        )
        for task in ("int8", "int4")
    ),
    *(
        Tool(
            f"bitsandbytes {task}",
            "with_bitsandbytes",
            task,
            "bitsandbytes",
            ("bitsandbytes", "accelerate", *_TORCH),
            ("bitsandbytes", *_TORCH),
        )
        for task in ("int8", "nf4")
    ),
    Tool(
        "llm-compressor W4A16",
        "with_llmcompressor",
        "w4a16",
        "llmcompressor",
        ("llmcompressor",),
        ("llmcompressor", "compressed-tensors", *_TORCH),
        "w4a16",
    ),
    Tool(
        "ONNX Runtime int8",
        "with_onnxruntime",
        "int8",
        "onnxruntime",
        ("optimum-onnx[onnxruntime]",),
        ("onnxruntime", "optimum-onnx", *_TORCH),
    ),
    Tool(
        "OpenVINO int8",
        "with_openvino",
        "int8",
        "openvino-int8",
        ("optimum-intel[openvino]", "nncf"),
        ("openvino", "nncf", "optimum-intel", *_TORCH),
    ),
    Tool("PEFT LoRA", "with_peft", "lora", "peft", ("peft", *_TORCH), ("peft", *_TORCH)),
    Tool("TRL SFT", "with_trl", "sft", "trl", ("trl", *_TORCH), ("trl", *_TORCH)),
    Tool(
        "lm_eval",
        "with_lm_eval",
        "bits",
        "lm_eval",
        ("lm_eval[hf]", "torch"),
        ("lm_eval", *_TORCH),
    ),
)
