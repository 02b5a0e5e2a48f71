"""Run the test suite in every set-up that dbscope promises, each in an environment of its own.

`make matrix` calls this with the Python of `.venv`, which has already run the suite once (`make test`); here follow the
oldest SQLAlchemy, dbscope without its extras, every other supported Python that this machine has, and the tests of arq,
whose requirements go with nobody else's. Prints a line per set-up and exits with 1 if one of them failed. What failed
is run once more, by itself: where it passes then, the set-up is called unsteady, and what was printed is shown, for
that is a bug, too. Standard library only; environments live in `.venv-<set-up>`.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv" / "bin" / "uv"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
TIME_LIMIT = 1500.0  # seconds for one run, which takes some minutes: a deadlock must not hold up this machine for ever
TESTS_FAILED = 1  # pytest's exit code; others say that it could not run them
AGAIN = ("-n", "0", "--exitfirst", "--last-failed", "--last-failed-no-failures", "none")
EXAMPLES = "60"  # of the state machine on each database: `make test` looks for new ones, these set-ups only differ


@dataclass(frozen=True)
class SetUp:
    """One environment: which Python, which locked requirements, and what goes on top of them."""

    name: str
    title: str
    python: str
    requirements: str = "dev.txt"
    overlay: str | None = None
    extras: bool = True
    programs: bool = False  # whether the tests run that start servers, workers and other programs
    only: tuple[str, ...] = ()  # the tests that run there, as pytest is told; () for the suite

    @property
    def folder(self) -> Path:
        """Where its virtual environment lives."""
        return ROOT / f".venv-{self.name}"

    def prepare(self) -> Path:
        """Return the environment's Python; built anew only when a lock, the packaging or the Python changed."""
        locks = [ROOT / "requirements" / name for name in (self.requirements, self.overlay) if name]
        ingredients = [file.read_bytes() for file in (*locks, ROOT / "pyproject.toml")]
        key = hashlib.sha256(b"\0".join([self.python.encode(), *ingredients])).hexdigest()
        python, stamp = self.folder / "bin" / "python", self.folder / "ready"
        if stamp.is_file() and stamp.read_text() == key:
            return python
        uv("venv", "--clear", "--python", self.python, self.folder)
        uv("pip", "sync", "--python", python, "--require-hashes", locks[0])
        for overlay in locks[1:]:
            uv("pip", "install", "--python", python, "--no-deps", "--require-hashes", "--requirements", overlay)
        uv("pip", "install", "--python", python, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        stamp.write_text(key)
        return python

    def run(self) -> tuple[str, str]:
        """Run the suite; return its verdict (ok, unsteady or FAILED), and what it printed."""
        environment = {"DBSCOPE_MACHINE_EXAMPLES": EXAMPLES} | os.environ
        if not self.extras:
            environment["DBSCOPE_NO_EXTRAS"] = "1"
        try:
            which = self.only or (() if self.programs else ("-m", "not programs"))
            cache = f"cache_dir={self.folder / 'pytest_cache'}"
            command: list[str | Path] = [self.prepare(), "-m", "pytest", "-n", "logical", "-o", cache, *which]
            done = captured(command, env=environment, timeout=TIME_LIMIT)
            if done.returncode != TESTS_FAILED:
                return "FAILED" if done.returncode else "ok", done.stdout
            again = captured([*command, *AGAIN], env=environment, timeout=TIME_LIMIT)
            return "FAILED" if again.returncode else "unsteady", f"{done.stdout}\nonce more:\n{again.stdout}"
        except subprocess.CalledProcessError as failure:
            return "FAILED", f"{failure.stdout}\ncould not prepare the environment: {failure}"
        except subprocess.TimeoutExpired as failure:
            printed = failure.stdout.decode(errors="replace") if isinstance(failure.stdout, bytes) else ""
            return "FAILED", f"{printed}\nstopped: still running after {TIME_LIMIT:.0f} s"


def captured(
    command: list[str | Path], env: dict[str, str] | None = None, timeout: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command at the root of the project, with its output and errors in one text."""
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def uv(*arguments: str | Path) -> None:
    """Call the uv of `.venv`; raise if it fails."""
    captured([UV, *arguments, "--quiet"]).check_returncode()


def candidates(version: str) -> Iterator[Path]:
    """Yield the files that may be the Python asked for: those on the PATH, then pyenv's, newest first."""
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    releases = [path for path in pyenv.glob(f"versions/{version}.*") if path.name.rpartition(".")[2].isdigit()]
    for release in sorted(releases, key=lambda path: int(path.name.rpartition(".")[2]), reverse=True):
        yield release / "bin" / "python"


def find(version: str) -> str | None:
    """Return the path of a Python of this version that really runs: pyenv's shims exist for versions that do not."""
    for candidate in candidates(version):
        if not os.access(candidate, os.X_OK):
            continue
        answer = captured([candidate, "-c", "import sys; print(sys.executable, *sys.version_info[:2], sep='\\n')"])
        executable, _, found = answer.stdout.strip().partition("\n")
        if answer.returncode == 0 and found.replace("\n", ".") == version:
            return executable
    return None


def main() -> int:
    """Run all set-ups and return the exit code."""
    print(f"make test runs Python {HERE} with the newest SQLAlchemy; besides that:", flush=True)
    setups = [
        SetUp("oldest", "the oldest SQLAlchemy", sys.executable, overlay="sqlalchemy-oldest.txt"),
        SetUp("minimal", "no extras", sys.executable, requirements="minimal.txt", extras=False),
    ]
    for version in PYTHONS:
        if version == HERE:
            continue
        if python := find(version):
            setups.append(SetUp(f"python{version}", f"Python {version}", python))
        else:
            print(f"  {'Python ' + version:<24} not found on this machine", flush=True)
    # The programs that tests start differ with Python, if with anything: once more, on the newest one, is enough.
    setups[-1] = replace(setups[-1], programs=True)
    arq = ("-k", "arq", "tests/integrations/test_queue_recipes.py")
    setups.append(SetUp("arq", "arq, and its Redis client", sys.executable, overlay="arq.txt", only=arq))
    print(f"tests that start servers, workers and other programs are run with {setups[-2].title}, and left out before")
    failed = 0
    for setup in setups:
        print(f"  {setup.title:<24} ", end="", flush=True)
        begun = time.monotonic()
        verdict, output = setup.run()
        seconds = time.monotonic() - begun
        lines = output.strip().splitlines() or ["no output"]
        print(f"{verdict:<8} {seconds:6.1f} s   {lines[-1].strip(' =')}", flush=True)
        failed += verdict == "FAILED"
        if verdict != "ok":
            print("\n".join(f"    | {line}" for line in lines), flush=True)
    print(f"{len(setups) - failed} of {len(setups)} set-ups passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
