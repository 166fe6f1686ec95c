"""However rows meet in the engine, each gets the answer it would get alone."""

import dataclasses
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from answers import ask, complete, demo_rows, requests_of
from checkpoints import penalised_checkpoint
from conftest import ROOT, exported
from reference import question

from export.checkpoint import load_checkpoint
from export.comparison.reference import PyTorch
from qvl_batch.bundle.loading import Bundle
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.decoder.requests import Request
from qvl_batch.errors import BundleError

ROWS = 24


@pytest.fixture(scope="module")
def questions():
    return demo_rows(ROWS)


@pytest.fixture(scope="module")
def requests(tiny_bundle, questions):
    return requests_of(tiny_bundle, questions, 64)


def _completions(bundle, requests, slots):
    return complete(Decoder(bundle, slots, threads=2), bundle, requests)


@pytest.fixture(scope="module")
def alone(tiny_bundle, requests):
    return _completions(tiny_bundle, requests, slots=1)


@pytest.mark.parametrize("slots", [2, 3, 5, 8, 16])
def test_answers_do_not_depend_on_how_many_share_the_decoder(slots, tiny_bundle, requests, alone):
    assert _completions(tiny_bundle, requests, slots) == alone


def test_answers_do_not_depend_on_the_order_of_rows(tiny_bundle, requests, alone):
    order = list(range(ROWS))
    np.random.default_rng(3).shuffle(order)
    shuffled = _completions(tiny_bundle, [requests[i] for i in order], slots=4)
    assert [shuffled[order.index(i)] for i in range(ROWS)] == alone


def test_rows_of_different_limits_and_threads_mix(tiny_bundle, requests, alone):
    limits = [1 + i % 7 for i in range(ROWS)]
    short = [dataclasses.replace(r, max_new_tokens=n) for r, n in zip(requests, limits, strict=True)]
    decoder = Decoder(tiny_bundle, 4, threads=1)
    with Engine(decoder, tiny_bundle.manifest.generation.eos_token_ids) as engine, ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda request: engine.submit(request).result(timeout=120), short))
    for result, whole, limit in zip(results, alone, limits, strict=True):
        assert result.token_ids == whole.token_ids[:limit]
        assert result.finish_reason == ("length" if len(whole.token_ids) >= limit else "stop")


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("prompts", [2, 5])
def test_rows_of_one_image_share_its_beginning_and_are_answered_the_same(
    slots, prompts, tiny_bundle, requests, questions, monkeypatch
):
    layout = RowLayout(tiny_bundle)
    rows = [
        Request(ask(layout, question["prompt"], *request.row.features), request.max_new_tokens, [bytes([index])])
        for index, request in enumerate(requests[:6])
        for question in questions[:prompts]
    ]
    order = np.random.default_rng(slots).permutation(len(rows))
    rows = [rows[i] for i in order]
    calls = []
    for name in ("prefill", "prefill_part"):
        plain = getattr(Decoder, name)
        counted = lambda self, *args, name=name, plain=plain: calls.append(name) or plain(self, *args)  # noqa: E731
        monkeypatch.setattr(Decoder, name, counted)
    shared = _completions(tiny_bundle, rows, slots)
    rest = calls.count("prefill_part")
    calls.clear()
    assert shared == _completions(tiny_bundle, [dataclasses.replace(row, images=()) for row in rows], slots)
    assert "prefill_part" not in calls
    assert rest >= 6 * (prompts - 1) - 6  # what was submitted while the first were prefilled may miss


