"""ICC profiles whose colours are known, written from their definition."""

import struct

#: Columns X, Y, Z of red, green and blue for D50, as the makers of these spaces publish them.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))
D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(columns, gamma):
    """Of three colours and one curve."""
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", tags | {f"{name}TRC": _curve(gamma) for name in "rgb"})


def grey_profile(gamma):
    """Of shades."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", {"kTRC": _curve(gamma)})


def cmyk_profile(paper, inks):
    """Of a press whose colours are one: paper, grey to the eye where there is any ink, and black. All are L, a, b."""
    corners = [(0, 128, 128) if corner & 1 else inks if corner else paper for corner in range(16)]
    ramp = bytes(range(256))
    table = b"".join(bytes(corner) for corner in corners)
    identity = b"".join(struct.pack(">i", 65536 * (place % 4 == 0)) for place in range(9))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {"A2B0": lut})


def _profile(space, connection, kind, tags):
    tags = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        "wtpt": _xyz(D50),
        "cprt": b"text" + bytes(4) + b"x\0",
    } | tags
    start = 128 + 4 + 12 * len(tags)
    entries, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        entries += name.encode() + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), b"lcms", 0x02200000, kind, space, connection, b"acsp")
    head = head.ljust(68, b"\0") + b"".join(map(_fixed, D50))
    return head.ljust(128, b"\0") + entries + body


def _xyz(values):
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _fixed(value):
    return struct.pack(">i", round(value * 65536))
