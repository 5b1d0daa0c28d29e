"""Files of weights: recognised by what is in them, read without importing or running anything.

A torch file is a pickle, and a pickle may name any class. Torch's own restricted reader
(`weights_only`) builds tensors and plain values; every other class gets a stand-in that keeps what
the file says of an object and does nothing, so that a configuration of omegaconf, an
`argparse.Namespace` or a whole pickled network is data here. Modules of the operating system are
refused even so. Errors are ValueError, name the file, what it is and what to do.
"""

from __future__ import annotations

import _compat_pickle
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

INDEX = ".index.json"
"""How the name of an index of sharded weights ends."""
_LEGACY_PICKLES = 4  # magic number, protocol, machine facts, and then the content
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_OTHERS = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"GGUF", "a GGUF file of llama.cpp"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF"),
)


class Foreign(list):  # type: ignore[type-arg]  # a list, so that torch lets a file append to it
    """What a file says of an object whose class is not built here: its name and its state."""

    name = ""
    state: Any = None
    made = False
    """Whether a file has objects of this class, and does not only name it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        cls.made = True
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and state else state


class _ForeignMapping:
    """Stands in for classes of dictionaries, which torch fills only where they are its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


@dataclass(frozen=True)
class Content:
    """What is in a file: nested dictionaries and lists, tensors on the CPU, plain values."""

    values: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of safetensors."""
    foreign: tuple[str, ...] = ()
    """Classes that the file names and that are :class:`Foreign` here."""


def read_content(path: Path) -> Content:
    """The content of a torch file, a safetensors file, or an index with its shards beside it.

    Tensors are memory-mapped where the format allows it. Raises ValueError.
    """
    head = _head(path)
    if head[:1] == b"{":
        return _sharded(path)
    if head.startswith(b"PK\x03\x04"):
        return _torch(path, zipped=True)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _torch(path, zipped=False)
    if head[8:9] == b"{":
        return _safetensors(path)
    raise ValueError(f"{path}: {_what_else(head)}")


def file_in(folder: Path) -> Path:
    """The one file of weights that a folder stands for: an index of shards, or its only file.
    Raises ValueError, with what is in it, where that is not clear.
    """
    names = sorted(each.name for each in folder.iterdir() if each.is_file())
    indices = [name for name in names if name.endswith(INDEX)]
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))]
    for chosen in (indices, weights):
        if len(chosen) == 1:
            return folder / chosen[0]
    shown = ", ".join((indices or weights or names)[:6]) or "no files"
    states = sorted(str(each.relative_to(folder)) for each in folder.glob("*/mp_rank_*_model_states.pt"))
    hint = f"name {states[-1]} in it (DeepSpeed's)" if states else "name one file in it"
    raise ValueError(f"{folder}: is a folder, not a file ({shown}); {hint}")


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index of sharded weights wants beside it. Raises ValueError."""
    return sorted(set(_weight_map(index).values()))


def plain(value: Any) -> Any:
    """A value with every :class:`Foreign` as the plain values it holds: omegaconf's containers and
    nodes by their content, objects by their attributes."""
    return _plain(value, ())


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    if id(value) in above or len(above) > 40:  # omegaconf's nodes know their parents
        return None
    above = (*above, id(value))
    if isinstance(value, Foreign):
        state = value.state
        if not isinstance(state, Mapping):
            return [_plain(each, above) for each in value]
        for name in ("_content", "_val"):
            if name in state:
                return _plain(state[name], above)
        return _plain({key: each for key, each in state.items() if key != "_parent"}, above)
    if isinstance(value, Mapping):
        return {key: _plain(each, above) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, above) for each in value]
    return value


# ---------------------------------------------------------------------------------------- formats


def _torch(path: Path, zipped: bool) -> Content:
    names = _classes(path, zipped)
    mappings: set[str] = set()
    stand_ins = {name: _stand_in(name) for name in names}
    while True:
        # `mappings` grows with every refusal, so this ends after as many tries as there are classes.
        chosen = [(_ForeignMapping if name in mappings else stand_ins[name], name) for name in names]
        try:
            with torch.serialization.safe_globals([*_numpy(), *chosen]), warnings.catch_warnings():  # type: ignore[list-item]
                warnings.simplefilter("ignore")  # torch's, of pickle protocols; what it cannot read it refuses
                values = _loaded(path, zipped)
            return Content(values, foreign=tuple(name for name in names if stand_ins[name].made))
        except pickle.UnpicklingError as error:
            filled = [
                name
                for name, stand_in in stand_ins.items()
                if name not in mappings and "SETITEM" in str(error) and str(stand_in) in str(error)
            ]
            if not filled:
                raise ValueError(_refusal(path, error)) from error
            mappings.update(filled)
        except Exception as error:  # bytes that are no checkpoint fail in any way at all
            raise ValueError(
                f"{path}: not a torch checkpoint, or damaged ({_first_line(error)}); fetch it again"
            ) from error


def _loaded(path: Path, mapped: bool) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    with path.open("rb") as file:  # torch goes by a name's suffix where it is given a name
        return torch.load(file, map_location="cpu", weights_only=True)


