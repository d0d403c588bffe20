"""One file a figure; each reads results only and has `load(path)` and `draw(results) -> Figure`."""
