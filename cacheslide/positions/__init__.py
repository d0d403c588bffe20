"""Position encodings: rotary tables and delta rotation (rope), CoPE (cope) and its canonical slot offsets (ccpe)."""
