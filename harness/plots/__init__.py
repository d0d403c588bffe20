"""One module per figure, each with `load(path)` and `draw(results) -> Figure`; input is result files only."""
