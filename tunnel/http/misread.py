"""Why h11 does not take a head, in our words.

h11 quotes the line that it refuses, and that line may be anything: a password in a stray line of a local service's
output, a visitor's cookie. What it says is therefore never passed on, only what it means.
"""

from __future__ import annotations

import h11

_MEANINGS = (
    ("illegal status line", "its first line is no status line"),
    ("no response line received", "its first line is no status line"),
    ("illegal request line", "its first line is no request line"),
    ("no request line received", "its first line is no request line"),
    ("illegal header line", "a field line is not valid"),
    ("continuation line at start of headers", "a field line is not valid"),
    ("Illegal header", "a field line is not valid"),
    ("Illegal target characters", "the address has characters that are not allowed"),
    ("Missing mandatory Host", "there must be exactly one Host field"),
    ("Found multiple Host", "there must be exactly one Host field"),
    ("conflicting Content-Length", "Content-Length is given with different values"),
    ("bad Content-Length", "Content-Length is not one number"),
    ("multiple Transfer-Encoding", "only Transfer-Encoding: chunked is understood, once"),
    ("Only Transfer-Encoding", "only Transfer-Encoding: chunked is understood, once"),
    ("Response status_code", "its status is no number from 100 to 999"),
    ("InformationalResponse status_code", "its status is no number from 100 to 999"),
    ("Receive buffer too long", "the head is too long"),
)


def meaning_of(exc: h11.RemoteProtocolError) -> str:
    """A few words, none of them from the bytes that were read. Raise what is made of it `from None`: a traceback would
    show what h11 said."""
    said = str(exc)
    return next((meaning for beginning, meaning in _MEANINGS if said.startswith(beginning)), "it breaks HTTP's rules")
