"""Position encodings: rotary tables and delta rotation (rope). CoPE and CCPE join them here."""
