"""The TPU kernels; interpreted where there is no TPU."""

from tests.lm.kernels.contract import AttentionContract


class TestMosaic(AttentionContract):
    implementation = 'mosaic'
