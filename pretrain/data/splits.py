"""Which files or rows are training images and which are held out, from the names of folders, files and splits.

A rule is applied to all names that lie side by side, or to none of them: a class may be called "train", a file
"steam_train".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pretrain.core.errors import UserError
from pretrain.core.text import listed, printable
from pretrain.data.files import Node

KINDS = {
    "train": ("train", "training", "trainval"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
# Folders of these names hold the images of something else: beside one split folder they are no classes.
GENERIC = {"images", "image", "imgs", "img", "data", "dataset", "extra", "unlabeled", "unlabelled", "all", "rest"}
GENERIC |= {"other", "others", "masks", "mask", "labels", "annotations"}
# Parts of the names of folders that hold images, and what belongs to images.
MAIN = re.compile(r"ima?ge?s?|photo|rgb|^(data|labell?ed)$", re.IGNORECASE)
ASIDE = re.compile(
    r"mask|segm|annot|unlab|^labels?$|ground.?truth|^gt|trimap|depth|thumb|preview|condition", re.IGNORECASE
)
FOLDS = ("fold", "split", "part", "shard", "chunk", "batch", "subset")  # with numbers, they are no names of classes
EVERYTHING = "all"  # name of the split of a data set that has none
NONE, WHOLE = "none", "."  # values of --data.test-split and --data.train-split
SETTLE = "name the folders with --data.train-split and --data.test-split (. is the whole folder, none no test split)"


def split_of(name: str) -> str | None:
    """The kind of split that a name stands for: "train", "validation", "test", "unclear" (several), or None.

    The name's words count, separated by all that is not a letter or by a capital: train2017, seg_train, TrainImages.
    """
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    kinds = {kind for word in words for kind, names in KINDS.items() if word.lower() in names}
    if kinds == {"train", "validation"}:
        return "train"
    return "unclear" if len(kinds) > 1 else next(iter(kinds), None)


@dataclass
class Split:
    """Files of one split.

    Attributes:
        kind: "train", "validation" or "test".
        name: of its folder or file.
        files: paths.
        classes: of each file, the name of its first folder below the split's; None where there is none.
    """

    kind: str
    name: str
    files: list[str] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)


def class_key(name: str) -> str:
    """What is compared of the names of classes that are not the same letter by letter."""
    return unicodedata.normalize("NFKC", name).strip().casefold()


def _alike(names: Sequence[str]) -> bool:
    """Whether names differ in digits alone, as those of shards do."""
    return len({re.sub(r"[\W\d_]+", "", name).lower() for name in names}) == 1


def _shared_inside(node: Node) -> list[str]:
    """The names of at least two folders that most folders in a folder hold alike."""
    counts = Counter(name for child in node.folders.values() for name in child.folders)
    shared = sorted(name for name, count in counts.items() if count > 1)
    return shared if len(shared) > 1 and 2 * sum(counts[name] for name in shared) > counts.total() else []


def _is_grouped(names: Sequence[str]) -> bool:
    """Whether all names are split names, of at least two kinds, the training's among them."""
    kinds = {split_of(name) for name in names}
    return len(kinds) > 1 and "train" in kinds and not kinds & {None, "unclear"}


