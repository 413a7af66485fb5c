"""Loads fake_gpu.cpp when it is imported, which must happen before torch is imported. Needs g++."""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from importlib import metadata
from pathlib import Path


def load() -> None:
    """Compiles fake_gpu.cpp for this version of torch, and loads it."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        sys.exit(
            "error: counting needs a torch without CUDA, in an environment of its own: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
    source = Path(__file__).with_suffix(".cpp")
    known = sha256(source.read_bytes() + metadata.version("torch").encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"flora-{known}.so"
    if not library.is_file():
        new = library.with_suffix(f".{os.getpid()}")  # other processes may compile it too
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include"]
        command += [str(source), "-o", str(new), f"-L{torch_folder}/lib"]
        command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"]
        subprocess.run(command, check=True)
        new.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).install()


load()
