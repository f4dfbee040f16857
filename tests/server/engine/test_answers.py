from factories import byte_tokenizer

from polyhead.server.engine.answers import Answers
from polyhead.server.engine.batch import Batch, Row, Sampled
from polyhead.server.engine.kv_space import Place
from polyhead.server.engine.request import Event, Output, Request, SamplingParams, TokenLogprob
from polyhead.server.engine.sequence import STEM, Sequence
from polyhead.server.engine.tokenizer import Tokenizer

END = 256


class Conversation:
    """One request, answered token by token."""

    def __init__(self, **params: object) -> None:
        self.answers = Answers(Tokenizer(byte_tokenizer()))
        self.request = Request("r", "t", "g", (1, 2), params=SamplingParams(**params))  # type: ignore[arg-type]
        self.heads = self.answers.open(self.request)
        self.choices = self.heads[0].branches or self.heads

    def say(self, *tokens: int, index: int = 0) -> list[Output]:
        events: list[Event] = []
        for token in tokens:
            sequence = self.choices[index]
            row = Row(sequence, 0, len(sequence.tokens), Place(0, 0))
            events += self.answers.take(Batch([row], []), [Sampled(token)])
        return [event for event in events if isinstance(event, Output)]


def joined(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_the_end_token_is_reported_but_not_shown() -> None:
    talk = Conversation()
    outputs = talk.say(72, 105, END)
    assert joined(outputs) == "Hi"
    assert [o.finish_reason for o in outputs] == [None, None, "stop"]
    assert outputs[-1].token_ids == (END,)
    assert talk.answers.finished() == talk.choices
    assert not talk.answers.open_requests


def test_the_end_token_releases_what_was_held_back() -> None:
    assert joined(Conversation(stop=("Hip",)).say(72, 105, END)) == "Hi"


def test_the_last_token_allowed_releases_what_was_held_back() -> None:
    outputs = Conversation(stop=("Hip",), max_tokens=2).say(72, 105)
    assert joined(outputs) == "Hi"
    assert outputs[-1].finish_reason == "length"


def test_a_stop_string_on_the_last_token_allowed_is_a_stop() -> None:
    outputs = Conversation(stop=("i",), max_tokens=2).say(72, 105)
    assert joined(outputs) == "H"
    assert outputs[-1].finish_reason == "stop"


def test_ignoring_the_end_token_goes_on() -> None:
    outputs = Conversation(ignore_eos=True, max_tokens=3).say(72, END, 105)
    assert joined(outputs) == "Hi"
    assert [o.finish_reason for o in outputs] == [None, None, "length"]


def test_half_a_character_at_the_end_stays_out() -> None:
    assert joined(Conversation(max_tokens=3).say(72, 0xF0, 0x9F)) == "H"


def test_abort_hands_out_what_was_held_back() -> None:
    talk = Conversation(stop=("Hip",))
    assert joined(talk.say(72)) == ""
    (event,) = talk.answers.abort(["r", "unknown"])
    assert isinstance(event, Output)
    assert (event.text, event.finish_reason) == ("H", "abort")
    assert talk.answers.abort(["r"]) == []


def test_choices_end_one_by_one_and_the_stem_with_the_last() -> None:
    talk = Conversation(n=3)
    (stem,) = talk.heads
    assert stem.index == STEM
    assert [choice.index for choice in talk.choices] == [0, 1, 2]
    talk.say(END, index=1)
    assert talk.answers.finished() == [talk.choices[1]]
    events = talk.answers.abort(["r"])
    assert [e.index for e in events if isinstance(e, Output)] == [0, 2]
    assert talk.answers.finished() == [talk.choices[0], talk.choices[2], stem]


def test_only_the_late_are_expired() -> None:
    answers = Answers(Tokenizer(byte_tokenizer()))
    for name, deadline in (("early", 1.0), ("late", 2.0), ("never", None)):
        answers.open(Request(name, "t", "g", (1,), deadline=deadline))
    (event,) = answers.expire(1.5)
    assert isinstance(event, Output)
    assert (event.request_id, event.finish_reason) == ("early", "deadline")
    assert answers.open_requests == {"late", "never"}


def test_a_failed_request_gets_one_failure_however_many_choices() -> None:
    talk = Conversation(n=3)
    events = talk.answers.fail(["r", "unknown"], "why")
    assert [(e.request_id, getattr(e, "message", "")) for e in events] == [("r", "why")]
    assert set(talk.answers.finished()) == {*talk.choices, *talk.heads}


def test_scores_come_in_one_output_once_all_chunks_are_there() -> None:
    answers = Answers(Tokenizer(byte_tokenizer()))
    request = Request("r", "t", "g", (1,), continuations=((5, 6, 7),))
    (sequence,) = answers.open(request)
    entries = [TokenLogprob(token, -float(token)) for token in (5, 6, 7)]

    def take(sequence: Sequence, start: int, count: int, *scored: TokenLogprob) -> list[Event]:
        row = Row(sequence, start, count, Place(0, 0))
        return answers.take(Batch([row], []), [Sampled(scored=scored)])

    assert take(sequence, 0, 2, *entries[:2]) == []
    wanted = Output("r", 0, "", (5, 6, 7), tuple(entries), "stop")
    assert take(sequence, 2, 2, entries[2]) == [wanted]
