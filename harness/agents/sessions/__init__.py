"""Recorded sessions of real agents: one file a log format, recognised by content."""
