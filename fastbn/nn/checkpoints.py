"""Checkpoints: all that a training needs to go on as if nothing had been, in one safetensors file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import numpy as np

from .. import checks, files
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]

VERSION = "1"  # of the file's format
KEY = "fastbn.checkpoint"  # in the file's metadata: the notes, as JSON


@dataclass(frozen=True)
class Checkpoint:
    """A training at one moment, as `fit` saves it.

    In the file the arrays are tensors named as in their state, after "model.", "best." or "optimizer."
    ("model.0.weight" …), and "order"; any reader of safetensors finds them. The notes are in its metadata, as JSON.

    Attributes
    ----------
    model : dict of str to ndarray
        The model's `state_dict`.
    best : dict of str to ndarray or None
        That of the end of the best epoch so far, where one has ended.
    optimizer : dict of str to ndarray
        The optimizer's `state_dict`.
    order : ndarray of int, shape (rows,)
        Of the rows, in the epoch at hand.
    notes : dict
        What there is besides, as JSON has it: "run" (what the training is of, by which a resumed one is known),
        "history", the place within the epoch, the random generators' states.

    Examples
    --------
    ``model.load_state_dict(Checkpoint.load("digits.safetensors").model)`` takes the model out of a file.
    """

    model: dict[str, Array]
    best: dict[str, Array] | None
    optimizer: dict[str, Array]
    order: Array
    notes: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file beside its place, and move it there when it is complete and on the disk.

        Parameters
        ----------
        path : str or path-like
            A file that stands there is replaced; whatever goes wrong before, it stays.

        Raises
        ------
        ImportError
            Without the package safetensors: ``pip install 'fastbn[io]'``.
        OSError
            Naming the file.
        """
        groups = {"model": self.model, "best": self.best or {}, "optimizer": self.optimizer}
        tensors = {f"{group}.{name}": array for group, state in groups.items() for name, array in state.items()}
        tensors["order"] = self.order
        tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        text = json.dumps(self.notes, default=_array_to_json)
        metadata = {KEY: text, f"{KEY}.version": VERSION, f"{KEY}.crc32": _checksum(text, tensors)}
        place = real_path(path)
        data = need_safetensors().numpy.save(tensors, metadata)
        try:
            files.write(place, data)
        except OSError as error:
            message = f"cannot write the checkpoint ({error.strerror}); one that was there before still is"
            raise OSError(error.errno, message, place) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file of `save`.

        Parameters
        ----------
        path : str or path-like

        Raises
        ------
        ImportError
            Without the package safetensors: ``pip install 'fastbn[io]'``.
        OSError
            As the system says.
        ValueError
            Naming the file, where it is damaged, or no checkpoint, or one of another version's format.
        """
        place = real_path(path)
        safetensors = need_safetensors()
        with open(place, "rb") as file:
            data = file.read()
        try:
            tensors = safetensors.numpy.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{place!r} is damaged, or no safetensors file: {error}") from None
        version = metadata.get(f"{KEY}.version")
        if version is None:
            raise ValueError(f"{place!r} is a safetensors file, but no checkpoint of fastbn.nn.fit")
        if version != VERSION:
            raise ValueError(f"{place!r} is a checkpoint of format {version}, and this fastbn reads format {VERSION}")
        text = metadata.get(KEY, "")
        if metadata.get(f"{KEY}.crc32") != _checksum(text, tensors):
            raise ValueError(f"{place!r} is damaged: its contents do not have the checksum that they were saved with")
        states: dict[str, dict[str, Array]] = {"model": {}, "best": {}, "optimizer": {}}
        order = tensors.pop("order")
        for name, array in tensors.items():
            group, _, key = name.partition(".")
            states[group][key] = array
        notes = json.loads(text, object_hook=_array_from_json)
        return cls(states["model"], states["best"] or None, states["optimizer"], order, notes)


def real_path(path: str | os.PathLike[str]) -> str:
    """Where a link leads, as a str."""
    return os.path.realpath(checks.path(path))


def need_safetensors() -> ModuleType:
    """The package, or an error that says how to get it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"checkpoints need the package safetensors, which cannot be imported ({error}): pip install 'fastbn[io]'"
        ) from error
    return safetensors


def _checksum(text: str, tensors: Mapping[str, Array]) -> str:
    """Of names, numbers and notes: safetensors itself does not see a number that has changed."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _array_to_json(array: Array) -> dict[str, Any]:
    """Some bit generators' states have arrays in them."""
    return {"array": array.tolist(), "dtype": str(array.dtype)}


def _array_from_json(value: dict[str, Any]) -> Any:
    return np.array(value["array"], value["dtype"]) if value.keys() == {"array", "dtype"} else value


# ---- random state ----


class Generators:
    """The random generators of a training, each once, however many share it.

    Parameters
    ----------
    *roots
        Generators, and objects whose attributes are looked through: so are the layers among these, and lists, tuples
        and dicts.

    Attributes
    ----------
    places : list of str
        For each place where there is a generator, in order: its kind and its number. Equal lists: as many generators,
        shared in the same way.
    """

    def __init__(self, *roots: Any) -> None:
        seen: set[int] = set()
        bits = [generator.bit_generator for root in roots for generator in _generators(root, seen, top=True)]
        self._bits = list({id(one): one for one in bits}.values())
        self.places = [f"{type(one).__name__} {[id(b) for b in self._bits].index(id(one))}" for one in bits]

    def get(self) -> list[Any]:
        """Their states, for `set`."""
        return [one.state for one in self._bits]

    def set(self, states: list[Any]) -> None:
        """Go on from what `get` gave, in the same generators."""
        for one, state in zip(self._bits, states, strict=True):
            one.state = state


def _generators(thing: Any, seen: set[int], *, top: bool = False) -> Iterator[np.random.Generator]:
    if isinstance(thing, np.random.Generator):
        yield thing
        return
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif top or isinstance(thing, Layer):
        parts = list(getattr(thing, "__dict__", {}).values())
    else:
        return
    if id(thing) not in seen:
        seen.add(id(thing))
        for part in parts:
            yield from _generators(part, seen)
