"""Whether a process holds a run directory: by the kernel's lock on the folder, not by a guess.

    is_claimed(Path("runs/a"))        # True: a launcher or one of its ranks is there; None: it cannot be known

Who takes the lock: launch/resume.py. Looking takes a shared lock for an instant; a launcher that starts in that
instant waits for it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from apertus_nemo.record.files import reading


def is_claimed(folder: Path) -> bool | None:
    """A process of this or, where the file system tells, another machine trains in the folder.

    None on a file system without locks. Raises InputError where the folder cannot be opened.
    """
    with reading(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
