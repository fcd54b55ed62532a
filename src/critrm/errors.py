"""Every error that critrm raises on purpose.

    CritrmError
    ├── DataError          a file, line or field that cannot be read; names all three
    ├── ConfigError        a setting or a recipe that cannot be carried out
    ├── ModelError         a backbone, tokenizer or reward model that cannot be loaded
    ├── CriticError        a critic that cannot be used at all (one failed call is a row, not an error)
    ├── CriticMismatch     a reward model is asked to read critiques of another critic than in training
    └── StorageError       a disk that is full, read-only or holds a damaged file

A message says what happened, where, and what to do about it. The command line prints it without a traceback.
"""


class CritrmError(Exception):
    """Base class: catch this to catch everything critrm raises on purpose."""


class DataError(CritrmError):
    """A row of the user's data cannot be used."""

    def __init__(self, reason: str, *, path: str = "", line: int | None = None, field: str = "") -> None:
        """Args say where: the file, the 1-based line (or row) and the field."""
        self.reason, self.path, self.line, self.field = reason, path, line, field
        where = path + (f":{line}" if line is not None else "")
        super().__init__(": ".join(part for part in (where, f"field {field!r}" if field else "", reason) if part))


class ConfigError(CritrmError):
    """A setting or a recipe cannot be carried out."""


class ModelError(CritrmError):
    """A backbone, tokenizer or reward model cannot be loaded."""


class CriticError(CritrmError):
    """A critic cannot be used at all, for example because its endpoint rejects the key."""


class CriticMismatch(CritrmError):
    """Train and test critiques come from different critics (section 4.2 says they must match)."""


class StorageError(CritrmError):
    """The disk is full or read-only, or a file on it is damaged."""
