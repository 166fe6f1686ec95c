"""Rows as a bundle takes them: images as the vision graph sees them, and token ids up to the answer.

What enters: `Rows`. What leaves: pixels, uint8 (H, W, 3), and rows of token ids.

This module loads no graph.
"""

from collections.abc import Sequence

from benchmark.rows import Rows
from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.decoder import PrefillRow
from qvl_batch.decoder.prompts import RowLayout, TokenRow
from qvl_batch.images.pixels import decode_image, see
from qvl_batch.images.view import View


class BundleRows:
    """Images and token ids of rows.

    Args:
        bundle: the bundle that sees the images.

    Raises:
        BundleError: template or tokenizer break the contract.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.resolution = bundle.manifest.layout.resolution
        self._layout, self._view = RowLayout(bundle), View.of(self.resolution)

    def image(self, file: bytes) -> Pixels:
        """Decode an image, and see it: uint8 (H, W, 3)."""
        return see(decode_image(file), self._view).pixels

    def images(self, rows: Rows) -> list[Pixels]:
        """Images of all rows, one after the other."""
        return [self.image(file) for file in rows.files]

    def tokens(self, prompt: str, grid: tuple[int, int]) -> TokenRow:
        """One turn of a prompt about an image of so many rows and columns of tokens."""
        return self._layout.row(single_turn(prompt, 1), [grid])

    def lengths(self, rows: Rows, images: Sequence[Pixels]) -> list[int]:
        """Tokens up to the answer of each row, those of its image included."""
        grids = [self.resolution.grid(*image.shape[:2]) for image in images]
        return [len(self.tokens(*row).input_ids) for row in zip(rows.prompts, grids, strict=True)]

    def prefill_row(self, prompt: str, image: Pixels, features: Features) -> PrefillRow:
        """What the decoder gets of a row.

        Args:
            prompt: asked about the image.
            image: pixels, uint8 (H, W, 3).
            features: float32 (T_img, D).
        """
        tokens = self.tokens(prompt, self.resolution.grid(*image.shape[:2]))
        return PrefillRow(tokens.input_ids, tokens.images, [features])

    def work(self, rows: Rows) -> tuple[list[tuple[int, int]], list[int]]:
        """Height and width of each image as it is seen, and tokens up to the answer of each row."""
        images = self.images(rows)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return sizes, self.lengths(rows, images)
