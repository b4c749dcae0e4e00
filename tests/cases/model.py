"""Ranks that build Apertus on Megatron and hold it against independent references.

Numbers that a test compares come back as JSON, tensors as .npz files in the folder that it names.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apertus_nemo.model import layout
from apertus_nemo.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    vocab_size=512,
    init_method_std=0.05,
)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 32, 2, 4


def run_config(
    *, tp: int = 1, pp: int = 1, vpp: int | None = None, sp: bool = False, cp: int = 1, devices: int = 1, **model: Any
) -> RunConfig:
    return RunConfig(
        name="small",
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(seq_length=SEQUENCE),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4),
        schedule=ScheduleConfig(train_samples=8),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            sequence_parallel=sp,
        ),
        trainer=TrainerConfig(
            global_batch_size=MICRO_BATCH * MICRO_BATCHES, micro_batch_size=MICRO_BATCH, devices=devices
        ),
    )


def start(rank: int, world_size: int, run: RunConfig, *, compute: bool = True) -> None:
    """Process group and Megatron's groups of this rank; with `compute`, all that Megatron needs for a step."""
    from megatron.core import parallel_state, tensor_parallel

    import apertus_nemo.model.config  # noqa: F401  (before "cuda" is aliased: upstream compiles functions on import)
    from apertus_nemo.training.device import alias_cuda

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if compute:
        alias_cuda(ranks=world_size)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=world_size, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}"
    )
    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    if compute:
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def chunks_of(run: RunConfig, config: Any = None) -> list[Any]:
    from apertus_nemo.model.config import build_model

    stages = run.parallel.virtual_pipeline_model_parallel_size or 1
    return [build_model(run, config=config, vp_stage=stage) for stage in range(stages)]


def as_matrix(tensor: Any) -> Any:
    return tensor.reshape(1, -1) if tensor.ndim == 1 else tensor


def blocks(chunk: Any, model: ModelConfig, tensors: dict[str, torch.Tensor]) -> list[tuple[layout.Piece, torch.Tensor]]:
    """(piece, its values) of all tensors of a chunk that are named and shaped like its parameters."""
    from megatron.core import parallel_state

    from apertus_nemo.model.config import layer_offset

    found = []
    for name, tensor in tensors.items():
        for piece in layout.pieces(
            name,
            model,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            layer_offset=layer_offset(chunk),
        ):
            values = as_matrix(tensor)[slice(*piece.local_rows), slice(*piece.local_cols)]
            found.append((piece, values))
    return found


