"""Attention over what a query sees: the kernel for the platform, and rings over devices."""
