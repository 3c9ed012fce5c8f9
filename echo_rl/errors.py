"""Defines the typed errors. Each message says what is wrong and what to do about it."""


class EchoError(Exception):
    """Base of every error that this package raises on bad input."""


class ConfigError(EchoError, ValueError):
    """A setting is unknown or out of range."""


class DatasetError(ConfigError):
    """A file of prompts or of arrivals is missing, damaged or not in a form that is read."""


class HeldOutError(ConfigError):
    """Prompts that only judge were asked for to train or tune on."""


class RequestError(EchoError, ValueError):
    """A request cannot be served as it is (prompt too long, bad sampling parameters)."""


class WeightsError(EchoError, ValueError):
    """Model files are missing, corrupt, or of an architecture that is not supported."""


class DrafterMismatch(WeightsError):
    """A drafter that does not fit the target it was asked to draft for."""


class TraceError(EchoError, ValueError):
    """A recording is missing, damaged, of another version, or doesn't hold what is asked of it."""


class PolicyError(ConfigError):
    """A learned policy's files are missing, damaged or don't fit this release, or it said something unusable."""


class UnknownController(ConfigError):
    """No controller is registered under that name."""


class KVExhausted(EchoError, RuntimeError):
    """The KV cache has no free block where the conservation law promised one."""


class IntegrityError(EchoError, RuntimeError):
    """The KV conservation law is broken: a bug in this package, never the user's fault."""


class PlanViolation(EchoError, RuntimeError):
    """A controller asked for more than its own plan or the engine's limits allow."""


def explain(error: BaseException) -> str:
    """The error in one line; with its class where the message was not written for users."""
    return str(error) if isinstance(error, EchoError) else f"{type(error).__name__}: {error}"
