"""Values of Arrow arrays: bytes as they are, all else as JSON-able Python values.

Texts in a file need not be UTF-8, nor dates ones that Python has.
"""

from __future__ import annotations

import math
from typing import Any


def is_binary(kind: Any) -> bool:
    """Whether values of an Arrow type are bytes."""
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in tests) or types.is_fixed_size_binary(kind)


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return any(t(kind) for t in (types.is_string, types.is_large_string, types.is_string_view))


def unwrapped(array: Any) -> Any:
    """An array without dictionary or extension type around its values."""
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def bytes_of(array: Any) -> list[bytes | None]:
    """The bytes of binary values, of texts (which need not be UTF-8) or of images in a struct."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        array = array.flatten()[array.type.get_field_index("bytes")]  # null where the struct is
    return [value.as_buffer().to_pybytes() if value.is_valid else None for value in array]


def bytes_or_values(array: Any) -> list[Any]:
    """`bytes_of` where that applies, else `json_values_of`."""
    has_bytes = _is_string(array.type) or is_binary(array.type)
    return bytes_of(array) if has_bytes else json_values_of(array)


def text_of(value: Any) -> str:
    """One value as a text; bytes that are no UTF-8 are spelled out."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def json_values_of(array: Any) -> list[Any]:
    """JSON-able values: times and decimals as texts, NaN as null."""
    from pyarrow import types

    if _is_string(array.type):
        return [None if value is None else text_of(value) for value in bytes_of(array)]
    try:
        if types.is_temporal(array.type) or types.is_decimal(array.type):
            array = array.cast("string")
        return [_json_able(value) for value in array.to_pylist()]
    except (ValueError, OverflowError):  # a text that is no UTF-8, a date that Python has not
        return [array.slice(i, 1).to_string() for i in range(len(array))]


def _json_able(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _json_able(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_able(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)  # pandas writes NaN for what is missing
    return value if value is None or isinstance(value, bool | int | float | str) else text_of(value)
