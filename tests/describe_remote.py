"""How long it takes to describe many parquet files (10,000, or the number given) of a store that answers each request
after 20 ms. The server is a process of its own.
"""

import multiprocessing
import sys
import time
from pathlib import Path

from s3 import environment
from test_stores import bucket, parquet

from qvl_batch.config import CaptionConfig
from qvl_batch.input.source import open_source

SECONDS = 0.02


def serve(files, ports, asked):
    """Serve that many files until the process ends."""
    data = parquet([{"id": "a", "image": b"i", "prompt": "p", "note": None}])
    with bucket({f"in/{at:05d}.parquet": data for at in range(files)}, SECONDS) as server:
        ports.put(server.server_port)
        asked.get()
        asked.put((server.asked.total(), server.most))


def main():
    """Measure, and print how it went."""
    files = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    ports, asked = multiprocessing.Queue(), multiprocessing.Queue()
    process = multiprocessing.Process(target=serve, args=(files, ports, asked), daemon=True)
    process.start()
    with environment(f"http://127.0.0.1:{ports.get()}"):
        began, busy = time.monotonic(), time.process_time()
        source = open_source(CaptionConfig(bundle="b", input=("s3://data/in",), output=str(Path("out"))))
        seconds, busy = time.monotonic() - began, time.process_time() - busy
    asked.put(None)
    time.sleep(1)
    requests, most = asked.get()
    print(
        f"{len(source.files):,} files in {seconds:.1f} s, {busy:.1f} s of a core: {requests:,} requests, {most} at once"
    )


if __name__ == "__main__":
    main()
