"""Named tensors in checkpoint files, one at a time: safetensors, or pickles with torch.

Opening reads names and shapes only; `StoredTensor.read` brings one tensor into
memory, so a model is never held twice.
"""

import dataclasses
import math
import os
import pickle
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medusa_jax import json_files
from medusa_jax.checkpoints import float8
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.errors import InputError, listed
from medusa_jax.files import writing

SHARD_BYTES = 5 * 10**9
# A name in an index: no separators, and nothing that begins like a parent directory.
_FILE_NAME = re.compile(r"[^./\\\0][^/\\\0]{0,199}")
# Where checkpoints keep the tensors beside an optimizer's state and the like.
_STATE_KEYS = ("state_dict", "model_state_dict", "module", "model")
# What safetensors calls the types that tensors here have.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
           "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
           "BOOL": "bool"}  # fmt: skip


def open_model(directory: Path, *, quantized: bool = False) -> Tensors:
    """Tensors of a Hugging Face model directory: one file or shards with an index.

    Names are those of the module itself: what wraps it is left out (`_bare`).

    Args:
      quantized: reads 8-bit floats, which mean nothing without their scales.

    Raises:
      InputError: no weights, a missing shard, or an unreadable file.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _open_shards(index, quantized)
        if (directory / name).is_file():
            return open_file(directory / name, quantized=quantized)
    raise InputError(
        f"{directory} holds no weights: expected model.safetensors, pytorch_model.bin, "
        "or either with an index"
    )


def open_file(file: Path, *, quantized: bool = False) -> Tensors:
    """Tensors of one `.safetensors`, `.bin` or `.pt` file, named as in `open_model`."""
    _refuse_pointer(file)
    opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    if empty := [name for name, tensor in opened.items() if 0 in tensor.shape]:
        raise InputError(
            f"{file}: empty tensors, as ZeRO-3 leaves them: {listed(sorted(empty))}; gather the "
            "weights before saving (stage3_gather_16bit_weights_on_model_save)"
        )
    bare = _bare(opened, file)
    readable = (
        opened if quantized else {name: _readable(file, name, opened[name]) for name in opened}
    )
    return {bare[name]: tensor for name, tensor in readable.items()}


def _refuse_pointer(file: Path) -> None:
    """Raises InputError for the text that Git leaves in place of a large file."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(64)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    if begin.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull` there")


def _readable(file: Path, name: str, tensor: StoredTensor) -> StoredTensor:
    """The tensor; where its type is not supported, reading it says so."""
    if _known(tensor.dtype):
        return tensor

    def read(index: Any = ...) -> np.ndarray:
        raise InputError(
            f"{file}: {name} is of type {tensor.dtype}, which is not supported (quantized?)"
        )

    return dataclasses.replace(tensor, read=read)


# What training, compilation and sharding wrap around modules, or around any part of them.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|base_model\.model)\."
)


def _bare(names: Collection[str], source: Path) -> dict[str, str]:
    """Names without those of wrappers: "module._orig_mod.0.1.weight" -> "0.1.weight"."""
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    if len(set(bare.values())) < len(bare):
        wrapped = [name for name in names if name != bare[name]]
        raise InputError(f"{source} holds tensors twice, under several names: {listed(wrapped)}")
    return bare


def _open_shards(index: Path, quantized: bool) -> Tensors:
    placed = json_files.read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(s, str) for s in placed.values()):
        raise InputError(f"{index} has no 'weight_map' of tensor names to file names")
    bare = _bare(placed, index)
    placed = {bare[name]: file for name, file in placed.items()}
    files = sorted(set(placed.values()))
    if strange := [json_files.short(name) for name in files if not _FILE_NAME.fullmatch(name)]:
        raise InputError(f"{index} names files that are not beside it: {listed(strange)}")
    shards = {name: index.parent / name for name in files}
    missing = [str(shard) for shard in shards.values() if not shard.is_file()]
    if missing:
        raise InputError(f"{index.name} names shards that do not exist: {listed(missing)}")
    opened = {name: open_file(shard, quantized=quantized) for name, shard in shards.items()}
    lost = [f"{name} (in {file})" for name, file in placed.items() if name not in opened[file]]
    if lost:
        raise InputError(f"{index} places tensors where they are not: {listed(lost)}")
    return {name: opened[file][name] for name, file in placed.items()}


