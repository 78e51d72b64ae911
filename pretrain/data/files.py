"""The files below a folder: one walk finds images, tables and metadata, and counts what it passes over."""

import heapq
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
)  # Pillow opens no other
HIDDEN = (".", "@", "#", "$", "~", "__")  # how the names of folders begin that systems and NAS write for themselves
SYSTEM = ("@eaDir", "@Recycle", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN", "~snapshot", "__MACOSX", "__pycache__")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SAVED_SPLITS, SAVED_TABLE = "dataset_dict.json", {"state.json", "dataset_info.json"}  # what `save_to_disk` writes
KINDS = 3  # of files that a walk sorts into trees of folders: images, tables, tars
MAX_DEPTH = 64  # folders below each other
MAX_SUFFIX = 12  # characters of what is called a suffix

Image.init()  # registers the extensions of all formats
OPENED = [format_ for format_ in FORMATS if format_ in Image.OPEN]  # MPO is opened as JPEG; AVIF may not be built in
SUFFIXES = {suffix for suffix, format_ in Image.registered_extensions().items() if format_ in FORMATS}


@dataclass
class Node:
    """A folder and what of one kind (images, parquet files or tar files) lies in it and below it.

    Attributes:
        path: of the folder.
        files: names of the files in the folder.
        folders: those of its folders with such files in or below them, by name.
        total: number of files in the folder and below it.
    """

    path: str
    files: list[str] = field(default_factory=list)
    folders: dict[str, "Node"] = field(default_factory=dict)
    total: int = 0

    def entries(self) -> list[str]:
        """Names of files and folders in their order: the one that decides a sample's index."""
        return sorted([*self.files, *self.folders])

    def paths(self) -> list[str]:
        """All files, sorted by the parts of their paths."""
        found: list[str] = []
        for name in self.entries() if self.folders else sorted(self.files):
            if name in self.folders:
                found += self.folders[name].paths()
            else:
                found.append(f"{self.path}/{name}")
        return found

    def nodes(self) -> Iterator["Node"]:
        """This folder and all below it."""
        yield self
        for child in self.folders.values():
            yield from child.nodes()

    def find(self, name: str) -> "Node | None":
        """The folder of a path relative to this one, "." for itself; None if it has no such files."""
        node: Node | None = self
        for part in Path(name).parts:
            node = node.folders.get(part) if node else None
        return node


@dataclass
class Scan:
    """What a walk found.

    Attributes:
        images: files with an extension of `SUFFIXES`.
        tables: parquet files.
        tars: uncompressed tar files.
        metadata: paths of `METADATA` files.
        saved: folders that `save_to_disk` of the datasets library wrote: of a `Dataset` or of a `DatasetDict`.
        passed_over: number of files and folders that are not used, by kind.
        empty: folders without images, tables and tars in and below them, relative to the root, the uppermost ones.
        hidden: names of hidden folders that are none of `SYSTEM` and may be meant to be used.
        linked: links to folders that are read under another name, relative to the root.
    """

    images: Node
    tables: Node
    tars: Node
    metadata: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    linked: list[str] = field(default_factory=list)


@dataclass(order=True)
class _Folder:
    """A folder to be read: where its findings go, and how deep it lies."""

    path: str
    real: str = field(compare=False)  # without links
    images: Node = field(compare=False)
    tables: Node = field(compare=False)
    tars: Node = field(compare=False)
    depth: int = field(compare=False)


def scan(root: Path) -> Scan:
    """Walk a folder once, links to folders included, each folder once.

    Hidden files and folders (`HIDDEN`), files that are no regular files, and other files are passed over and counted.
    """
    path = str(root)
    found = Scan(Node(path), Node(path), Node(path))
    here, links = [_Folder(path, os.path.realpath(path), found.images, found.tables, found.tars, 0)], []
    seen: set[str] = set()
    made: list[tuple[Node, str]] = []  # a folder's parent, and its name there
    json_and_arrow: dict[str, set[str]] = {}  # names of such files, by folder
    while here or links:
        folder = here.pop() if here else heapq.heappop(links)  # by name, not in the order of the disk
        if folder.real in seen:
            found.passed_over["link to a folder that is read anyway"] += 1
            found.linked.append(folder.path[len(path) + 1 :])
            continue
        seen.add(folder.real)
        try:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    try:
                        if entry.name.endswith((".json", ".arrow")) and entry.is_file():
                            json_and_arrow.setdefault(folder.path, set()).add(entry.name)
                        else:
                            _take(entry, folder, found, here, links, made)
                    except OSError:  # a link that leads in a circle, or to where one may not look
                        found.passed_over["broken link"] += 1
        except OSError:
            found.passed_over["folder that can't be opened"] += 1
    pruned: Counter[str] = Counter()
    for parent, name in reversed(made):  # children before their parents
        node = parent.folders[name]
        _count(node)
        if not node.total:
            pruned[node.path[len(path) + 1 :]] += 1
            del parent.folders[name]
    _count(found.images)
    _count(found.tables)
    _count(found.tars)
    _find_saved(json_and_arrow, found)
    empty = {name for name, count in pruned.items() if count == KINDS} - {*found.linked}
    found.empty = sorted(name for name in empty if name.rpartition("/")[0] not in empty)
    return found


def _find_saved(names: dict[str, set[str]], found: Scan) -> None:
    """Add the data sets that `save_to_disk` wrote; the other JSON and Arrow files are passed over.

    Args:
        names: of the JSON and Arrow files in each folder.
        found: what is added to.
    """
    for folder in sorted(names):
        if names[folder] >= SAVED_TABLE or SAVED_SPLITS in names[folder]:
            if SAVED_SPLITS not in names.get(os.path.dirname(folder), ()):  # noqa: PTH120 — not a split of another one
                found.saved.append(folder)
            continue
        for name in names[folder]:
            hidden = name.startswith(".")
            found.passed_over["hidden file" if hidden else f".{name.rpartition('.')[2]} file"] += 1


def _count(node: Node) -> None:
    node.total = len(node.files) + sum(child.total for child in node.folders.values())


def _take(
    entry: os.DirEntry[str],
    folder: _Folder,
    found: Scan,
    here: list[_Folder],
    links: list[_Folder],
    made: list[tuple[Node, str]],
) -> None:
    """Sort one entry of a folder into what was found, or into the folders to be read."""
    name = entry.name
    if entry.is_dir():
        if name.startswith(HIDDEN):
            found.passed_over["hidden folder"] += 1
            if not name.startswith(".") and name not in SYSTEM:
                found.hidden.add(name)
        elif folder.depth == MAX_DEPTH:
            found.passed_over[f"folder more than {MAX_DEPTH} levels deep"] += 1
        else:
            path = f"{folder.path}/{name}"
            images, tables, tars = Node(path), Node(path), Node(path)
            for parent, child in ((folder.images, images), (folder.tables, tables), (folder.tars, tars)):
                parent.folders[name] = child
                made.append((parent, name))
            linked = entry.is_symlink()
            real = os.path.realpath(path) if linked else f"{folder.real}/{name}"
            entered = _Folder(path, real, images, tables, tars, folder.depth + 1)
            if linked:
                heapq.heappush(links, entered)
            else:
                here.append(entered)
        return
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 — a Path for each of a million names takes seconds
    if not entry.is_file():
        found.passed_over["broken link" if entry.is_symlink() else "file that is no regular file"] += 1
    elif name.startswith("."):
        found.passed_over["hidden file"] += 1
    elif suffix in SUFFIXES:
        folder.images.files.append(name)
    elif name.lower() in METADATA:
        found.metadata.append(f"{folder.path}/{name}")
    elif suffix == ".parquet":
        folder.tables.files.append(name)
    elif suffix == ".tar":
        folder.tars.files.append(name)
    else:
        kind = suffix if 1 < len(suffix) <= MAX_SUFFIX else "other"
        found.passed_over[f"{kind} file"] += 1


def read_packed(place: Mapping[str, Any], shards: Sequence[str]) -> bytes:
    """The bytes of a file in a tar file, which is opened for each, so that processes share no handle.

    Args:
        place: which of `shards`, and the file's `offset` and `size` in it.
        shards: paths of tar files.

    Raises:
        ValueError: the tar ends before the file does.
        OSError: it can't be read.
    """
    number, size = int(place["shard"]), int(place["size"])
    path = shards[number]
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 — not Path: it may hold any bytes
        stream.seek(place["offset"])
        content = stream.read(size)
        while len(content) < size and (more := stream.read(size - len(content))):
            content += more
    if len(content) < size:
        raise ValueError(f"{os.path.basename(path)} ends before it does")  # noqa: PTH119
    return content


def to_text(path: str) -> str:
    """A path for a table, whose strings are UTF-8: one that is not becomes NUL and its bytes as hexadecimal digits."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "\0" + os.fsencode(path).hex()
    return path


def from_text(text: str) -> str:
    """The path of `to_text`."""
    return os.fsdecode(bytes.fromhex(text[1:])) if text.startswith("\0") else text
