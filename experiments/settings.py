"""Checks of settings before any work starts; imports no JAX, so that `--help` is fast."""


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raises ValueError naming the flag, its value and the expected value, unless `holds`."""
    if not holds:
        raise ValueError(f'--{name}: {value}; expected {expected}')
