"""How far every layout is from one process, after one step and after several: loss and gradient norm, relative.

    python benchmarks/layouts.py [--layouts cp2 tp2_cp2]    # the table of deviations
    python benchmarks/layouts.py --wrong                    # what upstream's settings give, that we replace or refuse

The runs are those of tests/integration: 12 steps of a small Apertus, in which the learning rate warms up, the batch
doubles and the decay begins, in ranks forked from one process that has imported NeMo. Coins are runs of one process
whose initial weights were all moved to a neighbouring float, which is what rounding alone may do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.data.corpus import embedded  # noqa: E402
from apertus_nemo.testing.ranks import Parent, RankFailed  # noqa: E402
from tests.integration.runs import LAYOUTS, SINGLE, STEPS, Run, Runs  # noqa: E402

AT = (1, 5, STEPS)  # before the batch doubles, and at the end of the decay
LARGEST = 1e-6  # goal for the first step, as in tests/integration/test_layouts.py
# Eight micro-batches of one sample of 256 tokens: more of them under way than there are stages.
LONG = (
    *("data.seq_length=256", "trainer.micro_batch_size=1", "trainer.global_batch_size=8", "schedule.batch_ramp=[]"),
    *("schedule.train_samples=96", "trainer.max_steps=3"),
)
OURS = {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
WRONG: tuple[tuple[str, str, dict[str, Any]], ...] = (  # title, layout, options of tests.cases.wrong
    ("batched", "pp2_vpp2", {"settings": {**OURS, "overlap_p2p_comm": False, "batch_p2p_comm": True}}),
    ("overlapped, deallocated", "pp2_vpp2", {"settings": {**OURS, "deallocate_pipeline_outputs": True}}),
    ("the same again", "pp2_vpp2", {"settings": {**OURS, "deallocate_pipeline_outputs": True}}),
    ("ours", "pp2_vpp2", {"settings": OURS}),
    ("batched", "pp4_vpp2", {"settings": {**OURS, "overlap_p2p_comm": False, "batch_p2p_comm": True}}),
    ("overlapped, deallocated", "pp4_vpp2", {"settings": {**OURS, "deallocate_pipeline_outputs": True}}),
    ("the same again", "pp4_vpp2", {"settings": {**OURS, "deallocate_pipeline_outputs": True}}),
    ("ours", "pp4_vpp2", {"settings": OURS}),
    ("mean by rank", "cp2", {"settings": {}, "mean_by_rank": True}),
    ("ours", "cp2", {"settings": {}}),
)


def deviation(run: Run, one: Run, value: str, last: int) -> float:
    """The largest relative deviation at steps 1 to `last`."""
    pairs = ((getattr(run.steps[step], value), getattr(one.steps[step], value)) for step in range(1, last + 1))
    return max(abs(mine / its - 1) for mine, its in pairs)


def row(title: str, run: Run, one: Run) -> list[str]:
    """Deviations of loss and gradient norm up to each step of AT, and whether the last state has the same bits."""
    cells = [
        f"{deviation(run, one, value, last):.1e}".replace("0.0e+00", "0")
        for value in ("loss", "grad_norm")
        for last in AT
    ]
    same = run.steps[STEPS].state_digest == one.steps[STEPS].state_digest
    return [title, *cells, "same" if same else "other"]


def deviations(runs: Runs, names: list[str], *, coins: int, as_json: bool) -> int:
    """The table, or with JSON one figure a layout: the larger deviation of the first step."""
    rows, figures = [], []
    for name in names:
        run, one = runs(name), runs(SINGLE.get(name, "one"))
        rows.append(row(name, run, one))
        first = max(deviation(run, one, value, 1) for value in ("loss", "grad_norm"))
        what = f"{name} from one process at step 1"
        figures.append(Figure.of(what, [first * 1e9], unit="e-9", at_most=LARGEST * 1e9))
    if as_json:
        return finish(figures, as_json=True)
    rows += [row(f"coin {coin}", runs("one", perturb=coin), runs("one")) for coin in range(1, coins + 1)]
    headings = [f"{value} by step {last}" for value in ("loss", "norm") for last in AT]
    print("| layout | " + " | ".join(headings) + " | last state |\n|" + "---|" * (len(headings) + 2))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    return 0 if all(figure.met for figure in figures) else 1


def wrong(parent: Parent, corpus: Path, folder: Path) -> int:
    """Loss and gradient norm of three steps with what upstream would do, beside one process."""
    runs = Runs(parent, corpus, folder)
    for name in dict.fromkeys(layout for _, layout, _ in WRONG):
        more = () if name == "cp2" else LONG
        print_steps(SINGLE.get(name, "one"), runs(SINGLE.get(name, "one"), *more))
        as_upstream = Runs(parent, corpus, folder / name, function="tests.cases.wrong:as_upstream")
        for again, (title, layout, options) in enumerate(WRONG):
            if layout == name:
                try:
                    print_steps(f"{name}, {title}", as_upstream(name, *more, again=again, **options))
                except RankFailed as failed:  # the recorder ends a run whose loss is no number
                    said = [line for line in str(failed).splitlines() if "loss is" in line]
                    print(f"{name}, {title}: {said[-1] if said else failed}", flush=True)
    return 0


def print_steps(title: str, run: Run) -> None:
    """One line, six digits."""
    steps = (run.steps[step] for step in (1, 2, 3))
    print(f"{title:36}" + "   ".join(f"{step.loss:.6f} {step.grad_norm:.5f}" for step in steps), flush=True)


def main() -> int:
    """Print; 1 where a layout's first step is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in LAYOUTS if not name.startswith("one")]
    parser.add_argument("--layouts", nargs="+", default=others, choices=others, metavar="NAME")
    parser.add_argument("--coins", type=int, default=2, help="coins to toss (default: 2)")
    parser.add_argument("--wrong", action="store_true", help="upstream's settings instead")
    parser.add_argument("--cache", type=Path, help="folder of the corpus, to be kept (default: made anew)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Parent(paths=[str(ROOT)]) as parent:
        folder = Path(name)
        corpus = embedded((options.cache or folder) / "corpus", 4096)
        if options.wrong:
            return wrong(parent, corpus, folder / "runs")
        runs = Runs(parent, corpus, folder / "runs")
        return deviations(runs, options.layouts, coins=options.coins, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
