"""Checks of settings, before any work; no JAX, so that `--help` stays fast."""


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raises ValueError, naming the flag, its value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f'--{name}: {value}; expected {expected}')
