"""From a published folder to a Megatron checkpoint of its weights, which any layout loads.

    done = import_folder(Path("hf"), Path("out"), compose().config.model)
    done.weights_digest                       # as `convert digest hf` says

Streaming: each thread holds one chunk of at most 64 MiB, never a tensor. The folder is complete or absent: it is made
beside its place, in files that are each complete or absent, and renamed at the end; a second call goes on where an
earlier one was interrupted. Values are copied bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apertus_nemo.convert.folder import Rows
from apertus_nemo.convert.headers import CONSTANTS, ELEMENT_BYTES, refuse_other_tensors
from apertus_nemo.convert.lanes import added, block_lanes, finite
from apertus_nemo.convert.torch_dist import PREFIX, Chunk, ChunkFile, Stored, write_index
from apertus_nemo.errors import ApertusError, Differs, InputError
from apertus_nemo.model.layout import Piece, pieces, published_shapes, stored_parameters
from apertus_nemo.recipe.hf_config import from_hf
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.canonical import dumps, from_hex_word, hex_word, sha256_hex
from apertus_nemo.record.checkpoints import MANIFEST, MANIFEST_VERSION
from apertus_nemo.record.files import file_sha256, sync_folder, tree_names, write_atomic, writing
from apertus_nemo.record.initial import EXPORTED, IMPORTED, precision_of, read_json, weight_files
from apertus_nemo.record.state import LANES, Lanes, TensorDigest, digest_of

WEIGHTS = "weights"  # folder of Megatron's files, as in a run's checkpoint
CHUNK_BYTES = 2**26  # of rows that a rank reads at once, and a thread holds here
FILE_BYTES = 2**29  # what is written again at most, where a conversion was interrupted
_THREADS = 4
_NOTE, _JOURNAL = ".from.json", ".done.json"
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {"F32": "float32", "BF16": "bfloat16"}

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    tensors: int  # published ones
    size_bytes: int  # of their values
    files: int
    weights_digest: str


@dataclass(frozen=True)
class _Part:
    """Whole rows of a parameter, which become one chunk."""

    key: str
    layer: int | None  # in the stack
    shape: tuple[int, ...]  # of the parameter
    blocks: tuple[Piece, ...]
    start: int  # rows of the parameter, seen as a matrix
    stop: int

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def chunk(self) -> Chunk:
        rows = self.stop - self.start
        offsets, sizes = ((self.start, 0), (rows, self.cols)) if len(self.shape) == 2 else ((0,), self.shape)
        if self.layer is None:
            return Chunk(PREFIX + self.key, offsets, sizes)
        return Chunk(PREFIX + self.key, (self.layer, *offsets), (1, *sizes))


def import_folder(
    source: Path,
    folder: Path,
    like: ModelConfig,
    *,
    allow_nonfinite: bool = False,
    progress: Progress = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
    file_bytes: int = FILE_BYTES,
) -> Imported:
    """Write `folder` from the published weights in `source`; what its config.json does not say is as in `like`.

    Raises InputError (no folder of an Apertus model, tensors missing, too much or of another shape or type, a value
    that is not finite, a folder that is there), Differs (other weights than the run logged that the folder is of),
    UnfitEnvironment (disk). Wrong input leaves nothing; a full disk leaves the files that are whole for the next call.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already: name a folder that is not")
    config = read_json(source / "config.json")
    model = from_hf(config, like, what=str(source / "config.json"))
    names = ["config.json", *weight_files(source, what=str(source))]
    shards = [name for name in names if name.endswith(".safetensors")]
    refuse_other_tensors(source, shards, published_shapes(model))
    before = _identity(source, names)
    partial = folder.with_name(f".{folder.name}.partial")
    with Rows(source, shards) as rows:
        kind = _check_types(source, rows, model, precision_of(config))
        files = _files(_parts(model, ELEMENT_BYTES[kind], chunk_bytes), ELEMENT_BYTES[kind], file_bytes)
        note = dumps({"files": before, "chunk_bytes": chunk_bytes, "file_bytes": file_bytes, "source": str(source)})
        journal = _begin(partial, note)
        job = _Job(rows, partial, journal, _TYPES[kind], allow_nonfinite, progress, _size(files, ELEMENT_BYTES[kind]))
        try:
            hashes = job.run(files, source, names)
            if _identity(source, names) != before:
                raise InputError(f"{source} was changed while it was read; run the command again")
            digest, nonfinite = _digest(model, kind, job)
            _finish(partial, folder, model, source, _TYPES[kind], hashes, digest, nonfinite)
        except (InputError, Differs):
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Imported(folder, len(published_shapes(model)), job.total, len(files), digest)


