"""What a visitor is told. Texts may hold what a stranger wrote, and toasts are HTML: all of them are escaped here."""

import functools
import logging
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

_LONGEST = 40
_UNEXPECTED = "Something went wrong that this page did not expect. Its server has written down what."


class Refused(Exception):
    """What the page cannot do, in plain text for its visitor."""


def quoted(value: str) -> str:
    """Quote and shorten what a stranger wrote."""
    return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")


def note(text: str) -> None:
    """Tell something in passing."""
    gr.Info(escape(text))


def warn(text: str) -> None:
    """Tell that something is not as it was asked for; what is shown stays."""
    gr.Warning(escape(text))


def sentence(error: Exception) -> str:
    """Return what to tell of an error: its text if it was meant for the visitor. Any other goes to the server's log."""
    if isinstance(error, Refused):
        return str(error)
    logging.getLogger(__name__).error(_UNEXPECTED, exc_info=error)
    return _UNEXPECTED


def answer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an answer to a visitor, so that whatever it raises is told in the page."""

    @functools.wraps(method)
    def told(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(escape(sentence(error)), print_exception=False) from error

    return told
