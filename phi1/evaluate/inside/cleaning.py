"""Measures and removes a folder whatever a program made of it: any depth, any modes."""

import os
import stat

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def exceeds(folder: str, limit: int) -> bool:
    """Whether more bytes are on disk at and below the folder, a file or folder counted as 4 KiB at least.

    Stops as soon as that is known: a program at work in it makes files as fast as they are counted. Walks by handles,
    one at a time, since a path may be longer than the system takes.
    """
    handle = os.open(folder, _FOLDER)
    total, names = _entries(handle, limit)
    waiting = [names]  # of each folder down to this one: its folders still to see
    while True:
        if total > limit:
            os.close(handle)
            return True
        if waiting[-1]:
            try:
                into = os.open(waiting[-1].pop(), _FOLDER, dir_fd=handle)
            except OSError:  # removed meanwhile, or of a mode in which nothing can be put there
                continue
            found, names = _entries(into, limit - total)
            total += found
            waiting.append(names)
        else:
            waiting.pop()
            if not waiting:
                os.close(handle)
                return False
            into = os.open("..", _FOLDER, dir_fd=handle)
        os.close(handle)
        handle = into


def _entries(handle: int, limit: int) -> tuple[int, list[str]]:
    """Bytes of what is in a folder, or of enough of it to exceed the limit; the folders in it."""
    total, folders = 0, []
    with os.scandir(handle) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            total += max(4096, 512 * found.st_blocks)
            if stat.S_ISDIR(found.st_mode):
                folders.append(entry.name)
            if total > limit:
                break
    return total, folders


def remove(folder: str) -> None:
    """Removes the folder and all in it. Folders are moved up beside each other before they are emptied, so that neither
    the length of a path nor a recursion grows with the depth; symbolic links are removed, not followed."""
    waiting = [folder]
    count = 0
    while waiting:
        path = waiting.pop()
        os.chmod(path, 0o700)
        for entry in os.scandir(path):
            if not stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)  # moving a folder writes into it
            count += 1
            beside = f"{folder}.{count}"
            os.rename(entry.path, beside)
            waiting.append(beside)
        os.rmdir(path)
