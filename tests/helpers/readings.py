"""Readings of a calm and of a busy machine."""

CALM = {
    "load_before": 0.3,
    "load_after": 0.4,
    "calibration_before_s": 0.010,
    "calibration_after_s": 0.011,
    "calibration_best_s": 0.010,
    "seconds": 5.0,
    "cores": 2,
    "others_cpu_share": 0.01,
    "others_seconds": 5.0,
    "disturbed": False,
    "why": "",
}
BUSY = CALM | {"others_cpu_share": 0.6, "disturbed": True, "why": "others took 60% of 2 cores"}
