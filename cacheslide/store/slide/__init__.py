"""Pages in memory (paper section 4.4): eviction order, write-back, and load-write orders."""
