"""Running the source that a record kept, where it is not the one that runs.

Code from a record is somebody's code: it runs only where the caller has said that it may.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.files import writing
from apertus_nemo.record.source import unpack


def unpacked(archive: bytes, cache: Path, *, what: str) -> Path:
    """A folder below `cache` that holds an archive's files and nothing else, whoever was there before."""
    folder = cache / "source" / sha256_hex(archive)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder.parent))
            try:
                unpack(archive, partial, what=what)
                os.rename(partial, folder)
            except FileExistsError:  # another process was first
                pass
            except OSError:
                if not folder.exists():
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    unpack(archive, folder, what=what)
    return folder


def run_recorded(folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `apertus-nemo ARGUMENTS` with the package in `folder`; its exit code. It ends when this process does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    command = [sys.executable, "-P", "-m", "apertus_nemo.cli.main", *arguments]
    process = subprocess.Popen(command, env={**environment, "PYTHONPATH": str(folder)})
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
