"""``python -m classroomkd``, the same as the command ``classroomkd``."""

import sys

from classroomkd.cli import main

sys.exit(main())
