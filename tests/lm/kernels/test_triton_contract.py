"""The GPU kernels; interpreted where there is no GPU."""

from tests.lm.kernels.contract import AttentionContract


class TestTriton(AttentionContract):
    implementation = 'triton'
