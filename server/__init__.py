"""The service: requests in, tokens out, tasks kept and fitted."""

import logging
import os

# OpenMP reads it when torch is first imported. Threads that spin for long while they wait hold the
# very core that the one they wait for needs; those that sleep at once wake too late.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# transformers imports torchao wherever it is, and that complains of what it was not built with.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
