"""One public request: read its head, find its tunnel, open a stream, pass the bodies both ways, answer.

The visitor's own task does all of it; a second one exists only while a body is still coming in, or both ways at once
after an upgrade. The most common requests are served without waking it (tunnel/core/quick.py, by the same functions);
where one turns out to need more, the task goes on from there. The parts are rooms of their own: reading (heads),
uploading and answering (bodies), failing (errors, which become answers there and nowhere else).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

import trio

from tunnel.core.answering import Answerer
from tunnel.core.database import StoreError
from tunnel.core.failing import Refuser
from tunnel.core.forwarding import Forwarding
from tunnel.core.limits import Counts, no_refusals
from tunnel.core.reading import HeadReader, may_upgrade
from tunnel.core.recent import RecentRequests
from tunnel.core.registry import AgentLink, Registry, Tunnel
from tunnel.core.request import Request, RequestStream, make_stream
from tunnel.core.uploading import Uploader
from tunnel.core.visitor import ANSWER, HEAD, Visitor
from tunnel.errors import OUTCOMES, UNSENT, Failure
from tunnel.handler import Layer, RequestVisit, wrap
from tunnel.http.heads import CHUNKED, Head
from tunnel.link.tasks import open_pair
from tunnel.log import get_logger
from tunnel.observers import only_observers
from tunnel.wire import frames
from tunnel.wire.frames import NO_BODY, SMALL_BODY, UNKNOWN, Open
from tunnel.wire.held import Held

if TYPE_CHECKING:
    from tunnel.core.accounts import Accounts
    from tunnel.core.elsewhere import Elsewhere

log = get_logger("tunnel.core")

#: may be tried on another link once it is sure that no local service got them (RFC 9110, 9.2.2)
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
#: limits of one link only (words of tunnel.errors.LIMITS)
LINK_LIMITS = frozenset({"link_streams", "streams_per_address", "link_buffer"})
TRIES = 3  #: links that one request is offered to


class Exchanger:
    """Handles requests. on_finished hears of each one that ended (for a live status)."""

    def __init__(
        self,
        registry: Registry,
        accounts: Accounts,
        layers: Sequence[Layer],
        forwarding: Forwarding,
        *,
        max_head: int,
        max_target: int,
        max_body: int,
        head_timeout: float,
        request_timeout: float,
        body_idle_timeout: float,
        server_timing: bool,
        max_fields: int = 0,
        max_requests: int = 0,
        refusals: Counts | None = None,
        held: Held | None = None,
    ) -> None:
        self.active = 0  # requests and TCP connections under way
        self._idle = trio.Event()
        self.bytes_in = 0
        self.bytes_out = 0
        self.recent = RecentRequests()
        self.on_finished: Callable[[RequestVisit], None] | None = None
        self.elsewhere: Elsewhere | None = None  # other processes of this core
        self.handle_request = wrap(self.handle, layers)
        self._handle_stream = wrap(self._stream, layers)
        self.observers = only_observers(layers)  # None: a layer needs a coroutine around each request
        self._go_on, self._go_on_stream = self.handle_request, self._handle_stream
        if self.observers is not None:
            self._go_on = self.observers.go_on(self.handle)
            self._go_on_stream = self.observers.go_on(self._stream)
        self._registry = registry
        self._accounts = accounts
        self.refusals = no_refusals() if refusals is None else refusals
        self.forwarding = forwarding
        self._held = Held() if held is None else held
        self._max_body = max_body
        self._head_timeout = head_timeout
        self._request_timeout = request_timeout
        self.heads = HeadReader(
            max_head=max_head,
            max_target=max_target,
            max_fields=max_fields,
            max_requests=max_requests,
            refusals=self.refusals,
        )
        self._uploader = Uploader(max_body=max_body, request_timeout=request_timeout, idle_timeout=body_idle_timeout)
        self.answerer = Answerer(idle_timeout=body_idle_timeout, server_timing=server_timing)
        self.refuser = Refuser(self.answerer, self.refusals)

    @property
    def is_draining(self) -> bool:
        """Connections end with the answers that they wait for."""
        return self.answerer.is_draining

    @is_draining.setter
    def is_draining(self, value: bool) -> None:
        self.answerer.is_draining = value

    async def serve(self, visitor: Visitor) -> bool:
        """One request on a connection that has sent its first bytes; says whether the connection may go on."""
        request = visitor.request or self.begin(visitor)
        try:
            if request.head is None and request.refusal is None:
                await self._receive_head(request)
            if request.is_begun:
                await self._go_on(request)
            elif self.serves_elsewhere(request) and await self._pass_on(request):
                return False
            else:
                await self.handle_request(request)
        finally:
            self.end(request)
        return request.keep_alive

    def begin(self, visitor: Visitor) -> Request:
        """The next request of this connection; `end` follows in any case."""
        request = Request(visitor.address, visitor.proto, visitor=visitor)
        visitor.request = request
        visitor.served += 1
        self.active += 1
        return request

    def end(self, request: Request) -> None:
        request.visitor.request = request.opened = None  # no cycle is left for the garbage collector
        self.finished()
        self.bytes_in += request.bytes_in
        self.bytes_out += request.bytes_out
        if request.outcome == "ok" and not request.error:
            self.recent.answered += 1
        else:
            self.recent.note(request)
        if self.on_finished is not None:
            self.on_finished(request)

    def serves_elsewhere(self, request: Request) -> bool:
        """Whether another process of this core should have it."""
        return self.elsewhere is not None and self.elsewhere.serves(request)

    async def _pass_on(self, request: Request) -> bool:
        return self.elsewhere is not None and await self.elsewhere.take(request)

    def finished(self) -> None:
        """One of the `active` has ended."""
        self.active -= 1
        if not self.active:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is under way."""
        while self.active:
            self._idle = trio.Event()
            await self._idle.wait()

    async def handle(self, request: Request) -> None:
        """The innermost handler of a request. Raises nothing but Cancelled."""
        try:
            if request.refusal is not None:
                raise request.refusal
            stream, handle = request.opened, self._go_on_stream
            if stream is None:
                stream = self.route(request) or await self._explain_missing(request)
                handle = self._handle_stream
            try:
                await handle(stream)
            except Failure as exc:
                await self._try_others(stream, exc)
            self.succeeded(request)
        except Failure as exc:
            await self.refuser.fail(request, exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            request.keep_alive = False
            if request.expired and not request.aborted:
                await self.refuser.fail(request, Failure("request_timeout"))
            else:
                await self.refuser.fail(request, Failure("visitor_aborted", request.aborted))
        except trio.Cancelled:
            self.refuser.cut(request)
            raise
        except Exception as exc:
            log.error("request broke", request_id=request.request_id, error=exc)
            await self.refuser.fail(request, Failure("internal"))

    @staticmethod
    def succeeded(request: Request) -> None:
        request.outcome = "ok"
        if request.status >= 500 and not request.error:
            request.error = f"the local service answered {request.status}"

    async def _receive_head(self, request: Request) -> None:
        """Before the layers are entered: they look at what it says, whose trace it is for one thing."""
        try:
            if not self.heads.read_nowait(request):
                request.visitor.begin(HEAD, self._head_timeout)
                await self.heads.read(request)
        except Exception as exc:
            request.refusal = exc  # `handle` answers
        except trio.Cancelled:
            self.refuser.cut(request)
            raise

    # Where to -------------------------------------------------------------------------------------------------

    def route(self, request: Request) -> RequestStream | None:
        """The stream that is to carry the request; None where nobody serves its tunnel now. Raises Failure."""
        head = request.head
        assert head is not None
        tunnel = self._registry.find(request.host)
        if tunnel is None or tunnel.protocol != "http" or not tunnel.links:
            return None
        request.tunnel = tunnel.name
        account = tunnel.links[0].account
        request.account = account
        request.account_id = account.id
        if self._held.is_full:
            self.check_memory()
        account.admit_request()
        if request.visitor.is_proxy:
            self.forwarding.identify(request)
        if self._max_body and head.length is not None and head.length > self._max_body:
            raise Failure("body_too_large", f"{head.length} bytes; {self._max_body} are accepted")
        protocol = "upgrade" if head.upgrade and self._takes_upgrade(request, head) else "http"
        stream = make_stream(request, protocol, self._assign(request, tunnel), tunnel)
        if head.length:
            self._take_small_body(request, stream)
        return stream

    def _takes_upgrade(self, request: Request, head: Head) -> bool:
        """Whether the upgrade is passed on. Raises Failure for data that could be the new protocol's already."""
        if b"upgrade" not in head.connection or not request.body_over or not may_upgrade(head):
            return False
        if request.visitor.buffer:
            raise Failure("bad_request", "data follows a request for an upgrade before its answer")
        return True

    def check_memory(self) -> None:
        """Raises Failure while the links hold as many bytes as they may."""
        if self._held.is_full:
            raise Failure("overloaded", "the core holds as many unread bytes as it may", retry_after=1, limit="buffer")

    def _assign(self, request: Request, tunnel: Tunnel, tried: Sequence[AgentLink] = ()) -> AgentLink:
        agent = tunnel.choose(tried, request.visitor.crowd)
        request.agent_id = agent.visit.agent_id
        request.connection_id = agent.visit.connection_id
        return agent

    async def _try_others(self, stream: RequestStream, failure: Failure) -> None:
        """Offer a request that failed with one link to others of its tunnel, if that can do no harm. Raises Failure."""
        request, tried = stream.request, [stream.agent]
        while self._may_try_again(stream, failure, tried):
            again = make_stream(
                request, stream.protocol, self._assign(request, stream.tunnel_entry, tried), stream.tunnel_entry
            )
            again.body, again.complete = stream.body, stream.complete
            stream = again
            try:
                await self._handle_stream(stream)
                return
            except Failure as exc:
                failure = exc
                tried.append(stream.agent)
        raise failure

    def _may_try_again(self, visit: RequestStream, failure: Failure, tried: Sequence[AgentLink]) -> bool:
        """Whether another link may have the request: surely no local service got it, and all of it is still here.

        Sure is (1) a link that was full by the time that the stream was to be opened, (2) an agent that says so by the
        outcome of its reset, (3) a link that ended before the OPEN had left its queue. A link that ended later may have
        brought the request: that is never sent twice.
        """
        request, stream = visit.request, visit.request.stream
        if request.head_written or request.aborted:
            return False
        if visit.stream_id or failure.limit not in LINK_LIMITS:
            if request.method not in IDEMPOTENT or not visit.complete:
                return False
            if stream is None or not (stream.unsent or (failure.outcome in UNSENT and stream.failure is not None)):
                return False
        crowd = request.visitor.crowd
        others = any(one.has_room_for(crowd) and one not in tried for one in visit.tunnel_entry.links)
        return others and len(tried) < TRIES and not request.expired and not self.is_draining

    async def _explain_missing(self, request: Request) -> NoReturn:
        """Raises Failure: no_agent for a name that is reserved or held, no_tunnel for one that nobody has."""
        tunnel = self._registry.find(request.host)
        name = tunnel.name if tunnel is not None else self._registry.name_of(request.host)
        if tunnel is not None and tunnel.protocol != "http":
            raise Failure("no_tunnel", f"{name} is a TCP tunnel on port {tunnel.port}")
        try:
            owner = tunnel.account_id if tunnel is not None else await self._accounts.owner_of(name, parent=request)
        except StoreError as exc:
            text = "nobody serves this name now, and the store does not answer whose it is"
            raise Failure("internal", text, retry_after=5) from exc
        if owner is not None:
            request.tunnel = name
            raise Failure("no_agent", f"no agent is connected for {name}", retry_after=5)
        raise Failure("no_tunnel", f"nothing is served under {request.host}" if request.host else "no host was named")

    def _take_small_body(self, request: Request, stream: RequestStream) -> None:
        """A body that is here already and small rides in the opening frame."""
        head, visitor = request.head, request.visitor
        assert head is not None
        length = head.length or 0
        if 0 < length <= SMALL_BODY and len(visitor.buffer) >= length and not head.expects_continue:
            stream.body, visitor.buffer = visitor.buffer[:length], visitor.buffer[length:]
            request.body_over = True
        else:
            stream.complete = False

    # The stream -----------------------------------------------------------------------------------------------

    async def _stream(self, visit: RequestStream) -> None:
        """The innermost handler of a stream."""
        try:
            if visit.refusal is not None:
                raise visit.refusal
            if not visit.stream_id:
                visit.agent.check_room_for(visit.request.visitor.crowd)  # others have come since it was chosen
                self.open(visit)
            if visit.complete:
                await self.answerer.answer(visit)
            else:
                async with open_pair() as nursery:
                    nursery.start_soon(self._uploader.upload, visit)
                    await self.answerer.answer(visit)
                    nursery.cancel_scope.cancel()
            visit.outcome = "ok"
        except Failure as exc:
            visit.outcome = exc.outcome
            visit.error = str(exc) if OUTCOMES[exc.outcome].failed else ""
            raise
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            visit.outcome = "visitor_aborted"
            raise
        except trio.Cancelled:
            visit.outcome = "draining"
            raise
        finally:
            self.leave(visit)

    @staticmethod
    def leave(visit: RequestStream) -> None:
        """The stream's outcome is known: its facts are settled, and nothing of it is left."""
        request = visit.request
        visit.status = request.status
        visit.bytes_in, visit.bytes_out = request.bytes_in, request.bytes_out
        if visit.crowd:
            visit.agent.crowds.leave(visit.crowd)
            visit.crowd = ""
        stream = request.stream
        if stream is not None and (not stream.is_over or stream.inbox):
            stream.reset(visit.outcome or "internal")

    def open(self, visit: RequestStream) -> None:
        """Send the request's head, and its body if that is here. Raises Failure."""
        request = visit.request
        head, agent = request.head, visit.agent
        assert head is not None
        context = f"request-id: {request.request_id}\r\n"
        for name, value in visit.headers.items():
            if len(context) + len(name) + len(value) < frames.MAX_CONTEXT - 4:
                context += f"{name}: {value}\r\n"
        is_upgrade = visit.protocol == "upgrade"
        length = NO_BODY if head.length is None else UNKNOWN if head.length == CHUNKED else head.length
        forwarded = self.forwarding.head(request, upgrade=is_upgrade)
        if len(forwarded) > frames.MAX_HEAD:
            raise Failure("head_too_large", f"the link carries heads of {frames.MAX_HEAD} bytes")
        opened = Open(
            frames.UPGRADE if is_upgrade else frames.HTTP,
            agent.indexes[visit.tunnel],
            int(self._request_timeout * 1000),
            length,
            context.encode("latin-1", "replace"),
            forwarded,
        )
        session = agent.link.session
        end = visit.complete and not is_upgrade
        if visit.body and not session.can_carry(None, len(visit.body)):
            raise Failure("overloaded", "the link to the agent is full", retry_after=1, limit="link_buffer")
        stream = session.open(opened, visit.body, end)
        crowd = request.visitor.crowd
        if crowd:
            agent.crowds.enter(crowd)
            visit.crowd = crowd
        if visit.body and not request.bytes_in:  # not again on a second link
            request.bytes_in = len(visit.body)
            assert request.account is not None
            delay = request.account.take_bytes(request.bytes_in, 0)
            if delay:
                request.owed_until = monotonic() + delay  # waited for with the answer
        request.stream = stream  # type: ignore[assignment]  # the link's own kind
        visit.stream_id = stream.id
        request.marks["opened"] = monotonic()
        request.visitor.begin(ANSWER, self._request_timeout)
