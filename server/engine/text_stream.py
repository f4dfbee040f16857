"""Token by token to text, holding back what cannot be shown yet."""

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one choice as its tokens arrive.

    Bytes of an unfinished character and the beginning of a possible stop string are held back;
    what has been handed out is never taken back.
    """

    def __init__(self, tokenizer: FastTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token releases. Sets `stopped` when a stop string is complete."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
