"""The exceptions of PegaFlow: one class for each kind of failure, all of them `PegaError`."""


class PegaError(Exception):
    """A failure of the cache. `kind` is stable and made for programs; the message is made for people."""

    kind: str = "unknown"


class InvalidInputError(PegaError, ValueError):
    """A value is outside its limits."""

    kind = "invalid_input"


class UnsupportedError(PegaError):
    """The kernel, the file system or the device lacks what is needed."""

    kind = "unsupported"


class LockedError(PegaError):
    """Another process holds the store."""

    kind = "locked"


class ForeignFormatError(PegaError):
    """The directory holds something that is not a store of PegaFlow."""

    kind = "foreign_format"


class NewerFormatError(PegaError):
    """The store was written by a newer version."""

    kind = "newer_format"


class GeometryMismatchError(PegaError):
    """The same namespace was registered with another geometry."""

    kind = "geometry_mismatch"


class CorruptError(PegaError):
    """A checksum or an identity did not match; the data is not used."""

    kind = "corrupt"


class AccessError(PegaError, PermissionError):
    """The operating system refused for lack of rights."""

    kind = "permission_denied"


class NoSpaceError(PegaError):
    """The file system is full, or smaller than asked for."""

    kind = "no_space"


class IoError(PegaError):
    """An input or output operation failed."""

    kind = "io"


class BusyError(PegaError):
    """A bound was reached and nothing was queued; try again later."""

    kind = "busy"


class NotFoundError(PegaError):
    """An instance, a session or a lease is not known, or no longer."""

    kind = "not_found"


class TimedOutError(PegaError, TimeoutError):
    """The bound on waiting was reached."""

    kind = "timeout"


class CancelledError(PegaError):
    """The operation was cancelled."""

    kind = "cancelled"


class ClosedError(PegaError):
    """The engine or the store is closing or closed, or the server cannot be reached."""

    kind = "closed"


class PoisonedError(PegaError):
    """An earlier failure stopped the store: it refuses writes until it is opened again."""

    kind = "poisoned"


_BY_KIND: dict[str, type[PegaError]] = {cls.kind: cls for cls in PegaError.__subclasses__()}


def of_kind(kind: str, message: str) -> PegaError:
    """The exception for a kind. A kind that this version does not know becomes a plain `PegaError`."""
    error = _BY_KIND.get(kind, PegaError)(message)
    error.kind = kind
    return error
