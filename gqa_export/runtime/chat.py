"""The chat template of a bundle: which one, rendered by transformers' own function, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GqaExportError, InvalidBundle, cause_of

DEFAULT, TOOLS = "default", "tool_use"
OWN = ("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message",
       "return_assistant_tokens_mask")
"""names that a caller may not set: they are what the prompt is made of"""


def choose_template(stored: Any, name: str | None, args: Mapping[str, Any], where: Path) -> str:
    """The source of a template.

    Args:
        stored: one source, or several by name: a list of {name, template}, or a dict.
        name: the one to take; None is transformers' choice: tool_use where tools are given, else default.
        args: variables for the template.
        where: the bundle, for messages.

    Raises:
        InvalidBundle: what is stored is not a template.
        GqaExportError: there is none, none of this name, or several and no default.
    """
    templates: dict[str, str] = {}
    if stored:
        templates = {DEFAULT: stored} if isinstance(stored, str) else _by_name(stored, where)
    if not templates:
        raise GqaExportError("this model has no chat template", str(where), "leave out --chat",
                             code="E-RUN-CHAT-TEMPLATE")
    if name is None:
        name = TOOLS if args.get("tools") is not None and TOOLS in templates else DEFAULT
    if name not in templates:
        raise GqaExportError(f"the chat template {name!r} does not exist; there are: {', '.join(sorted(templates))}",
                             str(where), f"choose one: --chat-template {min(templates)}",
                             code="E-RUN-CHAT-TEMPLATE-NAME")
    return templates[name]


def _by_name(stored: Any, where: Path) -> dict[str, str]:
    pairs: list[Any] = []
    if isinstance(stored, dict):
        pairs = list(stored.items())
    elif isinstance(stored, list):
        pairs = [(entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
                 for entry in stored]
    if not pairs or not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        raise InvalidBundle("chat_template is neither text nor a list of named templates", str(where),
                            "copy tokenizer_config.json from the checkpoint again", code="E-RUN-CHAT-TEMPLATE-DAMAGED")
    return dict(pairs)


def check_args(args: Mapping[str, Any]) -> None:
    """Refuse variables that make up the prompt itself, and tools that are not a list.

    Raises:
        GqaExportError: names the variable.
    """
    if taken := [name for name in args if name in OWN]:
        raise GqaExportError(f"a template's variable {taken[0]!r} is set by the prompt itself", "--template-args",
                             "leave it out", code="E-OPTION-TEMPLATE-ARGS")
    for name in ("tools", "documents"):
        value = args.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise GqaExportError(f"the variable {name!r} is not a list of objects", "--template-args",
                                 'for example {"tools": [{"type": "function", "function": {...}}]}',
                                 code="E-OPTION-TEMPLATE-ARGS")


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], args: Mapping[str, Any],
           where: Path) -> str:
    """A conversation as text, up to where the assistant's answer begins.

    Args:
        template: its source.
        messages: dicts of role and content.
        tokens: the special tokens by name.
        args: further variables.
        where: the bundle, for messages.

    Raises:
        GqaExportError: the template refuses the conversation, or cannot be rendered.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    check_args(args)
    try:
        # one conversation in; its text comes out, and the spans of the answers, which are not used
        rendered: Any = render_jinja_template([[dict(message) for message in messages]], chat_template=template,
                                              add_generation_prompt=True, **{**tokens, **args})
    except Exception as error:  # a template is a program: it may divide by zero
        raise GqaExportError(f"the chat template refuses this conversation: {cause_of(error)}", str(where),
                             "try without --system, or with other --template-args",
                             code="E-RUN-CHAT-REFUSED") from error
    return str(rendered[0][0])
