"""Whether an image is built to the same bytes under other circumstances, and what a change of our own code costs.

    python benchmarks/image_builds.py [--builds 10] [--family cpu] [--packages DIR]

Builds the image of a family from the committed tree, so many times: the first into an empty cache of layers, the others
without one, each with another umask, time zone, language, user name, home, folder, path of the checkout and number of
processors, at a later time, in a new storage of the builder. After the first our package is changed and built on the
layers of the first. Prints how many manifest digests came out (goal: 1), the times, and the change over the first (at
most 0.1). Packages come from --packages (default: the cache of `image build --download-only`), and nothing from a
network. Takes minutes a build; needs root, buildah and mmdebstrap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.image.checkout import cache_folder  # noqa: E402

DIGESTS_GOAL, REBUILD_GOAL = 1, 0.1
RUN = "import sys; from apertus_nemo.cli.main import main; sys.exit(main(sys.argv[1:]))"
# (umask, processors, environment)
CIRCUMSTANCES: list[tuple[str, str | None, dict[str, str]]] = [
    ("0077", "0", {"TZ": "Asia/Tokyo", "LC_ALL": "C", "USER": "somebody"}),
    ("0002", None, {"TZ": "America/St_Johns", "LANG": "de_DE.UTF-8", "LC_ALL": "C.UTF-8", "LOGNAME": "other"}),
    ("0027", "1", {"TZ": "UTC", "LC_ALL": "POSIX", "HOSTNAME": "elsewhere", "PYTHONHASHSEED": "7"}),
    ("0022", "0", {"TZ": "Pacific/Kiritimati", "LANG": "tr_TR.UTF-8", "SOURCE_DATE_EPOCH": "1", "USER": "x"}),
]


def checkout(target: Path) -> Path:
    """A clone of what is committed."""
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, target], check=True, timeout=300)
    return target


def build(
    family: str, root: Path, output: Path, cache: Path, number: int, *options: str
) -> tuple[dict[str, Any], float]:
    """(what `image build --json` prints, seconds), under the circumstances of this number."""
    umask, processors, more = CIRCUMSTANCES[(number - 1) % len(CIRCUMSTANCES)] if number else ("0022", None, {})
    pinned = ["taskset", "-c", processors] if processors is not None else []
    command = [*pinned, "sh", "-c", f'umask {umask}; exec "$@"', "sh", sys.executable, "-c", RUN]
    command += ["image", "build", family, "--json", "--output", str(output), "--cache", str(cache), *options]
    environment = {**os.environ, "HOME": str(output.parent), "PYTHONPATH": str(root), **more}
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=output.parent, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"build {number} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    changed = " of a change" if "--allow-dirty" in options else ""
    print(f"build {number}{changed}: {digest(found)} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return found, seconds


def digest(found: dict[str, Any]) -> str:
    """The manifest digest of the one platform."""
    (made,) = found["platforms"].values()
    return str(made["manifest_digest"])


def main() -> int:
    """Print the table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--builds", type=int, default=10, help="how many whole builds (default: 10)")
    parser.add_argument("--family", default="cpu", help="which image (default: cpu)")
    parser.add_argument("--packages", type=Path, default=cache_folder(os.environ), help="the cache with the packages")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("buildah") is None or shutil.which("mmdebstrap") is None:
        print("images are built by root, with buildah and mmdebstrap", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory(dir=options.packages, prefix=".benchmark-") as name:
        folder = Path(name)
        cache = folder / "cache"
        cache.mkdir()
        for part in ("debian", "python"):
            (cache / part).symlink_to(options.packages / part)
        first_root = checkout(folder / "checkout")
        found, first_s = build(options.family, first_root, folder / "first", cache, 0)
        digests, times = [digest(found)], [first_s]
        changed = checkout(folder / "changed")
        with open(changed / "apertus_nemo" / "__init__.py", "a", encoding="utf-8") as stream:
            stream.write("# changed\n")
        rebuilt, rebuild_s = build(options.family, changed, folder / "rebuilt", cache, 0, "--allow-dirty")
        (made,) = rebuilt["platforms"].values()
        new_bytes = sum(part["size_bytes"] for part in made["layers"] if not part["kept"])
        shutil.rmtree(cache / "layers")
        for number in range(1, options.builds):
            place = folder / f"a/longer path of build {number}"
            place.mkdir(parents=True)
            root = checkout(place / "apertus") if number % 2 else first_root
            found, seconds = build(options.family, root, place / "image", cache, number, "--no-cache")
            digests.append(digest(found))
            times.append(seconds)
            shutil.rmtree(place)
    figures = [
        Figure.of(f"different manifest digests of {len(digests)} builds", [len(set(digests))], unit="digests",
                  at_most=DIGESTS_GOAL),
        Figure.of("a whole build, packages fetched before", times, unit="s"),
        Figure.of("the same after a change of our own code", [rebuild_s], unit="s"),
        Figure.of("the change over the first build", [rebuild_s / first_s], unit="x", at_most=REBUILD_GOAL),
        Figure.of("what a change of our own code makes others fetch", [new_bytes / 1e6], unit="MB"),
    ]  # fmt: skip
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
