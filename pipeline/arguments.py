"""Kinds of command line arguments that several jobs take."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on, e.g. 8")
    return int(text)
