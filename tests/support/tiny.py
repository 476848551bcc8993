"""Tiny random models by name: two layers, hidden 64, FFN 128, four heads, 99 tokens.

Every parameter is random, biases and norm weights too: a freshly built model has zero biases and
norm weights of one, which hide a channel that was taken from the wrong place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import small
import torch
import transformers as hf

VOCAB = 99
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_VIT = {**_SIZES, "image_size": 32, "patch_size": 8, "num_labels": 5}
del _VIT["vocab_size"], _VIT["max_position_embeddings"]
_GQA = {**_SIZES, "num_key_value_heads": 2}

_MODELS: dict[str, Callable[[], tuple[type[hf.PreTrainedModel], hf.PretrainedConfig]]] = {
    "llama": lambda: (
        small.LlamaForCausalLM,
        hf.LlamaConfig(**_SIZES, num_key_value_heads=4, tie_word_embeddings=False),
    ),
    "llama-gqa": lambda: (
        small.LlamaForCausalLM,
        hf.LlamaConfig(**_GQA, tie_word_embeddings=False),
    ),
    "llama-tied": lambda: (
        small.LlamaForCausalLM,
        hf.LlamaConfig(**_SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    ),
    "qwen2": lambda: (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**_GQA, tie_word_embeddings=False),
    ),
    "qwen3": lambda: (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(**_GQA, head_dim=16, tie_word_embeddings=False),
    ),
    "mistral": lambda: (
        hf.MistralForCausalLM,
        hf.MistralConfig(**_GQA, tie_word_embeddings=False),
    ),
    "gemma": lambda: (
        hf.GemmaForCausalLM,
        hf.GemmaConfig(**_SIZES, num_key_value_heads=4, head_dim=16),
    ),
    "phi3": lambda: (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(
            **_SIZES,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            pad_token_id=0,  # its defaults are outside 99 tokens
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
    "bert": lambda: (hf.BertModel, hf.BertConfig(**_SIZES)),
    "bert-cls": lambda: (
        hf.BertForSequenceClassification,
        hf.BertConfig(**_SIZES, num_labels=5),
    ),
    "roberta": lambda: (hf.RobertaForMaskedLM, hf.RobertaConfig(**_SIZES)),
    "roberta-cls": lambda: (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**_SIZES, num_labels=5),
    ),
    "vit": lambda: (hf.ViTForImageClassification, hf.ViTConfig(**_VIT)),
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=64,
            d_ff=128,
            d_kv=16,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
}

NAMES = tuple(_MODELS)


def build(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model in eval mode; the same name and seed give the same weights."""
    cls, config = _MODELS[name]()
    model = cls(config)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: norm weights around one, all others around zero."""
    torch.manual_seed(seed)
    norms = {id(parameter) for parameter in _norm_weights(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if id(parameter) in norms else 0.0, 0.2)


def _norm_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The weights that a class initialises with ones (Gemma's, added to one, with zeros)."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and bool((weight == 1).all()):
            yield weight


def inputs(model: torch.nn.Module, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """A batch of inputs; other ones than the library traces with."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.rand(batch, 3, size, size, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if model.config.is_encoder_decoder:
        decoder = torch.randint(3, VOCAB, (batch, length - 2), generator=generator)
        return {"input_ids": ids, "decoder_input_ids": decoder}
    return {"input_ids": ids}
