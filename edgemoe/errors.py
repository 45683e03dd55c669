"""The errors that edgemoe raises on purpose; each message is one sentence with the next step in it.

Two are elsewhere, as they concern their own part alone: `edgemoe.bench_arm.ArmError`, an EdgemoeError, and
`edgemoe.memory_cgroup.CgroupUnavailableError`, an OSError.

::

    EdgemoeError
     |- ModelFileError              the GGUF cannot be used: not a GGUF, cut short, corrupt, a part missing
     |   |- NotMoEError             a dense model: plain llama.cpp runs it
     |   |- UnknownArchitectureError  an architecture the pinned llama.cpp does not load
     |- BudgetError                 --ram cannot be read, is absurd, or is too small (``needed`` would do)
     |- PromptError                 the prompt is longer than the context, or the chat template refuses it
     |- SessionError                a session file cannot be read or written, or is of another model
     |- PatternError                a task's pattern cannot be read, written or used, or its name is no task name
     |   |- PatternMismatchError    the pattern was made for another model
     |- TraceError                  router traces are damaged, empty, or do not fit together or the criterion
     |- DocumentError               calibration text cannot be read: no UTF-8, damaged JSON lines, nothing in it
     |- AllocationError             scores, loss curves or sets of experts that do not fit the model
     |- ConvertError                a model cannot be converted, or the disk does not take what it becomes
     |- StoreError                  the disk failed, or the file changed, while experts were being read
     |- BackendError                llama-cpp-python is missing, of another version, or refused the model
     |- UnsupportedPlatformError    this operating system or machine is not supported
"""

from __future__ import annotations

__all__ = [
    "AllocationError",
    "BackendError",
    "BudgetError",
    "ConvertError",
    "DocumentError",
    "EdgemoeError",
    "ModelFileError",
    "NotMoEError",
    "PatternError",
    "PatternMismatchError",
    "PromptError",
    "SessionError",
    "StoreError",
    "TraceError",
    "UnknownArchitectureError",
    "UnsupportedPlatformError",
]


class EdgemoeError(Exception):
    """Base of all errors that edgemoe raises on purpose."""


class ModelFileError(EdgemoeError):
    """The model file cannot be used: not a GGUF, unreadable, cut short, corrupt, or a part is missing."""


class NotMoEError(ModelFileError):
    """The model has no routed experts, so there is nothing for edgemoe to do."""


class UnknownArchitectureError(ModelFileError):
    """The architecture named in the file is not one the pinned llama.cpp loads."""


class BudgetError(EdgemoeError):
    """A memory budget that cannot be read, makes no sense, or is too small.

    Parameters
    ----------
    message : str
        One sentence for the user.
    needed : int or None
        The smallest budget that would do, in bytes, where it is known.
    """

    def __init__(self, message: str, needed: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed


class PromptError(EdgemoeError):
    """The prompt or conversation cannot be evaluated: longer than the context, or refused by the chat template."""


class SessionError(EdgemoeError):
    """A session file cannot be read or written, is damaged, or belongs to another model."""


class PatternError(EdgemoeError):
    """A task's pattern cannot be read, written, merged or found, or a name cannot be a task's."""


class PatternMismatchError(PatternError):
    """The pattern was made for another model: its expert numbers mean nothing here."""


class TraceError(EdgemoeError):
    """Router traces or scores are damaged, empty, or do not fit together or what is asked of them."""


class DocumentError(EdgemoeError):
    """Calibration text cannot be read: not UTF-8, damaged JSON lines, or nothing in it."""


class AllocationError(EdgemoeError):
    """Experts cannot be chosen: scores, loss curves or sets that contradict themselves or the model."""


class ConvertError(EdgemoeError):
    """A model cannot be converted: no room, an existing output, unsound weights, or nothing to be gained."""


class StoreError(EdgemoeError):
    """Expert bytes could not be read: a disk error, a short read, or a file that changed underneath."""


class BackendError(EdgemoeError):
    """llama-cpp-python is missing or of another version, or it refused the model."""


class UnsupportedPlatformError(EdgemoeError):
    """The operating system or machine is not supported."""
