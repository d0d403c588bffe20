"""Reuse in recorded traffic: which tokens of a session occurred before, where, and in what order."""
