from pathlib import Path

import pytest

from polyhead.adapters.training.config import parse_config, read_config
from polyhead.adapters.training.errors import ConfigError

LEAST = 'backbone = "b"\noutput = "o"\n[data]\ntrain = ["x.jsonl"]\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "train.toml"
    path.write_text(text)
    return path


def test_defaults_are_those_that_were_published(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, LEAST))
    assert config.method == "mhr"
    assert config.logits_rate == pytest.approx(100 * config.optimiser.rate)
    given = read_config(written(tmp_path, LEAST + "[optimiser]\nlogits_rate = 0.5\n"))
    assert given.logits_rate == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "[skills]\nhead = 4\n", r"train\.toml: skills\.head: unknown key"),
        ("speed = 3\n" + LEAST, r"train\.toml: speed: unknown key"),
        (LEAST + "[skills]\nrank = 0\n", r"skills\.rank: .*greater than or equal to 1; found 0"),
        ('backbone = "b"\n[data]\ntrain = ["x"]\n', r"train\.toml: output: Field required"),
        (LEAST + "[data]\n", r"train\.toml: not TOML"),
        ('method = "lora"\n' + LEAST, r"train\.toml: method 'lora' means heads = 1, skills = 1"),
        ('method = "poly"\n' + LEAST, r"train\.toml: method 'poly' means heads = 1 in"),
        ('method = "mu-zero-shot"\n' + LEAST, r"needs an inventory to `start` from"),
        (LEAST + "[batch]\ntasks = 5\n", r"batch: examples \(32\) is no multiple of tasks \(5\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        read_config(tmp_path / "absent.toml")


def test_a_plain_table_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"here: data\.train: .*at least 1 item"):
        parse_config({"backbone": "b", "output": "o", "data": {"train": []}}, "here")
