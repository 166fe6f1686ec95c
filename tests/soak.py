"""Kill random processes of a job at random moments, go on each time, and compare with an unbroken run.

    python tests/soak.py --bundle BUNDLE [--kills 50] [--latest 20] [--seed 0]

The job answers the demo questions again and again; a bundle for images at their own size answers conversations with
several images. Its driver, Ray's own processes and its workers
are equally likely to be killed. Where the job does not survive that, the same command is started
again. At the end every row must have its answer, once, and the one that it has without any kill.
Exit status 1 says that one has not.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import QUESTIONS, ROOT
from mixed_rows import MIXED, mixed_rows
from output_folders import read_answers

from qvl_batch import Bundle, Captioner
from qvl_batch.forecast.memory import family

#: Seconds from a kill, or a start, to the next kill, at least and at most: from before Ray runs until workers answer.
SOONEST, LATEST = 1.0, 20.0
#: Rows for each second between two kills, so that a fast machine is not done before the last.
ROWS_PER_SECOND = 8
#: Different conversations of a soak, and the longest answer in tokens.
CONVERSATIONS, NEW_TOKENS = 48, 64
#: A job of which a part was killed must end or write answers within so many seconds, or it hangs.
PATIENCE = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a soak ended."""

    rows: int
    missing: int
    twice: int
    wrong: int
    killed: Counter[str]
    starts: int

    @property
    def passed(self) -> bool:
        """Every row has its answer, once."""
        return self.missing == self.twice == self.wrong == 0

    def __str__(self) -> str:
        victims = ", ".join(f"{count} {name}" for name, count in self.killed.most_common())
        return (
            f"{self.killed.total()} kills ({victims}), {self.starts} starts: {self.rows:,} rows, "
            f"{self.missing:,} missing, {self.twice:,} twice, {self.wrong:,} with another answer"
        )


def soak(bundle: Path, kills: int, seed: int, folder: Path, env: dict[str, str], latest: float = LATEST) -> Outcome:
    """Run a job to its end through so many kills, or fewer if it ends before."""
    rng = np.random.default_rng(seed)
    native = Bundle.load(bundle, verify=False).manifest.layout.resolution.is_native
    asked = pa.Table.from_pylist(mixed_rows(CONVERSATIONS), MIXED) if native else pq.read_table(QUESTIONS)
    repeats = max(2, math.ceil(kills * latest * ROWS_PER_SECOND / asked.num_rows))
    source, output = folder / "input", folder / "answers"
    _write_two_files(source, asked, repeats)
    command = [sys.executable, "jobs/caption.py", "--bundle", bundle, "--input", source, "--output", output]
    command += ["--max-new-tokens", NEW_TOKENS]
    command += ["--messages-column", "messages", "--image-column", "images"] if native else []
    killed: Counter[str] = Counter()
    starts = 0
    while True:
        starts += 1
        before = killed.total()
        log = folder / f"{starts}.log"
        with (
            log.open("w") as said,
            subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=said) as job,
        ):
            while killed.total() < kills and _runs_for(job, rng.uniform(SOONEST, latest)):
                victim = int(rng.choice(family(job.pid)))
                name = _name(victim)
                if name is None:
                    continue  # it has just ended
                os.kill(victim, signal.SIGKILL)
                killed[name] += 1
                print(f"kill {killed.total()} of {kills}: {name}", flush=True)
            while _runs_for(job, PATIENCE):
                if time.time() - output.stat().st_mtime > PATIENCE:  # no file came
                    job.kill()
                    raise RuntimeError(f"the job hangs: {log.read_text()[-2000:]}")
        if job.returncode == 0:
            break
        if killed.total() == before:
            raise RuntimeError(f"the job ended by itself, with {job.returncode}: {log.read_text()[-2000:]}")
    return _compare(bundle, asked, repeats, output, killed, starts)


def _write_two_files(folder: Path, asked: pa.Table, repeats: int) -> None:
    """Two files, of row groups that are no multiple of anything else."""
    folder.mkdir(parents=True)
    for number in range(2):
        parts = []
        for again in range(number, repeats, 2):
            ids = [f"{again}/{id_}" for id_ in asked["id"].to_pylist()]
            parts.append(asked.set_column(asked.schema.get_field_index("id"), "id", pa.array(ids)))
        pq.write_table(pa.concat_tables(parts), folder / f"{number}.parquet", row_group_size=37)


def _compare(bundle: Path, asked: pa.Table, repeats: int, output: Path, killed: Counter[str], starts: int) -> Outcome:
    with Captioner(bundle) as captioner:
        if "messages" in asked.column_names:
            lists = [[image["bytes"] for image in images] for images in asked["images"].to_pylist()]
            messages = [json.loads(text) for text in asked["messages"].to_pylist()]
            answers = captioner.caption(lists, messages=messages, max_new_tokens=NEW_TOKENS)
        else:
            images = [image["bytes"] for image in asked["image"].to_pylist()]
            answers = captioner.caption(images, asked["prompt"].to_pylist(), max_new_tokens=NEW_TOKENS)
    expected = {
        f"{again}/{id_}": answer.answer
        for again in range(repeats)
        for id_, answer in zip(asked["id"].to_pylist(), answers, strict=True)
    }
    table = read_answers(output)
    found = list(zip(table["id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    times = Counter(id_ for id_, _ in found)
    return Outcome(
        rows=len(expected),
        missing=sum(id_ not in times for id_ in expected),
        twice=sum(count - 1 for count in times.values()),
        wrong=sum(expected.get(id_) != answer for id_, answer in found),
        killed=killed,
        starts=starts,
    )


def _runs_for(job: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait; whether the job still runs."""
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _name(process: int) -> str | None:
    """What a process is, in a word; None for one that has ended."""
    try:
        command = (Path("/proc") / str(process) / "cmdline").read_text()
    except OSError:
        return None
    names = ("jobs/caption.py", "VisionWorker", "DecoderWorker", "raylet", "gcs_server", "ray::")
    shown = ("driver", "vision worker", "decoder", "raylet", "gcs", "task or other actor")
    known = (label for name, label in zip(names, shown, strict=True) if name in command)
    return next(known, "helper of Ray's") if command else None


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--latest", type=float, default=LATEST, help="seconds from kill to kill at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="qvl") as folder:
        env = os.environ | {"RAY_TMPDIR": folder}
        outcome = soak(options.bundle, options.kills, options.seed, Path(folder) / "soak", env, options.latest)
    print(f"{outcome}; {(time.time() - began) / 60:.0f} minutes")
    return 0 if outcome.passed and outcome.killed.total() == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
