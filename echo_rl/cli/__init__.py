"""The ``echo-rl`` command. It only parses: every subcommand calls a library function that does the work.

Modules here import nothing heavy at the top, so that help and usage errors come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from echo_rl.errors import EchoError

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Errors of this package and of files become one line on stderr and exit code 2."""
    from echo_rl.cli.app import parse

    try:
        return parse(argv).run()
    except EchoError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename is not None else error
        print(f"error: {said}", file=sys.stderr)
        return USER_ERROR
