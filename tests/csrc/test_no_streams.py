"""The extension uses no C++ stream: beside another library's C++ library, writing to one crashed (check.h)."""

from __future__ import annotations

import re
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"


def test_no_file_of_the_extension_uses_streams():
    files = [path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")]
    assert len(files) > 10
    streams = r"#include <(?:[a-z]*stream|iomanip|locale)>"
    used = {path.name: found for path in files if (found := re.findall(streams, path.read_text("utf-8")))}
    assert not used
