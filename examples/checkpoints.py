"""The folder of a training run, and its checkpoints. Reading a checkpoint runs no code from it.

A run's folder holds run.json, which identifies the run; log.jsonl, with a line for each step; and a folder step-N for each
checkpoint. A checkpoint holds DCP's files and another run.json. Every rank writes its own shards, and a run can be resumed
with another number of ranks. Each file or folder is written under another name and then renamed, so what has its final name
is complete.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePath

import torch
import torch.distributed.checkpoint as dcp
from common import fail, one_line
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

# DCP of torch 2.11 to 2.15 warns of what is meant: a training in one process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is")

IDENTITY = "run.json"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights come with the loaded model


@dataclass
class Run:
    """A training run.

    Attributes:
        id: a random identifier.
        options: the options that determine what is learnt.
        steps: how many steps ``checkpoint`` has done.
        checkpoint: the folder of a checkpoint, or None.
    """

    id: str
    options: dict[str, object]
    steps: int = 0
    checkpoint: Path | None = None


def fingerprint(parts: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def fingerprint_of_weights(model: torch.nn.Module) -> str:
    """Return a hash of names, shapes and up to 4096 values of each parameter. It is quick, and any training changes it."""

    def parts() -> Iterator[bytes]:
        for name, parameter in model.named_parameters():
            sample = parameter.detach().flatten()[:: max(parameter.numel() // 4096, 1)]
            yield f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode()
            yield sample.contiguous().view(torch.uint8).cpu().numpy().tobytes()

    return fingerprint(parts())


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make ``folder``, and prevent other processes from training into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        fail(f"--output {folder} is no folder that can be written to ({error.strerror}): pass another --output")
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is training into {folder}: pass another --output")
        except (ImportError, OSError):
            pass  # Windows and some file systems have no locks
        yield


def find(path: Path) -> Run:
    """Find the run of --resume ``path``: a checkpoint, or the folder of a run, whose last checkpoint is taken."""
    run = read_identity(path)
    if (path / ".metadata").is_file():
        if run is None:
            fail(f"{path / IDENTITY} is missing or damaged, so the run of {path} is not known: pass another checkpoint")
        return run
    if run is None or run.steps:  # there is nothing, or a checkpoint without metadata
        fail(f"there is no checkpoint {path}: pass a folder step-N that --save-every wrote, or the folder of a run")
    whole = [found for found in map(read_identity, checkpoints(path)) if found is not None and found.id == run.id]
    if not whole:
        fail(f"the run in {path} has no checkpoint yet: start it again without --resume")
    return max(whole, key=lambda found: found.steps)


def read_identity(folder: Path) -> Run | None:
    try:
        content = json.loads((folder / IDENTITY).read_text())
        run = Run(str(content["run"]), dict(content["options"]), int(content.get("steps", 0)), folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run if run.steps >= 0 else None


def write_identity(folder: Path, run: Run, steps: int) -> None:
    text = json.dumps({"run": run.id, "options": run.options, "steps": steps}, indent=1) + "\n"
    write_whole(folder / IDENTITY, text)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def begin(folder: Path, options: dict[str, object], resumed: Run | None) -> Run:
    """Return the run that trains into ``folder``: a new one, or ``resumed`` if it has the same options.

    Ends the script if the folder has checkpoints of another run, so that runs are never mixed.
    """
    if resumed is not None:
        before = resumed.options
        names = [name for name in {**before, **options} if before.get(name) != options.get(name)]
        if names:
            differences = "; ".join(f"{name}: {before.get(name)} there, {options.get(name)} here" for name in names)
            fail(f"{resumed.checkpoint} is of a run with other options ({differences}): pass those, or start a new run")
    run = resumed or Run(uuid.uuid4().hex[:12], options)
    owners = {path: read_identity(path) for path in checkpoints(folder)}
    if resumed is not None and (folder / IDENTITY).exists():
        owners[folder] = read_identity(folder)
    others = [path.name for path, owner in owners.items() if owner is None or owner.id != run.id]
    if others:
        advice = "another --output" if resumed else "another --output, or continue that run with --resume"
        fail(f"{folder} has files of another run ({', '.join(others)}): pass {advice}, or remove them")
    return run


def open_run(folder: Path, run: Run) -> "Log":
    """Prepare ``folder`` for the remaining steps of ``run``. One process calls it, before any checkpoint is written."""
    try:
        clean(folder)
        write_identity(folder, run, 0)
        return Log(folder / "log.jsonl", run.steps)
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}): make room, or pass another --output")


def clean(folder: Path) -> None:
    """Remove or complete what a process left that was stopped while it wrote."""
    for name in ("step-*", "model", "adapter"):
        for earlier in folder.glob(f".{name}.earlier"):  # the process was stopped inside put
            whole = folder / earlier.stem.removeprefix(".")
            shutil.rmtree(earlier) if whole.exists() else earlier.rename(whole)
        for partial in folder.glob(f".{name}.partial"):
            shutil.rmtree(partial)


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def put(folder: Path) -> None:
    """Give the partial folder of ``folder`` its final name. An earlier folder of that name is replaced."""
    earlier = folder.with_name(f".{folder.name}.earlier")
    if folder.exists():
        folder.rename(earlier)
    partial_of(folder).rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    partial = partial_of(path)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Log:
    """log.jsonl, with a line for each step. A full disk does not end the training."""

    def __init__(self, path: Path, steps: int):
        """Continue the log after ``steps`` steps. Later lines are dropped, because a resumed run repeats these steps."""
        lines = read_log(path) if steps and path.exists() else []
        write_whole(path, "".join(f"{json.dumps(line)}\n" for line in lines if line["step"] <= steps))
        self.file = path.open("ab", buffering=0)
        self.error: OSError | None = None

    def write(self, line: dict) -> None:
        if self.error is None:
            data = f"{json.dumps(line)}\n".encode()
            try:
                if self.file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self.error = error
                print(f"\n{self.file.name} ends before step {line['step']} ({error.strerror}); the training goes on")


def read_log(path: Path) -> list[dict]:
    """Return the entries of a log. The last line is left out if it was cut when its process was stopped."""
    *whole, last = path.read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate([*whole, last] if last else whole, 1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(whole) + bool(last):
                shown = text[:60].decode(errors="replace")
                fail(f"{path}, line {number} is not the entry of a step ({shown!r}): remove that line")
            print(f"{path}, line {number} was cut: it is left out")
    return lines


def save(model, optimizer, run: Run, steps: int, folder: Path, main: bool) -> bool:
    """Write the checkpoint ``folder``. All ranks call it, and the main rank gives the folder its final name.

    Returns whether the checkpoint was written. A full disk does not end a training, which may be the only copy of its weights.
    """
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    partial = partial_of(folder)
    try:
        state = {"model": weights, "optimizer": moments["state"]}  # tensors only
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
        if main:
            write_identity(partial, run, steps)
            put(folder)
    except (CheckpointException, OSError) as error:
        cause = root(error)
        if not isinstance(cause, Exception):
            raise cause from None  # DCP wraps KeyboardInterrupt too
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            print(f"\n{folder} was not written ({one_line(cause)}); the training goes on")
        return False
    return True


def restore(model, optimizer, run: Run) -> None:
    """Load what :func:`save` wrote into a model and an optimizer that were made with the same options."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": weights, "optimizer": moments["state"]}
    try:
        reader = SafeReader(run.checkpoint)
        reader.read_metadata()  # DCP would print a traceback of its errors
        dcp.load(state, storage_reader=reader, planner=TensorPlanner())
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED)
    except (Exception, CheckpointException) as error:  # a damaged file can raise anything
        cause = root(error)
        if not isinstance(cause, Exception):
            raise cause from None
        fail(f"the checkpoint {run.checkpoint} is damaged ({one_line(cause)}): resume from an earlier one")


