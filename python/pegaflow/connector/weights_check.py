"""The full digest of the weights, taken in the background after a worker has registered under the sampled one.

Two sets of weights that differ only where nothing was sampled share a namespace. The first full digest seen under a
sampled digest is recorded in the user's cache directory; another one later is such a case, and the worker is told to
stop. It never stops a worker for less: what cannot be read, or changes meanwhile, ends the check and nothing else. Its
thread touches nothing of the worker's: it leaves a verdict, which the worker fetches.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pegaflow import _native
from pegaflow.connector.identity import UnknownIdentityError, weight_sets
from pegaflow.errors import PegaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.pegaflow")

# Not lower, and not SCHED_IDLE: between files the thread holds the interpreter's lock for a moment, and whoever wants
# it would wait for a thread that gets no processor.
_NICE = 10
_LOCK_RETRY_S = 1.0
# A file that changed later than this before it is read could change again under the same time stamp.
_SETTLED_S = 2.0
_NAMES_IN_MESSAGE_MAX = 4

# At most one check of a process reads at a time.
_one_at_a_time = threading.Lock()


class _StoppedError(Exception):
    """The worker closes."""


class _ChangedError(Exception):
    """A file is not the one that the worker registered with. The text names it."""


class Signature(NamedTuple):
    """A file's state; while it stays the same, so does the content."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path) -> Signature:
        """The state now. Raises `OSError`."""
        stat = file.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def default_directory() -> Path:
    """Where digests are kept: `$XDG_CACHE_HOME/pegaflow/digests`, or `~/.cache/pegaflow/digests`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "pegaflow" / "digests"


class DigestStore:
    """The digests on disk: of files by their state, and of sets of weights by their sampled digest.

    What is damaged counts as absent. Files are replaced as a whole.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_writable = True
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Fails for a directory of somebody else, who could write here what they like.
            directory.chmod(0o700)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            self.is_writable = False
            logger.info("PegaFlow: digests of weights are not kept in %s: %s", directory, error)

    @contextmanager
    def locked(self, stop: threading.Event) -> Iterator[None]:
        """Among all processes: who comes second finds what the first has read. Raises `_StoppedError`."""
        while not _one_at_a_time.acquire(timeout=_LOCK_RETRY_S):
            _raise_if_stopped(stop)
        try:
            if not self.is_writable:
                yield
                return
            with (self.directory / "lock").open("w") as file:
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        stop.wait(_LOCK_RETRY_S)
                        _raise_if_stopped(stop)
                    except OSError:
                        break  # A file system without locks: a file may be read twice, no more.
                yield
        finally:
            _one_at_a_time.release()

    def digest(self, file: Path, signature: Signature) -> str | None:
        """The full digest of a file in this state, if it is known."""
        known = self._read(self._entry(file, signature))
        digest = known.get("digest")
        return digest if known.get("signature") == list(signature) and isinstance(digest, str) else None

    def put_digest(self, file: Path, signature: Signature, digest: str) -> None:
        """Keeps a file's full digest, in the place of the one of an earlier state."""
        self._write(self._entry(file, signature), {"signature": list(signature), "digest": digest})

    def record_path(self, sampled: str) -> Path:
        """The file of a sampled digest's record."""
        return self.directory / f"weights-{sampled}.json"

    def record(self, sampled: str, layout: str) -> dict[str, str] | None:
        """The full digests of the files, by name, that were recorded under a sampled digest and a layout."""
        files = self._read(self.record_path(sampled)).get(layout)
        return files if isinstance(files, dict) and files else None

    def put_record(self, sampled: str, layout: str, files: Mapping[str, str]) -> None:
        """Records the full digests of the files."""
        self._write(self.record_path(sampled), self._read(self.record_path(sampled)) | {layout: dict(files)})

    def _entry(self, file: Path, signature: Signature) -> Path:
        # The name is part of the digest; with links a file has several.
        key = json.dumps([signature.device, signature.inode, file.name])
        return self.directory / f"file-{_native.content_digest(key.encode())}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        if not self.is_writable:
            return
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self.directory, prefix="tmp-")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(content, file)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self.is_writable = False
            logger.info("PegaFlow: digests of weights are no longer kept in %s: %s", self.directory, error)