class Splitter:
    """Assigns the files below a folder to splits.

    Args:
        root: the folder.
        source: the value of --data, for messages.
        note: called with messages on what was decided.
        what: the files: images, whose folders below a split are classes; or "parquet files" or "tar files", whose
            folders are only searched.
        empty: names of folders that hold no such files.
    """

    def __init__(
        self, root: Node, source: str, note: Callable[[str], None], what: str = "images", empty: Sequence[str] = ()
    ) -> None:
        self.root, self.source, self.note, self.what, self.empty = root, source, note, what, empty
        self.by_class = what == "images"
        self.known: set[str] = set()  # classes of the training split

    def refuse(self, what: str) -> UserError:
        """The error for something ambiguous."""
        return UserError(f"--data {self.source}: {printable(what)}; {SETTLE}")

    def splits(self, train: str | None, test: str | None) -> list[Split]:
        """The splits, that of the training images first.

        Args:
            train: --data.train-split, or None.
            test: --data.test-split, or None.

        Raises:
            UserError: the names are ambiguous, or a split that is asked for is not there.
        """
        base = self._descend(self.root)
        if self.by_class and base is not self.root:
            self.note(f"all images lie in {printable(base.path[len(self.root.path) + 1 :])}/")
        if train is None and test in (None, NONE):
            absent = [name for name in self.empty if split_of(name) == "train"]
            below = base.path[len(self.root.path) + 1 :]
            held_out = [
                name for name in [*below.split("/"), *base.entries()] if split_of(name) in ("validation", "test")
            ]
            if absent and held_out and not any(split_of(name) == "train" for name in base.entries()):
                raise self.refuse(f"{listed(absent)} holds no images, but {listed(held_out)} does")
            found = self._automatic(base)
            return found[:1] if test == NONE else found
        return self._explicit(base, train, test)

    def _descend(self, node: Node) -> Node:
        """The first folder on the way down that holds files or several folders, or a class of the training split."""
        while not node.files and len(node.folders) == 1 and class_key(next(iter(node.folders))) not in self.known:
            (node,) = node.folders.values()
        return node

    def _automatic(self, base: Node) -> list[Split]:
        entries = base.entries()
        kinds = {name: split_of(name) for name in entries if name in base.folders or not self.by_class}
        named = [name for name, kind in kinds.items() if kind]
        if not named:
            return self._by_class_folders(base)
        if self.by_class and base.files:
            raise self.refuse(f"{len(base.files)} images lie beside {listed(named)}/, whose name is that of a split")
        if len(named) == len(kinds):
            if _is_grouped(entries):
                return self._grouped(entries, base)
            if len({*kinds.values()}) > 1:
                raise self.refuse(f"{listed(named)} are names of splits, and which one is to be trained on is unclear")
            return self._one_kind(base, named)
        others = [name for name in kinds if name not in named]
        if len({kinds[name] for name in named}) > 1:
            raise self.refuse(f"{listed(named)} are names of splits, but {listed(others)} beside them are not")
        if not self.by_class:
            self._nested(base)
            self.note(f"all {self.what} are used: {listed(named)} beside {listed(others)} is taken for no split")
            return [self._whole(base)]
        if not self._are_siblings(base, others) or _shared_inside(base):
            raise self.refuse(f"{listed(named)} may be a split or a class beside {listed(others)}")
        self.note(
            f"{listed(named)} is taken for a class, as the {len(others)} folders beside it are no splits "
            "(--data.train-split and --data.test-split name splits)"
        )
        return self._by_class_folders(base)

    def _one_kind(self, base: Node, named: list[str]) -> list[Split]:
        """All names are split names of one kind: shards of one split, or classes of trains."""
        if not self.by_class or _alike(named) or any(base.folders[name].folders for name in named):
            text = "are taken for parts of one split" if len(named) > 1 else "is taken for the split to train on"
            self.note(f"{listed(named)} {text}")
            return [self._union("train", named, base)]
        self.note(f"{listed(named)} are taken for classes, there is no other split beside them")
        return self._by_class_folders(base)

    def _by_class_folders(self, base: Node) -> list[Split]:
        """No split at this level: its folders are classes. If every class has splits inside, these are taken."""
        inner = [[*node.folders] for node in base.folders.values()]
        images = base.files or any(node.files for node in base.folders.values())
        if self.by_class and not images and inner and all(map(_is_grouped, inner)):
            self._check_roles(base)
            self.note(f"the splits lie inside of the class folders ({listed(sorted(base.folders), 3)})")
            names = sorted({name for names in inner for name in names})
            return self._grouped(names, base, transposed=True)
        self._nested(base)
        return [self._whole(base)]

    def _nested(self, base: Node, *, inclusive: bool = False) -> None:
        """Refuse names of splits below a folder, whose images would be trained on; report those that are used.

        Args:
            base: the folder.
            inclusive: whether names in `base` itself count, too; else only those further down.

        Raises:
            UserError: a name may be that of a split.
        """
        nodes = [node for node in base.nodes() if inclusive or node is not base]
        found = [(node, named) for node in nodes if (named := [name for name in self._names(node) if split_of(name)])]
        kinds = {split_of(name) for _, named in found for name in named}
        # Nothing held out is among training images; or all images are of one and the same split.
        harmless = kinds == {"train"} or (len(kinds) == 1 and self._below_splits(base) == base.total)
        for node, named in found:
            names = self._names(node)
            where = node.path[len(self.root.path) + 1 :] or self.source
            others = [name for name in names if name not in named]
            if not (harmless and not (self.by_class and others)) and (
                len({split_of(name) for name in named}) > 1
                or (self.by_class and node.files)
                or not self._are_siblings(node, others)
            ):
                raise self.refuse(f"{listed(named)} in {where}/ may be a split")
            self.note(f"{listed(named)} in {where}/ is taken for no split")

    def _names(self, node: Node) -> list[str]:
        """The names in a folder that may stand for splits."""
        return sorted(node.folders) if self.by_class else node.entries()

    def _below_splits(self, node: Node) -> int:
        """The number of files below a folder that are in a split's folder, or are one."""
        folders = ((split_of(name), child) for name, child in node.folders.items())
        files = 0 if self.by_class else sum(split_of(name) is not None for name in node.files)
        return files + sum(child.total if kind else self._below_splits(child) for kind, child in folders)

    def _are_siblings(self, node: Node, others: Sequence[str]) -> bool:
        """Whether a folder's split names are names like `others` beside them, that is none of a split."""
        if not self.by_class:
            return bool(others)
        inside = {(bool(child.files), bool(child.folders)) for child in node.folders.values()}
        return len(inside) == 1 and not all(name.lower() in GENERIC for name in others)

    def _grouped(self, names: Sequence[str], base: Node, *, transposed: bool = False) -> list[Split]:
        """Splits of side-by-side names; training folders are joined if they are numbered alike."""
        train = [name for name in names if split_of(name) == "train"]
        if self.by_class and not _alike(train):
            raise self.refuse(f"{listed(train)} are all names of a training split")
        first = self._union("train", train, base, transposed=transposed)
        self.known = {class_key(name) for name in first.classes if name is not None}
        return [first, *self._held_out([name for name in names if name not in train], base, transposed=transposed)]

    def _held_out(self, names: Sequence[str], base: Node, *, transposed: bool = False) -> list[Split]:
        """The validation and test splits among names, those named test first."""
        joined: list[list[str]] = []
        for name in names:
            kind = split_of(name)
            if kind in ("validation", "test"):
                same = (n for n in joined if _alike([n[0], name]) or (not self.by_class and kind == split_of(n[0])))
                if (found := next(same, None)) is not None:
                    found.append(name)
                else:
                    joined.append([name])
        splits = [self._union(split_of(names[0]) or "", names, base, transposed=transposed) for names in joined]
        return sorted(splits, key=lambda split: split.kind != "test")

    def _union(self, kind: str, names: list[str], base: Node, *, transposed: bool = False) -> Split:
        split = Split(kind, listed(names, 3))
        for name in names:
            if transposed:
                for label, node in sorted(base.folders.items()):
                    if name in node.folders:
                        self._nested(node.folders[name], inclusive=True)
                        self._add(split, node.folders[name], label)
            elif name in base.folders:
                self._nested(base.folders[name], inclusive=True)
                self._add(split, base.folders[name])
            else:
                split.files.append(f"{base.path}/{name}")
                split.classes.append(None)
        return split

    def _add(self, split: Split, node: Node, label: str | None = None, *, is_named: bool = False) -> None:
        """Add a folder's files to a split, their class being `label` or their first folder below.

        Raises:
            UserError: its folders may be no classes, and the user did not name this one (`is_named`).
        """
        if label is None:
            above, node = node, self._descend(node)
            if node is not above and self.by_class:
                self.note(f"all images of {split.name} lie in {printable(node.path[len(self.root.path) + 1 :])}/")
            if not is_named:
                self._check_classes(node)
        for name in node.entries():
            if name in node.folders:
                paths = node.folders[name].paths()
                split.files += paths
                split.classes += [label or name] * len(paths)
            else:
                split.files.append(f"{node.path}/{name}")
                split.classes.append(label)

    def _check_classes(self, node: Node) -> None:
        """Report, or refuse, folders side by side that may be no classes.

        Raises:
            UserError: they are images and what belongs to them, or folds.
        """
        names = sorted(node.folders)
        if len(names) < 2:
            return
        if not self.by_class:
            self.note(f"the folders {listed(names)} hold parts of one table and are no classes")
            return
        self._check_roles(node)
        if _alike(names) and "".join(re.findall(r"[^\W\d_]+", names[0])).lower() in FOLDS:
            raise self.refuse(f"{listed(names)} may be parts of one data set, or classes")
        if inner := _shared_inside(node):
            self.note(
                f"the classes are {listed(names)}, not {listed(inner)}, which are folders in several of them "
                "(--data.train-split with their names, and + between them, makes these the classes)"
            )

    def _check_roles(self, node: Node) -> None:
        """Raise UserError if a folder's folders are named for images and for what belongs to images."""
        names = sorted(node.folders)
        aside = [name for name in names if ASIDE.search(name)]
        if aside and len(aside) < len(names) and all(MAIN.search(name) for name in names if name not in aside):
            raise self.refuse(f"{listed(names)} may be images and what belongs to them, or classes")

    def _whole(self, base: Node) -> Split:
        split = Split("train", EVERYTHING)
        self._add(split, base)
        return split

    def _named(self, base: Node, name: str, setting: str) -> Split:
        """The split of a name that the user gives: a folder, a parquet or tar file, or several with + between them."""
        split = Split("train" if setting == "train" else "test", name)
        for part in [name] if base.find(name) or self.root.find(name) else name.split("+"):
            node = base.find(part) or self.root.find(part)
            above, _, last = part.rpartition("/")
            folder = base.find(above) or self.root.find(above) if above else base
            files = [file for file in folder.entries() if self._matches(file, last)] if folder else []
            if node is not None:
                self._add(split, node, is_named=True)
            elif folder and files and not self.by_class:
                more = self._union(split.kind, files, folder)
                split.files += more.files
                split.classes += more.classes
            else:
                there = listed(base.entries()) if not self.by_class else listed(sorted(base.folders))
                raise UserError(
                    f"--data.{setting}-split {name}: there are no {self.what} of "
                    f"that name in {self.source}, which has {there or 'no folders'}"
                )
        return split

    @staticmethod
    def _matches(entry: str, name: str) -> bool:
        """Whether the name is a file's, or the word in it that stands for the split."""
        stem = re.sub(r"\.(parquet|tar)$", "", entry)
        return name in (entry, stem, re.split(r"[-_.]\d", stem)[0]) or (name in KINDS and split_of(stem) == name)

    def _explicit(self, base: Node, train: str | None, test: str | None) -> list[Split]:
        first = self._named(base, train, "train") if train is not None else self._rest(base, str(test))
        self.known = {class_key(name) for name in first.classes if name is not None}
        if test == NONE or (test is None and train == WHOLE):
            return [first]
        if test is None:
            taken = {*first.files}
            return [first, *(split for split in self._held_out(base.entries(), base) if not taken & {*split.files})]
        held_out = self._named(base, test, "test")
        taken = {*held_out.files}
        keep = [number for number, file in enumerate(first.files) if file not in taken]
        if len(keep) < len(first.files):
            self.note(f"{len(first.files) - len(keep)} files of {test} are taken out of those to train on")
        first.files, first.classes = [first.files[n] for n in keep], [first.classes[n] for n in keep]
        if not keep:
            raise UserError(f"--data.train-split {train or WHOLE}: without {test} no images are left to train on")
        return [first, held_out]

    def _rest(self, base: Node, test: str) -> Split:
        """What is to be trained on where the test split alone is named: the training split, or all the rest."""
        kinds = {name: split_of(name) for name in base.entries() if name in base.folders or not self.by_class}
        train = [name for name, kind in kinds.items() if kind == "train"]
        if train and all(kinds.values()) and not (self.by_class and base.files):
            return self._union("train", train, base)
        asked = {name.removesuffix("/").split("/")[0] for name in (test, *test.split("+"))}
        others = [name for name, kind in kinds.items() if kind and not asked & {name, name.split(".")[0]}]
        if others:
            raise self.refuse(f"beside {test}, {listed(others)} may be another split")
        return self._whole(base)
