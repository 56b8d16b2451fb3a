"""The errors jaxquant raises, by name: each message says which parameter, which value, and the fix."""


class FormatError(ValueError):
    """A `Format` that cannot exist: a bad width, group or combination."""


class ShapeError(ValueError):
    """An array whose shape does not fit the format asked for, such as a group that does not divide it."""


class NonFiniteError(ValueError):
    """A NaN or an infinity in an array that was to be quantized."""


class NoMatchError(ValueError):
    """A rule that chooses no parameter at all."""


class NotQuantizableError(TypeError):
    """A value that has no quantized form: an integer, complex or key array, or a `QTensor` already."""


class ClosureError(TypeError):
    """A weight in codes, with an adapter or with a learned range, used as if it were an array."""


class StatsError(ValueError):
    """Statistics that a quantizer needs and does not have, or that do not fit the parameter."""


class CalibrationError(ValueError):
    """Calibration that saw no batch, or a batch it cannot use."""


class OptionError(ValueError):
    """An option of a quantizer outside of what it can mean."""


class UnseenError(TypeError):
    """A parameter whose matmuls cannot be observed where they are."""


class AdapterError(TypeError):
    """An adapter that cannot be merged, or a leaf that cannot have one."""


class MissingPackageError(ImportError):
    """An optional package that something needs and that is not installed."""


class CompileError(RuntimeError):
    """A program that the compiler of another device refused, or broke on."""


class FileError(ValueError):
    """A file that is not what it says it is, or holds what cannot be read."""


class ChecksumError(FileError):
    """Bytes of a file that are not those that were written."""
