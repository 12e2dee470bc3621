"""The command lines of the jobs: how they are read, and kinds of arguments that several of them take."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from pipeline.secrets import objection, redacted, secret_in


class JobParser(argparse.ArgumentParser):
    """Shows a job's docstring as it is written, and refuses secrets: everyone on the machine sees them in ``ps``."""

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def read(self, given: Sequence[str] | None = None) -> argparse.Namespace:
        """The arguments of the command line, or ``given``; options and overrides in any order."""
        before = "the command line"
        for text in sys.argv[1:] if given is None else given:
            name, _, value = text.partition("=")
            is_option = name.startswith("--")
            if secret_in(value if is_option else text):
                is_named = is_option or re.fullmatch(r"[\w.]+", name)
                self.error(str(objection(name if is_named else before, text)))
            before = text
        return self.parse_intermixed_args(given)

    def error(self, message: str) -> NoReturn:
        """Usage, message and exit code 2."""
        super().error(redacted(message))


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on, e.g. 8")
    return int(text)
