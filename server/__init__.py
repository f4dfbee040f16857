"""The service: requests in, tokens out, tasks kept and fitted."""

import os

# OpenMP reads it when torch is first imported. Threads that spin while they wait hold the very
# core that the one they wait for needs, wherever cores are fewer than what wants to run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
