"""llama.cpp in a process of its own: orders as JSON lines in, answers as JSON lines out, seconds taken in C.

    open     file, sequences, tokens, flash, cache, repack, micro   load a GGUF and make room
    start    prompts         bring all sequences to their first token
    decode   steps           → seconds, ids [steps, sequences]
    prefill  ids             → seconds; the first sequence alone, from an empty cache
    logits   ids             → logits after the last token of a prompt
    quantize source, out, type   rewrite a file in another precision

Run as a script with the folder of the built libraries; needs nothing but the standard library. An order that fails is
answered with {"error": …}; what crashes ends the process, which its parent sees.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

LIBRARY = "libfullarc_side.so"
CACHES = {"f32": 0, "f16": 1, "bf16": 30}
"""ggml_type of keys and values."""


def library(folder: Path) -> ctypes.CDLL:
    """The compiled side of `llamacpp.c`."""
    lib = ctypes.CDLL(str(folder / LIBRARY))
    lib.side_open.restype, lib.side_system.restype = ctypes.c_void_p, ctypes.c_char_p
    lib.side_prefill.restype = lib.side_decode.restype = ctypes.c_double
    return lib


class Side:
    """What is open at present."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.side = ctypes.c_void_p()

    def open(self, file: str, sequences: int, tokens: int, **options: Any) -> dict[str, Any]:
        """Replace what was open."""
        self.close()
        numbers = options["flash"], CACHES[options["cache"]], options["repack"], options["micro"]
        self.side = ctypes.c_void_p(self.lib.side_open(file.encode(), sequences, tokens, *map(int, numbers)))
        self.sequences = sequences
        return {} if self.side else {"error": f"llama.cpp cannot open {file} with {options}."}

    def close(self) -> dict[str, Any]:
        """Free it."""
        if self.side:
            self.lib.side_close(self.side)
        self.side = ctypes.c_void_p()
        return {}

    def quantize(self, source: str, out: str, type: int) -> dict[str, Any]:
        """Rewrite a file of fp32 weights."""
        failed = self.lib.side_quantize(source.encode(), out.encode(), type)
        return {"error": f"llama.cpp cannot write {out}."} if failed else {}

    def start(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Every sequence to its first token."""
        return {"seconds": sum(self._prefill(ids, number, None) for number, ids in enumerate(prompts))}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        """One prompt to its first token."""
        return {"seconds": self._prefill(ids, 0, None)}

    def logits(self, ids: list[int]) -> dict[str, Any]:
        """What follows a prompt."""
        out = (ctypes.c_float * self.lib.side_vocabulary(self.side))()
        return {"seconds": self._prefill(ids, 0, out), "logits": list(out)}

    def decode(self, steps: int) -> dict[str, Any]:
        """Tokens and time of `steps` steps."""
        out = (ctypes.c_int32 * (steps * self.sequences))()
        seconds = self.lib.side_decode(self.side, steps, out)
        rows = [list(out[at : at + self.sequences]) for at in range(0, len(out), self.sequences)]
        return {"seconds": _checked(seconds), "ids": rows}

    def _prefill(self, ids: list[int], sequence: int, out: Any) -> float:
        array = (ctypes.c_int32 * len(ids))(*ids)
        return _checked(self.lib.side_prefill(self.side, array, len(ids), sequence, out))


def _checked(seconds: float) -> float:
    if seconds < 0:
        raise RuntimeError("llama_decode failed")
    return seconds


def main(folder: Path) -> None:
    """Answer orders until standard input ends."""
    lib = library(folder)
    side = Side(lib)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(side, order.pop("do"))(**order)
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
