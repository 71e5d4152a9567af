"""Errors meant for people: one sentence on what was given, what was expected, what to do.

Library code raises `InputError` for anything the caller can mend (a file, a
flag, a prompt). The scripts print its text and exit with code 2; every other
exception is a failed run and exits with 1.
"""


class InputError(ValueError):
    """The input or the settings are wrong; the message says which and how to mend it."""
