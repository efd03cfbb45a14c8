"""What adapter_config.json says of a LoRA adapter, checked.

Refused by name: all whose effect is not base + scaling * B A (`NOT_A_SUM`, every other method of
PEFT), initialisations that changed the base (`OTHER_BASE`), settings that are not known here and
may change what is added, patterns that could take very many steps.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import comb, sqrt
from typing import Any, NamedTuple

from skillvec.errors import FormatError, IncompatibleError, printable, up_to_five

MOST_RANK, MOST_ALPHA = 1 << 20, 1e30
MOST_SIGNS, MOST_REPEATS, MOST_STEPS = 400, 4, 10**10  # of patterns: PEFT's own are names
MERGE = "merge it into its base (merge_and_unload, save_pretrained) and give the merged model"
UNMERGED = "it cannot be merged into weights, so there is no vector of it"
# what PEFT does not merge: tokens in place of weights, sums that depend on the input
UNMERGED_KINDS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
    "ADAPTION_PROMPT", "POLY", "XLORA", "LILY", "SHADOW",
)  # fmt: skip
# nor these of LoRA; it adds up replicated layers, which share their weights, and gets another model
UNMERGED_KEYS = ("alora_invocation_tokens", "arrow_config", "layer_replication")
NOT_A_SUM = {  # keys of adapter_config.json that, if set, make something else of LoRA
    "alora_invocation_tokens": "activated LoRA holds for some tokens only",
    "layer_replication": "layers are replicated, and each copy has a sum of its own",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "its factors are block-diagonal", "arrow_config": "Arrow routes tokens",
    "kasa_config": "KaSA truncates the base", "monteclora_config": "its factors are sampled",
    "velora_config": "VeLoRA keeps more than factors", "megatron_config": "layers of Megatron",
}  # fmt: skip
SAME_BASE = ("", "true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
OTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
NOVEL = (bool, dict, list)
FLAGS = ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias")
EMBEDDINGS = ("embed_tokens", "lm_head")  # as PEFT calls them
KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip


class LoraSettings(NamedTuple):
    """What adapter_config.json says of ranks, scalings and what is trained whole, checked.

    `saved` ends the names of modules that PEFT trains as copies beside the base's own; `tying`
    keeps what the base ties tied (ensure_weight_tying); `biases` are none, all or lora_only, and
    are saved whole; `tokens` are the rows that are trained (trainable_token_indices). `classes` are
    those of the model that it was made on, where it says so.
    """

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    turned: bool
    parameters: list[str]
    dora: bool
    biased: bool
    tokens: list[int] | dict[str, list[int]] | None
    saved: tuple[str, ...]
    tying: bool
    biases: str
    base_ref: str | None
    revision: str | None
    classes: tuple[str, ...]

    def of(self, key: str) -> tuple[int, float]:
        """Return the rank and the scaling of a module, or of a parameter, by its name."""
        rank = next(_matching(self.rank_pattern, key), self.rank)
        alpha = next(_matching(self.alpha_pattern, key), self.alpha)
        return rank, alpha / (sqrt(rank) if self.rslora else rank)

    def wraps(self, name: str) -> bool:
        """Return whether PEFT trains a parameter by itself, not a module (target_parameters)."""
        return any(f".{name}".endswith(f".{target}") for target in self.parameters)

    def doubt(self, keys: Iterable[str]) -> list[str]:
        """Say where several patterns give a module different alphas: PEFT saves them sorted.

        Of ranks the factors tell.
        """
        found = [key for key in keys if len({*_matching(self.alpha_pattern, key)}) > 1]
        if not found:
            return []
        more = f" and {len(found) - 1} more" if found[1:] else ""
        return [
            f"alpha_pattern: several patterns with different values match {found[0]}{more}: PEFT"
            " takes the first, and sorts them when it saves, so that it may have trained with"
            " another"
        ]

    def refuse_costly(self, modules: Sequence[str], what: str) -> None:
        """Raise FormatError where its patterns could take very many steps on names of modules."""
        longest = max(map(len, modules), default=0)
        patterns = *self.rank_pattern, *self.alpha_pattern
        if len(modules) * sum(_steps(pattern, longest) for pattern in patterns) > MOST_STEPS:
            raise FormatError(
                f"{what}: rank_pattern and alpha_pattern: too many wildcards for {len(modules)}"
                f" names of up to {longest} characters: {MERGE}"
            )


def _matching(patterns: Mapping[str, Any], key: str) -> Iterator[Any]:
    """Yield the values of the patterns that match a name as PEFT matches it."""
    return (value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", key))


def read_settings(
    config: Mapping[str, Any], what: str, where: str
) -> tuple[LoraSettings, list[str]]:
    """Check a config; return what decides the effect, and what is worth saying of the rest.

    `what` names the adapter in errors, `where` its config. Raises FormatError for values that
    cannot be, IncompatibleError for what is not taken.
    """
    _refuse_other_kinds(config, what)
    read = _Config(config, where)
    rslora, turned, dora, biased = [read.flag(key) for key in FLAGS]
    parameters = read.names("target_parameters", "a list of names")
    notes = _note_unknown(config, where)
    rank = read.number("r", config.get("r", 8))
    alpha = read.number("lora_alpha", config.get("lora_alpha", 8))
    maps = read.patterns("rank_pattern"), read.patterns("alpha_pattern")
    tokens = read.tokens()
    pairs = ("use_dora", "target_parameters"), ("lora_bias", "target_parameters")
    for one, other in (*pairs, ("use_dora", "lora_bias")):
        if config.get(one) and config.get(other):
            raise IncompatibleError(f"{what}: {one} with {other}, which PEFT does not load either")
    saved = read.names("modules_to_save", "names")
    tying = read.flag("ensure_weight_tying") and _embeds(saved, config.get("target_modules"))
    biases = config.get("bias") or "none"
    read.take("bias", biases, biases in ("none", "all", "lora_only"), "none, all or lora_only")
    ref, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not all(t is None or (type(t) is str and t == printable(t)) for t in (ref, revision)):
        raise FormatError(
            f"{what}: base_model_name_or_path, revision: {ref!r:.80}, {revision!r:.80}"
        )
    said = config.get("auto_mapping")
    named = said.get("base_model_class") if isinstance(said, dict) else None
    classes = (named,) if isinstance(named, str) else ()
    settings = LoraSettings(
        rank, alpha, *maps, rslora, turned, parameters, dora, biased, tokens, tuple(saved), tying,
        biases, ref or None, revision or None, classes,
    )  # fmt: skip
    return settings, notes


def _refuse_other_kinds(config: Mapping[str, Any], what: str) -> None:
    """Raise IncompatibleError for other methods than LoRA, and for what is no sum with the base."""
    kind = str(config.get("peft_type")).rpartition(".")[2]
    if kind != "LORA":
        advice = UNMERGED if kind in UNMERGED_KINDS else f"if PEFT loads it, {MERGE}"
        advice = advice if config.get("peft_type") else "PEFT does not load it either"
        raise IncompatibleError(f"{what}: peft_type {kind:.40}, expected LORA: {advice}")
    problems = [f"{key}: {why}" for key, why in NOT_A_SUM.items() if config.get(key)]
    advice = f" (if nothing else is said, {MERGE})" if problems else ""
    advice = f" ({UNMERGED})" if any(map(config.get, UNMERGED_KEYS)) else advice
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(OTHER_BASE):
        how = "save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        how = "merge it into the base that it was made with" if start == "loftq" else how
        problems.append(f"init_lora_weights {start:.40} changed the base: {how}")
    elif start not in SAME_BASE:
        problems.append(f"init_lora_weights {start:.40}: not known here")
    if problems:
        raise IncompatibleError(
            f"{what}: LoRA of a kind that is not taken{advice}:\n{up_to_five(problems)}"
        )


def _note_unknown(config: Mapping[str, Any], where: str) -> list[str]:
    """Say which settings are not known, and refuse those that may change what is added.

    They are of another version of PEFT: switches and settings may change it, numbers hardly.
    """
    novel = [key for key in config if key not in KNOWN and key not in NOT_A_SUM and config[key]]
    switches = [key for key in novel if key.startswith("use_") or isinstance(config[key], NOVEL)]
    if switches:
        version = config.get("peft_version")
        made = f", written by PEFT {version:.20}" if isinstance(version, str) else ""
        raise IncompatibleError(
            f"{where}{made}: not known here, and perhaps it changes what is added: with that PEFT"
            f" {MERGE}:\n" + up_to_five([f"{key}: {config[key]!r:.80}" for key in switches])
        )
    return [f"adapter_config.json: {key}: not known, ignored" for key in novel]


class _Config:
    """adapter_config.json, of which each value is checked as it is taken; else FormatError."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def take(self, key: str, value: Any, fits: bool, expected: str) -> Any:
        """Return a value that fits what is expected."""
        if not fits:
            raise FormatError(f"{self.where}: {key}: expected {expected}, found {value!r:.80}")
        return value

    def flag(self, key: str) -> bool:
        flag = self.config.get(key) or False
        return bool(self.take(key, flag, type(flag) is bool, "true or false"))

    def names(self, key: str, expected: str) -> list[str]:
        found = self.config.get(key) or []
        fits = isinstance(found, list) and all(type(name) is str and name for name in found)
        return list(self.take(key, found, fits, expected))

    def number(self, key: str, value: Any) -> Any:
        """Return a rank or an alpha; `key` is that of the number or of its pattern."""
        if key.startswith("r"):
            fits = type(value) is int and 0 < value <= MOST_RANK
            return self.take(key, value, fits, f"a rank from 1 to {MOST_RANK}")
        fits = type(value) in (int, float) and abs(value) < MOST_ALPHA
        return float(self.take(key, value, fits, f"a number below {MOST_ALPHA:g}"))

    def patterns(self, key: str) -> dict[str, Any]:
        held = self.config.get(key) or {}
        for pattern in self.take(key, held, isinstance(held, dict), "a map"):
            expected = f"a short pattern of at most {MOST_REPEATS} repeats"
            self.take(key, pattern, _is_harmless(pattern), expected)
        return {pattern: self.number(key, value) for pattern, value in held.items()}

    def tokens(self) -> list[int] | dict[str, list[int]] | None:
        """Return the numbers of rows that are trained, of some module or by the end of its name."""
        key = "trainable_token_indices"
        tokens = self.config.get(key)
        if tokens is None:
            return None
        for numbers in tokens.values() if isinstance(tokens, dict) else [tokens]:
            fits = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
            fits = fits and len(dict.fromkeys(numbers)) == len(numbers)
            self.take(key, tokens, fits, "different rows, by number from 0")
        found: list[int] | dict[str, list[int]] = tokens
        return found


def _embeds(saved: Sequence[str], targets: Any) -> bool:
    """Return whether PEFT takes what an adapter trains for the embeddings, which it then ties.

    It looks at the last parts of names in lists, and whether a pattern is one of those names.
    """
    if any(name.rpartition(".")[2] in EMBEDDINGS for name in saved):
        return True
    if isinstance(targets, str):
        return _is_harmless(targets) and any(re.fullmatch(targets, name) for name in EMBEDDINGS)
    named = targets if isinstance(targets, list) else []
    return any(str(name).rpartition(".")[2] in EMBEDDINGS for name in named)


def _is_harmless(pattern: str) -> bool:
    """Return whether a text is a regular expression that cannot take very many steps."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = len(re.findall(r"[*+{]", pattern))
    few = len(pattern) <= MOST_SIGNS and repeats <= MOST_REPEATS
    return few and not re.search(r"\)[*+{]", pattern)  # nor a group that is repeated


def _steps(pattern: str, length: int) -> int:
    """Return a bound on the ways in which a pattern can be tried on a name of a length."""
    repeats, forks = (len(re.findall(signs, pattern)) for signs in (r"[*+{]", r"[?|]"))
    return comb(length + 1, repeats + 1) << forks
