"""Tenants: namespaces and salts, encoded unambiguously into chunk keys and vLLM's block hashes.

Any namespace or salt is allowed; two requests share KV only if all of them are equal.
"""

_PARTED = "\0\0\0"  # prefix that no older spelling has: those hold exactly two NULs
_SALTED = "\0cacheslide:"  # prefix of a salt that includes a namespace


def tenant_of(server: str, namespace: str, salt: str) -> str:
    """The server's namespace, the request's and its salt as one text; injective.

    Parts without NUL are joined by NUL, as in older stores; others are written with their lengths.
    """
    parts = (server, namespace, salt)
    if any("\0" in part for part in parts):
        return _PARTED + "".join(f"{len(part)}:{part}" for part in parts)
    return "\0".join(parts)


def salted(namespace: str, salt: str) -> str:
    """The salt of vLLM's block hashes for a request of `namespace` with `salt`; injective.

    Without a namespace it is `salt` itself, so that such requests share blocks as in vLLM.
    """
    if not namespace and not salt.startswith(_SALTED):
        return salt
    return f"{_SALTED}{len(namespace)}:{namespace}{salt}"


def unsalted(salt: str) -> str:
    """The request's own salt, from a result of `salted`."""
    if not salt.startswith(_SALTED):
        return salt
    length, colon, rest = salt[len(_SALTED) :].partition(":")
    made = bool(colon) and length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= len(rest)
    return rest[int(length) :] if made else salt


def ambiguous(salt: str) -> bool:
    """Whether a client's salt looks like a result of `salted`."""
    return salt.startswith(_SALTED)
