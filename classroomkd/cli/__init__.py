"""The command line: what becomes of a command, its errors and its exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence

from classroomkd.cli.parser import make_parser
from classroomkd.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status.

    0 is success, 1 that some of many runs failed, 2 a mistake of the user's or a refusal of the
    system's, told in one line on stderr, 130 an interruption (143 by SIGTERM), 141 that nobody
    reads the output any more.
    """
    try:
        arguments = make_parser().parse_args(argv)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, head for one, has seen enough
        # What is left in the buffer must go somewhere, or Python complains of it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        message = _system_message(error) if isinstance(error, OSError) else str(error)
        print(f"classroomkd: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "nothing was written"
        print(f"classroomkd: interrupted: {reason}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    return status


def _system_message(error: OSError) -> str:
    message = error.strerror or str(error)
    if error.filename:
        message = f"{error.filename}: {message}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += ": free some space and start again; what was written before is intact"
    return message
