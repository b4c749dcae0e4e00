"""A tokenizer with the published ids of the chat tokens, so small that ids can be written by hand; and messages.

Byte b has the id 100 + b and there are no merges: "H" is 172, "i" is 205, a line feed is 110.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The ids of the published Apertus tokenizer.
PUBLISHED = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3,
    "<|system_start|>": 61, "<|system_end|>": 62, "<|developer_start|>": 63, "<|developer_end|>": 64,
    "<|user_start|>": 65, "<|user_end|>": 66, "<|assistant_start|>": 67, "<|assistant_end|>": 68,
    "<|inner_prefix|>": 69, "<|inner_suffix|>": 70, "<|tools_prefix|>": 71, "<|tools_suffix|>": 72,
}  # fmt: skip


def write_tokenizer(folder: Path, *, without: tuple[str, ...] = (), special: bool = True) -> Path:
    """The tokenizer's folder; `special`: whether the chat tokens are marked so."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = bytes_to_letters()
    tokens = {token: number for token, number in PUBLISHED.items() if token not in without}
    fillers = {f"<SPECIAL_{number}>": number for number in range(100) if number not in PUBLISHED.values()}
    vocab = {**tokens, **fillers, **{letters[byte]: 100 + byte for byte in range(256)}}
    engine = Tokenizer(models.BPE(vocab, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    add = engine.add_special_tokens if special else engine.add_tokens
    add([AddedToken(token, normalized=False) for token in tokens])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(engine.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bytes_to_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level BPE (Radford et al. 2019, GPT-2's encoder)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + others.index(byte)) for byte in range(256)]


def ids_of(text: str) -> list[int]:
    """What the tokenizer makes of text."""
    return [100 + byte for byte in text.encode()]


def chat(*turns: str) -> list[dict[str, Any]]:
    """Messages of turns as "role: content"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
