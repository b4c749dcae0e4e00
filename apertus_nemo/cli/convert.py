"""`apertus-nemo convert export`, `convert import`, `convert merge` and `convert digest`; see docs/convert.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apertus_nemo.cli.arguments import explained
from apertus_nemo.cli.convert_adapters import add_merge
from apertus_nemo.errors import Differs, InputError

if TYPE_CHECKING:
    from apertus_nemo.recipe.schema import ModelConfig
    from apertus_nemo.record.lock import RunLock
    from apertus_nemo.record.run_dir import RunDirectory


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when done. Errors leave as `apertus_nemo.errors.ApertusError`, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    return {"export": _export, "import": _import, "merge": _merge, "digest": _digest}[options.verb](options)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo convert",
        **explained(
            "Bring checkpoints into the form that Hugging Face's libraries load and back, and tie them to their step.",
            examples={
                "apertus-nemo convert export runs/mine hf": "the newest checkpoint, for transformers",
                "apertus-nemo convert import hf megatron": "the way back, for Megatron",
                "apertus-nemo convert digest hf --run runs/mine": "the step that made these weights",
            },
            exit_codes={
                0: "done",
                1: "no step has these weights; merge: another base; digest: a tensor is missing, too much or misshapen",
                2: "wrong input: no run, no such checkpoint, no folder of an Apertus model, values that are not finite",
                3: "the disk is full or cannot be written",
            },
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{export,import,merge,digest}")
    export = verbs.add_parser(
        "export",
        help="a checkpoint of a run as a folder for transformers",
        **explained(
            "Write a checkpoint's weights, bit for bit, as a folder that ApertusForCausalLM loads; adapters, for peft.",
            examples={
                "apertus-nemo convert export runs/mine hf": "the newest checkpoint",
                "apertus-nemo convert export runs/mine hf --step 500 --tokenizer corpus/tokenizer": "",
                "apertus-nemo convert export megatron hf": "what `convert import` made",
            },
            exit_codes={
                0: "exported",
                2: "no run, no such checkpoint, one that is torn or of another model, or values that are not finite",
                3: "the disk is full or cannot be written",
            },
        ),
    )
    export.add_argument("run", type=Path, metavar="RUN", help="run directory, or a folder that import made")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    export.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer to put beside the weights")
    export.add_argument("--max-shard-bytes", type=int, default=4 * 10**9, metavar="N", help="default: 4000000000")
    export.add_argument(
        "--trust", action="store_true", help="do not hash the checkpoint first: it is read as it lies there"
    )
    back = verbs.add_parser(
        "import",
        help="a folder for transformers as a Megatron checkpoint",
        **explained(
            "Write the weights of a folder that transformers loads, bit for bit, as a checkpoint for Megatron.",
            examples={
                "apertus-nemo convert import hf megatron": "train initial.kind=megatron initial.path=megatron takes it",
            },
            exit_codes={
                0: "imported",
                1: "the folder says that it is of a step of a run, and its weights are not that step's",
                2: "no folder of an Apertus model, tensors that are not the model's, or values that are not finite",
                3: "the disk is full or cannot be written",
            },
        ),
    )
    back.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    back.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    merge = add_merge(verbs)
    digest = verbs.add_parser(
        "digest",
        help="the digest of a folder's weights, and whether a run logged it",
        **explained(
            "Digest the weights of a folder that transformers loads; with --run, find the step that logged them.",
            examples={
                "apertus-nemo convert digest hf": "",
                "apertus-nemo convert digest hf --run runs/mine --step 500": "it must be this one",
            },
            exit_codes={
                0: "digested; with --run: a step logged these weights",
                1: "a tensor is missing, too much or of another shape, or no step has these weights",
                2: "no folder of an Apertus model, or no run",
            },
        ),
    )
    digest.add_argument("folder", type=Path, metavar="DIR", help="folder for transformers, or one that import made")
    digest.add_argument("--run", type=Path, metavar="RUN", help="run directory to hold them against")
    digest.add_argument("--step", type=int, metavar="N", help="of the run (default: any that has the digest)")
    for verb in (export, back):
        verb.add_argument(
            "--allow-nonfinite", action="store_true", help="convert NaN and infinities too (default: refuse them)"
        )
    for verb in (export, back, merge, digest):
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _export(options: argparse.Namespace) -> int:
    if options.max_shard_bytes < 1:
        raise InputError(f"--max-shard-bytes {options.max_shard_bytes}: a file holds at least one byte")
    from apertus_nemo.record.initial import import_note

    note = import_note(options.run)
    if note is None and (adapters := _of_adapters(options)) is not None:
        return adapters
    found = _of_run(options) if note is None else _of_import(options, note)
    _quiet_imports()
    from apertus_nemo.convert.export import export

    done = export(
        found.checkpoint / "weights",
        found.model,
        options.folder,
        tokenizer=options.tokenizer,
        source=found.source,
        tokens=found.tokens,
        shard_bytes=options.max_shard_bytes,
        allow_nonfinite=options.allow_nonfinite,
        progress=_Bar("exporting").show,
    )
    weights = found.source["weights_digest"]
    if options.json:
        result = {**found.source, "files": done.shards, "size_bytes": done.size_bytes, "tensors": done.tensors}
        print(json.dumps(result, indent=2, sort_keys=True))
    else:
        what = f"step {found.source['step']}" if note is None else str(options.run)
        print(f"exported {what} into {done.folder}: {done.tensors} tensors, {done.size_bytes:,} bytes")
        print(f"  weights digest {weights or 'unknown: the state of this step was not digested'}")
    return 0


@dataclass(frozen=True)
class _Checkpoint:
    """What is exported, and what the folder says of it."""

    checkpoint: Path
    model: ModelConfig
    source: dict[str, Any]
    tokens: dict[str, int | None] | None = None  # ids of bos, eos and pad, where they are known


def _checkpoint(options: argparse.Namespace) -> tuple[RunDirectory, RunLock, Path, int]:
    """The run, its lock, and the checkpoint that is meant, which was hashed unless --trust."""
    from apertus_nemo.record.checkpoints import check_checkpoint, checkpoint_step

    directory, lock = _record(options.run)
    steps = sorted(int(path.name[5:]) for path in directory.checkpoints.glob("step-*") if path.name[5:].isdigit())
    if not steps:
        raise InputError(f"{options.run} holds no checkpoint")
    step = steps[-1] if options.step is None else options.step
    if step not in steps:
        raise InputError(f"{options.run} holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    checkpoint = directory.checkpoint(step)
    if options.trust:
        checkpoint_step(checkpoint)
    else:
        check_checkpoint(checkpoint, lock_digest=lock.digest)
    return directory, lock, checkpoint, step


def _of_adapters(options: argparse.Namespace) -> int | None:
    """Export the adapters of a run that has them; None for any other."""
    from apertus_nemo.recipe.typed import from_tree

    run = from_tree(_record(options.run)[1].tree["config"])
    if run.adapter.kind == "none":
        return None
    from apertus_nemo.cli.convert_adapters import export

    directory, lock, checkpoint, _ = _checkpoint(options)
    return export(options, checkpoint, run, directory, lock, quiet=_quiet_imports)


def _merge(options: argparse.Namespace) -> int:
    if options.max_shard_bytes < 1:
        raise InputError(f"--max-shard-bytes {options.max_shard_bytes}: a file holds at least one byte")
    from apertus_nemo.cli.convert_adapters import merge

    return merge(options, quiet=_quiet_imports, progress=_Bar("merging").show)


def _of_run(options: argparse.Namespace) -> _Checkpoint:
    from apertus_nemo.recipe.typed import from_tree
    from apertus_nemo.record.checkpoints import MANIFEST
    from apertus_nemo.record.files import file_sha256
    from apertus_nemo.record.state import StateDigest

    directory, lock, checkpoint, step = _checkpoint(options)
    state = directory.state(step)
    weights = None
    if state.is_file():
        weights = StateDigest.from_bytes(state.read_bytes(), what=str(state)).digest_of_kind("weight")
    source = {
        "checkpoint_manifest_sha256": file_sha256(checkpoint / MANIFEST),
        "lock_digest": lock.digest,
        "step": step,
        "weights_digest": weights,
    }
    return _Checkpoint(checkpoint, from_tree(lock.tree["config"]).model, source)


def _of_import(options: argparse.Namespace, note: dict[str, Any]) -> _Checkpoint:
    """A folder that import made: its source is that of the folder it was made of, where that was known."""
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.recipe.hf_config import from_hf
    from apertus_nemo.record.checkpoints import check_checkpoint, checkpoint_step
    from apertus_nemo.record.initial import read_json

    if options.step is not None:
        raise InputError(f"--step {options.step}: {options.run} was imported, and holds the weights of no step")
    if options.trust:
        checkpoint_step(options.run)
    else:
        check_checkpoint(options.run, lock_digest="")
    config = read_json(options.run / "config.json")
    model = from_hf(config, compose().config.model, what=str(options.run / "config.json"))
    ids = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tokens = {name: value if type(value) is int else None for name, value in ids.items()}
    source = {**(note.get("source") or {}), "weights_digest": note["weights_digest"]}
    return _Checkpoint(options.run, model, source, tokens)


def _import(options: argparse.Namespace) -> int:
    from apertus_nemo.recipe.compose import compose

    like = compose().config.model
    _quiet_imports()
    from apertus_nemo.convert.importing import import_folder

    done = import_folder(
        options.source,
        options.folder,
        like,
        allow_nonfinite=options.allow_nonfinite,
        progress=_Bar("importing").show,
    )
    if options.json:
        result = {"files": done.files, "size_bytes": done.size_bytes, "tensors": done.tensors}
        print(json.dumps({**result, "weights_digest": done.weights_digest}, indent=2, sort_keys=True))
    else:
        print(f"imported {options.source} into {done.folder}: {done.tensors} tensors, {done.size_bytes:,} bytes")
        print(f"  weights digest {done.weights_digest}")
    return 0


def _digest(options: argparse.Namespace) -> int:
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.recipe.hf_config import from_hf
    from apertus_nemo.record.initial import import_note, read_json
    from apertus_nemo.record.state import digest_of

    config = options.folder / "config.json"
    model = from_hf(read_json(config), compose().config.model, what=str(config))
    imported = import_note(options.folder) is not None
    _quiet_imports()
    from apertus_nemo.convert.digest import checkpoint_digests, folder_digests

    digest = digest_of((checkpoint_digests if imported else folder_digests)(options.folder, model))
    step = None if options.run is None else _logged(options, digest)
    if options.json:
        print(json.dumps({"step": step, "weights_digest": digest}, indent=2, sort_keys=True))
    else:
        print(f"weights digest {digest}")
        if step is not None:
            print(f"  logged by {options.run} at step {step}")
    return 0


def _logged(options: argparse.Namespace, digest: str) -> int:
    """The step whose state has these weights; Differs where there is none."""
    from apertus_nemo.record.state import StateDigest

    directory, _ = _record(options.run)
    steps = directory.state_steps() if options.step is None else [options.step]
    for step in reversed(steps):
        path = directory.state(step)
        if not path.is_file():
            raise InputError(f"{options.run} digested no state of step {step}")
        if StateDigest.from_bytes(path.read_bytes(), what=str(path)).digest_of_kind("weight") == digest:
            return step
    of = f"step {options.step}" if options.step is not None else f"any of the steps {', '.join(map(str, steps))}"
    raise Differs(
        f"the weights in {options.folder} have the digest {digest}, which is not that of {of} of {options.run}"
    )


def _record(run: Path) -> tuple[RunDirectory, RunLock]:
    from apertus_nemo.record.lock import RunLock
    from apertus_nemo.record.run_dir import RunDirectory

    directory = RunDirectory.open(run)
    return directory, RunLock.from_bytes(directory.lock.read_bytes(), what=str(directory.lock))


def _quiet_imports() -> None:
    import logging
    import warnings

    from apertus_nemo.training import imports

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's matrix products are in threads of ours
    imports.install()
    warnings.filterwarnings("ignore")  # what imported packages say to their own developers
    logging.getLogger("megatron").setLevel(logging.ERROR)


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._bar = what, None  # type: str, Any

    def show(self, done: int, total: int) -> None:
        """Move to `done` of `total` bytes."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self._what, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
