"""All errors of this library that callers may want to catch, beside TypeError and ValueError."""


class UnsupportedModelError(ValueError):
    """The method cannot explain this forward; says what was found and what is wanted."""


class ModelLoadError(ValueError):
    """A model or its weights cannot be loaded; says which and what is wanted."""


class UsageError(ValueError):
    """An argument that cannot be served; its message is the whole error."""


class BenchmarkError(UsageError):
    """A benchmark, or its folder, that cannot be used; its message is the whole error."""
