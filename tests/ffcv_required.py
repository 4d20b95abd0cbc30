"""Tests of FFCV are skipped where it is not installed, but never in CI."""

import os

import pytest

from classroomkd.data.ffcv.bindings import import_ffcv
from classroomkd.errors import UserError

try:
    import_ffcv()
    _missing = ""
except UserError as error:
    _missing = str(error)

requires_ffcv = pytest.mark.skipif(bool(_missing) and not os.environ.get("CI"), reason=_missing)
