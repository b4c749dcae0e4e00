"""The nearest right word for a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Short forms that people type, from the field's papers and from Megatron's command line.
ABBREVIATIONS = {
    "batch_size": "trainer.global_batch_size",
    "cp": "parallel.context_parallel_size",
    "ddp": "trainer.devices",
    "ffn_size": "model.ffn_hidden_size",
    "gbs": "trainer.global_batch_size",
    "gpus": "trainer.devices",
    "kv_heads": "model.num_query_groups",
    "learning_rate": "optim.lr",
    "mbs": "trainer.micro_batch_size",
    "num_heads": "model.num_attention_heads",
    "num_kv_heads": "model.num_query_groups",
    "num_key_value_heads": "model.num_query_groups",
    "num_gpus": "trainer.devices",
    "pp": "parallel.pipeline_model_parallel_size",
    "pp_size": "parallel.pipeline_model_parallel_size",
    "sp": "parallel.sequence_parallel",
    "tp": "parallel.tensor_model_parallel_size",
    "tp_size": "parallel.tensor_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "wd": "optim.weight_decay",
}


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely means, or None; dotted names are also compared by their last part."""
    known = sorted(choices)
    last = word.rsplit(".", 1)[-1]
    if ABBREVIATIONS.get(last) in known:
        return ABBREVIATIONS[last]
    by_last: dict[str, str] = {}
    for choice in known:
        by_last.setdefault(choice.rsplit(".", 1)[-1], choice)
    if last in by_last:  # the right name, in the wrong section or in none
        return by_last[last]
    for found in get_close_matches(word, known, n=1, cutoff=0.8):
        return found
    holding = [choice for choice in known if word in choice]
    if len(holding) == 1:
        return holding[0]
    section = word.rpartition(".")[0]
    in_section = {choice.rsplit(".", 1)[-1]: choice for choice in known if choice.rpartition(".")[0] == section}
    for found in get_close_matches(last, sorted(in_section), n=1, cutoff=0.6):
        return in_section[found]
    for found in get_close_matches(last, sorted(by_last), n=1, cutoff=0.75):
        return by_last[found]
    return None
