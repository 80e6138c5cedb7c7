""".zst files as a stream that notices a cut one; the library's own reader ends there without a word."""

import io
from pathlib import Path

BLOCK = 1 << 17  # packed bytes read at once


class _Reader(io.RawIOBase):
    """Unpacks frame after frame. Raises EOFError where the file ends within one."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._library, self._file = zstandard, path.open("rb")
        self._frame, self._ready = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame and self._frame.eof else b""
            packed = packed or self._file.read(BLOCK)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_zstd(path: Path) -> io.BufferedReader:
    """The unpacked bytes of a file. Needs zstandard."""
    return io.BufferedReader(_Reader(path), 1 << 20)
