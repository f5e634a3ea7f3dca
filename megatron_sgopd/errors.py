"""The ways in which a run does not go on, and a help for their messages."""

from collections.abc import Iterable


class ConfigError(ValueError):
    """The user asked for something that cannot work.

    Raised before anything expensive starts. The message says what was wrong, the value seen, and
    what to change; the command line prints it alone, without a traceback, and exits with code 2.
    """


class Unavailable(RuntimeError):
    """Something that passes was in the way, such as a port in use: the same command may go on a little later."""


class Alarm(RuntimeError):
    """A running job went wrong in a way that would otherwise stay silent; the message diagnoses it."""


class Stopped(RuntimeError):
    """A run was asked to stop and has saved what it had: started again, it goes on."""


def some(names: Iterable[str]) -> str:
    """The first few of `names` for a message, and how many there are beyond."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
