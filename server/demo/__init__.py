"""A small backbone and an inventory for it, so that anyone can start the server and try it."""
