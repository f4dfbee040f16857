"""The service: requests in, tokens out, tasks kept and fitted."""

import os

# OpenMP reads it when torch is first imported. Threads that spin for long while they wait hold the
# very core that the one they wait for needs; those that sleep at once wake too late.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
