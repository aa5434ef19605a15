"""Every exception of the library. Messages say what was wrong, what was expected, what to do."""


class HookedLMError(Exception):
    """Base of every error this library raises on purpose."""


class HookNameError(HookedLMError, KeyError):
    """A hook name (or filter) that matches nothing in this model."""

    def __str__(self) -> str:  # KeyError would print the repr, with its newlines escaped
        return str(self.args[0])


class HookNeverFiredError(HookedLMError, RuntimeError):
    """A hook that was asked for by name and did not run."""


class HookReturnError(HookedLMError, ValueError):
    """A hook returned something that can't stand in for the activation."""


class NoGradientError(HookedLMError, RuntimeError):
    """A backward hook on a tensor through which no gradient will flow."""


class CacheKeyError(HookedLMError, KeyError):
    """An activation that is neither in the cache nor derivable from what is."""

    def __str__(self) -> str:
        return str(self.args[0])


class CacheFileError(HookedLMError, OSError):
    """A file of activations that is damaged, or of another model."""


class StaleCacheError(HookedLMError, RuntimeError):
    """A deferred activation whose ingredients changed before it was read."""


class ConfigError(HookedLMError, ValueError):
    """A configuration that can't be built."""


class InputError(HookedLMError, ValueError):
    """An argument of a run that makes no sense for this model."""


class UnknownInputError(InputError, TypeError):
    """A keyword of a run that neither hookedlm nor this model knows."""


class TokenizerError(HookedLMError, ValueError):
    """Text was given or asked for, and the tokenizer can't provide it."""


class NotOneTokenError(TokenizerError, AssertionError):
    """A string that should be one token is none or several."""


class LoadError(HookedLMError, OSError):
    """A model that can't be found or read."""


class ConversionError(HookedLMError, RuntimeError):
    """A model, or a part of it, that could not be made uniform although that was demanded."""


class ProcessingError(HookedLMError, RuntimeError):
    """A change of the weights that would have changed what the model says."""


class WeightError(HookedLMError, AttributeError):
    """A weight this model does not have in the shape asked for."""
