"""Confines this process and then runs a command: `python -I -S confine.py POLICY_JSON COMMAND...`.

Standard library only, since it runs isolated. In order: own user, PID, network and IPC namespaces; rlimits; Landlock
(reads only below `read`, writes only below `write`); no capabilities; a seccomp filter without sockets. The command
is the first process of its PID namespace: when it ends or is killed, the kernel kills everything it started.
Exit status 125 with a line that starts with `confine:` means that the command was never started.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

NEWUSER, NEWPID, NEWNET, NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
FAILED = 125
# Landlock's file rights: execute, read a file, read a directory; the rights that a plain file (no directory) can have.
_READ, _FILE_RIGHTS = 0b1101, 0b111 | 1 << 14 | 1 << 15
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_RIGHTS = (1 << 16) - 1  # ABI 5 adds ioctl on devices


def _numbers(text):
    return tuple(map(int, text.split()))


# System call numbers that the filter refuses, by machine: every way to a socket that is not a pair, into another
# process, namespace or mount, and into the kernel's programmable parts.
_DENIED = {
    "x86_64": (
        0xC000003E,
        _numbers(
            "41 101 155 161 165 166 167 168 169 175 176 246 248 249 250 272 298 304 308 310 311 313"
            " 320 321 323 425 426 427 428 429 430 431 432 442"
        ),
    ),
    "aarch64": (
        0xC00000B7,
        _numbers(
            "198 117 41 51 40 39 224 225 142 105 106 104 217 218 219 97 241 265 268 270 271 273"
            " 294 280 282 425 426 427 428 429 430 431 432 442"
        ),
    ),
}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(what, result):
    """Raise an OSError that names `what` when a libc call returned a negative number."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(what, option, *args):
    """prctl with five longs."""
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    call(what, libc.prctl(option, *values, *[ctypes.c_ulong(0)] * (4 - len(values))))


def landlock_abi():
    """The kernel's Landlock version; raises where there is none."""
    return call("Landlock", libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def namespaces():
    """Enter own user, PID, network and IPC namespaces; the user keeps its number."""
    uid, gid = os.getuid(), os.getgid()
    call("user, PID and network namespaces", libc.unshare(NEWUSER | NEWPID | NEWNET | NEWIPC))
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def limits(policy):
    """Rlimits of each process."""
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC"):
        value, kind = policy["rlimits"][name], getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def landlock(policy):
    """Reads only below `read`, reads and writes only below `write`; no TCP, no signals to the outside where known."""
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


def seccomp():
    """Refuse the calls in `_DENIED` with EPERM; kill on a foreign architecture's calls."""
    arch, denied = _DENIED[platform.machine()]
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    code += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, kill)]  # the x32 numbers alias the others
    for number in denied:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    code.append((0x06, 0, 0, allow))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
    prctl("seccomp filter", PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)))


def main():
    """Command line."""
    policy, command = json.loads(sys.argv[1]), sys.argv[2:]
    try:
        prctl("parent death signal", PR_SET_PDEATHSIG, int(signal.SIGKILL))
        namespaces()
        child = os.fork()
    except OSError as error:
        print(f"confine: {error.strerror}", flush=True)
        os._exit(FAILED)
    if child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    try:
        prctl("parent death signal", PR_SET_PDEATHSIG, int(signal.SIGKILL))
        limits(policy)
        landlock(policy)
        drop_capabilities()
        seccomp()
        worker = os.fork()  # the namespace's first process ignores signals without handlers; let it only wait
        if not worker:
            os.execvpe(command[0], command, policy["env"])
    except (OSError, KeyError, ValueError) as error:
        print(f"confine: {getattr(error, 'strerror', None) or repr(error)}", flush=True)
        os._exit(FAILED)
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.wait()
            if ended == worker:
                break
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
