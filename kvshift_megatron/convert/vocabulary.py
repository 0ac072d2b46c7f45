"""How many rows of a Megatron checkpoint's embedding are tokens; the rest is padding."""

from argparse import Namespace
from pathlib import Path

from kvshift_megatron.convert.formats.tokenizer_files import SUBFOLDER, has_tokenizer
from kvshift_megatron.convert.formats.tokenizer_vocabulary import read_vocabulary


def tokenizer_folder(arguments: Namespace, checkpoint: Path, given: Path | None) -> Path:
    """Return the folder for a checkpoint's tokenizer; it may be missing.

    Args:
        arguments: Megatron's training arguments.
        checkpoint: The folder of one iteration.
        given: The user's. None takes the one beside the iteration, or else the one that the model
            was trained with, if it holds a tokenizer.
    """
    beside = checkpoint.parent / SUBFOLDER
    if given is not None or has_tokenizer(beside):
        return given or beside
    name = getattr(arguments, "tokenizer_model", None)
    path = Path(name) if isinstance(name, str) and name else beside
    if path.is_file() and path.name == "tokenizer.model":
        path = path.parent
    return path if has_tokenizer(path) else beside


def number_of_tokens(
    arguments: Namespace, given: int | None, padded: int, checkpoint: Path, tokenizer: Path
) -> int:
    """Return the number of tokens that exist.

    Args:
        arguments: Megatron's training arguments.
        given: The user's number, or None.
        padded: Rows of the embedding.
        checkpoint: Path of the checkpoint, for messages.
        tokenizer: Folder for the tokenizer's files.

    Raises:
        ValueError: The sources contradict each other, or none says it.
    """
    stated = getattr(arguments, "padded_vocab_size", None)
    if stated is not None and stated != padded:
        raise ValueError(
            f"{checkpoint}: the embedding has {padded} rows, but the arguments say "
            f"padded_vocab_size={stated}: they are not of the same model"
        )
    if given is not None:
        if not 0 < given <= padded:
            raise ValueError(
                f"--vocab-size {given} must be between 1 and {padded}, the number of rows of the "
                f"embedding in {checkpoint}"
            )
        return given
    noted = getattr(arguments, "tokenizer_vocab_size", None)  # by this package's entry point
    if isinstance(noted, int) and 0 < noted <= padded:
        return noted
    multiple = (getattr(arguments, "make_vocab_size_divisible_by", None) or 1) * (
        getattr(arguments, "tensor_model_parallel_size", None) or 1
    )
    recorded = _recorded(arguments, padded)
    if recorded is not None:
        if not recorded <= padded < recorded + 2 * multiple:
            raise ValueError(
                f"{checkpoint}: the embedding has {padded} rows, which is not vocab_size={recorded}"
                f" padded to a multiple of {multiple}: give the number of tokens with --vocab-size"
            )
        return recorded
    if tokens := _of_tokenizer(arguments, tokenizer):
        if tokens > padded:
            raise ValueError(
                f"{tokenizer}: the tokenizer has {tokens} tokens, but the embedding in {checkpoint}"
                f" has {padded} rows: name the right one with --tokenizer, or the number of tokens "
                "with --vocab-size"
            )
        return tokens
    if multiple == 1:
        return padded
    raise ValueError(
        f"{checkpoint}: the checkpoint's arguments do not say how many of the embedding's {padded} "
        "rows are tokens and how many are padding: add --tokenizer FOLDER, or --vocab-size with "
        "the number of tokens"
    )


def _recorded(arguments: Namespace, padded: int) -> int | None:
    size = getattr(arguments, "vocab_size", None)
    is_null = getattr(arguments, "tokenizer_type", None) == "NullTokenizer"
    if size is not None and is_null and not hasattr(arguments, "null_tokenizer_eod_id"):
        # Until 0.17, NullTokenizer had one more token, for the end of a document.
        return min(size + 1, padded)
    return size


def _of_tokenizer(arguments: Namespace, folder: Path) -> int:
    tokens = read_vocabulary(folder).tokens
    if not tokens:
        return 0
    # Megatron appends those that the tokenizer lacks.
    special = getattr(arguments, "special_tokens", None) or []
    return max(tokens.values()) + 1 + len(set(special) - tokens.keys())
