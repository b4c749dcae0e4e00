"""Run the benchmarks, one process each, and print one table; see scripts/bench.

python benchmarks/run.py [--quick] [--list] [--json FILE] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from figures import Figure, table

HERE = Path(__file__).resolve().parent

# name -> arguments of `--quick`, short ones first
BENCHMARKS: dict[str, list[str]] = {
    "startup": ["--runs", "5"],
    "runs": ["--rounds", "2", "--runs", "50", "--steps", "2000"],
    "lock": ["--runs", "3"],
    "plan": ["--pairs", "1"],
    "verify": ["--rounds", "2", "--files", "300", "--steps", "20000"],
    "report": ["--rounds", "2", "--steps", "20000"],
    "aliasing": ["--pairs", "10"],
    "throughput": ["--steps", "12"],
    "twins": ["--recipes", "tiny_sft"],
    "determinism": ["--pairs", "1", "--steps", "20"],
    "first_step": ["--pairs", "1"],
    "record_cost": ["--pairs", "10"],
    "kills": ["--kills", "6"],
    "convert": ["--rounds", "1", "--layers", "2"],
    "squashfs": ["--rounds", "1", "--mib", "50", "--files", "1000"],
    "layouts": ["--layouts", "cp2", "pp2_vpp2"],
    "image_builds": ["--builds", "2"],
}


def main() -> int:
    """Exit code: 0 all goals met, 1 one is missed, 3 a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, small sizes")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    if options.list:
        print("\n".join(BENCHMARKS))
        return 0
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    figures, failed = [], []
    for name in options.names or BENCHMARKS:
        found = one(name, BENCHMARKS[name] if options.quick else [])
        failed += [name] if found is None else []
        figures += found or []
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {processor()}, load {os.getloadavg()[0]:.1f} at the end")
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps([vars(figure) for figure in figures], indent=2) + "\n", encoding="utf-8")
    for name in failed:
        print(f"failed: benchmarks/{name}.py; its own words are above", file=sys.stderr)
    return 3 if failed else int(not all(figure.met for figure in figures))


def one(name: str, arguments: list[str]) -> list[Figure] | None:
    """The figures of a benchmark; None where it failed."""
    begin = time.perf_counter()
    print(f"{name} ...", end="", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f" {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    try:
        return [Figure(**figure) for figure in json.loads(done.stdout)]
    except ValueError:
        sys.stderr.write(done.stderr)
        return None


def processor() -> str:
    """The processor's name, where the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "an unknown processor"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unnamed")


if __name__ == "__main__":
    sys.exit(main())
