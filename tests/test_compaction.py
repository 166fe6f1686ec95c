"""Small parts are merged, and no crash, lost connection or Ctrl-C makes of that a lost, doubled or hidden answer."""

import random
import signal
import sys
import threading
import uuid
from collections import Counter
from contextlib import suppress
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from interrupts import press_ctrl_c
from output_folders import SCHEMA, read_answers
from test_storage import _store

import show
from calibration.reading import Columns, details, read_rows
from qvl_batch.columns import FILE, ROW, places_of, with_columns
from qvl_batch.errors import InputError, OutputError
from qvl_batch.output import compaction, parts
from qvl_batch.output.compaction import TRIAL, compact
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.parts import PARTS, PartRecord, each_part, part_name, read_part
from qvl_batch.output.resume import Job, OutputFolder
from qvl_batch.output.unreadable import UNREADABLE
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.rows import InputFile
from qvl_batch.schema import ANSWER_FIELDS, ID, LOCATION_FIELD, Answer, Failure

FILES = (InputFile("/in/a.parquet", 10, 12, "a"), InputFile("/in/b.parquet", 20, 9, "b"))
ADDED = InputFile("/in/0.parquet", 5, 4, "0")
JOB = Job({"bundle": "abc"}, FILES)
ALL = [(file, row) for file, each in enumerate(FILES) for row in range(each.rows)]


@pytest.fixture(params=["local", "store"])
def new_place(request, tmp_path):
    """Makes output folders, each of which can be opened again and again."""

    def new():
        name = uuid.uuid4().hex
        if request.param == "local":
            return lambda: LocalFolder(tmp_path / name)
        return lambda: _store(f"memory://{name}/out", renewal=10.0)

    return new


@pytest.fixture
def few(monkeypatch):
    """Parts of 8 rows are usual, of less than 4 small, and 3 of them worth merging."""
    for module, name, value in ((compaction, "FEWEST", 3), (compaction, "ROWS_PER_FILE", 8), (parts, "SMALL_ROWS", 4)):
        monkeypatch.setattr(module, name, value)


class KilledError(BaseException):
    """The process ends here."""


class Failing:
    """A folder of which one write or removal fails; of a process that is killed, so do all after it.

    `seen` is called between all of them.
    """

    def __init__(self, folder, at=None, error=None, *, happens=False, seen=lambda: None):
        self._folder, self._at, self._error, self._happens, self._seen = folder, at, error, happens, seen
        self.steps: list[tuple[str, str]] = []
        self.reads: list[str] = []

    def __getattr__(self, name):
        return getattr(self._folder, name)

    def __str__(self):
        return str(self._folder)

    def read(self, name):
        self.reads.append(name)
        return self._folder.read(name)

    def write(self, name, data):
        self._step(("write", name), lambda: self._folder.write(name, data))

    def remove(self, *names):
        for name in names:
            self._step(("remove", name), lambda name=name: self._folder.remove(name))

    def _step(self, what, work):
        self._seen()
        self.steps.append(what)
        is_last = len(self.steps) == self._at
        is_dead = isinstance(self._error, KilledError) and self._at is not None and len(self.steps) > self._at
        if (not is_last or self._happens) and not is_dead:
            work()
        if is_last or is_dead:
            raise self._error


def _table(answers):
    """Answers by place, as they come to the writer."""
    files, rows = zip(*answers, strict=True)
    columns = {FILE: pa.array(files, pa.int32()), ROW: pa.array(rows, pa.int64()), ID: rows}
    for field in ANSWER_FIELDS:
        columns[field.name] = pa.array([each.record()[field.name] for each in answers.values()], field.type)
    columns[LOCATION_FIELD.name] = pa.nulls(len(rows), pa.string())
    return pa.table(columns)


def _answer(text, *, fails=False):
    return Answer.failed(Failure("image", "ImageError", text)) if fails else Answer(text, "stop", 9, 2)


def _said(table):
    """What is said to each row, by its place."""
    rows = with_columns(table, PartRecord.of(table.schema.metadata).places())
    texts = zip(rows["answer"].to_pylist(), rows["error_message"].to_pylist(), strict=True)
    return [(place, answer or error) for place, (answer, error) in zip(places_of(rows), texts, strict=True)]


