"""Which commit of this project is running."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def commit() -> tuple[str | None, bool | None]:
    """Returns the commit checked out and whether files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie within somebody else's checkout, whose commit says nothing.
        if pathlib.Path(git('rev-parse', '--show-toplevel')).resolve() != ROOT:
            return None, None
        return git('rev-parse', 'HEAD'), bool(git('status', '--porcelain'))
    except (OSError, subprocess.CalledProcessError):
        return None, None
