"""Measurements. Each module is a command; RESULTS.md keeps what they printed."""
