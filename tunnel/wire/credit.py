"""Credit: what may be sent, what may still come, and what is given back of it.

Both directions have a window for each stream and one for the link (tunnel/SPEC.md, Windows; how a sender shares the
link's out among its streams: tunnel/wire/windows.py). What is not taken waits in its stream, and counts.
"""

from __future__ import annotations

from collections.abc import Callable

from tunnel.errors import LocalWireError, WireError
from tunnel.wire import frames
from tunnel.wire.held import Held
from tunnel.wire.outbox import Outbox
from tunnel.wire.stream import Stream
from tunnel.wire.windows import EARLY, EARLY_LINK, FLOOR, SHARE, Windows

MOST_PENDING = 256  #: parts of one stream that wait: small ones cost more than their bytes


class Credit(Outbox):
    """streams: those that are open, by number."""

    def __init__(self, on_queued: Callable[[], None], held: Held) -> None:
        super().__init__(on_queued, held)
        self.streams: dict[int, Stream] = {}
        self._window = Windows()  # the same in both directions
        self._credit = self._receivable = self._window.link
        self._consumed = 0  # of the link's credit, not given back
        self._short = self._window.short
        self._set_short(False)
        self._starved: set[Stream] = set()  # streams that wait for the link's credit
        self._has_new_credit = False  # nobody has looked yet whether it is enough for one of these

    def set_windows(self, stream: int, link: int) -> None:
        """Windows of this link, both directions, instead of the usual ones. Raises WireError for impossible ones.

        Before anything was sent or taken; streams that came in the same message as the welcome may be there already.
        """
        if not frames.LEAST_WINDOW <= stream <= link <= frames.MOST_WINDOW:
            raise WireError(f"windows of {stream} bytes a stream and {link} a link are not possible")
        wider, link_wider = stream - self._window.stream, link - self._window.link
        self._window = Windows(stream, link)
        self._short = self._window.short
        self._credit += link_wider
        self._receivable += link_wider
        for one in self.streams.values():
            one.credit += wider
            one.receivable += wider
        if self._receivable < 0 or any(one.receivable < 0 for one in self.streams.values()):
            raise WireError("more body came than the window allows", "stream_buffer")
        self._set_short(self._receivable < self._window.short)

    # What comes -----------------------------------------------------------------------------------------------

    def _discard(self, size: int) -> None:
        """Body for a stream that is over: nobody will take it, so its link credit goes back here."""
        self._take_in(size)
        self._give_back(size)

    def _take_in(self, size: int) -> None:
        self._receivable -= size
        if self._receivable < self._short:
            self._run_short()

    def _run_short(self) -> None:
        """Little is left of the link's window, or less than nothing: that raises WireError."""
        if self._receivable < 0:
            raise WireError("more body came than the window allows", "link_buffer")
        if not self._is_short:
            self._set_short(True)
            for stream in self.streams.values():
                if stream.consumed >= EARLY:
                    self._return_credit(stream)
            self._give_back(0)

    def _set_short(self, is_short: bool) -> None:
        """While little is left of the link's window every bit of credit counts, else few frames do."""
        self._is_short = is_short
        self._return_at = EARLY if is_short else self._window.step
        self._link_return_at = min(EARLY_LINK, self._window.link // 8) if is_short else self._window.link // 8

    # What is taken --------------------------------------------------------------------------------------------

    def next_part(self, stream: Stream) -> bytes:
        """The next part of the body, b"" when there is none now. Its credit goes back to the sender."""
        if not stream.inbox:
            return b""
        part = stream.inbox.popleft()
        size = len(part)
        stream.inbox_bytes -= size
        self.held.bytes -= size
        self._give_back(size)
        stream.consumed += size
        if stream.consumed >= self._return_at:
            self._return_credit(stream)
        return part

    def forget(self, stream: Stream) -> None:
        """Nobody will take what is left in the inbox: its link credit goes back to the other end."""
        if stream.inbox:
            stream.inbox.clear()
            stream.ended = False  # nobody may take what was taken for the whole
            size, stream.inbox_bytes = stream.inbox_bytes, 0
            self.held.bytes -= size
            self._give_back(size)

    def _return_credit(self, stream: Stream) -> None:
        if not stream.ended and stream.failure is None:
            stream.receivable += stream.consumed
            stream.moved += stream.consumed
            self._queue(frames.frame(frames.WINDOW, stream.id, frames.WINDOW_BODY.pack(stream.consumed)))
            stream.consumed = 0

    def _give_back(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= self._link_return_at:
            self._receivable += self._consumed
            self._queue(frames.frame(frames.WINDOW, 0, frames.WINDOW_BODY.pack(self._consumed)))
            self._consumed = 0
            if self._is_short and self._receivable > self._window.short + self._window.link // 16:
                self._set_short(False)

    # What is sent ---------------------------------------------------------------------------------------------

    def can_carry(self, stream: Stream | None, size: int) -> bool:
        """Whether a body of this size may ride in the stream's first frame."""
        return size <= frames.SMALL_BODY and size <= (self._credit if stream is None else self._room(stream))

    def sendable(self, stream: Stream) -> int:
        """How many bytes of body may be queued now; 0: wait for `wake()`."""
        if stream.pending_bytes > 2 * frames.MAX_DATA or len(stream.pending) >= MOST_PENDING:
            return 0
        size = self._room(stream)
        if size > 0:
            return size
        if stream.credit:
            self._starved.add(stream)
        return 0

    def _room(self, stream: Stream) -> int:
        """What the stream may send by its own credit, the link's, and its share of that (0 or less: nothing now)."""
        share = max((self._credit - self._window.kept) // SHARE, FLOOR)
        under_way = self._window.stream - stream.credit
        return min(stream.credit, self._credit, frames.MAX_DATA, share - under_way)

    def is_untaken(self, stream: Stream) -> bool:
        """Whether the other end surely has some of the body that we sent and has not taken it: had it taken all, it
        would have given credit back."""
        return self._window.stream - stream.credit - stream.pending_bytes >= self._window.step

    def _take_starved(self) -> list[Stream]:
        """Those that the link's credit held up and that may send now."""
        self._has_new_credit = False
        ready = [stream for stream in self._starved if self._room(stream) > 0]
        self._starved.difference_update(ready)
        return ready

    def _spend(self, stream: Stream, size: int) -> None:
        if size:
            if size > stream.credit or size > self._credit:
                raise LocalWireError("sending more body than the window allows")
            stream.credit -= size
            self._credit -= size