def _seen(folder):
    """What a reader that knows of merging reads."""
    return [each for _, table in each_part(folder) for each in _said(table)]


def _plain(folder):
    """What one reads that takes all files."""
    return [each for name in folder.names(PARTS) for each in _said(read_part(folder, name))]


def _write(folder, answers, rows_of_part=2, failed=None, notes=None):
    """Write answers by place to parts of so few rows."""
    with AnswerWriter(folder, SCHEMA, failed, notes) as writer:
        places = list(answers)
        for at in range(0, len(places), rows_of_part):
            writer.add(_table({place: answers[place] for place in places[at : at + rows_of_part]}))
            writer.flush()


def _open(folder, job=JOB, retry=None):
    return OutputFolder(folder, job, SCHEMA, overwrite=False, retry=retry)


def _finish(folder, job=JOB):
    """What a job does once all rows have an answer."""
    with _open(folder, job) as output:
        counts = list(compact(output.folder, SCHEMA, output.notes))
        output.write_list()
    return counts


def _scattered(place):
    """A folder of small parts whose rows are in no order, some of them failed; what they say, by place."""
    order = np.random.default_rng(0).permutation(len(ALL))
    answers = {ALL[at]: _answer(f"first {ALL[at]}", fails=ALL[at][1] % 3 == 0) for at in order}
    with _open(place()) as output:
        _write(output.folder, answers)
    return {each: f"first {each}" for each in ALL}


