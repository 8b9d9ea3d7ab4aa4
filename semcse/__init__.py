"""The shared machinery of the scripts. In a notebook: `from semcse import load_model`.

`import semcse` takes no time, because `load_model` is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semcse.models import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from semcse.models import load_model

        return load_model
    raise AttributeError(f"module 'semcse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
