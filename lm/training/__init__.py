"""Optimizers, the training step, and the preemption-safe loop."""
