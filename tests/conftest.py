"""What holds for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is first imported
os.environ["GOMP_SPINCOUNT"] = "0"  # tests share their cores: no thread spins while it waits
