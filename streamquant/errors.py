"""Every way streamquant can fail, by name.

One tree: each failure is a class, each class has an exit code, and each message is a sentence that says what
happened, where, and what to do next. Code that meets a failure it cannot mend raises one of these; nothing
catches them to carry on.
"""

from __future__ import annotations


class StreamquantError(Exception):
    """Base of every failure the user is told about. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(StreamquantError):
    """The request itself makes no sense: flags that contradict, a bad regular expression, an unknown name."""

    exit_code = 2


class PatternError(UsageError):
    """A regular expression does not compile, or finds no layer that could be quantized."""


class LayerConfigError(UsageError):
    """A layer-config file cannot be read as the regex-to-format table it should be."""


class PreflightError(StreamquantError):
    """Refused before the first weight was read, because the conversion could not succeed."""

    exit_code = 4


class OutputExistsError(PreflightError):
    """The destination is already there and --force was not given."""


class OutputIsInputError(PreflightError):
    """The destination is the source, or one of its shards."""


class DiskSpaceError(PreflightError):
    """The destination's disk has less free space than the planned file needs."""


class BudgetError(PreflightError):
    """The memory budget does not hold the smallest possible tile."""


class DeviceError(PreflightError):
    """The device asked for does not exist here."""


class NothingToConvertError(PreflightError):
    """No layer would be quantized."""


class CheckpointError(StreamquantError):
    """The source is not a checkpoint we can read."""

    exit_code = 5


class SourceMissingError(CheckpointError):
    """There is no file or folder at the source path, or the folder holds no checkpoint."""


class NotSafetensorsError(CheckpointError):
    """The source is another kind of file (a pickle, a GGUF), named for what it is."""


class HeaderError(CheckpointError):
    """A safetensors header breaks the format. Each way has a subclass of its own."""


class FileTooShortError(HeaderError):
    """Fewer than the 8 bytes of the header length."""


class HeaderLengthError(HeaderError):
    """The header length is 0 or above the format's limit of 100,000,000 bytes."""


class HeaderPastEndError(HeaderError):
    """The header would reach past the end of the file."""


class HeaderNotUtf8Error(HeaderError):
    """The header is not UTF-8."""


class HeaderStartError(HeaderError):
    """The header does not start with an opening brace."""


class HeaderNotJsonError(HeaderError):
    """The header is not one JSON object followed by nothing but spaces."""


class DuplicateKeyError(HeaderError):
    """A key appears twice in one object."""


class MetadataError(HeaderError):
    """`__metadata__` is not a map of strings to strings."""


class TensorEntryError(HeaderError):
    """A tensor's entry does not hold exactly dtype, shape and data_offsets, each of the right kind."""


class UnknownDtypeError(HeaderError):
    """A dtype that the format does not know."""


class ShapeError(HeaderError):
    """A dimension is negative or not an integer, or the element count overflows 64 bits."""


class OffsetsReversedError(HeaderError):
    """A tensor ends before it begins."""


class OffsetsOverlapError(HeaderError):
    """A tensor begins before the previous one's end."""


class OffsetsGapError(HeaderError):
    """A tensor begins after the previous one's end."""


class SizeMismatchError(HeaderError):
    """end - start is not what dtype and shape need, or that is not a whole number of bytes."""


class TruncatedFileError(HeaderError):
    """The data ends before the last tensor does."""


class TrailingBytesError(HeaderError):
    """The file goes on after the last tensor."""


class IndexFileError(CheckpointError):
    """A shard index (`*.index.json`) is malformed or does not agree with its shards."""


class ShardMissingError(IndexFileError):
    """A shard named by the index is not there."""


class ShardOutsideFolderError(IndexFileError):
    """The index names a shard outside its own folder."""


class ShardContentError(IndexFileError):
    """A shard holds a tensor it is not listed for, lacks one it is listed for, or repeats another shard's."""


class NonFiniteError(StreamquantError):
    """A weight is NaN or infinite (or becomes so by a cast)."""

    exit_code = 8


class CalibrationError(StreamquantError):
    """A calibration file is not one, is damaged, or does not fit: the layer, the other file, or the model."""

    exit_code = 10


class RunError(StreamquantError):
    """The conversion stopped half-way; the partial file is kept and `--resume` goes on from it."""


class SourceReadError(RunError):
    """The source could not be read, vanished, or changed during the run."""

    exit_code = 6


class DestinationWriteError(RunError):
    """The destination could not be written: disk full, quota, I/O error, folder gone."""

    exit_code = 7


class ResumeError(StreamquantError):
    """The partial file belongs to a different conversion; the differences are named."""

    exit_code = 9


class InterruptedRunError(RunError):
    """Ctrl-C or SIGTERM: stopped cleanly at a tile, resumable."""

    exit_code = 130


class UnsoundOutputError(StreamquantError):
    """Verified, and not sound: the findings name each fault."""

    exit_code = 11
