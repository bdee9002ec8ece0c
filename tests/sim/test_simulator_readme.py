# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as written."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "nki_kernels" / "simulator" / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile("\n".join(blocks), str(README), "exec"), scope)
    assert "modelled time" in capsys.readouterr().out
    assert (tmp_path / "trace.json").stat().st_size > 1000
    assert (tmp_path / "lanes.png").stat().st_size > 1000


def test_readme_names_every_module():
    text = README.read_text()
    modules = {p.stem for p in README.parent.glob("*.py")} - {"__init__", "errors", "dtypes", "ops", "events"}
    assert not {m for m in modules if f"`{m}`" not in text and f"{m}`" not in text}
