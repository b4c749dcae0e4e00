"""Which block of which published (Hugging Face) tensor a rank's Megatron parameter holds.

    for piece in pieces("decoder.layers.0.mlp.linear_fc1.weight", model, tp_rank=1, tp_size=2, layer_offset=4):
        piece.name, piece.rows     # "model.layers.4.mlp.up_proj.weight", (ffn // 2, ffn)

The one description of the layout: initialisation, state digest and conversion read it, nothing else knows it.
Every tensor is seen as a matrix; a 1-D tensor of n elements is one row of n columns. Linear weights are
[out, in] on both sides, and there is no rotary permutation: both sides rotate halves.

Source of the map: Megatron's schema for core models and the published checkpoints (`ApertusForCausalLM` of
transformers 4.57), held against each other by `tests/unit/model/test_parity.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from apertus_nemo.errors import ApertusError
from apertus_nemo.recipe.schema import ModelConfig

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Piece:
    """A block of a published tensor, and where it lies in the local parameter."""

    name: str  # published tensor name, "model.layers.3.self_attn.q_proj.weight"
    shape: tuple[int, ...]  # of the whole published tensor
    rows: Range  # of the published tensor, held here
    cols: Range
    local_rows: Range  # the same block inside the local parameter, seen as 2-D
    local_cols: Range


_LAYER = re.compile(r"decoder\.layers\.(0|[1-9][0-9]*)\.(.+)")

# Megatron's name within a layer -> the published one, for parameters that every tensor-parallel rank holds whole.
# The first two have two spellings: plain Megatron's own module, and Transformer Engine's fusion into the next linear.
_REPLICATED = {
    "input_layernorm.weight": "attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "feedforward_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "feedforward_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.activation_func.alpha_p": "mlp.act_fn.alpha_p",
    "mlp.activation_func.alpha_n": "mlp.act_fn.alpha_n",
}
# xIELU's, within a layer: of a rank alone where its gradients are not summed
SCALARS = ("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n")
_COLUMN_PARALLEL = {"mlp.linear_fc1.weight": "mlp.up_proj.weight"}  # output rows are cut
_ROW_PARALLEL = {  # input columns are cut
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV = "self_attention.linear_qkv.weight"
_VOCABULARY = {  # outside the layers; rows (tokens) are cut
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}
_FINAL_NORM = {"decoder.final_layernorm.weight": "model.norm.weight"}


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published name within a layer -> shape, in the order of the computation."""
    queries, keys = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return {
        "attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.q_norm.weight": (model.head_dim,),
        "self_attn.k_norm.weight": (model.head_dim,),
        "self_attn.o_proj.weight": (hidden, queries),
        "feedforward_layernorm.weight": (hidden,),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.act_fn.alpha_p": (1,),
        "mlp.act_fn.alpha_n": (1,),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def published_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every published tensor that is trained, name -> shape, in the order of the computation.

    HF's buffers of xIELU (`beta`, `eps`) are constants, not tensors of the model.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    layer = _layer_shapes(model)
    for index in range(model.num_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (model.hidden_size,)
    shapes["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def held_shapes(model: ModelConfig, tp_size: int) -> dict[str, tuple[int, ...]]:
    """As `published_shapes`, and the tensors that ranks hold beside the published ones, under names of their own.

    With `xielu_tensor_parallel_gradient` "as_published", each tensor-parallel rank has its own scalars of xIELU. Those
    of the first are the published ones; those of rank r are called `...act_fn.alpha_p.tp<r>`. Not in the list with
    "as_published_restart": there, no checkpoint holds those.
    """
    shapes = published_shapes(model)
    if model.xielu_tensor_parallel_gradient == "as_published":
        for layer in range(model.num_layers):
            for name in SCALARS:
                shapes |= {f"model.layers.{layer}.{name}.tp{rank}": (1,) for rank in range(1, tp_size)}
    return shapes


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def layer_parameter_count(model: ModelConfig) -> int:
    """Trained parameters of one transformer block."""
    return sum(_product(shape) for shape in _layer_shapes(model).values())


def parameter_count(model: ModelConfig) -> int:
    """Trained parameters of the whole model, embeddings included."""
    return (
        model.num_layers * layer_parameter_count(model) + model.hidden_size + 2 * model.vocab_size * model.hidden_size
    )


def _cut(size: int, tp_rank: int, tp_size: int, what: str) -> Range:
    if size % tp_size:
        raise ApertusError(f"{what}: {size} is not divisible by tensor_model_parallel_size {tp_size}")
    part = size // tp_size
    return tp_rank * part, (tp_rank + 1) * part


def _whole(name: str, shape: tuple[int, ...]) -> Piece:
    rows, cols = ((0, shape[0]), (0, shape[1])) if len(shape) == 2 else ((0, 1), (0, shape[0]))
    return Piece(name, shape, rows, cols, rows, cols)


def _rows(name: str, shape: tuple[int, ...], tp_rank: int, tp_size: int) -> Piece:
    rows = _cut(shape[0], tp_rank, tp_size, f"rows of {name}")
    return Piece(name, shape, rows, (0, shape[1]), (0, rows[1] - rows[0]), (0, shape[1]))


def _cols(name: str, shape: tuple[int, ...], tp_rank: int, tp_size: int) -> Piece:
    cols = _cut(shape[1], tp_rank, tp_size, f"columns of {name}")
    return Piece(name, shape, (0, shape[0]), cols, (0, shape[0]), (0, cols[1] - cols[0]))


def _qkv(prefix: str, model: ModelConfig, tp_rank: int, tp_size: int) -> tuple[Piece, ...]:
    """Rows grouped by key/value head: its query heads, then its key, then its value."""
    shapes = _layer_shapes(model)
    first, stop = _cut(model.num_query_groups, tp_rank, tp_size, "num_query_groups")
    if model.num_attention_heads % model.num_query_groups:
        raise ApertusError(
            f"num_attention_heads {model.num_attention_heads} is not divisible by "
            f"num_query_groups {model.num_query_groups}"
        )
    query_rows = model.num_attention_heads // model.num_query_groups * model.head_dim
    found = []
    local = 0
    for group in range(first, stop):
        for short, size in (("q_proj", query_rows), ("k_proj", model.head_dim), ("v_proj", model.head_dim)):
            name = f"self_attn.{short}.weight"
            cols = (0, model.hidden_size)
            rows = (group * size, (group + 1) * size)
            found.append(Piece(prefix + name, shapes[name], rows, cols, (local, local + size), cols))
            local += size
    return tuple(found)


def pieces(
    parameter: str, model: ModelConfig, *, tp_rank: int, tp_size: int, layer_offset: int = 0
) -> tuple[Piece, ...]:
    """The published blocks that make up one local parameter; together they cover it, without overlap.

    `parameter` is the name inside Megatron's GPTModel, of either layer specification; `layer_offset` is the
    global index of the layer that the local model chunk calls 0. Raises ApertusError for a name that is no
    parameter of an Apertus model, and for a cut that does not come out even.
    """
    if parameter in _VOCABULARY:
        name = _VOCABULARY[parameter]
        return (_rows(name, (model.vocab_size, model.hidden_size), tp_rank, tp_size),)
    if parameter in _FINAL_NORM:
        return (_whole(_FINAL_NORM[parameter], (model.hidden_size,)),)
    match = _LAYER.fullmatch(parameter)
    if match is None:
        raise ApertusError(f"{parameter!r} is no parameter of an Apertus model")
    layer, inner = layer_offset + int(match[1]), match[2]
    if layer >= model.num_layers:
        raise ApertusError(f"{parameter!r} with layer offset {layer_offset} is layer {layer} of {model.num_layers}")
    prefix, shapes = f"model.layers.{layer}.", _layer_shapes(model)
    if inner == _QKV:
        return _qkv(prefix, model, tp_rank, tp_size)
    if inner in _REPLICATED:
        name = _REPLICATED[inner]
        own = name in SCALARS and tp_rank > 0 and model.xielu_tensor_parallel_gradient != "as_intended"
        return (_whole(prefix + name + (f".tp{tp_rank}" if own else ""), shapes[name]),)
    if inner in _COLUMN_PARALLEL:
        name = _COLUMN_PARALLEL[inner]
        return (_rows(prefix + name, shapes[name], tp_rank, tp_size),)
    if inner in _ROW_PARALLEL:
        name = _ROW_PARALLEL[inner]
        return (_cols(prefix + name, shapes[name], tp_rank, tp_size),)
    raise ApertusError(f"{parameter!r} is no parameter of an Apertus model")


def stored_parameters(model: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """Every parameter as a torch_dist checkpoint stores it: key in the index, Megatron's name, layer in the stack.

    One key holds a parameter of all layers, stacked; the layer is None for what is outside them. Norms before a linear
    are spelt as Transformer Engine's fusion has them, which is what Megatron's own modules write too. In the order of
    the computation.
    """
    layer = (
        "self_attention.linear_qkv.layer_norm_weight",
        _QKV,
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.activation_func.alpha_p",
        "mlp.activation_func.alpha_n",
        "mlp.linear_fc2.weight",
    )
    embedding, output = _VOCABULARY
    yield embedding, embedding, None
    for index in range(model.num_layers):
        for inner in layer:
            yield f"decoder.layers.{inner}", f"decoder.layers.{index}.{inner}", index
    for name in (*_FINAL_NORM, output):
        yield name, name, None


def partition_dim(parameter: str) -> int:
    """The dimension of the local parameter that tensor parallelism cuts; -1 where every rank holds it whole."""
    if parameter in _VOCABULARY:
        return 0
    match = _LAYER.fullmatch(parameter)
    if match is not None and (match[2] == _QKV or match[2] in _COLUMN_PARALLEL):
        return 0
    if match is not None and match[2] in _ROW_PARALLEL:
        return 1
    return -1
