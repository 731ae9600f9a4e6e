"""Names that visitors type: of a Host field, as asked for by an agent, and made up for one that asks for none."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from functools import lru_cache

from tunnel.core.domain import MAX_LABELS
from tunnel.errors import Refused

_LABEL = r"(?![_-])[a-z0-9_-]{1,63}(?<!-)"
_VISITED = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_LETTERS = re.compile(r"[a-z0-9.-]*")
_PORT = re.compile(r":([0-9]{0,5})")

_TAIL = "23456789bcdfghjkmnpqrstvwxz"  # no vowels, no words; nothing that is read as another one
_ADJECTIVES = """
amber ample apt arctic autumn azure bold brave breezy bright brisk calm candid cheery civil clear clever cobalt
coral cosmic cosy crisp curious daring dapper deft early eager easy fair fancy fleet fond fresh frosty gentle glad
golden grand green happy hardy hazel honest humble ideal indigo ivory jade jolly keen kind lively loyal lucid lucky
lunar maple mellow merry mighty mild misty modest neat nimble noble olive opal open patient pearl placid polar
polite proud prime quick quiet rapid ready robust rosy royal ruby rustic sage sandy scarlet serene sharp shiny
silent silver sincere sleek smart smooth snowy social solar solid sound spry stable steady still sturdy sunny super
sure swift tender tidy topaz tranquil trim true trusty upbeat urban valid velvet vivid warm wavy wild willing winter
wise witty worthy young zesty
""".split()
_NOUNS = """
acorn alder anchor antler apple apricot aspen badger bamboo basil bay beach beacon bear beaver beech birch bison
bloom bridge brook cabin camel canoe canyon cedar cherry cliff cloud clover comet condor coral cove crane creek crow
dawn deer delta dolphin dove dune eagle elk elm ember falcon fern ferry field finch fir fjord flame forest fox
garden gecko glacier glade grove gull harbor hare hawk hazel heron hill ibis iris island ivy jay juniper kestrel
kite koala lagoon lake lantern lark laurel leaf lemon lily lion llama lotus lynx magpie mango maple marten meadow
mesa mint moon moose moss nectar oak oasis ocean olive orca orchid osprey otter owl palm panda peak pebble pelican
pine plover pond poplar prairie puffin quail quartz rabbit raven reef ridge river robin rose
""".split()


def readable_name(account_id: str, agent_id: str, local: str) -> str:
    """A subdomain for an agent that asked for none: the same for the same account, agent and service, hard to guess."""
    digest = hashlib.sha256("\0".join((account_id, agent_id, local)).encode()).digest()
    adjective = _ADJECTIVES[int.from_bytes(digest[:4], "big") % len(_ADJECTIVES)]
    noun = _NOUNS[int.from_bytes(digest[4:8], "big") % len(_NOUNS)]
    tail = "".join(_TAIL[byte % len(_TAIL)] for byte in digest[8:12])
    return f"{adjective}-{noun}-{tail}"


def check_name(name: str) -> str:
    """A requested subdomain (one label) or full host name, in lower case ASCII. Raises Refused(bad_name)."""
    if len(name) > 1000:
        raise _bad("a name is not longer than 253 characters")
    lower = name.strip().lower()
    if not lower.isascii():
        try:
            lower = lower.encode("idna").decode("ascii")
        except UnicodeError:
            raise _bad("the name can't be written as a host name") from None
    lower = lower.removesuffix(".")
    why = _fault(lower)
    if why:
        raise _bad(why)
    return lower


def _fault(name: str) -> str:
    """What is wrong with a name, "" for nothing."""
    if not name:
        return "the name is empty"
    if len(name) > 253:
        return "a name is not longer than 253 characters"
    if _LETTERS.fullmatch(name) is None:
        return "a name has only letters, digits and hyphens, and dots in a full host name"
    if name.startswith("."):
        return "a name never begins with a dot"
    if ".." in name:
        return "a name never has two dots in a row"
    labels = name.split(".")
    if len(labels) > MAX_LABELS:
        return f"a name has at most {MAX_LABELS} parts"
    for label in labels:
        if label.startswith("-") or label.endswith("-"):
            return "no part of a name begins or ends with a hyphen"
        if len(label) > 63:
            return "no part of a name is longer than 63 characters"
    return "an IP address is no tunnel name" if _is_address(name) else ""


def _bad(text: str) -> Refused:
    return Refused("bad_name", text)


@lru_cache(maxsize=4096)
def normalise_host(host: bytes | str) -> str:
    """A Host field's name: lower case, no port, no dot at the end; IPv6 in brackets. Raises ValueError."""
    malformed = ValueError("the Host field is malformed")
    try:
        text = (host.decode("ascii") if isinstance(host, bytes) else host.encode("ascii").decode()).lower()
    except UnicodeError:
        raise malformed from None
    if len(text) > 300:
        raise malformed
    if text.startswith("["):
        address, closed, port = text[1:].partition("]")
        if not closed or "%" in address:
            raise malformed
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise malformed from None
        name = f"[{address}]"
    else:
        name, colon, port = text.partition(":")
        port = colon + port
        name = name.removesuffix(".")
        if len(name) > 253 or _VISITED.fullmatch(name) is None:
            raise malformed
    if port:
        match = _PORT.fullmatch(port)
        if match is None or int(match[1] or 0) > 65535:
            raise malformed
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
