"""A [model] table -> a Hugging Face causal language model: a shipped one, or one of transformers' own."""

from textwrap import shorten
from typing import Any

from glabench.errors import GlabenchError, UnavailableError, UsageError, nearest
from glabench.installed import is_installed

EXTRA = "pip install 'glabench[train]'"


def build_model(table: dict[str, Any], vocabulary: int) -> Any:
    """Build with fresh weights; every other key of the table overrides one of the configuration.

    `name` is a shipped configuration; `kind = "hf"` with `model_type` is one of transformers' own, whose
    vocabulary is the data's unless the table names one. Raises: UsageError, UnavailableError.
    """
    if not is_installed("transformers"):
        raise UnavailableError("transformers is not installed", where="model", fix=EXTRA)
    options = dict(table)
    kind = options.pop("kind", "shipped")
    if kind == "hf":
        model = _from_transformers(options, vocabulary)
    elif kind == "shipped":
        model = _shipped(options)
    else:
        raise UsageError(f"no kind {kind!r}", where="model.kind", fix=nearest(str(kind), ("shipped", "hf")))
    _check_vocabulary(model.config.vocab_size, vocabulary)
    return model


def _check_vocabulary(entries: int, vocabulary: int) -> None:
    if entries < vocabulary:
        raise UsageError(
            f"the model has {entries:,} vocabulary entries and the data's tokenizer {vocabulary:,}",
            where="model",
            fix="prepare the data with the model's tokenizer: bytes for tiny models, mistral for others",
        )


def _shipped(options: dict[str, Any]) -> Any:
    if not is_installed("glabench.models.catalog"):
        raise UnavailableError(
            "this version ships no models", where="model", fix='use a file with kind = "hf" in [model]'
        )
    from glabench.models import catalog

    name = options.pop("name", "")
    if name not in catalog.names():
        raise UsageError(f"no model {name!r}", where="model.name", fix=nearest(name, list(catalog.names())))
    return _built(lambda: catalog.build(name, **options).float(), f"model {name}")


def _from_transformers(options: dict[str, Any], vocabulary: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UsageError("model_type is missing", where="model", fix='write model_type = "llama"')
    options.setdefault("vocab_size", vocabulary)
    known = vars(_built(lambda: AutoConfig.for_model(model_type), f"model {model_type}"))
    for key in options:
        if key not in known:  # transformers keeps an unknown key and does nothing with it
            raise UsageError(f"no key {key!r}", where=f"model {model_type}", fix=nearest(key, sorted(known)))

    _check_vocabulary(options["vocab_size"], vocabulary)

    def build() -> Any:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).float()

    return _built(build, f"model {model_type}")


def _built(build: Any, where: str) -> Any:
    """Whatever a constructor raises over its options is the table's mistake: one line, not a traceback."""
    try:
        return build()
    except GlabenchError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as err:
        lines = str(err).strip().splitlines() or [type(err).__name__]
        reason = shorten(lines[0], width=160, placeholder=" ...")  # some list every model there is
        raise UsageError(f"cannot build it: {reason}", where=where, fix="check the keys of [model]") from err
