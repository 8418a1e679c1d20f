"""The `prunepath` command line: results on standard output, progress and errors on standard error."""

import sys


def main() -> None:
    """Entry point of the `prunepath` command."""
    try:
        from prunepath.cli.app import app

        app()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
