# SPDX-License-Identifier: Apache-2.0
"""Buckets: the static shapes graphs are compiled for, grids of them, which one a batch takes, and files of grids.

Owns the arithmetic and the file format only. Who builds batches, and what happens when nothing fits, is the engine's
business; which buckets are worth compiling is the planner's.
"""

import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

FOLD_SLABS = 128  # slabs of one fold: one per SBUF partition


@dataclass(frozen=True)
class Bucket:
    """A static shape. Every field is a number of things; a bucket holds whatever is no larger in any of them.

    The same class says what a batch needs: a need is the bucket that would fit it exactly.
    """

    KIND: ClassVar[str] = ""
    # Dimensions that may be zero; all others are at least one.
    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, value in self.dimensions().items():
            low = 0 if name in self.MAY_BE_ZERO else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{type(self).__name__}.{name}: got {value!r}, need an integer >= {low}.")

    def dimensions(self) -> dict[str, int]:
        """Name and size of every dimension, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """Readable and unique: kind and sizes, such as decode-8x4x2x8, without optional ones at the end that have their
        default. Part of file names and messages."""
        sizes = list(self.dimensions().values())
        while fields(self)[len(sizes) - 1].default == sizes[-1]:
            sizes.pop()
        return f"{self.KIND}-{'x'.join(map(str, sizes))}"

    @property
    def work(self) -> int:
        """What a step of this bucket costs, in units that compare buckets of one kind: it decides "smallest"."""
        raise NotImplementedError

    def holds(self, need: "Bucket") -> bool:
        """Whether a batch of shape `need` can be padded to this bucket."""
        if type(need) is not type(self):
            raise TypeError(f"need: got {need.name} ({type(need).__name__}), need a {type(self).__name__}.")
        return all(need.dimensions()[name] <= size for name, size in self.dimensions().items())

    def padding(self, need: "Bucket") -> dict[str, int]:
        """What padding adds to `need`, per dimension."""
        if not self.holds(need):
            raise ValueError(f"need: got {need.name}, need at most {self.name} in every dimension.")
        return {name: size - getattr(need, name) for name, size in self.dimensions().items()}


@dataclass(frozen=True)
class DecodeBucket(Bucket):
    """One query token per sequence, attention through a fold plan.

    num_seqs: rows. full_folds: folds of 128 slabs of one sequence. mixed_folds: folds of several sequences' rest.
    seqs_per_fold: sequences in a mixed or shared fold at most; a plan made for fewer fits. shared_folds: folds of 128
    slabs that several sequences begin with, read once for all of them; a batch without such takes the others.
    """

    num_seqs: int
    full_folds: int
    mixed_folds: int
    seqs_per_fold: int
    shared_folds: int = 0

    KIND: ClassVar[str] = "decode"
    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"full_folds", "mixed_folds", "shared_folds"})

    @property
    def work(self) -> int:
        """Slabs gathered; folds dominate, and the (fold, sequence) pairs of mixed and shared ones cost a combine each.
        """
        many = self.mixed_folds + self.shared_folds
        return (self.full_folds + many) * FOLD_SLABS + many * self.seqs_per_fold


@dataclass(frozen=True)
class PrefillBucket(Bucket):
    """Packed query tokens, attention through a fold plan.

    num_tokens: query tokens of all sequences. num_folds: folds of context of all sequences.
    """

    num_tokens: int
    num_folds: int

    KIND: ClassVar[str] = "prefill"

    @property
    def work(self) -> int:
        """Query tokens times context slabs, plus the tokens themselves for the linear layers."""
        return self.num_tokens * (1 + self.num_folds * FOLD_SLABS)


@dataclass(frozen=True)
class DecodeTableBucket(Bucket):
    """One query token per sequence, attention straight from a block table [num_seqs, max_blocks_per_seq]."""

    num_seqs: int
    max_blocks_per_seq: int

    KIND: ClassVar[str] = "decode_table"

    @property
    def work(self) -> int:
        """Blocks read."""
        return self.num_seqs * self.max_blocks_per_seq


@dataclass(frozen=True)
class PrefillTableBucket(Bucket):
    """num_tokens packed query tokens of num_seqs sequences (cu_seqlens_q) over [num_seqs, max_blocks_per_seq].

    Takes decodes, prompt chunks and mixtures of both.
    """

    num_seqs: int
    num_tokens: int
    max_blocks_per_seq: int

    KIND: ClassVar[str] = "prefill_table"

    @property
    def work(self) -> int:
        """Query tokens times blocks, plus the tokens themselves for the linear layers."""
        return self.num_tokens * (1 + self.num_seqs * self.max_blocks_per_seq)


@dataclass(frozen=True)
class CopyBucket(Bucket):
    """No step: KV blocks copied inside the caches, and blocks zeroed, where the host can't reach them.

    num_pairs: of (source, target) blocks, and blocks to zero.
    """

    num_pairs: int

    KIND: ClassVar[str] = "copy"

    @property
    def work(self) -> int:
        """Blocks moved."""
        return self.num_pairs


BucketT = TypeVar("BucketT", bound=Bucket)


class BucketGrid(Generic[BucketT]):
    """Buckets of one kind, cheapest first: by `costs` (what a step of each takes, in any unit) or, without, by `work`.

    A bucket that holds another must not be cheaper.
    """

    def __init__(self, buckets: Iterable[BucketT], costs: Mapping[BucketT, float] | None = None) -> None:
        found = list(dict.fromkeys(buckets))
        if not found:
            raise ValueError("buckets: got none, need at least one.")
        kinds = {type(bucket) for bucket in found}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"buckets: got {names} together, need one kind per grid.")
        if costs is not None and (missing := [bucket.name for bucket in found if bucket not in costs]):
            raise ValueError(f"costs: got none for {missing[0]}, need one for every bucket.")
        self.costs: dict[BucketT, float] | None = None if costs is None else {b: float(costs[b]) for b in found}
        cost = (lambda bucket: 0.0) if self.costs is None else self.costs.__getitem__
        self.buckets: tuple[BucketT, ...] = tuple(sorted(found, key=lambda bucket: (cost(bucket), *_order(bucket))))

    def __iter__(self) -> Iterator[BucketT]:
        return iter(self.buckets)

    def __len__(self) -> int:
        return len(self.buckets)

    def pick(self, need: BucketT) -> BucketT | None:
        """The cheapest bucket that holds `need`; `need` itself if it is one of the grid; None if none does."""
        # A bucket that holds another is never before it in the order, so an exact fit is met first.
        return next((bucket for bucket in self.buckets if bucket.holds(need)), None)

    def limits(self) -> dict[str, int]:
        """The largest size of each dimension. A need within all of them may still fit no single bucket."""
        columns = zip(*(bucket.dimensions().values() for bucket in self.buckets), strict=True)
        return dict(zip(self.buckets[0].dimensions(), map(max, columns), strict=True))


def _order(bucket: Bucket) -> tuple[int, ...]:
    return (bucket.work, *bucket.dimensions().values())


def ladder(low: int, high: int, *, growth: float = 2.0, multiple_of: int = 1) -> tuple[int, ...]:
    """Sizes from low to high, each at most `growth` times the one before, so that padding adds less than that.

    Multiples of `multiple_of` except for the last, which is `high`; where rounding leaves no multiple within `growth`,
    the next multiple is taken. Raises ValueError for an impossible request.
    """
    if not 1 <= low <= high:
        raise ValueError(f"low, high: got {low}, {high}, need 1 <= low <= high.")
    if not growth > 1:
        raise ValueError(f"growth: got {growth}, need more than 1.")
    if multiple_of < 1:
        raise ValueError(f"multiple_of: got {multiple_of}, need at least 1.")
    size = min(high, -(-low // multiple_of) * multiple_of)
    sizes = [size]
    while size < high:
        size = min(high, max(int(size * growth) // multiple_of * multiple_of, size + multiple_of))
        sizes.append(size)
    return tuple(sizes)


def decode_grid(
    num_seqs: Iterable[int], full_folds: Iterable[int], mixed_folds: Iterable[int], seqs_per_fold: int
) -> BucketGrid[DecodeBucket]:
    """Every combination that has at least one fold."""
    combinations = itertools.product(num_seqs, full_folds, mixed_folds)
    return BucketGrid(DecodeBucket(n, full, mixed, seqs_per_fold) for n, full, mixed in combinations if full + mixed)


def prefill_grid(num_tokens: Iterable[int], num_folds: Iterable[int]) -> BucketGrid[PrefillBucket]:
    """Every combination."""
    return BucketGrid(PrefillBucket(t, f) for t, f in itertools.product(num_tokens, num_folds))


def decode_table_grid(num_seqs: Iterable[int], max_blocks_per_seq: Iterable[int]) -> BucketGrid[DecodeTableBucket]:
    """Every combination."""
    return BucketGrid(DecodeTableBucket(n, w) for n, w in itertools.product(num_seqs, max_blocks_per_seq))


def prefill_table_grid(
    num_seqs: Iterable[int], num_tokens: Iterable[int], max_blocks_per_seq: Iterable[int]
) -> BucketGrid[PrefillTableBucket]:
    """Every combination that has at least a token per sequence."""
    combinations = itertools.product(num_seqs, num_tokens, max_blocks_per_seq)
    return BucketGrid(PrefillTableBucket(n, t, w) for n, t, w in combinations if t >= n)


# ---- files of grids --------------------------------------------------------------------------------------------------

FORMAT, FORMAT_VERSION = "neuron-paged-buckets", 1
KINDS: dict[str, type[Bucket]] = {
    kind.KIND: kind for kind in (DecodeBucket, PrefillBucket, DecodeTableBucket, PrefillTableBucket, CopyBucket)
}


def _form(kind: type[Bucket]) -> str:
    """What follows the kind in names; optional sizes in brackets."""
    names = [f"x{f.name}" if f.default is MISSING else f"[x{f.name}]" for f in fields(kind)]
    return "".join(names)[1:]


def bucket_of_name(name: str) -> Bucket:
    """The bucket of a name: the inverse of Bucket.name. Raises ValueError."""
    kind, _, sizes = name.partition("-")
    forms = ", ".join(f"{k}-{_form(c)}" for k, c in KINDS.items())
    numbers = sizes.split("x")
    if kind not in KINDS or not all(n.isascii() and n.isdigit() for n in numbers):
        raise ValueError(f"bucket: got {name!r}, need one of the forms {forms}.")
    required = sum(f.default is MISSING for f in fields(KINDS[kind]))
    if not required <= len(numbers) <= len(fields(KINDS[kind])):
        raise ValueError(f"bucket: got {name!r} with {len(numbers)} sizes, need one of the forms {forms}.")
    return KINDS[kind](*map(int, numbers))


@dataclass(frozen=True)
class BucketFile:
    """Grids by kind, as a file holds them. about: JSON values that say what they were made for (model, target, …).

    The file is JSON: {"format", "version", "about": {…}, "grids": {KIND: [{dimension: size, …, "cost_us": µs}, …]}};
    cost_us, a step's modelled time, is there for all buckets of a grid or for none.
    """

    grids: Mapping[str, BucketGrid[Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The file's content, JSON-ready."""
        grids = {
            kind: [
                bucket.dimensions() | ({} if grid.costs is None else {"cost_us": grid.costs[bucket]}) for bucket in grid
            ]
            for kind, grid in self.grids.items()
        }
        return {"format": FORMAT, "version": FORMAT_VERSION, "about": dict(self.about), "grids": grids}

    def save(self, path: str | Path) -> None:
        """Write the file: whole or not at all. OSError if that fails."""
        target = Path(path)
        text = json.dumps(self.document(), indent=2, allow_nan=False) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            file.write(text)
        try:
            os.replace(file.name, target)
        except OSError:
            os.unlink(file.name)
            raise


