"""Locks on files and folders that the kernel drops when their holder dies, and file systems without them.

train_gpt.py runs with nothing beside it, so it has its own, try_lock. This file imports next to nothing.
"""

from __future__ import annotations

import errno
import sys
from typing import IO

# What flock says where a file system has no locks, as some network file systems have none. EBADF: NFS locks
# only what is open for writing, which a folder never is.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF)


def lock(file: IO | int, wait: bool) -> bool:
    """Lock an open file for this process; False, after one warning, where there are no locks.

    BlockingIOError if another process holds it and this one is not to wait.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        warn_of_no_locks()
        return False
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_of_no_locks()
        return False
    return True


has_warned = False


def warn_of_no_locks() -> None:
    """Say it once a process."""
    global has_warned
    if has_warned:
        return
    has_warned = True
    print(
        "warning: this file system has no locks: start no second program that writes to the same folder, "
        "neither would notice the other",
        file=sys.stderr,
    )
