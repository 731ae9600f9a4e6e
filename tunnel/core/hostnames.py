"""Names that visitors type: of a Host field, as asked for by an agent, and made up for one that asks for none."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from functools import lru_cache

from tunnel.errors import Refused

_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_REQUESTED = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
_PORT = re.compile(r":\d{0,5}")

_ADJECTIVES = """amber ample apt arctic autumn azure bold brave breezy bright brisk calm candid cheery civil clear clever
cobalt coral cosmic cosy crisp curious daring dapper deft early eager easy fair fancy fleet fond fresh frosty gentle
glad golden grand green happy hardy hazel honest humble ideal indigo ivory jade jolly keen kind lively loyal lucid lucky
lunar maple mellow merry mighty mild misty modest neat nimble noble olive opal open patient pearl placid polar polite
proud prime quick quiet rapid ready robust rosy royal ruby rustic sage sandy scarlet serene sharp shiny silent silver
sincere sleek smart smooth snowy social solar solid sound spry stable steady still sturdy sunny super sure swift tender
tidy topaz tranquil trim true trusty upbeat urban valid velvet vivid warm wavy wild willing winter wise witty worthy
young zesty""".split()
_NOUNS = """acorn alder anchor antler apple apricot aspen badger bamboo basil bay beach beacon bear beaver beech birch
bison bloom bridge brook cabin camel canoe canyon cedar cherry cliff cloud clover comet condor coral cove crane creek
crow dawn deer delta dolphin dove dune eagle elk elm ember falcon fern ferry field finch fir fjord flame forest fox
garden gecko glacier glade grove gull harbor hare hawk hazel heron hill ibis iris island ivy jay juniper kestrel kite
koala lagoon lake lantern lark laurel leaf lemon lily lion llama lotus lynx magpie mango maple marten meadow mesa mint
moon moose moss nectar oak oasis ocean olive orca orchid osprey otter owl palm panda peak pebble pelican pine plover
pond poplar prairie puffin quail quartz rabbit raven reef ridge river robin rose""".split()


def readable_name(account_id: str, agent_id: str, local: str) -> str:
    """A subdomain for an agent that asked for none: the same for the same account, agent and service, hard to guess."""
    digest = hashlib.sha256("\0".join((account_id, agent_id, local)).encode()).digest()
    adjective = _ADJECTIVES[int.from_bytes(digest[:4], "big") % len(_ADJECTIVES)]
    noun = _NOUNS[int.from_bytes(digest[4:8], "big") % len(_NOUNS)]
    tail = "".join("abcdefghjkmnpqrstvwxyz23456789"[byte % 30] for byte in digest[8:13])
    return f"{adjective}-{noun}-{tail}"


def check_name(name: str) -> str:
    """A requested subdomain (one label) or full host name, in lower case. Raises Refused(bad_name)."""
    lower = name.strip().rstrip(".").lower()
    if not lower.isascii():
        try:
            lower = lower.encode("idna").decode("ascii")
        except UnicodeError:
            raise Refused("bad_name", "the name can't be written as a host name") from None
    if len(lower) > 253 or _REQUESTED.fullmatch(lower) is None:
        raise Refused("bad_name", "a name is made of letters, digits and hyphens, up to 63 between dots")
    if _is_address(lower):
        raise Refused("bad_name", "an IP address is no tunnel name")
    return lower


@lru_cache(maxsize=4096)
def normalise_host(host: bytes) -> str:
    """A Host field's name: lower case, no port, no dot at the end; "" for an empty field. Raises ValueError."""
    try:
        text = host.decode("ascii").lower()
    except UnicodeDecodeError:
        raise ValueError("the Host field is not ASCII") from None
    if text.startswith("["):
        address, closed, port = text[1:].partition("]")
        if not closed or (port and _PORT.fullmatch(port) is None):
            raise ValueError("the Host field is malformed")
        return f"[{ipaddress.IPv6Address(address)}]"
    name, colon, port = text.partition(":")
    if colon and _PORT.fullmatch(colon + port) is None:
        raise ValueError("the Host field is malformed")
    name = name.removesuffix(".")
    if name and (len(name) > 253 or _NAME.fullmatch(name) is None):
        raise ValueError("the Host field is malformed")
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
