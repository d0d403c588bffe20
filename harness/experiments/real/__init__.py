"""Measurements on real data and recorded agent sessions, which are read by path and are not part of the repository."""
