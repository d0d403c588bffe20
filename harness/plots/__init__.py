"""One file a figure; each reads results only."""
