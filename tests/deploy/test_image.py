"""The image and what prepares the stack's volumes: deploy/Dockerfile by its words, deploy/compose/setup.py run."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
from replay import Image, replay
from stackfile import DEPLOY, FILE, OURS, ROOT, SERVICES, volumes

from tunnel import __version__

# Setup ----------------------------------------------------------------------------------------------------------


def run_setup(place: Path, *owners: str) -> subprocess.CompletedProcess[str]:
    """deploy/compose/setup.py with its two directories under `place`."""
    code = (DEPLOY / "compose" / "setup.py").read_text()
    for name in ("volumes", "secrets"):
        assert f'Path("/{name}")' in code
        code = code.replace(f'Path("/{name}")', f"Path({str(place / name)!r})")
    (place / "setup.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-I", str(place / "setup.py"), *owners],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("grafana-secrets", "alertmanager-secrets", "core"):
        (tmp_path / "volumes" / name).mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    return tmp_path


def owners() -> list[str]:
    return [f"{name}={os.getuid()}" for name in ("grafana-secrets", "alertmanager-secrets", "core")]


def test_setup_makes_a_password_once_and_brings_the_secrets(place: Path) -> None:
    (place / "secrets" / "slack_url").write_text("https://hooks.example.com/word\n")
    first = run_setup(place, *owners())
    assert first.returncode == 0, first.stderr
    password = place / "volumes" / "grafana-secrets" / "password"
    word = password.read_text()
    assert len(word) == 32 and stat.S_IMODE(password.stat().st_mode) == 0o400
    slack = place / "volumes" / "alertmanager-secrets" / "slack_url"
    assert slack.read_text() == "https://hooks.example.com/word\n" and stat.S_IMODE(slack.stat().st_mode) == 0o400
    assert stat.S_IMODE((place / "volumes" / "core").stat().st_mode) == 0o700
    assert "grafana/password" in first.stdout and "no deploy/secrets/pagerduty_key" in first.stdout
    assert word not in first.stdout and "hooks" not in first.stdout

    (place / "secrets" / "slack_url").write_text("https://hooks.example.com/other\n")
    second = run_setup(place, *owners())
    assert second.returncode == 0, second.stderr
    assert password.read_text() == word and "password" not in second.stdout
    assert slack.read_text() == "https://hooks.example.com/other\n"
    assert {path.name for path in slack.parent.iterdir()} == {"slack_url"}


def test_setup_that_fails_says_so_in_one_line(place: Path) -> None:
    (place / "volumes" / "core").rmdir()
    done = run_setup(place, *owners())
    assert done.returncode == 1
    assert done.stderr == f"setup: can't prepare {place / 'volumes' / 'core'}: No such file or directory\n"


def test_secrets_stay_out_of_the_repository() -> None:
    assert (DEPLOY / "secrets" / ".gitignore").read_text().splitlines()[1:] == ["*", "!.gitignore"]


# The image ------------------------------------------------------------------------------------------------------

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
STEPS = [
    line.split(None, 1)
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]  # fmt: skip


def test_the_image_is_pinned_and_not_root() -> None:
    assert DOCKERFILE.count("ARG PYTHON=") == 1 and re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.M)
    assert [rest for word, rest in STEPS if word == "FROM"] == ["python:${PYTHON} AS build", "python:${PYTHON}"]
    assert [rest for word, rest in STEPS if word == "USER"] == ["10001:10001"]
    words = [word for word, _ in STEPS]
    assert "ADD" not in words and words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")


def test_the_build_asks_the_package_index_only() -> None:
    runs = " ".join(rest for word, rest in STEPS if word == "RUN")
    assert not re.search(r"\b(apt|apt-get|apk|curl|wget|git)\b|https?:", runs)
    assert runs.count("pip wheel") == 1 and "--no-index --find-links /wheels" in runs


def test_the_build_sees_what_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for word, rest in STEPS if word == "COPY" and "--from" not in rest for source in rest.split()[:-1]}
    assert let_in == copied and all((ROOT / name).exists() for name in copied)
    assert ignored[1] == "*"


def test_the_image_is_of_this_version_and_has_its_directories() -> None:
    assert {SERVICES[name]["image"] for name in OURS} == {f"trio-tunnel:{__version__}"}
    assert f"trio-tunnel:{__version__}" in DOCKERFILE
    for name in ("core", "agent"):
        for source, target, _ in volumes(name):
            assert target in DOCKERFILE, source
        assert SERVICES[name]["command"] == ["python", "-m", f"tunnel.{name}"]
    assert SERVICES["core"]["build"]["dockerfile"] == "deploy/Dockerfile"
    assert (FILE.parent / SERVICES["core"]["build"]["context"]).resolve() == ROOT


@pytest.mark.system
def test_its_steps_build_what_runs_without_rights() -> None:
    """The core starts as the image's user (root can do that), is healthy, drains, writes to its directories only."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        image = replay(Path(name))
        assert not list(image.place("/opt/tunnel").glob("bin/pip*")), "nothing can be installed in it"
        assert image.user == "10001:10001" and image.command == ["python", "-m", "tunnel.core"]
        own = [image.place("/var/lib/tunnel"), image.place("/invite")]
        before = listing(image.root, own)
        assert run_core(image) == 0
        assert listing(image.root, own) == before
        assert (own[0] / "tunnel.db").exists() and (own[1] / "token").exists()


def listing(root: Path, apart: list[Path]) -> dict[Path, int]:
    found = (path for path in root.rglob("*") if not any(one in (path, *path.parents) for one in apart))
    return {path: path.lstat().st_mtime_ns for path in found}


def run_core(image: Image) -> int:
    """Until it has said that it is ready and its page that it is healthy, then SIGTERM; the exit code."""
    python = str(image.place("/opt/tunnel/bin/python"))
    environment = {
        **image.environment, "PATH": os.environ["PATH"], "HOME": "/", "TUNNEL_LOG_JSON": "true",
        "TUNNEL_DATA_DIR": str(image.place("/var/lib/tunnel")), "TUNNEL_INVITE_DIR": str(image.place("/invite")),
    }  # fmt: skip
    environment |= {f"TUNNEL_{name}_ADDR": "127.0.0.1:0" for name in ("PUBLIC", "AGENT", "METRICS", "DASHBOARD")}
    # As the image's user, who may read everything here (this checkout and its Python may be root's) and write nothing.
    user, group = image.user.split(":")
    rights = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    become = [] if os.geteuid() else ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *rights]
    core = subprocess.Popen(
        [*become, python, *image.command[1:]], cwd=image.place("/var/lib/tunnel"), env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    try:
        assert core.stdout is not None
        for line in core.stdout:
            if json.loads(line)["msg"] == "core ready":
                page = str(json.loads(line)["metrics"]).removesuffix("/metrics")
                with urllib.request.urlopen(f"http://{page.removeprefix('http://')}/readyz", timeout=10) as answer:
                    assert answer.status == 200
                core.terminate()
        return core.wait(30)
    finally:
        core.kill()
        core.wait()
        assert core.stdout is not None
        core.stdout.close()


def test_the_document_says_how_much_memory() -> None:
    total = 0.0
    for name, service in SERVICES.items():
        if "profiles" not in service and name != "setup":  # over before the others are busy
            limit = service["deploy"]["resources"]["limits"]["memory"]
            total += int(limit[:-1]) * {"M": 1 / 1024, "G": 1}[limit[-1]]
    said = re.search(r"limits that add up to (\d+) GB", (ROOT / "DEPLOYMENT.md").read_text())
    assert said is not None and round(total) == int(said[1])
