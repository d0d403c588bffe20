"""Who else may write to a folder: by its mode, by a POSIX access list, and by moving it away from within a parent.

"Others" are all but this process's user, root, whom no permission keeps out, and a group that is the user's alone. A
folder with the sticky bit (as /tmp) counts as safe: nobody can remove or rename there what is not theirs. The owner of
a parent is not asked for: whoever puts a store into another user's folder has chosen to.
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
_USER, _GROUP, _MASK = 0x02, 0x08, 0x10  # tags of named users, named groups, and what these may have at most


def trusted(uid: int) -> bool:
    """This process's user, or root, whom no permission keeps out."""
    return uid in (os.geteuid(), 0)


def others_may_write(found: os.stat_result, place: int | Path) -> str:
    """What lets others write to the folder `place` (a descriptor or a path) of this status; empty when nothing does."""
    if found.st_mode & stat.S_ISVTX:
        return ""
    if found.st_mode & (0o002 if _own_group(found.st_gid) else 0o022):
        return f"mode {stat.S_IMODE(found.st_mode):o}"
    return _listed(place)


def writable_parent(path: Path) -> str:
    """The nearest parent, up to the root, from which others could move the folder away, and why; empty when none is.

    Where a link leads to the folder, the parents of both are asked; those that cannot be seen are not.
    """
    for parent in dict.fromkeys([*path.absolute().parents, *path.resolve().parents]):
        with suppress(OSError):
            if why := others_may_write(os.stat(parent), parent):
                return f"{parent} ({why})"
    return ""


def _listed(place: int | Path) -> str:
    """The first other user or group to whom an access list gives write permission; empty when there is none.

    Its layout, little-endian: version (4 bytes), then entries of tag (2), permissions (2) and id (4).
    """
    try:
        raw = os.getxattr(place, _ACL)
    except OSError:  # it has no list, or the file system knows none
        return ""
    if len(raw) % 8 != 4 or int.from_bytes(raw[:4], "little") != _VERSION:
        return "an access list of unknown form"
    entries = list(struct.iter_unpack("<HHI", raw[4:]))
    mask = next((allowed for tag, allowed, _ in entries if tag == _MASK), 7)
    for tag, allowed, who in entries:
        if allowed & mask & _WRITE:
            if tag == _USER and not trusted(who):
                return f"an access list lets user {who}"
            if tag == _GROUP and not _own_group(who):
                return f"an access list lets group {who}"
    return ""


@cache
def _own_group(gid: int) -> bool:
    """Whether a group is this process's user's alone, as where every user has a group and shares nothing by it."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name}
