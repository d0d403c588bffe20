"""Pages in memory (paper section 4.4): which leave first, what has to be written, and the load-write orders."""
