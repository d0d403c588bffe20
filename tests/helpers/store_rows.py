"""The row width of stores that are configured by a mapping."""

ROW = 2 * 2 * 8 * 4  # of the tests' chunks: K and V, 2 heads of 8 floats