def _classes(path: Path, zipped: bool) -> list[str]:
    """Dotted names of what a torch file names and torch does not build by itself."""
    with path.open("rb") as file:
        if zipped:
            stream, count = io.BytesIO(_pickle_of(path)), 1
        else:
            stream, count = file, _LEGACY_PICKLES  # type: ignore[assignment]
        try:
            found = dict.fromkeys(name for _ in range(count) for name in _globals(stream))
        except Exception as error:
            raise ValueError(
                f"{path}: not a torch checkpoint, or damaged ({_first_line(error)}); fetch it again"
            ) from error
    built = [*torch.serialization.get_safe_globals(), *_numpy()]
    known = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in built}
    return [name for name in found if name not in known]


def _globals(stream: Any) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            strings.append(argument)
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            module, name = strings[-2:]
        else:
            continue
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        yield f"{module}.{name}"


def _pickle_of(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2]: name for name in archive.namelist()}
            if "data.pkl" in members and "constants.pkl" not in members:
                return archive.read(members["data.pkl"])
            shown = ", ".join(archive.namelist()[:4])
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: a torch file that is damaged or cut short ({size:,} bytes, {_first_line(error)}); fetch it again"
        ) from error
    if "constants.pkl" in members:
        raise ValueError(f"{path}: a TorchScript program, not tensors; save its state_dict() with torch.save")
    raise ValueError(f"{path}: a zip archive ({shown}), not a torch file; unpack it and name the file in it")


def _stand_in(name: str) -> type[Foreign]:
    return type(name.replace(".", "_"), (Foreign,), {"name": name})


def _numpy() -> list[Any]:
    """Arrays and numbers of NumPy, under the names that its old and new versions gave them."""
    scalar, build = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    kinds = [np.ndarray, np.dtype, *{type(np.dtype(each)) for each in np.typecodes["All"] if each != "V"}]
    return [
        *kinds,
        *((scalar, f"{module}.scalar") for module in _NUMPY),
        *((build, f"{module}._reconstruct") for module in _NUMPY),
    ]


def _safetensors(path: Path) -> Content:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return Content(tensors, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: a safetensors file that is damaged or cut short{_shortfall(path)} "
            f"({_first_line(error)}); fetch it again"
        ) from error


def _shortfall(path: Path) -> str:
    """How many bytes are there of those that the header promises, where it can be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return f", {size:,} bytes"
    return f", {size:,} of {8 + length + max(ends, default=0):,} bytes"


def _sharded(path: Path) -> Content:
    values: dict[str, Any] = {}
    wanted = _weight_map(path)
    for name in sorted(set(wanted.values())):
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: its shard {name} is not beside it; fetch all of its {len(set(wanted.values()))}")
        shard = path.parent / name
        if _head(shard)[:1] == b"{":  # which might name itself
            raise ValueError(f"{path}: its shard {name} is an index and no weights; fetch it again")
        values |= read_content(shard).values
    missing = sorted(wanted.keys() - values.keys())
    if missing:
        raise ValueError(f"{path}: its shards lack {len(missing)} tensors (such as {', '.join(missing[:3])})")
    return Content(values)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: neither JSON nor weights ({_first_line(error)}); fetch it again") from error
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        said = path.read_text(errors="replace")[:80]
        raise ValueError(f"{path}: JSON without a weight_map ({said}), so no index of weights; check the address")
    strange = [name for name in names.values() if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise ValueError(f"{path}: its shard {strange[0]!r} is no plain file name; refused")
    return names


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from error
    if not head:
        raise ValueError(f"{path}: is empty; fetch it again")
    return head


def _what_else(head: bytes) -> str:
    """What the first bytes of a file that holds no weights say it is, and what to do."""
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        real = f" of a file of {int(size[1]):,} bytes" if size else ""
        return f"a Git LFS pointer{real}, not the file itself; run `git lfs pull`, or download it by its address"
    if b"/annex/objects/" in head[:200]:
        return "a git-annex pointer, not the file itself; run `git annex get`"
    if head.lstrip()[:1] == b"<":
        title = re.search(rb"<title[^>]*>\s*([^<]{1,80})", head, re.IGNORECASE)
        said = f" ({title[1].decode(errors='replace').strip()})" if title else ""
        return f"a web page{said}, not a file of weights; its address needs a login, or is that of a page"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return f"{what}, not weights; give a torch file or safetensors"
    if head[257:262] == b"ustar":
        return "a tar archive, not weights; unpack it and name the file in it"
    return (
        f"not a torch checkpoint nor safetensors, or damaged: it begins with {head[:12]!r}; "
        "check that it was fetched whole"
    )


def _refusal(path: Path, error: BaseException) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"an object of {found[1]}" if found else "more than tensors and plain data"
    return (
        f"{path}: refused, because it holds {what} and reading that could run code. If you trust its origin, "
        'convert it once where running it does no harm: python -c "import torch; f = lambda v: '
        "{k: f(w) for k, w in v.items()} if isinstance(v, dict) else [f(w) for w in v] if isinstance(v, list) "
        f"else v if torch.is_tensor(v) else None; torch.save(f(torch.load('{path.name}', weights_only=False)), "
        "'tensors.pt')\", then use tensors.pt"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