def to_published(chunks: list[Any], model: ModelConfig, pick: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Published tensors as matrices; NaN where this rank holds nothing."""
    whole: dict[str, np.ndarray[Any, Any]] = {}
    for chunk in chunks:
        for piece, values in blocks(chunk, model, {name: pick(p) for name, p in chunk.named_parameters()}):
            size = piece.shape if len(piece.shape) == 2 else (1, *piece.shape)
            array = whole.setdefault(piece.name, np.full(size, np.nan, dtype=np.float32))
            array[slice(*piece.rows), slice(*piece.cols)] = values.detach().numpy()
    return whole


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [samples, sequence], the same on every rank.

    xIELU's published derivative jumps at 0 and at eps: an activation within rounding of these may get another
    gradient in another layout. With the seed 0 one stands at -1.1e-6 in one process and at -0.99e-6 under CP=2;
    with this one none is near.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, MODEL.vocab_size, (MICRO_BATCH * MICRO_BATCHES, SEQUENCE + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def documents(count: int = MICRO_BATCH * MICRO_BATCHES, length: int = SEQUENCE) -> torch.Tensor:
    """Numbers of documents [samples, sequence]: another cut of each sample, with documents of one token among them."""
    generator = torch.Generator().manual_seed(7)
    ends = torch.rand((count, length), generator=generator) < 0.1
    ends[0] = False  # one document
    ends[-1, :3] = True  # three of one token each
    return ends.cumsum(dim=1) - ends.long()


def gradient_norm(chunks: list[Any]) -> float:
    """Megatron's global norm, with the choice of parameters that its optimizer makes."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    grads = [p.main_grad for c in chunks for p in c.parameters() if param_is_not_tensor_parallel_duplicate(p)]
    return float(get_grad_norm_fp32(grads, grad_stats_parallel_group=parallel_state.get_model_parallel_group()))


def train_step(rank: int, world_size: int, out: str, masked: bool = False, **parallel: Any) -> dict[str, Any]:
    """Initial weights, and loss and gradients of one step, through Megatron's schedule and gradient reduction.

    masked: documents do not see each other.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank

    from apertus_nemo.model.attention import document_borders
    from apertus_nemo.model.config import transformer_config_kwargs

    run = run_config(**parallel)
    start(rank, world_size, run)
    config = TransformerConfig(**transformer_config_kwargs(run))
    chunks = chunks_of(run, config)
    initial = to_published(chunks, run.model, lambda p: p)
    with torch.no_grad():  # gradients of norms and scalars that differ by layer and by element
        for chunk in chunks:
            tensors = {name: p for name, p in chunk.named_parameters() if p.dim() == 1}
            for piece, values in blocks(chunk, run.model, tensors):
                seed = sum(piece.name.encode()) + len(piece.name)
                values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
        for chunk in chunks
    ]
    config.finalize_model_grads_func = finalize_model_grads
    inputs, labels = tokens()
    first = parallel_state.get_data_parallel_rank()
    step = parallel_state.get_data_parallel_world_size()

    def batches() -> Any:
        for index in range(first, MICRO_BATCHES, step):
            part = slice(index * MICRO_BATCH, (index + 1) * MICRO_BATCH)
            held = get_batch_on_this_cp_rank({"x": inputs[part], "y": labels[part]})
            yield held["x"], held["y"], document_borders(documents()[part]) if masked else None

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        share = losses.mean() / run.parallel.context_parallel_size  # all ranks hold as many tokens
        whole = share.detach().clone()
        torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return share, {"loss": whole}

    def forward(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        x, y, borders = next(iterator)
        return model(input_ids=x, position_ids=None, attention_mask=borders, labels=y), loss

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[batches() for _ in wrapped] if len(wrapped) > 1 else batches(),
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=MICRO_BATCHES // step,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    gradients = to_published(chunks, run.model, lambda p: p.main_grad)
    np.savez(Path(out) / f"initial-{rank}.npz", **initial)
    np.savez(Path(out) / f"gradients-{rank}.npz", **gradients)
    return {
        "losses": [float(item["loss"]) for item in losses],
        "norm": gradient_norm(chunks),
        "held": sorted(gradients),
        "alphas": {name: array.item() for name, array in gradients.items() if name.endswith((".alpha_p", ".alpha_n"))},
    }


def _peer(model: ModelConfig) -> Any:
    """transformers' model with random weights, every one of them telling."""
    from transformers import ApertusConfig, ApertusForCausalLM

    config = ApertusConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=65536,
        rms_norm_eps=model.layernorm_epsilon,
        rope_theta=model.rotary_base,
        rope_scaling={
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        },
        tie_word_embeddings=False,
        pad_token_id=None,  # its embedding would get no gradient
        attn_implementation="eager",
    )
    peer = ApertusForCausalLM(config).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif ".act_fn." in name:
                parameter.add_(noise, alpha=0.5)
            else:
                parameter.copy_(0.08 * noise)
        for layer in peer.model.layers:  # a bf16 constant there, whatever the model's type
            layer.mlp.act_fn.eps.fill_(model.xielu_eps)
    return peer


