"""The table of methods, and a method with its parameters as data."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ctpd.core.config import Config, nearest, validate
from ctpd.core.errors import UserError
from ctpd.pipeline.stage import Part

if TYPE_CHECKING:
    from ctpd.objectives.base import Objective, Requirements

METHODS: Mapping[str, str] = {
    "sft": "baselines.sft:SFT",
    "dpo": "baselines.dpo:DPO",
    "tis_dpo": "baselines.tis_dpo:TISDPO",
    "ctpd": "ctpd.objectives.preference:Preference",
    "sequence_kd": "baselines.sequence_kd:SequenceKD",
    "token_kd": "baselines.token_kd:TokenKD",
    "dckd": "baselines.dckd:DCKD",
    "adpa": "baselines.adpa:ADPA",
    "multi_level_ot": "baselines.multi_level_ot:MultiLevelOT",
    "alm": "baselines.alm:ALM",
    "gold": "baselines.gold:GOLD",
    "x_token": "baselines.x_token:XToken",
    "dskd": "baselines.dskd:DSKD",
    "dskd_cma": "baselines.dskd_cma:DSKDCMA",
    "mined": "baselines.mined:MinED",
    "uld": "baselines.uld:ULD",
}


@dataclass(frozen=True)
class Method(Part):
    """A method of `METHODS` with its parameters and requirements: data, not yet a module.

    Attributes:
        name: a key of `METHODS`.
        params: every parameter of the objective.
        requires: what has to be prepared for the objective; determined by name and parameters.
    """

    name: str
    params: Config
    requires: "Requirements" = field(repr=False)

    @property
    def identity(self) -> Any:
        """Name and parameters."""
        from ctpd.core.identity import identity

        return {"name": self.name, "params": identity(self.params)}

    @classmethod
    def make(cls, name: str, params: Mapping[str, Any], *, source: str) -> "Method":
        """Check the parameters of a method; missing ones get their defaults.

        Args:
            name: a key of `METHODS`.
            params: the recipe's values.
            source: the recipe and run, for errors.

        Raises:
            UserError: unknown method or parameter, or values out of range or contradictory.
        """
        objective_class = _objective_class(name, source=source)
        try:
            checked = validate(objective_class.params_type, params, source=source)
            # The module is constructed only to read its requirements; before `bind` it has no weights.
            return cls(name, checked, objective_class(checked).requirements)
        except UserError as error:
            if error.where is not None:
                raise
            raise UserError(error.what, where=source, fix=error.fix) from error

    def objective(self) -> "Objective":
        """Construct the objective's module."""
        module: Objective = _objective_class(self.name, source=self.name)(self.params)
        return module


def params_type(name: str) -> type[Config]:
    """The type of a method's parameters.

    Raises:
        UserError: unknown method.
    """
    found: type[Config] = _objective_class(name, source=None).params_type
    return found


def _objective_class(name: str, *, source: str | None) -> Any:
    if name not in METHODS:
        raise UserError(
            f"there is no method '{name}'.{nearest(name, METHODS)}",
            where=source,
            fix=f"Use one of: {', '.join(METHODS)}",
        )
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
