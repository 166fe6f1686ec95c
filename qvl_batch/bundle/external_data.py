"""Which files an ONNX graph loads its weights from, parsed without the onnx package, which workers do not have.

What enters: the bytes of an ONNX file, not validated. What leaves: every location of external data in it, however
deeply the tensor is nested.
"""

from collections.abc import Iterator

#: Fields that lead to a tensor's location: field number in onnx.proto, and type of the message in it.
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
#: Protobuf's wire types: https://protobuf.dev/programming-guides/encoding/#structure
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


def external_locations(model: bytes) -> set[str]:
    """Locations of a model's external data.

    Raises:
        ValueError: the bytes are not a valid ONNX model.
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
    """Number and contents of each length-delimited field."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag >> 32:  # protobuf would drop the upper bits and read another field
            raise ValueError("a field number is too large")
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(message, at)
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in {_EIGHT_BYTES, _FOUR_BYTES}:
            at += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
    if at > len(message):
        raise ValueError("a field is longer than its message")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Decode a varint (7 bits a byte, lowest first).

    Returns:
        The number, and the position after it.
    """
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:  # noqa: PLR2004  (the eighth bit marks that another byte follows)
            return value, at + place + 1
    raise ValueError("a varint does not end")
