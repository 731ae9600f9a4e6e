"""What may follow what: one table for each half of a stream, blind to which end and which direction it is.

A stream has two halves, one a direction. The opener's half begins with OPEN, the other's with RESPONSE; after that
they are alike. A stream is over when both halves are done, or at a RESET from either side.
"""

from __future__ import annotations

from tunnel.errors import LocalWireError, WireError

# States of a half.
IDLE, BODY, DONE = 0, 1, 2
STATES = ("IDLE", "BODY", "DONE")
# Moves.
INTERIM, HEAD, PART, FINISH = 0, 1, 2, 3
MOVES = ("INTERIM", "HEAD", "PART", "FINISH")

#: (state, move) → state. HEAD is OPEN or a final RESPONSE, INTERIM a 1xx RESPONSE, PART a DATA frame,
#: FINISH the END flag or TRAILERS. RESET is legal in every state and ends both halves.
TABLE: dict[tuple[int, int], int] = {
    (IDLE, INTERIM): IDLE,
    (IDLE, HEAD): BODY,
    (BODY, PART): BODY,
    (BODY, FINISH): DONE,
}


def after_sending(state: int, move: int) -> int:
    """The half's next state. Raises LocalWireError: we were about to break the protocol."""
    try:
        return TABLE[state, move]
    except KeyError:
        raise LocalWireError(f"sending {MOVES[move]} on a half that is {STATES[state]}") from None


def after_receiving(state: int, move: int) -> int:
    """The half's next state. Raises WireError: the other end broke the protocol."""
    try:
        return TABLE[state, move]
    except KeyError:
        raise WireError(f"{MOVES[move]} came on a half that is {STATES[state]}") from None
