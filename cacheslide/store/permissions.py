"""Checks who else can write to a folder: by its mode, by a POSIX access list, or by moving it from within a parent.

"Others" are all users except this process's and root (which no permission restricts), and groups with other members. A
folder with the sticky bit (as /tmp) counts as safe: users cannot remove or rename others' files there. The owner of a
parent is not checked: a store in another user's folder is the operator's choice.
"""

import grp
import os
import pwd
import stat
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

_ACL, _VERSION, _WRITE = "system.posix_acl_access", 2, 2
_USER, _GROUP, _MASK = 0x02, 0x08, 0x10  # tags: named users, named groups, and the mask of their permissions


def trusted(uid: int) -> bool:
    """Whether `uid` is this process's user, or root, which no permission restricts."""
    return uid in (os.geteuid(), 0)


def others_may_write(status: os.stat_result, place: int | Path) -> str:
    """Why others can write to the folder `place` (a descriptor or a path) with this status; empty if they cannot."""
    if status.st_mode & stat.S_ISVTX:
        return ""
    if status.st_mode & (0o002 if _own_group(status.st_gid) else 0o022):
        return f"mode {stat.S_IMODE(status.st_mode):o}"
    return _listed(place)


def writable_parent(path: Path) -> str:
    """The nearest parent, up to the root, from which others can move the folder, and why; empty if there is none.

    If the path contains a link, the parents of both paths are checked; inaccessible ones are not.
    """
    for parent in dict.fromkeys([*path.absolute().parents, *path.resolve().parents]):
        with suppress(OSError):
            if why := others_may_write(os.stat(parent), parent):
                return f"{parent} ({why})"
    return ""


def _listed(place: int | Path) -> str:
    """The first other user or group to whom an access list gives write permission; empty if there is none.

    Layout, little-endian: version (4 bytes), then entries of tag (2), permissions (2) and id (4).
    """
    try:
        raw = os.getxattr(place, _ACL)
    except OSError:  # no list, or not supported by the file system
        return ""
    if len(raw) % 8 != 4 or int.from_bytes(raw[:4], "little") != _VERSION:
        return "an access list of unknown form"
    entries = list(struct.iter_unpack("<HHI", raw[4:]))
    mask = next((allowed for tag, allowed, _ in entries if tag == _MASK), 7)
    for tag, allowed, identifier in entries:
        if allowed & mask & _WRITE:
            if tag == _USER and not trusted(identifier):
                return f"an access list lets user {identifier}"
            if tag == _GROUP and not _own_group(identifier):
                return f"an access list lets group {identifier}"
    return ""


@cache
def _own_group(gid: int) -> bool:
    """Whether a group has no member but this process's user, as with one group per user."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name}
