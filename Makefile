# demo       export the tiny model, for squares and for images at their own size, and answer the demo's rows by Ray Data:
#            questions, some of them with choices, conversations, and a description as JSON of a schema
# test       run the tests
# test-long  run the tests that take minutes each
# soak       kill random processes of a job 50 times, resume each time, and compare with an uninterrupted run
# fuzz       decode 10,000 damaged images, each to pixels or to an error
# real-size  export a checkpoint of 3.75 G parameters, and trace larger ones (20 minutes, 25 GB of disk)
# compare    compare both tiny bundles with their checkpoint in PyTorch, layer by layer
# lint     ruff, hadolint, mypy, and the order of imports
# bench      measure engine and Ray job against transformers' generate on a made-up model (an hour)
# bench-answers  measure what constraints and confidence cost, on a made-up model with Qwen's number of tokens
# quantizers install Neural Compressor and Olive in an environment of their own, for tests
# openvino   install OpenVINO GenAI in its own environment, so that `bench` measures it too
# train      train the tiny model again (three hours)
# The first target installs everything into .venv. ARGS='...' passes more options to the script.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TINY := datasets/tiny-qwen2.5-vl
BUNDLE := build/tiny-bundle
NATIVE := build/tiny-native
QUESTIONS := datasets/demo/questions.parquet
CONVERSATIONS := datasets/demo/conversations.parquet
SCENES := datasets/demo/scenes.parquet
SCENE := datasets/demo/scene.json
ANSWERS := build/demo-answers
COMPARISON := build/comparison
BENCH := build/bench
OPENVINO := build/openvino
QUANTIZERS := build/quantizers
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
TRAINING := build/train
# Two processes, each with one file of tests at a time: while a test of one waits, the other uses the cores.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long soak fuzz real-size compare lint bench bench-answers openvino train clean browser emulator \
	quantizers
.DELETE_ON_ERROR:

demo: $(BUNDLE)/bundle.json $(NATIVE)/bundle.json
	$(BIN)/python jobs/caption.py --bundle $(BUNDLE) --input $(QUESTIONS) --output $(ANSWERS)/squares \
		--choices-column choices --keep-columns prompt expected --overwrite $(ARGS)
	$(BIN)/python jobs/show.py $(ANSWERS)/squares
	$(BIN)/python jobs/caption.py --bundle $(NATIVE) --input $(CONVERSATIONS) --messages-column messages \
		--output $(ANSWERS)/native --keep-columns prompt expected --overwrite $(ARGS)
	$(BIN)/python jobs/show.py $(ANSWERS)/native
	$(BIN)/python jobs/caption.py --bundle $(NATIVE) --input $(SCENES) --json-schema $(SCENE) --confidence \
		--output $(ANSWERS)/json --keep-columns prompt expected --overwrite $(ARGS)
	$(BIN)/python jobs/show.py $(ANSWERS)/json

test: $(READY) browser
	$(PYTEST)

test-long: $(READY) browser emulator quantizers
	$(PYTEST) -m long

soak: $(BUNDLE)/bundle.json
	$(BIN)/python tests/soak.py --bundle $(BUNDLE) $(ARGS)

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(ARGS)

real-size: $(READY)
	$(BIN)/python tests/real_size.py $(ARGS)

compare: $(BUNDLE)/bundle.json $(NATIVE)/bundle.json
	$(BIN)/python jobs/compare.py --bundle $(BUNDLE) --checkpoint $(TINY) --input $(QUESTIONS) \
		--output $(COMPARISON)/squares --layers --overwrite $(ARGS)
	$(BIN)/python jobs/compare.py --bundle $(NATIVE) --checkpoint $(TINY) --input $(CONVERSATIONS) \
		--messages-column messages --output $(COMPARISON)/native --layers --overwrite $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint jobs/Dockerfile
	PYTHONPATH=jobs $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: $(BENCH)/fp32/bundle.json $(BENCH)/int8/bundle.json $(BENCH)/native/bundle.json $(BENCH)/vocabulary/bundle.json
	$(BIN)/python jobs/bench.py --bundle $(BENCH)/fp32 --reduced-bundle $(BENCH)/int8 \
		--native-bundle $(BENCH)/native --answers-bundle $(BENCH)/vocabulary \
		--checkpoint $(BENCH)/model --output $(BENCH) --openvino $(OPENVINO) \
		--against hf $(if $(wildcard $(OPENVINO)/model/openvino_language_model.xml),openvino) $(ARGS)

