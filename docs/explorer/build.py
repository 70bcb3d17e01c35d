"""Writes the explorer page into a folder: a page of kernels that needs no server.

    python docs/explorer/build.py docs/_build/html/explorer

The folder can be opened as a file or served by anything: the network and onnxruntime's WebAssembly are in scripts,
because browsers do not let a page that is a file fetch its neighbours. onnxruntime-web comes from npm; without npm, or
without its registry, the page is written all the same and says what is missing.
"""

import base64
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = "onnxruntime-web@1.30.0"
SCRIPT, GLUE, WASM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"


def main(folder: Path) -> None:
    """Writes the page; the runtime is fetched once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "explorer.css", "explorer.js"):
        shutil.copy(HERE / name, folder)
    network = json.loads((HERE / "network.json").read_text()) | {"onnx": _text(HERE / "network.onnx")}
    (folder / "network.js").write_text(f"window.NETWORK = {json.dumps(network)};\n")
    if not (folder / "ort-wasm.js").is_file():
        try:
            fetch(folder)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"explorer: without onnxruntime-web, because npm pack {RUNTIME} failed: {error}")
            return
    print(f"explorer: {folder / 'index.html'}")


def fetch(folder: Path) -> None:
    """Fetches onnxruntime-web, and writes what a page for the CPU needs of it.

    Raises:
        OSError: npm is not installed, or the package lacks a file.
        subprocess.SubprocessError: npm failed, or took longer than two minutes.
    """
    with tempfile.TemporaryDirectory() as place:
        command = ["npm", "pack", RUNTIME, "--silent", "--pack-destination", place]
        subprocess.run(command, check=True, timeout=120, capture_output=True, cwd=place)
        [archive] = Path(place).glob("*.tgz")
        with tarfile.open(archive) as package:
            for name in (SCRIPT, GLUE, WASM):
                package.extract(f"package/dist/{name}", place, filter="data")
        dist = Path(place, "package", "dist")
        shutil.copy(dist / SCRIPT, folder)
        files = {"mjs": _text(dist / GLUE), "wasm": _text(dist / WASM)}
    (folder / "ort-wasm.js").write_text(f"window.ORT_WASM = {json.dumps(files)};\n")


def _text(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
