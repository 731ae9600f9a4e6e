"""Who may attach: an agent's token or JWT is looked at when it comes, and whether it still holds while it stays."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from tunnel.core import records
from tunnel.core.live import AccountRows, LiveAccounts, Seen
from tunnel.core.quotas import Limits
from tunnel.core.records import TokenRecord
from tunnel.core.store import Store
from tunnel.core.tokens import MAX_LENGTH, PREFIX, Grant, JwtVerifier, hash_token, is_hash_equal
from tunnel.errors import Refused
from tunnel.handler import Visit

UNKNOWN_TOKEN = "the token is not known here; is it of this core? Its operator makes one with `token create`"


class Authenticating(LiveAccounts):
    """All arguments: as for `Accounts`. Raises ConfigError for an unusable JWT key."""

    def __init__(
        self,
        store: Store,
        defaults: Limits,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
        rows: AccountRows | None,
        jwt_secret: str,
        jwt_public_key: str,
    ) -> None:
        super().__init__(store, defaults, wall, monotonic, rows)
        self._jwt = JwtVerifier(jwt_secret, jwt_public_key, wall) if jwt_secret or jwt_public_key else None
        self._expiries: list[float] = []  # in order, each once: when granted tokens run out

    async def authenticate(self, token: str, agent_id: str, parent: Visit | None = None) -> Grant:
        """Who is this? agent_id: as the agent states it; a JWT's own wins where the agent says "".

        Raises Refused (missing_token, bad_token, revoked, expired, account_disabled) or StoreError.
        """
        if not token:
            raise Refused("missing_token", "no token was given")
        if len(token) > MAX_LENGTH:
            raise Refused("bad_token", "the token is too long")
        if token.startswith(PREFIX):
            return await self._by_token(token, agent_id, parent)
        if self._jwt is None:
            raise Refused("bad_token", UNKNOWN_TOKEN)
        claims = self._jwt.verify(token, agent_id)
        account = await self.load(claims.account_id, parent)
        if account.is_disabled:
            raise Refused("account_disabled", f"account {account.name} is disabled")
        self._expect(claims.expires_at)
        return Grant(account.id, account.name, claims.agent_id, "", claims.expires_at)

    async def _by_token(self, token: str, agent_id: str, parent: Visit | None) -> Grant:
        hash = hash_token(token)
        while True:
            revision, record, account = await self._store.query(
                "token.find", lambda conn: records.find_token(conn, hash), parent=parent
            )
            if revision >= self._revision:  # else it was changed while we read
                break
        if record is None or account is None or not is_hash_equal(record.hash, hash):
            raise Refused("bad_token", UNKNOWN_TOKEN)
        refused = self._check_token(record)
        if refused is not None:
            raise refused
        if account.is_disabled:
            raise Refused("account_disabled", f"account {account.name} is disabled")
        self._tokens[record.id] = Seen(revision, record)
        await self.load(account.id, parent)
        self._usage.note_token(record.id)
        self._expect(record.expires_at)
        grant = Grant(account.id, account.name, agent_id, record.id, record.expires_at)
        refused = self.check(grant)
        if refused is not None:
            raise refused
        return grant

    def _expect(self, expires_at: float | None) -> None:
        if expires_at is None:
            return
        place = bisect_left(self._expiries, expires_at)
        if self._expiries[place : place + 1] != [expires_at]:
            self._expiries.insert(place, expires_at)

    def _check_token(self, record: TokenRecord) -> Refused | None:
        if record.revoked_at is not None:
            return Refused("revoked", f"the token {_shown(record)} was revoked")
        if record.expires_at is not None and record.expires_at <= self._wall():
            return Refused("expired", f"the token {_shown(record)} has expired")
        return None

    def check(self, grant: Grant) -> Refused | None:
        """Does the grant still hold, by what was last seen of the store and by its expiry? For attached agents."""
        account = self._accounts.get(grant.account_id)
        if account is None or account.is_deleted:
            return Refused("account_disabled", f"account {grant.account} is no longer there")
        if account.is_disabled:
            return Refused("account_disabled", f"account {grant.account} is disabled")
        if grant.token_id:
            seen = self._tokens.get(grant.token_id)
            return Refused("revoked", "the token was revoked") if seen is None else self._check_token(seen.record)
        if grant.expires_at is not None and grant.expires_at <= self._wall():
            return Refused("expired", "the JWT has expired")
        return None


def _shown(token: TokenRecord) -> str:
    """As `token list` knows it: its first characters would be masked in the log."""
    return f"{token.id} ({token.name})" if token.name else token.id
