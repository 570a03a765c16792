"""Show messages to a visitor. They may contain text from a link, and toasts are HTML, so all are escaped here."""

import functools
import logging
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

_LONGEST = 40
_UNEXPECTED = "Something went wrong that this page did not expect. Its server has written down what."


class Refused(Exception):
    """Raised for what the page cannot do; the message is plain text for the visitor."""


def quoted(value: str) -> str:
    """Quote and shorten text from a link or a visitor."""
    return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")


def note(text: str) -> None:
    """Show an informative toast."""
    gr.Info(escape(text))


def warn(text: str) -> None:
    """Show a warning toast, for a request that cannot be fulfilled; the rest of the page stays as it is."""
    gr.Warning(escape(text))


def sentence(error: Exception) -> str:
    """Return the message of an error if it is meant for the visitor; log any other error and return a general text."""
    if isinstance(error, Refused):
        return str(error)
    logging.getLogger(__name__).error(_UNEXPECTED, exc_info=error)
    return _UNEXPECTED


def answer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an event handler, so that the page shows every exception that it raises."""

    @functools.wraps(method)
    def told(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(escape(sentence(error)), print_exception=False) from error

    return told
