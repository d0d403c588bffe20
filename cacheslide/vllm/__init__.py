"""CacheSlide inside an unmodified vLLM, as a KV connector.

The scheduler's half (`scheduler_side`) decides what a request reuses and which chunks are retained; the workers' half
(`worker_side`) runs `SelectivePrefill` over the loaded model and the paged KV cache. How to use it: docs/vllm.md.
"""

CONNECTOR = "CacheSlideConnector"
