"""Settings of all tests: devices, memory, hypothesis, budgets, what the end of a run says."""

import gc
import importlib.metadata
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

from tests import budget  # noqa: E402

# Not an environment variable: commands that tests start see the machine as it is.
jax.config.update('jax_num_cpu_devices', 8)
# Compiling is nine tenths of the suite, and most of that optimises programs that run for
# milliseconds. Seconds of CPU without either, with this, and with the flag below as well: 102, 55
# and 24 for the tests of the transformer; of those of `generate`, 308 with this and 137 with both.
ON_CPU = os.environ['JAX_PLATFORMS'] == 'cpu'
jax.config.update('jax_disable_most_optimizations', ON_CPU)
# XLA reads its flags as the first device is made. They are then taken back, for the same reason as
# above; and a version of XLA that does not know one ends the process.
if ON_CPU and importlib.metadata.version('jaxlib').startswith('0.10.'):
    flags = os.environ.get('XLA_FLAGS')
    os.environ['XLA_FLAGS'] = f'{flags or ""} --xla_cpu_use_fusion_emitters=false'
    jax.devices()
    os.environ.pop('XLA_FLAGS')
    if flags is not None:
        os.environ['XLA_FLAGS'] = flags

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


@pytest.fixture
def optimised():
    """Compiles as users do, where a test compares two programs bit for bit."""
    jax.clear_caches()  # which are not told apart by this setting
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', ON_CPU)
    jax.clear_caches()


def pytest_configure(config):
    """Measures every test, in every process that runs tests."""
    config.pluginmanager.register(budget.Budget())


def pytest_terminal_summary(terminalreporter):
    """Lists the most expensive tests; says which attention kernels were compiled."""
    budget.summary(terminalreporter)
    ran = [report for kind in ('passed', 'failed') for report in terminalreporter.getreports(kind)]
    if not any(report.nodeid.startswith('tests/lm/kernels/') for report in ran):
        return
    backend = jax.default_backend()
    found = [
        f'{name} compiled' if backend == platform else f'{name} interpreted (no {platform.upper()})'
        for name, platform in (('mosaic', 'tpu'), ('triton', 'gpu'))
    ]
    terminalreporter.write_line(f'attention kernels: {", ".join(found)}')
