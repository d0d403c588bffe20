"""Silences the store's log, which reports every damage, during campaigns that damage stores."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_store() -> Iterator[None]:
    """Drop the store's log messages below CRITICAL inside the block, or inside the function that it decorates."""
    logger = logging.getLogger("cacheslide.store")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
