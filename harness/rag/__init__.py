"""CacheBlend's RAG pipeline: retrieval, KV caches of the retrieved passages, decoding with promotions (docs/rag.md)."""
