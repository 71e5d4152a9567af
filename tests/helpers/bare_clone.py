"""A checkout as a user has it, nothing beside it, and the commands that its pages document."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT
from medusa_jax.kernels import native

SHELL = ("sh", "bash")


def clone(target: Path) -> Path:
    """Copies the files that git tracks, or would, to a directory with no ../shared beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    if native.available():  # compiled once for all copies, not in each
        kernels = target.parent / "cache/kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        shutil.copy(native.library(), kernels)
    assert not (target.parent / "shared").exists()
    return target


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a Markdown file in these languages, in order."""
    fenced = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [body for language, body in fenced if language in languages]


def commands(page: Path) -> list[str]:
    """The shell commands of a page, without those that install.

    "pip install -e . && python decode.py" -> "python decode.py"; a backslash joins two lines.
    """
    lines = "".join(blocks(page, *SHELL)).replace("\\\n", " ").splitlines()
    steps = (step.strip() for line in lines for step in line.split(" && "))
    return [step for step in steps if step and not step.startswith(("#", "pip install "))]


def environment(target: Path, *, optimized: bool = True) -> dict[str, str]:
    """The variables of a process in the copy: its own package and cache.

    `optimized` compiles as users do; otherwise LLVM does not optimize, as in the other tests.
    """
    own = {"PYTHONPATH": str(target), "MEDUSA_JAX_CACHE": str(target.parent / "cache")}
    left_out = "XLA_FLAGS" if optimized else ""
    return {name: value for name, value in os.environ.items() if name != left_out} | own


def run(
    command: list[str], target: Path, *, optimized: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy, with no input; it must succeed."""
    done = subprocess.run(
        command,
        cwd=target,
        env=environment(target, optimized=optimized),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    return done


def run_line(line: str, target: Path) -> subprocess.CompletedProcess[str]:
    """Runs a documented command, with this interpreter as `python`."""
    program, *arguments = shlex.split(line)
    programs = {"python": sys.executable, "mkdir": "mkdir"}
    assert program in programs, f"a documented command runs {program}: {line}"
    return run([programs[program], *arguments], target, optimized=False)
