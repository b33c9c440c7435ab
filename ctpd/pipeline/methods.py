"""The one table of method names. A method is an objective class, named by a string and imported on use."""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import BaseModel

from ctpd.core.config import Config, nearest, validate
from ctpd.core.errors import UserError
from ctpd.objectives.base import Objective

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


def make_objective(method: str, params: Mapping[str, Any], *, source: str) -> Objective:
    """The objective of a method with these parameters.

    Args:
        method: a name of the table.
        params: the recipe's values; the objective's defaults fill the rest.
        source: the recipe and run, for errors.

    Raises:
        UserError: unknown method or parameter, or values that contradict each other.
    """
    cls = _objective_type(method, source=source)
    try:
        objective: Objective = cls(_validated(cls.params_type, params, source=source))
    except UserError as error:
        if error.where is not None:
            raise
        raise UserError(error.what, where=source, fix=error.fix) from error
    return objective


def params_type(method: str) -> type[BaseModel]:
    """The type of a method's parameters.

    Raises:
        UserError: unknown method.
    """
    return _config(_objective_type(method, source=None).params_type)


def _objective_type(method: str, *, source: str | None) -> type[Objective]:
    if method not in METHODS:
        raise UserError(
            f"there is no method '{method}'.{nearest(method, METHODS)}",
            where=source,
            fix=f"Use one of: {', '.join(METHODS)}",
        )
    module, _, name = METHODS[method].partition(":")
    found: type[Objective] = getattr(importlib.import_module(module), name)
    return found


def _validated(params_type: type[Any], params: Mapping[str, Any], *, source: str) -> Any:
    checked = validate(_config(params_type), params, source=source)
    return checked if isinstance(checked, params_type) else params_type(**dict(checked))


def _config(params_type: type[Any]) -> type[BaseModel]:
    """The type itself, or a copy of one that is still a dataclass. To be removed when none is left (preference, dpo, tis_dpo)."""
    if issubclass(params_type, BaseModel):
        return params_type
    hints = typing.get_type_hints(params_type)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclasses.fields(params_type)
    }
    return pydantic.create_model(params_type.__name__, __base__=Config, **fields)