def parity(rank: int, world_size: int) -> dict[str, Any]:
    """Our model with the weights of transformers' one: logits, loss, and gradients by published tensor."""
    run = run_config()
    start(rank, world_size, run)
    peer = _peer(run.model)
    theirs = dict(peer.named_parameters())
    (ours,) = chunks_of(run)
    with torch.no_grad():
        for piece, values in blocks(ours, run.model, dict(ours.named_parameters())):
            values.copy_(as_matrix(theirs[piece.name])[slice(*piece.rows), slice(*piece.cols)])
    x, y = tokens()
    reference = peer(x, use_cache=False).logits
    logits = ours(x, None, None)
    loss = ours(x, None, None, labels=y).mean()
    loss.backward()
    reference_loss = torch.nn.functional.cross_entropy(reference.flatten(0, 1), y.flatten())
    reference_loss.backward()
    gradients = to_published([ours], run.model, lambda p: p.grad)
    differences = {}
    for name, array in gradients.items():
        other = as_matrix(theirs[name].grad).numpy()
        differences[name] = [float(np.abs(array - other).max()), float(np.abs(other).max())]
    return {
        "published": sorted(theirs),
        "shapes": {name: list(p.shape) for name, p in theirs.items()},
        "logits": [float((logits - reference).abs().max()), float(reference.abs().max())],
        "loss": [loss.item(), reference_loss.item()],
        "gradients": differences,
        "rope_equal": bool(torch.equal(ours.rotary_pos_emb.inv_freq, peer.model.rotary_emb.inv_freq)),
    }


def parity_by_document(rank: int, world_size: int) -> dict[str, Any]:
    """Our model on samples of several documents, transformers' on each document alone: logits and gradients.

    Then the first document of every sample is exchanged: what changes in the logits of the others, with and
    without the borders.
    """
    from apertus_nemo.model.attention import document_borders

    run = run_config()
    start(rank, world_size, run)
    peer = _peer(run.model)
    theirs = dict(peer.named_parameters())
    (ours,) = chunks_of(run)
    with torch.no_grad():
        for piece, values in blocks(ours, run.model, dict(ours.named_parameters())):
            values.copy_(as_matrix(theirs[piece.name])[slice(*piece.rows), slice(*piece.cols)])
    x, y = tokens()
    numbers = documents()
    borders = document_borders(numbers)
    logits = ours(x, None, borders)
    ours(x, None, borders, labels=y).sum().backward()
    reference = torch.empty_like(logits)
    for row in range(len(x)):
        for number in range(int(numbers[row, -1]) + 1):
            inside = numbers[row] == number
            alone = peer(x[row : row + 1, inside], use_cache=False).logits[0]  # its positions begin at 0
            reference[row, inside] = alone.detach()
            torch.nn.functional.cross_entropy(alone, y[row, inside], reduction="sum").backward()
    gradients = to_published([ours], run.model, lambda p: p.grad)
    differences = {}
    for name, array in gradients.items():
        other = as_matrix(theirs[name].grad).numpy()
        differences[name] = [float(np.abs(array - other).max()), float(np.abs(other).max())]
    first = numbers == 0
    other_x = torch.where(first, (x + 1) % run.model.vocab_size, x)
    with torch.no_grad():
        masked, causal = ours(other_x, None, borders), [ours(each, None, None) for each in (x, other_x)]
        whole = document_borders(torch.zeros_like(numbers))
        undivided = ours(x, None, whole)
    return {
        "documents": len(borders) - 1,
        "longest": int(borders.diff().max()),
        "logits": [float((logits - reference).abs().max()), float(reference.abs().max())],
        "gradients": differences,
        "kept": bool(torch.equal(masked[~first], logits[~first])),
        "changed": bool((masked[first] != logits[first]).any(dim=-1).all()),
        "seen": int((causal[0][~first] != causal[1][~first]).any(dim=-1).sum()),
        "later": int((~first).sum()),
        "undivided": float((undivided - causal[0]).abs().max()),
    }


def borders(rank: int, world_size: int, numbers: list[list[int]]) -> list[int]:
    """Borders of documents in a micro-batch."""
    from apertus_nemo.model.attention import document_borders

    found: list[int] = document_borders(torch.tensor(numbers)).tolist()
    return found


