"""One error tree. Each error is one sentence that says what to do; `retry` says whether trying again can help."""

import re


class GsaError(Exception):
    """Base of every error that GSA raises on purpose. The command line prints it as one sentence, exit code 2."""

    retry = False


class UsageError(GsaError):
    """What was asked for cannot be had: an unknown name, a missing file, a value out of range."""


class FormatError(GsaError):
    """A file is not what it should be: damaged, foreign, hostile or of another format version."""


class SpecMismatch(GsaError):
    """Two sides disagree about what an embodiment senses or does. Names both sides."""


class StaleError(GsaError):
    """A key, lease or epoch is no longer the current one: a foreign index, a fenced-off learner."""


class EnvironmentFault(GsaError):
    """An environment raised, crashed, hung, or returned NaN or wrong shapes. Its episode is dropped, it is rebuilt."""

    retry = True


class Unavailable(GsaError):
    """A service does not answer now; it may later."""

    retry = True


class Stopped(GsaError):
    """A run was told to stop. It is saved and can go on."""

    retry = True


def cause_of(fault: str) -> str:
    """What faults have in common that differ in nothing but numbers: times, addresses, sizes."""
    return re.sub(r"\d+(\.\d+)?", "#", fault)


def unknown(kind: str, name: object, known: object) -> UsageError:
    """The error for a name that is not in a list of names: says which are, the nearest first."""
    import difflib

    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")
