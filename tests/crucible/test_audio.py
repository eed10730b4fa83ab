"""Sounds: what is said without torchcodec, and with it the samples that `datasets` gives."""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import wave
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from crucible.decode import decoder
from crucible.errors import CorruptFile, UsageError
from crucible.feature_types import schema_of

RATE = 8000


def tone(channels: int, rate: int = RATE) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        for n in range(rate // 4):
            value = round(12_000 * math.sin(n / 9))
            file.writeframes(struct.pack(f"<{channels}h", *(value // (c + 1) for c in range(channels))))
    return out.getvalue()


def decoded(content: bytes | None, **settings: Any) -> Any:
    """What a row's sound becomes."""
    feature = {**settings, "_type": "Audio"}
    decode = decoder(None, schema_of({"sound": feature}))
    assert decode is not None
    return decode({"sound": {"bytes": content, "path": "a.wav"}})["sound"]


def usable() -> bool:
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):
        return False
    return AudioDecoder is not None


real = pytest.mark.skipif(not usable(), reason="torchcodec with FFmpeg is not here")


def test_without_torchcodec_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UsageError, match=r"'sound' is audio.*decode\(False\).*install the extra `audio`"):
        decoded(tone(1))
    assert decoder(None, schema_of({"sound": {"decode": False, "_type": "Audio"}})) is None


def test_without_ffmpeg_it_is_said_that_torchcodec_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Could not load libtorchcodec.\nA long story follows.")

    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    with pytest.raises(UsageError, match=r"needs FFmpeg \(Could not load libtorchcodec\.\)"):
        decoded(tone(1))


def test_a_null_stays_and_a_path_is_not_opened() -> None:
    decode = decoder(None, schema_of({"sound": {"_type": "Audio"}}))
    assert decode is not None
    assert decode({"sound": None}) == {"sound": None}
    with pytest.raises(CorruptFile, match="not the bytes of its sound"):
        decoded(None)


@real
@pytest.mark.parametrize(
    ("channels", "settings"), [(1, {}), (2, {}), (1, {"sampling_rate": 4000}), (2, {"num_channels": 1})]
)
def test_samples_are_those_of_datasets(channels: int, settings: dict[str, Any]) -> None:
    from tests.oracle import datasets

    content = tone(channels)
    mine = decoded(content, **settings)
    theirs = datasets.Audio(**settings).decode_example({"bytes": content, "path": "a.wav"})
    assert mine["sampling_rate"] == theirs["sampling_rate"] == settings.get("sampling_rate", RATE)
    assert mine["array"].dtype == np.float32
    assert mine["array"].ndim == 1
    assert np.array_equal(mine["array"], theirs["array"])
    assert np.abs(mine["array"]).max() > 0.1
    again = pickle.loads(pickle.dumps(mine))
    assert np.array_equal(again["array"], mine["array"])
    assert mine.metadata.num_channels == channels, "the rest is torchcodec's"
    with pytest.raises(KeyError):
        mine["path"]


@real
@pytest.mark.parametrize("content", [b"", b"RIFF", b"no sound at all" * 100, tone(1)[:30]])
def test_what_is_no_sound_names_its_file_and_column(content: bytes) -> None:
    with pytest.raises(CorruptFile, match=r"^a\.wav at column 'sound': not a sound"):
        decoded(content)["array"]
