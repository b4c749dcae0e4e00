"""Write `edf/` anew: `python -m tests.unit.edf.update`. Look at the difference before you commit it."""

from __future__ import annotations

from pathlib import Path

from apertus_nemo.edf.render import carried

FOLDER = Path(__file__).resolve().parents[3] / "edf"

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for file in carried():
        (FOLDER / file.name).write_text(file.text)
