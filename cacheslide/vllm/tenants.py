"""Whose KV it is: namespaces and salts as part of chunk keys and of vLLM's block hashes, never confused.

Anyone may name any namespace or salt; two requests share KV only where all of them are equal.
"""

_PARTED = "\0\0\0"  # begins what the older spelling, which holds two NULs exactly, cannot be
_SALTED = "\0cacheslide:"  # begins a salt that holds a namespace too


def tenant_of(server: str, namespace: str, salt: str) -> str:
    """One text of the server's namespace, the request's and its salt; different triples have different texts.

    Parts without NUL are joined by NUL, as in stores written before lengths were; others carry their lengths.
    """
    parts = (server, namespace, salt)
    if any("\0" in part for part in parts):
        return _PARTED + "".join(f"{len(part)}:{part}" for part in parts)
    return "\0".join(parts)


def salted(namespace: str, salt: str) -> str:
    """The salt of vLLM's block hashes for a request of `namespace` with `salt`; different pairs have different salts.

    Without a namespace it is the salt itself, so that requests without one share blocks as in vLLM.
    """
    if not namespace and not salt.startswith(_SALTED):
        return salt
    return f"{_SALTED}{len(namespace)}:{namespace}{salt}"


def unsalted(salt: str) -> str:
    """The request's own salt in what `salted` made."""
    if not salt.startswith(_SALTED):
        return salt
    length, colon, rest = salt[len(_SALTED) :].partition(":")
    made = bool(colon) and length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= len(rest)
    return rest[int(length) :] if made else salt


def ambiguous(salt: str) -> bool:
    """Whether a client's salt looks like one that `salted` makes."""
    return salt.startswith(_SALTED)
