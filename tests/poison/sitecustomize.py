"""Found by every Python process that has this folder in PYTHONPATH: some rows end it.

An image whose file has `POISON_FILE` in it ends the process that reads it, one with `POISON_IMAGE` the
process that decodes it; a prompt of `POISON_PROMPT` the one that lays it out, which is the decoder's.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from after_import import AfterImport

sys.path.pop()
POISON_FILE, POISON_IMAGE, POISON_PROMPT = b"ends whatever reads it", b"ends whatever decodes it", "End."


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _poison_reader(module):
    # The only function of the reader that gets a single image; public ones get whole row groups.
    image = module._bytes_or_location  # noqa: SLF001

    def poisoned(value, *folder):
        return _die() if isinstance(value, bytes) and POISON_FILE in value else image(value, *folder)

    module._bytes_or_location = poisoned  # noqa: SLF001


def _poison_images(module):
    decode = module.decode_image

    def decode_image(data, *rules):
        return _die() if POISON_IMAGE in data else decode(data, *rules)

    module.decode_image = decode_image


def _poison_layout(module):
    row = module.RowLayout.row

    def poisoned(self, conversation, grids):
        return _die() if conversation[-1].text == POISON_PROMPT else row(self, conversation, grids)

    module.RowLayout.row = poisoned


AfterImport(
    {
        "qvl_batch.input.reader": _poison_reader,
        "qvl_batch.images.pixels": _poison_images,
        "qvl_batch.decoder.prompts": _poison_layout,
    }
)
