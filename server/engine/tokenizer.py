"""Text to token ids and back, for one backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast


class NoChatTemplate(ValueError):
    """The backbone has no chat template, or it refused these messages."""


class Tokenizer:
    """A backbone's tokenizer. Thread-safe: nothing here changes after construction.

    decoder_start: what an encoder-decoder's answers begin with; None is a causal backbone, whose
    answers begin with the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        extra_stops: Sequence[int] = (),
        decoder_start: int | None = None,
    ) -> None:
        self.decoder_start = decoder_start
        self.transformers = tokenizer
        self.fast: FastTokenizer = tokenizer.backend_tokenizer
        self.vocab_size = self.fast.get_vocab_size()
        own = tokenizer.eos_token_id
        self.stop_ids = frozenset([*extra_stops, *([own] if isinstance(own, int) else [])])

    @classmethod
    def load(
        cls, folder: Path, extra_stops: Sequence[int] = (), decoder_start: int | None = None
    ) -> "Tokenizer":
        """From a transformers folder. extra_stops: the generation config's end tokens."""
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(loaded, extra_stops, decoder_start)

    def encode(self, text: str) -> list[int]:
        """Token ids of exactly this text: nothing is added for a causal backbone. Sources and
        targets of an encoder-decoder end as it was taught, T5's with `</s>`."""
        adds = self.decoder_start is not None
        # Unlike `encode`, the batch call lets other threads run: a long text takes 100 ms.
        ids: list[int] = self.fast.encode_batch_fast([text], add_special_tokens=adds)[0].ids
        return ids

    def placed(self, prompt: tuple[int, ...]) -> dict[str, Any]:
        """Where a prompt goes in a request, by field: it begins the answer or is its source."""
        if self.decoder_start is None:
            return {"prompt": prompt}
        return {"prompt": (self.decoder_start,), "source": prompt}

    def room(self, context: int, prompt: int) -> int:
        """Most tokens of an answer in a context, after or beside so many of the prompt."""
        return context - (prompt if self.decoder_start is None else 1)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises `NoChatTemplate` with the template's own reason.
        """
        try:
            text: Any = self.transformers.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # templates raise whatever they like
            raise NoChatTemplate(str(exc).splitlines()[0] if str(exc) else "refused") from exc
        return self.encode(str(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def whole_text(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.fast.decode(list(ids), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """One token as text, special ones included; a part of a character becomes U+FFFD."""
        return self.fast.decode([token], skip_special_tokens=False)
