"""Compiles each kernel, through `lm.attention.attention`, for one chip of each target."""

import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import AbstractDevice, NamedSharding, PartitionSpec

from experiments import report
from experiments.compile_attention.config import Config
from experiments.plan import chips
from experiments.plan import compile as ahead
from experiments.report import Column
from lm.attention import attention as attention_lib
from lm.devices import mesh as mesh_lib
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.kernels.sparse import SparseIndex

COLUMNS = [
    Column('kernel', ''),
    Column('target', ''),
    Column('seconds', 'compile s', '.1f'),
    Column('arguments', 'arguments MiB', '.1f'),
    Column('temporaries', 'temporaries MiB', '.1f'),
    Column('calls', 'kernels', '.0f'),
]


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table; returns the metrics.

    Raises:
      ValueError: the compiler is not installed.
      RuntimeError: a compiled program contains no kernel.
    """
    del out
    rows = [row for target in config.targets for row in compile_for(config, target)]
    report.table(
        rows, COLUMNS,
        f'{config.dtype}, B {config.batch_size}, H {config.heads}, K {config.kv_heads}, '
        f'C {config.channels}, {config.keys} keys, tree of {config.nodes}; CUDA is lowered, '
        'not compiled',
    )  # fmt: skip
    metrics = {}
    for row in rows:
        for field in ('seconds', 'temporaries', 'calls'):
            if row[field] is not None:
                key = report.key(field, row['kernel'], target=row['target'].partition(':')[0])
                metrics[key] = row[field]
    return metrics


def compile_for(config: Config, target: str) -> list[dict[str, Any]]:
    """Returns a row of the table for each kernel.

    Raises:
      RuntimeError: a compiled program contains no kernel of the target.
    """
    sharding, name, use = None, 'triton', _any_gpu()
    if target != 'cuda':
        mesh = mesh_lib.make(devices=ahead.devices(chips.parse(target))[:1])
        sharding, name, use = NamedSharding(mesh, PartitionSpec()), 'mosaic', jax.set_mesh(mesh)
    with use:
        return [
            _compile(kernel, function, operands, target, sharding)
            for kernel, (function, operands) in functions(config, target, name).items()
        ]


def _any_gpu() -> AbstractContextManager[Any]:
    """Returns a context in which code can be lowered for a GPU without having one."""
    device = AbstractDevice('NVIDIA H100', 1, 'gpu')
    mesh = mesh_lib.abstract(1, device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _compile(kernel, function, operands, target, sharding) -> dict[str, Any]:
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    begin = time.monotonic()
    row: dict[str, Any] = {'kernel': kernel, 'target': target}
    traced = jax.jit(function).trace(*placed)
    if target == 'cuda':
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
        row |= {'arguments': None, 'temporaries': None, 'calls': text.count('xla.gpu.triton')}
    else:
        compiled = traced.lower().compile()
        memory, text = compiled.memory_analysis(), compiled.as_text() or ''
        assert memory is not None
        row |= {
            'arguments': memory.argument_size_in_bytes / 2**20,
            'temporaries': memory.temp_size_in_bytes / 2**20,
            'calls': text.count('custom_call_target="tpu_custom_call"'),
        }
    if not row['calls']:
        raise RuntimeError(f'{kernel} for {target}: fell back to XLA, no kernel is called')
    row['seconds'] = time.monotonic() - begin
    print(f'{kernel} for {target}: {row["seconds"]:.1f} s', flush=True)
    return row


Functions = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def functions(config: Config, target: str, name: str) -> Functions:
    """Returns each kernel as a function of abstract arrays, and these.

    With all terms (bias and noise per key, temperature) too, for the targets that ask for them.
    """
    plain = Scoring(config.channels**-0.5)
    found = _functions(config, name, plain, None)
    if target not in config.with_terms:
        return found
    shape = config.batch_size, config.kv_heads, config.keys
    per_key = _array(*shape, dtype=jnp.float32)
    scored = dataclasses.replace(plain, temperature=_array(dtype=jnp.float32), noise=per_key)
    with_terms = _functions(config, name, scored, per_key)
    renamed = {f'{kernel}_with_terms': function for kernel, function in with_terms.items()}
    return found | renamed


def _functions(config: Config, name: Any, scoring: Scoring, bias: Any) -> Functions:
    b, h, n_kv, c = config.batch_size, config.heads, config.kv_heads, config.channels
    s, t, n = config.keys, config.nodes, config.queries
    dtype = jnp.dtype(config.dtype)

    def queries(n: int) -> Any:
        return _array(b, n, h, c, dtype=dtype)

    new = _array(b, n_kv, s, c, dtype=dtype)
    stack, layer = _array(config.layers, b, n_kv, s, c, dtype=dtype), _array()
    packed = Mask(_array(b, n), _array(b, 1, s), _array(b, n), _array(b, s), window=_array(),
                  key_bias=bias)  # fmt: skip
    cached = Mask(_array(b, 1), _array(b, n_kv, s), length=_array(b), window=_array(),
                  key_bias=bias)  # fmt: skip
    tree = Mask(_array(b, t), _array(b, n_kv, s), length=_array(b),
                ancestors=_array(b, t, -(-t // 32)), key_bias=bias)  # fmt: skip
    kept = _array(b, n_kv, config.kept)
    index = SparseIndex(_array(b, n_kv), kept, _array(*kept.shape, 4))
    attend: Any = functools.partial(attention_lib.attention, implementation=name)
    sums: Any = functools.partial(attention_lib.column_sums, implementation=name)
    sparse: Any = functools.partial(attention_lib.sparse_decode, implementation=name)

    def backward(q, k, v, mask, scoring, cotangent):
        return jax.vjp(lambda *x: attend(*x, mask, scoring), q, k, v)[1](cotangent)

    def at_layer(function):
        return lambda *operands: function(*operands[:-1], layer=operands[-1])

    lse, counted = _array(b, t, h, dtype=jnp.float32), _array(b, t, dtype=jnp.bool_)
    return {
        'flash': (attend, (queries(n), new, new, packed, scoring)),
        'flash_backward': (backward, (queries(n), new, new, packed, scoring, queries(n))),
        'decode': (at_layer(attend), (queries(1), stack, stack, cached, scoring, layer)),
        'tree': (at_layer(attend), (queries(t), stack, stack, tree, scoring, layer)),
        'column_sums': (at_layer(sums), (queries(t), stack, lse, tree, counted, scoring, layer)),
        'sparse_decode': (at_layer(sparse), (queries(1), stack, stack, index, scoring, layer)),
        'sparse_tree': (at_layer(sparse), (queries(t), stack, stack, index, scoring, tree, layer)),
    }


def _array(*shape: int, dtype=jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
