"""Training samples of conversations: whole ones, padded, with the loss on assistant turns.

    dataset = ChatDataset(run, source)
    dataset[7]                      # as TrainingDataset's: tokens, labels, loss_mask, position_ids (, documents)
    dataset.conversations(7)        # the numbers of the conversations in it

Sample i is a function of the corpus' bytes, `data.seed`, `data.seq_length` and `data.packing`. Each epoch reads every
row once, in an order of its own; a row is one conversation, or with packing some that fill a sample together, which
stay together in every epoch. Any epoch is found from its number, so there is nothing to save.

Orders come from numpy's `RandomState`, whose streams are frozen (NEP 19), seeded with (`data.seed`, epoch), and for
packing with (`data.seed`) alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.mixture import SourceData
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan

if TYPE_CHECKING:
    import torch


class ChatDataset:
    """Global sample index, 0 to train_samples - 1, to a sample.

    tokens, labels, position_ids: int64 [seq_length]; labels are the tokens one place on. Behind the conversations
    there is padding, which nothing before it can see under a causal mask.
    loss_mask: float32 [seq_length]; 1 where the label belongs to an assistant turn (`chat_format.trained`), else 0.
    documents, only with `data.document_masking=per_document`: int64 [seq_length]; the number of the token's
    conversation in the sample, from 0; the padding is one more.
    """

    def __init__(self, run: RunConfig, source: SourceData) -> None:
        """`source` was found by `mixture.sources`: its conversations fit into `data.seq_length`."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        chat, tokenizer = source.manifest.chat, source.manifest.tokenizer
        assert chat is not None
        [stage] = StagePlan.from_config(run).stages
        self._length = run.schedule.train_samples
        self._seq_length, self._seed = stage.seq_length, stage.seed
        self._per_document = run.data.document_masking == "per_document"
        self._start, self._end = chat.assistant_start_id, chat.assistant_end_id
        self._pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        self._indexed: Any = IndexedDataset(str(source.corpus / manifests.PREFIX))
        lengths = [int(length) for length in self._indexed.sequence_lengths]
        self._rows: list[list[int]] | None = None  # None: a row is the conversation of its number
        if run.data.packing:
            self._rows = packed(lengths, self._order_of(self._seed, count=len(lengths)), self._seq_length)
        self._count = len(lengths) if self._rows is None else len(self._rows)
        self._order = lru_cache(maxsize=2)(lambda epoch: self._order_of(self._seed, epoch, count=self._count))

    def __len__(self) -> int:
        return self._length

    @staticmethod
    def _order_of(*seed: int, count: int) -> Any:
        import numpy as np

        return np.random.RandomState(list(seed)).permutation(count)

    @property
    def rows(self) -> int:
        """Samples of one epoch."""
        return self._count

    def conversations(self, index: int) -> list[int]:
        """The numbers of a sample's conversations, in order, from 0 as the corpus has them."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        epoch, position = divmod(index, self._count)
        row = int(self._order(epoch)[position])
        return [row] if self._rows is None else self._rows[row]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        size = self._seq_length
        tokens = np.full(size + 1, self._pad, dtype=np.int64)
        mask = np.zeros(size + 1, dtype=np.float32)
        documents = np.empty(size, dtype=np.int64)
        numbers, filled = self.conversations(index), 0
        for number, conversation in enumerate(numbers):
            ids = self._indexed[conversation].astype(np.int64)
            inside = np.cumsum(ids == self._start) - np.cumsum(ids == self._end)  # turns never nest
            tokens[filled : filled + len(ids)] = ids
            mask[filled + 1 : filled + len(ids)] = inside[:-1]  # what follows a token inside a turn belongs to it
            documents[filled : filled + len(ids)] = number
            filled += len(ids)
        documents[filled:] = len(numbers)
        sample = {
            "tokens": torch.from_numpy(tokens[:-1].copy()),
            "labels": torch.from_numpy(tokens[1:].copy()),
            "loss_mask": torch.from_numpy(mask[1:].copy()),
            "position_ids": torch.arange(size),
        }
        if self._per_document:
            sample["documents"] = torch.from_numpy(documents)
        return sample


def packed(lengths: list[int], order: Any, seq_length: int) -> list[list[int]]:
    """Conversations put together to rows of at most `seq_length` tokens, none of them cut.

    They are taken in this order, and a row ends before the first one that does not fit ("next fit").
    """
    rows: list[list[int]] = []
    room = 0
    for number in map(int, order):
        if lengths[number] > room:
            rows.append([])
            room = seq_length
        rows[-1].append(number)
        room -= lengths[number]
    return rows
