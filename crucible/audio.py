"""Sounds as `datasets` gives them: read by torchcodec, which the extra `audio` brings, and by FFmpeg, which it finds.

`sound["array"]` is one float32 per sample, the mean over the channels; `sound["sampling_rate"]` is in Hz. Everything
else a sound has is torchcodec's `AudioDecoder`. A sound is unpacked when it is asked for its samples, and crosses
processes as the bytes that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crucible.errors import CorruptFile, UsageError


class Sound:
    """An audio file's bytes, and the decoder that reads them. Raises CorruptFile where FFmpeg cannot read on."""

    def __init__(self, content: bytes, path: str | None, settings: Mapping[str, Any], column: str) -> None:
        """`settings` are the arguments of the decoder. Raises CorruptFile and UsageError as `decode_audio` does."""
        self._given = (content, path, dict(settings), column)
        decoder = _library(column)
        try:
            self._decoder = decoder(content, **settings)
        except Exception as error:  # torchcodec hands on whatever FFmpeg's demuxers say
            raise self._unreadable(error) from error

    def __getitem__(self, key: str) -> Any:
        if key not in ("array", "sampling_rate"):
            raise KeyError(key)
        try:
            if key == "sampling_rate":
                return self._decoder.get_samples_played_in_range(0, 0).sample_rate
            samples = self._decoder.get_all_samples().data.cpu().numpy()
        except Exception as error:
            raise self._unreadable(error) from error
        return np.mean(samples, axis=tuple(range(samples.ndim - 1))) if samples.ndim > 1 else samples

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._decoder, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sound, self._given

    def __repr__(self) -> str:
        content, path, _, _ = self._given
        return f"Sound({path or 'no path'}, {len(content):,} bytes)"

    def _unreadable(self, error: Exception) -> CorruptFile:
        _, path, _, column = self._given
        return CorruptFile(path or "a sound", f"column {column!r}", f"not a sound FFmpeg can read ({error!r:.300})")


def decode_audio(value: Any, feature: Mapping[str, Any], column: str) -> Any:
    """The sound in `{"bytes": …, "path": …}`; a null stays None, and a sound a sound.

    Raises CorruptFile for bytes that are no sound, UsageError where torchcodec is not there or finds no FFmpeg.
    """
    if value is None or not isinstance(value, dict):
        return value
    content, path = value.get("bytes"), value.get("path")
    if content is None:
        # as for images: a path in a row would name a file of this machine
        raise CorruptFile(path or "a sound", f"column {column!r}", "the row has a path but not the bytes of its sound")
    names = {"stream_index": "stream_index", "sampling_rate": "sample_rate", "num_channels": "num_channels"}
    return Sound(content, path, {theirs: feature.get(ours) for ours, theirs in names.items()}, column)


def _library(column: str) -> Any:
    """torchcodec's decoder. Raises UsageError that says what to do without it."""
    carried = f"column {column!r} is audio, which is carried as bytes and a path: `.decode(False)` gives these"
    try:
        from torchcodec.decoders import AudioDecoder  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UsageError(
            f"{carried}, and torchcodec reads samples from them; install the extra `audio` (or torchcodec) and FFmpeg"
        ) from error
    except (RuntimeError, OSError) as error:  # it looks for FFmpeg when it is imported
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"{carried}; torchcodec is there but cannot be used, it needs FFmpeg ({first})") from error
    return AudioDecoder
