"""The XLA implementation."""

from tests.lm.kernels.contract import AttentionContract


class TestXla(AttentionContract):
    implementation = 'xla'
