"""The machinery that several scripts share. `from semcse import load_model` loads any model.

Nothing is imported before it is used, so that `import semcse` takes no time.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from semcse.models import load_model

        return load_model
    raise AttributeError(f"module 'semcse' has no attribute {name!r}")
