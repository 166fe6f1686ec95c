"""Which container a file is, by the end of its name.

What enters: names of files. What leaves: a kind of container, or whether a name is that of an image.
"""

_PACKED = ("", ".gz", ".zst")
#: Kinds of files that hold rows, and the ends of their names.
ENDINGS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "JSON Lines": tuple(f"{end}{packed}" for end in (".jsonl", ".ndjson") for packed in _PACKED),
    "CSV": tuple(f"{end}{packed}" for end in (".csv", ".tsv") for packed in _PACKED),
    "Arrow": (".arrow", ".feather", ".ipc"),
    "tar": (".tar",),
}
#: Of images: the formats that are read, and HEIF, which is read if its extra is installed.
IMAGES = frozenset(
    "avif bmp gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()  # noqa: SIM905
)


def kind_of(name: str) -> str | None:
    """The kind of container that a file's name stands for, None for a name that stands for none."""
    lower = name.lower()
    return next((kind for kind, ends in ENDINGS.items() if lower.endswith(ends)), None)


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image."""
    _, dot, end = name.rpartition(".")
    return bool(dot) and end.lower() in IMAGES


def spelled() -> str:
    """All ends, for messages."""
    return ", ".join(end for ends in ENDINGS.values() for end in ends if not end.endswith(_PACKED[1:]))