def foreign_mask(rank: int, world_size: int) -> str:
    """What core attention says to a mask that is no borders of its documents."""
    from types import SimpleNamespace

    from apertus_nemo.errors import ApertusError
    from apertus_nemo.model.attention import CoreAttention, document_borders

    core = CoreAttention(
        SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=4), 1, None, "self"
    )
    t = torch.zeros(6, 2, 1, 4)
    said = []
    for mask in (torch.ones(1, 1, 6, 6, dtype=torch.bool), document_borders(torch.zeros(1, 6))):
        try:
            core(t, t, t, mask)
        except ApertusError as error:
            said.append(str(error))
    return "; ".join(said)


def rope(rank: int, world_size: int, **model: Any) -> bool:
    """Whether our inverse frequencies are transformers', bit for bit."""
    from transformers import ApertusConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    run = run_config(num_layers=1, vocab_size=16, **model)
    start(rank, world_size, run)
    (ours,) = chunks_of(run)
    m = run.model
    kind = "llama3" if m.rope_scaling else "default"
    scaling = {
        "rope_type": "llama3",
        "factor": m.rope_scaling_factor,
        "low_freq_factor": m.rope_low_freq_factor,
        "high_freq_factor": m.rope_high_freq_factor,
        "original_max_position_embeddings": m.rope_original_max_position_embeddings,
    }
    config = ApertusConfig(
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        head_dim=m.head_dim,
        rope_theta=m.rotary_base,
        rope_scaling=scaling if m.rope_scaling else None,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return bool(torch.equal(ours.rotary_pos_emb.inv_freq, theirs))


def _plain_xielu(x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
    """The published formula, for autograd."""
    beta, eps = 0.5, torch.tensor(-1e-6, dtype=x.dtype)
    a_p = torch.nn.functional.softplus(alpha_p)
    a_n = beta + torch.nn.functional.softplus(alpha_n)
    return torch.where(x > 0, a_p * x * x + beta * x, (torch.expm1(torch.minimum(x, eps)) - x) * a_n + beta * x)


def xielu(rank: int, world_size: int, dtype: str) -> dict[str, Any]:
    """Our activation against float64 autograd of the formula; and the reference's test values."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from apertus_nemo.model.config import transformer_config_kwargs
    from apertus_nemo.model.init import xielu_raw
    from apertus_nemo.model.xielu import XIELU

    kind = getattr(torch, dtype)
    run = run_config()
    module = XIELU(TransformerConfig(**{**transformer_config_kwargs(run), "params_dtype": kind}))
    alpha_p, alpha_n = xielu_raw(run.model)
    with torch.no_grad():
        module.alpha_p.fill_(alpha_p)
        module.alpha_n.fill_(alpha_n)
    points = torch.tensor([-10.0, -2.0, -1.0, -0.5, -0.1, 0.0, 0.5, 1.0, 2.0], dtype=kind)

    generator = torch.Generator().manual_seed(1)
    edge = torch.tensor([0.0, -0.0, -5e-7, -2e-6, 5e-7, 1e-30, -1e-30, 30.0, -100.0])
    x = torch.cat((edge, 2.0 * torch.randn(20_000 - len(edge), generator=generator))).to(kind).view(50, 8, 50)
    weight = torch.randn(x.shape, generator=generator).to(kind)
    x.requires_grad_()
    result = module(x)
    (result * weight).sum().backward()

    wide = x.detach().double().requires_grad_()
    wide_p = module.alpha_p.detach().double().requires_grad_()
    wide_n = module.alpha_n.detach().double().requires_grad_()
    reference = _plain_xielu(wide, wide_p, wide_n)
    (reference * weight.double()).sum().backward()

    def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Largest difference, relative to the larger of the value and 1 (its terms cancel at about -1.9)."""
        return float(((ours.double() - theirs).abs() / theirs.abs().clamp(min=1.0)).max())

    assert x.grad is not None
    return {
        "values": module(points).tolist(),
        "value": error(result, reference),
        "grad_x": error(x.grad, wide.grad),  # type: ignore[arg-type]
        "alpha_p": [module.alpha_p.grad.item(), wide_p.grad.item()],  # type: ignore[union-attr]
        "alpha_n": [module.alpha_n.grad.item(), wide_n.grad.item()],  # type: ignore[union-attr]
        "scale_p": float((weight.double() * wide.clamp(min=0) ** 2).abs().sum()),
        "again": bool(torch.equal(module(x), result)),
        "types": [str(t.dtype) for t in (result, x.grad, module.alpha_p.grad)],  # type: ignore[union-attr]
    }


def norm(rank: int, world_size: int) -> dict[str, Any]:
    """Our RMSNorm against transformers' in float32, and against float64 in bfloat16."""
    from types import SimpleNamespace

    from transformers.models.apertus.modeling_apertus import ApertusRMSNorm

    from apertus_nemo.model.norm import RMSNorm

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 3, 4, 16, generator=generator) * torch.logspace(-4, 4, 40).view(40, 1, 1, 1)
    weight = 1.0 + 0.3 * torch.randn(16, generator=generator)
    grad = torch.randn(x.shape, generator=generator)

    def through(module: torch.nn.Module, kind: torch.dtype) -> list[torch.Tensor]:
        with torch.no_grad():
            module.weight.copy_(weight)  # type: ignore[operator]
        given = x.detach().to(kind, copy=True).requires_grad_()
        result = module(given)
        result.backward(grad.to(kind))
        assert given.grad is not None
        return [result.detach(), given.grad, module.weight.grad]  # type: ignore[list-item]

    def config(kind: torch.dtype, sequence_parallel: bool = False) -> Any:
        return SimpleNamespace(params_dtype=kind, sequence_parallel=sequence_parallel)

    ours = through(RMSNorm(config(torch.float32), 16, eps=1e-5), torch.float32)
    again = through(RMSNorm(config(torch.float32), 16, eps=1e-5), torch.float32)
    theirs = through(ApertusRMSNorm(16, eps=1e-5), torch.float32)
    half = through(RMSNorm(config(torch.bfloat16), 16, eps=1e-5), torch.bfloat16)

    def error(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((left - right).abs().max() / right.abs().max())

    marked = RMSNorm(config(torch.float32, True), 16)
    return {
        "equal": bool(torch.equal(ours[0], theirs[0])),
        "gradients": [
            float(((ours[1] - theirs[1]).abs().amax(-1) / theirs[1].abs().amax(-1)).max()),
            error(ours[2], theirs[2]),
        ],
        "again": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
        "bf16": error(half[0].float(), theirs[0]),
        "marks": [marked.weight.sequence_parallel, RMSNorm(config(torch.float32), 16).weight.sequence_parallel],
    }


class _PackedKernel(torch.nn.Module):
    """In the place of Transformer Engine's attention: sequences laid end to end, told apart by cu_seqlens."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        assert attention_mask is None
        assert packed_seq_params.qkv_format == "thd"
        ends = packed_seq_params.cu_seqlens_q
        assert ends.dtype == torch.int32
        assert torch.equal(ends, packed_seq_params.cu_seqlens_kv)
        assert packed_seq_params.max_seqlen_q == packed_seq_params.max_seqlen_kv == max(ends.diff().tolist())
        results = []
        for start, stop in zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True):
            q, k, v = (t[start:stop].double() for t in (query, key, value))  # [tokens, heads, width]
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = torch.einsum("ind,jnd->nij", q, k) / q.shape[2] ** 0.5
            scores = scores.masked_fill(torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1), -torch.inf)
            results.append(torch.einsum("nij,jnd->ind", scores.softmax(-1), v).flatten(1).to(query.dtype))
        return torch.cat(results)


def attention(rank: int, world_size: int, length: int, masked: bool = False, via: str = "local") -> dict[str, Any]:
    """Our core attention against softmax in float64; and the largest tensor that it made.

    masked: documents do not see each other. via "packed": our packing for Transformer Engine, around a stand-in for
    its kernel that computes packed sequences one after another in float64. Several ranks are context parallel, and
    each answers for the positions that Megatron gives it.
    """
    from types import SimpleNamespace

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch.utils._python_dispatch import TorchDispatchMode

    from apertus_nemo.model.attention import CoreAttention, document_borders, packed

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    Largest.size = max(Largest.size, item.numel())
            return result

    batch, heads, groups, width = 2, 6, 2, 8
    config = SimpleNamespace(context_parallel_size=world_size, attention_dropout=0.0, kv_channels=width)
    positions, groups_of_ranks = torch.arange(length), None
    if world_size > 1:
        start(rank, world_size, run_config(cp=world_size, devices=world_size))
        groups_of_ranks = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        positions = get_batch_on_this_cp_rank({"positions": positions[None]})["positions"][0]
    core = (
        CoreAttention(config, 1, None, "self", pg_collection=groups_of_ranks)
        if via == "local"
        else packed(_PackedKernel)()
    )
    numbers = documents(batch, length) if masked else torch.zeros(batch, length, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(length, batch, groups, (heads // groups + 2) * width, generator=generator)
    mixed = whole[positions].requires_grad_()
    parts = torch.split(mixed, [heads // groups * width, width, width], dim=3)  # strided, as Megatron hands them over
    grad = torch.randn(length, batch, heads * width, generator=generator)
    with Largest():
        mask = document_borders(numbers) if masked else None
        result = core(parts[0].reshape(len(positions), batch, heads, width), parts[1], parts[2], mask)
        result.backward(grad[positions])

    wide = whole.double().requires_grad_()
    q, k, v = torch.split(wide, [heads // groups * width, width, width], dim=3)
    q = q.reshape(length, batch, heads, width)
    k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) / width**0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    scores = scores.masked_fill((numbers[:, :, None] != numbers[:, None, :])[:, None], float("-inf"))
    reference = torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v).reshape(length, batch, heads * width)
    reference.backward(grad.double())
    assert mixed.grad is not None
    assert wide.grad is not None
    return {
        "value": float((result - reference[positions]).abs().max()),
        "gradient": float((mixed.grad - wide.grad[positions]).abs().max() / wide.grad.abs().max()),
        "largest": Largest.size,
        "row": batch * heads * length,
    }


def checkpoint(rank: int, world_size: int, folder: str, save: bool, **parallel: Any) -> dict[str, list[float]]:
    """Save, or load strictly, a torch_dist checkpoint; the values of what every tensor-parallel rank holds whole."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    run = run_config(**parallel)
    start(rank, world_size, run)
    chunks = chunks_of(run)
    (chunk,) = chunks
    with torch.no_grad():
        for piece, values in blocks(chunk, run.model, dict(chunk.named_parameters())):
            if piece.shape == (1,):  # xIELU's scalars: another value in each layer, and only in the saved model
                values.fill_(float(piece.name.split(".")[2]) + 0.25 * piece.name.endswith("_n") if save else -1.0)
    state = chunk.sharded_state_dict()
    if save:
        dist_checkpointing.save(state, folder)
    else:
        loaded = dist_checkpointing.load(state, folder, strict=StrictHandling.RAISE_ALL)
        chunk.load_state_dict({k: v for k, v in loaded.items() if not k.endswith("_extra_state")}, strict=True)
    held = to_published(chunks, run.model, lambda p: p)
    return {name: array.ravel().tolist() for name, array in held.items() if ".act_fn." in name or "norm" in name}


def meta(rank: int, world_size: int, **model: Any) -> dict[str, int]:
    """Parameters of a whole model at full size, as shapes only; each is checked against the layout."""
    run = run_config(**model)
    start(rank, world_size, run, compute=False)
    with torch.device("meta"):
        (chunk,) = chunks_of(run)
    held = 0
    for piece, values in blocks(chunk, run.model, dict(chunk.named_parameters())):
        assert values.is_meta
        assert tuple(values.shape) == (piece.rows[1] - piece.rows[0], piece.cols[1] - piece.cols[0]), piece.name
        held += values.numel()
    return {"parameters": sum(p.numel() for p in chunk.parameters()), "held": held}


def bf16(rank: int, world_size: int) -> dict[str, Any]:
    """A bf16 model: its initial scalars, its types, and its loss beside that of the float32 model."""
    from apertus_nemo.model.config import build_model

    run = run_config()
    start(rank, world_size, run)
    half = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, precision="bf16"))
    x, y = tokens()
    wide, narrow = (build_model(each) for each in (run, half))
    losses = [model(x, None, None, labels=y).mean() for model in (wide, narrow)]
    losses[1].backward()
    activation = narrow.decoder.layers[2].mlp.activation_func
    return {
        "types": sorted({str(p.dtype) for p in narrow.parameters()}),
        "rounded": all(
            torch.equal(n, w.to(torch.bfloat16))
            for (name, n), w in zip(narrow.named_parameters(), wide.parameters(), strict=True)
            if "alpha" not in name
        ),
        "alphas": [activation.alpha_p.item(), activation.alpha_n.item()],
        "losses": [loss.item() for loss in losses],
        "gradients": all(p.grad is not None and bool(p.grad.isfinite().all()) for p in narrow.parameters()),
    }


