"""Settings of all tests: devices, memory, how hypothesis draws, a line on the kernels."""

import gc
import os
import pathlib

import hypothesis
import pytest

# Before JAX is imported. The CPU stays reachable beside a GPU, for the tests that build meshes of
# fake devices with `jax.devices('cpu')`.
platforms = os.environ.setdefault('JAX_PLATFORMS', 'cpu').split(',')
if 'cpu' not in platforms:
    os.environ['JAX_PLATFORMS'] = ','.join([*platforms, 'cpu'])
# Several test processes share one GPU.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402

# Not an environment variable: commands that tests start see the machine as it is.
jax.config.update('jax_num_cpu_devices', 8)

hypothesis.settings.register_profile('default', deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    'ci', deadline=None, max_examples=50, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile('ci' if os.environ.get('CI') else 'default')


# XLA maps memory for every compiled program, and Linux gives a process 65,530 maps: one too many,
# and it crashes wherever it is.
MAPS, MANY = pathlib.Path('/proc/self/maps'), 16_000


@pytest.fixture(scope='module', autouse=True)
def _compiled_programs():
    """Lets go of what a file's tests have compiled, once that is much."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b'\n') > MANY:
        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """Says which attention kernels were compiled and which interpreted, where their tests ran."""
    ran = [report for kind in ('passed', 'failed') for report in terminalreporter.getreports(kind)]
    if not any(report.nodeid.startswith('tests/lm/kernels/') for report in ran):
        return
    backend = jax.default_backend()
    found = [
        f'{name} compiled' if backend == platform else f'{name} interpreted (no {platform.upper()})'
        for name, platform in (('mosaic', 'tpu'), ('triton', 'gpu'))
    ]
    terminalreporter.write_line(f'attention kernels: {", ".join(found)}')
