"""What traffic says about reuse by itself: which tokens of a session occurred before, where, and in what order."""
