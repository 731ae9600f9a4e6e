"""Gives a program a wrong wall clock: found first on PYTHONPATH, run before anything of the program is imported.

CLOCK_SKEW is what to add, seconds. (A preloaded libfaketime would also bend the clocks that threads sleep by.)
"""

import os
import time

_skew = int(os.environ.get("CLOCK_SKEW", "0"))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _skew
time.time_ns = lambda: _time_ns() + _skew * 1_000_000_000
