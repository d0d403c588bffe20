"""CacheSlide inside an unmodified vLLM, as a KV connector.

The scheduler side (`scheduler/`) decides what a request reuses and which chunks are stored; the worker side
(`worker/`) runs `SelectivePrefill` over the loaded model and the paged KV cache. Usage: docs/vllm.md.
"""

CONNECTOR = "CacheSlideConnector"