class WeightsCheck:
    """The check of the weights that one worker has loaded. Made before it registers, started once it has."""

    def __init__(self, sets: Sequence[Sequence[Path]], directory: Path | None = None) -> None:
        """`sets`: the files of each model. Raises `OSError` for a file that is not there."""
        self._sets = [{file: Signature.of(file) for file in files} for files in sets]
        self._directory = directory or default_directory()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._verdict = ""

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> WeightsCheck | None:
        """The check of what vLLM has loaded, or `None` where that are no files."""
        try:
            sets = weight_sets(vllm_config)
            return cls(sets) if sets else None
        except (UnknownIdentityError, OSError) as error:
            # Registering meets the same, and says it.
            logger.debug("PegaFlow: the weights are not checked: %s", error)
        except Exception:
            logger.warning("PegaFlow: the weights are not checked", exc_info=True)
        return None

    def start(self) -> None:
        """Starts the check. A second call does nothing."""
        if self._thread is None:
            # A daemon: an exit does not wait for a file that is being read.
            self._thread = threading.Thread(target=self._run, name="pegaflow-weights", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                logger.warning("PegaFlow: the weights are not checked: %s", error)

    def stop(self) -> None:
        """Ends the check after the file that is being read; does not wait for that."""
        self._stop.set()

    def verdict(self) -> str:
        """Why nothing may be cached; empty while nothing is known to be wrong."""
        return self._verdict

    def _run(self) -> None:
        try:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            store = DigestStore(self._directory)
            with store.locked(self._stop):
                for files in self._sets:
                    if verdict := self._check(store, files):
                        self._verdict = verdict
                        return
        except _StoppedError:
            pass
        except (_ChangedError, PegaError, OSError) as error:
            logger.warning("PegaFlow: the full digest of the weights was not taken: %s", error)
        except Exception:
            logger.warning("PegaFlow: the full digest of the weights was not taken", exc_info=True)

    def _check(self, store: DigestStore, files: Mapping[Path, Signature]) -> str:
        """Records the full digest or compares it with the recorded one; why nothing may be cached, or nothing."""
        start = time.monotonic()
        sampled = _native.digest_weights(list(files))
        layout = _layout_of(files)
        recorded = store.record(sampled, layout)
        if recorded is None and not store.is_writable:
            return ""  # Nothing to compare with, and no place to record it.
        digests = {file.name: self._digest_of(store, file, signature) for file, signature in files.items()}
        # The sampled digest and the layout, too, must be of the files that the worker registered with.
        for file, signature in files.items():
            _raise_if_changed(file, signature)
        if recorded is None:
            store.put_record(sampled, layout, digests)
        elif recorded != digests:
            return _mismatch(sampled, recorded, digests, next(iter(files)).parent, store.record_path(sampled))
        logger.info(
            "PegaFlow: full digest of the weights: %s, %s (%d files, %.1f s)",
            _total(digests), "recorded" if recorded is None else "as recorded", len(files), time.monotonic() - start,
        )  # fmt: skip
        return ""

    def _digest_of(self, store: DigestStore, file: Path, signature: Signature) -> str:
        _raise_if_stopped(self._stop)
        _raise_if_changed(file, signature)
        if known := store.digest(file, signature):
            return known
        is_settled = time.time() - signature.ctime_ns / 1e9 >= _SETTLED_S
        digest = _native.full_digest([file])
        _raise_if_changed(file, signature)
        if is_settled:
            store.put_digest(file, signature, digest)
        return digest


def _raise_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise _StoppedError


def _raise_if_changed(file: Path, signature: Signature) -> None:
    if Signature.of(file) != signature:
        raise _ChangedError(f"{file} was changed after it was loaded")


def _layout_of(files: Mapping[Path, Signature]) -> str:
    """How the tensors lie in the files. The sampled digest does not depend on it and the full one does, so only full
    digests of the same layout can be compared.
    """
    layout = []
    for file, signature in files.items():
        header = ""
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > signature.size - 8:
                    raise _ChangedError(f"{file} was changed while it was read")
                header = _native.content_digest(opened.read(length))
        layout.append([file.name, signature.size, header])
    return _native.content_digest(json.dumps(sorted(layout)).encode())


def _total(digests: Mapping[str, str]) -> str:
    return _native.content_digest(json.dumps(sorted(digests.items())).encode())


def _mismatch(
    sampled: str, recorded: Mapping[str, str], digests: Mapping[str, str], directory: Path, record: Path
) -> str:
    others = sorted(name for name in digests if digests[name] != recorded.get(name))
    names = ", ".join(others[:_NAMES_IN_MESSAGE_MAX])
    if len(others) > _NAMES_IN_MESSAGE_MAX:
        names += f" and {len(others) - _NAMES_IN_MESSAGE_MAX} more"
    return (
        f"the weights in {directory} have the full digest {_total(digests)}, but other weights with the same sampled "
        f"digest {sampled} were used before, with the full digest {_total(recorded)}; they differ in {names}. Nothing "
        "more is loaded or saved, because blocks of the one would be taken for blocks of the other. If these weights "
        f"replace the others: stop the cache, delete its store and {record}, and start again. To keep both: give each "
        'a store of its own, empty at first, and set "verify_weights": false'
    )