def _check_types(source: Path, rows: Rows, model: ModelConfig, precision: str) -> str:
    """The one type of all weights; constants of xIELU are the model's, in all layers or in none."""
    wrong = []
    kinds = sorted({rows.dtypes[name] for name in published_shapes(model)})
    if len(kinds) > 1:
        wrong.append(f"the weights are of several types: {', '.join(kinds)}")
    said = {"fp32": "F32", "bf16": "BF16"}.get(precision, precision)
    if kinds != [said] and len(kinds) == 1:
        wrong.append(f"config.json says that the weights are {precision}, and they are {kinds[0]}")
    wanted = {f"model.layers.{layer}.mlp.{name}": name for layer in range(model.num_layers) for name in CONSTANTS}
    held = {name for name in rows.dtypes if name.endswith(CONSTANTS)}
    wrong += [f"{name} is no tensor of this model" for name in sorted(held - set(wanted))]
    if held:
        wrong += [f"{name} is missing" for name in wanted if name not in held]
    for name in sorted(held & set(wanted)):
        value = model.xielu_beta if name.endswith("beta") else model.xielu_eps
        dtype, count = _TYPES.get(rows.dtypes[name]), sum(rows.shapes[name]) if rows.shapes[name] else 1
        if dtype is None or count != 1:
            wrong.append(f"{name} is no number of the types {' and '.join(_TYPES)}")
            continue
        found = torch.empty(1, dtype=dtype)
        rows.read(name, 0, 1, into=found)
        if float(found) != float(torch.tensor(value, dtype=dtype)):
            wrong.append(f"{name} is {float(found)!r}, and the model's is {value!r}")
    if wrong:
        raise InputError("\n".join(f"{source}: {line}" for line in wrong))
    return kinds[0]


