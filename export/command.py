"""`python -m export`: the whole export from the command line.

What needs no torch is refused before that is imported.
"""

from rich.console import Console

from export.config import ExportConfig, check_settings
from export.progress import ShownProgress
from qvl_batch.command_line import exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.errors import JobError


def work() -> int:
    """Export and print a summary; returns the exit status."""
    config = settings(ExportConfig, prog="python -m export")
    check_settings(config)
    from export.package import export_bundle  # noqa: PLC0415  (takes seconds to import)

    manifest = export_bundle(config, ShownProgress(Console()))
    size = sum(file.size for file in manifest.files.values())
    layout, resolution = manifest.layout, manifest.layout.resolution
    images = (
        f"images of {resolution.min_pixels:,} to {resolution.max_pixels:,} pixels, at most {resolution.max_tokens}"
        if resolution.is_native
        else f"{resolution.max_tokens} of them for an image"
    )
    print(f"{config.output}: {size / 1e6:,.1f} MB, rows of up to {layout.max_seq_len} tokens, {images}")
    return 0


def main() -> int:
    """Run `python -m export`; 0 if there is a bundle, 1 if not, 130 if it was stopped."""
    stop_as_by_ctrl_c()  # so that a stopped export removes its temporary directory
    return exit_status("export", work, stopped=lambda: "no bundle was written", expected=(JobError, OSError))
