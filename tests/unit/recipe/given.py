"""What a user must give to recipes that leave something open: recipe -> overrides."""

from __future__ import annotations

GIVEN = {
    "apertus_8b_pretrain": ["data.path=/data", *(f"data.stages.{i}.seed={40 + i}" for i in range(1, 4))],
    "apertus_70b_pretrain": ["data.path=/data", *(f"data.stages.{i}.seed={40 + i}" for i in range(1, 5))],
    "apertus_8b_sft": ["data.path=/data", "initial.path=/weights"],
    "apertus_70b_sft": ["data.path=/data", "initial.path=/weights"],
    "apertus_8b_lora": ["data.path=/data", "initial.path=/weights"],
    "apertus_70b_lora": ["data.path=/data", "initial.path=/weights"],
    **{
        f"apertus_{size}_long_{length}": ["initial.path=/before", "data.path=/data"]
        for size in ("8b", "70b")
        for length in ("8k", "16k", "32k", "64k")
    },
    "apertus_8b_continued": ["initial.path=/released", "data.path=/data"],
    "apertus_70b_continued": ["initial.path=/released", "data.path=/data"],
    "tiny_long_context": ["initial.path=/before"],
    "tiny_continued": ["initial.path=/released", "data.path=/data"],
}
