"""Tiers that outlive a process: chunks as checked records in files or on a server. What serving reads and writes."""
