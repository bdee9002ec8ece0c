# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet on purpose.

Owns the classes only. A message says what argument, what came, what is needed and what to do. Errors caused by the
caller's input are also ValueError; the CLI prints any NeuronPagedError as one line and exits with code 2.
"""

from typing import Any


class NeuronPagedError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequestError(NeuronPagedError, ValueError):
    """A request or an argument can't be served as given."""


class InvalidSamplingParamsError(InvalidRequestError):
    """A sampling parameter is of the wrong type, NaN or out of range."""


class PromptTooLongError(InvalidRequestError):
    """Prompt (plus at least one new token) exceeds `max_model_len`, or the whole KV cache."""


class ConfigError(NeuronPagedError, ValueError):
    """An engine, cache or scheduler setting is impossible."""


class OutOfBlocksError(NeuronPagedError):
    """The KV cache can't hold what is asked; raised where waiting would not help."""


class ModelNotFoundError(NeuronPagedError, ValueError):
    """No model at this path or name."""


class UnsupportedModelError(NeuronPagedError, ValueError):
    """The model's architecture or a part of its configuration is not implemented; says which."""


class CheckpointError(NeuronPagedError, ValueError):
    """Checkpoint files are missing, truncated, of the wrong shape, or have unknown or missing names."""


class GraphError(NeuronPagedError, RuntimeError):
    """The graphs of an executor can't be lowered or compiled; says what to install or to change."""


class StepError(NeuronPagedError, RuntimeError):
    """A model step failed. Its requests were ended and their blocks freed; the engine stays usable.

    outputs: the last RequestOutput of those of the caller's requests that it ended, with finish_reason "error".
    """

    def __init__(self, message: str, outputs: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.outputs = outputs


class RankError(StepError):
    """A rank of a tensor-parallel engine died or failed. All requests were ended, the other ranks were stopped; the
    engine refuses further work with the same error, and a new one has to be made."""


class IntegrityError(NeuronPagedError, AssertionError):
    """Block accounting is inconsistent: a defect in the engine, never the user's fault."""
