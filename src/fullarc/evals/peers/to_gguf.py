"""A checkpoint as a GGUF file, by llama.cpp's own converter: `python to_gguf.py SOURCE CHECKPOINT OUT TYPE`.

SOURCE is llama.cpp's tree. The converter knows tokenizers by a hash of what they do, and none that was made at home;
which one it takes ours for does not matter, as only ids are exchanged. The MTP layer is left out.
"""

import importlib
import sys


def main(source: str, checkpoint: str, out: str, kind: str) -> None:
    """Convert; what goes wrong is the converter's to say."""
    sys.path[:0] = [source, f"{source}/gguf-py"]
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda *_: "glm4"
    sys.argv = ["convert", checkpoint, "--outtype", kind, "--outfile", out, "--no-mtp"]
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main(*sys.argv[1:])