def _parts(model: ModelConfig, element_bytes: int, chunk_bytes: int) -> Iterator[_Part]:
    """Every chunk of the checkpoint, in the order of the computation; each published element is in one."""
    covered = 0
    for key, parameter, layer in stored_parameters(model):
        blocks = pieces(parameter, model, tp_rank=0, tp_size=1)
        cols = blocks[0].shape[-1]
        count = max(block.local_rows[1] for block in blocks)
        shape = (count, cols) if len(blocks[0].shape) == 2 else (cols,)
        step = max(1, chunk_bytes // (cols * element_bytes))
        for start in range(0, count, step):
            yield _Part(key, layer, shape, blocks, start, min(start + step, count))
        covered += count * cols
    if covered != sum(_count(shape) for shape in published_shapes(model).values()):
        raise ApertusError(f"the checkpoint's parameters have {covered} elements, and the published tensors have not")


def _files(parts: Iterator[_Part], element_bytes: int, limit: int) -> dict[str, list[_Part]]:
    """File -> its chunks; names as Megatron's rank 0 would give them."""
    groups: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        here = (part.stop - part.start) * part.cols * element_bytes
        if groups[-1] and size + here > limit:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += here
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


class _Job:
    """The threads that copy: each a file at a time, and one that hashes the source."""

    def __init__(
        self,
        rows: Rows,
        partial: Path,
        journal: dict[str, Any],
        dtype: torch.dtype,
        allow_nonfinite: bool,
        progress: Progress,
        total: int,
    ) -> None:
        self._rows, self._partial, self._dtype = rows, partial, dtype
        self._allow, self._progress, self.total = allow_nonfinite, progress, total
        self.journal = journal
        self._lock = threading.Lock()
        self._written = 0
        self._stop = threading.Event()

    def run(self, files: dict[str, list[_Part]], source: Path, names: list[str]) -> dict[str, str]:
        """Write what the journal does not hold; the SHA-256 of every file of the source."""
        threads = max(1, min(_THREADS, len(os.sched_getaffinity(0))))
        with one_thread_each(), ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
            hashing = {name: pool.submit(file_sha256, source / name) for name in names}
            tasks: list[Future[Any]] = [pool.submit(self._file, name, parts) for name, parts in files.items()]
            tasks += hashing.values()
            try:
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                for task in tasks:
                    task.cancel()
            for task in tasks:  # the first that failed says why; those that were stopped say nothing
                if task.done() and not task.cancelled() and not isinstance(task.exception(), _Stopped | None):
                    task.result()
        return {name: found.result() for name, found in hashing.items()}

    def _file(self, name: str, parts: list[_Part]) -> None:
        path = self._partial / WEIGHTS / name
        known = self.journal.get(name)
        if known is not None and path.is_file() and file_sha256(path) == known["sha256"]:
            self._advance(sum((part.stop - part.start) * part.cols for part in parts))
            return
        lanes: dict[str, Lanes] = {}
        nonfinite: set[str] = set()
        with ChunkFile(path) as file:
            for part in parts:
                if self._stop.is_set():
                    raise _Stopped
                file.add(part.chunk, self._read(part, lanes, nonfinite).reshape(part.chunk.sizes))
                self._advance((part.stop - part.start) * part.cols)
        entry = {
            "chunks": [[c.chunk.key, [*c.chunk.offsets], [*c.chunk.sizes], c.offset, c.length] for c in file.chunks],
            "lanes": {tensor: [hex_word(lane) for lane in value] for tensor, value in lanes.items()},
            "nonfinite": sorted(nonfinite),
            "sha256": file.sha256,
            "size_bytes": file.size_bytes,
        }
        with self._lock:
            self.journal[name] = entry
            write_atomic(self._partial / _JOURNAL, dumps(self.journal))

    def _read(self, part: _Part, lanes: dict[str, Lanes], nonfinite: set[str]) -> torch.Tensor:
        """The rows of a parameter, out of the published tensors that make it up."""
        local = torch.empty(part.stop - part.start, part.cols, dtype=self._dtype)
        for block in part.blocks:
            first, last = max(part.start, block.local_rows[0]), min(part.stop, block.local_rows[1])
            if first >= last:
                continue
            row = block.rows[0] + first - block.local_rows[0]
            here = local[first - part.start : last - part.start]
            self._rows.read(block.name, row, row + last - first, into=here)
            if not finite(here):
                if not self._allow:
                    raise InputError(
                        f"{block.name} holds a value that is not finite; --allow-nonfinite converts it all the same"
                    )
                nonfinite.add(block.name)
            found = block_lanes(here, row0=row)
            lanes[block.name] = added(lanes[block.name], found) if block.name in lanes else found
        return local

    def _advance(self, elements: int) -> None:
        with self._lock:
            self._written += elements * self._dtype.itemsize
            self._progress(self._written, self.total)


class _Stopped(Exception):
    """Another thread has failed."""


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, torch computes in the thread that calls it: there are as many of these as processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(model: ModelConfig, kind: str, job: _Job) -> tuple[str, list[str]]:
    """The weights digest of what was written, and the tensors that hold values that are not finite."""
    lanes: dict[str, Lanes] = {}
    nonfinite: set[str] = set()
    for entry in job.journal.values():
        nonfinite.update(entry["nonfinite"])
        for name, words in entry["lanes"].items():
            first, second, third, fourth = (from_hex_word(word) for word in words)
            value = first, second, third, fourth
            lanes[name] = added(lanes[name], value) if name in lanes else value
    shapes = published_shapes(model)
    if lanes.keys() != shapes.keys():
        raise ApertusError(f"{sorted(lanes.keys() ^ shapes.keys())[0]} was not converted")
    tensors = [TensorDigest(name, "weight", _NAMES[kind], shape, lanes[name]) for name, shape in shapes.items()]
    assert all(len(tensor.lanes) == LANES for tensor in tensors)
    return digest_of(tensors), sorted(nonfinite)


def _begin(partial: Path, note: bytes) -> dict[str, Any]:
    """Make the folder, or find what an interrupted import of the same source left there: file -> what it holds."""
    with writing(partial):
        try:
            same = (partial / _NOTE).read_bytes() == note
        except OSError:
            same = False
        if not same:
            if partial.exists():
                shutil.rmtree(partial)
            (partial / WEIGHTS).mkdir(parents=True)
            write_atomic(partial / _NOTE, note)
        try:
            tree = json.loads((partial / _JOURNAL).read_bytes())
        except (OSError, ValueError):
            tree = {}
    return tree if isinstance(tree, dict) else {}


def _finish(
    partial: Path,
    folder: Path,
    model: ModelConfig,
    source: Path,
    dtype: torch.dtype,
    hashes: dict[str, str],
    digest: str,
    nonfinite: list[str],
) -> None:
    """Index, configuration, note and manifest; then the folder gets its name."""
    origin = _origin(source, digest)
    journal = json.loads((partial / _JOURNAL).read_bytes())  # as it is read, so that the index has the same bytes
    chunks = {
        name: [
            Stored(Chunk(key, tuple(offsets), tuple(sizes)), start, length)
            for key, offsets, sizes, start, length in journal[name]["chunks"]
        ]
        for name in sorted(journal)
    }
    known = {name: entry["sha256"] for name, entry in journal.items()}
    known |= write_index(partial / WEIGHTS, model, dtype, chunks)
    write_atomic(partial / "config.json", (source / "config.json").read_bytes())
    note = {
        "files": hashes,
        "format": 1,
        "kind": IMPORTED,
        "nonfinite": nonfinite,
        "source": origin,
        "weights_digest": digest,
    }
    write_atomic(partial / EXPORTED, (json.dumps(note, indent=2, sort_keys=True) + "\n").encode())
    with writing(partial):
        (partial / _JOURNAL).unlink()
        (partial / _NOTE).unlink()
    files = {}
    for name in tree_names(partial):
        path = partial / name
        written = known.get(name.removeprefix(f"{WEIGHTS}/")) or file_sha256(path)
        files[name] = {"sha256": written, "size_bytes": path.stat().st_size}
    write_atomic(partial / MANIFEST, dumps({"files": files, "step": 0, "version": MANIFEST_VERSION}))
    with writing(folder):
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)


def _origin(source: Path, digest: str) -> dict[str, Any] | None:
    """Of which step of which run the folder says that it is; Differs where it was exported with other weights."""
    if not (source / EXPORTED).is_file():
        return None
    origin = read_json(source / EXPORTED).get("source")
    if not isinstance(origin, dict):
        return None
    logged = origin.get("weights_digest")
    if isinstance(logged, str) and logged != digest:
        raise Differs(f"the weights in {source} have the digest {digest}, and {EXPORTED} says {logged[:64]}")
    return origin


def _identity(source: Path, names: list[str]) -> dict[str, Any]:
    """What tells whether files are still the same, without reading them."""
    found = {}
    for name in names:
        state = (source / name).stat()
        found[name] = [state.st_size, str(state.st_mtime_ns), sha256_hex(_head(source / name))]
    return found


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(2**20)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _size(files: dict[str, list[_Part]], element_bytes: int) -> int:
    return sum((part.stop - part.start) * part.cols * element_bytes for parts in files.values() for part in parts)
