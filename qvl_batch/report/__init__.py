"""What a run says of itself: progress, summary, `_run.json` and the page."""
