"""A model's tokenizer and chat template, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blendserve.cli.job_file import JobFileError, Run, Tokens, UncountableMedia


class ModelTokenizer:
    """The tokenizer of a model folder or hub id (an `Encoder`).

    Plain text needs only the folder's tokenizer.json; conversations go through the chat template
    as `transformers` applies it, which is loaded at the first one.

    Raises:
        JobFileError: there is no tokenizer under this name.
    """

    def __init__(self, name: str) -> None:
        from blendserve.runtime.default_model import ModelPathError, resolve_model_path

        folder = Path(name).expanduser()
        if folder.is_file():
            folder = folder.parent
        if name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
            raise JobFileError(f"{name}: no such folder; name one with a tokenizer.json")
        try:
            # A tokenizer alone, without a config.json, will do here.
            self._name = str(folder) if folder.is_dir() else resolve_model_path(name)
        except ModelPathError as error:
            raise JobFileError(str(error)) from error
        self._full: Any = None
        self._media: Any = None
        self._media_fault: str | None = None
        self._plain: Any = None
        file = Path(self._name) / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            try:
                self._plain = Tokenizer.from_file(str(file))
            except Exception as error:  # The library raises its own, undocumented.
                raise JobFileError(
                    f"{file} is no tokenizer ({error}); fetch the model's file again"
                ) from error
        elif folder.is_dir():
            raise JobFileError(
                f"{folder} has no tokenizer.json; name the folder that holds the model's with "
                "--tokenizer"
            )

    def text(self, text: str) -> list[int]:
        """Tokens of a plain prompt."""
        if self._plain is not None:
            return list(self._plain.encode(text).ids)
        return list(self._transformers().encode(text))

    def chat(self, messages: list[Any], tools: list[Any] | None) -> list[int]:
        """Tokens of a conversation with the opening of the answer."""
        tokenizer = self._transformers()
        if not tokenizer.chat_template:
            raise JobFileError(
                f"{self._name} has no chat template; name the folder of an instruction-tuned "
                "model's tokenizer with --tokenizer"
            )
        text = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        if self._plain is not None:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def media(self, messages: list[Any], tools: list[Any] | None) -> tuple[Tokens, list[Run]]:
        """Tokens of a conversation with pictures, and (end, patches) of each."""
        if self._media is None and self._media_fault is None:
            self._load_media()
        if self._media is None:
            raise UncountableMedia(self._media_fault)
        try:
            ids, runs = self._media.read(messages, tools)
        except Exception as error:
            # Of any type: the model's processor and SGLang's reading of parts are in there.
            raise UncountableMedia(str(error) or type(error).__name__) from error
        return ids, [(run.end, run.patches) for run in runs]

    def _load_media(self) -> None:
        from blendserve.runtime.media_model import MediaModel, NoMediaModel

        try:
            self._media = MediaModel(self._name)
        except (NoMediaModel, ImportError) as error:
            self._media_fault = str(error)

    def _transformers(self) -> Any:
        if self._full is not None:
            return self._full
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise JobFileError(
                "conversations need the model's chat template, and that the package transformers; "
                "install it, or give token ids in place of messages"
            ) from error
        try:
            self._full = AutoTokenizer.from_pretrained(self._name)
        except Exception as error:  # Anything from a missing file to a missing network.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise JobFileError(
                f"no tokenizer under {self._name!r} ({reason}); name a folder that holds the "
                "model's tokenizer.json with --tokenizer"
            ) from error
        return self._full
