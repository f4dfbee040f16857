"""The longer commands of `polyhead`, one module each."""
