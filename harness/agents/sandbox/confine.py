"""Confines this process and then runs a command: `python -I -S confine.py POLICY_JSON COMMAND...`.

Standard library only, since it runs isolated. In order: the run's control groups; own user, PID, network, IPC and mount
namespaces; mounts (everything read-only but the root, a memory file system over the scratch folder); rlimits; Landlock
(reads only below `read`, writes only below `write`); no capabilities; the seccomp filter. The command runs in a session
of its own below the first process of the PID namespace: when either ends or is killed, the kernel kills everything that
the command started.

A failure before the command runs is written to the descriptor `report`, which is closed before the command runs: one
JSON object with `error` and, where the command or its folder caused it, `command: true`.
"""

import base64
import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys

NEWUSER, NEWPID, NEWNET, NEWIPC, NEWNS = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, MOUNT_SETATTR = 444, 445, 446, 442
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, AT_FDCWD, AT_RECURSIVE = 1, 2, 4, -100, 0x8000
FAILED = 125
# Landlock's file rights: execute, read a file, read a directory; the rights that a plain file (no directory) can have.
_READ, _FILE_RIGHTS = 0b1101, 0b111 | 1 << 14 | 1 << 15
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_RIGHTS = (1 << 16) - 1  # ABI 5 adds ioctl on devices

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class CommandError(Exception):
    """The command or its folder cannot be used; the sandbox itself is in order."""


def call(what, result):
    """Raise an OSError with `what` when a libc call returned a negative number."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(what, option, *args):
    """prctl with five longs."""
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    call(what, libc.prctl(option, *values, *[ctypes.c_ulong(0)] * (4 - len(values))))


def landlock_abi():
    """The kernel's Landlock version; raises without Landlock."""
    return call("Landlock", libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def groups(policy):
    """Join the run's control groups; be the first process killed when the machine runs out of memory."""
    for path in policy["groups"]:
        with open(path, "w") as file:
            file.write("0")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def namespaces():
    """Enter own user, PID, network, IPC and mount namespaces; the user keeps its number."""
    uid, gid = os.getuid(), os.getgid()
    call("user, PID, network and mount namespaces", libc.unshare(NEWUSER | NEWPID | NEWNET | NEWIPC | NEWNS))
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _mount(what, source, target, kind, flags, data=None):
    texts = [None if t is None else os.fsencode(t) for t in (source, target, kind, data)]
    call(what, libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _attributes(what, path, flags, on, off=0):
    attributes = struct.pack("QQQQ", on, off, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    call(what, libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), ctypes.c_uint(flags), attributes, size))


def mounts(policy):
    """Everything read-only, which protects modes, owners, times and attributes outside; root and scratch writable.

    The scratch folder is a memory file system: the kernel bounds and counts all of it, and it ends with the namespace.
    """
    root, scratch = policy["root"], policy["scratch"]
    _mount("private mounts", None, "/", None, MS_REC | MS_PRIVATE)
    try:
        _mount(f"bind mount of {root}", root, root, None, MS_BIND | MS_REC)
    except OSError as gone:
        raise CommandError(gone.strerror) from None
    _mount("tmpfs", "scratch", scratch, "tmpfs", MS_NOSUID | MS_NODEV, policy["tmpfs"])
    _attributes("read-only mounts", "/", AT_RECURSIVE, ATTR_RDONLY | ATTR_NOSUID)
    for path in (root, scratch):
        _attributes(f"writable mount of {path}", path, 0, ATTR_NOSUID | ATTR_NODEV, ATTR_RDONLY)
    try:
        os.chdir(root)  # this process's start folder is below the mount
    except OSError as gone:
        raise CommandError(str(gone)) from None
    null = os.open("/dev/null", os.O_RDONLY)  # the inherited one was opened while it was writable
    os.dup2(null, 0)
    os.close(null)


def limits(policy):
    """Rlimits of each process."""
    for name, value in policy["rlimits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def landlock(policy):
    """Reads only below `read`, reads and writes only below `write`; no TCP, no signals to outside where supported."""
    abi = landlock_abi()
    rights = _RIGHTS_BY_ABI.get(abi, _ALL_RIGHTS)
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = call("Landlock ruleset", libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0))
    for paths, allowed in ((policy["read"], _READ), (policy["write"], rights)):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            granted = allowed & rights if os.path.isdir(path) else allowed & rights & _FILE_RIGHTS
            rule = struct.pack("=Qi", granted, fd)
            call(f"Landlock rule for {path}", libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0))
            os.close(fd)
    prctl("no new privileges", PR_SET_NO_NEW_PRIVS, 1)
    call("Landlock", libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)


def drop_capabilities():
    """Empty capability sets; with no_new_privs an exec as user 0 does not bring them back."""
    header = struct.pack("Ii", 0x20080522, 0)
    call("capabilities", libc.capset(header, bytes(24)))


def seccomp(policy):
    """Install the filter (seccomp.py)."""
    code = base64.b64decode(policy["filter"])
    program = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program)))
    prctl("seccomp filter", PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)))


def _status(code):
    os._exit(code if code >= 0 else 128 - code)


def start(policy):
    """The first process, outside the PID namespace: waits for the namespace's own first process."""
    prctl("parent death signal", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    groups(policy)
    namespaces()
    mounts(policy)
    child = os.fork()
    if child:
        os.close(policy["report"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _, status = os.waitpid(child, 0)
        _status(os.waitstatus_to_exitcode(status))


def confine(policy, command):
    """The namespace's first process: signals without handlers do not reach it; it waits for the command."""
    prctl("parent death signal", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python's own settings
        signal.signal(number, signal.SIG_DFL)
    limits(policy)
    landlock(policy)
    drop_capabilities()
    seccomp(policy)
    worker = os.fork()
    if not worker:
        os.setsid()
        try:
            os.execvpe(command[0], command, policy["env"])
        except (OSError, ValueError) as error:
            raise CommandError(f"{command[0]}: {getattr(error, 'strerror', None) or error}") from None
    os.close(policy["report"])
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.wait()
            if ended == worker:
                break
    _status(os.waitstatus_to_exitcode(status))


def main():
    """Command line."""
    policy, command = json.loads(sys.argv[1]), sys.argv[2:]
    report = policy["report"]
    os.set_inheritable(report, False)
    try:
        start(policy)
        confine(policy, command)
    except BaseException as error:
        text = getattr(error, "strerror", None) or str(error) or repr(error)
        line = json.dumps({"error": text, "command": isinstance(error, CommandError)})
        with contextlib.suppress(OSError):  # the reader can have ended
            os.write(report, line.encode())
        os._exit(FAILED)


if __name__ == "__main__":
    main()
