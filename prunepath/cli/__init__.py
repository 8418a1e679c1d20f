"""The `prunepath` command line: results on standard output, progress and errors on standard error."""

import signal
import sys
import threading


def main() -> None:
    """Entry point of the `prunepath` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from prunepath.cli.app import app

        app()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        # What is left is the interpreter's own end, which an interrupt may cut short without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(number, frame) -> None:
    """Raises KeyboardInterrupt, once no import is under way: C++ libraries abort the process where one fails."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    again = threading.Timer(0.005, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()
