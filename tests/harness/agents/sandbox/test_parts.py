"""The sandbox's parts alone: the filter's program, trees, control groups."""

import errno
import os
import re
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.agents.sandbox import group, seccomp, tree, usage

pytestmark = pytest.mark.slow

fault = pytest.mark.fault("sandbox_limits")


@cache
def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, constant) of each instruction."""
    return list(struct.iter_unpack("<HBBI", seccomp.program(machine)))


def verdict(machine: str, number: int, arguments=(0,) * 6, arch: int | None = None) -> int:
    """What the kernel would do: an interpreter of the few BPF instructions that filters use."""
    data = struct.pack("<IIQ6Q", number, arch or seccomp.ARCH[machine], 0, *arguments)
    lines, at, value = instructions(machine), 0, 0
    assert len(lines) <= 4096
    while True:
        code, yes, no, k = lines[at]
        at += 1
        match code:
            case 0x20:
                value = struct.unpack_from("<I", data, k)[0]
            case 0x54:
                value &= k
            case 0x06:
                return k
            case 0x15 | 0x35 | 0x45:
                at += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no
            case _:
                raise AssertionError(code)


def refusal(error: int) -> int:
    return seccomp.ERRNO | error


@pytest.mark.parametrize("machine", seccomp.ARCH)
@settings(max_examples=200, deadline=None)
@given(number=st.integers(0, 600), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
def test_the_filter_always_decides_and_knows_no_newer_call(machine, number, arguments):
    got = verdict(machine, number, arguments)
    column = list(seccomp.ARCH).index(machine)
    names = [n for n, numbers in seccomp.NUMBERS.items() if numbers[column] == number]
    if not names:
        assert got == (refusal(errno.ENOSYS) if number >= seccomp.FIRST_SHARED else seccomp.ALLOW)
    elif names[0] in ("memfd_create", "socket", "unshare", "inotify_init1", "shmget", "setxattr", "splice"):
        assert got == refusal(errno.EPERM)


@pytest.mark.parametrize("machine", seccomp.ARCH)
def test_foreign_calls_kill(machine):
    assert verdict(machine, 0, arch=0x40000003) == seccomp.KILL
    if machine == "x86_64":
        assert verdict(machine, 0x40000000 | 41) == seccomp.KILL
        assert verdict(machine, 0xFFFFFFFF) == seccomp.KILL


@fault
@pytest.mark.parametrize("machine", seccomp.ARCH)
@settings(max_examples=200, deadline=None)
@given(flags=st.integers(0, 2**64 - 1), address=st.integers(0, 2**64 - 1), mode=st.integers(0, 2**32 - 1))
def test_the_filter_looks_at_arguments(machine, flags, address, mode):
    def ask(name, *arguments):
        number = seccomp.NUMBERS[name][list(seccomp.ARCH).index(machine)]
        return verdict(machine, number, (*arguments, *(0,) * (6 - len(arguments)))) == seccomp.ALLOW

    space, lonely = flags & 0x7E020000, flags & 0x10000 and not flags & 0x400
    assert ask("clone", flags) == (not space and not lonely)
    assert ask("sendto", 3, 0, 0, 0, address) == (address == 0)
    assert ask("socketpair", flags & 0xFFFFFFFF, mode) == (flags & 0xFFFFFFFF == 1 and mode & 0xF == 1)
    shared = flags & 0x20 and flags & 0xF in (1, 3)
    assert ask("mmap", 0, 0, 0, flags) == (not shared and not flags & 0x40000)
    assert ask("fchmod", 3, mode) == (not mode & 0o6000)
    assert ask("openat", 0, 0, flags, mode) == (not flags & 0o20000100 or not mode & 0o6000)
    assert ask("ioctl", 1, flags) == (flags & 0xFFFFFFFF in seccomp._IOCTLS)


@fault
@pytest.mark.parametrize("machine", seccomp.ARCH)
@pytest.mark.parametrize("high", [0, 1 << 32])
def test_the_filter_knows_the_commands_of_fcntl(machine, high):
    """The kernel reads the command as 32 bits, whatever stands above them."""
    number = seccomp.NUMBERS["fcntl"][list(seccomp.ARCH).index(machine)]
    allowed = [n for n in range(2000) if verdict(machine, number, (3, n | high, *(0,) * 4)) == seccomp.ALLOW]
    assert set(allowed) == set(seccomp._FCNTLS)
    assert not {8, 10, 15, 1024, 1026, 1031, 1036, 1038, 1040} & set(allowed)
    assert verdict(machine, number, (3, 1024, 0, 0, 0, 0)) == refusal(errno.EPERM)


@pytest.mark.parametrize(
    "column, header", [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")]
)
def test_the_numbers_are_the_kernels(column, header):
    if not Path(header).is_file():
        pytest.skip(f"no {header}")
    text = Path(header).read_text()
    known = {n: int(v) for n, v in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.M)}
    listed = {n: numbers[column] for n, numbers in seccomp.NUMBERS.items() if n in known}
    assert listed == {n: known[n] for n in listed} and len(listed) > 90


NAMES = st.binary(min_size=1, max_size=40).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))
TREES = st.recursive(
    st.sampled_from(["file", "link", "loop", "pipe"]),
    lambda inner: st.tuples(st.sampled_from([0, 0o100, 0o400, 0o700]), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)


def grow(path: bytes, what, outside: bytes) -> int:
    """Make it; the number of entries made."""
    match what:
        case "file":
            Path(os.fsdecode(path)).write_bytes(b"x")
        case "link":
            os.symlink(outside, path)
        case "loop":
            os.symlink(path, path)
        case "pipe":
            os.mkfifo(path)
        case mode, inner:
            os.mkdir(path)
            made = sum(grow(os.path.join(path, name), child, outside) for name, child in inner.items())
            os.chmod(path, mode)
            return 1 + made
    return 1


@pytest.mark.fault("sandbox_exit")
@settings(max_examples=60, deadline=None)
@given(what=TREES)
def test_any_tree_is_counted_and_goes_and_nothing_outside(what, tmp_path_factory):
    base = tmp_path_factory.mktemp("trees")
    (base / "outside").mkdir()
    (base / "outside" / "kept").write_text("kept")
    top = base / "top"
    top.mkdir()
    made = grow(os.fsencode(top / "x"), what, os.fsencode(base / "outside"))
    assert sum(1 for _ in tree.entries(top, open_up=True)) == made
    tree.remove(top)
    assert [p.name for p in base.iterdir()] == ["outside"] and (base / "outside" / "kept").read_text() == "kept"


@pytest.mark.fault("sandbox_exit")
def test_a_tree_deeper_than_the_stack_and_the_longest_path_goes(tmp_path):
    inside = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 20, dir_fd=inside)
        deeper = os.open("d" * 20, os.O_RDONLY, dir_fd=inside)
        os.close(inside)
        inside = deeper
    os.close(inside)
    assert sum(1 for _ in tree.entries(tmp_path)) == 1500
    tree.remove(tmp_path)
    assert not tmp_path.exists()


def test_a_link_in_place_of_a_tree_is_removed_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    tree.remove(tmp_path / "link")
    tree.remove(tmp_path / "never")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@fault
def test_a_further_name_of_a_file_counts_and_its_bytes_do_not(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 40_000)
    alone = usage.folder_usage(tmp_path, 100, 1 << 30)
    for n in range(50):
        os.link(tmp_path / "f", tmp_path / f"l{n}")
    assert usage.folder_usage(tmp_path, 100, 1 << 30) == (51, alone[1], True)
    assert usage.folder_usage(tmp_path, 20, 1 << 30)[0] == 21


def test_version_2_is_found_where_an_ancestor_hands_on_the_controllers(tmp_path):
    (tmp_path / "a.slice" / "b.scope").mkdir(parents=True)
    for folder, controllers in (("", "cpu memory pids"), ("a.slice", "memory pids\n"), ("a.slice/b.scope", "")):
        (tmp_path / folder / "cgroup.subtree_control").write_text(controllers)
    mounts = f"30 23 0:26 / {tmp_path} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    found = group._find(mounts, "0::/a.slice/b.scope\n")
    assert [p.memory for p in found] == [tmp_path / "a.slice", tmp_path] and {p.version for p in found} == {2}


def test_version_1_needs_both_hierarchies(tmp_path):
    line = "3 2 0:3 / {at} rw - cgroup cgroup rw,{what}\n"
    memory, pids = (line.format(at=tmp_path / n, what=n) for n in ("memory", "pids"))
    own = "4:memory:/m\n8:pids:/\n0::/\n"
    assert group._find(memory, own) == []
    assert group._find(memory + pids, own) == [group.Place(1, tmp_path / "memory/m", tmp_path / "pids")]


def test_a_version_2_group_states_its_bounds(tmp_path):
    """On a plain folder: which files are written, and how the kernel's answers are read."""
    made = group.Group(group.Place(2, tmp_path, tmp_path), 1 << 20, 7)
    (folder,) = tmp_path.iterdir()
    said = {p.name: p.read_text() for p in folder.iterdir()}
    assert said == {"memory.max": "1048576", "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": "7"}
    assert made.enter == [str(folder / "cgroup.procs")] and not made.out_of_memory() and made.refused() == 0
    (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (folder / "pids.events").write_text("max 12\n")
    assert made.out_of_memory() and made.refused() == 12


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@fault
def test_groups_that_a_killed_process_left_go_and_no_others(tmp_path):
    """On plain folders, which rmdir leaves where anything is in them."""
    dead, space, made = ended_process(), group._space(), {}
    kinds = {
        "left": (f"sandbox-{dead}-{space}-0123abcd", "", 0),
        "left before namespaces were named": (f"sandbox-{dead}-0123abcd", "", 3600),
        "of a live process": (f"sandbox-{os.getpid()}-{space}-0123abcd", "", 3600),
        "with a process in it": (f"sandbox-{dead}-{space}-1123abcd", "17\n", 3600),
        "just made in another namespace": (f"sandbox-{dead}-1-0123abcd", "", 0),
        "somebody else's": (f"sandbox-{dead}-x", "", 3600),
        "somebody else's too": (f"sandbox-{dead}-{space}-0123abcd.scope", "", 3600),
    }
    for kind, (name, members, age) in kinds.items():
        made[kind] = tmp_path / name
        made[kind].mkdir()
        (tmp_path / f"{name}.procs").write_text(members)
        os.utime(made[kind], (time.time() - age,) * 2)
    with pytest.MonkeyPatch.context() as patch:
        read = Path.read_text
        patch.setattr(Path, "read_text", lambda p: read(p.parent.with_name(f"{p.parent.name}.procs")))
        group.sweep(tmp_path)
    gone = {kind for kind, folder in made.items() if not folder.exists()}
    assert gone == {"left", "left before namespaces were named"}


@fault
@pytest.mark.skipif(group.place() is None, reason="no control group can be made here")
def test_the_next_start_removes_what_kill_9_left():
    code = """
import os, time
from harness.agents.sandbox.group import Group, place
print(*Group(place(), 64 << 20, 8).folders, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        folders = [Path(p) for p in owner.stdout.readline().split()]
        group.place.__wrapped__()
        assert folders and all(p.is_dir() for p in folders), "its owner lives"
        owner.kill()
    group.place.__wrapped__()
    assert not any(p.exists() for p in folders)