def test_a_row_goes_on_from_a_shared_beginning_as_from_a_whole_prefill(tiny_bundle, requests, questions):
    decoder = Decoder(tiny_bundle, 3, threads=2, keep_logits=True)
    layout = RowLayout(tiny_bundle)
    rows = [ask(layout, q["prompt"], requests[0].row.features[0]) for q in questions[:3]]
    prefix = rows[0].images[0].stop
    decoder.prefill(0, rows[:1])
    decoder.store_prefix(0, 1, prefix)
    for row in rows:
        whole = decoder.prefill(1, [row])
        expected = decoder.logits.copy()
        assert decoder.prefill_part(2, row, prefix, len(row.input_ids), 1) == whole
        assert np.abs(decoder.logits - expected).max() <= 1e-6 * np.abs(expected).max()
        for token in (5, 6, 7):  # which look at all that the cache has of the row
            decoder.step(np.array([token] * 3))
            _, expected, found = decoder.logits
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_row_may_fill_the_contract_to_its_last_token(tiny_bundle, requests):
    contract = tiny_bundle.manifest.layout
    row = ask(RowLayout(tiny_bundle), " the" * (contract.room - 3), requests[0].row.features[0])
    never_stops = Decoder(tiny_bundle, 2, threads=1)
    with Engine(never_stops, eos_token_ids=()) as engine:
        result = engine.submit(Request(row, 1000)).result(timeout=60)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")
    assert len(row.input_ids) + 3 == contract.max_seq_len


@pytest.fixture(scope="module", params=[pytest.param(penalty, marks=pytest.mark.long) for penalty in (1.05, 1.7)])
def penalised(request, tmp_path_factory):
    """A checkpoint with a repetition penalty, and its bundle."""
    folder = tmp_path_factory.mktemp("penalised")
    checkpoint = penalised_checkpoint(folder / "checkpoint", request.param)
    bundle = exported(folder / "bundle", checkpoint=checkpoint)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.agreement == 1
    return load_checkpoint(checkpoint), bundle


def test_the_repetition_penalty_is_that_of_transformers(penalised, requests, questions, alone):
    checkpoint, bundle = penalised
    rows = list(zip(questions, requests, strict=True))[:6]
    # The same image twice, so that some rows begin where another one's beginning was kept.
    asked = [dataclasses.replace(request, max_new_tokens=12, images=[b"%d" % k]) for k, (_, request) in enumerate(rows)]
    found = _completions(bundle, asked + asked, slots=4)
    pytorch = PyTorch(checkpoint, max_new_tokens=12)
    expected = [trace.text for trace in pytorch.answer([question(row) for row, _ in rows])]
    layout = RowLayout(bundle)
    assert [layout.text(result.token_ids) for result in found] == expected * 2
    if bundle.manifest.generation.repetition_penalty > 1.5:
        assert _completions(bundle, requests, slots=4) != alone


def test_a_manifest_with_another_penalty_is_refused(tiny_bundle):
    generation = dataclasses.replace(tiny_bundle.manifest.generation, repetition_penalty=1.7)
    bundle = Bundle(tiny_bundle.path, dataclasses.replace(tiny_bundle.manifest, generation=generation))
    with pytest.raises(BundleError, match="disagree on a repetition penalty: export the checkpoint again"):
        Decoder(bundle, 1, threads=1)


