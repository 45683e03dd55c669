"""Damaged GGUF files: their headers are refused in one sentence, or sound."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from gguf_bytes import TYPE_F16, TYPE_F32, TYPE_Q2_0, TYPE_Q8_0, Raw, TensorBytes, check_sound, gguf_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import read_header

SMALL = gguf_bytes(
    {"general.architecture": "qwen3moe", "n": 3, "f": 0.5, "ints": [1, 2], "words": ["a", "bb"], "on": True},
    [
        TensorBytes("a", (2, 3, 4)),
        TensorBytes("b", (32,), TYPE_Q8_0),
        TensorBytes("c", (7,), 99, data=bytes(64)),
    ],
)
BOUNDARIES = (
    *(0, 1, 2, 3, 5, 7, 8, 9, 31, 32, 64, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**61, 2**62, 2**63 - 32, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


def sound_or_refused(path: Path) -> bool:
    try:
        header = read_header(path)
    except ModelFileError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return False
    check_sound(header)
    return True


@pytest.mark.parametrize("width", [1, 4, 8])
def test_boundary_numbers_at_every_place(width: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SMALL)
    fates = set()
    with path.open("r+b", buffering=0) as file:
        for at in range(read_header(path).data_offset - width):
            for value in BOUNDARIES:
                if value < 1 << 8 * width:
                    file.seek(at)
                    file.write(value.to_bytes(width, "little"))
                    fates.add(sound_or_refused(path))
            file.seek(at)
            file.write(SMALL[at : at + width])
    assert fates == {True, False} and path.read_bytes() == SMALL


def test_random_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rng = random.Random(7)
    fates = set()
    for _ in range(4000):
        damaged = bytearray(SMALL)
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(damaged))
            match rng.randrange(5):
                case 0:
                    damaged[at] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[at] = rng.randrange(256)
                case 2:
                    damaged[at:at] = rng.randbytes(rng.randrange(20))
                case 3:
                    del damaged[at : at + rng.randint(1, 9)]
                case 4:
                    damaged += damaged[at : at + 99]
        path.write_bytes(damaged)
        fates.add(sound_or_refused(path))
    assert fates == {True, False}


@settings(max_examples=500, deadline=2000)
@given(st.data())
def test_built_files_with_any_fields(data: st.DataObject) -> None:
    sizes = st.sampled_from(BOUNDARIES) | st.integers(0, 300)
    tensors = data.draw(
        st.lists(
            st.builds(
                TensorBytes,
                name=st.text(max_size=70).map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=8),
                shape=st.lists(sizes, max_size=5),
                kind=st.sampled_from([TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_Q2_0, 4, 99, 2**32 - 1]),
                data=st.binary(max_size=100),
                offset=st.none() | sizes,
            ),
            max_size=4,
        )
    )
    raw = st.builds(Raw, st.integers(0, 13), st.binary(max_size=40))
    metadata = data.draw(
        st.dictionaries(st.text("ab.\0", max_size=4), raw | st.integers(0, 2**32 - 1) | st.just("t"), max_size=4)
    )
    counts = data.draw(st.fixed_dictionaries({}, optional={"n_tensors": sizes, "n_keys": sizes}))
    content = gguf_bytes(metadata, tensors, **counts) + data.draw(st.binary(max_size=50))
    with tempfile.NamedTemporaryFile(suffix=".gguf", buffering=0) as file:
        file.write(content)
        sound_or_refused(Path(file.name))
