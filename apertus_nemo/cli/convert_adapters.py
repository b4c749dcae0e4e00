"""`apertus-nemo convert merge`, and what `convert export` does with a run of adapters; see docs/convert.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apertus_nemo.cli.arguments import explained

if TYPE_CHECKING:
    from apertus_nemo.recipe.schema import RunConfig
    from apertus_nemo.record.lock import RunLock
    from apertus_nemo.record.run_dir import RunDirectory


def add_merge(verbs: Any) -> argparse.ArgumentParser:
    """The options of `convert merge`."""
    merge: argparse.ArgumentParser = verbs.add_parser(
        "merge",
        help="adapters and the folder they stand beside as one folder for transformers",
        **explained(
            "Put adapters into the weights that they were trained beside, as a folder that ApertusForCausalLM loads.",
            examples={
                "apertus-nemo convert merge hf adapter merged": "hf: the base; adapter: from export, or from peft"
            },
            exit_codes={
                0: "merged",
                1: "the base is not the one beside which the adapters were trained",
                2: "no folder of an Apertus model, no folder of adapters, or tensors that do not fit",
                3: "the disk is full or cannot be written",
            },
        ),
    )
    merge.add_argument("base", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder with adapter_config.json")
    merge.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    merge.add_argument("--max-shard-bytes", type=int, default=4 * 10**9, metavar="N", help="default: 4000000000")
    return merge


def merge(options: argparse.Namespace, *, quiet: Callable[[], None], progress: Callable[[int, int], None]) -> int:
    """Run `convert merge`; `quiet` before anything heavy is imported."""
    from apertus_nemo.recipe.compose import compose

    like = compose().config.model
    quiet()
    from apertus_nemo.convert.merge import merge as merged

    done = merged(
        options.base,
        options.adapter,
        options.folder,
        like=like,
        shard_bytes=options.max_shard_bytes,
        progress=progress,
    )
    written = done.exported
    if options.json:
        result = {"base_known_by": done.base, "files": written.shards, "size_bytes": written.size_bytes}
        result |= {"tensors": written.tensors, "weights_digest": done.weights_digest}
        print(json.dumps(result, indent=2, sort_keys=True))
    else:
        print(
            f"merged {options.adapter} with {options.base} into {written.folder}: {written.tensors} tensors, "
            f"{written.size_bytes:,} bytes"
        )
        print(
            f"  base {f'the right one, by {done.base}' if done.base else 'not checked: the adapters do not say which'}"
        )
        print(f"  weights digest {done.weights_digest}")
    return 0


def export(
    options: argparse.Namespace,
    checkpoint: Path,
    run: RunConfig,
    directory: RunDirectory,
    lock: RunLock,
    *,
    quiet: Callable[[], None],
) -> int:
    """Write the adapters of a whole checkpoint as a folder for `peft`."""
    from apertus_nemo.record.checkpoints import MANIFEST, checkpoint_step
    from apertus_nemo.record.files import file_sha256

    step = checkpoint_step(checkpoint)
    state, first = _state(directory, step), _state(directory, 0)
    digest = None if state is None else state.adapter_digest
    initial = lock.tree["initial_state"]
    known = {initial.get("weights_digest"), None if first is None else first.digest_of_kind("weight")}
    source = {
        "adapter_digest": digest,
        "checkpoint_manifest_sha256": file_sha256(checkpoint / MANIFEST),
        "lock_digest": lock.digest,
        "step": step,
    }
    base = {
        "files": initial.get("files") if initial.get("kind") == "hugging_face" else None,
        "weights_digests": sorted(each for each in known if isinstance(each, str)),
    }
    quiet()
    from apertus_nemo.convert.peft_form import export_adapters

    note = {"base": base, "format": 1, "kind": "apertus-nemo adapters", "source": source}
    count = export_adapters(checkpoint / "weights", run, options.folder, note=note)
    if options.json:
        print(json.dumps({**source, "tensors": count}, indent=2, sort_keys=True))
    else:
        print(f"exported the adapters of step {step} into {options.folder}: {count} matrices, for peft")
        print(f"  adapter digest {digest or 'unknown: the state of this step was not digested'}")
    return 0


def _state(directory: RunDirectory, step: int) -> Any:
    from apertus_nemo.record.state import StateDigest

    path = directory.state(step)
    return StateDigest.from_bytes(path.read_bytes(), what=str(path)) if path.is_file() else None
