"""The errors that a user may see, each with the exit code of the command that ends with it.

Every message says what is wrong, where, and what to do, in one line (or one line a finding).
Commands print the message alone; a traceback is shown for our own faults only.

    raise InputError("optim.lr is -1.0: must be greater than 0")
"""


class ApertusError(Exception):
    """Our own fault, unless a subclass says otherwise."""

    exit_code = 4


class Differs(ApertusError):
    """A comparison was made, and its verdict is "different"."""

    exit_code = 1


class InputError(ApertusError):
    """The user's input is wrong: a recipe, an override, a file, a command line."""

    exit_code = 2


class UnfitEnvironment(ApertusError):
    """The machine cannot do it: a missing package, a full disk, the wrong processor."""

    exit_code = 3
