"""Errors that are messages to the person who typed the command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from pipeline.secrets import redacted


class UserError(Exception):
    """Something the user can mend; the message names the value, the rule and values that work.

    Every module's own error is a subclass, so a job ends with that message instead of a stack trace. It holds no
    secret, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class DeterministicError(UserError):
    """The same config and data fail in the same way at the same step: starting a worker group again is in vain."""


def first_problem(error: ValidationError) -> str:
    """Where the first thing wrong with a JSON is, and what."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}"


@contextmanager
def explained() -> Iterator[None]:
    """Around a job's ``main``: a UserError becomes its message on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
