"""Kill runs (SIGKILL) at drawn moments, let them go on, and hold each end against the run that nobody touched.

    python benchmarks/kills.py [--kills 200] [--seed 0] [--layouts one tp2 dp2]

Small runs of the default recipe in ranks that are forked from one process which has imported NeMo. Each run is killed
twice, in every class of moments in turn (tests/cases/crash.py says what the moments are), one rank or all of them, and
then goes on to its end. Equal means: every logged value of every step to the bit, every tensor of every state, and
`verify` finds nothing, after each kill and at the end. Prints a line a failure and the counts by class and layout.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.data.corpus import embedded  # noqa: E402
from apertus_nemo.testing.ranks import Parent  # noqa: E402
from tests.crash.kills import CLASS_OF, CLASSES, Survivor, draw, same  # noqa: E402
from tests.integration.runs import Runs  # noqa: E402


def main() -> int:
    """Print the table; 1 where a run did not end as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="kills in all, two a run (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--layouts", nargs="+", default=["one", "tp2", "dp2"], help="(default: one tp2 dp2)")
    parser.add_argument("--cache", type=Path, help="folder of the corpus, to be kept (default: made anew)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    layouts = options.layouts
    per_layout = [-(-(options.kills - 2 * index) // (2 * len(layouts))) for index in range(len(layouts))]
    done, good, whom = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[str]()
    failures: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, Parent(paths=[str(ROOT)]) as parent:
        folder = Path(name)
        corpus = embedded((options.cache or folder) / "corpus", 4096)
        runs = Runs(parent, corpus, folder / "undisturbed")
        for layout, count in zip(layouts, per_layout, strict=True):
            undisturbed = runs(layout)
            for number, kills in enumerate(draw(layout, count, f"benchmark {options.seed}")):
                place = folder / "run"
                failure = ""
                try:
                    directory = Survivor(parent, corpus, place, layout).survive(kills)
                    same(directory, undisturbed.directory, undisturbed.steps)
                except Exception as error:
                    failure = f"{layout} run {number}, {kills}: {type(error).__name__}: {error}"
                    failures.append(failure)
                    print(failure, file=sys.stderr, flush=True)
                for kill in kills:
                    done[layout, CLASS_OF[kill.moment]] += 1
                    good[layout, CLASS_OF[kill.moment]] += not failure
                    whom[
                        "all ranks" if kill.all_ranks else "one rank of several" if layout != "one" else "the one"
                    ] += 1
                shutil.rmtree(place, ignore_errors=True)
                so_far = f"{sum(done.values())} kills, {len(failures)} runs that failed"
                print(f"{so_far}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    told = sys.stderr if options.json else sys.stdout
    print(f"{'kills survived':20}" + "".join(f"{layout:>12}" for layout in layouts) + f"{'all':>12}", file=told)
    for title in [*CLASSES, "all"]:
        cells = [
            f"{sum(good[a, c] for a in ls for c in cs)} of {sum(done[a, c] for a in ls for c in cs)}"
            for ls in [*([layout] for layout in layouts), layouts]
            for cs in [list(CLASSES) if title == "all" else [title]]
        ]
        print(f"{title:20}" + "".join(f"{cell:>12}" for cell in cells), file=told)
    print("killed: " + ", ".join(f"{count} times {name}" for name, count in sorted(whom.items())), file=told)
    kills = sum(done.values())
    survived = 100.0 * sum(good.values()) / kills
    what = f"of {kills} kills (SIGKILL), those after which a run ended as the undisturbed one"
    return finish([Figure.of(what, [survived], unit="%", at_least=100.0)], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
