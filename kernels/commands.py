"""What the commands of this package share."""

import argparse
import sys
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """A parser of arguments that refuses in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends the process."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
