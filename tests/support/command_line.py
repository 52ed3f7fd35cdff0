"""`python -m tracejit`, called in the process of a test."""

from __future__ import annotations

from tracejit.__main__ import main


def status(*arguments: object) -> int:
    """The exit status of the command line."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit:
        return exit.code
