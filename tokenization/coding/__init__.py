"""Arithmetic coding: models of the next byte, coders, containers."""
