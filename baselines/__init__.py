"""The rival systems of the study, one file each: every one is a `ReusePolicy` of the engine, found by entry point."""
