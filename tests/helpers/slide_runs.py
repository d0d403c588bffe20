"""Records of SLIDE's runs."""


def run_record(policy, seed, written, stall):
    counts = dict.fromkeys(
        ("record_bytes", "proc_write_bytes", "proc_read_bytes", "seconds", "dirty_written", "clean_dropped", "extents",
         "page_bytes", "memory_bytes", "reference_pages", "corrected_pages", "slices", "wrong_rows"), 1
    )  # fmt: skip
    counts |= {"record_bytes": 0, "wrong_rows": 0, "spill_bytes": written, "stall_s": stall}
    return {"condition": "main deep", "trace": "deep@1", "policy": policy, "seed": seed, "counts": counts}
