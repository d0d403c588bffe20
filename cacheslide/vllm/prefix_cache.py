"""Keeps approximate KV out of exact requests' reach: block hashes that no other request can have.

vLLM finds shared blocks by a chain of hashes. From the first block that holds a row vLLM itself did not compute, the
chain of that request is mixed with a secret of its own. Blocks before it stay shared; the request still finds its own
blocks again after a preemption, and requests of one family (`families.py`), which share a secret, find one another's.
"""

import hashlib
import secrets


class _ApartHasher:
    """A request's block hasher whose hashes from block `first` on carry `salt`."""

    def __init__(self, plain, first: int, salt: bytes) -> None:
        self.plain, self.first, self.salt = plain, first, salt

    def __call__(self, request) -> list[bytes]:
        at = len(request.block_hashes)
        return [plain if at + i < self.first else self.own(plain) for i, plain in enumerate(self.plain(request))]

    def own(self, plain: bytes) -> bytes:
        """The hash that takes the place of `plain`."""
        return hashlib.sha256(plain + self.salt).digest()


def new_secret() -> bytes:
    """A secret that nobody can guess."""
    return secrets.token_bytes(16)


def key_apart(request, first: int, secret: bytes | None = None) -> None:
    """Give blocks `first`, `first` + 1, ... of a vLLM `request` hashes of their own, also those yet to come.

    Requests with the same tokens, `first` and `secret` have the same hashes (None: a secret that no other request has).
    """
    hasher = request._block_hasher
    if hasher is None:  # prefix caching is off
        return
    if isinstance(hasher, _ApartHasher):
        if first >= hasher.first:
            return
        hasher = hasher.plain  # rows are computed anew: a new secret, lest old blocks join the new ones
        request._block_hasher = hasher
        request.block_hashes.clear()
        request.update_block_hashes()
    request._block_hasher = apart = _ApartHasher(hasher, first, secret or new_secret())
    request.block_hashes[first:] = [apart.own(plain) for plain in request.block_hashes[first:]]
