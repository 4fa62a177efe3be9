"""Equal-Info windows in Python integers: the reference for the fast coders."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


class Reference:
    """One window at a time, in Python integers, straight from the definitions."""

    def __init__(self, model, window_bits, rule, max_bytes):
        self.model, self.W, self.rule, self.max_bytes = model, window_bits, rule, max_bytes
        self.P = model.precision
        self.cdf, self.step = jax.jit(model.cdf), jax.jit(model.step)
        self.rows: dict[bytes, list[int]] = {}

    def row(self, context: bytes) -> list[int]:
        if context not in self.rows:
            state = self.model.start(1)
            for byte in context:
                state = self.step(state, jnp.array([byte], jnp.int32))
            self.rows[context] = np.asarray(self.cdf(state))[0].tolist()
        return self.rows[context]

    def bounds(self, context, interval):
        low, size = interval
        return [low + (size * c >> self.P) for c in self.row(context)]

    def cells(self, interval):
        """Returns the first cell wholly inside, and the cell after the last such one."""
        low, size = interval
        return -(-low >> self.P), (low + size) >> self.P

    def shortest(self, interval):
        first, end = self.cells(interval)
        for k in range(self.W, -1, -1):
            code = -(-first >> k) << k
            if code + (1 << k) <= end:
                return code

    def straddled(self, context, interval, n):
        first, end = self.cells(interval)
        if n == self.max_bytes:
            return first
        if end - first > 1 << 20:  # too many to enumerate: check the bounds instead
            cut = [b >> self.P for b in self.bounds(context, interval)[1:-1] if b % (1 << self.P)]
            return min((v for v in cut if first <= v < end), default=None)
        bounds = self.bounds(context, interval)
        held = set()
        for low, high in itertools.pairwise(bounds):
            held |= set(range(*self.cells((low, high - low))))
        return min((v for v in range(first, end) if v not in held), default=None)

    def encode_window(self, past: bytes, text: bytes) -> tuple[int, int]:
        """Returns (code, bytes) of the first window of `text`, after the model has read `past`."""
        interval, path = (0, 1 << (self.W + self.P)), []
        for n in range(1, min(len(text), self.max_bytes) + 1):
            bounds = self.bounds(past + text[: n - 1], interval)
            low, high = bounds[text[n - 1]], bounds[text[n - 1] + 1]
            first, end = self.cells((low, high - low))
            if first >= end:
                break
            interval = (low, high - low)
            path.append((n, interval))
        if self.rule == 'canonical':
            for n, interval in reversed(path):
                code = self.straddled(past + text[:n], interval, n)
                if code is not None:
                    return code, n
            return self.cells(path[-1][1])[0], path[-1][0]
        code = self.shortest(path[-1][1])
        if self.rule == 'delay':
            return code, next(n for n, interval in path if self.shortest(interval) == code)
        return code, path[-1][0]

    def encode(self, text, reset):
        codes, counts, past, at = [], [], b'', 0
        while at < len(text):
            code, count = self.encode_window(past, text[at:])
            past += text[at : at + count]
            at += count
            codes.append(code)
            counts.append(count)
            if reset == 'every' or (reset == 'second' and len(codes) % 2 == 0):
                past = b''
        return codes, counts

    def longest_string(self, code):
        """Returns D(v); under 'paper', the longest prefix of D(v) that has this code."""
        interval, text = (0, 1 << (self.W + self.P)), b''
        own = b''
        while len(text) < self.max_bytes:
            bounds = self.bounds(text, interval)
            for byte, (low, high) in enumerate(itertools.pairwise(bounds)):
                first, end = self.cells((low, high - low))
                if first <= code < end:
                    text, interval = text + bytes([byte]), (low, high - low)
                    own = text if self.shortest(interval) == code else own
                    break
            else:
                break
        return own or text if self.rule == 'paper' else text
