"""What wrk prints, read."""

from __future__ import annotations

import pytest
from benchmarks.load import Load, milliseconds, read_wrk
from benchmarks.processes import Failed

REPORT = """Running 2s test @ http://127.0.0.1:8080/k1
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.62ms  310.20us   8.11ms   91.34%
    Req/Sec    19.80k     1.10k   21.00k    80.00%
  Latency Distribution
     50%    1.57ms
     75%    1.70ms
     90%    1.88ms
     99%    2.90ms
  39412 requests in 2.00s, 47.21MB read
Requests/sec:  19705.88
Transfer/sec:     23.60MB
"""


def test_a_report() -> None:
    assert read_wrk(REPORT) == Load(19705.88, 1.57, 2.9, 39412, 0)


def test_what_went_wrong_counts_as_bad() -> None:
    text = REPORT.replace(
        "47.21MB read\n",
        "47.21MB read\n  Socket errors: connect 1, read 7, write 2, timeout 3\n  Non-2xx or 3xx responses: 40\n",
    )
    assert read_wrk(text).bad == 46


def test_another_text_is_no_report() -> None:
    with pytest.raises(Failed, match="unable to connect"):
        read_wrk("unable to connect to 127.0.0.1:1 Connection refused")


@pytest.mark.parametrize(("text", "value"), [("12.50us", 0.0125), ("3.1ms", 3.1), ("1.20s", 1200), ("1.00m", 60000)])
def test_durations(text: str, value: float) -> None:
    assert milliseconds(text) == pytest.approx(value)


def test_no_duration() -> None:
    with pytest.raises(Failed, match="no duration"):
        milliseconds("12")
