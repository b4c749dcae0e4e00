"""The sources that a run reads: which folder, which of its documents, how many tokens.

    found = sources(config, folder)              # name -> SourceData; "" is all of the data of a stage without mixture
    shares(stage, found)                         # what each source of a stage is read: samples, epochs

`folder` is the built corpus of the run; with mixtures of built data it holds one for each source. Pure Python:
manifests and the lengths in corpus.idx are all that is read.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.manifest import Manifest
from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import Stage, StagePlan, has_corpora

EMBEDDED = {"documentation": "topics/", "library": "library/"}  # source -> how its documents are named in the manifest


@dataclass(frozen=True)
class SourceData:
    """One source: documents [first, end) of a built corpus."""

    corpus: Path
    manifest: Manifest
    first: int
    end: int
    tokens: int  # of these documents, BOS and EOS included

    @property
    def whole(self) -> bool:
        """It is all of its corpus."""
        return (self.first, self.end) == (0, self.manifest.documents)

    def samples(self, seq_length: int) -> int:
        """Samples of one epoch: each has seq_length tokens, and the label of the last one is the token after it.

        Of conversations: their number; packing makes fewer, which is for the dataset to say.
        """
        if self.manifest.chat is not None:
            return self.manifest.documents
        return (self.tokens - 1) // seq_length

    def epochs(self, samples: float, seq_length: int, *, packing: bool) -> float:
        """How often so many samples read each token; of packed conversations at least so often."""
        if self.manifest.chat is not None and not packing:
            return samples / self.manifest.documents
        return samples * seq_length / self.tokens


def corpora(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Name -> folder of each built corpus that a run reads; "" names the only one."""
    if not has_corpora(config):
        return {"": folder}
    names = {source for stage in StagePlan.from_config(config).stages for source in stage.sources}
    return {name: folder / name for name in sorted(names)}


def sources(config: RunConfig, folder: Path) -> dict[str, SourceData]:
    """The sources of a run by name, by what their manifests say; held against the model and against each other.

    Raises:
        InputError: a corpus is missing, does not fit the model, has another tokenizer, is shorter than a sample, or is
            twice in a mixture.
        Differs: a manifest is not what its sum says.
    """
    plan = StagePlan.from_config(config)
    loaded = {}
    for name, path in corpora(config, folder).items():
        try:
            loaded[name] = manifests.load(path)
        except InputError as error:
            raise InputError(f"{_of(name)}{error}") from None
        _check_kind(path, loaded[name], config)
        _check_vocabulary(loaded[name], config)
    _same_tokenizer(loaded)
    found: dict[str, SourceData] = {}
    for stage in plan.stages:
        for name in stage.sources:
            if name not in found:
                found[name] = _source(config, folder, name, loaded)
            if found[name].samples(stage.seq_length) < 1:
                key = f"data.stages.{stage.number - 1}.seq_length" if config.data.stages else "data.seq_length"
                raise InputError(
                    f"{key} is {stage.seq_length}, so a sample needs {stage.seq_length + 1} tokens, but "
                    f"{f'the source {name}' if name else 'the corpus'} has {found[name].tokens}: "
                    "add text or set a smaller data.seq_length"
                )
        _no_repeats(stage, found)
    return found


def _check_kind(path: Path, manifest: Manifest, config: RunConfig) -> None:
    chat, seq_length = manifest.chat, config.data.seq_length
    if chat is None and config.data.kind == "chat":
        raise InputError(
            f"data.kind is chat, but {path} was built from documents of text: "
            "build it with `apertus-nemo data build --format chat`, or set data.kind=text"
        )
    if chat is not None and config.data.kind != "chat":
        raise InputError(f"data.kind is text, but {path} was built from conversations: set data.kind=chat")
    if chat is not None and chat.longest_tokens > seq_length:
        raise InputError(
            f"data.seq_length is {seq_length}, but the conversation in {chat.longest_at} of the data has "
            f"{chat.longest_tokens} tokens: set data.seq_length to at least {chat.longest_tokens}, "
            f"or build the data with --max-tokens {seq_length} --drop-longer"
        )


