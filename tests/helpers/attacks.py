"""Small hostile programs for the sandbox: what each tries, under which limits, and how it may end.

A program prints `did …` for what it brought about and must not, and `held` once it holds more than its limit. It finds
a file outside, which its user owns, in `VICTIM`, and the path of a datagram socket outside in `SOCKET`.
"""

from dataclasses import dataclass, field
from typing import Any

PRELUDE = """
import ctypes, mmap, os, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
X86 = os.uname().machine == 'x86_64'
def tried(what, action, *args, **options):
    try: action(*args, **options)
    except (OSError, ValueError, AttributeError): return
    print('did', what, flush=True)
def call(what, *args):
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if libc.syscall(*values) >= 0: print('did', what, flush=True)
def written(fd, mib):
    for _ in range(mib): os.write(fd, b'x' * (1 << 20))
def touched(mib):
    block = bytearray(mib << 20)
    block[::4096] = b'1' * len(block[::4096])
    return block
def held(seconds=2.0):
    time.sleep(seconds)
    print('held', flush=True)
"""

REFUSED = {
    "metadata outside": """
for name, action in {
    'chmod': lambda: os.chmod(VICTIM, 0o777), 'set user id': lambda: os.chmod(VICTIM, 0o4777),
    'chmod of the folder': lambda: os.chmod(os.path.dirname(VICTIM), 0o777),
    'chown': lambda: os.chown(VICTIM, os.getuid(), os.getgid()), 'utime': lambda: os.utime(VICTIM, (5, 5)),
    'setxattr': lambda: os.setxattr(VICTIM, 'user.x', b'x'), 'truncate': lambda: os.truncate(VICTIM, 0),
    'unlink': lambda: os.unlink(VICTIM), 'rename': lambda: os.rename(VICTIM, 'mine'),
    'link': lambda: os.link(VICTIM, 'mine'), 'mkdir': lambda: os.mkdir(VICTIM + '.d'),
    'mknod': lambda: os.mknod(VICTIM + '.n'), 'symlink': lambda: os.symlink('x', VICTIM + '.l'),
    'rmdir': lambda: os.rmdir(os.path.dirname(VICTIM)),
}.items(): tried(name, action)
os.symlink(VICTIM, 'link')
tried('chmod through a link', os.chmod, 'link', 0o777)
tried('utime of a link outside', os.utime, VICTIM, (5, 5), follow_symlinks=False)
""",
    "metadata of open files": """
for path in (os.path.realpath(sys.executable), '/dev/null'):
    fd = os.open(path, os.O_RDONLY)
    mode = os.fstat(fd).st_mode & 0o777
    tried('fchmod of ' + path, os.fchmod, fd, mode)
    tried('futimens of ' + path, os.utime, fd)
for fd in (0, 1, 2):
    if os.path.samestat(os.fstat(fd), os.stat('/dev/null')):
        tried(f'fchmod of descriptor {fd}', os.fchmod, fd, os.fstat(fd).st_mode & 0o777)
tried('chmod by number', os.chmod, '/proc/self/fd/0', 0o666)
""",
    "sockets": """
for family in range(0, 46):
    for kind in (1, 2, 3, 5): tried(f'socket {family} {kind}', socket.socket, family, kind)
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET): tried(f'pair {kind}', socket.socketpair, socket.AF_UNIX, kind)
pair = socket.socketpair()
for path in (SOCKET, chr(0) + 'abstract'):
    tried('sendto', pair[0].sendto, b'x', path)
    tried('sendmsg', pair[0].sendmsg, [b'x'], [], 0, path)
    tried('connect', pair[0].connect, path)
    tried('bind', pair[0].bind, 'here.sock')
tried('pass a descriptor', pair[0].sendmsg, [b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack('i', 0))])
tried('larger buffers', pair[0].setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
""",
    "namespaces": """
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    for flags in (flag, flag | 0x10000000):
        pid = libc.syscall(56 if X86 else 220, ctypes.c_ulong(flags | 17), 0, 0, 0, 0)
        if pid == 0: os._exit(0)
        if pid > 0: print('did clone', hex(flags), flush=True)
        call('unshare', 272 if X86 else 97, flags)
clone3 = libc.syscall(435, ctypes.create_string_buffer(88), ctypes.c_long(88))
if ctypes.get_errno() != 38: print('did not miss clone3', ctypes.get_errno())
""",
    "kernel objects": """
call('memfd', 319 if X86 else 279, b'x', 0); call('memfd_secret', 447, 0)
call('shmget', 29 if X86 else 194, 0, 4096, 0o1600); call('semget', 64 if X86 else 190, 0, 1, 0o1600)
call('msgget', 68 if X86 else 186, 0, 0o1600)
call('mq_open', 240 if X86 else 180, b'x', 0o102, 0o600, None)
call('inotify', 294 if X86 else 26, 0); call('fanotify', 300 if X86 else 262, 0, 0)
call('userfaultfd', 323 if X86 else 282, 1); call('io_uring', 425, 1, ctypes.create_string_buffer(120))
call('perf', 298 if X86 else 241, ctypes.create_string_buffer(128), 0, -1, -1, 0)
call('bpf', 321 if X86 else 280, 0, ctypes.create_string_buffer(128), 128)
call('add_key', 248 if X86 else 217, b'user', b'x', b'x', 1, -3); call('keyctl', 250 if X86 else 219, 0, -3, 1)
call('ptrace', 101 if X86 else 117, 0, 0, 0, 0); call('kcmp', 312 if X86 else 272, os.getpid(), os.getpid(), 2, 0, 0)
call('personality', 135 if X86 else 92, 0xffffffff); call('landlock', 444, None, 0, 1)
call('open_tree', 428, -100, b'/', 0); call('fsopen', 430, b'tmpfs', 0); call('pidfd_getfd', 438, 0, 0, 0)
handle, mount = ctypes.create_string_buffer(struct.pack('i', 128), 200), ctypes.create_string_buffer(8)
call('name_to_handle', 303 if X86 else 264, -100, b'/usr', handle, mount, 0)
call('openat2', 437, -100, b'.', struct.pack('QQQ', 0, 0, 0), 24)
call('io_setup', 206 if X86 else 0, 64, ctypes.create_string_buffer(8)); call('newer', 463, 0, 0); call('newest', 500)
call('mount', 165 if X86 else 40, b'x', os.getcwd().encode(), b'tmpfs', 0, None)
call('chroot', 161 if X86 else 51, b'.')
""",
    "hidden memory": """
for size in (1 << 12, 1 << 20):
    tried('shared anonymous memory', mmap.mmap, -1, size)
    tried('huge pages', mmap.mmap, -1, 2 << 20, flags=0x40022)
def zero(): mmap.mmap(os.open('/dev/zero', os.O_RDONLY), 1 << 20, mmap.MAP_SHARED, mmap.PROT_READ)
tried('shared zero pages', zero)
tried('files in shared memory', open, '/dev/shm/x', 'wb')
r, w = os.pipe()
block = ctypes.create_string_buffer(4096)
call('vmsplice', 278 if X86 else 75, w, struct.pack('QQ', ctypes.addressof(block), 4096), 1, 0)
open('f', 'wb').write(b'x' * 4096)
file = os.open('f', os.O_RDONLY)
call('splice', 275 if X86 else 76, file, None, w, None, 4096, 0)
tried('sendfile', os.sendfile, w, file, 0, 4096)
os.write(w, b'x'); r2, w2 = os.pipe()
call('tee', 276 if X86 else 77, r, w2, 1, 0)
""",
    "blocks and bits": """
fd = os.open('f', os.O_RDWR | os.O_CREAT)
call('fallocate', 285 if X86 else 47, fd, 1, 0, 1 << 30)
tried('setxattr inside', os.setxattr, 'f', 'user.x', b'x')
for bits in (0o4755, 0o2755, 0o6755):
    tried('chmod', os.chmod, 'f', bits); tried('fchmod', os.fchmod, fd, bits)
    call('fchmodat2', 452, -100, b'f', bits, 0)
    tried('create', os.open, f'g{bits}', os.O_CREAT | os.O_WRONLY, bits)
    tried('nameless file', os.open, '.', os.O_TMPFILE | os.O_WRONLY, bits)
import fcntl, termios
tried('TIOCSTI', fcntl.ioctl, 1, termios.TIOCSTI, b'x')
tried('file flags', fcntl.ioctl, fd, 0x40086602, struct.pack('Q', 0))
tried('controlling terminal', open, '/dev/tty')
""",
    "commands of fcntl": """
import fcntl, json
for path in (json.__file__, '/usr/bin/env', sys.executable, os.path.realpath(sys.executable), '/usr/lib', 'mine', '.'):
    if path == 'mine': open(path, 'w').close()
    fd = os.open(path, os.O_RDONLY)
    for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK): tried(f'lease {kind} {path}', fcntl.fcntl, fd, fcntl.F_SETLEASE, kind)
    tried(f'notify {path}', fcntl.fcntl, fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    tried(f'owner of {path}', fcntl.fcntl, fd, fcntl.F_SETOWN, os.getpid())
    tried(f'signal of {path}', fcntl.fcntl, fd, fcntl.F_SETSIG, signal.SIGUSR1)
    tried(f'extended owner of {path}', fcntl.fcntl, fd, 15, struct.pack('ii', 1, os.getpid()))
    for command in (1036, 1038): tried(f'hint {command} {path}', fcntl.fcntl, fd, command, struct.pack('Q', 2))
r, w = os.pipe()
for size in (4096, 1 << 17, 1 << 20): tried(f'pipe of {size}', fcntl.fcntl, w, fcntl.F_SETPIPE_SZ, size)
fcntl.fcntl(fcntl.fcntl(r, fcntl.F_DUPFD_CLOEXEC, 9), fcntl.F_SETFL, os.O_NONBLOCK)  # what programs need works
assert fcntl.fcntl(w, fcntl.F_GETPIPE_SZ) == 1 << 16
fcntl.flock(os.open('mine', os.O_RDONLY), fcntl.LOCK_EX); fcntl.lockf(os.open('mine', os.O_RDWR), fcntl.LOCK_EX)
""",
    "processes outside": """
for pid in (PARENT, -PARENT, os.getppid() if os.getppid() > 1 else PARENT):
    for number in (0, signal.SIGCONT): tried(f'signal to {pid}', os.kill, pid, number)
tried('its memory', open, f'/proc/{PARENT}/mem', 'rb'); tried('its environment', open, f'/proc/{PARENT}/environ', 'rb')
tried('its root', os.chmod, f'/proc/{PARENT}/root{VICTIM}', 0o777)
tried('priority', os.setpriority, os.PRIO_PROCESS, 0, -5)
for fd in range(3, 256): tried(f'inherited descriptor {fd}', os.fstat, fd)
""",
}


