"""Weights from safetensors files, one tensor at a time, and random ones for measurements.

On the CPU a tensor whose dtype fits is a view of the memory-mapped file: workers on one host that
serve the same checkpoint share its pages, and loading costs nothing before first use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pdserve import kernels
from pdserve.engine.config import ModelError
from pdserve.engine.quantization import Scheme
from pdserve.engine.tensor_spec import Specs, TensorSpec

Progress = Callable[[float], None]
"""Called with the share of the weights that is loaded, 0.0 to 1.0."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAMPLE_BYTES = 1024
"""Bytes of a tensor that its digest looks at, at each of three places."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What tensors of full precision may be stored in."""
_IGNORED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and that follow from the configuration."""


def load_weights(
    folder: Path,
    expected: Specs,
    *,
    dtype: torch.dtype,
    device: str,
    optional: frozenset[str] = frozenset(),
    progress: Progress = lambda share: None,
) -> dict[str, torch.Tensor]:
    """The tensors that `expected` names, as it describes them, from the checkpoint in `folder`.

    optional: names that the checkpoint may hold besides (a tied output layer), not loaded.
    Raises ModelError, naming file and tensor, for one that is missing, left over, in two files, of
    another shape or dtype, and for files that are missing or damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _read(path):
            if name.endswith(_IGNORED) or name in optional:
                continue
            if name not in expected:
                raise ModelError(f"{path} holds the tensor {name}, which this architecture lacks.")
            if name in tensors:
                raise ModelError(f"{path} holds the tensor {name}, as another file does.")
            _check(path, name, tensor, expected[name])
            if not expected[name].dtypes:
                tensor = tensor.to(device=device, dtype=dtype)
            tensors[name] = tensor
            progress(len(tensors) / len(expected))
    progress(1.0)
    needed = {name for name, spec in expected.items() if spec.required}
    missing = sorted(needed - set(tensors))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"The checkpoint in {folder} lacks the tensor {missing[0]}{more}.")
    return tensors


def read_some(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of `names` that the checkpoint in `folder` holds, as they are."""
    return {
        name: tensor
        for path in _weight_files(folder)
        for name, tensor in _read(path)
        if name in names
    }


def _check(path: Path, name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    shape = tuple(tensor.shape)
    if shape not in spec.shapes:
        allowed = " or ".join(str(list(shape)) for shape in spec.shapes)
        raise ModelError(
            f"{path}: the tensor {name} has the shape {list(shape)}, but by config.json it must "
            f"have {allowed}."
        )
    if tensor.dtype not in (spec.dtypes or FLOATS):
        allowed = " or ".join(str(dtype)[6:] for dtype in spec.dtypes or FLOATS)
        raise ModelError(
            f"{path}: the tensor {name} is {str(tensor.dtype)[6:]}, but by config.json it must be "
            f"{allowed}."
        )


def dummy_weights(
    expected: Specs,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int,
    progress: Progress = lambda share: None,
) -> dict[str, torch.Tensor]:
    """Random weights: each tensor depends on the seed, its name and its shape, and on no order.

    Matrices are normal with deviation 0.02; vectors (norms and biases) one and zero. What a
    checkpoint holds in fewer bits cannot be made up: ModelError.
    """
    tensors = {}
    for done, (name, spec) in enumerate(expected.items()):
        shape = spec.shapes[0]
        if spec.dtypes and dtype not in spec.dtypes:
            raise ModelError(
                f"--load-format dummy makes {str(dtype)[6:]} weights, but by config.json {name} is "
                f"{str(spec.dtypes[0])[6:]}: remove its quantization_config (--quantization can "
                "stand in for it)."
            )
        if len(shape) == 1:
            value = torch.full(shape, 0.0 if name.endswith(".bias") else 1.0)
        else:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            value = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        tensors[name] = value.to(device="cpu" if spec.dtypes else device, dtype=dtype)
        progress((done + 1) / len(expected))
    return tensors


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that a decoder computes with, on its device."""

    tensors: Mapping[str, torch.Tensor]
    quantized: Mapping[str, kernels.QuantizedWeight]
    """By the names of the linear layers."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(name)

    def matrix(self, layer: str) -> torch.Tensor | kernels.QuantizedWeight:
        """The weight of the linear layer of this name."""
        return self.quantized.get(layer) or self.tensors[layer + ".weight"]


def assemble(
    tensors: dict[str, torch.Tensor],
    layers: Mapping[str, Specs],
    scheme: Scheme,
    device: str,
) -> Weights:
    """Make the weights of quantised layers: `layers` describes each one's tensors by the last parts
    of their names. Those that lie as in the file are taken out of `tensors`, so that they need not
    all stay in memory. Raises ModelError where they do not fit together."""
    made = {}
    for layer, specs in layers.items():
        own = [name for name, spec in specs.items() if spec.dtypes]
        parts = {name: tensors.pop(f"{layer}.{name}") for name in own}
        try:
            made[layer] = scheme.weight(parts, device)
        except ValueError as error:
            raise ModelError(f"The weight of {layer} cannot be used: {error}") from None
    return Weights(tensors, made)


def weights_digest(folder: Path) -> str:
    """A text that changes with the checkpoint: the files' names, sizes and headers are hashed, and
    `SAMPLE_BYTES` at the start, middle and end of every tensor, which takes a second at most,
    whatever the size. Two trainings of one architecture differ everywhere, so samples tell them
    apart; an edit of a few bytes by hand may go unnoticed."""
    digest = hashlib.blake2b(digest_size=12)
    for path in _weight_files(folder):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, 1 << 26))
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                digest.update(header)
                for begin, end in _extents(path, header):
                    for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                        file.seek(8 + length + offset)
                        digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    return digest.hexdigest()


def _extents(path: Path, header: bytes) -> list[tuple[int, int]]:
    """Where each tensor of a file begins and ends, counted from the end of its header."""
    try:
        entries = json.loads(header)
        return [
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{path} is damaged or not a safetensors file.") from None


def dummy_digest(seed: int) -> str:
    """As `weights_digest`, for the dummy weights of a seed."""
    return f"dummy-{seed}"


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files in order of their names: those of the index, or the single one."""
    index = folder / INDEX_FILE
    if not index.exists():
        single = folder / SINGLE_FILE
        if not single.exists():
            raise ModelError(
                f"The model folder {folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; only "
                "safetensors checkpoints can be loaded (or random weights: --load-format dummy)."
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read as a weight index: {error!r}.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file of the model folder.")
        if not (folder / name).exists():
            raise ModelError(f"{index} names {name}, which is not in the model folder.")
    return [folder / name for name in names]


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, as views of its mapping."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}.") from None
