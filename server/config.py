"""Every setting of the server, in one class: flags and environment variables end up here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX = "POLYHEAD_"
CLIENT_VARIABLES = frozenset({"POLYHEAD_URL", "POLYHEAD_API_KEY"})
"""What the commands that ask a server read; their shell may start a server too."""
PASSWORDS = re.compile(r"(?<=://)(?P<user>[^:/?#]*):.*@|(?P<name>password=)[^&]*", re.IGNORECASE)


class Settings(BaseSettings):
    """Frozen configuration of one server process.

    A flag goes before the environment's `POLYHEAD_<NAME>`, that before the file of `config`, and
    that before the default. Descriptions are the help texts of `polyhead serve`.
    Raises `ValidationError` for a value or a key of the file that is wrong, `OSError` and
    `ValueError` for a file that cannot be read or is no TOML.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    config: Path | None = Field(
        None, description="TOML file of settings, named as the flags: max_running = 32"
    )
    backbone: str = Field(
        description="Folder of a transformers model, causal or like T5, or its name on the hub"
    )
    inventory: Path = Field(description="Folder with inventory.json and inventory.safetensors")
    data_dir: Path = Field(description="Folder for the task registry")
    database_url: str | None = Field(
        None,
        description="PostgreSQL for the task registry, as postgresql://user:password@host/name, so "
        "that several servers share it; None is SQLite in --data-dir",
    )
    blob_store: str | None = Field(
        None,
        description="S3-compatible store for private adapters, as s3://bucket/prefix; None is "
        "--data-dir, or PostgreSQL where --database-url names one",
    )
    routing_precision: Literal["float32", "float16"] = Field(
        "float32", description="Numbers that routings are stored as where a request says none"
    )
    kept_versions: int = Field(20, ge=0, description="Former versions kept of each task")
    restore_seconds: float = Field(
        7 * 86400.0, ge=0, description="How long a deleted task can be restored"
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; only loopback without --api-keys-file or --allow-remote",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    allow_remote: bool = Field(
        False, description="Serve without keys on an address others can reach"
    )
    api_keys_file: Path | None = Field(
        None,
        description="TOML or JSON file of the keys that may call; it is read again when it "
        "changes. Without one nobody needs a key and only loopback is served",
    )
    cors_origin: list[str] = Field(
        [], description="Web site, such as https://example.org, whose pages may call; * is any"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Numbers that the backbone computes in; auto is bfloat16 where the device "
        "computes in it, float32 elsewhere",
    )
    device: str = Field(
        "auto", description="A torch device such as cpu or cuda:0; auto is cuda where there is one"
    )
    threads: int | None = Field(
        None, ge=1, description="Compute threads; None leaves torch's choice"
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="Processes that the backbone's layers are cut over, on one machine; with GPUs "
        "each takes one of its own. Attention heads and the inventory's heads must divide by it",
    )
    pack_weights: bool = Field(
        True,
        description="On a CPU in bfloat16: keep a copy of the backbone's weights in the order "
        "of the products, which are faster so; takes their memory once more",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="Hold the backbone's linear layers, but not the output head, in so many bits; "
        "needs the extra polyhead[quantize]. Skills stay as they are, fits compute unquantised",
    )

    max_running: int = Field(64, ge=1, description="Sequences in a batch")
    max_step_tokens: int | None = Field(
        None, ge=1, description="Tokens computed in one step; None suits the device"
    )
    max_waiting: int = Field(1024, ge=1, description="Requests in line before 503")
    max_wait_seconds: float = Field(
        60.0, gt=0, description="Expected wait of a request before 503; inf leaves --max-waiting"
    )
    max_context: int | None = Field(
        None,
        ge=2,
        description="Tokens of prompt and answer, or of either for an encoder-decoder; None is the "
        "backbone's",
    )
    kv_cache_tokens: int = Field(65536, ge=16, description="Tokens the key-value cache may hold")
    prefix_cache_tokens: int = Field(
        32768,
        ge=0,
        description="Of these, how many may be kept of finished requests for prompts that begin "
        "alike; they give way to running ones. 0 keeps none",
    )

    max_n: int = Field(16, ge=1, description="Choices in one /generate request")
    max_logprobs: int = Field(20, ge=0, description="Alternatives named beside each token")
    max_stop_strings: int = Field(16, ge=0, description="Stop strings in one request")
    max_stop_length: int = Field(256, ge=1, description="Characters in one stop string")
    max_choices: int = Field(256, ge=1, description="Choices in one /score request")
    max_context_lines: int = Field(
        256, ge=1, description="Lines or examples of a context that a task is made from"
    )
    max_mixture: int = Field(64, ge=1, description="Tasks in one mixture")
    max_body_bytes: int = Field(
        16 << 20, ge=1024, description="Bytes of a request's body before 413"
    )
    max_unpacked_bytes: int = Field(
        64 << 20, ge=1024, description="Bytes that an uploaded archive may unpack to before 413"
    )
    max_adapter_rank: int = Field(256, ge=1, description="Rank of an uploaded private adapter")
    max_deadline: float = Field(3600.0, gt=0, description="Seconds one request may take at most")
    task_cache_bytes: int = Field(
        512 << 20, ge=1 << 20, description="Bytes of tasks kept resident; others wait on disk"
    )
    private_cache_bytes: int = Field(
        256 << 20,
        ge=1024,
        description="Bytes of private adapters resident at the same time; others wait on disk, "
        "those next in line in up to a quarter as many bytes more",
    )
    private_wait_seconds: float = Field(
        10.0,
        ge=0,
        description="How long a request waits for room for its private adapter before 503",
    )
    fit_share: float = Field(
        0.3, gt=0, le=1, description="Share of the time a fit may compute while requests run"
    )
    max_fit_examples: int = Field(512, ge=1, le=1024, description="Examples in one fit")
    max_fit_tokens: int = Field(
        512, ge=4, description="Tokens of one example with its template and answer"
    )
    max_fit_jobs: int = Field(256, ge=1, description="Fits queued or running before 503")
    fit_batch_jobs: int = Field(16, ge=1, description="Fits that are computed together at most")
    fit_idle_seconds: float = Field(
        60.0, ge=0, description="How long the fitting process is kept without work"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Of the log on standard error; json is one object a line"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged; info has a line for every call"
    )
    log_prompts: bool = Field(False, description="Log what is asked, too")
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector for traces, such as http://127.0.0.1:4318"
    )
    task_series: int = Field(
        32, ge=0, le=1024, description="Busiest tasks that have metrics of their own"
    )
    stream_stall_seconds: float = Field(
        30.0,
        gt=0,
        le=86400,
        description="How long a client may leave what it is sent unread before it is cut off",
    )
    max_unread_outputs: int = Field(
        4096,
        ge=1024,
        description="Outputs, one a token, kept for a stream whose client does not read; one more "
        "ends its request",
    )
    drain_delay_seconds: float = Field(
        0.0,
        ge=0,
        description="How long after SIGTERM requests are still taken in while /health/ready says "
        "503, so that a balancer notices before anything is refused",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="How long SIGTERM waits for running requests"
    )

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        """A browser sends no path and no slash at the end, so such an origin would match none."""
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"expected scheme://host[:port] or *, not {origin!r}")
        return origins

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Where settings come from, the first that has one wins."""
        path = init_settings().get("config") or env_settings().get("config")
        if path is None:
            return init_settings, env_settings
        with Path(path).open("rb"):  # a file that is not there would otherwise count as empty
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(path))

    def shown(self) -> dict[str, Any]:
        """Every setting as JSON, passwords in addresses as `***`."""
        plain = self.model_dump(mode="json")
        secret = {name: plain[name] for name in ("database_url", "blob_store") if plain[name]}
        return {**plain, **{name: _masked(text) for name, text in secret.items()}}


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: most likely misspelt ones."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES
    return sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known)


def _masked(address: str) -> str:
    return PASSWORDS.sub(
        lambda found: f"{found['name']}***" if found["name"] else f"{found['user']}:***@", address
    )