def refusals(rank: int, world_size: int) -> dict[str, list[Any]]:
    """Error class, exit code and message of settings that cannot be built."""
    from types import SimpleNamespace

    from apertus_nemo.errors import ApertusError
    from apertus_nemo.model.config import build_model, transformer_config_kwargs

    run = run_config()
    found: dict[str, list[Any]] = {}

    def attempt(name: str, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except ApertusError as error:
            found[name] = [type(error).__name__, error.exit_code, str(error)]

    attempt("unstarted", build_model, run)
    start(rank, world_size, run)
    attempt("unknown", transformer_config_kwargs, run_config(layer_spec="flash"))
    attempt("transformer_engine", transformer_config_kwargs, run_config(layer_spec="transformer_engine"))
    virtual = run_config(pp=2, vpp=2)
    for name in ("batch_p2p_comm", "deallocate_pipeline_outputs"):
        config = SimpleNamespace(**{**transformer_config_kwargs(virtual), name: True})
        attempt(name, lambda config=config: build_model(virtual, config=config))
    return found


def transformer_engine(rank: int, world_size: int, masked: bool) -> dict[str, Any]:
    """On a GPU: the two layer specifications with the same initial weights, in bf16."""
    from megatron.core import parallel_state, tensor_parallel

    from apertus_nemo.model.attention import document_borders
    from apertus_nemo.model.config import build_model

    run = run_config(head_dim=64, hidden_size=256, num_attention_heads=4, ffn_hidden_size=512)
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, precision="bf16", accelerator="gpu"))
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.distributed.init_process_group(
        "nccl", rank=rank, world_size=world_size, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}"
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    x, y = (t.cuda() for t in tokens())
    mask = document_borders(documents()) if masked else None
    losses, gradients = [], []
    for spec in ("local", "transformer_engine"):
        chunk = build_model(dataclasses.replace(run, model=dataclasses.replace(run.model, layer_spec=spec)))
        loss = chunk(x, None, mask, labels=y).mean()
        loss.backward()
        losses.append(loss.item())
        named = {name: p.grad.cpu() for name, p in chunk.named_parameters()}
        gradients.append({piece.name: values for piece, values in blocks(chunk, run.model, named)})
    return {
        "losses": losses,
        "names": [sorted(each) for each in gradients],
        "cosines": {
            name: float(torch.nn.functional.cosine_similarity(value.flatten().float(), other.flatten().float(), dim=0))
            for name, value in gradients[0].items()
            for other in (gradients[1][name],)
        },
    }
