"""The command `dbscope`."""

from dbscope.cli.main import main

__all__ = ["main"]
