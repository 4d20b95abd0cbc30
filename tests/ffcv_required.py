"""Tests of FFCV are skipped where it is not installed, but never in CI."""

import os
from functools import cache

import pytest

requires_ffcv = pytest.mark.ffcv


@cache
def why_skipped() -> str:
    """What is missing; empty where the tests run."""
    from classroomkd.data.ffcv.bindings import import_ffcv
    from classroomkd.errors import UserError

    try:
        import_ffcv()
    except UserError as error:
        return "" if os.environ.get("CI") else str(error)
    return ""
