"""The command line: runs a command and turns its errors into messages and exit statuses."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence

from classroomkd.cli.parser import make_parser
from classroomkd.errors import UserError, missing_of_train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status.

    0: success. 1: some of many runs failed. 2: a user or system error, reported in one line on
    stderr. 130: interrupted (143 by SIGTERM). 141: the output's reader has closed the pipe.
    """
    try:
        arguments = make_parser().parse_args(argv)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, head for example, has closed it
        # Python flushes the buffer at exit, and would report the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        missing = missing_of_train(error)
        if missing is None:
            raise
        print(f"classroomkd: error: this command needs {missing}", file=sys.stderr)
        return 2
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