def _no_repeats(stage: Stage, found: Mapping[str, SourceData]) -> None:
    """Two names of one corpus would give the same samples in the same order, twice."""
    names: dict[tuple[str, int, int], str] = {}
    for name in stage.sources:
        source = found[name]
        first = names.setdefault((manifests.digest(source.manifest), source.first, source.end), name)
        if first != name:
            raise InputError(
                f"data.stages.{stage.number - 1}: the sources {first} and {name} are the same corpus: "
                "name it once, with the sum of the weights"
            )


def _of(name: str) -> str:
    return f"the source {name} of the mixture: " if name else ""


def _check_vocabulary(manifest: Manifest, config: RunConfig) -> None:
    size = manifest.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of the data has {size} ids: "
            f"set model.vocab_size to at least {size}, or build the data with a smaller vocabulary"
        )


def _source(config: RunConfig, folder: Path, name: str, loaded: Mapping[str, Manifest]) -> SourceData:
    if name in loaded:
        manifest = loaded[name]
        return SourceData(folder / name if name else folder, manifest, 0, manifest.documents, manifest.tokens)
    manifest = loaded[""]  # a part of the embedded corpus, whose inputs are its documents, sorted by name
    inside = [i for i, entry in enumerate(manifest.inputs) if entry.name.startswith(EMBEDDED[name])]
    first, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
    if len(inside) != end - first or not inside or len(manifest.inputs) != manifest.documents:
        raise InputError(f"{folder}: its documents are not those of the embedded corpus: remove the folder")
    return SourceData(folder, manifest, first, end, sum(_lengths(folder, manifest.documents)[first:end]))


def _lengths(folder: Path, documents: int) -> array.array[int]:
    """Tokens of each document: int32 after the header of corpus.idx (megatron/core/datasets/indexed_dataset.py)."""
    lengths = array.array("i")
    with (folder / f"{manifests.PREFIX}.idx").open("rb") as stream:
        stream.seek(struct.calcsize("<9sQBQQ"))
        try:
            lengths.fromfile(stream, documents)
        except EOFError:
            raise InputError(f"{stream.name}: is cut off: build the corpus again") from None
    if sys.byteorder == "big":
        lengths.byteswap()
    return lengths


def _same_tokenizer(loaded: Mapping[str, Manifest]) -> None:
    """One model has one vocabulary."""
    prefix = f"{manifests.TOKENIZER}/tokenizer.json"
    first: tuple[str, str] | None = None
    for name, manifest in loaded.items():
        digest = next(entry.sha256 for entry in manifest.files if entry.path == prefix)
        special = (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id)
        found = f"{digest} {special}"
        if first is not None and found != first[1]:
            raise InputError(
                f"the sources {first[0]} and {name} of the mixtures have different tokenizers: build both with "
                "`apertus-nemo data build --tokenizer`, from the same one"
            )
        first = first or (name, found)


@dataclass(frozen=True)
class Share:
    """What a stage reads of a source."""

    source: str
    weight: float  # as a fraction of 1
    samples: float  # expected; what is drawn differs by less than one for each source of the mixture
    epochs: float  # how often each token of the source is read, on average


def weights(stage: Stage, found: Mapping[str, SourceData]) -> list[float]:
    """The weights of a stage's sources, in their order; by samples in an epoch where none are given."""
    given = [part.weight for part in stage.mixture] or [None]
    return [
        float(found[name].samples(stage.seq_length)) if weight is None else weight
        for name, weight in zip(stage.sources, given, strict=True)
    ]


def shares(stage: Stage, found: Mapping[str, SourceData], *, packing: bool = False) -> list[Share]:
    """What a stage reads of each of its sources."""
    given = weights(stage, found)
    result = []
    for name, weight in zip(stage.sources, given, strict=True):
        fraction = weight / sum(given)
        samples = fraction * stage.num_samples
        result.append(Share(name, fraction, samples, found[name].epochs(samples, stage.seq_length, packing=packing)))
    return result
