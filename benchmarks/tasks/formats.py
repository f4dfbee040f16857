"""Tasks on ways to write numbers, dates and times. The items are drawn from a range."""

from collections.abc import Iterator
from datetime import date, timedelta

from babel.dates import format_date

from benchmarks.tasks.sources import BABEL
from benchmarks.tasks.spec import Pair, TaskSpec

UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ROMAN = dict(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"],
        strict=True,
    )
)
FIRST_DAY = date(1900, 1, 1)
DAYS = 2000
STEP = 23
"""Days between two items: prime to weeks, months and years, so that every form turns up."""


def in_words(number: int) -> str:
    """0 ≤ number < 10,000 in American words: nine thousand four hundred twenty-one."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {in_words(number % size)}" if number % size else ""
            return f"{in_words(number // size)} {name}{rest}"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")


def roman(number: int) -> str:
    """1 ≤ number < 4,000."""
    found = ""
    for size, letters in ROMAN.items():
        found += letters * (number // size)
        number %= size
    return found


def ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def number_words() -> Iterator[Pair]:
    return (Pair(str(n), in_words(n), f"number {n}") for n in range(13, 1000))


def number_digits() -> Iterator[Pair]:
    return (Pair(in_words(n), str(n), f"number {n}") for n in range(13, 1000))


def romans() -> Iterator[Pair]:
    return (Pair(str(n), roman(n), f"number {n}") for n in range(1, 2000))


def ordinals() -> Iterator[Pair]:
    return (Pair(str(n), ordinal(n), f"number {n}") for n in range(1, 2000))


def dates() -> Iterator[Pair]:
    days = (FIRST_DAY + timedelta(days=STEP * i) for i in range(DAYS))
    return (Pair(format_date(d, "long", "en_US"), d.isoformat()) for d in days)


def times() -> Iterator[Pair]:
    for minute in range(24 * 60):
        hour, past = divmod(minute, 60)
        half = "am" if hour < 12 else "pm"
        yield Pair(f"{hour % 12 or 12}:{past:02} {half}", f"{hour:02}:{past:02}")


TASKS = (
    TaskSpec("number_words", "format", "Write the number in words.", (), number_words),
    TaskSpec("number_digits", "format", "Write the number in digits.", (), number_digits),
    TaskSpec("roman", "format", "Write the number in Roman numerals.", (), romans),
    TaskSpec("iso_date", "format", "Write the date as year-month-day.", (BABEL,), dates),
    TaskSpec("ordinal", "format", "Write the number as an ordinal.", (), ordinals, held_out=True),
    TaskSpec("time_24", "format", "Write the time in the 24-hour clock.", (), times, held_out=True),
)
