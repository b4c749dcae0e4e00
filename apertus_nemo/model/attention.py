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
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.exact_attention import exact_causal


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
        self.context_parallel_group = None
        if config.context_parallel_size > 1:
            self.context_parallel_group = pg_collection.cp
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

        `attention_mask` is None (causal over the whole sample) or what `document_borders` gives for whole samples;
        anything else is our own fault.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ApertusError("core attention takes neither bias nor packed sequences")
        held, batch, heads, width = query.shape
        chunks, length = [(0, held)], held
        if self.context_parallel_group is not None:
            size, rank = self.context_parallel_group.size(), self.context_parallel_group.rank()
            chunks, length = chunks_of_rank(rank, size, held * size), held * size
            key, value = _gathered(key, value, self.context_parallel_group)
        groups = key.shape[2]
        sharing = heads // groups
        # each (sample, group) is one entry of the batch; its query heads see one key and value head
        q = query.reshape(held, batch * groups, sharing, width).permute(1, 2, 0, 3)
        k = key.reshape(length, batch * groups, width).transpose(0, 1)
        v = value.reshape(length, batch * groups, width).transpose(0, 1)
        attend = exact_causal if q.device.type == "cpu" else _causal
        if attention_mask is None:
            rows = [(slice(None), [0, length])]
        else:
            every = enumerate(_borders_by_sample(attention_mask, batch, length))
            rows = [(slice(row * groups, (row + 1) * groups), borders) for row, borders in every]
        samples = []
        for entries, borders in rows:
            parts = []
            for first, last, start, stop in _queries(chunks, borders):
                seen = slice(start, stop)
                parts.append(attend(q[entries, :, first:last], k[entries, seen], v[entries, seen], self.softmax_scale))
            samples.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
        context = torch.cat(samples) if len(samples) > 1 else samples[0]
        return context.permute(2, 0, 1, 3).reshape(held, batch, heads * width)


def chunks_of_rank(rank: int, size: int, length: int) -> list[tuple[int, int]]:
    """[start, stop) of the two chunks of a sample of `length` positions that a context-parallel rank holds, in order.

    Raises ApertusError where the chunks are not whole.
    """
    width, rest = divmod(length, 2 * size)
    if rest:
        raise ApertusError(f"{length} positions are not {2 * size} equal chunks")
    return [(chunk * width, (chunk + 1) * width) for chunk in (rank, 2 * size - 1 - rank)]


def _queries(chunks: list[tuple[int, int]], borders: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """What this rank computes of a sample, piece by piece in the order in which it holds it: one document in one chunk.

    (first, last): the queries, counted as this rank holds them; (start, stop): the positions in the sample that the
    last query sees. Queries are the last of these positions.
    """
    begin = 0
    for left, right in chunks:
        for start, end in pairwise(borders):
            top, stop = max(left, start), min(right, end)
            if top < stop:
                yield begin + top - left, begin + stop - left, start, stop
        begin += right - left


def _gathered(key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [positions held, batch, groups, head_dim] -> [sequence, batch, groups, head_dim] of the sample.

    One all-gather forward; backward, one reduce-scatter of the gradients that all ranks' queries give.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    size, width = group.size(), key.shape[-1]
    both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)
    by_rank = both.view(size, 2, -1, *both.shape[1:])  # rank r: chunks r and 2 size - 1 - r
    whole = torch.cat((by_rank[:, 0], by_rank[:, 1].flip(0))).flatten(0, 1)
    return whole[..., :width], whole[..., width:]


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
    """As `exact_causal`, by the fused kernel that torch chooses."""
    k, v = (each.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for each in (k, v))  # by stride 0, not copied
    if q.shape[2] == k.shape[2]:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler

    mask: Any = causal_lower_right(q.shape[2], k.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
