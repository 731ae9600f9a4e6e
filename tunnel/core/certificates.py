"""The certificates of a listener: one, or several chosen by the name that a visitor asks for (SNI).

Connections begin with `context`; `reload` reads the files again and puts new contexts in its place, so connections
that are there keep theirs. What can't be read any more keeps its old certificate. Handshakes only look into a
dictionary: files are read at the start and in a thread.
"""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tunnel.config import CoreSettings
from tunnel.core.certificate import ensure_certificate
from tunnel.errors import ConfigError
from tunnel.log import get_logger
from tunnel.trust import explain_pair, explain_reading

log = get_logger("tunnel.core")

MAX_CERTIFICATES = 10_000  #: of a directory that are looked at
MAX_PEM = 64 * 1024  #: bytes of a file in which a key is looked for


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a certificate chain and its key are (PEM; one file may hold both)."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pair that was read. names: the DNS names that it is for; begin, expiry: seconds since 1970."""

    context: ssl.SSLContext
    names: tuple[str, ...]
    begin: float
    expiry: float
    fingerprint: str


class Certificates:
    """listener: "agent" or "public", in logs and metrics and as the beginning of the flags (-agent-cert).

    is_ours: the default was made by the core itself. is_said: another process has told already what is wrong with them
    now, and only what comes later is news. base_domain: whose names a certificate should be for, if any.
    default: for names that no other certificate is for; without one such handshakes are refused. directories: where
    more of them are (`pairs_in`). Raises ConfigError when the default, or all of them, can't be used.
    """

    def __init__(
        self,
        listener: str,
        default: Pair | None,
        directories: Sequence[Path] = (),
        *,
        is_ours: bool = False,
        is_said: bool = False,
        base_domain: str = "",
    ) -> None:
        self.listener = listener
        self.context: ssl.SSLContext
        #: hears of names (lower case) that visitors ask for and no certificate is for, within the handshake
        self.on_missing: Callable[[str], None] | None = None
        self._by_name: dict[str, Loaded] = {}
        self._default = default
        self._default_names: frozenset[str] = frozenset()
        self._directories = directories
        self._base_domain = base_domain
        self._loaded: dict[Pair, Loaded] = {}
        self._lock = trio.Lock()
        if default is not None:
            try:
                self._loaded[default] = read_pair(default)
            except ValueError as exc:
                if is_ours:
                    advice = f"remove {default.cert} and {default.key}, and the core makes new ones"
                    raise ConfigError(f"can't use a certificate of the core's own ({exc}); {advice}") from exc
                raise ConfigError(f"-{listener}-cert, -{listener}-key: {exc}") from exc
        found, problems = self._read()
        self._install(found)
        if not found:
            reasons = [reason for _, reason in problems]
            more = f" ({len(reasons) - 1} more can't be used)" if len(reasons) > 1 else ""
            where = " and ".join(map(str, directories))
            nothing = f"there is no NAME.crt or NAME.pem with its NAME.key in {where}, nor NAME/fullchain.pem"
            raise ConfigError(f"-{listener}-cert-dir: {(reasons or [nothing])[0]}{more}")
        if not is_said:
            self._complain(problems)

    @property
    def fingerprint(self) -> str:
        """sha256:… of the default certificate; "" without one."""
        return self._loaded[self._default].fingerprint if self._default is not None else ""

    @property
    def expiry(self) -> float | None:
        """When the first of them expires, in seconds since 1970; None while there is none."""
        return min((one.expiry for one in self._loaded.values()), default=None)

    def covers(self, name: str) -> Loaded | None:
        """The certificate for a host name, the default aside."""
        found = self._by_name.get(name)
        return found if found is not None else self._by_name.get(wildcard_of(name))

    def loaded_from(self, directory: Path) -> list[tuple[Pair, Loaded]]:
        """What was read from this directory."""
        return [(pair, loaded) for pair, loaded in self._loaded.items() if pair.cert.parent == directory]

    async def add(self, pair: Pair) -> Loaded:
        """Read one that is new, or has changed, and use it from now on. Raises ValueError."""
        async with self._lock:
            loaded = await trio.to_thread.run_sync(read_pair, pair)
            self._install({**self._loaded, pair: loaded})
        return loaded

    def forget(self, pair: Pair) -> None:
        """Use it no more; the default stays."""
        if pair != self._default:
            self._install({one: loaded for one, loaded in self._loaded.items() if one != pair})

    async def reload(self) -> None:
        """Read the files again. What is wrong with them is logged; never raises."""
        async with self._lock:
            found, problems = await trio.to_thread.run_sync(self._read)
            self._install(found)
        self._complain(problems)
        log.info(
            "certificates read again",
            listener=self.listener,
            certificates=len(found),
            kept=len(problems),
            expires=_date(self.expiry),
            fingerprint=self.fingerprint or "none",
        )

    def _read(self) -> tuple[dict[Pair, Loaded], list[tuple[Pair, str]]]:
        """(those to use now, what was wrong); a bad one is replaced by the one that was read before, if any."""
        pairs = [] if self._default is None else [self._default]
        problems: list[tuple[Pair, str]] = []
        for directory in self._directories:
            try:
                pairs += pairs_in(directory)
            except OSError as exc:
                problems.append((Pair(directory, directory), explain_reading(directory, exc)))
                pairs += [pair for pair in self._loaded if directory in pair.cert.parents]
        found: dict[Pair, Loaded] = {}
        for pair in pairs:
            try:
                found[pair] = read_pair(pair)
            except ValueError as exc:
                problems.append((pair, str(exc)))
                if pair in self._loaded:
                    found[pair] = self._loaded[pair]
        return found, problems

    def _install(self, found: dict[Pair, Loaded]) -> None:
        self._loaded = found
        default = found[self._default] if self._default is not None else None
        self._by_name = by_name(loaded for pair, loaded in found.items() if pair != self._default)
        self._default_names = frozenset(default.names if default is not None else ())
        context = default.context if default is not None else _server_context()
        if self._by_name or self._directories or default is None:
            context.sni_callback = self._choose
        self.context = context

    def _choose(self, connection: Any, name: str | None, _: ssl.SSLContext) -> int | None:
        """OpenSSL asks during a handshake; whatever is returned is an alert."""
        wanted = name.lower().removesuffix(".") if name else ""
        found = self.covers(wanted)
        if found is not None:
            connection.context = found.context
            return None
        if wanted and self.on_missing is not None and self._default_names.isdisjoint({wanted, wildcard_of(wanted)}):
            self.on_missing(wanted)
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME if self._default is None else None

    def _complain(self, problems: Iterable[tuple[Pair, str]]) -> None:
        for pair, reason in problems:
            old = pair in self._loaded
            message = "can't use a certificate; the old one stays" if old else "can't use a certificate"
            log.error(message, listener=self.listener, file=str(pair.cert), error=reason)
        now = time.time()
        for pair, loaded in self._loaded.items():
            about: dict[str, Any] = {"listener": self.listener, "file": str(pair.cert)}
            if loaded.expiry < now:
                advice = "put a new one in its place, then send the core a SIGHUP"
                log.warning("certificate has expired", **about, expired=_date(loaded.expiry), advice=advice)
            elif loaded.begin > now:
                advice = f"it begins at {_date(loaded.begin)}; is this machine's clock right?"
                log.warning("certificate is not valid yet", **about, advice=advice)
        self._complain_of_names()

    def _complain_of_names(self) -> None:
        """Where no certificate is for any name below the base domain, browsers warn every visitor."""
        below = "." + self._base_domain
        names = sorted({name for loaded in self._loaded.values() for name in loaded.names})
        if self._base_domain and self._loaded and not any(name.endswith(below) for name in names):
            advice = f"browsers will warn those who open NAME{below}: get one for *{below}, or correct -base-domain"
            log.warning("no certificate is for the tunnels' names", listener=self.listener, names=names, advice=advice)


