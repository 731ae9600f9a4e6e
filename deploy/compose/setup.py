"""Before the stack's first start: volumes for their owners, a password for Grafana, Alertmanager's secrets in place.

`python setup.py NAME=UID …`: the volumes under /volumes and whose they are. Safe to run at each start; what is there
stays. It is the only service that runs as root, once, without a network.
"""

import os
import secrets
import sys
from pathlib import Path

VOLUMES = Path("/volumes")
SECRETS = Path("/secrets")  # deploy/secrets, read-only
ALERTMANAGER = ("slack_url", "pagerduty_key")


def prepare(volumes: Path, given: Path, owners: dict[str, int]) -> list[str]:
    """Do it; returns what a person should know, a line each. Raises OSError."""
    for name, uid in owners.items():
        (volumes / name).chmod(0o700)
        os.chown(volumes / name, uid, -1)
    said = []
    password = volumes / "grafana-secrets" / "password"
    if not password.exists():
        write(password, secrets.token_urlsafe(24), owners["grafana-secrets"])
        said.append("made a password for Grafana's user admin: docker compose exec grafana cat /run/grafana/password")
    for name in ALERTMANAGER:
        source, target = given / name, volumes / "alertmanager-secrets" / name
        if source.exists():
            write(target, source.read_text(), owners["alertmanager-secrets"])
        elif not target.exists():
            said.append(f"there is no deploy/secrets/{name}: alerts that need it are not delivered")
    return said


def write(path: Path, text: str, uid: int) -> None:
    """A file that only its owner can read, from its first moment, whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400), "w", encoding="utf-8") as file:
        file.write(text)
        os.fchown(file.fileno(), uid, -1)
    draft.replace(path)


def main(argv: list[str]) -> int:
    """Exit code 1 if something can't be done: the stack does not start then."""
    owners = {name: int(uid) for name, _, uid in (word.partition("=") for word in argv)}
    try:
        for line in prepare(VOLUMES, SECRETS, owners):
            print(f"setup: {line}")
    except OSError as exc:
        print(f"setup: can't prepare {exc.filename}: {exc.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
