"""Which files a graph takes its weights from, read without the onnx package, which workers do not have.

What enters: the bytes of an ONNX file, which nobody may have checked. What leaves: every location of
external data in it, wherever in it the tensor stands.
"""

from collections.abc import Iterator

#: Fields on the way to a tensor's location: number in onnx.proto, and the message that it holds.
FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}  # fmt: skip
_KEY, _VALUE = 1, 2
_NUMBER, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def external_locations(model: bytes) -> set[str]:
    """Locations of a model's external data.

    Raises:
        ValueError: it is no model that this reads.
    """
    found: set[str] = set()
    left = [("ModelProto", memoryview(model))]
    while left:
        kind, message = left.pop()
        fields = FIELDS.get(kind)
        if fields is not None:
            left.extend((fields[number], value) for number, value in _fields(message) if number in fields)
            continue
        entry = {number: bytes(value) for number, value in _fields(message)}
        if entry.get(_KEY) == b"location":
            found.add(entry.get(_VALUE, b"").decode())
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of the fields that are no plain numbers."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag >> 32:  # protobuf would take its lower bits for another field
            raise ValueError("a field whose number is too large")
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind == _NUMBER:
            _, at = _varint(message, at)
        elif kind in {_EIGHT_BYTES, _FOUR_BYTES}:
            at += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of type {kind}")
    if at > len(message):
        raise ValueError("a field that ends behind its message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:  # noqa: PLR2004  (the eighth bit says that more follows)
            return value, at + place + 1
    raise ValueError("a number without an end")
