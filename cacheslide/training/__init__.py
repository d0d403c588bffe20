"""CoPE by continued pretraining (LoRA and position tables on a frozen model) and CCPE calibration."""
