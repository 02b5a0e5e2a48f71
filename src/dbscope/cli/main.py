"""Which command is meant."""

import argparse
import os
import sys
from collections.abc import Sequence

from dbscope.cli import doctor
from dbscope.cli.demo import arguments as demo
from dbscope.cli.top import arguments as top

__all__ = ["main"]


def main(given: Sequence[str] | None = None) -> int:
    """Run the command that `given` (or the command line) names.

    Returns:
        the exit status: 0 if all is well, 1 if the command found something wrong, 2 for bad usage, 130 for ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="dbscope", description="Who holds which session, and who may end it.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_to(commands)
    top.add_to(commands)
    doctor.add_to(commands)
    options = parser.parse_args(given)
    try:
        return int(options.run(options, options.parser))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who was reading has had enough, as `head` has; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
