"""Samples: what was tokenized, cut and ordered by Megatron, with our masks; the same on every rank and disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.data import goldfish
from apertus_nemo.data import manifest as manifests
from apertus_nemo.testing.ranks import Parent
from tests.unit.data.conftest import Command

SEQ = 64


def samples(
    parent: Parent, corpus: Path, cache: Path, indices: list[int], world_size: int = 1, **changes: Any
) -> list[Any]:
    arguments = {
        "corpus": str(corpus),
        "cache": str(cache),
        "indices": indices,
        "changes": changes,
        "distributed": world_size > 1,
    }
    return parent.run("tests.cases.data:samples", world_size=world_size, arguments=arguments)


def test_samples_are_megatrons_with_the_goldfish_mask(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    count = 3 * (manifests.load(corpus).tokens // SEQ)  # several epochs
    indices = [0, 1, count // 2, count - 1, *range(10, 30)]
    changes = {"train_samples": count, "goldfish_k": 5, "goldfish_h": 6}
    [ours] = samples(parent, corpus, tmp_path / "a", indices, **changes)
    arguments = {"corpus": str(corpus), "cache": str(tmp_path / "b"), "indices": indices, "changes": changes}
    [theirs] = parent.run("tests.cases.data:megatron_samples", arguments=arguments)
    assert ours["length"] == count
    assert ours["kinds"] == {
        "tokens": ["torch.int64", [SEQ]],
        "labels": ["torch.int64", [SEQ]],
        "loss_mask": ["torch.float32", [SEQ]],
        "position_ids": ["torch.int64", [SEQ]],
    }
    dropped = ends = 0
    for mine, other in zip(ours["samples"], theirs, strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["labels"] == other["labels"]
        assert mine["tokens"][1:] == mine["labels"][:-1]
        assert mine["position_ids"] == other["position_ids"] == list(range(SEQ))
        for i, token in enumerate(mine["tokens"]):
            expected = 0.0 if token == 2 else 1.0  # no loss where the input is </s>; </s> itself is trained
            if i >= 5:
                product = 1
                for label in mine["labels"][i - 5 : i + 1]:
                    product *= label
                assert product < 2**63  # six ids below 300: no wrap here
                if goldfish.table()[product % 1_000_003] < 0.2:
                    expected, dropped = 0.0, dropped + 1
            ends += token == 2
            assert mine["loss_mask"][i] == expected
    assert dropped > 100
    assert ends > 3


def test_documents_begin_where_megatron_would_reset_positions(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    count = 2 * (manifests.load(corpus).tokens // SEQ)
    indices = list(range(count))
    changes = {"train_samples": count}
    [causal] = samples(parent, corpus, tmp_path / "a", indices, **changes)
    [masked] = samples(parent, corpus, tmp_path / "a", indices, **changes, document_masking="per_document")
    assert len(list((tmp_path / "a").iterdir())) == 1  # one index for both
    arguments = {"corpus": str(corpus), "cache": str(tmp_path / "b"), "indices": indices, "changes": changes}
    [theirs] = parent.run("tests.cases.data:megatron_samples", arguments={**arguments, "reset": True})
    several = inside = 0
    for plain, ours, other in zip(causal["samples"], masked["samples"], theirs, strict=True):
        numbers = ours.pop("documents")
        assert ours == plain
        assert ours["position_ids"] == list(range(SEQ))  # RoPE reads none
        starts = [i for i in range(SEQ) if i == 0 or numbers[i] != numbers[i - 1]]
        assert starts == [i for i in range(SEQ) if other["position_ids"][i] == 0]
        assert numbers == [sum(start <= i for start in starts) - 1 for i in range(SEQ)]
        assert all(ours["tokens"][i] == 1 for i in starts[1:])  # <s>, which every document begins with
        several += len(starts) > 1
        inside += ours["tokens"][0] != 1
    assert several > 10
    assert inside > 10
    assert masked["kinds"]["documents"] == ["torch.int64", [SEQ]]
    assert not set(masked["digests"]) & set(causal["digests"])


def test_documents_are_in_the_digest(parent: Parent) -> None:
    [[plain, one, two, batch]] = parent.run("tests.cases.data:digests_of_documents")
    assert len({plain, one, two, batch}) == 4


def test_every_token_is_read_as_it_was_written(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    tokens = manifests.load(corpus).tokens
    count = (tokens - 1) // SEQ  # one epoch
    [ours] = samples(parent, corpus, tmp_path, list(range(count)), train_samples=count)
    [found] = parent.run("tests.cases.data:indexed", arguments={"corpus": str(corpus)})
    stream = {tuple(sample["tokens"]) for sample in ours["samples"]}
    assert len(stream) == count
    # Samples are shuffled, and documents before them: chain them by the label that follows the last token.
    pool = [token for sample in ours["samples"] for token in sample["tokens"]]
    whole = [token for ids in found["documents"] for token in ids]
    for token in set(whole):
        assert 0 <= whole.count(token) - pool.count(token) <= tokens - count * SEQ
    inside = [tuple(ids[i : i + 8]) for ids in found["documents"] for i in range(len(ids) - 7)]
    known = set(inside)
    for sample in ours["samples"]:
        for i in range(SEQ - 7):
            window = tuple(sample["tokens"][i : i + 8])
            assert window in known or 2 in window[:-1]


def test_masks_do_not_leak_from_one_sample_to_the_next(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    # Megatron caches and hands out one mask for all samples when nothing in it depends on the sample.
    changes: dict[str, Any] = {"eod_mask_loss": False, "goldfish_k": 2, "goldfish_h": 3}
    [first] = samples(parent, corpus, tmp_path, [0, 1, 2, 3], **changes)
    [other] = samples(parent, corpus, tmp_path, [3, 2, 1, 0], **changes)
    assert first["digests"] == first["again"] == other["digests"][::-1]
    assert len({tuple(sample["loss_mask"]) for sample in first["samples"]}) == 4
    [plain] = samples(parent, corpus, tmp_path, [0, 1], eod_mask_loss=False, goldfish=False)
    assert all(sample["loss_mask"] == [1.0] * SEQ for sample in plain["samples"])


def test_a_padding_token_in_the_text_is_a_token(parent: Parent, corpus: Path, tmp_path: Path, command: Command) -> None:
    # Megatron would turn it into 0 and leave it out of the loss, if it knew the tokenizer's padding id.
    (tmp_path / "a.txt").write_text("arm<pad>bear " * 30)
    chosen = ("--tokenizer", corpus / "tokenizer", "--special-tokens", "parse", "--output", "out")
    assert command("build", "--input", "a.txt", *chosen)["code"] == 0
    [found] = samples(parent, tmp_path / "out", tmp_path / "cache", [0], train_samples=1, goldfish=False)
    [sample] = found["samples"]
    assert sample["tokens"].count(3) > 5
    assert sample["labels"].count(3) > 5
    assert sample["loss_mask"] == [1.0] * SEQ


def test_place_cache_and_ranks_change_nothing_and_choices_do(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(corpus, tmp_path / "moved"))
    cache = tmp_path / "cache"
    [one] = samples(parent, corpus, cache, [0, 5, 39])
    [folder] = cache.iterdir()
    stamp = folder.stat().st_mtime_ns
    assert samples(parent, moved, cache, [0, 5, 39])[0]["digests"] == one["digests"]
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert folder.stat().st_mtime_ns == stamp  # read, not made again
    ranks = samples(parent, moved, tmp_path / "shared", [0, 5, 39], world_size=3)
    assert [rank["digests"] for rank in ranks] == [one["digests"]] * 3
    assert len(list((tmp_path / "shared").iterdir())) == 1
    for changes in ({"seed": 29}, {"seq_length": 32}, {"train_samples": 4000}):
        [other] = samples(parent, corpus, cache, [0, 5, 39], **changes)
        assert other["digests"] != one["digests"], changes


def test_a_damaged_index_is_made_again(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    [good] = samples(parent, corpus, tmp_path, [0, 7])
    [folder] = tmp_path.iterdir()
    [index] = folder.glob("*shuffle_index.npy")
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    [again] = samples(parent, corpus, tmp_path, [0, 7])
    assert again["digests"] == good["digests"]
    assert index.read_bytes() != data
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_unfit_data_is_refused(parent: Parent, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Any], Path, str]] = [
        ({"vocab_size": 299}, tmp_path / "cache", "model.vocab_size is 299, but the tokenizer of the data has 300 ids"),
        ({"seq_length": 10**6}, tmp_path / "cache", "data.seq_length is 1000000, so a sample needs 1000001 tokens"),
        ({}, tmp_path / "file", f"could not write {tmp_path / 'file'}: "),
    ]
    for changes, cache, message in cases:
        arguments = {"corpus": str(corpus), "cache": str(cache), "changes": changes}
        [refusal] = parent.run("tests.cases.data:refused", arguments=arguments)
        assert refusal.startswith(message)
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("first_step", [1, 4])
def test_replicas_side_by_side_read_the_order_of_training(
    parent: Parent, corpus: Path, tmp_path: Path, first_step: int
) -> None:
    changes = {"train_samples": 24, "global_batch_size": 4, "micro_batch_size": 2}
    [whole] = samples(parent, corpus, tmp_path, list(range(24)), train_samples=24)
    arguments = {"corpus": str(corpus), "cache": str(tmp_path), "changes": changes, "first_step": first_step}
    ranks = parent.run("tests.cases.data:loader", world_size=2, arguments=arguments)
    assert [rank["length"] for rank in ranks] == [7 - first_step] * 2
    rows = [
        row for batches in zip(*(rank["rows"] for rank in ranks), strict=True) for batch in batches for row in batch
    ]
    assert rows == whole["digests"][4 * (first_step - 1) :]
