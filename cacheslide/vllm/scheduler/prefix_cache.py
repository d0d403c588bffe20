"""Keeps approximate KV out of exact requests' reach: block hashes that no other request can have.

vLLM finds shared blocks by a chain of hashes. From the first block that holds a row vLLM itself did not compute, the
chain of that request is mixed with a secret of its own. Blocks before it stay shared; the request still finds its own
blocks again after a preemption, and requests of one family (`beam_groups.py`), which share a secret, find each other's.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
from vllm.v1.request import RequestStatus


class _ApartHasher:
    """A request's block hasher whose hashes from block `first` on carry `salt`."""

    def __init__(self, plain, first: int, salt: bytes) -> None:
        self.plain, self.first, self.salt = plain, first, salt

    def __call__(self, request) -> list[bytes]:
        shared = max(0, self.first - len(request.block_hashes))
        plain = self.plain(request)
        return [*plain[:shared], *self.own(plain[shared:])]

    def own(self, plain: Sequence[bytes]) -> list[bytes]:
        """The hashes that take the places of `plain` ones: each differs by a mask that is made of the secret.

        To meet another request's hash so, one would have to know the mask or invert the hash.
        """
        if not plain:
            return []
        width = len(plain[0])
        mask = np.frombuffer(hashlib.shake_256(self.salt).digest(width), np.uint8)
        masked = (np.frombuffer(b"".join(plain), np.uint8).reshape(-1, width) ^ mask).tobytes()
        return [masked[at : at + width] for at in range(0, len(masked), width)]


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
    request.block_hashes[first:] = apart.own(request.block_hashes[first:])


def shares_unfilled_blocks(request, hits: int, running: Iterable, block_size: int) -> bool:
    """Whether a request's first `hits` blocks, from the prefix cache, are in part those that this step's forward fills.

    vLLM shares a block as soon as the request that computes it is scheduled. Its own attention then finds the rows
    there, but reuse runs before the forward. Hashes are chained, so one comparison a running request is enough.
    """
    for other in running:
        if other.status != RequestStatus.RUNNING:
            continue
        unfilled = other.num_computed_tokens // block_size  # its first block that is not full yet
        if unfilled < min(hits, len(other.block_hashes)):
            shared = other.block_hashes[unfilled] == request.block_hashes[unfilled]
            if shared:
                return True
    return False