def for_agents(settings: CoreSettings, data_dir: Path, *, is_said: bool = False) -> Certificates | None:
    """Of the agents' links: the one given, or a self-made one. None without TLS. Raises ConfigError."""
    if not settings.agent_tls:
        return None
    if settings.agent_cert:
        return Certificates("agent", _pair(settings.agent_cert, settings.agent_key), is_said=is_said)
    return Certificates("agent", Pair(*ensure_certificate(data_dir)), is_ours=True, is_said=is_said)


def for_visitors(settings: CoreSettings, issued: Path | None = None, *, is_said: bool = False) -> Certificates | None:
    """issued: where certificates lie that the core gets itself; until it has them a self-made one is the default.

    None without TLS. Raises ConfigError.
    """
    if not settings.public_tls:
        return None
    default = _pair(settings.public_cert, settings.public_key) if settings.public_cert else None
    is_ours = issued is not None and default is None
    base_domain = "" if issued is not None else settings.base_domain  # else they come when somebody asks for them
    directories = [Path(settings.public_cert_dir)] if settings.public_cert_dir else []
    if issued is not None:
        default = default or Pair(*ensure_certificate(issued.parent, "self-signed"))
        directories.append(issued)
    return Certificates("public", default, directories, is_ours=is_ours, is_said=is_said, base_domain=base_domain)