@dataclass(frozen=True)
class Hog:
    """Takes more than its limits; must not end with `held` and without a bound's name."""

    code: str
    limits: dict[str, Any] = field(default_factory=dict)


_SMALL = {"memory": 192 << 20, "seconds": 60.0}
_DISK = {"disk_bytes": 24 << 20, "memory": 512 << 20, "seconds": 60.0}
HOGS = {
    "one process": Hog("block = touched(300); held()", _SMALL),
    "many processes": Hog(
        """
def child(w):
    block = touched(64); os.write(w, b'x'); time.sleep(60)
r, w = os.pipe()
for _ in range(6):
    if os.fork() == 0: child(w)
got = b''
while len(got) < 6: got += os.read(r, 6)
held()
""",
        _SMALL,
    ),
    "behind a dead first thread": Hog(
        """
r, w = os.pipe()
def child():
    def hoard():
        time.sleep(0.1); block = touched(64); os.write(w, b'x'); time.sleep(60)
    threading.Thread(target=hoard).start()
    libc.syscall(60 if X86 else 93, 0)
for _ in range(6):
    if os.fork() == 0: child()
got = b''
while len(got) < 6: got += os.read(r, 6)
held()
""",
        _SMALL,
    ),
    "scratch files": Hog(
        "fd = os.open(os.environ['TMPDIR'] + '/f', os.O_RDWR | os.O_CREAT); written(fd, 200); held()",
        _SMALL | {"file_bytes": 1 << 30},
    ),
    "scratch and process": Hog(
        "fd = os.open(os.environ['TMPDIR'] + '/f', os.O_RDWR | os.O_CREAT); written(fd, 120)\nb = touched(100); held()",
        _SMALL | {"file_bytes": 1 << 30},
    ),
    "full sockets": Hog(
        """
kept = []
def child():
    for _ in range(110):
        pair = socket.socketpair(); kept.append(pair)
        for end in pair:
            end.setblocking(False)
            try:
                while True: end.send(b'x' * 65536)
            except BlockingIOError: pass
    os.write(w, b'x'); time.sleep(60)
r, w = os.pipe()
for _ in range(8):
    if os.fork() == 0: child()
got = b''
while len(got) < 8: got += os.read(r, 8)
held()
""",
        _SMALL,
    ),
    "resized pipes": Hog(
        """
import fcntl
kept, total = [], 0
for _ in range(110):
    ends = os.pipe(); kept.append(ends); os.set_blocking(ends[1], False)
    try: fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError: pass
    try:
        while True: total += os.write(ends[1], b'x' * 65536)
    except BlockingIOError: pass
if total > 56 << 20: held()
""",
        {"memory": 56 << 20, "seconds": 60.0},
    ),
    "deleted files": Hog(
        """
kept = []
for i in range(12):
    fd = os.open(f'f{i}', os.O_RDWR | os.O_CREAT); os.unlink(f'f{i}'); written(fd, 4); kept.append(fd)
held()
""",
        _DISK,
    ),
    "nameless files": Hog(
        "kept = [os.open('.', os.O_RDWR | os.O_TMPFILE) for _ in range(12)]\nfor fd in kept: written(fd, 4)\nheld()",
        _DISK,
    ),
    "deleted files in mappings": Hog(
        """
kept = []
for i in range(12):
    fd = os.open('f', os.O_RDWR | os.O_CREAT); written(fd, 4)
    kept.append(mmap.mmap(fd, 4096)); os.close(fd); os.unlink('f')
held()
""",
        _DISK | {"file_bytes": 5 << 20},
    ),
    "deep folders": Hog(
        """
for _ in range(40): os.mkdir('d' * 200); os.chdir('d' * 200)
for i in range(12): written(os.open(f'f{i}', os.O_RDWR | os.O_CREAT), 4)
held()
""",
        _DISK,
    ),
    "closed folders": Hog(
        """
os.mkdir('d'); os.mkdir('d/e'); os.chdir('d/e'); os.chmod('..', 0); fds = []
for i in range(12): fds.append(os.open(f'f{i}', os.O_RDWR | os.O_CREAT)); written(fds[-1], 4)
held(4.0)
""",
        _DISK,
    ),
    "empty folders": Hog("for i in range(1500): os.mkdir(f'd{i}')\nheld()", _DISK | {"files": 1000}),
    "hard links": Hog(
        "open('f', 'w').close()\nfor i in range(1500): os.link('f', f'l{i}')\nheld()", _DISK | {"files": 1000}
    ),
    "hard links in scratch": Hog(
        "os.chdir(os.environ['TMPDIR']); open('f', 'w').close()\nfor i in range(1500): os.link('f', f'l{i}')\nheld()",
        _DISK | {"files": 1000},
    ),
    "scratch names": Hog(
        "for i in range(1500): open(os.environ['TMPDIR'] + f'/{i}', 'w').close()\nheld()", _DISK | {"files": 1000}
    ),
    "processes": Hog(
        """
n = 0
while n < 40:
    if os.fork() == 0: time.sleep(60)
    n += 1
held()
""",
        {"processes": 8, "seconds": 60.0},
    ),
    "threads": Hog(
        "for _ in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nheld()",
        {"processes": 8, "seconds": 60.0},
    ),
}
