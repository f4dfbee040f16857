"""Tasks on places, languages and money.

Country names are inputs of held-out tasks only. What would give their answers away is left out
of the training tasks: places named like a capital or a currency, and names of currencies, most
of which name their country too.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from babel import Locale

from benchmarks.tasks.sources import BABEL, COUNTRYINFO, GEONAMES, PYCOUNTRY
from benchmarks.tasks.spec import Pair, TaskSpec, at_most, normal

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
KIND = "world knowledge"


@cache
def read(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(GEONAMES.text("data", name))
    return found


@cache
def countries() -> dict[str, dict[str, Any]]:
    """Code → record with CLDR's `name`; inhabited countries with short names only."""
    names = Locale("en").territories
    found = {
        code: {**row, "name": names.get(code, "")} for code, row in read("countries.json").items()
    }
    return {c: r for c, r in found.items() if r["population"] and short(r["name"])}


def short(name: str) -> bool:
    """Names of up to four words, without what only tells namesakes apart."""
    words = name.split()
    return 0 < len(words) <= 4 and not {"-", "SAR"} & set(words) and "(" not in name


def plain(name: str) -> bool:
    """Letters and spaces of English, at most three words."""
    return name.isascii() and name.replace(" ", "").isalpha() and len(name.split()) <= 3


@cache
def answers() -> frozenset[str]:
    """Capitals and currencies: a place of that name would give a held-out answer away."""
    rows = read("countries.json").values()
    return frozenset(normal(row[f]) for row in rows for f in ("capital", "currencyname"))


@cache
def cities(inhabitants: int) -> tuple[dict[str, Any], ...]:
    """Cities at least so large whose name no other city has, largest first; no capitals."""
    everywhere = list(read("cities15000.json").values())
    seen = Counter(normal(city["name"]) for city in everywhere)
    found = [
        city
        for city in everywhere
        if city["population"] >= inhabitants
        and seen[normal(city["name"])] == 1
        and normal(city["name"]) not in answers()
        and plain(city["name"])
    ]
    return tuple(sorted(found, key=lambda city: (-city["population"], city["name"])))


def city_countries() -> Iterator[Pair]:
    known = countries()
    found = (c for c in cities(100_000) if c["countrycode"] in known)
    return at_most(80, (Pair(c["name"], known[c["countrycode"]]["name"]) for c in found))


def city_continents() -> Iterator[Pair]:
    known = countries()
    found = (c for c in cities(30_000) if c["countrycode"] in known)
    codes = ((c["name"], c["countrycode"]) for c in found)
    return (Pair(name, CONTINENTS[known[code]["continentcode"]]) for name, code in codes)


def city_states() -> Iterator[Pair]:
    """Cities of the United States, of any size the source has."""
    states = {row["code"]: row["name"] for row in read("us_states.json").values()}
    found = [c for c in read("cities15000.json").values() if c["countrycode"] == "US"]
    seen = Counter(normal(city["name"]) for city in found)
    largest = sorted(found, key=lambda city: (-city["population"], city["name"]))
    once = (c for c in largest if seen[normal(c["name"])] == 1 and c["admin1code"] in states)
    names = ((c["name"], states[c["admin1code"]]) for c in once if plain(c["name"]))
    return at_most(40, (Pair(city, state) for city, state in names if city != state))


def region_countries() -> Iterator[Pair]:
    known = countries()
    rows = json.loads(PYCOUNTRY.text("databases", "iso3166-2.json"))["3166-2"]
    seen = Counter(normal(row["name"]) for row in rows)
    top = sorted((row["code"], row["name"]) for row in rows if not row.get("parent"))
    found = (
        Pair(name, known[code[:2]]["name"])
        for code, name in top
        if code[:2] in known
        and seen[normal(name)] == 1
        and normal(name) not in answers()
        and plain(name)
    )
    return at_most(25, found)


def demonyms() -> Iterator[Pair]:
    known = countries()
    rows = [
        json.loads(p.read_text("utf-8")) for p in sorted(COUNTRYINFO.path("data").glob("*.json"))
    ]
    codes = ((row.get("demonym", ""), row.get("ISO", {}).get("alpha2", "")) for row in rows)
    return (Pair(word, known[c]["name"]) for word, c in sorted(codes) if c in known and plain(word))


def language_names(language: str) -> dict[str, str]:
    return {c: name for c, name in Locale(language).languages.items() if c.isalpha()}


def language_codes() -> Iterator[Pair]:
    names = sorted(language_names("en").items())
    return (Pair(name, code) for code, name in names if len(code) == 2 and plain(name))


def language_german() -> Iterator[Pair]:
    german = language_names("de")
    names = sorted(language_names("en").items(), key=lambda item: (len(item[0]), item[0]))
    found = ((name, german.get(code, name)) for code, name in names if name.isalpha())
    return (Pair(name, other) for name, other in found if other != name and other.isalpha())


def about_countries(field: str) -> Iterator[Pair]:
    rows = sorted(countries().values(), key=lambda row: (-row["population"], row["name"]))
    return (Pair(row["name"], row[field]) for row in rows if row[field])


def country_codes() -> Iterator[Pair]:
    return about_countries("iso")


def country_capitals() -> Iterator[Pair]:
    return (p for p in about_countries("capital") if normal(p.input) != normal(p.output))


def country_currencies() -> Iterator[Pair]:
    return about_countries("currencyname")


def country_german() -> Iterator[Pair]:
    german = Locale("de").territories
    pairs = (Pair(p.input, german[p.output]) for p in country_codes())
    return (pair for pair in pairs if pair.input != pair.output and short(pair.output))


TASKS = (
    TaskSpec(
        "city_country", KIND, "Name the country of the city.", (GEONAMES, BABEL), city_countries
    ),
    TaskSpec(
        "city_continent",
        KIND,
        "Name the continent of the city.",
        (GEONAMES, BABEL),
        city_continents,
        choices=tuple(sorted(CONTINENTS.values())),
    ),
    TaskSpec("city_state", KIND, "Name the US state of the city.", (GEONAMES,), city_states),
    TaskSpec(
        "region_country",
        KIND,
        "Name the country of the region.",
        (PYCOUNTRY, GEONAMES, BABEL),
        region_countries,
    ),
    TaskSpec(
        "demonym_country",
        KIND,
        "Name the country of these people.",
        (COUNTRYINFO, GEONAMES, BABEL),
        demonyms,
    ),
    TaskSpec(
        "language_code", KIND, "Give the two-letter code of the language.", (BABEL,), language_codes
    ),
    TaskSpec(
        "language_german",
        "translation",
        "Translate the name of the language into German.",
        (BABEL,),
        language_german,
    ),
    TaskSpec(
        "country_code",
        KIND,
        "Give the two-letter code of the country.",
        (GEONAMES, BABEL),
        country_codes,
        held_out=True,
    ),
    TaskSpec(
        "country_capital",
        KIND,
        "Name the capital of the country.",
        (GEONAMES, BABEL),
        country_capitals,
        held_out=True,
    ),
    TaskSpec(
        "country_currency",
        KIND,
        "Name the currency of the country.",
        (GEONAMES, BABEL),
        country_currencies,
        held_out=True,
    ),
    TaskSpec(
        "country_german",
        "translation",
        "Translate the name of the country into German.",
        (GEONAMES, BABEL),
        country_german,
        held_out=True,
    ),
)
