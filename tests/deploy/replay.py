"""deploy/Dockerfile without Docker: its steps, one after another, in a directory that stands for the image's root.

    root = replay(directory)          # what the last stage holds; raises AssertionError where a step fails
    root.environment, root.command, root.user, root.place("/opt/tunnel")

The build sees what .dockerignore lets in. Two things are other than in Docker, so that nothing is asked of the package
index: wheels are built of our own package only, and the environment takes its dependencies from the one that runs this.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@dataclass
class Image:
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    work: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where this path of the image is."""
        return self.root / str(Path("/", self.work, path)).lstrip("/")


def steps() -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text())).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def let_in(directory: Path) -> Path:
    """The build's context: what .dockerignore has with a `!`, without what it names after that."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    out = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    directory.mkdir()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns(*out))
        else:
            shutil.copy(ROOT / name, directory / name)
    return directory


def replay(directory: Path) -> Image:
    context = let_in(directory / "context")
    stages: dict[str, Image] = {}
    arguments: dict[str, str] = {}
    image = Image(directory / "none")
    for word, rest in steps():
        rest = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest) if word in ("FROM", "RUN") else rest
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word == "FROM":
            name = rest.partition(" AS ")[2] or "last"
            image = stages[name] = Image(directory / name)
            image.root.mkdir()
        elif word == "WORKDIR":
            image.work = rest
            image.place(rest).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            copy(rest.split(), image, stages, context)
        elif word == "RUN":
            run(rest, image)
        elif word == "ENV":
            for pair in rest.split():
                name, _, value = pair.partition("=")
                image.environment[name] = value
        elif word == "USER":
            image.user = rest
        elif word == "CMD":
            image.command = json.loads(rest)
        else:
            assert word == "EXPOSE", word
    return image


def copy(words: list[str], image: Image, stages: dict[str, Image], context: Path) -> None:
    """A directory's content into the target; files into a target that ends with a slash."""
    *sources, target = [one for one in words if not one.startswith("--from=")]
    [stage] = [one.partition("=")[2] for one in words if one.startswith("--from=")] or [""]
    for source in sources:
        path = stages[stage].place(source) if stage else context / source
        where = image.place(target)
        if path.is_dir():
            shutil.copytree(path, where, symlinks=True, dirs_exist_ok=True)
        else:
            where.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, where / path.name)


def run(line: str, image: Image) -> None:
    for command in line.split(" && "):
        words = [str(image.place(word)) if word.startswith("/") else word for word in shlex.split(command)]
        if words[0] == "pip":
            words[:1] = [sys.executable, "-m", "pip"]
            words += ["--no-deps", *(["--no-build-isolation"] if "wheel" in words else [])]
        elif words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "install" and os.geteuid():  # only root gives files away
            owner = ("-o", "-g")
            words = [word for i, word in enumerate(words) if word not in owner and words[i - 1] not in owner]
        done = subprocess.run(words, cwd=image.place("."), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    for there in image.root.glob(
        "**/site-packages/trio_tunnel-*"
    ):  # only now: pip would take what it sees for installed
        (there.parent / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
