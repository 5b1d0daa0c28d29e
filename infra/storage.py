"""Files under a root that may be a folder or a bucket: one interface, whole files or none.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL …) or fsspec's standard chain, never from a recipe.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec

from configs.addresses import refuse_credentials
from configs.errors import Unreachable, UserError
from infra import outages, reach
from infra.ranges import Ranges

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """One finished file of an artifact, as its manifest records it."""

    path: str
    """Relative to the artifact."""
    bytes: int
    sha256: str
    rows: int | None = None


@dataclass(frozen=True)
class Storage:
    """A place for files, addressed by a URL that fsspec understands. Picklable; opens lazily in each process."""

    url: str
    guard: Callable[[], object] | None = field(default=None, compare=False, repr=False)
    """Called before a file is written or deleted; raises UserError where nothing may be any more."""

    @classmethod
    def at(cls, root: str) -> Storage:
        """Storage at `root`: a plain path (made absolute) or any fsspec URL.

        Raises:
            UserError: the URL holds credentials.
        """
        refuse_credentials("the storage's URL", root)
        if "://" not in root:
            root = "file://" + os.path.abspath(os.path.expanduser(root))
        return cls(root.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        address = reach.web_address(self.url)
        if address is not None and (said := reach.proxy_refusal(address)) is not None:
            raise Unreachable(f"storage {self.url}: {said}")
        # The environment's proxies are for web servers too, which their client would ask directly.
        own = {"client_kwargs": {"trust_env": True}} if self.url.startswith(("http://", "https://")) else {}
        try:
            # Workers write what the driver lists: a remembered listing would hide their files.
            fs, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **own)
        except (ValueError, ImportError) as error:
            raise UserError(f"storage {self.url}: {error}; use a folder or a URL such as s3://bucket/prefix") from None
        return fs, path

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "guard": self.guard}

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._opened[0]

    @property
    def path(self) -> str:
        """The root's path inside :attr:`fs`."""
        return self._opened[1]

    @property
    def local(self) -> bool:
        return self.url.startswith("file://")

    def child(self, *parts: str) -> Storage:
        return Storage("/".join((self.url, *parts)))

    def locate(self, name: str) -> str:
        """The path inside :attr:`fs` of a file under this storage."""
        return f"{self.path}/{name}" if name else self.path

    # ---------------------------------------------------------------------------------------------- reading

    def exists(self, name: str) -> bool:
        with self._explained("look for", name):
            return bool(self._retried(lambda: self.fs.exists(self.locate(name))))

    def read_bytes(self, name: str) -> bytes:
        with self._explained("read", name):
            return bytes(self._retried(lambda: self.fs.cat_file(self.locate(name))))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on; fewer where the file ends earlier."""
        with self._explained("read", name):
            end = start + length
            return bytes(self._retried(lambda: self.fs.cat_file(self.locate(name), start=start, end=end)))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError where there is none."""
        return int(self.info(name)["size"])

    def info(self, name: str) -> dict[str, Any]:
        """What the storage says of one file (see :meth:`listed`). Raises FileNotFoundError where there is none."""
        with self._explained("look for", name):
            return dict(self._retried(lambda: self.fs.info(self.locate(name))))

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of all files below `prefix`, relative to this storage; empty if there are none."""
        with self._explained("list", prefix):
            try:
                found = self._retried(lambda: self.fs.find(self.locate(prefix)))
            except FileNotFoundError:
                return []
        below = self.path.rstrip("/") + "/"
        names = (path.removeprefix(below) for path in found if path.startswith(below))
        return sorted(name for name in names if name and not name.endswith(_PARTIAL))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every file below `prefix`, by name relative to this storage."""
        return {name: int(info["size"]) for name, info in self.listed(prefix).items()}

    def listed(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """What the storage's one listing says of every file below `prefix`, by name relative to this storage.

        The keys are fsspec's: `size` always, and whatever this kind of storage knows of times and checksums.
        """
        with self._explained("list", prefix):
            try:
                found = self._retried(lambda: self.fs.find(self.locate(prefix), detail=True))
            except FileNotFoundError:
                return {}
        cut = len(self.path.rstrip("/")) + 1
        return {path[cut:]: info for path, info in found.items() if not path.endswith(_PARTIAL)}

    def portions(self, below: str = "") -> Iterator[dict[str, int]]:
        """What :meth:`sizes` says of all files below a folder, whose name ends in a slash, a portion at a time.

        S3 tells a thousand at once, other kinds of storage everything. Folders that such a storage lists as files end
        in a slash.
        """
        if self._is_s3:
            yield from (sizes for sizes, _ in self._pages(below))
            return
        found = self.listed(below.rstrip("/"))
        yield {
            f"{name}/" if info.get("type") == "directory" else name: int(info["size"]) for name, info in found.items()
        }

    def top(self) -> Iterator[tuple[dict[str, int], list[str]]]:
        """Sizes of the files that lie right here, and the folders here, whose names end in a slash; in portions."""
        if self._is_s3:
            yield from self._pages(delimiter="/")
            return
        with self._explained("list", ""):
            try:
                found = self._retried(lambda: self.fs.ls(self.path, detail=True))
            except FileNotFoundError:
                return
        cut = len(self.path.rstrip("/")) + 1
        inner = {name: info for info in found if (name := info["name"][cut:].rstrip("/"))}
        folders = [f"{name}/" for name, info in inner.items() if info["type"] == "directory"]
        files = {name: info for name, info in inner.items() if info["type"] != "directory"}
        yield {name: int(info["size"]) for name, info in files.items() if not name.endswith(_PARTIAL)}, folders

    @property
    def _is_s3(self) -> bool:
        return self.url.startswith(("s3://", "s3a://"))

    def _pages(self, below: str = "", delimiter: str = "") -> Iterator[tuple[dict[str, int], list[str]]]:
        """S3's answers to a listing: files and, where names are cut at a delimiter, folders. An outage costs a page."""
        bucket, key, _ = self.fs.split_path(self.path)
        start = f"{key}/" if key else ""
        asked = {"Bucket": bucket, "Prefix": start + below, "Delimiter": delimiter, "MaxKeys": _NAMES_AT_ONCE}
        while True:
            with self._explained("list", below.rstrip("/")):
                try:
                    page = self._retried(lambda: self.fs.call_s3("list_objects_v2", **asked))
                except FileNotFoundError:
                    return
            found = {each["Key"][len(start) :]: int(each["Size"]) for each in page.get("Contents", ())}
            folders = [each["Prefix"][len(start) :] for each in page.get("CommonPrefixes", ())]
            yield {name: size for name, size in found.items() if not name.endswith(_PARTIAL)}, folders
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def open(self, name: str) -> Any:
        """A binary file object for reading with seeks; on object storage by range requests, which are tried again."""
        if self.local:
            with self._explained("read", name):
                return self.fs.open(self.locate(name), "rb")
        return io.BufferedReader(Ranges(partial(self.read_range, name), self.size(name)), _READ_AHEAD)

    # ---------------------------------------------------------------------------------------------- writing

    def write_bytes(self, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        """Write a whole file that appears only when complete (rename, or one object upload)."""
        self._put(name, [data], lambda target: self.fs.pipe_file(target, data))
        return FileEntry(name, len(data), hashlib.sha256(data).hexdigest(), rows)

    def _put(self, name: str, pieces: Iterable[bytes], send: Callable[[str], object]) -> None:
        """Write a file's pieces on local disk, else let `send` do it, where the guard allows it then."""
        with self._explained("write", name):
            if self.local:
                with _beside(self.locate(name), pieces) as whole:
                    self._ask()
                    os.replace(whole, self.locate(name))
            else:
                self._retried(lambda: (self._ask(), send(self.locate(name))))

    def _ask(self) -> object:
        return None if self.guard is None else self.guard()

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write a whole file where there is none yet; False, and nothing written, where there is one.

        Of several that try at once one succeeds: a link on local disk, a conditional write on object storage (S3's
        `If-None-Match`, generation 0 on GCS).

        Args:
            data: other than what anybody else would write, so that a write whose answer was lost is known again.
        """
        target = self.locate(name)
        with self._explained("write", name):
            if self.local:
                try:
                    with _beside(target, [data]) as partial:
                        os.link(partial, target)
                except FileExistsError:
                    return False
                return True
            try:
                self._retried(lambda: self._pipe_new(target, data))
            except FileExistsError:
                return self.read_bytes(name) == data
        return True

    def _pipe_new(self, target: str, data: bytes) -> None:
        """Raises FileExistsError where somebody else was first."""
        try:
            self.fs.pipe_file(target, data, mode="create")
        except OSError as error:
            if any(word in str(error) for word in _REFUSED):  # s3fs knows no name for it
                raise FileExistsError(target) from None
            raise

    def write_table(self, name: str, table: pa.Table, rows_per_group: int, **options: Any) -> FileEntry:
        """Write a Parquet file; `options` go to pyarrow's writer."""
        import pyarrow as pa  # here, since commands that only list or plan need none of it
        import pyarrow.parquet as pq

        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=rows_per_group, **options)
        return self.write_bytes(name, buffer.getvalue().to_pybytes(), rows=table.num_rows)

    def write_tables(
        self, name: str, tables: Iterable[pa.Table], schema: pa.Schema, rows_per_group: int, **options: Any
    ) -> FileEntry:
        """Write a Parquet file of tables that need not fit into memory together; each begins a row group."""
        import pyarrow.parquet as pq

        rows = 0
        with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
            with pq.ParquetWriter(file.name, schema, **options) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=rows_per_group)
                    rows += table.num_rows
                if not rows:
                    writer.write_table(schema.empty_table())
            return self.upload(file.name, name, rows)

    def upload(self, local_path: str, name: str, rows: int | None = None) -> FileEntry:
        """Copy a local file of any size here; it appears only when complete."""
        with open(local_path, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            file.seek(0)
            pieces = iter(partial(file.read, _READ_AHEAD), b"")
            self._put(name, pieces, lambda target: self.fs.put_file(local_path, target))
        return FileEntry(name, size, digest, rows)

    def take(self, name: str, origin: Storage) -> None:
        """Move a file of this name here from another place on the same kind of storage, over what is here."""
        with self._explained("write", name):
            if self.local:
                os.makedirs(os.path.dirname(self.locate(name)), exist_ok=True)
                os.replace(origin.locate(name), self.locate(name))
            else:
                self._retried(lambda: self.fs.cp_file(origin.locate(name), self.locate(name)))
                origin.delete(name)

    def share(self, name: str, origin: Storage) -> None:
        """Have a file of this name here too, over what is here, that lies in another place on the same kind of storage:
        by a hard link, or copied. Files are replaced and never written into, so that neither changes with the other."""
        with self._explained("write", name):
            self._ask()
            if not self.local:
                self._retried(lambda: self.fs.cp_file(origin.locate(name), self.locate(name)))
                return
            self.delete(name)
            os.makedirs(os.path.dirname(self.locate(name)), exist_ok=True)
            try:
                os.link(origin.locate(name), self.locate(name))
            except OSError:  # a disk without hard links; what else is wrong shows here
                self.upload(origin.locate(name), name)

    def delete(self, name: str = "") -> None:
        """Delete a file or everything below a name; nothing there is fine."""
        with self._explained("delete", name), suppress(FileNotFoundError):
            there = self.locate(name)
            # Remote ones take it for a pattern, which may be that of another root's files; a disk does not.
            named = there if self.local else glob.escape(there)
            self._retried(lambda: (self._ask(), self.fs.rm(named, recursive=True)))

    def check_writable(self) -> None:
        """Write and delete a probe, so that a wrong root is refused before anything starts."""
        name = f".probe-{uuid.uuid4().hex[:8]}"
        self.write_bytes(name, b"latentforge")
        self.delete(name)

    def _retried(self, request: Callable[[], T]) -> T:
        return request() if self.local else outages.retried("/".join(self.url.split("/")[:3]), request)

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """Turn storage errors into one line that names the file and the way out."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error).lower():  # not: a name with such a word in it
                raise UserError(
                    f"cannot {verb} {where}: the bucket does not exist; create it or check its name"
                ) from None
            if verb == "write":
                raise UserError(f"cannot write {where}: {outages.short(error)}; check the folder's name") from None
            raise
        except PermissionError as error:
            hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if not self.local else "check its permissions"
            raise UserError(f"cannot {verb} {where}: access denied ({outages.short(error)}); {hint}") from None
        except outages.errors() as error:
            kind = Unreachable if outages.passing(error) else UserError
            raise kind(
                f"cannot {verb} {where}: {outages.short(error)}; check that the storage is reachable and not full"
            ) from error


@contextmanager
def _beside(target: str, pieces: Iterable[bytes]) -> Iterator[str]:
    """A whole file on local disk, beside the one that it is to become; gone afterwards."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        if os.path.exists(partial):  # not after a rename
            os.unlink(partial)


_PARTIAL = ".partial"
_READ_AHEAD = 4 << 20
_NAMES_AT_ONCE = 1_000
"""Of a listing, the most that S3 answers."""
_REFUSED = ("pre-condition", "PreconditionFailed", "precondition")
