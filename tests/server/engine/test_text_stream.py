import random

import pytest
from factories import byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from polyhead.server.engine.text_stream import LONGEST_WAIT, TextStream

TOKENIZER: FastTokenizer = byte_tokenizer().backend_tokenizer
LOST = "\ufffd"
text = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("aé漢字🙂👩‍👩‍👧🇫🇷e\u0301\u0302 \n"), max_size=30),
)


def byte_fallback() -> FastTokenizer:
    """As of Llama 2, Mistral and Gemma: words with a space mark, and bytes for all the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "▁a", "b", "▁the", "é", "漢", "🙂", "▁▁"]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<s>", "</s>"])
    return fast


FALLBACK = byte_fallback()


def ids_of(written: str) -> list[int]:
    return list(written.encode())


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    out: list[str] = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    out.append(stream.flush())
    return out, stream


@settings(deadline=None)
@given(text.filter(lambda t: not t.endswith(LOST)))
@example("👩‍👩‍👧‍👦🇫🇷e\u0301")
def test_pieces_join_to_the_whole_text(written: str) -> None:
    out, stream = pieces(ids_of(written))
    assert "".join(out) == written == TOKENIZER.decode(ids_of(written))
    assert not stream.stopped
    if LOST not in written:
        assert not any(LOST in piece for piece in out)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 260), max_size=60))
@example([255] * 20 + [97])
@example([0xF0, 0x9F, 97, 0x99, 0x82])
@example([300, 97, 5000, 98])
def test_any_tokens_at_all_can_be_shown(ids: list[int]) -> None:
    """Random bytes are seldom UTF-8, and a vocabulary may be smaller than the model's."""
    out, _ = pieces(ids)
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    joined = "".join(out)
    assert whole.startswith(joined)
    assert set(whole[len(joined) :]) <= {LOST}


def joined(tokenizer: FastTokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(token) for token in ids), stream.flush()])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() + 2), max_size=40))
@example([3 + ord("T"), 3 + 0xE9, 3 + 0xE9, 261])
def test_bytes_that_take_their_meaning_back_stop_nothing(ids: list[int]) -> None:
    """With byte fallback one wrong byte unmakes the right ones before it."""
    assert joined(FALLBACK, [*ids, 261]).endswith("b")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(259, 266), st.just(1), text), max_size=12))
def test_with_byte_fallback_whole_characters_join_to_the_whole_text(
    parts: list[int | str],
) -> None:
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [3 + byte for byte in part.encode()]
    whole = FALLBACK.decode(ids, skip_special_tokens=True)
    assert joined(FALLBACK, ids).rstrip(LOST) == whole.rstrip(LOST)


def test_endless_garbage_is_shown_after_a_while() -> None:
    stream = TextStream(TOKENIZER)
    said = [stream.push(255) for _ in range(3 * LONGEST_WAIT)]
    assert [len(piece) for piece in said if piece] == [LONGEST_WAIT] * 3


@settings(deadline=None)
@given(text, st.integers(1, 3))
def test_half_a_character_stays_out(written: str, cut: int) -> None:
    ids = ids_of(written + "🙂")[: -4 + cut]
    assert "".join(pieces(ids)[0]).rstrip(LOST) == written.rstrip(LOST)


def reference(written: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Byte by byte: the text in front of the first stop string that is complete."""
    for end in range(len(written) + 1):
        found = [written[:end].find(s) for s in stop if s in written[:end]]
        if found:
            return written[: min(found)], True
    return written, False


words = st.text(st.sampled_from("ab🙂漢"), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("ab🙂漢"), max_size=25), st.lists(words, max_size=3).map(tuple))
@example("aabab", ("abab", "bab"))
@example("aaab", ("aab",))
def test_stop_strings_never_leak_a_part(written: str, stop: tuple[str, ...]) -> None:
    stream = TextStream(TOKENIZER, stop)
    wanted, stops = reference(written, stop)
    said = ""
    for token in ids_of(written):
        said += stream.push(token)
        assert wanted.startswith(said), "text of a stop string was handed out"
        if stream.stopped:
            break
    assert stream.stopped == stops
    assert said + stream.flush() == wanted


def test_a_possible_stop_string_is_held_back_and_then_let_go() -> None:
    stream = TextStream(TOKENIZER, ("STOP",))
    assert [stream.push(token) for token in ids_of("xSTOx")] == ["x", "", "", "", "STOx"]
    assert [stream.push(token) for token in ids_of("ST")] == ["", ""]
    assert stream.flush() == "ST"
    assert stream.flush() == ""


def test_nothing_more_than_needed_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ("STOP",))
    assert [stream.push(token) for token in ids_of("SSTTSS")] == ["", "S", "", "STT", "", "S"]


def test_stop_in_the_first_token() -> None:
    out, stream = pieces(ids_of("abc"), ("a",))
    assert out == ["", ""]
    assert stream.stopped


def test_of_two_stop_strings_in_one_piece_the_first_counts() -> None:
    vocabulary = FastTokenizer.from_str(TOKENIZER.to_str())
    vocabulary.add_tokens(["one two three"])
    token = vocabulary.token_to_id("one two three")
    stream = TextStream(vocabulary, ("three", "two"))
    assert stream.push(token) == "one "
    assert stream.stopped
    assert stream.flush() == ""


@pytest.mark.parametrize("seed", range(3))
def test_special_tokens_are_silent(seed: int) -> None:
    generator = random.Random(seed)
    ids = ids_of("some 🙂 text")
    for _ in range(5):
        ids.insert(generator.choice([0, 4, len(ids)]), 256)
    assert "".join(pieces(ids)[0]) == "some 🙂 text"