def root(error: BaseException) -> BaseException:
    """Return the exception of one rank from DCP's exception for all ranks."""
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return failures[0][0] if failures else error


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes that describe tensors in DCP's .metadata, and nothing that could run code.

    DCP itself reads that file by ``pickle.load`` (https://github.com/pytorch/pytorch/issues/189308). Tested with torch 2.13
    and 2.15.
    """

    DESCRIPTIONS = (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    )  # fmt: skip
    KNOWN = {("torch.distributed.checkpoint.metadata", name) for name in DESCRIPTIONS} | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),  # looks a layout up by name
        ("torch", "Size"),
    }

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):  # where it was written
            return PurePath
        if (module, name) in self.KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with a safe unpickler for .metadata. DCP reads the tensors with ``weights_only``."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
        return metadata


class TensorPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner, which refuses values other than tensors. :func:`save` writes none, and DCP would unpickle them."""

    def load_bytes(self, read_item, value) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def write_where_there_is_room(places: Iterable[Path], write: Callable[[Path], None]) -> tuple[Path | None, list[str]]:
    """Let ``write`` fill a new folder: the first of ``places`` where that succeeds.

    Returns that folder, or None, and the reasons why earlier places failed.
    """
    reasons = []
    for folder in places:
        partial = partial_of(folder)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            put(folder)
            return folder, reasons
        except Exception as error:  # safetensors and tokenizers raise their own errors for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            reasons.append(f"{folder}: {one_line(error)}")
    return None, reasons
