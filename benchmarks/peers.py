"""Other tools, each in a virtual environment of its own made on first use.

Their requirements are pinned here, with those their packages forget to declare. torch is installed first and alone, so that
the build of it does not depend on whose it is. pip's own settings apply: with
`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` it takes the small build of torch without CUDA.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.cases import Case
from benchmarks.machine import REPOSITORY
from benchmarks.race import Contender, Outcome, shout

CONSTRAINTS = REPOSITORY / "constraints.txt"
TORCH = "torch==2.13.0"


class PeerError(Exception):
    """A peer cannot take part: not installable, without the format in question, or failing at it."""


@dataclass(frozen=True)
class Peer:
    """Another tool: what to install besides torch, and what in its environment is run."""

    name: str
    requirements: tuple[str, ...]
    program: str = "python"

    def install(self, workdir: Path) -> Path:
        """Return the peer's program, installed below `workdir` unless the same requirements already are."""
        environment = workdir / "peers" / self.name.replace(" ", "-")
        stamp = environment / "installed.txt"
        wanted = "\n".join((TORCH, *self.requirements))
        if not stamp.exists() or stamp.read_text() != wanted:
            python = environment / "bin" / "python"
            constraints = ["-c", str(CONSTRAINTS)] if CONSTRAINTS.exists() else []
            install = [str(python), "-m", "pip", "install", "--quiet", *constraints, TORCH]
            _run([sys.executable, "-m", "venv", "--clear", str(environment)])
            _run(install)
            _run([*install, *self.requirements])
            stamp.write_text(wanted)
        return environment / "bin" / self.program

    def contender(self, case: Case, workdir: Path) -> Contender:
        """Return the peer set up for `case`."""
        if case.peer is None:
            raise PeerError(f"has no format for {case.name}")
        program, flags = str(self.install(workdir)), case.peer

        def command(source: Path, destination: Path) -> list[str]:
            convert = [program, "-i", str(source), "-o", str(destination), "--simple", "--comfy_quant"]
            return [*convert, "--save-quant-metadata", "--flux2", *flags]

        return Contender(self.name, command)


CONVERT_TO_QUANT = Peer(
    name="convert-to-quant 1.3.4",
    # safetensors, tqdm, scipy and triton are imported but not declared.
    requirements=("convert-to-quant==1.3.4", "safetensors", "tqdm", "scipy", "triton"),
    program="convert_to_quant",
)


def converted(find: Callable[[], Contender], start: Callable[[Contender], Outcome], console: Console) -> Outcome:
    """The converter's outcome once it is found and started; where it cannot take part, why."""
    try:
        return start(find())
    except PeerError as error:
        shout(console, f"{CONVERT_TO_QUANT.name} DOES NOT TAKE PART: {error}")
        return Outcome(CONVERT_TO_QUANT.name, failure=str(error))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"cannot be installed: {reason[-1] if reason else done.returncode}")
