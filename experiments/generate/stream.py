"""Streams tokens as text: whole characters, with accepted draft tokens in colour."""

import codecs
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

_STYLES = ('bold cyan', 'bold magenta')  # of accepted runs, alternating
# Control characters that could move the cursor or change the terminal; line ends and tabs are kept.
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10}, '\N{REPLACEMENT CHARACTER}')


class Painter:
    """Prints rounds of tokens.

    A character whose bytes span several tokens is printed with the last of them. Invalid UTF-8
    becomes replacement characters.
    """

    def __init__(self, console: Console, token_bytes: Sequence[bytes]):
        """Takes the console, and the bytes of each id."""
        self._console, self._token_bytes = console, token_bytes
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._runs = 0

    def plain(self, text: str) -> None:
        """Prints text without colour, such as the prompt."""
        self._print(text, '')

    def round(self, tokens: np.ndarray) -> None:
        """Prints the tokens of a round; all but the last were drafted."""
        drafted, last = (self._decode(part) for part in (tokens[:-1], tokens[-1:]))
        self._print(drafted, _STYLES[self._runs % 2])
        self._runs += len(tokens) > 1
        self._print(last, '')

    def end(self) -> None:
        """Flushes the bytes of an incomplete last character."""
        self._print(self._decoder.decode(b'', final=True), '')

    def _decode(self, tokens: np.ndarray) -> str:
        return self._decoder.decode(b''.join(self._token_bytes[i] for i in tokens))

    def _print(self, text: str, style: str) -> None:
        if not self._console.is_terminal:
            self._console.file.write(text)
            self._console.file.flush()
        elif text:
            shown = Text(text.translate(_CONTROLS), style)
            self._console.print(shown, end='', soft_wrap=True)
