"""Blocks of a server's paged cache in use, from its metrics."""

import time

from harness.backends.http.pages import Pages, parse

TEXT = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {used}
vllm:cache_config_info{{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1234"}} 1.0
vllm:request_success_total{{engine="0"}} 3.0
"""


def test_metrics_give_blocks_in_use_and_what_is_missing_is_none():
    assert parse(TEXT.format(used="1.5e-02")) == {"used": 0.015, "blocks": 1234, "block_tokens": 16}
    assert parse("nothing\n") == {"used": None, "blocks": None, "block_tokens": None}


def test_the_largest_share_in_use_is_kept_beside_a_load():
    answers = iter(["0.1", "0.5", "0.2"])

    def read() -> str | None:
        used = next(answers, None)
        return None if used is None else TEXT.format(used=used)

    with Pages(read, every=0.002) as pages:
        time.sleep(0.05)
    assert pages.reading == {"used": 0.5, "blocks": 1234, "block_tokens": 16}
    with Pages(lambda: None) as silent:
        pass
    assert silent.reading is None
