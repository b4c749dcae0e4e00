"""The LightningModule that NeMo's strategy drives: model, data step, forward step, loss.

NeMo's own `GPTModel` does the same for any GPT; importing it imports all of `nemo.collections.llm`
(data sets, PEFT, every other model), several seconds that a run never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from apertus_nemo.data.dataset import sample_digest
from apertus_nemo.model.attention import document_borders
from apertus_nemo.model.config import build_model, transformer_config_kwargs
from apertus_nemo.optim.module import ApertusOptimizerModule
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.training.heartbeat import Heart

Batch = dict[str, torch.Tensor]


class TokenMean(MaskedTokenLossReduction):  # type: ignore[misc]
    """The sum of the unmasked losses over their number, in each micro-batch; logged over the whole batch.

    Under context parallelism the masks leave each rank another number of tokens. Upstream divides each rank's sum by
    its own number, and averages over the ranks; here each is divided by the number in whole samples.
    """

    def forward(self, batch: Batch, forward_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """(loss that Megatron divides, its divisor, [sum, tokens] of this rank for the log)."""
        total, held, logged = super().forward(batch, forward_out)
        if "valid_tokens" not in batch:
            return total, held, logged
        # DistributedDataParallel averages over data- and context-parallel ranks: times the number of the latter
        return total * parallel_state.get_context_parallel_world_size(), batch["valid_tokens"], logged


class ApertusModule(pl.LightningModule):
    """Apertus as NeMo's `MegatronParallel` wants it; `values` collects what upstream logs in a step."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        self.run_config = run
        self.config = TransformerConfig(**transformer_config_kwargs(run))
        self.optim = ApertusOptimizerModule(run)
        self.optim.connect(self)
        self._loss_reduction = TokenMean()
        self.values: dict[str, Any] = {}
        self.sample_digests: list[bytes] = []
        self.heart = Heart()
        self.vp_stage: int | None = None  # virtual pipeline stage, if there are any
        self.initial: Path | None = None  # folder of the weights to start from; None: they are drawn

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the model and fill it, from (seed, published name) or from a folder."""
        if hasattr(self, "module"):
            return
        if vp_stage is None and self.config.virtual_pipeline_model_parallel_size is not None:
            vp_stage = 0  # NeMo names the others only
        self.vp_stage = vp_stage
        self.module = build_model(self.run_config, config=self.config, vp_stage=vp_stage, fill=self._fill())
        if self.run_config.adapter.kind != "none":
            from apertus_nemo.model.adapter import attach

            attach(self.module, self.run_config)

    def _fill(self) -> Callable[..., None] | None:
        if self.initial is None:
            return None
        from apertus_nemo.convert.initial import fill, weights_in

        return partial(fill, weights=weights_in(self.initial, self.run_config))

    def forward(self, **arguments: Any) -> torch.Tensor:
        """Per-token loss [batch, sequence] on the last pipeline stage, hidden states before it."""
        output: torch.Tensor = self.module(**arguments)
        return output

    def data_step(self, batches: Iterator[Any]) -> Batch:
        """One micro-batch: tokens, labels, loss_mask, position_ids, each [micro batch, positions of this rank].

        Every pipeline stage and every context-parallel rank reads whole samples; of these the latter keeps its two
        chunks, and the number of `valid_tokens` in the whole. Where documents do not see each other, `borders` of
        whole samples is what the attention of each layer needs (`model/attention.py`); it stays on the host.
        """
        self.heart.beat()
        item = next(batches)
        batch: Batch = item[0] if isinstance(item, tuple) else item
        if not self.vp_stage:  # the others get the same samples
            for row in range(batch["tokens"].shape[0]):
                self.sample_digests.append(sample_digest({name: value[row] for name, value in batch.items()}))
        batch = dict(batch)
        documents = batch.pop("documents", None)
        if parallel_state.get_context_parallel_world_size() > 1:
            valid_tokens = batch["loss_mask"].sum().to(torch.int)
            batch = {**get_batch_on_this_cp_rank(batch), "valid_tokens": valid_tokens}
        if self.run_config.trainer.accelerator == "gpu":
            batch = {name: value.cuda(non_blocking=True) for name, value in batch.items()}
        if documents is not None:
            batch["borders"] = document_borders(documents)
        return batch

    def forward_step(self, batch: Batch) -> torch.Tensor:
        """The forward pass of this pipeline stage for one micro-batch."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=self.vp_stage)
        output: torch.Tensor = self(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("borders"),  # Megatron hands it through to the attention of each layer
            labels=batch["labels"] if last else None,
        )
        return output

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> torch.Tensor:
        """The forward pass of the last pipeline stage; Megatron computes the loss in it."""
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> TokenMean:
        """What NeMo makes of the losses of a micro-batch."""
        return self._loss_reduction

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Keep what NeMo's strategy reports of the step; our own callback writes it to the record."""
        self.values[name] = value
