"""Token by token to text, holding back what cannot be shown yet."""

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

UNFINISHED = "\ufffd"
"""What a decoder gives for bytes that are no character, or not yet."""
LONGEST_WAIT = 64
"""Tokens that may be held back for a character's end. Only bytes that are no text take so many."""


class TextStream:
    """The text of one choice as its tokens arrive.

    Bytes of an unfinished character and the beginning of a possible stop string are held back;
    what has been handed out is never taken back.
    """

    def __init__(self, tokenizer: FastTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # decoded last: some decoders look at the token before
        self._fresh: list[int] = []  # not decoded into whole characters yet
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token releases. Sets `stopped` when a stop string is complete."""
        self._held += self._decode(token)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back for a stop string that never came. Half a character stays out."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token: int) -> str:
        """Whole characters that this token completes.

        tokenizers' own `DecodeStream` raises where later bytes change what earlier ones meant, as
        with byte fallback; here a text that was handed out stands, and the rest is decoded alone.
        """
        self._fresh.append(token)
        before = self._text(self._context)
        text = self._text(self._context + self._fresh)
        if text.endswith(UNFINISHED) and len(self._fresh) < LONGEST_WAIT:
            return ""
        consistent = text.startswith(before)
        new = text[len(before) :] if consistent else self._text(self._fresh)
        if new:
            self._context = self._fresh
        elif len(self._context) < LONGEST_WAIT:  # silent so far, but the next may depend on it
            self._context = self._context + self._fresh
        self._fresh = []
        return new

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