def _open_safetensors(file: Path) -> Tensors:
    try:
        with safe_open(file, framework="numpy") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            about = {name: (tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file: {error}") from None
    if not about:
        raise InputError(f"{file} holds no named tensors")

    def read(name: str, index: Any) -> np.ndarray:
        """A part of a tensor, of which no other byte is read."""
        if about[name][1] == float8.NAME:
            return np.array(float8.in_file(file, name)[index])
        # Pages of a file that stays open would stay in this process's memory, once read.
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name) if index is ... else handle.get_slice(name)[index]

    return {
        name: StoredTensor(
            shape, _DTYPES.get(dtype, dtype), lambda index=..., name=name: read(name, index)
        )
        for name, (shape, dtype) in about.items()
    }


def _open_pickle(file: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{file} is a PyTorch pickle, which needs torch: "
            "pip install 'medusa_jax[torch]', or convert it to safetensors"
        ) from None
    try:
        # Only zip files, torch's format since 1.6, can be mapped instead of read whole.
        mappable = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own advice is to trust the file
            reason = "it holds something else than tensors, which is not loaded"
        raise InputError(f"{file} is not a readable PyTorch checkpoint: {reason}") from None

    def read(tensor: torch.Tensor, index: Any) -> np.ndarray:
        # A copy: JAX would keep the mapped file itself, which may be overwritten later.
        tensor = tensor.detach()[index].clone(memory_format=torch.contiguous_format)
        if tensor.dtype == torch.bfloat16:  # NumPy itself knows no bfloat16
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    state = state if isinstance(state, dict) else {}
    inner = (state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict))
    state = next(inner, state)
    if not any(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{file} holds no named tensors; its keys: {listed(state) or 'none'}")
    return {
        name: StoredTensor(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            lambda index=..., tensor=tensor: read(tensor, index),
        )
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def write_model(
    directory: Path,
    stem: str,
    tensors: Tensors,
    write: bool = True,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Writes `stem.safetensors`, or shards of at most `shard_bytes` with an index.

    Args:
      tensors: each is read once, in order, and no more than one shard is in
        memory; each keeps its own type.
      write: off in processes that only take part in giving the arrays.

    Raises:
      InputError: a tensor of a type that is not written.
      OutputError: a file could not be written; names it.
    """
    strange = [f"{name} ({t.dtype})" for name, t in tensors.items() if not _known(t.dtype)]
    if strange:
        raise InputError(f"tensors of a type that is not supported (quantized?): {listed(strange)}")
    shards: list[list[str]] = []
    size: float = shard_bytes
    for name, tensor in tensors.items():
        bytes_here = math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize
        if not shards or size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    placed, total = {}, 0
    for i, names in enumerate(shards, start=1):
        suffix = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        held = {}
        for name in names:
            array = tensors[name].read()
            if write:
                held[name] = np.ascontiguousarray(array)
                placed[name] = f"{stem}{suffix}.safetensors"
                total += held[name].nbytes
        if write:
            file = directory / f"{stem}{suffix}.safetensors"
            with writing(file):
                _save(held, file)
                file.chmod(directory.stat().st_mode & 0o666)  # safetensors lets only the owner read
    if write and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        json_files.write(directory / f"{stem}.safetensors.index.json", index)


def _known(dtype: str) -> bool:
    return dtype in _DTYPES.values()


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:  # whose text has the system's number of what went wrong
        number = re.search(r"os error (\d+)", str(error))
        reason = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
        raise OSError(*reason) from error


def write_pickle(file: Path) -> Path | None:
    """The same tensors as a `.pt` beside a safetensors file; None where torch is missing.

    Raises:
      OutputError: it could not be written; names it.
    """
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        return None
    pickled, tensors = file.with_suffix(".pt"), load_file(file)
    with writing(pickled), pickled.open("wb") as sink:
        try:
            torch.save(tensors, sink)
        except RuntimeError as error:  # torch hides what the system said
            raise error.__context__ or error from None
    return pickled
