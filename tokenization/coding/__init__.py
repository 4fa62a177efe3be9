"""Arithmetic coding: next-byte models, coders and a file format."""
