"""What holds for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is first imported
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the server sets it; torch reads it when imported
