"""The two kinds of failure a user can meet, and the exit code each one maps to."""

from __future__ import annotations


class BitfloorError(Exception):
    """A run that failed. The message is one sentence: what happened, the offending value, what to do."""

    exit_code = 1


class InputError(BitfloorError):
    """Wrong usage or wrong input, found at the border before anything was written."""

    exit_code = 2


class FormatWarning(UserWarning):
    """A checkpoint was read in another way than it will be written: nothing is wrong, and the user should know."""
