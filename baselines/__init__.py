"""The baselines of the study, one file each: every one is a `ReusePolicy` of the engine, registered by entry point."""