def load_buckets(path: str | Path) -> BucketFile:
    """The grids of a file that BucketFile.save wrote. OSError if it can't be read, ValueError if it is damaged."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); need a file of bucket grids.") from None
    try:
        return parse_buckets(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_buckets(document: object) -> BucketFile:
    """The grids of a decoded file; ValueError names the bucket and the field that is wrong."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'format: need an object with "format": "{FORMAT}".')
    if document.get("version") != FORMAT_VERSION:
        raise ValueError(f"version: got {document.get('version')!r}, need {FORMAT_VERSION}.")
    about, grids = document.get("about", {}), document.get("grids")
    if not isinstance(about, dict) or not isinstance(grids, dict) or not grids:
        raise ValueError("about, grids: need an object each, grids with at least one kind.")
    return BucketFile({kind: _parse_grid(kind, rows) for kind, rows in grids.items()}, about)


def _parse_grid(kind: str, rows: object) -> BucketGrid[Any]:
    if kind not in KINDS:
        raise ValueError(f"grids: got kind {kind!r}, need one of {', '.join(KINDS)}.")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"grids.{kind}: need a list of at least one bucket.")
    costs = {}
    for index, row in enumerate(rows):
        where = f"grids.{kind}[{index}]"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {row!r}, need an object.")
        known = {f.name: f for f in fields(KINDS[kind])}
        unknown = sorted(set(row) - set(known) - {"cost_us"})
        missing = [name for name, f in known.items() if name not in row and f.default is MISSING]
        if unknown or missing:
            raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; need {', '.join(known)}.")
        cost = row.get("cost_us")
        if cost is not None and not (type(cost) in (int, float) and math.isfinite(cost) and cost >= 0):
            raise ValueError(f"{where}.cost_us: got {cost!r}, need microseconds.")
        try:
            bucket = KINDS[kind](**{name: size for name, size in row.items() if name != "cost_us"})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if bucket in costs:
            raise ValueError(f"{where}: {bucket.name} is there twice.")
        costs[bucket] = cost
    if len({cost is None for cost in costs.values()}) > 1:
        raise ValueError(f"grids.{kind}: cost_us is there for some buckets only; need it for all or for none.")
    return BucketGrid(
        costs, None if None in costs.values() else {b: float(c) for b, c in costs.items() if c is not None}
    )
