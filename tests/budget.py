"""What a test may cost: 20 seconds of CPU and 30 compiled programs, unless it is marked slow.

Nine tenths of the suite is compiling, so one careless test costs more than a file of good ones. A
test above its budget fails, and its message says how to mend it. The most expensive tests are
listed at the end of a run.

A fixture that outlives its test (of a class, a module or the session) has a budget of its own, 60
seconds and 100 programs, and counts against no test, since any test may be the first to ask for it.

Programs are counted as JAX hands them to the compiler. An entry in the cache of compiled programs
counts too, so cold and warm runs agree. Operations outside jit (`x + 1`, `jnp.zeros`) are programs
of their own, but small, and compiled once per process by whichever test comes first: they do not
count.

CPU seconds are those of the process, its threads and the processes that it has waited for. A slow
or crowded machine takes more of them for the same work. So once a test exceeds its seconds, a fixed
loop is timed, and the limit grows with what the loop takes.
"""

import functools
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.extend.core import Primitive

COMPILED = '/jax/core/compile/backend_compile_duration'
# Seconds of `fixed_loop` where the budget was set, on 2 idle cores of an AMD EPYC virtual machine.
REFERENCE_S = 0.17
# The budget is for careless tests: those near the limit must not fail by chance.
MARGIN = 1.5
LISTED = 10
ADVICE = (
    'Share what is compiled (jit once per module, with one shape), use a smaller configuration, or '
    'mark the test with pytest.mark.slow.'
)
COST = 'cost'


class Cost(NamedTuple):
    """CPU seconds and compiled programs."""

    cpu_s: float
    programs: int

    def plus(self, other: 'Cost') -> 'Cost':
        return Cost(self.cpu_s + other.cpu_s, self.programs + other.programs)

    def minus(self, other: 'Cost') -> 'Cost':
        return Cost(self.cpu_s - other.cpu_s, self.programs - other.programs)

    def __str__(self) -> str:
        return f'{self.cpu_s:.1f} s of CPU and {self.programs} programs'


NOTHING = Cost(0.0, 0)
TEST, FIXTURE = Cost(20.0, 30), Cost(60.0, 100)


def fixed_loop() -> float:
    """Returns the CPU seconds of work that is always the same."""
    start, total = time.process_time(), 0
    for i in range(2_000_000):
        total += i * i % 7
    return time.process_time() - start


def excess(name: str, cost: Cost, budget: Cost) -> str | None:
    """Returns the complaint about a cost above its budget, or None."""
    seconds = budget.cpu_s
    if cost.cpu_s > seconds:
        seconds *= MARGIN * max(1.0, fixed_loop() / REFERENCE_S)
    if cost.programs <= budget.programs and cost.cpu_s <= seconds:
        return None
    speed = f' ({seconds:.0f} s at the speed of this machine)' if seconds > budget.cpu_s else ''
    return f'{name} took {cost}; its budget is {budget}{speed}. {ADVICE}'


@functools.cache
def _operations() -> set[str]:
    """Names of the programs of operations outside jit: JAX's primitives and jitted functions."""
    jitted = type(jax.jit(lambda: None))
    modules = [module for name, module in sys.modules.items() if name.split('.')[0] == 'jax']
    values = [value for module in modules for value in list(vars(module).values())]
    names = {value.name for value in values if isinstance(value, Primitive)}
    names |= {value.__name__ for value in values if isinstance(value, jitted)}
    # These run functions of ours.
    return names.union(dir(jnp)) - {'cond', 'scan', 'shard_map', 'while', 'pallas_call'}


def is_operation(program: str) -> bool:
    """Returns whether a program, as in `jit(multiply)`, is an operation that ran outside jit."""
    name = program.removeprefix('jit(').removesuffix(')')
    return not {name, name.lstrip('_')}.isdisjoint(_operations())


class Budget:
    """A plugin that fails tests above their budget."""

    def __init__(self):
        self.programs = 0
        self.shared = NOTHING  # cost of fixtures that outlive the test that runs
        self.complaints: list[str] = []
        self.before = NOTHING
        monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, seconds: float, **about: str | int) -> None:
        if event == COMPILED and not is_operation(str(about.get('fun_name'))):
            self.programs += 1

    def _now(self) -> Cost:
        return Cost(sum(os.times()[:4]), self.programs)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before, inner = self._now(), self.shared
        try:
            return (yield)
        finally:
            if fixturedef.scope != 'function':
                cost = self._now().minus(before)
                own = cost.minus(self.shared.minus(inner))  # without fixtures asked for inside it
                self.shared = inner.plus(cost)
                complaint = excess(f'the fixture {fixturedef.argname}', own, FIXTURE)
                self.complaints += [complaint] if complaint else []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.shared, self.complaints, self.before = NOTHING, [], self._now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        result = yield  # an error of the test goes first
        cost = self._now().minus(self.before).minus(self.shared)
        item.user_properties.append((COST, tuple(cost)))  # plain, to cross between processes
        if not any(item.iter_markers('slow')) and not any(item.iter_markers('tpu')):
            complaint = excess('the test', cost, TEST)
            complaints = [*self.complaints, *([complaint] if complaint else [])]
            if complaints:
                pytest.fail('\n'.join(complaints), pytrace=False)
        return result


def costs(terminalreporter) -> Iterator[tuple[Cost, str]]:
    """Yields what each test of a run cost, and its name."""
    for kind in ('passed', 'failed'):
        for report in terminalreporter.getreports(kind):
            if report.when == 'call':
                yield from (
                    (Cost(*value), report.nodeid)
                    for name, value in report.user_properties
                    if name == COST
                )


def summary(terminalreporter) -> None:
    """Lists the most expensive tests."""
    most = sorted(costs(terminalreporter), reverse=True)[:LISTED]
    most = [(cost, name) for cost, name in most if cost.cpu_s >= 1]
    if most:
        terminalreporter.write_line(f'the most expensive tests (budget of each: {TEST}):')
    for cost, name in most:
        terminalreporter.write_line(f'{cost.cpu_s:7.1f} s {cost.programs:4d} programs  {name}')
