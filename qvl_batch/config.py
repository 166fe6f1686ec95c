"""Settings of a captioning job: one frozen dataclass that is also the command line.

Help texts and defaults of `jobs/caption.py` are read from here. Settings are checked when they
are made; what can only be checked against the machine, the bundle or the input is checked there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvl_batch.constraints import Constraint, Kind, constraint_of
from qvl_batch.errors import ConfigError, ConstraintError, SamplingError
from qvl_batch.sampling import GREEDY, Sampling

Fit = Literal["letterbox", "stretch", "crop"]
Device = Literal["cpu", "cuda"]
DeviceOption = Literal["auto", "cpu", "cuda"]
#: Kinds of object stores that images may be in and answers may go to.
#: Largest size of the folder of fetched bundles in gigabytes, by default.
BUNDLE_CACHE_GB = 100.0
OBJECT_STORES = frozenset({"s3", "gs"})

DEFAULT_MAX_NEW_TOKENS = 128
#: Fewest rows of a sample.
LEAST_PLAN = 2
#: Images that a task fetches at a time, mostly waiting for hosts; and connections to one host, as browsers have them.
IMAGES_AT_ONCE, CONNECTIONS_PER_HOST = 64, 8
#: Pillow's own limit; images of this size take 0.4 to 1.4 GB while they are decoded.
MAX_IMAGE_PIXELS = 89_478_485


@dataclass(frozen=True, slots=True)
class ImageRules:
    """Which image files are accepted: of at most `max_pixels`, and damaged ones if `allow_truncated`.

    Neither changes the pixels of a file that is accepted in any case.
    """

    max_pixels: int = MAX_IMAGE_PIXELS
    allow_truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """What captioning and comparing have in common: a bundle, rows of the input, and a folder for the results."""

    bundle: str
    """Folder of the bundle that `python -m export` made, or its address."""
    input: tuple[str, ...]
    """Folders of images; or files of rows, folders of them, or globs: parquet, JSON Lines, CSV, Arrow, WebDataset's
    tars. On disks, or at addresses: s3://bucket/folder"""
    output: str
    """Folder for the results."""
    prompt: str | None = None
    """Ask this of every row; the prompt column is then not read."""
    id_column: str | None = None
    """Column that identifies a row, of strings or integers; it becomes `id`. By default `id`.
    Where files have no such column, ids are file and row: /data/photos.parquet:12."""
    image_column: str = "image"
    """Column of images: structs of bytes and path, bytes, base64, paths and addresses, or pixels; or lists of them."""
    prompt_column: str = "prompt"
    """Column of prompts."""
    messages_column: str | None = None
    """Column of conversations: lists of `role` and `content`, or of `from` and `value`, as they are or as JSON text.
    Images are in them, or are taken in order from the image column. The prompt column is then not read."""
    answer_last_turn_again: bool = False
    """Answer a conversation that ends with an assistant's turn without that turn, which comes out as `expected`.
    Without it, such a row fails."""
    system_prompt: str | None = None
    """Text of a system turn for rows that have none. By default, the chat template's own."""
    allow_images_from: tuple[str, ...] = ()
    """Folders and addresses (s3://, gs://, http://, https://) that images may be read from. By default, none.
    `https://*` is any public host, `https://*.example.org` a domain and all below it."""
    user_agent: str | None = None
    """How requests for images name who sends them. By default, qvl-batch and its version."""
    image_headers: Path | None = None
    """File of headers for requests for images: a line `[https://host]`, for whom, and lines `Name: value` below it."""
    images_at_once: int = IMAGES_AT_ONCE
    """Images that each reading task fetches from hosts and buckets at a time."""
    connections_per_host: int = CONNECTIONS_PER_HOST
    """Connections to one host at a time, over all reading tasks; each task has at least one."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Most pixels of an image; a row with a larger one fails. Memory and time of the largest images grow with it."""
    allow_truncated: bool = False
    """Use what is left of a truncated or damaged image file. Without it, a row whose image lacks pixels fails."""
    max_pixels: int | None = None
    """Most pixels that the model sees of an image; larger ones are reduced. By default, the bundle's limit.
    Only for a bundle that shows images at their own size."""
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    """Longest answer in tokens; the bundle's contract may end it sooner."""
    limit: int | None = None
    """Answer only the first LIMIT rows."""
    retry_errors: bool = False
    """Answer rows that failed again; a new answer replaces the error."""
    overwrite: bool = False
    """Delete the results in the output folder first. Without it, the job resumes where it stopped."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work on any machine.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        # An empty name, such as an unset variable of a shell, would be the current folder.
        if not self.input or not all(str(name).strip() for name in (self.output, *self.input)):
            raise ConfigError("--input needs at least one file, folder or glob, and --output a folder; none may be ''")
        check_at_least_one(self, "max_new_tokens", "limit", "max_image_pixels", "max_pixels")
        check_at_least_one(self, "images_at_once", "connections_per_host")
        agent = self.user_agent
        if agent is not None and not (agent.strip() and agent.isascii() and agent.isprintable()):
            raise ConfigError("--user-agent must be printable ASCII, and not empty")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("--prompt must not be empty")
        if self.prompt is not None and self.messages_column is not None:
            raise ConfigError("--prompt and --messages-column: the messages say what is asked; give one of them")
        if self.answer_last_turn_again and self.messages_column is None:
            raise ConfigError("--answer-last-turn-again is for conversations: name their column with --messages-column")
        if self.overwrite and self.retry_errors:
            raise ConfigError("--retry-errors has nothing to answer again after --overwrite: give one of them")

    @property
    def copied_columns(self) -> Mapping[str, str]:
        """Columns of the output whose values are those of the input: their names, and the columns that have them."""
        return {}

    @property
    def constraint_column(self) -> tuple[str, Kind] | None:
        """Column of the input that says what each answer must be, and of which kind it is."""
        return None

    @property
    def row_sampling(self) -> tuple[str, Sampling] | None:
        """Column of the input that says how each answer is drawn, and what is so where it says nothing."""
        return None

    @property
    def image_rules(self) -> ImageRules:
        """Which images are accepted."""
        return ImageRules(self.max_image_pixels, self.allow_truncated)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig(JobConfig):
    """Answer prompts about images, or conversations, of folders and files with a bundle, through Ray Data."""

    bundle: str
    """Folder of the bundle that `python -m export` made, which every node must see at this path; or its address, from
    which each node fetches it once: s3://... or gs://..."""
    output: str
    """Folder for the answers, on the machine that runs this script, or an address: s3://... or gs://..."""
    overwrite: bool = False
    """Delete the answers in the output folder first. Without it, the job resumes where it stopped."""
    keep_columns: tuple[str, ...] = ()
    """Columns of the input to copy to the output: `NAME`, or `NAME=NEW` under another name. `meta.id` is the field `id`
    of the structs in `meta`."""
    fit: Fit | None = None
    """How an image that is not square becomes square. By default, letterbox.
    Not for a bundle that shows images at their own size."""
    choices: tuple[str, ...] | None = None
    """Answer with one of these: `yes,no,unclear`, or several values, in which commas are text."""
    regex: str | None = None
    """Answer with a match of this regular expression, from its first character to its last."""
    json_schema: Path | None = None
    """File of a JSON schema: answer with compact JSON that follows it, also as the column `parsed` of its type."""
    choices_column: str | None = None
    """Column of choices for each row: lists of strings, or the same as JSON text. A null leaves its answer free."""
    regex_column: str | None = None
    """Column of regular expressions. A null leaves the row's answer free."""
    json_schema_column: str | None = None
    """Column of JSON schemas as text. A null leaves the row's answer free. There is no column `parsed`."""
    temperature: float | None = None
    """Draw each token of an answer at this temperature. Without it, or at 0, it is the most probable one."""
    top_k: int | None = None
    """Draw among so many of the most probable tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens that have this probability together."""
    min_p: float | None = None
    """Draw among tokens that have this share of the most probable one's probability."""
    seed: int | None = None
    """Of what is drawn, 0 by default: with the same seed, every row is answered the same, whatever runs beside it."""
    samples: int | None = None
    """Draw so many answers to each row: the column `samples` has all of them, `answer` is the first."""
    sampling_column: str | None = None
    """Column of structs, or JSON text, of `temperature`, `top_k`, `top_p`, `min_p`, `seed` and `samples`. What is null
    is as the options say."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends, whichever comes first."""
    include_stop: bool = False
    """Keep the text that ended an answer."""
    min_new_tokens: int | None = None
    """Shortest answer in tokens: it cannot end before."""
    confidence: bool = False
    """Add how sure the model is: the columns `confidence`, `mean_logprob` and `min_token_probability`, with choices
    `choice_probabilities`, and with a JSON schema `parsed_confidence`."""
    abstain_below: float | None = None
    """Mark answers whose `confidence` is below this: their `finish_reason` is `abstain`, and all else is kept.
    Implies `--confidence`. `jobs/calibrate.py` finds a bound for the share of errors that you accept."""
    boxes: bool = False
    """Add the column `boxes`: the boxes and points that an answer names as JSON, in pixels of the image file."""
    allow_repetition: bool = False
    """Keep an answer that repeats one phrase until it is cut off. Without it, such a row fails."""
    device: DeviceOption = "auto"
    """Where the decoder runs. `auto` is the device that the bundle was exported for; another is refused."""
    vision_device: DeviceOption = "auto"
    """Where the vision tower runs. `auto` is a GPU for a tower in half precision, else the CPU."""
    vision_workers: int | None = None
    """Processes that run the vision graph. By default, as many as the cores are enough for; on a cluster, they become
    more and fewer with its nodes."""
    max_vision_workers: int | None = None
    """The most of them; `--vision-workers` is then the fewest. By default, no limit."""
    decoder_workers: int | None = None
    """Processes that run the decoder. By default one, or one for each GPU."""
    slots: int | None = None
    """Rows that a decoder answers at a time. By default, as many as fit into memory, up to 32, on a GPU up to 128."""
    vision_cache: Path | None = None
    """Folder that caches image features, for other prompts over the same images. Every node must see it."""
    vision_cache_gb: float = 20.0
    """Largest size of that folder in gigabytes; the least recently used features are evicted first."""
    max_error_rate: float | None = None
    """Stop when more than this share of the run's rows fail, from 200 rows on. Answers are kept."""
    bundle_cache: Path | None = None
    """Folder of each node for bundles that are fetched. By default qvl-batch/bundles in the user's cache folder."""
    bundle_cache_gb: float = BUNDLE_CACHE_GB
    """Largest size of that folder in gigabytes; bundles that nobody uses are evicted, the least recently used first."""
    price_per_hour: float | None = None
    """Price of the machine or cluster per hour, in any currency; the report then says what a million images cost."""
    plan: int | None = None
    """Answer only a random sample of so many rows, write nothing but `_plan.html` and `_plan.json` to the output, and
    forecast what the whole job needs: hours, cost, errors, tokens, size, memory."""
    plan_bundles: tuple[str, ...] = ()
    """With --plan: other bundles that answer the same sample, to compare answers and costs with those of --bundle."""
    plan_max_pixels: tuple[int, ...] = ()
    """With --plan: other values of --max-pixels with which --bundle answers the same sample."""
    plan_keep: bool = False
    """With --plan: keep the answers to the sample in the output, as those of a job that was stopped."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work on any machine.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        JobConfig.__post_init__(self)  # `super()` without arguments finds no class with slots
        check_at_least_one(self, "vision_workers", "max_vision_workers", "decoder_workers", "slots", "min_new_tokens")
        if (self.max_vision_workers or math.inf) < (self.vision_workers or 1):
            raise ConfigError(
                f"--max-vision-workers {self.max_vision_workers} is below --vision-workers {self.vision_workers}"
            )
        for option, value in (("--vision-cache-gb", self.vision_cache_gb), ("--bundle-cache-gb", self.bundle_cache_gb)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{option} must be a number above 0, not {value}")
        if self.max_error_rate is not None and not 0 <= self.max_error_rate < 1:
            raise ConfigError(f"--max-error-rate must be from 0 on and below 1, not {self.max_error_rate}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ConfigError(f"--price-per-hour must be a number from 0 on, not {self.price_per_hour}")
        if self.abstain_below is not None:
            if not 0 < self.abstain_below <= 1:
                raise ConfigError(f"--abstain-below must be above 0 and at most 1, not {self.abstain_below}")
            object.__setattr__(self, "confidence", True)
        if len(given := self._constraints) > 1:
            raise ConfigError(f"{' and '.join(map(option_of, given))}: an answer can only be one of them; give one")
        self._check_sampling()
        self._check_endings()
        self._check_kept()
        self._check_plan()

    def _check_plan(self) -> None:
        given = next((name for name in ("plan_bundles", "plan_max_pixels", "plan_keep") if getattr(self, name)), None)
        if given is not None and self.plan is None:
            raise ConfigError(f"{option_of(given)} is for a forecast: give --plan too")
        if self.plan is not None and self.plan < LEAST_PLAN:
            raise ConfigError(
                f"--plan must be at least {LEAST_PLAN} rows, not {self.plan}: fewer do not say how rows differ"
            )
        if not all(bundle.strip() for bundle in self.plan_bundles) or any(each < 1 for each in self.plan_max_pixels):
            raise ConfigError("--plan-bundles must not be empty, and --plan-max-pixels must be at least 1")

    def _check_kept(self) -> None:
        kept = [_renamed(each) for each in self.keep_columns]
        empty = next((each for each, pair in zip(self.keep_columns, kept, strict=True) if not all(pair)), None)
        if empty is not None:
            raise ConfigError(f"--keep-columns {empty!r}: give NAME, or NAME=NEW to keep it under another name")
        names = [new for _, new in kept]
        if repeated := next((new for new in names if names.count(new) > 1), None):
            raise ConfigError(f"--keep-columns names {repeated} more than once; NAME=NEW keeps a column as NEW")

    def _check_sampling(self) -> None:
        try:
            sampling = self.sampling
        except SamplingError as error:
            raise ConfigError(f"{option_of(error.name)} {error.reason}") from error
        given = [name for name in _SAMPLING if name != "temperature" and getattr(self, name) is not None]
        if given and self.temperature is None and self.sampling_column is None:
            raise ConfigError(f"{option_of(given[0])} is for answers that are drawn: give --temperature too")
        if self.temperature is not None and not sampling.is_random and sampling.samples > 1:
            raise ConfigError(f"--samples {sampling.samples}: at --temperature 0, all of them would be the same")

    def _check_endings(self) -> None:
        if not all(self.stop):
            raise ConfigError("--stop must not be empty: every answer would end before its first token")
        if self.include_stop and not self.stop:
            raise ConfigError("--include-stop is for answers that end before a text: give --stop too")
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"--min-new-tokens {self.min_new_tokens} is more than the --max-new-tokens {self.max_new_tokens}"
            )
        ending = "stop" if self.stop else "min_new_tokens" if self.min_new_tokens is not None else None
        if ending and self._constraints:
            name = option_of(self._constraints[0])
            raise ConfigError(f"{name} and {option_of(ending)}: {name} says where an answer ends; give one of them")

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn, where no column says it.

        Raises:
            SamplingError: a value cannot be used.
        """
        return GREEDY.with_values({name: getattr(self, name) for name in _SAMPLING})

    @property
    def row_sampling(self) -> tuple[str, Sampling] | None:
        """Column of the input that says how each answer is drawn, and what is so where it says nothing."""
        return None if self.sampling_column is None else (self.sampling_column, self.sampling)

    @property
    def has_samples(self) -> bool:
        """Whether rows can have several answers."""
        return self.sampling_column is not None or self.sampling.samples > 1

    @property
    def copied_columns(self) -> Mapping[str, str]:
        """Columns of the output whose values are those of the input: their names, and the columns that have them."""
        return {new: name for name, new in map(_renamed, self.keep_columns)}

    @property
    def constraint_column(self) -> tuple[str, Kind] | None:
        """Column of the input that says what each answer must be, and of which kind it is."""
        named: dict[Kind, str | None] = {
            "choices": self.choices_column,
            "regex": self.regex_column,
            "json_schema": self.json_schema_column,
        }
        return next(((name, kind) for kind, name in named.items() if name is not None), None)

    @property
    def is_guided(self) -> bool:
        """Whether the decoder runs the graph for guided answers."""
        return bool(self._constraints) or self.confidence or self.is_drawn or self.min_new_tokens is not None

    @property
    def is_drawn(self) -> bool:
        """Whether some answers are drawn."""
        return self.sampling.is_random or self.sampling_column is not None

    @property
    def scores_choices(self) -> bool:
        """Whether the probability of each choice is asked for."""
        return self.confidence and self._constraints in (["choices"], ["choices_column"])

    @property
    def _constraints(self) -> list[str]:
        """Names of the options that are given of those that say what answers must be."""
        return [name for name in _CONSTRAINTS if getattr(self, name) is not None]

    def constraint(self) -> Constraint | None:
        """What every answer must be, if that is anything; reads the file of a JSON schema.

        Raises:
            ConfigError: names the option, and what is wrong with it.
        """
        try:
            if self.choices is not None:
                # One value is a list; several are choices.
                is_list = len(self.choices) == 1
                return constraint_of("choices", self.choices[0].split(",") if is_list else self.choices)
            if self.regex is not None:
                return constraint_of("regex", self.regex)
            if self.json_schema is None:
                return None
            found = constraint_of("json_schema", self.json_schema.read_text(encoding="utf-8"))
            assert found.parsed_type is not None
        except (ConstraintError, OSError, UnicodeError) as error:
            raise self.refused(error) from error
        return found

    def refused(self, error: Exception) -> ConfigError:
        """The error for a constraint that cannot be used."""
        (name,) = self._constraints
        value = f" {self.json_schema}" if name == "json_schema" else ""
        reason = error.strerror if isinstance(error, OSError) else error
        return ConfigError(f"{option_of(name)}{value}: {reason}")

    @property
    def going_on(self) -> str:
        """The command that resumes this job: a second `--overwrite` would delete its answers."""
        return "the same command" + (" without --overwrite" if self.overwrite else "")


#: Options that say what answers must be.
_CONSTRAINTS = ("choices", "regex", "json_schema", "choices_column", "regex_column", "json_schema_column")
#: Options that say how answers are drawn.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "samples")


def _renamed(kept: str) -> tuple[str, str]:
    """Name in the input and in the output of a value of `--keep-columns`. The last `=` counts: names can have some."""
    name, is_renamed, new = kept.rpartition("=")
    return (name, new) if is_renamed else (kept, kept)


def option_of(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def check_at_least_one(config: object, *names: str) -> None:
    """Refuse settings below 1; None is no value.

    Raises:
        ConfigError: names the option, and what it was.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{option_of(name)} must be at least 1, not {value}")
