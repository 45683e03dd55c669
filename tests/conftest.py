"""What holds for all tests."""

from __future__ import annotations

import os
import signal
import tempfile

# Tests neither use nor leave what is known of the user's disks.
_CACHE = tempfile.TemporaryDirectory()
os.environ["EDGEMOE_CACHE"] = _CACHE.name

# A runner in the background of a shell ignores SIGINT, and so would every program that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
