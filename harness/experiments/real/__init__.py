"""Measurements on real data and recorded agent sessions, which the project reads by path and never holds."""
