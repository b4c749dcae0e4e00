"""Core attention: for plain Megatron on torch's scaled_dot_product_attention, and documents that do not see each other.

Megatron's own core attention holds all [batch, heads, sequence, sequence] scores at once and repeats keys and values.
Here queries come in blocks, grouped by the key/value head that they share, and the heads of a group see it
through a view.

Attention is causal over the whole sample, or, with `data.document_masking=per_document`, causal within each document:

    chunk(tokens, None, document_borders(documents), labels=labels)

The borders go in the place of Megatron's attention mask, which every layer hands to its core attention as it is. Both
layer specifications read the same borders: `CoreAttention` attends document by document, `packed` calls Transformer
Engine's attention for packed sequences. RoPE's positions run on across borders in both: attention depends on
their differences alone.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apertus_nemo.errors import ApertusError

_QUERY_BLOCK = 512  # queries at a time on the CPU; bounds the scores to [batch, heads, block, sequence]


def document_borders(documents: Tensor) -> Tensor:
    """Where documents begin in a micro-batch laid out sample by sample, and its end: int32 [documents + 1], on the CPU.

    `documents` [batch, sequence] are numbers that change from one document to the next (`data/dataset.py`); the first
    token of a sample always begins a document. What packed attention calls cu_seqlens.
    """
    numbers = documents.cpu()
    begins = torch.ones(numbers.shape, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return torch.cat((starts, torch.tensor([numbers.numel()]))).to(torch.int32)


class CoreAttention(torch.nn.Module):
    """Causal attention with grouped queries, built by Megatron's `SelfAttention`; no parameters, no dropout."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ApertusError("core attention does not know context parallelism: config.py refuses it")
        if config.attention_dropout or attention_dropout:
            raise ApertusError("core attention has no dropout: Apertus has none")
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Queries [sequence, batch, heads, head_dim], keys and values [sequence, batch, groups, head_dim] of this
        rank -> [sequence, batch, heads * head_dim].

        `attention_mask` is None (causal over the whole sample) or what `document_borders` gives; anything else is
        our own fault.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ApertusError("core attention takes neither bias nor packed sequences")
        length, batch, heads, width = query.shape
        groups = key.shape[2]
        sharing = heads // groups
        # each (sample, group) is one entry of SDPA's batch; its query heads see one key and value head, by stride 0
        q = query.reshape(length, batch * groups, sharing, width).permute(1, 2, 0, 3)
        k = key.reshape(length, batch * groups, 1, width).permute(1, 2, 0, 3).expand(-1, sharing, -1, -1)
        v = value.reshape(length, batch * groups, 1, width).permute(1, 2, 0, 3).expand(-1, sharing, -1, -1)
        attend = _exact_causal if q.device.type == "cpu" else _causal
        if attention_mask is None:
            context = attend(q, k, v, self.softmax_scale)
        else:
            samples = []
            for row, borders in enumerate(_borders_by_sample(attention_mask, batch, length)):
                entries = slice(row * groups, (row + 1) * groups)
                parts = []
                for start, stop in pairwise(borders):
                    q_d, k_d, v_d = (t[entries, :, start:stop] for t in (q, k, v))
                    parts.append(attend(q_d, k_d, v_d, self.softmax_scale))
                samples.append(torch.cat(parts, dim=2))
            context = torch.cat(samples)
        return context.permute(2, 0, 1, 3).reshape(length, batch, heads * width)


def _borders_by_sample(borders: Tensor, batch: int, length: int) -> list[list[int]]:
    """The starts of a sample's documents within it, and its end, for each sample."""
    if borders.dim() != 1 or borders.dtype != torch.int32 or int(borders[-1]) != batch * length:
        raise ApertusError(f"these are no borders of documents in {batch} samples of {length} tokens")
    starts = borders[:-1].tolist()
    return [
        [*(s - row * length for s in starts if row * length <= s < (row + 1) * length), length] for row in range(batch)
    ]


def packed(base: Any) -> Any:
    """Transformer Engine's core attention (`base`, Megatron's wrapper of it), which also takes `document_borders`.

    With borders, queries, keys and values are laid out token after token ("thd") with the borders as cu_seqlens;
    without them, everything is as in `base`.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    class PackedAttention(base):  # type: ignore[misc]
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any = None,
            attention_bias: Tensor | None = None,
            packed_seq_params: Any = None,
        ) -> Tensor:
            """As `CoreAttention.forward`."""
            if attention_mask is None:
                causal: Tensor = super().forward(
                    query, key, value, None, attn_mask_type, attention_bias, packed_seq_params
                )
                return causal
            if attention_bias is not None or packed_seq_params is not None:
                raise ApertusError("packed attention takes neither bias nor other packed sequences")
            length, batch = query.shape[:2]
            longest = int(attention_mask.diff().max())
            borders = attention_mask.to(query.device, non_blocking=True)
            packing = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=borders,
                cu_seqlens_kv=borders,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            q, k, v = (t.transpose(0, 1).reshape(batch * length, *t.shape[2:]) for t in (query, key, value))
            context = super().forward(q, k, v, None, attn_mask_type, packed_seq_params=packing)
            result: Tensor = context.reshape(batch, length, -1).transpose(0, 1).contiguous()
            return result

    return PackedAttention


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _exact_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA's plain kernel, a block of queries at a time.

    On CPUs with AVX-512 the fused kernel of torch 2.13 takes exp() from an approximation good to some 20 bits: seen
    from one process, the gradient norm under TP=2 was off by 1.8e-6 instead of 3e-7.
    """
    with sdpa_kernel(SDPBackend.MATH):
        length = q.shape[2]
        if length <= _QUERY_BLOCK:
            return _causal(q, k, v, scale)
        blocks = []
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            mask = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).tril(diagonal=start)
            blocks.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], attn_mask=mask, scale=scale
                )
            )
        return torch.cat(blocks, dim=2)
