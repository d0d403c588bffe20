"""Models the engine can run: the adapter protocol and the plain-PyTorch reference decoder."""
