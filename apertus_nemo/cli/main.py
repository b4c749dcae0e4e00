"""The command `apertus-nemo`: finds the verb, runs it, and turns errors into exit codes.

A verb is a module of this package with `main(arguments) -> int` and `parser() -> ArgumentParser`, imported only when
it is called: the help must be there at once. Exit codes: 0 done, 1 the verdict is "different", 2 the user's input is
wrong, 3 the environment cannot do it, 4 our own fault, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# what people do -> verb -> (module, one line of help)
GROUPS = {
    "train, and look": {
        "train": ("apertus_nemo.cli.train", "train a recipe on this machine; go on after a stop or a kill"),
        "runs": ("apertus_nemo.cli.runs", "list runs: how each does, and what went wrong last"),
        "logs": ("apertus_nemo.cli.logs", "print what the ranks of a run wrote"),
        "report": ("apertus_nemo.cli.report", "show a run, or several side by side, in one HTML file"),
    },
    "prove": {
        "relaunch": ("apertus_nemo.cli.relaunch", "do a run again from its record alone, and prove it"),
        "compare": ("apertus_nemo.cli.compare", "say whether two runs are identical, or what differs first"),
        "verify": ("apertus_nemo.cli.verify", "check that the record of a run is as it was written"),
        "lineage": ("apertus_nemo.cli.lineage", "walk back from a model to the run that drew its weights"),
        "record": ("apertus_nemo.cli.record", "copy the record of a run to another place, and back"),
    },
    "plan a run": {
        "show": ("apertus_nemo.cli.show", "print a recipe, resolved, and where each value came from"),
        "plan": ("apertus_nemo.cli.plan", "say what a run will need and do, before the queue"),
    },
    "data and weights": {
        "data": ("apertus_nemo.cli.data", "build training data from text, and verify it"),
        "convert": ("apertus_nemo.cli.convert", "bring a checkpoint into the form that transformers loads"),
    },
    "images, and the files that start them": {
        "selftest": ("apertus_nemo.cli.selftest", "say whether what is installed is as locked, and works"),
        "image": ("apertus_nemo.cli.image", "container images: pinned, checked, and as files that clusters start"),
        "edf": ("apertus_nemo.cli.edf", "check, show and write the files by which clusters start containers"),
    },
    "this command": {
        "completion": ("apertus_nemo.cli.completion", "print what completes these commands in a shell"),
    },
}
VERBS = {verb: place for group in GROUPS.values() for verb, place in group.items()}

INTERRUPTED = 130
BROKEN_PIPE = 141
OUR_FAULT = 4
_LONG_LINE = 2000  # characters


def usage() -> str:
    """The help of the command itself."""
    width = max(map(len, VERBS))
    verbs = "\n\n".join(
        "\n".join([f"{what}:", *(f"  {verb:{width}}  {text}" for verb, (_, text) in group.items())])
        for what, group in GROUPS.items()
    )
    return f"""usage: apertus-nemo VERB [ARGUMENT ...]

Trains Apertus language models so that any run can be done again bit for bit, and proves that it was.

begin with:
  apertus-nemo train                          a small model, on this machine's CPU, in a minute or two
  apertus-nemo relaunch runs/tiny_pretrain-1  the same again from its record alone, and the proof

{verbs}

options:
  --help     print this; `apertus-nemo VERB --help` explains a verb, with examples
  --version  print the version

exit codes:
  0  done
  1  the verdict is "different" or "changed"
  2  the input is wrong: one line says what, where, and what to do
  3  this machine, or a place it wants, cannot do it
  4  our own fault
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        from apertus_nemo.cli.completion import answer

        answer(os.environ.get("COMP_LINE", ""))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may not be text
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away (`| head`); what Python still wants to flush has no one to go to.
        _drop_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except Exception as error:
        return _report(_of_output(error))


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_output(error: Exception) -> Exception:
    """The error, or one line where it is only that what is printed goes to a full disk."""
    from errno import EDQUOT, ENOSPC

    if not isinstance(error, OSError) or error.errno not in (ENOSPC, EDQUOT) or error.filename is not None:
        return error
    from apertus_nemo.errors import UnfitEnvironment

    _drop_output()
    return UnfitEnvironment("could not write the output: the disk is full; free some space, then run the command again")


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(usage())
        return 2
    verb, *rest = arguments
    if verb == "help" and rest:
        verb, *rest = [*rest, "--help"]
    if verb in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return 0
    if verb == "--version":
        from apertus_nemo import __version__

        print(f"apertus-nemo {__version__}")
        return 0
    if verb not in VERBS:
        raise _unknown(verb)
    from importlib import import_module

    code: int = import_module(VERBS[verb][0]).main(rest)
    return code


def _unknown(verb: str) -> Exception:
    from difflib import get_close_matches

    from apertus_nemo.errors import InputError

    near = get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
    return InputError(f"{verb!r} is not a verb; {hint}")


def _report(error: Exception) -> int:
    from apertus_nemo.errors import ApertusError

    if isinstance(error, ApertusError) and error.exit_code != OUR_FAULT:
        for line in str(error).splitlines() or [type(error).__name__]:
            # A record or a file's name may come from anywhere: nothing of it drives, or floods, the terminal.
            line = line if len(line) < _LONG_LINE else line[:_LONG_LINE] + " ..."
            print(f"apertus-nemo: {line if line.isprintable() else ascii(line)[1:-1]}", file=sys.stderr)
        return error.exit_code
    import traceback

    traceback.print_exception(error)
    print("apertus-nemo: this is a fault of apertus-nemo itself; please report the lines above", file=sys.stderr)
    return OUR_FAULT


if __name__ == "__main__":
    sys.exit(main())
