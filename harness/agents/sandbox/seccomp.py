"""The seccomp filter of the sandbox: the refused system calls by name, and the BPF program.

Landlock and the mount namespace protect files. The filter refuses what those do not cover: sockets but for a
connected pair, kernel objects with memory outside any process's size (memfd, SysV, shared anonymous pages,
pages in pipes, larger pipes), other processes, namespaces and mounts, watches and leases on files outside, devices'
ioctls, set-user-ID bits, disk blocks beyond a file's end, and calls newer than this list.

Locks (flock, fcntl's) are allowed: git, sqlite and pytest need them, and a filter sees a descriptor's number, not its
file.
"""

import errno
import struct

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _AND, _EQUAL, _ABOVE, _ANY, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: number on x86_64, on aarch64 (None: no such call). From 424 on every machine has the same numbers.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # sockets: only a connected pair of streams, which can neither name a peer nor carry descriptors
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "sendmsg": (46, 211), "sendmmsg": (307, 269), "recvmsg": (47, 212), "recvmmsg": (299, 243),
    "setsockopt": (54, 208), "sendto": (44, 206), "socketpair": (53, 199),
    # other processes, namespaces, personalities
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92), "clone": (56, 220), "modify_ldt": (154, None),
    # the machine: mounts, modules, clocks, names, ports
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "acct": (163, 89), "quotactl": (179, 60), "nfsservctl": (180, 42),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "syslog": (103, 116), "lookup_dcookie": (212, 18), "uselib": (134, None), "iopl": (172, None),
    "ioperm": (173, None), "vhangup": (153, 58), "sysfs": (139, None), "_sysctl": (156, None),
    # the kernel's programmable parts, its keys, its watches
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "inotify_rm_watch": (255, 28), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # memory outside any process's size
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71), "io_setup": (206, 0),
    "io_submit": (209, 2), "mmap": (9, 222),
    # files: attributes that no bound counts, blocks beyond the end, set-user-ID bits, devices' ioctls
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "fallocate": (285, 47), "ioctl": (16, 29),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "open": (2, None), "openat": (257, 56),
    "creat": (85, None), "mknod": (133, None), "mknodat": (259, 33), "fcntl": (72, 25),
    # the same on every machine; of the numbers from 424 on, only these are known
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "clone3": (435, 435), "close_range": (436, 436),
    "faccessat2": (439, 439), "epoll_pwait2": (441, 441), "futex_waitv": (449, 449), "fchmodat2": (452, 452),
    "map_shadow_stack": (453, 453), "futex_wake": (454, 454), "futex_wait": (455, 455), "futex_requeue": (456, 456),
    "mseal": (462, 462),
}  # fmt: skip
FIRST_SHARED = 424
_NEW = frozenset(
    "pidfd_send_signal pidfd_open close_range faccessat2 epoll_pwait2 futex_waitv fchmodat2 map_shadow_stack"
    " futex_wake futex_wait futex_requeue mseal".split()
)
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_SET_ID = 0o6000
_CREATES = 0o100 | 0o20000000  # O_CREAT, O_TMPFILE
_FCNTLS = (
    *(0, 1, 2, 3, 4, 1030),  # duplicates; flags of descriptors and files
    *(5, 6, 7, 36, 37, 38),  # locks of a process, of an open file
    *(9, 11, 16, 1025, 1027, 1032, 1034),  # queries of owner, signal, lease, descriptor, pipe size, seals
)
# Terminal size and attributes, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX, FS_IOC_GETFLAGS.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A, 0x80086601)

# A condition is (argument, mask, values): the argument's low half under the mask is one of the values; a value None
# means that it is not zero under the mask. A call is refused when all conditions of one of its cases hold.
_CASES: dict[str, tuple[tuple[tuple[int, int, tuple[int, ...] | None], ...], ...]] = {
    "clone": (((0, _NAMESPACES, None),), ((0, 0x10400, (0x10000,)),)),  # a thread with files of its own is not counted
    "sendto": (((4, 0xFFFFFFFF, None),), ((4 + 8, 0xFFFFFFFF, None),)),  # both halves of the address
    "mmap": (((3, 0x20, None), (3, 0xF, (1, 3))), ((3, 0x40000, None),)),  # shared anonymous; huge pages
    "chmod": (((1, _SET_ID, None),),),
    "fchmod": (((1, _SET_ID, None),),),
    "fchmodat": (((2, _SET_ID, None),),),
    "fchmodat2": (((2, _SET_ID, None),),),
    "open": (((1, _CREATES, None), (2, _SET_ID, None)),),
    "openat": (((2, _CREATES, None), (3, _SET_ID, None)),),
    "creat": (((1, _SET_ID, None),),),
    "mknod": (((1, _SET_ID, None),),),
    "mknodat": (((2, _SET_ID, None),),),
}
# The reverse: allowed when the case holds.
_ONLY = {
    "socketpair": ((0, 0xFFFFFFFF, (1,)), (1, 0xF, (1,))),  # AF_UNIX, SOCK_STREAM
    "ioctl": ((1, 0xFFFFFFFF, _IOCTLS),),
    "fcntl": ((1, 0xFFFFFFFF, _FCNTLS),),  # refuses leases, watches, owners, signals, pipe sizes, hints
}
_ERRORS = {"fallocate": errno.EOPNOTSUPP, "ioctl": errno.ENOTTY, "clone3": errno.ENOSYS}


def _argument(index: int) -> int:
    """Offset of an argument's low half in seccomp_data; 8 added to the index means its high half (little-endian)."""
    return 16 + 8 * (index % 8) + 4 * (index // 8)


def _when(conditions, verdict: int) -> list[tuple[int, int, int, int]]:
    """Return `verdict` when every condition holds, else fall through."""
    blocks = []
    for index, mask, values in conditions:
        tests = [(_ANY, mask)] if values is None else [(_EQUAL, value) for value in values]
        blocks.append([(_LOAD, 0, 0, _argument(index)), *([(_AND, 0, 0, mask)] if values is not None else []), tests])
    behind = sum(len(b) - 1 + len(b[-1]) for b in blocks) + 1
    code: list[tuple[int, int, int, int]] = []
    for *head, tests in blocks:
        code += head
        last = len(code) + len(tests)
        for n, (kind, value) in enumerate(tests, 1):
            here = len(code) + 1
            code.append((kind, last - here, behind - here if n == len(tests) else 0, value))
    return [*code, (_RETURN, 0, 0, verdict)]


def _body(name: str) -> list[tuple[int, int, int, int]]:
    """The instructions for the call `name`; they always return."""
    allow, refuse = (_RETURN, 0, 0, ALLOW), ERRNO | _ERRORS.get(name, errno.EPERM)
    if name in _ONLY:
        return [*_when(_ONLY[name], ALLOW), (_RETURN, 0, 0, refuse)]
    if name in _CASES:
        return [line for case in _CASES[name] for line in _when(case, refuse)] + [allow]
    return [allow] if name in _NEW else [(_RETURN, 0, 0, refuse)]


def program(machine: str) -> bytes:
    """The BPF program for x86_64 or aarch64: 8 bytes an instruction. Calls of another architecture kill the process."""
    column = list(ARCH).index(machine)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCH[machine]), (_RETURN, 0, 0, KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 numbers alias the others
        code += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, KILL)]
    for name, numbers in NUMBERS.items():
        if (number := numbers[column]) is not None:
            body = _body(name)
            code += [(_EQUAL, 0, len(body), number), *body]
    code += [(_ABOVE, 0, 1, FIRST_SHARED), (_RETURN, 0, 0, ERRNO | errno.ENOSYS), (_RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in code)