def test_features_are_those_of_transformers(tiny_checkpoint, questions, requests):
    pytorch = PyTorch(tiny_checkpoint)
    for row, request in list(zip(questions, requests, strict=True))[:4]:
        expected = pytorch.states(question(row)).features
        assert np.abs(request.row.features[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_decoder_that_fails_fails_all_that_wait(tiny_bundle, requests, monkeypatch):
    decoder = Decoder(tiny_bundle, 2, threads=1)
    monkeypatch.setattr(decoder, "step", lambda _: (_ for _ in ()).throw(MemoryError("no memory left")))
    engine = Engine(decoder, tiny_bundle.manifest.generation.eos_token_ids)
    futures = [engine.submit(dataclasses.replace(request, max_new_tokens=9)) for request in requests[:6]]
    for future in futures:
        if error := future.exception(timeout=60):
            assert "no memory left" in str(error)
    assert any(future.exception() for future in futures)
    with pytest.raises(RuntimeError, match="no longer runs"):
        engine.submit(requests[0])


def test_closing_finishes_what_was_submitted(tiny_bundle, requests, alone):
    engine = Engine(Decoder(tiny_bundle, 4, threads=1), tiny_bundle.manifest.generation.eos_token_ids)
    futures = [engine.submit(request) for request in requests[:6]]
    engine.close()
    assert [future.result(timeout=0) for future in futures] == alone[:6]
    with pytest.raises(RuntimeError):
        engine.submit(requests[0])


class _Held(Decoder):
    """Its first step waits to be let go."""

    def __init__(self, bundle, slots):
        super().__init__(bundle, slots, threads=1)
        self.stepping, self.go = threading.Event(), threading.Event()

    def step(self, tokens):
        self.stepping.set()
        assert self.go.wait(timeout=60)
        return super().step(tokens)


def test_a_request_that_is_cancelled_while_it_waits_is_dropped(tiny_bundle, requests, alone):
    decoder = _Held(tiny_bundle, 1)
    with Engine(decoder, tiny_bundle.manifest.generation.eos_token_ids) as engine:
        futures = [engine.submit(request) for request in requests[:4]]
        assert decoder.stepping.wait(timeout=60)
        assert [future.cancel() for future in futures] == [False, True, True, True]
        futures[2:3] = [engine.submit(requests[2])]
        decoder.go.set()
        assert [futures[i].result(timeout=60) for i in (0, 2)] == [alone[0], alone[2]]
        with pytest.raises(CancelledError):
            futures[1].result(timeout=60)


def _go_on_once_it_is_stopped(engine, decoder, request):
    with suppress(RuntimeError):
        while True:
            engine.submit(request)
            time.sleep(0.01)
    decoder.go.set()


def test_leaving_by_an_exception_fails_what_is_left(tiny_bundle, requests):
    decoder, threads = _Held(tiny_bundle, 1), ThreadPoolExecutor(1)
    with pytest.raises(KeyboardInterrupt), threads, Engine(decoder, eos_token_ids=()) as engine:  # noqa: PT012
        futures = [engine.submit(request) for request in requests[:3]]
        assert decoder.stepping.wait(timeout=60)
        threads.submit(_go_on_once_it_is_stopped, engine, decoder, requests[0])
        raise KeyboardInterrupt
    assert [str(future.exception(timeout=0)) for future in futures] == ["the engine was stopped"] * 3


def test_an_engine_that_nobody_holds_finishes_and_goes(tiny_bundle, requests, alone):
    decoder, before = Decoder(tiny_bundle, 4, threads=1), set(threading.enumerate())
    engine, freed = Engine(decoder, tiny_bundle.manifest.generation.eos_token_ids), weakref.ref(decoder)
    (thread,) = set(threading.enumerate()) - before
    futures = [engine.submit(request) for request in requests[:3]]
    del engine, decoder
    assert [future.result(timeout=60) for future in futures] == alone[:3]
    thread.join(timeout=60)
    del thread
    assert freed() is None


@pytest.mark.parametrize(("end", "status"), [("", 0), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGINT)", -2)])
def test_a_process_may_end_while_its_engine_steps(end, status, tiny_bundle):
    script = f"""
import os, signal, threading
from qvl_batch.bundle.loading import Bundle
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.requests import Request
bundle = Bundle.load({str(tiny_bundle.path)!r}, verify=False)
decoder, stepped, step = Decoder(bundle, 2, 2), threading.Event(), Decoder.step
decoder.step = lambda tokens: (stepped.set(), step(decoder, tokens))[1]
engine = Engine(decoder, ())
futures = [engine.submit(Request(PrefillRow([5] * 600), 400)) for _ in range(40)]
stepped.wait()
{end}
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True)
    assert found.returncode == status


def test_a_row_whose_slot_cannot_be_filled_again_fails_with_the_others(tiny_bundle, requests, monkeypatch):
    decoder = Decoder(tiny_bundle, 2, threads=1)
    monkeypatch.setattr(decoder, "copy", lambda *_: (_ for _ in ()).throw(MemoryError("no memory left")))
    engine = Engine(decoder, eos_token_ids=())
    futures = [engine.submit(dataclasses.replace(r, max_new_tokens=n)) for r, n in zip(requests, (2, 9), strict=False)]
    assert ["no memory left" in str(future.exception(timeout=60)) for future in futures] == [True, True]
