"""Hides approximate KV from exact requests by giving its blocks hashes that no other request has.

vLLM finds shared blocks by a chain of hashes. From the first block with a row that vLLM did not compute itself, a
request's chain is mixed with a secret. Blocks before it stay shared; the request still finds its own blocks after a
preemption, and requests of a family (`beam_groups.py`), which share a secret, find each other's.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
from vllm.v1.request import RequestStatus


class _ApartHasher:
    """A request's block hasher; hashes from block `first` on are mixed with `salt`."""

    def __init__(self, plain, first: int, salt: bytes) -> None:
        self.plain, self.first, self.salt = plain, first, salt

    def __call__(self, request) -> list[bytes]:
        shared = max(0, self.first - len(request.block_hashes))
        plain = self.plain(request)
        return [*plain[:shared], *self.own(plain[shared:])]

    def own(self, plain: Sequence[bytes]) -> list[bytes]:
        """Hashes that replace the `plain` ones, each XORed with a mask derived from the secret.

        A collision with another request's hash would require the mask or inverting the hash.
        """
        if not plain:
            return []
        width = len(plain[0])
        mask = np.frombuffer(hashlib.shake_256(self.salt).digest(width), np.uint8)
        masked = (np.frombuffer(b"".join(plain), np.uint8).reshape(-1, width) ^ mask).tobytes()
        return [masked[at : at + width] for at in range(0, len(masked), width)]


def new_secret() -> bytes:
    """A random secret."""
    return secrets.token_bytes(16)


def key_apart(request, first: int, secret: bytes | None = None) -> None:
    """Give blocks `first`, `first` + 1, ... of a vLLM `request` hashes of their own, including future blocks.

    Requests with equal tokens, `first` and `secret` have equal hashes; None makes a new secret.
    """
    hasher = request._block_hasher
    if hasher is None:  # prefix caching is off
        return
    if isinstance(hasher, _ApartHasher):
        if first >= hasher.first:
            return
        hasher = hasher.plain  # rows are computed anew: a new secret, so that old blocks do not match
        request._block_hasher = hasher
        request.block_hashes.clear()
        request.update_block_hashes()
    request._block_hasher = apart = _ApartHasher(hasher, first, secret or new_secret())
    request.block_hashes[first:] = apart.own(request.block_hashes[first:])


def shares_unfilled_blocks(request, hits: int, running: Iterable, block_size: int) -> bool:
    """Whether the first `hits` cached blocks of a request include blocks that this step's forward fills.

    vLLM shares a block as soon as the request that computes it is scheduled: its attention then finds the rows, but
    reuse runs before the forward. Hashes are chained, so one comparison per running request suffices.
    """
    for other in running:
        if other.status != RequestStatus.RUNNING:
            continue
        unfilled = other.num_computed_tokens // block_size  # its first incomplete block
        if unfilled < min(hits, len(other.block_hashes)):
            shared = other.block_hashes[unfilled] == request.block_hashes[unfilled]
            if shared:
                return True
    return False
