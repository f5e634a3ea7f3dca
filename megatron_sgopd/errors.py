"""The two ways in which a run refuses to go on."""


class ConfigError(ValueError):
    """The user asked for something that cannot work.

    Raised before anything expensive starts. The message says what was wrong, the value seen, and
    what to change; the command line prints it alone, without a traceback, and exits with code 2.
    """


class Alarm(RuntimeError):
    """A running job went wrong in a way that would otherwise stay silent; the message diagnoses it."""
