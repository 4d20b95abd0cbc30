"""How long a test waits for what should come, before it counts as never coming."""

LAST_RESORT = 1800  # seconds: no test takes a tenth of it, on a machine that does nothing else
