"""Fuzzing and fault-injection campaigns, with counts of inputs and failures."""
