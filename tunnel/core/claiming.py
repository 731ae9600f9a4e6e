"""Which names an account may claim, and how many: decided in the store, so it holds over links, workers and cores.

In the order in which it is looked at:

1. What an administrator has reserved is its account's, whatever stands above or below it, and counts for no limit.
2. The base domain itself is nobody's who has not reserved it.
3. Below the base domain whoever has a name has all below it: `x.alice.tunnel.example` is had only together with
   `alice`, which is claimed with it. Where something above is reserved, its account may have the name, and no other.
4. Elsewhere in the DNS nobody claims below a name that another account has reserved, serves or holds. Who was there
   first stays: a name is not lost because somebody claims one above it.
5. An account has so many claims at most, in use or held.

Claims are looked at one after the other (records.lock_claims), for each depends on others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tunnel.core.domain import Domain
from tunnel.core.quotas import over_limit
from tunnel.core.records import chunks, lock_claims, upsert
from tunnel.core.tables import accounts, claims, tunnels
from tunnel.errors import Refused

#: seconds that the clocks of cores with one store may be apart
_CLOCKS_APART = 60.0
#: seconds that a name in use is safe at least after it was written, however short it is held later: several times the
#: interval at which that can happen, and below what clocks may be apart
SAFE = 30.0


def claim_names(
    conn: sa.Connection,
    names: Collection[str],
    account_id: str,
    now: float,
    held_since: float,
    domain: Domain,
    most: float,
) -> tuple[list[str], int]:
    """All or none. The names that are the account's claims now, with those above that came with them, and how many
    claims it has then. most: how many it may have. Raises Refused: name_reserved, name_taken, name_quota.
    """
    lock_claims(conn)
    above = {name: domain.above(name) for name in names}
    related = {one for name, those in above.items() if those for one in (name, *those)}
    reserved = _find_reserved(conn, related | set(names))
    there = _There(domain, account_id, reserved, _find_holders(conn, related, held_since))
    wanted: set[str] = set()
    under_reserved: set[str] = set()
    for name in names:
        if there.has_reserved(name):
            continue
        parents, is_own = there.look_above(name, above[name])
        wanted.update((name, *parents))
        if is_own:
            under_reserved.add(name)
    _write(conn, wanted, account_id, now, held_since, under_reserved)
    count = count_claims(conn, [account_id]).get(account_id, 0)
    if wanted and count > most:  # a few may have run out since `forget_claims`
        count = count_claims(conn, [account_id], held_since).get(account_id, 0)
    if wanted and count > most:
        raise Refused("name_quota", over_limit("names", most, account_id))
    return sorted(wanted), count


@dataclass(frozen=True, slots=True)
class _There:
    """Who has what of the names that a claim is about and of those above them, by name: account ids."""

    domain: Domain
    account_id: str
    reserved: dict[str, str]
    holders: dict[str, str]

    def has_reserved(self, name: str) -> bool:
        """Rules 1 and 2. Raises Refused where the name itself is not to be claimed."""
        owner = self.reserved.get(name)
        if owner not in (None, self.account_id):
            raise Refused("name_reserved", f"the name {name} is reserved for another account")
        if owner is None and name == self.domain.apex:
            raise _apex_refused(name)
        return owner is not None

    def look_above(self, name: str, above: Sequence[str]) -> tuple[list[str], bool]:
        """Rules 3 and 4: the names that are claimed with this one, and whether the account has reserved one above it,
        so that no claim of another account counts. Raises Refused."""
        decides = next((parent for parent in above if parent in self.reserved), None)
        if decides is not None:
            if self.reserved[decides] != self.account_id:
                raise _below_refused(self.domain, name, decides, "name_reserved", "reserved for")
            return [], True
        is_here = bool(self.domain.above_here(name))
        is_first = not is_here and self.holders.get(name) == self.account_id
        for parent in above:
            holder = self.holders.get(parent)
            if holder == self.account_id and not is_here:
                break
            if holder not in (None, self.account_id) and not is_first:
                raise _below_refused(self.domain, name, parent, "name_taken", "in use by or held for")
        return (list(above) if is_here else []), False


def _find_accounts(conn: sa.Connection, ids: Collection[str]) -> set[str]:
    found: set[str] = set()
    for chunk in chunks(ids):
        found.update(conn.execute(sa.select(accounts.c.id).where(accounts.c.id.in_(chunk))).scalars())
    return found


def _find_reserved(conn: sa.Connection, names: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for chunk in chunks(names):
        query = sa.select(tunnels.c.name, tunnels.c.account_id).where(tunnels.c.name.in_(chunk))
        found.update({row.name: row.account_id for row in conn.execute(query)})
    return found


def _find_holders(conn: sa.Connection, names: Collection[str], held_since: float) -> dict[str, str]:
    found: dict[str, str] = {}
    for chunk in chunks(names):
        query = sa.select(claims.c.name, claims.c.account_id)
        query = query.where(claims.c.name.in_(chunk), claims.c.seen_at >= held_since)
        found.update({row.name: row.account_id for row in conn.execute(query)})
    return found


def _write(
    conn: sa.Connection, names: Collection[str], account_id: str, now: float, held_since: float, own: Collection[str]
) -> None:
    """own: of these no claim of another account counts."""
    for chunk in chunks(names):
        rows = [{"name": name, "account_id": account_id, "seen_at": now} for name in chunk]
        insert = upsert(conn, claims).values(rows)
        free = sa.or_(claims.c.account_id == account_id, claims.c.seen_at < held_since, claims.c.name.in_(own))
        changed = insert.on_conflict_do_update(
            index_elements=["name"], set_={"account_id": account_id, "seen_at": now}, where=free
        )
        won = set(conn.execute(changed.returning(claims.c.name)).scalars())
        lost = [name for name in chunk if name not in won]
        if lost:
            raise Refused("name_taken", f"the name {lost[0]} is in use by another account, or was until a moment ago")


def _apex_refused(name: str) -> Refused:
    text = f"the name {name} is the base domain itself: the core's operator gives it (tunnel reserve {name} ACCOUNT)"
    return Refused("name_reserved", text)


def _below_refused(domain: Domain, name: str, parent: str, reason: str, how: str) -> Refused:
    return Refused(
        reason,
        f"the name {name} is below {domain.host_of(parent)}, which is {how} another account; choose another one, or "
        f"ask the core's operator for it (tunnel reserve {name} ACCOUNT)",
    )


def count_claims(conn: sa.Connection, account_ids: Collection[str], held_since: float | None = None) -> dict[str, int]:
    """Names in use or held, none that is reserved, by account. Without `held_since` also those that ran out and are not
    forgotten yet, which takes a look at the index only."""
    found: dict[str, int] = {}
    for chunk in chunks(account_ids):
        query = sa.select(claims.c.account_id, sa.func.count().label("count")).where(claims.c.account_id.in_(chunk))
        if held_since is not None:
            query = query.where(claims.c.seen_at >= held_since)
        found.update({row.account_id: row.count for row in conn.execute(query.group_by(claims.c.account_id))})
    return found


def find_lost_names(conn: sa.Connection, names: Mapping[str, str], domain: Domain) -> dict[str, Refused]:
    """Of these names (name → account id) those that are the account's no longer, and why: reserved for another one, or
    below what is, or the base domain and reserved no more; or there is no such account any more."""
    there = _find_accounts(conn, set(names.values()))
    above = {name: those for name in names if (those := domain.above(name))}
    reserved = _find_reserved(conn, {*names, *(one for those in above.values() for one in those)})
    lost: dict[str, Refused] = {}
    for name, account_id in names.items():
        decides = next((one for one in (name, *above.get(name, ())) if one in reserved), None)
        if account_id not in there:
            lost[name] = Refused("account_disabled", "the account is no longer there")
        elif decides is None:
            if name == domain.apex:
                lost[name] = _apex_refused(name)
        elif reserved[decides] != account_id:
            if decides == name:
                lost[name] = Refused("name_reserved", f"the name {name} is reserved for another account")
            else:
                lost[name] = _below_refused(domain, name, decides, "name_reserved", "reserved for")
    return lost


def name_owner(conn: sa.Connection, name: str, held_since: float, domain: Domain) -> str | None:
    """The id of the account that has reserved the name, or holds it: in use at `held_since` or later."""
    owner = _find_reserved(conn, [name]).get(name)
    if owner is None and name != domain.apex:
        owner = _find_holders(conn, [name], held_since).get(name)
    return owner


def touch_names(conn: sa.Connection, names: Mapping[str, str], now: float) -> set[tuple[str, str]]:
    """These claims (name → account id) were in use until now. Returns those that there are."""
    lock_claims(conn)
    there: set[tuple[str, str]] = set()
    for account_id, owned in sorted(by_account(names).items()):
        for chunk in chunks(owned):
            mine = sa.and_(claims.c.name.in_(chunk), claims.c.account_id == account_id)
            touched = sa.update(claims).where(mine).values(seen_at=now).returning(claims.c.name)
            there.update((name, account_id) for name in conn.execute(touched).scalars())
    return there


def by_account(names: Mapping[str, str]) -> dict[str, list[str]]:
    """names: name → account id."""
    found: dict[str, list[str]] = {}
    for name, account_id in names.items():
        found.setdefault(account_id, []).append(name)
    return found


def find_unclaimed(
    conn: sa.Connection, names: Mapping[str, str], there: Collection[tuple[str, str]], domain: Domain
) -> dict[str, str]:
    """Of these names in use (name → account id) those whose claim is missing, or one that comes with it. there: claims
    of them, and of those above. A name that is reserved needs none."""
    missing: dict[str, list[str]] = {}  # which claims, by name
    for name, account_id in names.items():
        if those := [one for one in (name, *domain.above_here(name)) if (one, account_id) not in there]:
            missing[name] = those
    if not missing:
        return {}
    above = {name: domain.above(name) for name in missing}
    reserved = _find_reserved(conn, {*missing, *(one for those in above.values() for one in those)})
    has_account = _find_accounts(conn, {names[name] for name in missing})
    found: dict[str, str] = {}
    for name, those in missing.items():
        is_alone = any(one in reserved for one in above[name])  # below what is reserved nothing comes with it
        if name not in reserved and names[name] in has_account and (name in those or not is_alone):
            found[name] = names[name]
    return found


def keep_claim(conn: sa.Connection, name: str, account_id: str, now: float) -> None:
    """The account had the name reserved, and may be serving it: it is its claim now, as of one whose link has gone."""
    lock_claims(conn)
    insert = upsert(conn, claims).values(name=name, account_id=account_id, seen_at=now)
    newest = {"account_id": account_id, "seen_at": now}
    conn.execute(insert.on_conflict_do_update(index_elements=["name"], set_=newest))


def give_up_claims(conn: sa.Connection, names: Collection[str], account_id: str) -> None:
    """The account is to have them no longer, whoever serves them."""
    lock_claims(conn)
    for chunk in chunks(names):
        conn.execute(sa.delete(claims).where(claims.c.name.in_(chunk), claims.c.account_id == account_id))


def forget_claims(conn: sa.Connection, now: float, held_since: float, domain: Domain) -> None:
    """Those of all accounts that ran out, and one of the base domain, which is reserved or nobody's: a command that was
    not told of it makes one. It looks at every claim: for now and then, not for each agent that leaves.

    A claim from the future was made by a clock that was wrong: it counts from now, or it would last until then.
    """
    lock_claims(conn)
    conn.execute(sa.delete(claims).where(sa.or_(claims.c.seen_at < held_since, claims.c.name == domain.apex)))
    conn.execute(sa.update(claims).where(claims.c.seen_at > now + _CLOCKS_APART).values(seen_at=now))
