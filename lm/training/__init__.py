"""Optimizers, the training step, and the loop that survives kills."""