def test_small_parts_become_usual_ones_in_the_order_of_the_input(new_place):
    place = new_place()
    job = Job({}, (InputFile("/in/a.parquet", 1, 3_000, "a"), InputFile("/in/b.parquet", 1, 3_000, "b")))
    rows = [(file, row) for file in range(2) for row in range(1_000)]
    rng = np.random.default_rng(0)
    near = sorted(rows, key=lambda each: (each[0], each[1] // 40, rng.random()))
    with _open(place(), job) as output:
        _write(output.folder, {each: _answer(str(each), fails=each[1] in (7, 999)) for each in near}, 20)
        before = _plain(output.folder)
        assert len(output.folder.names(PARTS)) == 100
    folder = Failing(place())
    small = folder.names(PARTS)
    assert _finish(folder, job) == [51, 49]
    assert sorted(name for name in folder.reads if name in small) == small
    assert sorted(_plain(folder)) == sorted(before)
    for name in folder.names(PARTS):
        places = [place for place, _ in _said(read_part(folder, name))]
        assert places == sorted(places)
        assert name == part_name(*places[0])
    # Each small part was read, and removed or replaced, once.
    steps = Counter(kind for kind, name in folder.steps if name.startswith("part-"))
    assert steps == {"write": 2, "remove": 98}
    with _open(place(), job) as output:
        assert (output.done.count, output.tally.rows, output.tally.errors) == (2_000, 2_000, {"image: ImageError": 4})
        assert not output.notes.small
        assert output.notes.unread == set(folder.names(PARTS))


def test_few_small_parts_and_usual_ones_stay_as_they_are(new_place):
    place = new_place()
    with _open(place(), Job({}, (InputFile("/in/a.parquet", 1, 20_000, "a"),))) as output:
        _write(output.folder, {(0, row): _answer("yes") for row in range(15 * 20)}, 20, notes=output.notes)
        _write(
            output.folder, {(0, row): _answer("yes") for row in range(1_000, 1_000 + 20 * 512)}, 512, notes=output.notes
        )
        assert len(output.notes.small) == 15
        before = {name: output.folder.read(name) for name in output.folder.names("*")}
        assert list(compact(output.folder, SCHEMA, output.notes)) == []
        assert {name: output.folder.read(name) for name in output.folder.names("*")} == before
        _write(output.folder, {(0, 900): _answer("yes")}, notes=output.notes)
        assert list(compact(output.folder, SCHEMA, output.notes)) == [16]
        assert len(output.folder.names(PARTS)) == 21


def test_large_values_bound_what_is_merged_and_held(new_place, monkeypatch):
    place = new_place()
    monkeypatch.setattr(compaction, "BYTES_PER_FILE", 100_000)
    monkeypatch.setattr(parts, "SMALL_BYTES", 50_000)
    with _open(place(), Job({}, (InputFile("/in/a.parquet", 1, 100, "a"),))) as output:
        texts = {(0, row): _answer("x" * (60_000 if row >= 40 else 30_000)) for row in range(60)}
        _write(output.folder, texts, 1, notes=output.notes)
        assert len(output.notes.small) == 40
        held, most = [0, 0], []
        read, merge = compaction.read_part, compaction._merge  # noqa: SLF001

        def counted(*arguments):
            held[0] += 1
            return read(*arguments)

        def merged(folder, schema, group, notes):
            most.append(held[0] - held[1])
            held[1] += len(group)
            merge(folder, schema, group, notes)

        monkeypatch.setattr(compaction, "read_part", counted)
        monkeypatch.setattr(compaction, "_merge", merged)
        assert list(compact(output.folder, SCHEMA, output.notes)) == [3] * 13
        assert max(most) <= parts.READERS + 3
        assert sorted(_plain(output.folder)) == sorted((each, answer.answer) for each, answer in texts.items())


@pytest.mark.parametrize("happens", [False, True])
@pytest.mark.parametrize("error", [KilledError(), OSError("the store is away")])
@pytest.mark.usefixtures("few")
def test_whatever_step_fails_the_next_run_has_each_answer_once(error, happens, new_place, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)  # the machine goes on, so what is written is there without
    place = new_place()
    _scattered(place)
    whole = Failing(place())
    assert _finish(whole) == [4, 4, 3]
    assert len(whole.steps) == 2 + 3 + (3 + 3 + 2) + 1
    assert whole.steps[-1] == ("write", UNREADABLE)
    for at in range(1, len(whole.steps) + 1):
        place = new_place()
        expected = _scattered(place)
        failing = Failing(place(), at, error, happens=happens)
        is_trial = isinstance(error, OSError) and whole.steps[at - 1][1] == TRIAL
        with suppress(KilledError) if is_trial else pytest.raises((KilledError, OutputError)):
            _finish(failing)
        folder = place()
        assert sorted(_seen(folder)) == sorted(expected.items()), at
        assert set(_plain(folder)) == set(expected.items()), at
        _go_on(place, expected, at)


def _go_on(place, expected, at):
    """A next run, one of several kinds, has each answer once, and merges what is left."""
    job, retry, new = JOB, None, {}
    if at % 3 == 1:
        retry = tuple(file.rows for file in FILES)
        new = {each: f"again {each}" for each in ALL if each[1] % 6 == 0}
    elif at % 3 == 2:
        job = Job(JOB.settings, (*FILES, ADDED))
        new = {(2, row): f"added {row}" for row in range(ADDED.rows)}
    with _open(place(), job, retry) as output:
        # What is superfluous went before anything else.
        assert sorted(_plain(output.folder)) == sorted(expected.items())
        assert output.done.count == len(ALL) - (7 if retry else 0)
        _write(output.folder, {each: _answer(text) for each, text in new.items()}, 1, output.failed, output.notes)
        list(compact(output.folder, SCHEMA, output.notes))
        output.write_list()
    folder = place()
    assert sorted(_plain(folder)) == sorted((expected | new).items())
    assert len(folder.names(PARTS)) == (3 if job is JOB else 4)
    assert TRIAL not in folder.names("*")
    assert folder.names(UNREADABLE) == [UNREADABLE]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("few")
def test_a_job_that_is_broken_off_at_random_has_what_a_simple_model_has(seed, new_place):
    """Runs, limits, retries, files that are added, and failures of any step, as they come."""
    rng, place = random.Random(seed), new_place()  # noqa: S311
    job, known, version = JOB, dict[tuple[int, int], str](), 0
    for _ in range(12):
        if rng.random() < 0.1 and len(job.files) == len(FILES):
            job = Job(JOB.settings, (*FILES, ADDED))
        rows = [(file, row) for file, each in enumerate(job.files) for row in range(each.rows)]
        limit = tuple(rng.choice([file.rows, rng.randrange(file.rows)]) for file in job.files)
        retry = limit if rng.random() < 0.5 else None
        error = rng.choice([KilledError(), OSError("away"), None])
        folder = Failing(place(), rng.randrange(1, 30) if error else None, error, happens=rng.random() < 0.5)
        #: What a row may say, if the folder fails before what came is known to be written.
        may = {each: {known.get(each)} for each in rows}
        with suppress(KilledError, OutputError), _open(folder, job, retry) as output:
            failed = {each for each, text in known.items() if text.endswith("!")}
            retried = {each for each in failed if retry and each[1] < retry[each[0]]}
            assert set(output.failed) == retried
            assert output.done.count == len(known) - len(retried)
            left = [each for each in rows if each not in known or each in retried]
            chosen = rng.sample(left, rng.choice([len(left), rng.randrange(len(left) + 1)]))
            with AnswerWriter(folder, SCHEMA, output.failed, output.notes) as writer:
                for at in range(0, len(chosen), 3):
                    version += 1
                    some = chosen[at : at + 3]
                    texts = {each: f"{version} {each}" + "!" * (rng.random() < 0.3) for each in some}
                    for each, text in texts.items():
                        may[each].add(text)
                    writer.add(_table({each: _answer(text, fails=text[-1] == "!") for each, text in texts.items()}))
                    if rng.random() < 0.7:
                        writer.flush()
                        may |= {each: {max(said, key=_version)} for each, said in may.items()}
            may |= {each: {max(said, key=_version)} for each, said in may.items()}
            if len(chosen) == len(left):
                list(compact(folder, SCHEMA, output.notes))
            output.write_list()
        found = _seen(place())
        known = dict(found)
        assert len(known) == len(found)
        assert all(known.get(each) in said for each, said in may.items())
        assert set(_plain(place())) == set(found)
    everything = {each: known.get(each, f"last {each}").replace("!", "") for each in rows}
    with _open(place(), job, tuple(file.rows for file in job.files)) as output:
        left = {each: _answer(text) for each, text in everything.items() if known.get(each) != text}
        _write(output.folder, left, 2, output.failed, output.notes)
        list(compact(output.folder, SCHEMA, output.notes))
        output.write_list()
    assert sorted(_plain(place())) == sorted(everything.items())
    assert place().names(UNREADABLE) == []


def _version(text):
    return 0 if text is None else int(text.split()[0])


class _Reader:
    """Reads the parts of a folder, a few now and a few later."""

    def __init__(self, folder):
        self._coming, self.said, self.lacks = each_part(folder), [], False

    def read(self, count=None):
        """Read some parts, or all that are left; one that is gone ends it."""
        try:
            for _, table in islice(self._coming, count):
                self.said += _said(table)
        except FileNotFoundError:
            self.lacks = True


@pytest.mark.parametrize("pace", [0, 1, 4])
@pytest.mark.usefixtures("few")
def test_a_reader_meanwhile_has_each_answer_once_or_an_error(pace, new_place):
    whole = 0
    for start in range(0, 14, 2 if pace else 1):
        place, readers, times = new_place(), [], [0]
        expected = sorted(_scattered(place).items())

        def seen(place=place, start=start, readers=readers, times=times, expected=expected):
            times[0] += 1
            if start == 0:
                assert sorted(_seen(place())) == expected
                assert set(_plain(place())) == set(expected)
            if times[0] > start:
                readers.append(_Reader(place()))
            for reader in readers:
                reader.read(pace)

        _finish(Failing(place(), seen=seen))
        for reader in readers:
            reader.read()
            assert reader.lacks or sorted(reader.said) == expected
        whole += sum(not reader.lacks for reader in readers)
    assert whole


@pytest.mark.usefixtures("few")
def test_ctrl_c_lets_what_has_begun_end_and_the_next_run_goes_on(new_place):
    place, waits = new_place(), threading.Event()
    expected = sorted(_scattered(place).items())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def seen():
        if [kind for kind, name in folder.steps if name.startswith("part-")] == ["write"]:  # the removals are to come
            threading.Thread(target=press_ctrl_c).start()
            waits.wait(1.0)

    folder = Failing(place(), seen=seen)
    try:
        with pytest.raises(KeyboardInterrupt):
            _finish(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(_plain(place())) == expected
    assert len(place().names(PARTS)) == 8
    assert _finish(place()) == [4, 3]
    assert sorted(_plain(place())) == expected


@pytest.mark.usefixtures("few")
def test_parts_stay_small_where_nothing_can_be_removed(new_place, monkeypatch, caplog):
    place = new_place()
    _scattered(place)
    before = {name: place().read(name) for name in place().names(PARTS)}
    with monkeypatch.context() as patch:

        def refused(*_):
            raise PermissionError(1, "Operation not permitted")

        with _open(place()) as output:
            patch.setattr(type(output.folder), "remove", refused)
            assert list(compact(output.folder, SCHEMA, output.notes)) == []
            patch.undo()
    assert f"small parts of {place()} stay as they are, since files cannot be removed there" in caplog.text
    assert {name: place().read(name) for name in place().names(PARTS)} == before
    assert _finish(place()) == [4, 4, 3]


@pytest.mark.usefixtures("few")
def test_a_small_part_that_is_damaged_is_named_and_nothing_is_merged_with_it(tmp_path):
    expected = _scattered(lambda: LocalFolder(tmp_path))
    damaged = sorted(tmp_path.glob(PARTS))[5]
    data = bytearray(damaged.read_bytes())
    data[4:300] = bytes(296)
    damaged.write_bytes(data)
    with pytest.raises(OutputError, match=rf"{damaged.name} cannot be read, is damaged, .*, delete it"):
        _finish(LocalFolder(tmp_path))
    damaged.unlink()
    left = set(dict(_plain(LocalFolder(tmp_path))).items())
    assert left < set(expected.items())
    assert len(left) == len(ALL) - 2


@pytest.mark.usefixtures("few")
def test_programs_that_read_answers_count_them_once_after_a_crash(tmp_path, monkeypatch, capsys):
    folder = LocalFolder(tmp_path)
    schema = pa.schema([*SCHEMA, ("confidence", pa.float64()), ("expected", pa.string())])
    with OutputFolder(folder, JOB, schema, overwrite=False) as output, AnswerWriter(folder, schema) as writer:
        for each in ALL:
            table = _table({each: _answer("yes")})
            more = {"confidence": pa.array([0.5]), "expected": pa.array(["yes"])}
            writer.add(with_columns(table, more))
            writer.flush()
    with pytest.raises(KilledError), OutputFolder(folder, JOB, schema, overwrite=False) as output:
        list(compact(Failing(output.folder, 5, KilledError()), schema, output.notes))
    assert len(read_answers(tmp_path)) > len(ALL)
    rows = read_rows(folder, Columns("expected"))
    assert len(rows.state) == len(ALL)
    assert [row["id"] for row in details(folder, Columns("expected"), rows, [20])] == [8]
    monkeypatch.setattr(sys, "argv", ["show.py", str(tmp_path)])
    assert show.main() == 0
    assert f"{len(ALL)} of {len(ALL)} answers match" in capsys.readouterr().out
    with OutputFolder(folder, JOB, schema, overwrite=False) as output:
        list(compact(folder, schema, output.notes))
    with pytest.raises(InputError, match="has changed meanwhile: try again when its job has ended"):
        details(folder, Columns("expected"), rows, [8])


def test_an_answer_whose_write_came_to_pass_though_it_failed_is_not_written_twice(new_place):
    place = new_place()
    with _open(place()) as output:
        failing = Failing(output.folder, 1, OSError("the reply is lost"), happens=True)
        with AnswerWriter(failing, SCHEMA) as writer:
            writer.add(_table({(0, 5): _answer("five")}))
            with pytest.raises(OutputError, match="the reply is lost"):
                writer.flush()
            writer.add(_table({(0, 2): _answer("two")}))
    assert sorted(_plain(place())) == [((0, 2), "two"), ((0, 5), "five")]
