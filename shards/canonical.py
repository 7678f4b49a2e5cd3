"""The one text of a JSON document, and hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def canonical_json(document: Any) -> str:
    """Equal documents have equal bytes, and so equal hashes."""
    return (
        json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a local file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
