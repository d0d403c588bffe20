"""All system calls of the store that can fail on a disk, in one thin class: tests inject faults here."""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # alignment of records, extents and reads, as O_DIRECT requires
_HUGE = 2**22  # minimum bytes of a buffer in huge pages


def align(n: int) -> int:
    """`n` bytes rounded up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


def aligned_buffer(n: int) -> memoryview:
    """`n` zeroed writable bytes at a block boundary."""
    memory = mmap.mmap(-1, max(align(n), BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # page faults per 4 KiB take several times as long as reading
    return memoryview(memory)[:n]


class Files:
    """Plain files with mode 0600; symbolic links are not followed."""

    def open(
        self,
        path: Path | str,
        *,
        create: bool = False,
        new: bool = False,
        write: bool = False,
        direct: bool = False,
        folder: int | None = None,
    ) -> int:
        """A file descriptor; a relative path starts at the descriptor `folder`.

        `new` requires that the file does not exist; `direct` bypasses the page cache if the folder supports it. Opening
        a pipe or the like does not block: callers with names chosen by others check the result (`Folder.open`).
        """
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | (os.O_RDWR if write else os.O_RDONLY)
        flags |= os.O_CREAT if create or new else 0
        flags |= os.O_EXCL if new else 0
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600, dir_fd=folder)
            except OSError as refused:
                if refused.errno != 22:  # EINVAL: no direct I/O on this file system
                    raise
                flags &= ~os.O_EXCL  # some file systems create the file before they refuse
        return os.open(path, flags, 0o600, dir_fd=folder)

    def buffer(self, nbytes: int) -> "Tensor":
        """Memory for a record's pages, which are then used in place: uint8 [nbytes], at a block boundary."""
        return host_buffer(nbytes)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def read(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(buffer):
            n = os.preadv(fd, [buffer[done:]], offset + done)
            if n == 0:
                break
            done += n
        return done

    def write(self, fd: int, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer` at `offset`."""
        done = 0
        while done < len(buffer):
            done += os.pwrite(fd, buffer[done:], offset + done)

    def sync(self, fd: int) -> None:
        """Wait until the file's data is on the device."""
        os.fdatasync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Cut or extend a file to `size` bytes."""
        os.ftruncate(fd, size)

    def unlink(self, path: Path | str, folder: int | None = None) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=folder)


def tensor_view(buffer: memoryview) -> "Tensor":
    """A uint8 tensor over writable memory; the tensor keeps the memory alive."""
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8))


def host_buffer(nbytes: int) -> "Tensor":
    """`aligned_buffer` as a tensor."""
    return tensor_view(aligned_buffer(nbytes))
