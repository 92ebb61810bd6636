"""`SketchConfig`: what a conversion should do."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from spallm_formats import shown, summary
from spallm_formats.dtypes import TABLE_DTYPES
from spallm_formats.metadata import MAPPINGS

from .calibration_config import CalibrationConfig, are_names, freeze_names
from .effort import BEST, EFFORTS, FAST, HIGH, NORMAL, Effort
from .errors import OptionError
from .recipe import AUTO, Recipe, bits_problems, groups_problems

#: `groups_per_row="auto"` takes as many groups as keep this many columns each, up to
#: AUTO_MAX_GROUPS: a group costs 2^bits x 16 bits of table, which is 0.25 bit per weight at 4 bits
#: and this width.
AUTO_COLUMNS = 1024
AUTO_MAX_GROUPS = 4

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """Options of a conversion. Together with the source they decide every byte of the result.

    A pattern is a shell pattern that is compared with the whole name of a layer, in the model and
    in the checkpoint. A pattern that matches no layer is an error. Weights that belong to one
    parameter of the model, such as those of all experts of a block, are sketched together: a
    pattern of `include` or `ignore` that matches one of them counts for all.

    Options hold what was given: None stays None, in `calibration` too. `level` and `text_options`
    return what follows from it. So `dataclasses.replace(config, effort="high")` gives the same
    config as giving the effort at first.

    Args:
        effort: "fast", "normal", "high" or "best": how much is done for the quality of the result,
            see `EFFORTS`. None: "normal" without `calibration` ("fast" for the mapping "hash"), and
            with it "high", or "best" if it heals.
        bits: 2, 3 or 4 bits per code, so 4, 8 or 16 entries per sketch table.
        groups_per_row: Tables per row ("GPR" in the SketchTune paper), a divisor of the columns of
            every sketched layer. "auto": as many as leave 1,024 columns each, at most 4.
        mapping: "cluster" (index map from exact 1-D k-means) or "hash" (computed, not stored). A
            hashed index map keeps only the mean of the weights that collide: without training,
            perplexity is above 10,000 at every width. It is the starting point for tables that are
            trained from scratch.
        table_dtype: "bfloat16", "float16" or "float32", the type of tables on disk.
        seed: Seed of the hash mapping and of everything that calibration and healing draw at
            random, 0 to 2^32 - 1.
        embeddings: Sketch the input embedding of tokens too. If the model ties the output head to
            it, both are one weight, which is sketched and stored once.
        lm_head: Sketch the output head too. If it is tied to the input embedding, this is the same
            as `embeddings`.
        include: Patterns of layers. If there are any, all other layers stay dense.
        ignore: Patterns of layers to leave dense, even if `include` or `recipe` names them.
        recipe: Other bits and groups for the layers that match a pattern. The last entry that
            matches a layer decides, and what it does not give is taken from `bits` and
            `groups_per_row`. With `target_bits`, it may only leave layers dense.
        strict: Raise SourceError, before any work, if more than 5 % of the linear weights would
            stay dense although no pattern asks for it. Without it, that is a warning. It does not
            change the result.
        max_shard_size: Largest size of a weight file, such as "5GB" (powers of 1000), or in bytes.
        calibration: The text that layers are fitted to, and how. None: as the effort has it, with
            the text "builtin". The effort "fast" reads no text, so it has none.

    Raises:
        OptionError: Names every value that is not accepted.
    """

    effort: str | None = None
    bits: int = 4
    groups_per_row: int | str = AUTO
    mapping: str = "cluster"
    table_dtype: str = "bfloat16"
    seed: int = 0
    embeddings: bool = False
    lm_head: bool = False
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    recipe: Recipe | None = None
    strict: bool = False
    max_shard_size: str | int = "5GB"
    calibration: CalibrationConfig | None = None

    def __post_init__(self) -> None:
        freeze_names(self, "include")
        freeze_names(self, "ignore")
        problems = bits_problems("bits", self.bits)
        problems += groups_problems("groups_per_row", self.groups_per_row)
        if self.mapping not in MAPPINGS:
            problems.append(f"mapping must be one of {MAPPINGS}, found {self.mapping!r}")
        if not isinstance(self.table_dtype, str) or self.table_dtype not in TABLE_DTYPES:
            accepted = tuple(TABLE_DTYPES)
            problems.append(f"table_dtype must be one of {accepted}, found {self.table_dtype!r}")
        if not (type(self.seed) is int and 0 <= self.seed < 2**32):
            problems.append(f"seed must be 0 to 2^32 - 1, found {self.seed!r}")
        problems += self._choice_problems()
        try:
            parse_size(self.max_shard_size)
        except OptionError as error:
            problems.append(f"max_shard_size: {error}")
        problems += self._effort_problems()
        if problems:
            raise OptionError("; ".join(problems))

    def _effort_problems(self) -> list[str]:
        """Return what is wrong with the effort and the options of its text."""
        found, effort = self.calibration, self.effort
        if found is not None and not isinstance(found, CalibrationConfig):
            return [f"calibration must be a CalibrationConfig, found {found!r}"]
        if effort is not None and not (isinstance(effort, str) and effort in EFFORTS):
            return [f"effort must be one of {tuple(EFFORTS)}, found {effort!r}"]
        if (text := self.text_options) is not None:
            return self._calibration_problems(text)
        wrong = "effort 'fast' reads no text: leave out calibration, or choose another effort"
        return [wrong] if found is not None else []

    def _choice_problems(self) -> list[str]:
        """Return what is wrong with the options that choose layers."""
        problems = []
        for name, patterns in (("include", self.include), ("ignore", self.ignore)):
            if not are_names(patterns):
                problems.append(f"{name} must be a sequence of patterns, found {patterns!r}")
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            problems.append(
                f"recipe must be a Recipe, found {self.recipe!r}: Recipe.read(FILE) and "
                f"Recipe.parse(DICT) make one"
            )
        for name in ("embeddings", "lm_head", "strict"):
            if type(getattr(self, name)) is not bool:
                problems.append(f"{name} must be True or False, found {getattr(self, name)!r}")
        return problems

    def _calibration_problems(self, calibration: CalibrationConfig) -> list[str]:
        """Return what the options of calibration contradict here."""
        problems = self._level_problems(calibration)
        computed = sorted({"compensation", "descent"} & set(calibration.without))
        if self.mapping == "hash" and computed:
            problems.append(
                f"without {', '.join(computed)}: only for the mapping 'cluster'; codes of the "
                f"mapping 'hash' are not chosen"
            )
        if calibration.target_bits is None:
            return problems
        if self.mapping != "cluster":
            problems.append(f"target_bits is for the mapping 'cluster', found {self.mapping!r}")
        for name, chosen in (("bits", self.bits), ("groups_per_row", self.groups_per_row)):
            if chosen != getattr(type(self), name):
                problems.append(f"target_bits chooses {name} itself, found {chosen!r}")
        rules = self.recipe.rules if isinstance(self.recipe, Recipe) else ()
        if choosing := [shown(rule.pattern) for rule in rules if rule.chooses]:
            problems.append(
                f"target_bits chooses bits and groups itself, found some in the recipe for "
                f"{summary(choosing, ', ')}: with target_bits, a recipe may only leave layers dense"
            )
        return problems

    def _level_problems(self, calibration: CalibrationConfig) -> list[str]:
        """Return which options of calibration the effort contradicts."""
        problems, effort = [], self.level.name
        if effort == BEST and not calibration.heal:
            problems.append("effort 'best' heals: choose 'high', or heal with at least 1 step")
        if calibration.heal and calibration.fallback:
            healing = "effort 'best' heals" if effort == BEST else f"heal {calibration.heal}"
            problems.append(
                f"{healing}: not with fallback, which may leave calibration out; leave fallback "
                f"out, or choose effort 'high' without heal"
            )
        if effort == NORMAL:
            for name in ("without", "heal", "target_bits"):
                if getattr(calibration, name):
                    problems.append(f"{name} is for the efforts 'high' and 'best'")
            if self.mapping == "hash":
                problems.append(
                    "effort 'normal' is for the mapping 'cluster', found 'hash': choose effort "
                    "'fast', 'high' or 'best'"
                )
        return problems

    @property
    def level(self) -> Effort:
        """The effort, or the one that follows from the other options."""
        if self.effort is not None:
            return EFFORTS[self.effort]
        if self.calibration is not None:
            return EFFORTS[BEST if self.calibration.heal else HIGH]
        return EFFORTS[FAST if self.mapping == "hash" else NORMAL]

    @property
    def text_options(self) -> CalibrationConfig | None:
        """`calibration`, with the options of the effort in place of None; None without a text."""
        level = self.level
        return (self.calibration or CalibrationConfig()).at(level) if level.reads_text else None

    @property
    def target_bits(self) -> float | None:
        """Bits per sketched weight to allocate among layers; None if all get `bits`."""
        return None if self.calibration is None else self.calibration.target_bits

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    def groups_for(self, in_features: int, groups: int | str | None = None) -> int:
        """Groups per row of a layer with `in_features` columns; an explicit number may not fit.

        Args:
            in_features: Number of columns.
            groups: Groups that a recipe gives to the layer, in place of `groups_per_row`.
        """
        wanted = self.groups_per_row if groups is None else groups
        if isinstance(wanted, int):
            return wanted
        fitting = (
            groups
            for groups in range(AUTO_MAX_GROUPS, 1, -1)
            if in_features % groups == 0 and in_features // groups >= AUTO_COLUMNS
        )
        return next(fitting, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the options as they stand in `conversion.json`, those of calibration beside them.

        `calibration` is the source of the text there, or None. `strict` is left out: it decides no
        byte of the result.
        """
        text = self.text_options
        options = asdict(self) | {"include": list(self.include), "ignore": list(self.ignore)}
        options["effort"] = self.level.name
        options["recipe"] = None if self.recipe is None else self.recipe.to_json()
        del options["strict"]
        nested = asdict(text or CalibrationConfig())
        source = nested.pop("text")
        nested["without"] = list(nested["without"])
        return options | {"calibration": None if text is None else source} | nested


def parse_size(size: str | int) -> int:
    """Bytes of a size such as "500MB"; raises OptionError."""
    if type(size) is int:
        bytes_ = size
    else:
        match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
        bytes_ = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if bytes_ <= 0:
        raise OptionError(f"expected a size such as 500MB or 5GB, found {size!r}")
    return bytes_
