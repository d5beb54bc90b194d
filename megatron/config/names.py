"""Keys under other names than ours: earlier names of NeoX, names of the StructMoE author's fork, and DeepSpeed's names inside
`deepspeed_extra_args`.

Such a key acts exactly as the key that it stands for, and its words are translated. Messages use the name that was
written."""

from __future__ import annotations

from typing import Any

from megatron.config.aliases import IMPLIED, OFF_AT_ZERO, OTHER_WORDS, RENAMED
from megatron.config.deepspeed import NEOX_KEYS
from megatron.config.source import COMMAND_LINE, KeyPath, Source, canonical

_EXTRA = "deepspeed_extra_args"


def resolve_names(source: Source, problems: list[str]) -> None:
    """Gives every key in `source` its own name; giving a key under two names is a problem."""
    _lift_extra_arguments(source, problems)
    for old in [key for key in source.values if key in RENAMED]:
        if source.values[old] is not None:
            _move(source, (old,), tuple(RENAMED[old].split(".")), problems)
        source.drop(old)
    for path, old in list(source.written.items()):
        _translate(source, path, old)


def _translate(source: Source, path: KeyPath, old: str) -> None:
    """Another name's words in ours; what it turns off is as if it had not been given."""
    value = _value_at(source, path)
    if old in OTHER_WORDS and isinstance(value, str):
        source.values[path[0]] = OTHER_WORDS[old].get(value.lower(), value)
    if old in OFF_AT_ZERO and type(value) in (int, float) and value == 0:
        others = {key: coefficient for key, coefficient in source.values[path[0]].items() if key != path[1]}
        source.written.pop(path)
        if others:
            source.values[path[0]] = others
        else:
            source.drop(path[0])


def written_names(source: Source) -> dict[str, Any]:
    """The values of the keys that were given under other names, under those names."""
    found = {old: _value_at(source, path) for path, old in source.written.items() if old in RENAMED}
    for old, words in OTHER_WORDS.items():
        if isinstance(found.get(old), str):
            found[old] = {ours: theirs for theirs, ours in words.items()}.get(found[old], found[old])
    lifted = {name.split(".")[1]: _value_at(source, path) for path, name in source.written.items() if name.startswith(f"{_EXTRA}.")}
    return found | ({_EXTRA: source.values[_EXTRA] | lifted} if lifted else {})


def add_implied(source: Source) -> None:
    """Keys that another name stands for besides its own, unless they are given themselves."""
    for old, key, value in IMPLIED:
        path = tuple(RENAMED[old].split("."))
        if source.written.get(path) == old and key not in source.values:
            source.values[key] = value
            if (place := source.place_of(path)) is not None:
                source.places[(key,)] = place
            source.written[(key,)] = f"{key} (set by {old})"


def _move(source: Source, old: KeyPath, new: KeyPath, problems: list[str]) -> None:
    """Puts the value at `old` where `new` says (one level of dictionaries at most), with its places."""
    value = _value_at(source, old)
    holder = source.values if len(new) == 1 else source.values.get(new[0]) or {}
    if not isinstance(holder, dict):
        return  # the section says that it must be a dictionary
    if new[-1] in holder:
        where, name = source.place_of(old), ".".join(new)
        text = f"'{'.'.join(old)}' is another name of '{name}', which is given too; keep one of them"
        problems.append(f"{where}: {text}" if where else text)
        return
    if len(new) > 1:
        source.values[new[0]] = {**holder, new[-1]: value}
        if (place := source.place_of(old)) is not None:
            source.places.setdefault(new[:1], place)
    else:
        source.values[new[0]] = value
    source.places.update({(*new, *path[len(old) :]): place for path, place in list(source.places.items()) if path[: len(old)] == old})
    source.written[new] = ".".join(old)


def _value_at(source: Source, path: KeyPath) -> Any:
    value: Any = source.values
    for part in path:
        value = value[part]
    return value


def _lift_extra_arguments(source: Source, problems: list[str]) -> None:
    """What stands in `deepspeed_extra_args` and is a key of its own becomes that key."""
    extra: Any = source.values.get(_EXTRA)
    for inner in [key for key in extra if canonical(str(key)) in NEOX_KEYS] if isinstance(extra, dict) else []:
        if source.place_of((_EXTRA, inner)) == COMMAND_LINE:
            source.drop(canonical(inner))  # it wins over what a file says
        _move(source, (_EXTRA, inner), (canonical(inner),), problems)
        extra = {key: value for key, value in extra.items() if key != inner}
        source.values[_EXTRA] = extra
