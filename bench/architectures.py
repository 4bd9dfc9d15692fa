"""The parameter lists of real models, derived from the published definition of each architecture.

Every list has the names and the order of the implementation that its source names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["MODELS", "Architecture"]

Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        title: Its name in tables.
        source: Where the architecture and its sizes are defined.
        published: How many parameters the source, or the model's card, says that it has.
        shapes: Name and shape of every parameter.
    """

    title: str
    source: str
    published: str
    shapes: Shapes


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet50() -> Shapes:
    """Bottlenecks of 1x1, 3x3 and 1x1 convolutions, no bias, each with its batch normalisation."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            outputs = 4 * width
            shapes |= {f"{name}.conv1.weight": (width, inputs, 1, 1), **_norm(f"{name}.bn1", width)}
            shapes |= {f"{name}.conv2.weight": (width, width, 3, 3), **_norm(f"{name}.bn2", width)}
            shapes |= {f"{name}.conv3.weight": (outputs, width, 1, 1), **_norm(f"{name}.bn3", outputs)}
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (outputs, inputs, 1, 1)}
                shapes |= _norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    return shapes | _linear("fc", 1000, inputs)


def vit_b16(width: int = 768, layers: int = 12) -> Shapes:
    """Queries, keys and values in one projection, as torch.nn.MultiheadAttention has them."""
    shapes: Shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, 16, 16),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (1, (224 // 16) ** 2 + 1, width),
    }
    for i in range(layers):
        name = f"encoder.layers.encoder_layer_{i}"
        shapes |= _norm(f"{name}.ln_1", width)
        shapes |= {f"{name}.self_attention.in_proj_weight": (3 * width, width)}
        shapes |= {f"{name}.self_attention.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{name}.self_attention.out_proj", width, width)
        shapes |= _norm(f"{name}.ln_2", width)
        shapes |= _linear(f"{name}.mlp.0", 4 * width, width) | _linear(f"{name}.mlp.3", width, 4 * width)
    return shapes | _norm("encoder.ln", width) | _linear("heads.head", 1000, width)


def bert(width: int = 768, layers: int = 12) -> Shapes:
    """The encoder with its pooler."""
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (30522, width),
        "embeddings.position_embeddings.weight": (512, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **_norm("embeddings.LayerNorm", width),
    }
    for i in range(layers):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= _linear(f"{name}.attention.self.{part}", width, width)
        shapes |= _linear(f"{name}.attention.output.dense", width, width)
        shapes |= _norm(f"{name}.attention.output.LayerNorm", width)
        shapes |= _linear(f"{name}.intermediate.dense", 4 * width, width)
        shapes |= _linear(f"{name}.output.dense", width, 4 * width)
        shapes |= _norm(f"{name}.output.LayerNorm", width)
    return shapes | _linear("pooler.dense", width, width)


def gpt2(width: int, layers: int) -> Shapes:
    """The output layer shares the token embedding; weights are (inputs, outputs)."""
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}

    def conv1d(name: str, outputs: int, inputs: int) -> Shapes:
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    for i in range(layers):
        name = f"h.{i}"
        shapes |= _norm(f"{name}.ln_1", width) | conv1d(f"{name}.attn.c_attn", 3 * width, width)
        shapes |= conv1d(f"{name}.attn.c_proj", width, width) | _norm(f"{name}.ln_2", width)
        shapes |= conv1d(f"{name}.mlp.c_fc", 4 * width, width)
        shapes |= conv1d(f"{name}.mlp.c_proj", width, 4 * width)
    return shapes | _norm("ln_f", width)


def _grouped_attention(name: str, width: int, key_width: int) -> Shapes:
    return {
        f"{name}.self_attn.q_proj.weight": (width, width),
        f"{name}.self_attn.k_proj.weight": (key_width, width),
        f"{name}.self_attn.v_proj.weight": (key_width, width),
        f"{name}.self_attn.o_proj.weight": (width, width),
    }


def llama(width: int = 2048, hidden: int = 8192, layers: int = 16, vocabulary: int = 128256) -> Shapes:
    """32 heads share 8 keys and values; the output layer shares the token embedding."""
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        name = f"layers.{i}"
        shapes |= _grouped_attention(name, width, width // 4)
        shapes |= {
            f"{name}.mlp.gate_proj.weight": (hidden, width),
            f"{name}.mlp.up_proj.weight": (hidden, width),
            f"{name}.mlp.down_proj.weight": (width, hidden),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"norm.weight": (width,)}


def mixtral(shrink: int = 1, layers: int = 32, experts: int = 8, vocabulary: int = 32000) -> Shapes:
    """Every expert has three matrices of its own; ``shrink`` divides the widths."""
    width, hidden = 4096 // shrink, 14336 // shrink
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        name = f"model.layers.{i}"
        shapes |= _grouped_attention(name, width, width // 4)
        shapes |= {f"{name}.block_sparse_moe.gate.weight": (experts, width)}
        for e in range(experts):
            expert = f"{name}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1.weight": (hidden, width), f"{expert}.w2.weight": (width, hidden)}
            shapes |= {f"{expert}.w3.weight": (hidden, width)}
        shapes |= {
            f"{name}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def lstm(width: int = 1500, layers: int = 2, vocabulary: int = 10000) -> Shapes:
    """As torch.nn.LSTM has it: four gates in one matrix, two biases."""
    shapes: Shapes = {"embedding.weight": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"lstm.{part}_l{i}": (4 * width, width) for part in ("weight_ih", "weight_hh")}
        shapes |= {f"lstm.{part}_l{i}": (4 * width,) for part in ("bias_ih", "bias_hh")}
    return shapes | _linear("decoder", vocabulary, width)


_GPT2 = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners; github.com/openai/gpt-2, "
_MIXTRAL = "Jiang et al. 2024, arXiv:2401.04088, table 1, as transformers' MixtralForCausalLM"

MODELS: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT-2 124M",
        _GPT2 + "src/model.py: 12 layers, width 768; as transformers' GPT2Model, gpt2",
        "124,439,808",
        gpt2(768, 12),
    ),
    "resnet50": Architecture(
        "ResNet-50",
        "He et al. 2015, arXiv:1512.03385, table 1; as torchvision's resnet50",
        "25,557,032",
        resnet50(),
    ),
    "vit-b16": Architecture(
        "ViT-B/16",
        "Dosovitskiy et al. 2020, arXiv:2010.11929, table 1; as torchvision's vit_b_16",
        "86,567,656",
        vit_b16(),
    ),
    "bert-base": Architecture(
        "BERT-base",
        "Devlin et al. 2018, arXiv:1810.04805, section 3; as transformers' BertModel, bert-base-uncased",
        "109,482,240",
        bert(),
    ),
    "lstm": Architecture(
        "LSTM, 2 x 1500",
        "Zaremba et al. 2014, arXiv:1409.2329, the large model; as torch.nn.LSTM",
        "66 M",
        lstm(),
    ),
    "mixtral-16th": Architecture(
        "Mixtral, widths / 16",
        f"{_MIXTRAL}: 32 layers, 8 experts, vocabulary 32000; widths 4096 and 14336 divided by 16 to fit",
        "none at this size; the same derivation has 46,702,792,704 at full width",
        mixtral(shrink=16),
    ),
    "llama-3.2-1b": Architecture(
        "Llama-3.2-1B",
        "Grattafiori et al. 2024, arXiv:2407.21783; meta-llama/Llama-3.2-1B config.json: 16 layers, width "
        "2048, hidden 8192, 32 heads, 8 key-value heads, vocabulary 128256; as transformers' LlamaModel",
        "1,235,814,400",
        llama(),
    ),
    "gpt2-xl": Architecture(
        "GPT-2 XL",
        _GPT2 + "src/model.py: 48 layers, width 1600; as transformers' GPT2Model, gpt2-xl",
        "1,557,611,200",
        gpt2(1600, 48),
    ),
}  # fmt: skip
