"""Where the program begins: `picotron-mini`, and `python -m picotron_mini` (so `torchrun -m picotron_mini train ...`).

Importing torch takes a second or more. Nothing runs and nothing is written in that time, so Ctrl-C then simply ends the
process: an exception raised anywhere inside an import would be shown as a traceback, or be swallowed by it.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line; what Ctrl-C means changes as soon as a command has begun (`cli.begin`)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # it is ignored in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    from .cli import main as run

    try:
        run()
    finally:  # all is done: a second Ctrl-C must not disturb the end
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
