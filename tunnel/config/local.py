"""`-local`: which local services an agent serves, under which names."""

from __future__ import annotations

import re

from msgspec import Struct

from tunnel.config.values import parse_address, parse_tunnel_name
from tunnel.errors import ConfigError

_PORTS = {"http": 80, "https": 443}
_SOCAT = "or try socat TCP-LISTEN:3000,bind=127.0.0.1,fork UNIX-CONNECT:/path"
_EXAMPLE = "write http://localhost:3000, localhost:3000, 3000 or api=http://localhost:8000,db=tcp://localhost:5432"


class LocalService(Struct, frozen=True):
    """One local service. name: its tunnel's subdomain or full host name, "" if the core shall choose."""

    name: str
    scheme: str  # "http", "https" or "tcp"
    host: str  # without brackets
    port: int

    @property
    def address(self) -> str:
        """host:port, with brackets around IPv6."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_local(text: str, subdomain: str = "") -> tuple[LocalService, ...]:
    """The services of `-local`; `subdomain` names the only one.

    Raises ConfigError: a bad address or name, a name twice, a subdomain with several services.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"-local: no service given; {_EXAMPLE}")
    services = [_service(part) for part in parts]
    if subdomain:
        subdomain = _name(subdomain, "-subdomain")
        if len(services) > 1:
            raise ConfigError("-subdomain names one service, but -local gives several: name them there (name=address)")
        only = services[0]
        if only.name and only.name != subdomain:
            raise ConfigError(f"-subdomain={subdomain} and -local name the service differently: give one name")
        services = [LocalService(subdomain, only.scheme, only.host, only.port)]
    names = [service.name for service in services]
    if len(names) > 1 and "" in names:
        raise ConfigError(f"-local: each of several services needs a name; {_EXAMPLE}")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'-local: the name "{name}" is given twice')
    return tuple(services)


def _name(text: str, what: str) -> str:
    try:
        return parse_tunnel_name(text)
    except ValueError as exc:
        raise ConfigError(f"{what}: {exc}") from None


def _is_harmless(text: str) -> bool:
    """Safe to repeat: neither a password nor a token looks like this."""
    return bool(re.fullmatch(r"(?!.*[a-z0-9]{30})[a-z0-9.:/?#\[\]-]{1,60}", text))


def _service(part: str) -> LocalService:
    """One service. Cases: a name in front; a scheme; a port alone, host:port, or a host alone after a scheme."""
    name, equals, target = part.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9.-]*", name.strip()):
        name, target = "", part
    else:
        name, target = _name(name.strip(), "-local: a service's name"), target.strip()
    scheme, mark, rest = target.partition("://")
    if not mark:
        scheme, rest = "http", target
    scheme = scheme.lower()
    where = f'-local: the service "{name or part}"' if _is_harmless(name or part) else "-local: the service"
    if scheme in ("unix", "unix+http", "http+unix") or target.startswith(("/", "./")):
        raise ConfigError(f"{where} is a Unix socket, which is not served; let it listen on a port, {_SOCAT}")
    if scheme in ("ws", "wss"):
        raise ConfigError(f"{where} is given as {scheme.replace('ws', 'http')}://: WebSockets pass through that")
    if scheme not in ("http", "https", "tcp"):
        raise ConfigError(f"{where} needs http://, https:// or tcp://; {_EXAMPLE}")
    rest = rest.removesuffix("/") if mark else rest
    if "@" in rest:
        raise ConfigError(f"{where} must not have a user or password in its address")
    if re.search(r"[/?#]", rest):
        raise ConfigError(f"{where} must not have a path: requests keep their own; give scheme, host and port only")
    if mark and not rest:  # a shell's variable that is empty: not port 80 of this machine
        raise ConfigError(f"{where} has no address; {_EXAMPLE}")
    if rest.isascii() and rest.isdigit():
        rest = f"localhost:{rest}"
    elif mark and scheme in _PORTS and not re.search(r":\d+$|:$", rest.rpartition("]")[2]):
        rest = f"{rest}:{_PORTS[scheme]}"
    try:
        host, port = parse_address(rest)
    except ValueError as exc:
        raise ConfigError(f"{where}: {str(exc).split(' (')[-1].rstrip(')')}; {_EXAMPLE}") from None
    if not port:
        raise ConfigError(f"{where} needs a port from 1 to 65535")
    return LocalService(name, scheme, host or "localhost", port)