def _pair(cert: str, key: str) -> Pair:
    return Pair(Path(cert), Path(key or cert))


def pairs_in(directory: Path) -> list[Pair]:
    """The pairs of a directory: NAME.crt or NAME.pem with NAME.key, NAME.pem that holds both, and NAME/fullchain.pem
    with NAME/privkey.pem.

    The last is how certbot keeps them (/etc/letsencrypt/live). Raises OSError.
    """
    pairs: list[Pair] = []
    for path in sorted(directory.iterdir())[:MAX_CERTIFICATES]:
        if path.name.startswith("."):
            continue
        if path.suffix in (".crt", ".pem") and path.with_suffix(".key").exists():
            pairs.append(Pair(path, path.with_suffix(".key")))
        elif path.suffix == ".pem" and _has_key(path):
            pairs.append(Pair(path, path))
        elif (path / "fullchain.pem").exists():
            pairs.append(Pair(path / "fullchain.pem", path / "privkey.pem"))
    return pairs


def _has_key(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"PRIVATE KEY-----" in file.read(MAX_PEM)
    except OSError:
        return False


def by_name(certificates: Iterable[Loaded]) -> dict[str, Loaded]:
    """By DNS name, wildcards as they are written; of two for one name the one that lasts longer."""
    found: dict[str, Loaded] = {}
    for one in certificates:
        for name in one.names:
            if name not in found or found[name].expiry < one.expiry:
                found[name] = one
    return found


def wildcard_of(name: str) -> str:
    return "*." + name.partition(".")[2]


def read_pair(pair: Pair) -> Loaded:
    """A server's context from files. Raises ValueError that says which of them is wrong, and what to do."""
    from cryptography import x509  # late: only where there is TLS
    from cryptography.hazmat.primitives.hashes import SHA256

    context = _server_context()
    try:
        context.load_cert_chain(pair.cert, pair.key, password=lambda: b"")
        leaf = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    except (OSError, ValueError) as exc:
        raise ValueError(explain_pair(pair.cert, pair.key, exc)) from exc
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = tuple(name.lower() for name in names.get_values_for_type(x509.DNSName))
    except Exception:  # none, or one that OpenSSL takes and cryptography does not: then it is chosen by no name
        dns = ()
    begin, expiry = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return Loaded(context, dns, begin, expiry, "sha256:" + leaf.fingerprint(SHA256()).hex())


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _date(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def ignore_odd_names() -> None:
    """Keep quiet about server names that are no ASCII: ssl decodes them itself and prints what it could not.

    The handshake fails all the same. Anybody can send such a name, and standard error is not theirs.
    """
    before = sys.unraisablehook

    def hook(args: Any) -> None:
        if not (isinstance(args.exc_value, UnicodeDecodeError) and isinstance(args.object, bytes)):
            before(args)

    sys.unraisablehook = hook
