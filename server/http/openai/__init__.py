"""The calls of OpenAI's API, with the task as the `model`."""
