"""Errors a user can act on: the command line prints their message as one line and exits with status 2."""


class CacheSlideError(Exception):
    """Base of every error this project raises on purpose."""


class PromptError(CacheSlideError, ValueError):
    """A prompt or its segments are malformed."""


class PolicyError(CacheSlideError, ValueError):
    """A reuse policy is unknown, incomplete or contradicts itself."""


class ModelError(CacheSlideError, ValueError):
    """A checkpoint is missing, incomplete or of a kind that is not supported."""


class StoreError(CacheSlideError, RuntimeError):
    """A chunk store cannot hold, find or read what was requested."""


class DataError(CacheSlideError, ValueError):
    """A data set is missing or does not follow its schema."""


class ConfigError(CacheSlideError, ValueError):
    """A configuration key or combination is not valid."""
