"""What a user reads when a call is refused."""

import pytest

from classroomkd.errors import UserError


def refusal(call, *arguments, **options) -> str:
    """The message of the UserError that a call raises; always a single line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
