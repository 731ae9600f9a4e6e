"""The project's checks. `sh scripts/test` runs them all; `nox -s tests -- tests/wire` runs a part."""

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_external_run = True
nox.options.reuse_venv = "yes"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types."""
    session.install("-e", ".[test,lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, those with real processes and servers included."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Figures with ratios to a floor, into docs/benchmarks.md, on a quiet machine. `-- --help` says what else."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "benchmarks", *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def fuzz(session: nox.Session) -> None:
    """The parsers under changed bytes for so many minutes: `nox -s fuzz -- 10`. What fails is kept in the corpus."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "fuzz", *(session.posargs or ["5"]), env={"PYTHONPATH": "tests"})


@nox.session
def pictures(session: nox.Session) -> None:
    """docs/img: the dashboards, drawn from a run with real traffic and real faults. Takes three minutes."""
    session.install("-e", ".[test,pictures]")
    session.run("python", "tests/system/pictures.py", env={"PYTHONPATH": "tests"})
