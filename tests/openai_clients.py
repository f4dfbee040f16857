"""OpenAI's own Python client, pointed at a test's server."""

import httpx
import openai

NO_KEY = "none"
"""The client insists on a key; a server without a keys file looks at none."""


def sync_client(url: str, key: str = NO_KEY) -> openai.OpenAI:
    """Without retries, so that a test sees the first answer."""
    http = httpx.Client(trust_env=False, timeout=60)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)


def async_client(url: str, key: str = NO_KEY) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(trust_env=False, timeout=60)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http)
