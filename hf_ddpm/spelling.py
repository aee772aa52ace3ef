"""Words that are not known here: the one that was meant, and calls with a keyword that doesn't exist.

It imports the standard library only.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Target = TypeVar("Target", bound=Callable[..., Any])
LONGEST_WORD = 60  # characters of a keyword that a message shows
LONGEST_LIST = 160  # characters of a list of keywords
MOST_PLACED = 6  # arguments of a call that a message shows
# Names of the well-known tutorials, and what does their work here; docs/paper-to-code.md says what differs
TUTORIAL_NAMES = {
    "GaussianDiffusion": "DiffusionProcess.linear(T)",
    "SpacedDiffusion": "DiffusionProcess.respaced(timesteps)",
    "Unet": "create_model(name)",
    "Trainer": "train(config)",
    "linear_beta_schedule": "DiffusionProcess.linear(T)",
    "cosine_beta_schedule": "DiffusionProcess.cosine(T)",
    "q_sample": "DiffusionProcess.q_sample(x_0, t=t)",
    "q_posterior": "DiffusionProcess.q_posterior_mean(x_0, x_t, t)",
    "q_posterior_mean_variance": "DiffusionProcess.q_posterior_mean(x_0, x_t, t)",
    "predict_start_from_noise": "DiffusionProcess.predict_x0(x_t, eps, t)",
    "p_sample": "DiffusionProcess.p_sample(x_t, t, model)",
    "p_sample_loop": "DDPMPipeline",
    "p_losses": "simple_loss(process, model, x_0)",
    "training_losses": "simple_loss(process, model, x_0)",
}


def nearest(word: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one.

    Args:
        word: what was typed; its first hundred characters count.
        known: the words that are allowed.
        cutoff: how alike they must be, from 0 (anything) to 1 (equal), as `difflib.get_close_matches` counts.

    Returns:
        One of the known words; None if none is that much alike.
    """
    names = [str(name) for name in known]
    return next(iter(difflib.get_close_matches(str(word)[:100], names, 1, cutoff)), None)


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The words "(did you mean 'linear'?)" after a space; nothing if no known word is like the given one."""
    near = nearest(word, known)
    return "" if near is None else f" (did you mean {near!r}?)"


def tutorial_hint(name: str) -> str:
    """For a name of the tutorials " (here: hf_ddpm.create_model(name))"; nothing for another."""
    return f" (here: hf_ddpm.{TUTORIAL_NAMES[name]})" if name in TUTORIAL_NAMES else ""


def suggest_keywords(target: Target, instead: str = "") -> Target:
    """Let a function or a class name the keyword that was meant; a decorator.

    Args:
        target: a function without `**keywords` of its own, or a class, whose `__init__` is replaced.
        instead: for a class that is not called by its users: what to call. Every call that doesn't fit is
            then answered with it.

    Returns:
        A function that does the same; the class itself. A call with an unknown keyword raises TypeError, as
        Python's own does, in one line that names the nearest keyword, or else those that are allowed.
        So does a call with too many arguments, or too few; its line says how the function is called.
    """
    if isinstance(target, type):
        kind: Any = target
        kind.__init__ = _suggesting(kind.__init__, kind.__name__, instead)
        return kind
    return _suggesting(target, target.__qualname__.removesuffix(".__init__"), instead)


def _suggesting(function: Callable[..., Any], name: str, instead: str) -> Any:
    signature = inspect.signature(function)
    known = [
        key
        for key, parameter in signature.parameters.items()
        if key not in ("self", "cls")
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    allowed = frozenset(known)
    usual = _call(name, signature)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if instead:
            try:
                signature.bind(*args, **keywords)
            except TypeError:
                raise TypeError(f"{name}(...) is not called by its users; call {instead}") from None
        if not allowed.issuperset(keywords):
            wrong = next(key for key in keywords if key not in allowed)
            shown = repr(wrong if len(wrong) <= LONGEST_WORD else f"{wrong[: LONGEST_WORD - 3]}...")
            raise TypeError(f"{name}() has no keyword {shown}{did_you_mean(wrong, known) or _list(known)}")
        try:
            return function(*args, **keywords)
        except TypeError:
            try:
                signature.bind(*args, **keywords)
            except TypeError as error:
                raise TypeError(f"{name}(): {error}; the call is {usual}") from None
            raise

    return call


def _call(name: str, signature: inspect.Signature) -> str:
    """How a function is called, as "p_sample(x_t, t, model), and all else by name"."""
    kinds = [(key, parameter.kind) for key, parameter in signature.parameters.items()]
    placed = [key for key, kind in kinds if kind is not inspect.Parameter.KEYWORD_ONLY]
    placed = [key for key in placed if key not in ("self", "cls")]
    shown = ", ".join(placed if len(placed) <= MOST_PLACED else [*placed[:MOST_PLACED], "..."])
    by_name = (
        ", and all else by name" if any(kind is inspect.Parameter.KEYWORD_ONLY for _, kind in kinds) else ""
    )
    return f"{name.rpartition('.')[2]}({shown}){by_name}"


def _list(known: list[str]) -> str:
    """The allowed keywords, as many as fit into a line."""
    shown = ", ".join(known)
    shown = shown if len(shown) <= LONGEST_LIST else f"{shown[:LONGEST_LIST].rpartition(',')[0]}, ..."
    return f"; allowed: {shown or 'none'}"
