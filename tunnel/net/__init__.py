"""Sockets on Trio: a stream that tries before it waits, dialing, options, addresses. (Listening: tunnel/listening.py.)

All of it is imported from here; the rooms are connection (what may be asked of it, and how it ends), sockets (receiving
and sending, TLS), dialing, options and addresses.
"""

from tunnel.net.addresses import address_text, is_localhost, is_loopback
from tunnel.net.connection import GONE, HALF_CLOSED, HERE
from tunnel.net.dialing import OUR_OWN_TROUBLE, OUT_OF_FILES, dial, reason_of
from tunnel.net.options import limit_unsent, tune
from tunnel.net.sockets import EAGER, RECORDS, RECV_SIZE, Socket, socket_of, with_tls

__all__ = [
    "EAGER",
    "GONE",
    "HALF_CLOSED",
    "HERE",
    "OUR_OWN_TROUBLE",
    "OUT_OF_FILES",
    "RECORDS",
    "RECV_SIZE",
    "Socket",
    "address_text",
    "dial",
    "is_localhost",
    "is_loopback",
    "limit_unsent",
    "reason_of",
    "socket_of",
    "tune",
    "with_tls",
]
