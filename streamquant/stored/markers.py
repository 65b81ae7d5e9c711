"""What a file says of its own layers: ComfyUI's markers, bitsandbytes' quant_state, the conversion's provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamquant import errors
from streamquant.checkpoint.header import Header, printable
from streamquant.checkpoint.json_text import MAX_MARKER_BYTES, load_json
from streamquant.checkpoint.reader import Checkpoint, SourceTensor
from streamquant.output_file import HASH_DIGITS, PROVENANCE_KEY, QUANTIZATION_KEY

from .layouts import Read


def json_tensor(read: Read, tensor: SourceTensor) -> dict[str, Any] | None:
    """The JSON object in a U8 tensor, perhaps padded with spaces; None when there is none."""
    if tensor.info.dtype != "U8" or tensor.info.nbytes > MAX_MARKER_BYTES:
        return None
    try:
        document = load_json(bytes(read(tensor, 0, tensor.info.nbytes)))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def listed_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The ComfyUI-quantized layers that the headers list, of all files. Raises MetadataError when an entry is malformed."""
    layers: dict[str, Any] = {}
    for file in checkpoint.files:
        try:
            listed = load_json(file.header.metadata.get(QUANTIZATION_KEY, "{}")).get("layers", {})
        except (ValueError, AttributeError):
            listed = None
        if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
            raise errors.MetadataError(
                f"{printable(str(file.path), 300)}: its {QUANTIZATION_KEY} entry is not the JSON object of layers it should "
                f"be: mend or remove it."
            )
        layers |= listed
    return layers


@dataclass(frozen=True)
class Provenance:
    """What a conversion wrote about itself into one file. hashes: tensor name -> xxh3_64 in hex. fault: what is wrong with
    it, a sentence; what is then not known is empty.
    """

    version: str
    recipe: dict[str, Any]
    source: list[dict[str, Any]]
    hashes: dict[str, str]
    entry: dict[str, Any]
    fault: str | None = None

    @property
    def decoded(self) -> dict[str, str]:
        """Tensor name -> the format that it was decoded from, in a file that `dequantize` wrote."""
        listed = self.entry.get("decoded")
        if not isinstance(listed, dict):
            return {}
        return {
            name: str(format)
            for format, names in listed.items()
            if isinstance(names, list)
            for name in names
            if isinstance(name, str)
        }


def provenance(header: Header, where: str) -> Provenance | None:
    """The `streamquant` entry of a header, or None when there is none."""
    text = header.metadata.get(PROVENANCE_KEY)
    if text is None:
        return None
    try:
        entry = load_json(text)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        fault = f"{printable(where, 300)}: its {PROVENANCE_KEY} entry is not a JSON object, so nothing tells how it was made."
        return Provenance("?", {}, [], {}, {}, fault)
    digits = entry.pop("tensor_xxh3_64", None)
    hashes, fault = {}, None
    if digits is not None:
        if not isinstance(digits, str) or any(digit not in "0123456789abcdef" for digit in digits):
            fault = f"{printable(where, 300)}: its manifest of hashes is damaged."
        elif len(digits) != HASH_DIGITS * len(header.tensors):
            fault = (
                f"{printable(where, 300)}: its manifest lists the hashes of {len(digits) / HASH_DIGITS:g} tensors, and it has "
                f"{len(header.tensors):,}: tensors were taken away or added after it was written, and no hash can be checked."
            )
        else:
            cuts = range(0, len(digits), HASH_DIGITS)
            hashes = dict(zip(header.tensors, (digits[cut : cut + HASH_DIGITS] for cut in cuts), strict=True))
    source = entry.get("source")
    recipe = entry.get("recipe")
    return Provenance(
        str(entry.get("version", "?")),
        recipe if isinstance(recipe, dict) else {},
        [part for part in source if isinstance(part, dict)] if isinstance(source, list) else [],
        hashes,
        entry,
        fault,
    )
