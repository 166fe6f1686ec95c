"""Names of parameters: the model's own, and those that files have for them.

    model.language_model.layers.0.mlp.up_proj.weight     the model's own, in this version of transformers
    model.layers.0.mlp.up_proj.weight                    published files, and older versions
    language_model.model.layers.0.mlp.up_proj.weight     models of other libraries

Any of them can follow what a trainer wrapped around the model: `base_model.model.`, `module.`.
"""

from collections.abc import Collection, Iterable, Iterator

#: Beginnings of the model's own names, and what they are in files.
_OWN: dict[str, str] = {}
_PUBLISHED = {"model.language_model.": "model.", "model.visual.": "visual."}
_OTHERS = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
}
_WRAPPERS = ("", "base_model.model.", "model.", "module.", "_orig_mod.")


def published_name(name: str) -> str:
    """Name of a parameter of the model in published files."""
    return _spelled(name, _PUBLISHED)


def name_in(files: Collection[str], name: str) -> str | None:
    """The name that files have for a parameter of the model, None if they have none."""
    return next((spelled for spelled in _spellings(name) if spelled in files), None)


def is_usual(name: str, in_files: str) -> bool:
    """Whether transformers itself takes a name in files for that of a parameter."""
    return in_files in (name, published_name(name))


def module_names(parameters: Iterable[str]) -> dict[str, str]:
    """The model's own name of each module with parameters, by all its names."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return {_spelled(f"{name}.", each)[:-1]: name for name in modules for each in (_OTHERS, _PUBLISHED, _OWN)}


def _spellings(name: str) -> Iterator[str]:
    for wrapper in _WRAPPERS:
        for each in (_OWN, _PUBLISHED, _OTHERS):
            yield wrapper + _spelled(name, each)


def _spelled(name: str, beginnings: dict[str, str]) -> str:
    own = next((own for own in beginnings if name.startswith(own)), "")
    return beginnings.get(own, "") + name.removeprefix(own)
