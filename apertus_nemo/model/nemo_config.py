"""Apertus as a model configuration of NeMo.

    config = apertus_config(run)
    model = nemo.collections.llm.GPTModel(config, optim=..., tokenizer=None)     # goes to nl.Trainer

NeMo calls `config.configure_model` on every rank and for every virtual pipeline stage; ours builds the model that
`build_model` describes, initial weights included. The batch that a training step takes is a dict of [batch, sequence]
tensors `tokens`, `labels`, `loss_mask` and, unused by the model, `position_ids`; there is no attention mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nemo.collections.llm.gpt.model.base import GPTConfig

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.config import build_model, transformer_config_kwargs
from apertus_nemo.recipe.schema import RunConfig

_BATCH = ("tokens", "labels", "loss_mask", "position_ids")


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, torch.Tensor]:
    """The next micro-batch, on the device. NeMo's loaders hand out (batch, index, loader) triples or plain batches."""
    item = next(dataloader_iter)
    batch = item[0] if isinstance(item, tuple) and len(item) == 3 else item
    missing = [key for key in ("tokens", "labels", "loss_mask") if key not in batch]
    if missing:
        raise ApertusError(f"a batch lacks {', '.join(missing)}")
    found = {key: batch[key] for key in _BATCH if key in batch}
    if torch.cuda.is_available():
        found = {key: value.cuda(non_blocking=True) for key, value in found.items()}
    return found


def forward_step(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each token, float32 [batch, sequence], on the last pipeline stage; hidden states on the others."""
    output: torch.Tensor = model(
        input_ids=batch["tokens"],
        position_ids=batch.get("position_ids"),
        attention_mask=None,
        labels=batch["labels"],
    )
    return output


@dataclass
class ApertusConfig(GPTConfig):  # type: ignore[misc]
    """GPTConfig of an Apertus model; made by `apertus_config`."""

    # A field, since NeMo makes the configuration anew, from its arguments, for each further virtual pipeline stage.
    run: RunConfig | None = None

    def configure_model(
        self,
        tokenizer: Any = None,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """This rank's GPTModel. The tokenizer is not asked: the vocabulary is `model.vocab_size`, without padding."""
        if self.run is None:
            raise ApertusError("ApertusConfig has no run: make it with apertus_config")
        return build_model(self.run, config=self, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)


def apertus_config(run: RunConfig) -> ApertusConfig:
    """NeMo's model configuration for a recipe. Raises what `transformer_config_kwargs` raises."""
    return ApertusConfig(
        **transformer_config_kwargs(run),
        fp16_lm_cross_entropy=False,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        rotary_percent=1.0,
        seq_length=run.data.seq_length,
        scatter_embedding_sequence_parallel=True,
        vocab_size=run.model.vocab_size,
        data_step_fn=data_step,
        forward_step_fn=forward_step,
        run=run,
    )
