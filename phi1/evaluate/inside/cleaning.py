"""Removes a folder whatever a program made of it: any depth, any modes."""

import os
import stat


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
