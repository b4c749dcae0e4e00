"""Which block of which adapter a rank's Megatron parameter holds; the counterpart of `layout.py` for LoRA.

    adapter_pieces("decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight", run.model, 8, tp_rank=1, tp_size=2)
    adapter_shapes(run.model, run.adapter)             # name -> shape

An adapter adds alpha / rank B A x to W x. Names are those of the published weight with `lora_A` [rank, in] or `lora_B`
[out, rank] before "weight": `model.layers.3.mlp.up_proj.lora_A.weight`. Megatron keeps query, key and value in one
matrix, so they share one A, `self_attn.qkv_proj.lora_A.weight`; each has a B of its own
(`self_attn.q_proj.lora_B.weight`, ...), whose rows lie as those of the weights do. PEFT's form has an A for each of the
three: the same one.

How NeMo cuts them over tensor-parallel ranks (`nemo/collections/llm/peft/utils.py`, ParallelLinearAdapter): A as its
layer's weight where input columns are cut, else by rows, the rank; B by rows, always.
"""

from __future__ import annotations

import re
from dataclasses import replace

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.layout import Piece, Range, pieces
from apertus_nemo.recipe.schema import AdapterConfig, ModelConfig

_PLACES = {  # target -> its place in a layer, and whether its weight is cut by input columns
    "linear_qkv": ("self_attention", False),
    "linear_proj": ("self_attention", True),
    "linear_fc1": ("mlp", False),
    "linear_fc2": ("mlp", True),
}
_ADAPTER = re.compile(r"(decoder\.layers\.\d+\.(?:self_attention|mlp)\.(linear_\w+))\.adapter\.linear_(in|out)\.weight")
_WRAPPED = ".to_wrap."  # NeMo's name for the layer that has an adapter
# target -> its published modules within a layer, in the order of their rows
PUBLISHED = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.up_proj",),
    "linear_fc2": ("mlp.down_proj",),
}
_SHARED = re.compile(r"self_attn\.[qkv]_proj\.")  # their A is one


def base_name(parameter: str) -> str:
    """The name that a frozen parameter has in a model without adapters."""
    return parameter.replace(_WRAPPED, ".")


def is_adapter_parameter(parameter: str) -> bool:
    """Whether a parameter of a Megatron model with adapters is one of theirs."""
    return ".adapter." in parameter


def adapter_pieces(
    parameter: str, model: ModelConfig, rank: int, *, tp_rank: int, tp_size: int, layer_offset: int = 0
) -> tuple[Piece, ...]:
    """The blocks of adapters that make up one local parameter, as `layout.pieces` says it of weights.

    Raises ApertusError for a name that is no adapter's, and for a cut that does not come out even.
    """
    match = _ADAPTER.fullmatch(parameter)
    if match is None or match[2] not in _PLACES:
        raise ApertusError(f"{parameter!r} is no parameter of an adapter")
    weights = pieces(f"{match[1]}.weight", model, tp_rank=tp_rank, tp_size=tp_size, layer_offset=layer_offset)
    by_columns = _PLACES[match[2]][1]
    if match[3] == "in":
        whole = weights[0]
        name = whole.name if match[2] != "linear_qkv" else whole.name.replace("self_attn.q_proj", "self_attn.qkv_proj")
        rows: Range = (0, rank) if by_columns else _cut(rank, tp_rank, tp_size, "adapter.rank")
        local_rows = (0, rows[1] - rows[0])
        return (replace(whole, name=_a(name), shape=(rank, whole.shape[1]), rows=rows, local_rows=local_rows),)
    cols = (0, rank)
    if by_columns:
        (whole,) = weights
        rows = _cut(whole.shape[0], tp_rank, tp_size, f"rows of {whole.name}")
        weights = (replace(whole, rows=rows, local_rows=(0, rows[1] - rows[0])),)
    return tuple(replace(w, name=_b(w.name), shape=(w.shape[0], rank), cols=cols, local_cols=cols) for w in weights)


def adapter_shapes(model: ModelConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Every matrix of all adapters, name -> shape, in the order of the computation; none with kind "none"."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(model.num_layers if adapter.kind != "none" else 0):
        for target, (part, _) in _PLACES.items():
            if target not in adapter.targets:
                continue
            for side in ("in", "out"):
                parameter = f"decoder.layers.{layer}.{part}.{target}.adapter.linear_{side}.weight"
                blocks = adapter_pieces(parameter, model, adapter.rank, tp_rank=0, tp_size=1)
                shapes |= {block.name: block.shape for block in blocks}
    return shapes


def shared_a(module: str) -> str:
    """The name of the A of a published module, `model.layers.0.self_attn.k_proj`: of query, key and value it is one."""
    return _SHARED.sub("self_attn.qkv_proj.", f"{module}.") + "lora_A.weight"


def adapter_parameter_count(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Trained parameters of all adapters."""
    return sum(rows * cols for rows, cols in adapter_shapes(model, adapter).values())


def adapter_partition_dim(parameter: str) -> int:
    """The dimension of an adapter's parameter that tensor parallelism cuts."""
    match = _ADAPTER.fullmatch(parameter)
    if match is None:
        raise ApertusError(f"{parameter!r} is no parameter of an adapter")
    return 1 if match[3] == "in" and _PLACES[match[2]][1] else 0


def _a(weight: str) -> str:
    return weight.removesuffix("weight") + "lora_A.weight"


def _b(weight: str) -> str:
    return weight.removesuffix("weight") + "lora_B.weight"


def _cut(size: int, tp_rank: int, tp_size: int, what: str) -> Range:
    if size % tp_size:
        raise ApertusError(f"{what}: {size} is not divisible by tensor_model_parallel_size {tp_size}")
    part = size // tp_size
    return tp_rank * part, (tp_rank + 1) * part
