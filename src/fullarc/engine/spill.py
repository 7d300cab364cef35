"""Pages of bytes in a file on disk: where blocks of the prefix cache go when there is no memory for them.

The file has no name (it is unlinked as soon as it is open), so nothing else can touch it, it touches nothing of the
user's, and it is gone when the process is, however that ended. Its whole size is reserved at the start, so a full disk
shows there and not later. Pages are read and written by calls and not mapped: a file that became too short gives an
error instead of a signal.

Invariant: a page is read back as it was written, or not at all (CRC-32). After the first failure nothing is written or
read any more (`stopped`), and requests are computed as if there were no file.
"""

import errno
import os
import tempfile
import zlib
from pathlib import Path

from fullarc.config.errors import FullarcError

MIB = 2**20


class SpillFile:
    """`size` bytes of `folder` in pages of `page` bytes.

    Attributes:
        pages: how many there are. stopped: why nothing is spilled any more; "" while all is well.

    Raises FullarcError if the folder cannot hold it.
    """

    def __init__(self, folder: Path, size: int, page: int) -> None:
        self.page, self.pages, self.stopped = page, size // page, ""
        if self.pages < 1:
            raise FullarcError(
                f"{size / MIB:.1f} MB to spill prefixes to are less than one block of {page / MIB:.1f} MB.",
                "Give --prefix-spill-mb more.",
            )
        try:
            disk = os.statvfs(folder)
            if (room := disk.f_bavail * disk.f_frsize) < size:  # asked before the last of it is taken
                raise OSError(errno.ENOSPC, f"{room // MIB} of {size // MIB} MB are free")
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as we are
            os.posix_fallocate(self._file.fileno(), 0, self.pages * page)
        except OSError as error:
            raise FullarcError(
                f"{folder} cannot hold the prefixes to be spilled: {error.strerror}.",
                "Choose another --prefix-spill or a smaller --prefix-spill-mb.",
            ) from None
        self._crc = [0] * self.pages

    def write(self, number: int, data: memoryview) -> bool:
        """Fill a page; whether that was possible."""
        if self.stopped:
            return False
        try:
            written = os.pwrite(self._file.fileno(), data, number * self.page)
        except OSError as error:
            return self._stop(f"writing failed: {error.strerror}")
        self._crc[number] = zlib.crc32(data)
        return written == self.page or self._stop(f"only {written} of {self.page} bytes were written")

    def read(self, number: int, into: memoryview) -> bool:
        """Copy a page into `into`; whether it is the page that was written. If not, `into` holds anything."""
        if self.stopped:
            return False
        try:
            os.preadv(self._file.fileno(), [into], number * self.page)
        except OSError as error:
            return self._stop(f"reading failed: {error.strerror}")
        return zlib.crc32(into) == self._crc[number] or self._stop(f"page {number} is not what was written")

    def _stop(self, why: str) -> bool:
        self.stopped = why
        self._file.close()
        return False