bench-answers: $(BENCH)/vocabulary/bundle.json
	$(BIN)/python jobs/bench.py --only answers --answers-bundle $(BENCH)/vocabulary --output $(BENCH)/answers \
		--openvino $(OPENVINO) $(if $(wildcard $(OPENVINO)/vocabulary-model/openvino_language_model.xml),--against openvino) $(ARGS)

openvino: $(OPENVINO)/model/openvino_language_model.xml $(OPENVINO)/vocabulary-model/openvino_language_model.xml

train: $(READY)
	$(BIN)/python datasets/train.py --work-dir $(TRAINING) --output $(TINY) $(ARGS)

EXPORT := $(READY) $(wildcard $(TINY)/*) $(wildcard export/*.py) $(wildcard qvl_batch/bundle/*.py)

$(BUNDLE)/bundle.json: $(EXPORT)
	$(BIN)/python -m export $(TINY) --output $(BUNDLE) --overwrite

$(NATIVE)/bundle.json: $(EXPORT)
	$(BIN)/python -m export $(TINY) --output $(NATIVE) --image-size native --overwrite

$(BENCH)/model/config.json: $(READY) datasets/make_model.py
	rm -rf $(BENCH)/model
	$(BIN)/python datasets/make_model.py $(BENCH)/model

$(BENCH)/vocabulary-model/config.json: $(READY) datasets/make_model.py datasets/build_tokenizer.py
	rm -rf $(BENCH)/vocabulary-model
	$(BIN)/python datasets/make_model.py $(BENCH)/vocabulary-model --shape vocabulary

$(BENCH)/%/bundle.json: $(BENCH)/model/config.json $(wildcard export/*.py) $(wildcard qvl_batch/bundle/*.py)
	$(BIN)/python -m export $(BENCH)/model --output $(BENCH)/$* --dtype $* --overwrite

$(BENCH)/native/bundle.json: $(BENCH)/model/config.json $(wildcard export/*.py) $(wildcard qvl_batch/bundle/*.py)
	$(BIN)/python -m export $(BENCH)/model --output $(BENCH)/native --image-size native --overwrite

$(BENCH)/vocabulary/bundle.json: $(BENCH)/vocabulary-model/config.json $(wildcard export/*.py) $(wildcard qvl_batch/bundle/*.py)
	$(BIN)/python -m export $(BENCH)/vocabulary-model --output $(BENCH)/vocabulary --overwrite

$(OPENVINO)/model/openvino_language_model.xml: $(OPENVINO)/venv/.ready $(BENCH)/model/config.json
	rm -rf $(OPENVINO)/model
	$(OPENVINO)/venv/bin/optimum-cli export openvino --model $(BENCH)/model --task image-text-to-text \
		--weight-format fp32 $(OPENVINO)/model

$(OPENVINO)/vocabulary-model/openvino_language_model.xml: $(OPENVINO)/venv/.ready $(BENCH)/vocabulary-model/config.json
	rm -rf $(OPENVINO)/vocabulary-model
	$(OPENVINO)/venv/bin/optimum-cli export openvino --model $(BENCH)/vocabulary-model --task image-text-to-text \
		--weight-format fp32 $(OPENVINO)/vocabulary-model

$(OPENVINO)/venv/.ready: jobs/benchmark/openvino-requirements.txt
	$(PYTHON) -m venv --clear $(OPENVINO)/venv
	$(OPENVINO)/venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(OPENVINO)/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[export,compare,dev]'
	@touch $@

# Tests of HTML pages need Chromium; where it can't be installed they are skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; \
	} >/dev/null 2>&1 || echo "Chromium can't be installed here (Debian, as root): tests of pages will be skipped"

# Tests of other processors need qemu-user; where it can't be installed they are skipped.
emulator:
	@command -v qemu-x86_64 >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends qemu-user; \
	} >/dev/null 2>&1 || echo "qemu-user can't be installed here (Debian, as root): tests of other processors will be skipped"

# Tests of others' tools need them; where they can't be installed they are skipped.
quantizers: $(READY)
	@test -e $(QUANTIZERS)/.ready -a ! $(QUANTIZERS)/.ready -ot tests/quantizers-requirements.txt || { \
		$(BIN)/python -m venv --clear $(QUANTIZERS) && \
		echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" \
			> "$$($(QUANTIZERS)/bin/python -c $(SITE))/ours.pth" && \
		$(QUANTIZERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
			--requirement tests/quantizers-requirements.txt && touch $(QUANTIZERS)/.ready; \
	} || echo "Neural Compressor and Olive can't be installed here: tests of them will be skipped"

clean:
	rm -rf build $(VENV)
