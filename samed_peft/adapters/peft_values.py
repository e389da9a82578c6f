"""Check the values of `adapter_config.json` before PEFT sees them.

PEFT matches its names of layers as regular expressions, imports modules that the file names, reads further files and
changes the base's weights, depending on its fields. Ours hold what `save_adapter` writes; all others must have PEFT's
defaults.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

from samed_peft.config import METHODS, SamedConfig, Storage
from samed_peft.config.patterns import LAYER_PATTERN, is_layer_pattern
from samed_peft.errors import InputError

_MOST_RANK, _MOST_ALPHA = 1 << 16, 1e6
_MOST_NAMES = 4096


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", value) is not None


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_is_name, value))


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= _MOST_ALPHA and math.isfinite(value)  # type: ignore[operator, arg-type]


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]


def _by_layer(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda found: (
        isinstance(found, dict)
        and len(found) <= _MOST_NAMES
        and all(is_layer_pattern(key) and is_value(value) for key, value in found.items())
    )


def _is_own_class(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(map(_is_name, value.values()))
        and str(value.get("parent_library")).startswith("samed_peft.")
    )


_LAYERS = (
    f"names of layers, or {LAYER_PATTERN}",
    lambda value: _are_names(value) or is_layer_pattern(value),
)
_RANK = (f"a whole number up to {_MOST_RANK}", _is_rank)
_SHARE = ("a number of at least 0 and below 1", _is_share)
_TEXT = ("a text or null", lambda value: value is None or isinstance(value, str))

_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "auto_mapping": ("the class that save_adapter writes", _is_own_class),
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "inference_mode": ("true or false", lambda value: isinstance(value, bool)),
    "r": _RANK,
    "oft_block_size": _RANK,
    "lora_alpha": (f"a number above 0 and up to {_MOST_ALPHA:g}", _is_alpha),
    "lora_dropout": _SHARE,
    "vera_dropout": _SHARE,
    "module_dropout": _SHARE,
    "target_modules": _LAYERS,
    "feedforward_modules": ("null, " + _LAYERS[0], lambda value: value is None or _LAYERS[1](value)),
    "modules_to_save": ("null or a list of names", lambda value: value is None or _are_names(value)),
    "rank_pattern": (f"an object with ranks by {LAYER_PATTERN}", _by_layer(_is_rank)),
    "alpha_pattern": (f"an object with numbers above 0 by {LAYER_PATTERN}", _by_layer(_is_alpha)),
}
"""Fields whose values differ between adapters: what each may be, as errors say it, and whether a value is that."""


_OWN_TYPES = {PeftType.LORA.value, *(method.peft_type for method in METHODS.values())}


def check_values(values: Mapping[str, Any], config: SamedConfig, path: Path) -> None:
    """Refuse values that `save_adapter` does not write for an adapter of this config.

    Fields that this version of PEFT does not have are left to PEFT, which ignores them with a warning.

    Raises:
        InputError: naming the first field.
    """
    method = METHODS[config.method]
    is_as_trained = method.storage is Storage.AS_TRAINED
    kind = method.peft_type if is_as_trained else PeftType.LORA.value
    chosen = method.peft_values(config) if is_as_trained else {}
    if (found := values["peft_type"]) != kind:
        # PEFT has more methods than our records; an adapter of one, made by PEFT's own functions, has its defaults.
        if found in _OWN_TYPES or found not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise _unexpected("peft_type", f"{kind}, that of the method {config.method}", found, path)
        kind, chosen = found, {}
    known = {field.name: field for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    for name in known.keys() & values.keys() - {"peft_type", "runtime_config"}:  # PEFT itself drops the latter
        value = values[name]
        if name in _FIELDS:
            expected, is_expected = _FIELDS[name]
            if not is_expected(value):
                raise _unexpected(name, expected, value, path)
            continue
        usual = chosen[name] if name in chosen else _default(known[name])
        if value != usual or type(value) is not type(usual):
            raise _unexpected(name, f"{usual!r}", value, path)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _unexpected(name: str, expected: str, value: object, path: Path) -> InputError:
    return InputError(
        f"expected {expected} as {name} in {path}, found {value!r:.120}; save_adapter does not write that: the file is "
        "damaged or comes from elsewhere, fetch or save the adapter again"
    )
