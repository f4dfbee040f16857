"""Tokens and their log-probabilities, in the form of each call."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from polyhead.server.engine.request import TokenLogprob
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.http.generate import finite

UNFINISHED = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """Which byte each symbol of a byte-level vocabulary stands for.

    The symbols of printable bytes are those characters; the others come after them in order.
    """
    symbols = sorted(ByteLevel.alphabet())
    own = {symbol: ord(symbol) for symbol in symbols if ord(symbol) < 256}
    missing = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(sorted(set(symbols) - set(own)), missing, strict=True))


BYTES = _byte_alphabet()


class TokenForms:
    """Writes one backbone's tokens as OpenAI's calls do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The token, as `bytes:\\xe2` where it is a part of a character: no two are alike."""
        text = self._tokenizer.token_text(token)
        if UNFINISHED not in text:
            return text
        raw = self.raw(token)
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token: int) -> list[int] | None:
        """The token's UTF-8 bytes, also where they are only a part of a character."""
        text = self._tokenizer.token_text(token)
        if UNFINISHED not in text:
            return list(text.encode("utf-8", "surrogatepass"))
        piece = self._tokenizer.fast.id_to_token(token) or ""
        if piece.startswith("<0x") and len(piece) == 6:  # byte fallback
            return [int(piece[3:5], 16)]
        if piece and all(symbol in BYTES for symbol in piece):
            return [BYTES[symbol] for symbol in piece]
        return None

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`logprobs` of a chat's choice: its tokens, each with its likeliest alternatives."""
        content = [
            {
                **self._candidate(entry.token_id, entry.logprob),
                "top_logprobs": [self._candidate(*candidate) for candidate in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _candidate(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": finite(logprob), "bytes": self.raw(token)}

    def completion(
        self, entries: Sequence[TokenLogprob], offset: int, first: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """`logprobs` of a completion's choice, and the character after it.

        offset: the character that the first token begins at; a token that is a part of a character
        counts as one. first: an echoed prompt's first token, which nothing precedes.
        """
        ids = [entry.token_id for entry in entries]
        values: list[float | None] = [finite(entry.logprob) for entry in entries]
        tops: list[dict[str, float] | None] = [self._top(entry) for entry in entries]
        if first is not None:
            ids, values, tops = [first, *ids], [None, *values], [None, *tops]
        widths = [len(self._tokenizer.token_text(token)) for token in ids]
        offsets = list(accumulate(widths, initial=offset))
        form = {
            "tokens": [self.text(token) for token in ids],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets[:-1],
        }
        return form, offsets[-1]

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one wherever it stands."""
        found = {self.text(token): finite(logprob) for token, logprob in entry.top}
        if entry.top:
            found.setdefault(self.text(entry.token_id), finite(entry.logprob))
        return found
