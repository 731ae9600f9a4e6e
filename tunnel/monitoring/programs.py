"""Where Prometheus and Alertmanager are on this machine."""

from __future__ import annotations

import os
import shutil

from tunnel.errors import ConfigError

#: Debian's Alertmanager has a longer name than everybody else's
NAMES = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}

#: where packages put them, for a PATH that lacks it (Debian, then Homebrew on Apple silicon and on Intel)
PLACES = ("/usr/bin", "/opt/homebrew/bin", "/usr/local/bin")

INSTALL = (
    "install them with `sudo apt-get install --no-install-recommends prometheus prometheus-alertmanager` "
    "or `brew install prometheus alertmanager`"
)


def find_programs() -> dict[str, str]:
    """The paths of both. Raises ConfigError with what to install."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *PLACES])
    found: dict[str, str] = {}
    for program, names in NAMES.items():
        where = next((where for name in names if (where := shutil.which(name, path=path))), None)
        if where is not None:
            found[program] = where
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not found on this machine: {INSTALL}")
    return found
