"""Findings of the transfer experiment, and settings that it refuses; nothing is compiled."""

import dataclasses

import pytest

from experiments.transfer import config, main, measure, results

SETTINGS = config.SCALES['tiny']


def test_a_finding_is_shown_or_not(capsys):
    def row(method, bits, shots=0, target='bytes'):
        return {
            'method': method, 'target': target, 'shots': shots, 'seconds': 1.0,
            'bits_per_byte': bits, 'bytes_per_token': 1.0, 'vocab_size': 256,
        }  # fmt: skip

    rows = [row('source', 2.0, target='own'), row('mean', 4.0), row('hypernetwork', 2.5)]
    metrics = results.table(rows)
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'shown: bytes: the hypernetwork beats every heuristic (2.500, and 4.000 by mean)' in (
        printed
    )
    assert 'NOT SHOWN' not in printed
    assert metrics['gap_closed/hypernetwork/target=bytes/shots=0'] == 0.75
    assert metrics['bits_per_byte/hypernetwork/target=bytes/shots=0'] == 2.5
    assert metrics['transfer_seconds/bytes'] == 1.0
    # the oracle, trained from scratch, is not a heuristic to beat
    assert results.table([*rows, row('oracle', 2.2)]) == {
        **metrics, 'bits_per_byte/oracle/target=bytes/shots=0': 2.2,
    }  # fmt: skip
    assert 'NOT SHOWN' not in capsys.readouterr().out
    results.table([*rows[:2], row('hypernetwork', 4.5)])
    assert 'NOT SHOWN' in capsys.readouterr().out


@pytest.mark.parametrize(
    'fields',
    [
        {'vocab_size': 256}, {'sampled_size': 257}, {'targets': ()}, {'targets': ('latin',)},
        {'shots': (10,)}, {'reductions': (0.0,)}, {'auxiliary': -1.0}, {'oracle': ('latin',)},
        {'variants': ('latin',)}, {'variant_steps': 0}, {'hypernetwork_bundle': 'x'},
    ],
)  # fmt: skip
def test_refuses_what_cannot_work(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(SETTINGS, **fields)


def test_only_what_is_named_is_trained_on():
    assert set(main.TRAINED_ON) <= {'hypernetwork', *measure.methods(None, [])}
