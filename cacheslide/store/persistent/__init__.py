"""Tiers that outlive a process: checksummed records of chunks in files or on a server, used for serving."""
